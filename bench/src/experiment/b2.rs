//! B2: a vCPU that sleeps and wakes, on a CPU that four others want.

use std::{collections::BTreeMap, time::Duration};

use super::{Criterion, Experiment, Metric, Planes, Plot, Settings, Variant, rota, vms};
use crate::{
    protocol::Results,
    vm::{Body, Control, VmResult, VmSpec, at},
};

const PERIOD_US: u32 = 2000;
const HOGS: usize = 4;
const WARM_UP: Duration = Duration::from_millis(500);

const DEFAULT: &str = "cloud-hypervisor pinned";
const LATENCY: &str = "rota slice=latency";
const BOTH: &str = "rota slice=latency, others slice=throughput";

pub(super) fn experiment(settings: &Settings) -> Experiment {
    let metric = |key, label, unit| Metric { key, label, unit };
    Experiment {
        id: "B2",
        title: "how late a vCPU wakes among busy ones",
        timed: true,
        setting: format!(
            "one CPU: a VM of 1 vCPU (thread) that wakes every {PERIOD_US} µs and works 20 µs, and a VM of {HOGS} vCPUs that never stop"
        ),
        metrics: vec![
            metric("p50", "p50", "µs"),
            metric("p99", "p99", "µs"),
            metric("p999", "p99.9", "µs"),
            metric("max", "max", "µs"),
            metric("hogs", "work of the busy VM", "1000 units of 100 µs/s"),
        ],
        variants: variants(settings),
        criteria,
        plot: Plot::Curves("µs late"),
    }
}

fn variants(settings: &Settings) -> Vec<Variant> {
    let cpu = Planes::new(settings).first;
    let variant = |name: &str, how: &str, waker: Control, hogs: Control| {
        let specs = vec![
            VmSpec {
                name: "waker".into(),
                vcpus: vec![Body::Waker {
                    period_us: PERIOD_US,
                    work: settings.work(20.0),
                }],
                control: waker,
            },
            VmSpec {
                name: "busy".into(),
                vcpus: vec![
                    Body::Units {
                        work: settings.work(100.0)
                    };
                    HOGS
                ],
                control: hogs,
            },
        ];
        vms(name, how, WARM_UP, specs, measure)
    };
    let pins = |count| vec![cpu.clone(); count];
    let affinity = |count| Control::CloudHypervisor {
        affinity: pins(count),
    };
    let fifo = Control::Libvirt {
        pins: pins(1),
        emulator: None,
        shares: None,
        quota: None,
        fifo: Some(1),
    };
    let map = |count: usize| {
        let vcpus: Vec<_> = (0..count).map(|vcpu| format!("{vcpu}@[{cpu}]")).collect();
        format!("map=[{}]", vcpus.join(","))
    };
    let busy = format!("{},overcommit=8", map(HOGS));
    vec![
        variant(
            DEFAULT,
            "cloud-hypervisor affinity=: sched_setaffinity of each vCPU thread to the CPU",
            affinity(1),
            affinity(HOGS),
        ),
        variant(
            "libvirt pinned",
            "libvirt vcpupin: groups for each vCPU and the emulator, and sched_setaffinity",
            Planes::libvirt(pins(1)),
            Planes::libvirt(pins(HOGS)),
        ),
        variant(
            "libvirt vcpusched=fifo",
            "the same with SCHED_FIFO 1 for the vCPU that wakes: needs real-time rights, and where groups have cpu.rt_runtime_us an administrator who gives them some",
            fifo,
            Planes::libvirt(pins(HOGS)),
        ),
        variant(
            "k8s pool of one CPU",
            "Kubernetes: both processes in a cpuset of the CPU, shares of 1 CPU requested each",
            Control::Kubernetes {
                cpus: cpu.clone(),
                millicpus: 1000,
            },
            Control::Kubernetes {
                cpus: cpu.clone(),
                millicpus: 1000,
            },
        ),
        variant(
            "rota default",
            "rota --sched map= for both, the kernel's slices: what groups alone are worth",
            rota(format!("{},overcommit=8", map(1))),
            rota(busy.clone()),
        ),
        variant(
            LATENCY,
            "rota --sched slice=latency for the VM that wakes, no real-time class",
            rota(format!("{},slice=latency,overcommit=8", map(1))),
            rota(busy.clone()),
        ),
        variant(
            BOTH,
            "the same, and slice=throughput for the busy VM",
            rota(format!("{},slice=latency,overcommit=8", map(1))),
            rota(format!("{busy},slice=throughput")),
        ),
    ]
}

fn measure(vms: &[VmResult], seconds: f64) -> BTreeMap<&'static str, f64> {
    let mut metrics = BTreeMap::new();
    if let [waker, busy] = vms {
        for (key, part) in [("p50", 0.5), ("p99", 0.99), ("p999", 0.999), ("max", 1.0)] {
            metrics.extend(at(&waker.curve, part).map(|value| (key, value)));
        }
        let units: u64 = busy.progress.iter().sum();
        metrics.insert("hogs", units as f64 / seconds / 1e3);
    }
    metrics
}

fn criteria(results: &Results) -> Vec<Criterion> {
    let hogs = |variant| results.value(variant, "hogs");
    let mut criteria = Vec::new();
    for name in [LATENCY, BOTH] {
        criteria.push(Criterion::number(
            format!("{name}: p99 ≤ 50 µs without real-time rights"),
            results.value(name, "p99"),
            |p99| p99 <= 50.0,
        ));
        criteria.push(Criterion::number(
            format!("{name}: the busy VM loses ≤ 5 % against pins"),
            hogs(name)
                .zip(hogs(DEFAULT))
                .map(|(now, pinned)| (1.0 - now / pinned) * 100.0),
            |lost| lost <= 5.0,
        ));
    }
    criteria
}
