//! What the planner decides, case by case.

use scheduler::{
    Ability, Constraint, Host, HostSpec, LedgerEntry, LedgerState, Owner, Plan, Rejection, Request,
    SchedMode, VmId, VmPlan, plan,
};

/// A machine of `cores` cores of `smt` threads, two nodes of two caches each if `big`.
fn host(big: bool, cores: u32, smt: u32) -> Host {
    let (nodes, llcs) = if big { (2, 2) } else { (1, 1) };
    HostSpec {
        nodes,
        llcs,
        cores,
        smt,
        ..HostSpec::default()
    }
    .build()
}

fn request(name: &str, vcpus: u32, sched: &str) -> Request {
    Request {
        vm: VmId::from(name),
        vcpus,
        threads_per_core: 1,
        memory_mib: 1024,
        policy: sched.parse().expect("a policy"),
    }
}

fn ledger(plans: &[VmPlan]) -> LedgerState {
    LedgerState {
        entries: plans
            .iter()
            .map(|plan| LedgerEntry {
                owner: Owner::default(),
                plan: plan.clone(),
                rotation: None,
                groups: Vec::new(),
            })
            .collect(),
        ..LedgerState::default()
    }
}

/// The plan of one VM beside `others`.
fn one(host: &Host, others: &[VmPlan], request: &Request) -> VmPlan {
    let plan = plan(host, &ledger(others), std::slice::from_ref(request));
    let plan = plan.unwrap_or_else(|why| panic!("{why}"));
    plan.vms.into_iter().next().expect("one")
}

fn refused(host: &Host, others: &[VmPlan], request: &Request) -> Rejection {
    plan(host, &ledger(others), std::slice::from_ref(request)).expect_err("refused")
}

fn sets(plan: &VmPlan) -> Vec<String> {
    plan.vcpus
        .iter()
        .map(|vcpu| vcpu.cpus.to_string())
        .collect()
}

#[test]
fn shared_vcpus_have_parts_of_the_pool_that_do_not_touch() {
    let plan = one(&host(false, 4, 1), &[], &request("a", 2, ""));
    assert_eq!(sets(&plan), ["0-1", "2-3"]);
    assert_eq!(
        sets(&one(&host(false, 4, 1), &[], &request("a", 1, ""))),
        ["0-3"]
    );
    // Whole cores where there are enough.
    assert_eq!(
        sets(&one(&host(false, 4, 2), &[], &request("a", 2, ""))),
        ["0-1,4-5", "2-3,6-7"]
    );
    assert_eq!(plan.helpers.to_string(), "0-3");
}

#[test]
fn more_vcpus_than_cpus_share_the_set() {
    let plan = one(&host(false, 2, 1), &[], &request("a", 3, ""));
    assert_eq!(sets(&plan), ["0-1", "0-1", "0-1"]);
}

#[test]
fn dedicated_stays_under_one_cache_and_leaves_cpu_0_to_the_host() {
    let host = host(true, 4, 1);
    let plan = one(&host, &[], &request("a", 3, "placement=dedicated"));
    assert_eq!(sets(&plan), ["1", "2", "3"]);
    assert!(plan.vcpus.iter().all(|vcpu| vcpu.exclusive));
    assert_eq!(plan.helpers.to_string(), "0,4-15");
    // The cache that is left fits two less well than the one with exactly one free CPU fits one.
    let next = one(
        &host,
        std::slice::from_ref(&plan),
        &request("b", 1, "placement=dedicated"),
    );
    assert_eq!(sets(&next), ["0"]);
}

