//! B8: a VM that may use 40 % of a CPU: how long it stands still.

use std::{collections::BTreeMap, time::Duration};

use super::{Criterion, Experiment, Metric, Plot, Settings, Variant, rota, vms};
use crate::{
    protocol::Results,
    vm::{Body, Control, VmResult, VmSpec, at},
};

const WARM_UP: Duration = Duration::from_millis(500);
/// Rota's variants: periods in milliseconds.
const PERIODS: [u32; 4] = [5, 10, 20, 100];

pub(super) fn experiment(settings: &Settings) -> Experiment {
    let metric = |key, label, unit| Metric { key, label, unit };
    Experiment {
        id: "B8",
        title: "a VM capped at 40 % of a CPU: how long it stands still",
        timed: true,
        setting: "a VM of 1 vCPU (thread) that never stops; standstills are units of 100 µs that took longer than 500 µs".into(),
        metrics: vec![
            metric("run", "run time", "% of a CPU"),
            metric("p50", "standstill p50", "ms"),
            metric("p99", "standstill p99", "ms"),
            metric("max", "longest", "ms"),
            metric("nr_throttled", "nr_throttled", "1/s"),
            metric("throttled", "throttled_usec", "ms/s"),
        ],
        variants: variants(settings),
        criteria,
        plot: Plot::Bars("p99"),
    }
}

fn variants(settings: &Settings) -> Vec<Variant> {
    let variant = |name: String, how: &str, control: Control| {
        let spec = VmSpec {
            name: "capped".into(),
            vcpus: vec![Body::Units {
                work: settings.work(100.0),
            }],
            control,
        };
        vms(name, how, WARM_UP, vec![spec], measure)
    };
    let libvirt = Control::Libvirt {
        pins: Vec::new(),
        emulator: None,
        shares: None,
        quota: Some((40_000, 100_000)),
        fifo: None,
    };
    let mut variants = vec![variant(
        "libvirt quota, its default period of 100 ms".into(),
        "libvirt <quota>40000, period 100000: cpu.cfs_quota_us of the vCPU's group",
        libvirt,
    )];
    for period in PERIODS {
        variants.push(variant(
            name_of(period),
            "rota --sched cap=",
            rota(format!("cap=40%:{period}ms")),
        ));
    }
    variants.push(variant(
        "rota cap=40%:10ms,burst=4ms".into(),
        "rota --sched cap= with burst=",
        rota("cap=40%:10ms,burst=4ms"),
    ));
    variants
}

fn name_of(period: u32) -> String {
    format!("rota cap=40%:{period}ms")
}

fn measure(vms: &[VmResult], seconds: f64) -> BTreeMap<&'static str, f64> {
    let mut metrics = BTreeMap::new();
    if let [vm] = vms {
        let run: u64 = vm.run_ns.iter().sum();
        metrics.insert("run", run as f64 / 1e7 / seconds);
        for (key, part) in [("p50", 0.5), ("p99", 0.99), ("max", 1.0)] {
            metrics.extend(at(&vm.blackouts, part).map(|us| (key, us / 1e3)));
        }
        if let Some(throttled) = vm.throttled {
            metrics.insert("nr_throttled", throttled.periods as f64 / seconds);
            metrics.insert("throttled", throttled.us as f64 / 1e3 / seconds);
        }
    }
    metrics
}

fn criteria(results: &Results) -> Vec<Criterion> {
    PERIODS
        .map(|period| {
            Criterion::number(
                format!("{}: standstill p99 ≤ its period", name_of(period)),
                results.value(&name_of(period), "p99"),
                |ms| ms <= f64::from(period),
            )
        })
        .into()
}
