//! B11: the planner: random hosts, and one more VM on a large one.

use std::process::Command;

use serde_json::Value;

use super::{Criterion, Experiment, Metric, Outcome, Plot, Settings, Variant, undisturbed};
use crate::{Result, protocol::Results, vps::beside};

const HOSTS: &str = "10000";
const RANDOM: &str = "10000 random hosts";
/// As the crate's example `plan` names them.
const CASES: [&str; 8] = [
    "shared, 4 vCPUs",
    "shared, 64 vCPUs",
    "spread, 16 vCPUs",
    "pack, 8 vCPUs",
    "numa-local, 8 vCPUs",
    "dedicated, 2 vCPUs",
    "dedicated cores=one, 4 vCPUs",
    "refused, as many dedicated as CPUs",
];

pub(super) fn experiment(_settings: &Settings) -> Experiment {
    let metric = |key, label, unit| Metric { key, label, unit };
    let mut variants = vec![Variant {
        name: RANDOM.into(),
        how: "the crate's example `plan`: random hosts and requests, every plan checked".into(),
        run: Box::new(|_| {
            undisturbed(|| {
                let report = example(HOSTS)?;
                let mut outcome = Outcome::default();
                for (key, name) in [("plans", "plans"), ("violations", "violations")] {
                    let value = report["random"][name].as_f64();
                    outcome.metrics.extend(value.map(|value| (key, value)));
                }
                Ok(outcome)
            })
        }),
    }];
    variants.extend(CASES.iter().map(|case| Variant {
        name: (*case).into(),
        how: "one more VM on 256 CPUs with 200 VMs".into(),
        run: Box::new(move |_| {
            undisturbed(|| {
                let report = example("0")?;
                let cases = report["one_more_vm"]["cases"]
                    .as_array()
                    .cloned()
                    .unwrap_or_default();
                let found = cases.iter().find(|it| it["case"] == *case);
                let found = found.ok_or_else(|| format!("the example has no case {case}"))?;
                let mut outcome = Outcome::default();
                for (key, name) in [("median", "median_us"), ("worst", "worst_us")] {
                    outcome
                        .metrics
                        .extend(found[name].as_f64().map(|value| (key, value)));
                }
                Ok(outcome)
            })
        }),
    }));
    Experiment {
        id: "B11",
        title: "the planner",
        timed: false,
        setting: "no VM runs; synthetic hosts. One more VM on a host of 256 CPUs with 200 VMs, planned 100 times".into(),
        metrics: vec![
            metric("median", "median", "µs"),
            metric("worst", "worst of 100", "µs"),
            metric("plans", "plans", ""),
            metric("violations", "violations", ""),
        ],
        variants,
        criteria,
        plot: Plot::Bars("median"),
    }
}

fn example(hosts: &str) -> Result<Value> {
    let program = beside(&std::env::current_exe()?, "examples").join("plan");
    let output = Command::new(&program)
        .arg(hosts)
        .output()
        .map_err(|error| format!("{}: {error}", program.display()))?;
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn criteria(results: &Results) -> Vec<Criterion> {
    let medians: Option<Vec<f64>> = CASES
        .iter()
        .map(|case| results.value(case, "median"))
        .collect();
    vec![
        Criterion::number(
            "violations = 0",
            results.value(RANDOM, "violations"),
            |it| it == 0.0,
        ),
        Criterion::number(
            "the slowest case's median < 1000 µs",
            medians.map(|medians| medians.into_iter().fold(0.0, f64::max)),
            |us| us < 1000.0,
        ),
    ]
}
