//! The planner measured: `cargo run --release -p scheduler --example plan [HOSTS]` makes random hosts and requests, checks
//! every plan, times one more VM on a host of 256 CPUs with 200 VMs, and prints JSON.

mod scenario;

use std::time::Instant;

use scenario::{Random, Tally, enter, run};
use scheduler::{
    Cores, CpuSet, Host, HostSpec, LedgerState, Placement, Request, VmId, VmPolicy, plan,
};

fn main() {
    let hosts: u64 = match std::env::args().nth(1).map(|text| text.parse()) {
        None => 10_000,
        Some(Ok(hosts)) => hosts,
        Some(Err(_)) => {
            eprintln!("usage: plan [HOSTS]");
            std::process::exit(2);
        }
    };
    let mut tally = Tally::default();
    let start = Instant::now();
    for seed in 0..hosts {
        run(seed, &mut tally);
    }
    let seconds = start.elapsed().as_secs_f64();
    for violation in tally.violations.iter().take(10) {
        eprintln!("{}", violation.chars().take(400).collect::<String>());
    }
    let (host, ledger) = crowd();
    let timings: Vec<_> = cases(&host)
        .into_iter()
        .map(|(name, request)| time(name, &host, &ledger, &request))
        .collect();
    let report = serde_json::json!({
        "bench": "planner",
        "random": {
            "hosts": hosts,
            "plans": tally.plans,
            "refusals": tally.refusals,
            "refusals_with_nearest": tally.with_nearest,
            "violations": tally.violations.len(),
            "seconds": seconds,
        },
        "one_more_vm": {
            "cpus": host.cpus.len(),
            "vms": ledger.entries.len(),
            "vcpus": ledger.entries.iter().map(|entry| entry.plan.vcpus.len()).sum::<usize>(),
            "cases": timings,
        },
    });
    println!("{report:#}");
    if !tally.violations.is_empty() {
        std::process::exit(1);
    }
}

/// 200 VMs on 256 CPUs.
fn crowd() -> (Host, LedgerState) {
    let host = HostSpec {
        sockets: 2,
        nodes: 2,
        llcs: 4,
        cores: 8,
        smt: 2,
        adjacent: false,
        node_mib: 512 * 1024,
    }
    .build();
    let mut random = Random(1);
    let mut ledger = LedgerState::default();
    let mut number = 0;
    while ledger.entries.len() < 200 && number < 10_000 {
        number += 1;
        let vcpus = random.within(1, 4);
        let placement = match random.within(0, 19) {
            0 => Placement::Dedicated { cores: Cores::Any },
            1 => Placement::Dedicated {
                cores: Cores::Whole,
            },
            2 => Placement::Spread,
            3 => Placement::Pack,
            4 | 5 => Placement::NumaLocal {
                require: random.one_in(2),
                node: None,
            },
            6 => Placement::Map((0..vcpus).map(|vcpu| (vcpu, CpuSet::one(vcpu))).collect()),
            _ => Placement::Shared,
        };
        let request = Request {
            vm: VmId(format!("vm{number}")),
            vcpus,
            threads_per_core: 1,
            memory_mib: 1024,
            policy: VmPolicy {
                placement,
                weight: Some(random.within(1, 10_000)),
                reserve_millicpus: random.one_in(4).then_some(100 * vcpus),
                overcommit_milli: random.one_in(4).then(|| random.within(40, 80) * 100),
                ..VmPolicy::default()
            },
        };
        if let Ok(plan) = plan(&host, &ledger, &[request]) {
            enter(&mut ledger, &plan);
        }
    }
    (host, ledger)
}

fn cases(host: &Host) -> Vec<(&'static str, Request)> {
    let case = |name, vcpus, placement| {
        let request = Request {
            vm: VmId::from("one-more"),
            vcpus,
            threads_per_core: 1,
            memory_mib: 4096,
            policy: VmPolicy {
                placement,
                ..VmPolicy::default()
            },
        };
        (name, request)
    };
    let numa = Placement::NumaLocal {
        require: true,
        node: None,
    };
    vec![
        case("shared, 4 vCPUs", 4, Placement::Shared),
        case("shared, 64 vCPUs", 64, Placement::Shared),
        case("spread, 16 vCPUs", 16, Placement::Spread),
        case("pack, 8 vCPUs", 8, Placement::Pack),
        case("numa-local, 8 vCPUs", 8, numa),
        case(
            "dedicated, 2 vCPUs",
            2,
            Placement::Dedicated { cores: Cores::Any },
        ),
        case(
            "dedicated cores=one, 4 vCPUs",
            4,
            Placement::Dedicated { cores: Cores::One },
        ),
        case(
            "refused, as many dedicated as CPUs",
            host.cpus.len() as u32,
            Placement::Dedicated { cores: Cores::Any },
        ),
    ]
}

/// Microseconds for one plan: the median and the worst of a hundred.
fn time(name: &str, host: &Host, ledger: &LedgerState, request: &Request) -> serde_json::Value {
    let request = std::slice::from_ref(request);
    let accepted = plan(host, ledger, request);
    let mut micros: Vec<f64> = (0..100)
        .map(|_| {
            let start = Instant::now();
            let answer = plan(host, ledger, request);
            let took = start.elapsed().as_secs_f64() * 1e6;
            assert_eq!(answer, accepted, "two answers to one question");
            took
        })
        .collect();
    micros.sort_by(f64::total_cmp);
    serde_json::json!({
        "case": name,
        "accepted": accepted.is_ok(),
        "others_moved": accepted.map_or(0, |plan| plan.adjusted.len()),
        "median_us": micros[micros.len() / 2],
        "p95_us": micros[micros.len() * 95 / 100],
        "worst_us": micros[micros.len() - 1],
    })
}
