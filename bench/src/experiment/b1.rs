//! B1: how even a vCPU runs, alone and beside a noisy VM.

use std::{collections::BTreeMap, time::Duration};

use super::{Criterion, Experiment, Metric, Planes, Plot, Settings, Variant, rota, vms};
use crate::{
    protocol::Results,
    vm::{Body, Control, VmResult, VmSpec, at},
};

const WARM_UP: Duration = Duration::from_millis(500);
const NOISE: usize = 4;
const FLOOR: &str = "rota dedicated, alone";
const DEDICATED: &str = "rota dedicated";
const AFFINITY: &str = "cloud-hypervisor affinity";

pub(super) fn experiment(settings: &Settings) -> Experiment {
    let metric = |key, label, unit| Metric { key, label, unit };
    Experiment {
        id: "B1",
        title: "how even a vCPU runs beside a noisy VM",
        timed: true,
        setting: format!(
            "2 CPUs; a VM of 1 vCPU (thread) that does units of 100 µs, and a noisy VM of {NOISE} vCPUs that never stop; a unit's duration"
        ),
        metrics: vec![
            metric("p50", "p50", "µs"),
            metric("p99", "p99", "µs"),
            metric("p999", "p99.9", "µs"),
            metric("max", "max", "µs"),
        ],
        variants: variants(settings),
        criteria,
        plot: Plot::Curves("µs for a unit"),
    }
}

fn variants(settings: &Settings) -> Vec<Variant> {
    let planes = Planes::new(settings);
    let body = Body::Units {
        work: settings.work(100.0),
    };
    let variant = |name: &str, how: &str, own: Control, noise: Option<Control>| {
        let vm = |name: &str, vcpus, control| VmSpec {
            name: name.into(),
            vcpus: vec![body; vcpus],
            control,
        };
        let mut specs = vec![vm("steady", 1, own)];
        specs.extend(noise.map(|control| vm("noisy", NOISE, control)));
        vms(name, how, WARM_UP, specs, measure)
    };
    let affinity = || Control::CloudHypervisor {
        affinity: vec![planes.first.clone()],
    };
    let libvirt = Control::Libvirt {
        pins: vec![planes.first.clone()],
        emulator: Some(planes.second.clone()),
        shares: None,
        quota: None,
        fifo: None,
    };
    let pod = |cpus: &scheduler::CpuSet, millicpus| Control::Kubernetes {
        cpus: cpus.clone(),
        millicpus,
    };
    let dedicated = || rota("placement=dedicated");
    vec![
        variant(
            FLOOR,
            "rota --sched placement=dedicated, no noisy VM",
            dedicated(),
            None,
        ),
        variant(
            "nothing asked",
            "Linux as it is, both VMs",
            Control::Nothing,
            Some(Control::Nothing),
        ),
        variant(
            AFFINITY,
            "cloud-hypervisor affinity=[0@[a]]; the noisy VM asked for nothing",
            affinity(),
            Some(Control::Nothing),
        ),
        variant(
            "libvirt vcpupin, emulatorpin",
            "libvirt pins the vCPU and the emulator; the noisy domain has groups and no pins",
            libvirt,
            Some(Planes::libvirt(Vec::new())),
        ),
        variant(
            "k8s static",
            "Kubernetes static CPU manager: a cpuset of its own for the process; the noisy pod in the shared pool, which is the rest",
            pod(&planes.first, 1000),
            Some(pod(&planes.second, 500)),
        ),
        variant(
            DEDICATED,
            "rota --sched placement=dedicated; the noisy VM is shared, and the ledger keeps it off",
            dedicated(),
            Some(rota("placement=shared,overcommit=8")),
        ),
    ]
}

fn measure(vms: &[VmResult], _seconds: f64) -> BTreeMap<&'static str, f64> {
    let mut metrics = BTreeMap::new();
    if let Some(steady) = vms.first() {
        for (key, part) in [("p50", 0.5), ("p99", 0.99), ("p999", 0.999), ("max", 1.0)] {
            metrics.extend(at(&steady.curve, part).map(|value| (key, value)));
        }
    }
    metrics
}

fn criteria(results: &Results) -> Vec<Criterion> {
    let ratio = |a, b, metric| {
        let (a, b) = (results.value(a, metric), results.value(b, metric));
        a.zip(b).map(|(a, b)| a / b)
    };
    vec![
        Criterion::number(
            "dedicated beside noise / floor, p99 ≤ 1.1",
            ratio(DEDICATED, FLOOR, "p99"),
            |it| it <= 1.1,
        ),
        Criterion::number(
            "affinity alone / dedicated, p99.9 ≥ 5",
            ratio(AFFINITY, DEDICATED, "p999"),
            |it| it >= 5.0,
        ),
    ]
}
