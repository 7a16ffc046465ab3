//! B7: what requests to Linux are worth where the hypervisor schedules: the same VPs, the same requests, in both worlds.

use super::{
    Criterion, Experiment, Metric, Outcome, Plot, Settings, Variant, own_ledger, undisturbed,
};
use crate::{
    protocol::Results,
    report::cell,
    vps::{Ask, Asker, Question, ask},
};

const WORLDS: [&str; 2] = ["integrated", "core"];

pub(super) fn experiment(_settings: &Settings) -> Experiment {
    let metric = |key, label, unit| Metric { key, label, unit };
    let mut variants = Vec::new();
    for (what, asked) in [
        ("affinity", Ask::Affinity),
        ("quota 40 %", Ask::Quota),
        ("weights 1:3", Ask::Weights),
    ] {
        for world in WORLDS {
            for asker in [Asker::Peers, Asker::Rota] {
                variants.push(variant(what, asked, world, asker));
            }
        }
    }
    Experiment {
        id: "B7",
        title: "what a request to Linux is worth where the hypervisor schedules",
        timed: true,
        setting: "real VPs on softmshv, which count for ever in real mode; a VM has 1 VP. Affinity: 2 VMs, both to CPU a alone; \
                  quota: 1 VM, 4 ms in 10 ms; weights: 2 VMs on one CPU (core: one logical processor), 1:3. \
                  A standstill is how long a VP's count was seen not to change, by one who looks every millisecond. \
                  Came true: the part of run time on CPU a; 40 % / run time; ratio / 3"
            .into(),
        metrics: vec![
            metric("kept", "what was asked came true", "%"),
            metric("on_cpu", "run time on the CPU asked for", "%"),
            metric("run", "run time of a VP", "% of a CPU"),
            metric("ratio", "second VP / first", ""),
            metric("thread", "run time of a vCPU's thread", "% of a CPU"),
            metric("still", "longest standstill", "ms"),
            metric("refused", "refused at start", ""),
        ],
        variants,
        criteria,
        plot: Plot::Bars("kept"),
    }
}

fn name_of(what: &str, world: &str, asker: Asker) -> String {
    let who = match (what, asker) {
        (_, Asker::Rota) => "rota",
        ("affinity", Asker::Peers) => "cloud-hypervisor",
        (_, Asker::Peers) => "libvirt",
    };
    format!("{what}, {world}, {who}")
}

fn variant(what: &'static str, asked: Ask, world: &'static str, asker: Asker) -> Variant {
    let how = match (asked, asker) {
        (Ask::Affinity, Asker::Peers) => "sched_setaffinity of each vCPU thread to CPU a",
        (Ask::Quota, Asker::Peers) => {
            "the vCPU's thread in a group with cpu.cfs_quota_us 4000 of 10000"
        }
        (Ask::Weights, Asker::Peers) => {
            "both threads to CPU a, groups with cpu.shares 1024 and 3072"
        }
        (Ask::Affinity, Asker::Rota) => "rota --sched map=[0@[a]]",
        (Ask::Quota, Asker::Rota) => "rota --sched cap=40%",
        (Ask::Weights, Asker::Rota) => {
            "rota --sched weight=100 and weight=300 (integrated: and map=[0@[a]])"
        }
    };
    Variant {
        name: name_of(what, world, asker),
        how: format!("softmshv --scheduler {world}; {how}"),
        run: Box::new(move |settings| undisturbed(|| once(settings, asked, world, asker))),
    }
}

