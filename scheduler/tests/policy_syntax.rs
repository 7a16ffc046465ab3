//! `--sched` from the outside: what it reads, what it refuses and how it says so, and that it prints what it reads.

use proptest::prelude::*;
use scheduler::{
    Cap, Cores, CpuSet, Deadline, Gang, Helpers, Placement, Slice, SmtIsolation, VmPolicy,
};

fn read(text: &str) -> VmPolicy {
    text.parse()
        .unwrap_or_else(|error| panic!("{text}: {error}"))
}

#[test]
fn every_key_at_once() {
    let policy = read(
        "placement=dedicated,cores=whole,weight=200,cap=40%:10ms,burst=2ms,reserve=300m,helpers=[0-1],strict=on,smt=vm,overcommit=4",
    );
    assert_eq!(
        policy.placement,
        Placement::Dedicated {
            cores: Cores::Whole
        }
    );
    assert_eq!(
        policy.cap,
        Some(Cap {
            quota_us: 4000,
            period_us: 10_000,
            burst_us: 2000
        })
    );
    assert_eq!(policy.reserve_millicpus, Some(300));
    assert_eq!(policy.overcommit_milli, Some(4000));
    assert_eq!(policy.helpers, Helpers::Set("0-1".parse().expect("a list")));
    assert!(policy.strict && policy.check(4).is_empty());
    let policy = read("slice=latency,gang=adaptive:20ms,overcommit=1.5");
    assert_eq!(policy.gang, Gang::Adaptive { quantum_us: 20_000 });
    assert_eq!(
        policy.to_string(),
        "placement=shared,slice=latency,gang=adaptive:20ms,overcommit=1.5"
    );
    assert_eq!(
        read("deadline=2ms/10ms").deadline,
        read("deadline=2ms/10ms/10ms").deadline
    );
}

#[test]
fn other_ways_of_saying_it() {
    assert_eq!(read(""), VmPolicy::default());
    assert_eq!(read("cap=150%").cap, read("cap=15ms:10ms").cap);
    assert_eq!(
        read("burst=2ms,cap=40%").cap,
        read("cap=40%,burst=2000us").cap
    );
    assert_eq!(read("reserve=1.5"), read("reserve=1500m"));
    assert_eq!(read("cores=one"), read("placement=dedicated,cores=one"));
    assert_eq!(read("node=1"), read("placement=numa-local,node=1"));
    assert_eq!(
        read("map=[0@[2,3],1@4]"),
        read("placement=map,map=[0@2-3,1@[4]]")
    );
    assert_eq!(read("helpers=3"), read("helpers=[3]"));
    assert_eq!(read("latency"), read("slice=latency"));
    assert_eq!(
        read("realtime,strict=off,cores=any").to_string(),
        "placement=dedicated,smt=vm"
    );
    assert_eq!(
        read("realtime,placement=shared,strict=off").to_string(),
        "placement=shared,smt=vm"
    );
    for preset in VmPolicy::PRESETS {
        let policy = VmPolicy::preset(preset).expect("known");
        assert!(policy.check(1).is_empty(), "{preset}");
        assert_eq!(read(&policy.to_string()), policy);
    }
}

#[test]
fn errors_name_the_key_the_value_and_what_is_allowed() {
    for (text, parts) in [
        (
            "placement=fast",
            &["placement=fast", "shared", "dedicated"][..],
        ),
        ("wieght=3", &["wieght=3", "no such key", "weight"]),
        ("weight=heavy", &["weight=heavy", "1 to 10000"]),
        ("cap=40", &["cap=40", "40%"]),
        ("cap=40%:10", &["cap=40%:10", "10ms"]),
        ("burst=1ms", &["burst=1ms", "needs a cap"]),
        ("cores=half", &["cores=half", "any, whole, one"]),
        (
            "placement=shared,cores=whole",
            &["cores=whole", "placement=dedicated"],
        ),
        ("placement=map", &["map", "VCPU@[CPUS]"]),
        ("map=[0@[1]", &["]"]),
        ("gang=hard", &["gang=hard", "adaptive"]),
        ("deadline=2ms", &["deadline=2ms", "2ms/10ms"]),
        ("slice=1", &["slice=1", "3ms"]),
        ("reserve=5x", &["reserve=5x", "500m"]),
        ("turbo", &["turbo", "preset", "latency"]),
        ("helpers=9-1", &["helpers=9-1", "9-1"]),
    ] {
        let error = text.parse::<VmPolicy>().expect_err(text).to_string();
        for part in parts {
            assert!(
                error.contains(part),
                "{text}: '{error}' does not say {part}"
            );
        }
    }
    for (text, key) in [
        ("weight=10001", "weight=10001"),
        ("cap=5%:10ms", "10%"),
        ("cap=40%:2s", "1ms to 1s"),
        ("cap=5000s:1s", "4096 CPUs"),
        ("cap=40%:10ms,burst=5ms", "burst"),
        ("reserve=2", "950m"),
        ("slice=50us", "slice=50us"),
        ("rt=100", "rt=100"),
        ("rt=0", "rt=0"),
        ("rt=5,slice=latency", "cannot be had together"),
        ("deadline=11ms/10ms", "runtime"),
        ("deadline=99ms/100ms", "95%"),
        ("map=[3@1]", "vCPU 0 alone"),
        ("gang=soft:1us", "gang"),
        ("overcommit=0.5", "overcommit=0.5"),
    ] {
        let wrong: Vec<String> = read(text)
            .check(1)
            .iter()
            .map(ToString::to_string)
            .collect();
        assert!(
            wrong.iter().any(|text| text.contains(key)),
            "{text}: {wrong:?}"
        );
    }
}