#[test]
fn dedicated_prefers_isolated_cpus_and_nobody_else_gets_them() {
    let mut host = host(false, 4, 1);
    host.isolated = "2-3".parse().expect("a list");
    assert_eq!(
        sets(&one(&host, &[], &request("a", 2, "placement=dedicated"))),
        ["2", "3"]
    );
    assert_eq!(sets(&one(&host, &[], &request("a", 2, ""))), ["0", "1"]);
    host.isolated = "1-3".parse().expect("a list");
    host.nohz_full = "3".parse().expect("a list");
    let tickless = one(&host, &[], &request("a", 1, "placement=dedicated"));
    assert_eq!(sets(&tickless), ["3"]);
    let why = refused(&host, &[], &request("a", 2, "helpers=9"));
    assert_eq!(why.reasons[0].constraint, Constraint::Cpus);
}

#[test]
fn whole_cores_and_threads_that_are_siblings() {
    let host = host(false, 4, 2);
    let mut wish = request("a", 2, "placement=dedicated,cores=whole");
    wish.threads_per_core = 2;
    let plan = one(&host, &[], &wish);
    assert_eq!(sets(&plan), ["1", "5"]);
    assert_eq!(plan.threads_per_core, 2);
    let plan = one(
        &host,
        &[],
        &request("a", 2, "placement=dedicated,cores=one"),
    );
    assert_eq!(sets(&plan), ["1", "2"]);
    assert_eq!(plan.exclusive.to_string(), "1-2,5-6");
    let mut wish = request("a", 2, "");
    wish.threads_per_core = 2;
    let plan = one(&host, &[], &wish);
    assert_eq!(
        plan.threads_per_core, 1,
        "shared CPUs are nobody's siblings"
    );
    assert!(
        plan.notes[0].contains("not siblings on the host, 2 to a core"),
        "{:?}",
        plan.notes
    );
}

#[test]
fn spread_goes_far_and_pack_stays_near() {
    let host = host(true, 2, 2);
    let spread = one(&host, &[], &request("a", 4, "placement=spread"));
    let cpu = |cpu: &str| *host.cpu(cpu.parse().expect("one CPU")).expect("there");
    let llcs: std::collections::BTreeSet<_> =
        sets(&spread).iter().map(|set| cpu(set).llc).collect();
    assert_eq!(llcs.len(), 4);
    let pack = one(&host, &[], &request("b", 4, "placement=pack"));
    let llcs: std::collections::BTreeSet<_> = sets(&pack).iter().map(|set| cpu(set).llc).collect();
    assert_eq!(llcs.len(), 1);
    // The next packed VM joins the busy cache while its limit allows.
    let next = one(
        &host,
        std::slice::from_ref(&pack),
        &request("c", 2, "placement=pack"),
    );
    assert!(sets(&next).iter().all(|set| llcs.contains(&cpu(set).llc)));
}

#[test]
fn where_vcpus_come_and_go_the_others_stay() {
    let host = host(true, 4, 1);
    for sched in ["placement=dedicated", "placement=spread", "placement=pack"] {
        let other = one(&host, &[], &request("b", 2, "placement=dedicated"));
        let few = one(&host, std::slice::from_ref(&other), &request("a", 2, sched));
        let more = one(
            &host,
            &[other.clone(), few.clone()],
            &request("a", 5, sched),
        );
        assert_eq!(sets(&more)[..2], sets(&few)[..], "{sched}");
        let fewer = one(&host, &[other, more.clone()], &request("a", 3, sched));
        assert_eq!(sets(&fewer)[..], sets(&more)[..3], "{sched}");
    }
}

#[test]
fn a_map_names_vcpus_that_are_still_to_come() {
    let policy: scheduler::VmPolicy = "map=[0@[1],2@[3]],weight=200".parse().expect("a policy");
    let names = |vcpus| policy.for_vcpus(vcpus).to_string();
    assert_eq!(names(3), policy.to_string());
    assert_eq!(names(2), "placement=map,map=[0@[1]],weight=200");
    let later: scheduler::VmPolicy = "map=[2@[3]]".parse().expect("a policy");
    assert_eq!(later.for_vcpus(2), scheduler::VmPolicy::default());
}

