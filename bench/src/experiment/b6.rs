//! B6: what long slices are worth to vCPUs that fill the cache, and what they cost.

use std::{collections::BTreeMap, time::Duration};

use super::{Criterion, Experiment, Metric, Plot, Settings, Variant, rota, vms};
use crate::{
    protocol::Results,
    vm::{Body, Control, VmResult, VmSpec, at},
};

const WARM_UP: Duration = Duration::from_millis(500);
const KIB: u32 = 1536;
const VMS: usize = 4;
const DEFAULT: &str = "cloud-hypervisor, nothing asked";
const LONG: &str = "rota slice=throughput";

pub(super) fn experiment(settings: &Settings) -> Experiment {
    let metric = |key, label, unit| Metric { key, label, unit };
    Experiment {
        id: "B6",
        title: "long slices for vCPUs that fill the cache",
        timed: true,
        setting: format!(
            "{VMS} VMs of 1 vCPU (thread) on 2 CPUs; each walks through {KIB} KiB of its own, a cache line a step"
        ),
        metrics: vec![
            metric("steps", "steps of all VMs", "million/s"),
            metric("p99", "a walk's p99", "µs"),
        ],
        variants: variants(settings),
        criteria,
        plot: Plot::Bars("steps"),
    }
}

fn variants(_settings: &Settings) -> Vec<Variant> {
    let variant = |name: &str, how: &str, control: Control| {
        let specs = (0..VMS)
            .map(|vm| VmSpec {
                name: format!("vm{vm}"),
                vcpus: vec![Body::Cache { kib: KIB }],
                control: control.clone(),
            })
            .collect();
        vms(name, how, WARM_UP, specs, measure)
    };
    vec![
        variant(
            DEFAULT,
            "Linux as it is, with its own slices",
            Control::Nothing,
        ),
        variant(
            "rota default",
            "rota --sched placement=shared",
            rota("placement=shared"),
        ),
        variant(
            LONG,
            "rota --sched slice=throughput: 20 ms",
            rota("slice=throughput"),
        ),
        variant(
            "rota slice=100ms",
            "rota --sched slice=100ms",
            rota("slice=100ms"),
        ),
    ]
}

fn measure(vms: &[VmResult], seconds: f64) -> BTreeMap<&'static str, f64> {
    let steps: u64 = vms.iter().flat_map(|vm| &vm.progress).sum();
    let mut worst: Vec<f64> = vms.iter().filter_map(|vm| at(&vm.curve, 0.99)).collect();
    let mut metrics = BTreeMap::from([("steps", steps as f64 / seconds / 1e6)]);
    metrics.extend(crate::stats::middle(&mut worst).map(|p99| ("p99", p99)));
    metrics
}

fn criteria(results: &Results) -> Vec<Criterion> {
    let (long, short) = (
        results.median(LONG, "steps"),
        results.median("rota default", "steps"),
    );
    let both = long.zip(short);
    vec![
        Criterion::number(
            "slice=throughput against default slices: ≥ +10 %",
            both.map(|(long, short)| (long.value / short.value - 1.0) * 100.0),
            |gain| gain >= 10.0,
        ),
        Criterion::number(
            "and the intervals do not touch (distance, million/s)",
            both.map(|(long, short)| long.low - short.high),
            |distance| distance > 0.0,
        ),
    ]
}