fn cpus() -> impl Strategy<Value = CpuSet> {
    proptest::collection::vec(0u32..200, 1..6).prop_map(|cpus| cpus.into_iter().collect())
}

fn placement() -> impl Strategy<Value = Placement> {
    let cores = prop_oneof![Just(Cores::Any), Just(Cores::Whole), Just(Cores::One)];
    prop_oneof![
        Just(Placement::Shared),
        cores.prop_map(|cores| Placement::Dedicated { cores }),
        Just(Placement::Spread),
        Just(Placement::Pack),
        (any::<bool>(), proptest::option::of(0u32..9))
            .prop_map(|(require, node)| Placement::NumaLocal { require, node }),
        proptest::collection::btree_map(0u32..20, cpus(), 1..5)
            .prop_map(|map| Placement::Map(map.into_iter().collect())),
    ]
}

prop_compose! {
    fn policy()(
        placement in placement(),
        weight in proptest::option::of(any::<u32>()),
        cap in proptest::option::of((0u64..1 << 40, 0u64..1 << 40, 0u64..1 << 40)),
        reserve_millicpus in proptest::option::of(any::<u32>()),
        slice in proptest::option::of(prop_oneof![
            Just(Slice::Latency), Just(Slice::Default), Just(Slice::Throughput), any::<u32>().prop_map(Slice::Micros)
        ]),
        rotate_us in proptest::option::of(any::<u32>()),
        gang in prop_oneof![
            Just(Gang::Off),
            any::<u32>().prop_map(|quantum_us| Gang::Soft { quantum_us }),
            any::<u32>().prop_map(|quantum_us| Gang::Adaptive { quantum_us })
        ],
        deadline in proptest::option::of((0u64..1 << 40, 0u64..1 << 40, 0u64..1 << 40)),
        rt in proptest::option::of(any::<u8>()),
        smt in prop_oneof![Just(SmtIsolation::Off), Just(SmtIsolation::Vm), Just(SmtIsolation::Vcpu)],
        helpers in prop_oneof![Just(Helpers::Auto), cpus().prop_map(Helpers::Set)],
        (strict, overcommit_milli) in (any::<bool>(), proptest::option::of(any::<u32>())),
    ) -> VmPolicy {
        VmPolicy {
            placement, weight, reserve_millicpus, slice, rotate_us, gang, rt, smt, helpers, strict, overcommit_milli,
            cap: cap.map(|(quota_us, period_us, burst_us)| Cap { quota_us, period_us, burst_us }),
            deadline: deadline.map(|(runtime_us, deadline_us, period_us)| Deadline { runtime_us, deadline_us, period_us }),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_printed_reads_back(policy in policy()) {
        let text = policy.to_string();
        prop_assert_eq!(text.parse::<VmPolicy>(), Ok(policy), "{}", text);
    }

    #[test]
    fn json_reads_back(policy in policy()) {
        let json = serde_json::to_string(&policy).expect("writes");
        prop_assert_eq!(serde_json::from_str::<VmPolicy>(&json).expect("reads"), policy);
    }

    #[test]
    fn clamped_is_sound_and_sound_is_not_clamped(policy in policy(), vcpus in 1u32..64) {
        let clamped = policy.clamped(vcpus);
        prop_assert_eq!(clamped.check(vcpus), vec![], "{}", clamped);
        prop_assert_eq!(&clamped.clamped(vcpus), &clamped);
        if policy.check(vcpus).is_empty() {
            prop_assert_eq!(clamped, policy);
        }
    }

    #[test]
    fn any_text_is_a_policy_or_an_error(text in "[a-z0-9=,:@%/.\\[\\]m-]{0,60}") {
        if let Ok(policy) = text.parse::<VmPolicy>() {
            prop_assert_eq!(policy.to_string().parse::<VmPolicy>(), Ok(policy));
        }
    }
}