#[test]
fn numa_local_goes_where_memory_is() {
    let mut host = host(true, 2, 1);
    host.nodes[0].free_mib = 100;
    let plan = one(&host, &[], &request("a", 2, "placement=numa-local"));
    assert_eq!(
        (sets(&plan), plan.memory_nodes),
        (vec!["4-5".to_owned(), "6-7".to_owned()], vec![1])
    );
    let mut wish = request("b", 2, "placement=numa-local,require=on");
    wish.memory_mib = 17 * 1024;
    let why = refused(&host, &[], &wish);
    assert_eq!(why.reasons[0].constraint, Constraint::Numa);
    let nearest = why.nearest.expect("several nodes");
    assert_eq!(nearest.sched, "placement=numa-local");
    let plan = one(&host, &[], &nearest.request);
    assert_eq!(plan.memory_nodes, [0, 1]);
}

#[test]
fn a_lost_cpu_moves_one_vcpu_and_no_other() {
    let mut host = host(true, 4, 1);
    let wish = request("a", 4, "placement=dedicated");
    let before = one(&host, &[], &wish);
    assert_eq!(sets(&before), ["0", "1", "2", "3"]);
    host.online.remove(2);
    let after = one(&host, std::slice::from_ref(&before), &wish);
    let moved = sets(&before)
        .iter()
        .zip(sets(&after))
        .filter(|(a, b)| *a != b)
        .count();
    assert_eq!(moved, 1, "{:?}", sets(&after));
    host.online.insert(2);
    let back = one(&host, std::slice::from_ref(&after), &wish);
    assert_eq!(sets(&back), sets(&after), "what is good is kept");
}

#[test]
fn the_pool_shrinks_and_grows_around_who_has_cpus_of_his_own() {
    let host = host(false, 4, 1);
    let shared = one(&host, &[], &request("a", 2, ""));
    let plan = plan(
        &host,
        &ledger(std::slice::from_ref(&shared)),
        &[request("b", 1, "placement=dedicated")],
    );
    let Plan { vms, adjusted } = plan.expect("there is room");
    assert_eq!(sets(&vms[0]), ["1"]);
    assert_eq!(sets(&adjusted[0]), ["0", "2-3"]);
    assert_eq!(adjusted[0].helpers.to_string(), "0,2-3");
    let alone = one(&host, &adjusted, &request("a", 2, ""));
    assert_eq!(alone.pool.to_string(), "0-3", "b is gone");
}

#[test]
fn refusals_name_what_binds_and_what_can_be_had() {
    let host = host(false, 2, 1);
    let cases = [
        (
            "",
            9,
            Constraint::Overcommit,
            "placement=shared,overcommit=4.5",
        ),
        (
            "placement=dedicated",
            3,
            Constraint::Dedicated,
            "placement=shared",
        ),
        ("gang=soft", 3, Constraint::Gang, "placement=shared"),
        (
            "map=[0@[1,5]]",
            1,
            Constraint::Cpus,
            "placement=map,map=[0@[1]]",
        ),
        (
            "cap=1%:10ms",
            1,
            Constraint::Policy,
            "placement=shared,cap=1ms:100ms",
        ),
        (
            "reserve=1900m,placement=spread",
            3,
            Constraint::Overcommit,
            "",
        ),
        (
            "deadline=9ms/10ms",
            4,
            Constraint::Deadline,
            "placement=shared,deadline=4750us/10ms",
        ),
        (
            "rt=5,map=[0@0,1@1]",
            2,
            Constraint::Helpers,
            "placement=map,map=[0@[0],1@[1]]",
        ),
        ("helpers=7", 1, Constraint::Cpus, "placement=shared"),
    ];
    for (sched, vcpus, constraint, nearest) in cases {
        let wish = request("a", vcpus, sched);
        if nearest.is_empty() {
            assert!(
                plan(&host, &LedgerState::default(), &[wish]).is_ok(),
                "{sched}"
            );
            continue;
        }
        let why = refused(&host, &[], &wish);
        assert_eq!(why.reasons[0].constraint, constraint, "{sched}: {why}");
        let near = why
            .nearest
            .unwrap_or_else(|| panic!("{sched}: nothing near"));
        assert_eq!(near.sched, nearest, "{sched}");
        assert!(!near.changes.is_empty());
    }
}

