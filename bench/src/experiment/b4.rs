//! B4: the same for guests that spin for a while and then sleep: there gangs gain nothing, and must not cost.

use super::{Criterion, Experiment, Plot, Settings, b3};
use crate::protocol::Results;

/// How long they spin, in microseconds.
const SPIN_US: u32 = 50;
const VMS: usize = 2;

pub(super) fn experiment(settings: &Settings) -> Experiment {
    Experiment {
        id: "B4",
        title: "guests that spin for a while, then sleep: gangs must not cost",
        timed: true,
        setting: format!(
            "2 VMs (processes) of 2 vCPUs (threads) on 2 CPUs; both vCPUs work 20 µs, then wait for each other: {SPIN_US} µs spinning, then asleep"
        ),
        metrics: b3::metrics(),
        variants: b3::variants(settings, VMS, Some(SPIN_US)),
        criteria,
        plot: Plot::Bars("barriers"),
    }
}

fn criteria(results: &Results) -> Vec<Criterion> {
    let pin = b3::best_pin(results, VMS);
    let name = |name: &str| b3::name_of(VMS, name);
    let ratio = |variant: &str| {
        let gang = results.value(&name(variant), "barriers");
        gang.zip(pin).map(|(gang, pin)| gang / pin)
    };
    vec![
        Criterion::number(
            "gang of 40 ms / best static pin ≥ 0.97",
            ratio("rota gang 40 ms"),
            |it| it >= 0.97,
        ),
        Criterion::number(
            "adaptive gang / best static pin ≥ 0.97",
            ratio("rota adaptive"),
            |it| it >= 0.97,
        ),
        Criterion::number(
            "adaptive gangs that are on after their trial = 0",
            results.value(&name("rota adaptive"), "turns"),
            |turns| turns == 0.0,
        ),
    ]
}
