//! B10: who schedules, found out; also where the device lies or cannot be asked.

use std::{
    fs,
    os::fd::AsFd as _,
    process::{Command, Stdio},
    time::Instant,
};

use scheduler::{BUDGET, examine};
use serde_json::{Value, json};

use super::{Criterion, Experiment, Metric, Outcome, Plot, Settings, Variant, undisturbed};
use crate::{Result, protocol::Results, vps::beside};

/// Name, options of softmshv, the right verdict. That a partition is an L1VH, where Linux' scheduling is called integrated, CPUID tells
/// on the real hypervisor; over softmshv only the declaration does. Where that cannot be asked, `root` is what is left for "Linux
/// schedules", and right: what can be done about VPs is the same.
const DEVICES: [(&str, &[&str], &str); 7] = [
    ("root", &["--scheduler", "root"], "root"),
    ("integrated", &["--scheduler", "integrated"], "integrated"),
    ("core", &["--scheduler", "core"], "core"),
    (
        "declares integrated, behaves core",
        &["--scheduler", "integrated", "--lie"],
        "disputed",
    ),
    (
        "declares core, behaves integrated",
        &["--scheduler", "core", "--lie"],
        "disputed",
    ),
    (
        "integrated, cannot be asked",
        &["--scheduler", "integrated", "--no-passthrough"],
        "root",
    ),
    (
        "core, cannot be asked",
        &["--scheduler", "core", "--no-passthrough"],
        "core",
    ),
];
/// What finding out may take, in milliseconds.
const LIMIT_MS: f64 = 500.0;

pub(super) fn experiment(_settings: &Settings) -> Experiment {
    let metric = |key, label, unit| Metric { key, label, unit };
    Experiment {
        id: "B10",
        title: "who schedules, found out",
        timed: false,
        setting: "real VPs on softmshv, a new process for each detection; no peer looks. One that steal has disturbed is repeated, and its verdict counts all the same"
            .into(),
        metrics: vec![metric("right", "right", "%"), metric("ms", "time", "ms")],
        variants: DEVICES
            .iter()
            .map(|(name, options, expected)| Variant {
                name: (*name).into(),
                how: format!("softmshv {}; {expected} is right{}", options.join(" "), why(options, expected)),
                run: Box::new(move |_| undisturbed(|| once(options, expected))),
            })
            .collect(),
        criteria,
        plot: Plot::Bars("ms"),
    }
}

/// Where the right verdict is not the name of what was started.
fn why(options: &[&str], expected: &str) -> &'static str {
    match expected {
        "root" if options.contains(&"integrated") => {
            " (VPs are seen to run on their threads, so Linux schedules; that it is called integrated here only the declaration could tell, \
             and what can be done is the same)"
        }
        _ => "",
    }
}

fn once(options: &[&str], expected: &str) -> Result<Outcome> {
    let me = std::env::current_exe()?;
    let output = Command::new(beside(&me, "softmshv"))
        .args(options)
        .arg("--")
        .arg(&me)
        .args(["inside", "detect"])
        .stdin(Stdio::null())
        .output()?;
    let said: Value = serde_json::from_slice(&output.stdout)?;
    let mut outcome = Outcome::default();
    let right = said["verdict"] == expected;
    outcome
        .metrics
        .insert("right", if right { 100.0 } else { 0.0 });
    outcome
        .metrics
        .extend(said["ms"].as_f64().map(|ms| ("ms", ms)));
    if !right {
        outcome.notes.push(said.to_string());
    }
    Ok(outcome)
}

/// One detection, told as JSON.
pub(super) fn inside() -> Result<()> {
    let device = fs::File::open("/dev/mshv")?;
    let begun = Instant::now();
    let detection = examine(Ok(device.as_fd()), BUDGET);
    let ms = begun.elapsed().as_secs_f64() * 1e3;
    println!(
        "{}",
        json!({ "verdict": detection.verdict, "ms": ms, "evidence": detection.evidence })
    );
    Ok(())
}

/// Fewer detections of each device prove nothing.
const ENOUGH: usize = 1000;

fn criteria(results: &Results) -> Vec<Criterion> {
    // Also those that were repeated: nothing excuses a wrong verdict.
    let all = || results.samples.iter();
    let metric = |key| all().filter_map(move |sample| sample.outcome.metrics.get(key).copied());
    let wrong = metric("right").filter(|right| *right < 100.0).count();
    let worst = metric("ms").fold(0.0, f64::max);
    let of = |name: &str| all().filter(|sample| sample.variant == name).count();
    let least = DEVICES.iter().map(|(name, ..)| of(name)).min();
    let judge = |what: String, value: f64, is_met: fn(f64) -> bool| {
        let runs = least.unwrap_or(0);
        let mut criterion = Criterion::number(what, Some(value), is_met);
        if runs < ENOUGH && criterion.met == Some(true) {
            criterion.met = None;
            criterion.measured = format!(
                "{} so far; not judged: {runs} of {ENOUGH} runs of each device",
                criterion.measured
            );
        }
        criterion
    };
    vec![
        judge(
            format!(
                "wrong verdicts in {} detections, {ENOUGH} of each device at least, = 0",
                all().count()
            ),
            wrong as f64,
            |wrong| wrong == 0.0,
        ),
        judge("the longest ≤ 500 ms".into(), worst, |ms| ms <= LIMIT_MS),
    ]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::protocol::Sample;

    fn results(of_each: u32, wrong: bool) -> Results {
        let sample = |name: &str, round, right| {
            let mut outcome = Outcome::default();
            outcome.metrics.insert("right", right);
            outcome.metrics.insert("ms", 200.0);
            Sample {
                variant: name.into(),
                round,
                discarded: false,
                outcome,
            }
        };
        let mut samples: Vec<_> = (0..of_each)
            .flat_map(|round| DEVICES.map(|(name, ..)| sample(name, round, 100.0)))
            .collect();
        if wrong {
            samples.push(Sample {
                discarded: true,
                ..sample("core", of_each, 0.0)
            });
        }
        Results {
            rounds: of_each,
            seconds: 0.0,
            samples,
            missing: BTreeMap::new(),
        }
    }

    #[test]
    fn few_detections_do_not_pass_but_a_wrong_one_fails() {
        let met = |results: &Results| {
            criteria(results)
                .iter()
                .map(|it| it.met)
                .collect::<Vec<_>>()
        };
        assert_eq!(met(&results(1000, false)), [Some(true); 2]);
        assert_eq!(met(&results(1000, true)), [Some(false), Some(true)]);
        assert_eq!(met(&results(15, false)), [None; 2]);
        assert_eq!(met(&results(15, true)), [Some(false), None]);
        assert_eq!(met(&results(0, false)), [None; 2]);
        let few = criteria(&results(15, false));
        assert!(
            few[0].line().contains("not judged: 15 of 1000 runs"),
            "{}",
            few[0].line()
        );
    }
}
