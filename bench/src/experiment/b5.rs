//! B5: who gets how much, where vCPUs and CPUs do not come out even.

use std::{collections::BTreeMap, time::Duration};

use super::{Criterion, Experiment, Metric, Planes, Plot, Settings, Variant, rota, vms};
use crate::{
    protocol::Results,
    stats::jain,
    vm::{Body, Control, VmSpec},
};

const WARM_UP: Duration = Duration::from_millis(500);
const THREE: &str = "3 VMs of 1 vCPU";
const WEIGHTS: &str = "weights 1:3";
const SIZES: &str = "1 and 4 vCPUs";

pub(super) fn experiment(settings: &Settings) -> Experiment {
    let metric = |key, label, unit| Metric { key, label, unit };
    Experiment {
        id: "B5",
        title: "fairness among VMs that never stop",
        timed: true,
        setting: "2 CPUs; vCPUs are threads that never stop. 3 VMs of 1 vCPU; 2 VMs of 2 vCPUs with weights 1:3; \
                  a VM of 1 and one of 4 vCPUs with equal weights"
            .into(),
        metrics: vec![
            metric("jain", "Jain over VMs, by weight", ""),
            metric("least", "least attained of an entitlement", "%"),
        ],
        variants: variants(settings),
        criteria,
        plot: Plot::Bars("jain"),
    }
}

fn variants(settings: &Settings) -> Vec<Variant> {
    let planes = Planes::new(settings);
    let body = Body::Units {
        work: settings.work(100.0),
    };
    let variant = |case: &str,
                   name: &str,
                   how: &str,
                   sizes: &[(usize, f64)],
                   control: &dyn Fn(usize) -> Control| {
        let specs = sizes
            .iter()
            .enumerate()
            .map(|(vm, (vcpus, _))| VmSpec {
                name: format!("vm{vm}"),
                vcpus: vec![body; *vcpus],
                control: control(vm),
            })
            .collect();
        let weights: Vec<f64> = sizes.iter().map(|(_, weight)| *weight).collect();
        vms(
            format!("{case}, {name}"),
            how,
            WARM_UP,
            specs,
            move |vms, seconds| {
                let times: Vec<f64> = vms
                    .iter()
                    .map(|vm| vm.run_ns.iter().sum::<u64>() as f64 / 1e9 / seconds)
                    .collect();
                // What there was for these VMs, whatever else ran.
                let all: f64 = times.iter().sum();
                let sum: f64 = weights.iter().sum();
                let attained: Vec<f64> = times
                    .iter()
                    .zip(&weights)
                    .map(|(time, weight)| time / (all * weight / sum))
                    .collect();
                BTreeMap::from([
                    ("jain", jain(&attained)),
                    (
                        "least",
                        attained.iter().copied().fold(f64::INFINITY, f64::min) * 100.0,
                    ),
                ])
            },
        )
    };
    let one = |vm: usize| match vm % 2 {
        0 => vec![planes.first.clone()],
        _ => vec![planes.second.clone()],
    };
    let shares = |shares| Control::Libvirt {
        pins: Vec::new(),
        emulator: None,
        shares: Some(shares),
        quota: None,
        fifo: None,
    };
    let pod = |cpus: u32| Control::Kubernetes {
        cpus: planes.both.clone(),
        millicpus: 1000 * cpus,
    };
    let three = [(1, 1.0); 3];
    let weights = [(2, 1.0), (2, 3.0)];
    let sizes = [(1, 1.0), (4, 1.0)];
    vec![
        variant(THREE, "unpinned", "Linux as it is", &three, &|_| {
            Control::Nothing
        }),
        variant(
            THREE,
            "cloud-hypervisor pinned",
            "affinity=: two on one CPU, one on the other",
            &three,
            &|vm| Control::CloudHypervisor { affinity: one(vm) },
        ),
        variant(THREE, "libvirt", "shares=1024, no pins", &three, &|_| {
            shares(1024)
        }),
        variant(
            THREE,
            "k8s pool",
            "the shared pool's cpuset, 1 CPU requested each",
            &three,
            &|_| pod(1),
        ),
        variant(
            THREE,
            "rota",
            "rota --sched placement=shared",
            &three,
            &|_| rota("placement=shared"),
        ),
        variant(
            WEIGHTS,
            "libvirt",
            "shares=1024 and 3072, no pins",
            &weights,
            &|vm| shares(if vm == 0 { 1024 } else { 3072 }),
        ),
        variant(
            WEIGHTS,
            "k8s pool",
            "1 and 3 CPUs requested",
            &weights,
            &|vm| pod(if vm == 0 { 1 } else { 3 }),
        ),
        variant(
            WEIGHTS,
            "rota",
            "rota --sched weight=100 and weight=300",
            &weights,
            &|vm| rota(if vm == 0 { "weight=100" } else { "weight=300" }),
        ),
        variant(SIZES, "unpinned", "Linux as it is", &sizes, &|_| {
            Control::Nothing
        }),
        variant(
            SIZES,
            "cloud-hypervisor pinned",
            "affinity=: vCPUs on the CPUs by turns",
            &sizes,
            &|vm| {
                let all = [&planes.first, &planes.second];
                let vcpus = if vm == 0 { 1 } else { 4 };
                Control::CloudHypervisor {
                    affinity: (0..vcpus)
                        .map(|vcpu: usize| all[vcpu % 2].clone())
                        .collect(),
                }
            },
        ),
        variant(
            SIZES,
            "libvirt",
            "shares=1024 each, no pins",
            &sizes,
            &|_| shares(1024),
        ),
        variant(
            SIZES,
            "rota",
            "rota --sched weight=100 each",
            &sizes,
            &|_| rota("weight=100"),
        ),
    ]
}

fn criteria(results: &Results) -> Vec<Criterion> {
    [THREE, WEIGHTS, SIZES]
        .map(|case| {
            Criterion::number(
                format!("{case}: Jain over VMs ≥ 0.98"),
                results.value(&format!("{case}, rota"), "jain"),
                |jain| jain >= 0.98,
            )
        })
        .into()
}
