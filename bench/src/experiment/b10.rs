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

/// Name, options of softmshv, the right verdict.
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
        setting: "real VPs on softmshv, a new process for each detection; no peer looks. A verdict is right or wrong, nothing is repeated"
            .into(),
        metrics: vec![metric("right", "right", "%"), metric("ms", "time", "ms")],
        variants: DEVICES
            .iter()
            .map(|(name, options, expected)| Variant {
                name: (*name).into(),
                how: format!("softmshv {}; {expected} is right", options.join(" ")),
                run: Box::new(move |_| undisturbed(|| once(options, expected))),
            })
            .collect(),
        criteria,
        plot: Plot::Bars("ms"),
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

fn criteria(results: &Results) -> Vec<Criterion> {
    let samples: Vec<_> = results
        .samples
        .iter()
        .filter(|sample| !sample.discarded)
        .collect();
    let metric = |key| {
        samples
            .iter()
            .filter_map(move |sample| sample.outcome.metrics.get(key).copied())
    };
    let wrong = metric("right").filter(|right| *right < 100.0).count();
    let worst = metric("ms").fold(0.0, f64::max);
    let any = !samples.is_empty();
    vec![
        Criterion::number(
            format!("wrong verdicts in {} detections = 0", samples.len()),
            any.then_some(wrong as f64),
            |wrong| wrong == 0.0,
        ),
        Criterion::number("the longest ≤ 500 ms", any.then_some(worst), |ms| {
            ms <= LIMIT_MS
        }),
    ]
}