#[test]
fn others_limits_and_reserves_are_kept() {
    let host = host(false, 2, 1);
    let strict = one(&host, &[], &request("a", 2, "overcommit=1"));
    let why = refused(&host, &[strict], &request("b", 1, ""));
    assert!(why.reasons[0].detail.contains("VM a"), "{why}");
    let reserved = one(&host, &[], &request("a", 2, "reserve=1800m"));
    let why = refused(
        &host,
        std::slice::from_ref(&reserved),
        &request("b", 1, "reserve=500m"),
    );
    assert_eq!(why.reasons[0].constraint, Constraint::Reserve);
    assert_eq!(
        why.nearest.expect("less").sched,
        "placement=shared,reserve=100m"
    );
    let why = refused(&host, &[reserved], &request("b", 1, "placement=dedicated"));
    assert!(why.reasons[0].detail.contains("could not stay"), "{why}");
}

#[test]
fn cpus_of_others_are_named_with_their_owner() {
    let host = host(false, 4, 1);
    let own = one(&host, &[], &request("a", 2, "placement=dedicated"));
    let why = refused(&host, &[own], &request("b", 1, "map=[0@[1]]"));
    assert_eq!(why.reasons[0].constraint, Constraint::Exclusive);
    assert!(why.reasons[0].detail.contains("belongs to VM a"), "{why}");
    assert_eq!(why.nearest.expect("elsewhere").sched, "placement=shared");
    let mapped = one(&host, &[], &request("a", 1, "map=[0@[3]]"));
    let other = one(&host, &[mapped], &request("b", 3, "placement=dedicated"));
    assert_eq!(
        sets(&other),
        ["0", "1", "2"],
        "what a map names stays shared"
    );
}

#[test]
fn deadlines_have_the_whole_domain_or_a_partition() {
    let mut host = host(false, 4, 1);
    let plan = one(&host, &[], &request("a", 2, "deadline=2ms/10ms"));
    assert_eq!(sets(&plan), ["0-3", "0-3"]);
    let why = refused(&host, &[plan], &request("b", 1, "placement=dedicated"));
    assert_eq!(why.reasons[0].constraint, Constraint::Deadline);
    let own = one(
        &host,
        &[],
        &request("a", 2, "placement=dedicated,deadline=2ms/10ms"),
    );
    assert_eq!(sets(&own), ["1-2", "1-2"]);
    host.abilities.partitions = Ability::no("version 1");
    let why = refused(
        &host,
        &[],
        &request("a", 2, "placement=dedicated,deadline=2ms/10ms"),
    );
    assert_eq!(why.reasons[0].constraint, Constraint::Deadline);
}

#[test]
fn where_the_hypervisor_schedules_nothing_is_promised() {
    let mut host = host(false, 4, 1);
    host.mode = SchedMode::Core;
    let plan = one(&host, &[], &request("a", 2, "weight=200,slice=default"));
    assert_eq!(sets(&plan), ["0-3", "0-3"]);
    assert!(plan.exclusive.is_empty());
}

