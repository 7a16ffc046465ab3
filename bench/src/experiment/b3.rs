//! B3: guests whose vCPUs spin for each other, more of them than CPUs.

use std::{collections::BTreeMap, time::Duration};

use super::{Criterion, Experiment, Metric, Planes, Plot, Settings, Variant, rota, vms};
use crate::{
    protocol::Results,
    stats::jain,
    vm::{Body, Control, VmResult, VmSpec},
};

/// Work between two barriers, in microseconds.
const WORK_US: f64 = 20.0;
const WARM_UP: Duration = Duration::from_millis(500);
/// Adaptive gangs are tried for six seconds before they are on or off.
const TRIAL: Duration = Duration::from_millis(7500);

pub(super) fn experiment(settings: &Settings) -> Experiment {
    let mut variants = variants(settings, 2, None);
    variants.extend(variants_of_three(settings));
    Experiment {
        id: "B3",
        title: "guests that spin for each other: gangs against pins",
        timed: true,
        setting: format!(
            "2 or 3 VMs (processes) of 2 vCPUs (threads) on 2 CPUs; both vCPUs work {WORK_US} µs, then wait for each other spinning"
        ),
        metrics: metrics(),
        variants,
        criteria,
        plot: Plot::Bars("barriers"),
    }
}

fn variants_of_three(settings: &Settings) -> Vec<Variant> {
    let mut variants = variants(settings, 3, None);
    variants.retain(|variant| !variant.name.contains("alone") && !variant.name.contains("stacked"));
    variants
}

pub(super) fn metrics() -> Vec<Metric> {
    let metric = |key, label, unit| Metric { key, label, unit };
    vec![
        metric("barriers", "barriers of all VMs", "1000/s"),
        metric("jain", "Jain over VMs", ""),
        metric("turns", "VMs taking turns", ""),
    ]
}

/// The control planes compared, for so many VMs.
pub(super) fn variants(
    settings: &Settings,
    count: usize,
    block_after_us: Option<u32>,
) -> Vec<Variant> {
    let planes = Planes::new(settings);
    let body = Body::Barrier {
        work: settings.work(WORK_US),
        block_after_us,
    };
    let variant =
        |name: &str, how: &str, warm_up, count: usize, control: &dyn Fn(usize) -> Control| {
            let specs = (0..count)
                .map(|vm| VmSpec {
                    name: format!("vm{vm}"),
                    vcpus: vec![body; 2],
                    control: control(vm),
                })
                .collect();
            vms(name_of(count, name), how, warm_up, specs, measure)
        };
    let spread = || vec![planes.first.clone(), planes.second.clone()];
    let on_one = |vm: usize| match vm % 2 {
        0 => vec![planes.first.clone(); 2],
        _ => vec![planes.second.clone(); 2],
    };
    let millicpus = 2000;
    vec![
        vms(
            "one VM alone",
            "nothing else runs: what two VMs could have between them",
            WARM_UP,
            vec![VmSpec {
                name: "alone".into(),
                vcpus: vec![body; 2],
                control: Control::CloudHypervisor { affinity: spread() },
            }],
            measure,
        ),
        variant("unpinned", "Linux as it is", WARM_UP, count, &|_| {
            Control::Nothing
        }),
        variant(
            "cloud-hypervisor stacked",
            "cloud-hypervisor affinity=[0@[a],1@[a]]: one sched_setaffinity for each vCPU thread; each VM on one CPU",
            WARM_UP,
            count,
            &|vm| Control::CloudHypervisor {
                affinity: on_one(vm),
            },
        ),
        variant(
            "cloud-hypervisor pinned",
            "cloud-hypervisor affinity=[0@[a],1@[b]]: one sched_setaffinity for each vCPU thread",
            WARM_UP,
            count,
            &|_| Control::CloudHypervisor { affinity: spread() },
        ),
        variant(
            "libvirt pinned",
            "libvirt vcpupin: a cpu and a cpuset group for each vCPU and the emulator, and sched_setaffinity",
            WARM_UP,
            count,
            &|_| Planes::libvirt(spread()),
        ),
        variant(
            "k8s pool",
            "Kubernetes: exclusive CPUs for all VMs do not exist here, so each process is in the shared pool's cpuset; threads float",
            WARM_UP,
            count,
            &|_| Control::Kubernetes {
                cpus: planes.both.clone(),
                millicpus,
            },
        ),
        variant(
            "rota default",
            "rota --sched placement=shared",
            WARM_UP,
            count,
            &|_| rota("placement=shared"),
        ),
        variant(
            "rota gang 20 ms",
            "rota --sched gang=soft:20ms",
            WARM_UP,
            count,
            &|_| rota("gang=soft:20ms"),
        ),
        variant(
            "rota gang 40 ms",
            "rota --sched gang=soft:40ms",
            WARM_UP,
            count,
            &|_| rota("gang=soft:40ms"),
        ),
        variant(
            "rota adaptive",
            "rota --sched gang=adaptive:40ms, told the guest's barriers as its progress; measured after its trial",
            TRIAL,
            count,
            &|_| rota("gang=adaptive:40ms"),
        ),
    ]
}

pub(super) fn name_of(count: usize, name: &str) -> String {
    format!("{count} VMs, {name}")
}

fn measure(vms: &[VmResult], seconds: f64) -> BTreeMap<&'static str, f64> {
    let done: Vec<f64> = vms
        .iter()
        .map(|vm| vm.progress.first().map_or(0.0, |count| *count as f64))
        .collect();
    let turns = vms.iter().filter(|vm| vm.turns).count() as f64;
    BTreeMap::from([
        ("barriers", done.iter().sum::<f64>() / seconds / 1e3),
        ("jain", jain(&done)),
        ("turns", turns),
    ])
}

/// The best that static pins come to.
pub(super) fn best_pin(results: &Results, count: usize) -> Option<f64> {
    ["cloud-hypervisor pinned", "libvirt pinned"]
        .iter()
        .filter_map(|name| results.value(&name_of(count, name), "barriers"))
        .max_by(f64::total_cmp)
}

fn criteria(results: &Results) -> Vec<Criterion> {
    let mut criteria = Vec::new();
    for count in [2, 3] {
        let pin = best_pin(results, count);
        for name in ["rota gang 40 ms", "rota adaptive"] {
            let name = name_of(count, name);
            let gang = results.median(&name, "barriers");
            let ratio = gang.zip(pin).map(|(gang, pin)| gang.value / pin);
            criteria.push(Criterion::number(
                format!("{name} / best static pin ≥ 1.7"),
                ratio,
                |ratio| ratio >= 1.7,
            ));
            criteria.push(Criterion::number(
                format!("{name}: worst run / median ≥ 0.9"),
                gang.map(|gang| gang.least / gang.value),
                |worst| worst >= 0.9,
            ));
        }
    }
    criteria
}