fn once(settings: &Settings, asked: Ask, world: &str, asker: Asker) -> crate::Result<Outcome> {
    let cpu = settings.cpus[0];
    let mut options = Vec::new();
    if (asked, world) == (Ask::Weights, "core") {
        options = vec![
            "--lps".into(),
            cpu.to_string(),
            "--quantum-us".into(),
            "4000".into(),
        ];
    }
    let question = Question {
        ask: asked,
        asker,
        cpu,
        time: settings.time,
        ledger: own_ledger(settings)?,
    };
    let answer = ask(world, &options, &question)?;
    let mut outcome = Outcome {
        notes: answer.said,
        ..Outcome::default()
    };
    outcome
        .metrics
        .insert("refused", f64::from(u8::from(answer.refused)));
    if answer.refused {
        return Ok(outcome);
    }
    let mean = |parts: &[f64]| parts.iter().sum::<f64>() / parts.len().max(1) as f64 * 100.0;
    outcome.metrics.insert("run", mean(&answer.run));
    outcome.metrics.insert("thread", mean(&answer.thread_run));
    let still = answer.still.iter().max().copied().unwrap_or_default();
    outcome.metrics.insert("still", still.as_secs_f64() * 1e3);
    let ratio = match answer.counted[..] {
        [first, second] => f64::from(second) / f64::from(first.max(1)),
        _ => 1.0,
    };
    let kept = match asked {
        Ask::Affinity => {
            outcome.metrics.insert("on_cpu", answer.on_cpu * 100.0);
            answer.on_cpu
        }
        Ask::Quota => 40.0 / mean(&answer.run).max(1.0),
        Ask::Weights => {
            outcome.metrics.insert("ratio", ratio);
            ratio / 3.0
        }
    };
    outcome.metrics.insert("kept", kept.min(1.0) * 100.0);
    Ok(outcome)
}

/// What each request came to: of Linux in both worlds, and of Rota where the hypervisor schedules.
pub(super) fn headline(results: &Results) -> String {
    let mut table = String::from(
        "| asked for | where Linux schedules | where the hypervisor schedules: asked of Linux | … asked of Rota |\n|---|--:|--:|--:|\n",
    );
    for (words, what, metric, unit) in [
        (
            "both VPs on CPU a: run time there",
            "affinity",
            "on_cpu",
            " %",
        ),
        ("at most 40 % of a CPU: run time", "quota 40 %", "run", " %"),
        (
            "weights 1:3: ratio of run times",
            "weights 1:3",
            "ratio",
            "",
        ),
    ] {
        let said = |world, asker| {
            let variant = name_of(what, world, asker);
            match results.median(&variant, metric) {
                Some(median) => cell(median) + unit,
                None if results.value(&variant, "refused") == Some(1.0) => {
                    "refused at start".into()
                }
                None => "not measured".into(),
            }
        };
        table += &format!(
            "| {words} | {} | {} | {} |\n",
            said("integrated", Asker::Peers),
            said("core", Asker::Peers),
            said("core", Asker::Rota)
        );
    }
    table
}

fn criteria(results: &Results) -> Vec<Criterion> {
    let value = |what, world, asker, metric| results.value(&name_of(what, world, asker), metric);
    let near = |wanted: f64, tolerance: f64| move |value: f64| (value - wanted).abs() <= tolerance;
    let mut criteria = vec![
        Criterion::number(
            "rota, core, affinity: refused at start, in every run",
            value("affinity", "core", Asker::Rota, "refused"),
            near(1.0, 0.0),
        ),
        Criterion::number(
            "rota, integrated, affinity: run time on the CPU asked for ≥ 99 %",
            value("affinity", "integrated", Asker::Rota, "on_cpu"),
            |part| part >= 99.0,
        ),
    ];
    for world in WORLDS {
        criteria.push(Criterion::number(
            format!("rota, {world}, quota: 40 ± 4 % of a CPU"),
            value("quota 40 %", world, Asker::Rota, "run"),
            near(40.0, 4.0),
        ));
        criteria.push(Criterion::number(
            format!("rota, {world}, weights: 3 ± 0.5"),
            value("weights 1:3", world, Asker::Rota, "ratio"),
            near(3.0, 0.5),
        ));
    }
    criteria
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::protocol::Sample;

    #[test]
    fn the_headline_says_what_was_refused_and_what_was_not_run() {
        let sample = |variant: String, metrics: &[(&'static str, f64)]| Sample {
            variant,
            round: 1,
            discarded: false,
            outcome: Outcome {
                metrics: metrics.iter().copied().collect(),
                ..Outcome::default()
            },
        };
        let results = Results {
            rounds: 1,
            seconds: 1.0,
            samples: vec![
                sample(
                    name_of("affinity", "core", Asker::Peers),
                    &[("refused", 0.0), ("on_cpu", 50.0)],
                ),
                sample(
                    name_of("affinity", "core", Asker::Rota),
                    &[("refused", 1.0)],
                ),
            ],
            missing: BTreeMap::new(),
        };
        let table = headline(&results);
        let row = table.lines().nth(2).unwrap();
        assert!(
            row.ends_with("| not measured | 50.0 % | refused at start |"),
            "{row}"
        );
        assert_eq!(table.lines().count(), 5);
    }
}