#[test]
fn where_the_hypervisor_schedules_what_only_linux_can_do_is_refused() {
    let mut host = host(false, 4, 1);
    for mode in [SchedMode::Core, SchedMode::Classic] {
        host.mode = mode;
        for key in [
            "placement=dedicated",
            "placement=map,map=[0@[3]]",
            "slice=1ms",
            "rotate=20ms",
            "gang=soft:20ms",
            "deadline=2ms/10ms",
            "rt=1",
        ] {
            for strict in ["", ",strict=on"] {
                let wish = request("a", 4, &format!("{key},weight=200{strict}"));
                let why = refused(&host, &[], &wish);
                let [reason] = &why.reasons[..] else {
                    panic!("{why}")
                };
                assert_eq!(reason.constraint, Constraint::Mode, "{why}");
                let asked = key.split(',').next().expect("a key");
                assert!(reason.detail.contains(asked), "{why}");
                let nearest = why.nearest.expect("without it").request;
                let without = format!("weight=200{strict}");
                assert_eq!(nearest.policy, without.parse().expect("a policy"));
                one(&host, &[], &nearest);
            }
        }
    }
}

#[test]
fn a_plan_says_whom_it_does_not_keep_off() {
    let mut host = host(false, 4, 1);
    let said = |host: &Host, sched: &str| -> bool {
        let plan = one(host, &[], &request("a", 2, sched));
        plan.notes
            .iter()
            .any(|note| note.contains("not Rota's can: isolcpus="))
    };
    assert!(said(&host, "placement=dedicated"));
    assert!(!said(&host, "placement=spread"));
    assert!(!said(&host, "placement=dedicated,deadline=2ms/10ms"));
    host.isolated = "2-3".parse().expect("a list");
    assert!(!said(&host, "placement=dedicated"));
}

#[test]
fn a_batch_is_planned_together() {
    let host = host(false, 4, 1);
    let batch = [
        request("a", 2, "map=[0@[3]]"),
        request("b", 2, "placement=dedicated"),
        request("c", 1, ""),
    ];
    let plan = plan(&host, &LedgerState::default(), &batch).expect("there is room");
    let names: Vec<_> = plan.vms.iter().map(|vm| vm.request.vm.0.as_str()).collect();
    assert_eq!(names, ["a", "b", "c"]);
    assert_eq!(
        sets(&plan.vms[0]),
        ["3", "0,3"],
        "what the map leaves open gives way"
    );
    assert_eq!(sets(&plan.vms[1]), ["1", "2"]);
    assert_eq!(sets(&plan.vms[2]), ["0,3"]);
    let twice = [request("a", 1, ""), request("a", 1, "")];
    let why = scheduler::plan(&host, &LedgerState::default(), &twice).expect_err("one name");
    assert_eq!(why.reasons[0].constraint, Constraint::Name);
}

#[test]
fn a_ledger_of_nonsense_is_no_reason_to_fall_over() {
    let host = host(false, 4, 2);
    let good = one(&host, &[], &request("a", 2, ""));
    let mut broken = vec![good.clone(); 6];
    broken[0].request.vcpus = 0;
    broken[1].request.threads_per_core = 0;
    broken[2].vcpus.clear();
    broken[3].vcpus[0].cpus = "4000-4095".parse().expect("a list");
    broken[4].exclusive = "0-4095".parse().expect("a list");
    broken[5].request.vcpus = u32::MAX;
    broken[5].request.policy.overcommit_milli = Some(u32::MAX);
    for plan in broken {
        let others = [plan.clone(), plan.clone()];
        for sched in [
            "",
            "placement=dedicated",
            "placement=spread",
            "placement=numa-local",
            "rt=1",
        ] {
            for name in ["a", "b"] {
                let _ = scheduler::plan(&host, &ledger(&others), &[request(name, 2, sched)]);
                let _ =
                    scheduler::plan(&host, &ledger(&others), std::slice::from_ref(&plan.request));
            }
        }
    }
    let mut odd = host.clone();
    odd.cpus.reverse();
    odd.cpus.push(odd.cpus[0]);
    odd.cpus[1].id = u32::MAX;
    odd.nodes.clear();
    for sched in [
        "",
        "placement=dedicated",
        "placement=pack",
        "placement=numa-local",
    ] {
        let _ = scheduler::plan(&odd, &LedgerState::default(), &[request("a", 3, sched)]);
    }
}
