//! What an experiment came to: a table, the criterion, raw figures, a plot.

use serde_json::{Value, json};

use crate::{
    experiment::{Criterion, Experiment, Plot},
    protocol::Results,
    stats::Median,
    svg,
};

/// One experiment's results, to be shown.
pub(crate) struct Report<'a> {
    experiment: &'a Experiment,
    results: &'a Results,
    criteria: Vec<Criterion>,
}

impl<'a> Report<'a> {
    pub(crate) fn of(experiment: &'a Experiment, results: &'a Results) -> Self {
        Self {
            experiment,
            results,
            criteria: (experiment.criteria)(results),
        }
    }

    /// The conditions, in a line or two.
    fn conditions(&self) -> String {
        let Results {
            rounds, seconds, ..
        } = self.results;
        let (steal, others) = self.results.disturbance();
        let count = if *rounds == 1 { "run" } else { "runs" };
        let each = match self.experiment.timed {
            true => format!(" of {seconds} s each"),
            false => String::new(),
        };
        format!(
            "{}; {rounds} {count}{each}, in random order; median [95 % bootstrap interval]; \
             steal {:.2} %, other load on the machine {}; {} runs discarded for these",
            machine(),
            steal * 100.0,
            others.map_or("not told apart".into(), |others| format!(
                "{:.1} % of its CPUs",
                others * 100.0
            )),
            self.results.discarded()
        )
    }

    fn rows(&self) -> Vec<Vec<String>> {
        let metrics = &self.experiment.metrics;
        let mut rows = vec![vec![String::new()]];
        rows[0].extend(metrics.iter().map(|metric| match metric.unit {
            "" => metric.label.to_owned(),
            unit => format!("{}, {unit}", metric.label),
        }));
        for variant in &self.experiment.variants {
            let mut row = vec![variant.name.clone()];
            row.extend(metrics.iter().map(|metric| {
                match self.results.median(&variant.name, metric.key) {
                    Some(median) => cell(median),
                    None if self.results.missing.contains_key(&variant.name) => "not run".into(),
                    None => "–".into(),
                }
            }));
            rows.push(row);
        }
        rows
    }

    /// For the terminal.
    pub(crate) fn text(&self) -> String {
        let rows = self.rows();
        let widths: Vec<usize> = (0..rows[0].len())
            .map(|column| {
                rows.iter()
                    .map(|row| row[column].chars().count())
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        let mut text = format!("\n{}: {}\n", self.experiment.id, self.experiment.title);
        text += &format!("{}\n{}\n\n", self.experiment.setting, self.conditions());
        for row in &rows {
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                line += &match column {
                    0 => format!("  {cell:<width$}"),
                    _ => format!("  {cell:>width$}"),
                };
            }
            text += &format!("{}\n", line.trim_end());
        }
        text += "\n";
        for note in self.notes() {
            text += &format!("  {note}\n");
        }
        for criterion in &self.criteria {
            text += &format!("  {}\n", criterion.line());
        }
        text
    }

    /// For the book.
    pub(crate) fn markdown(&self) -> String {
        let rows = self.rows();
        let mut text = format!("{}.\n\n", self.conditions());
        for (index, row) in rows.iter().enumerate() {
            text += &format!("| {} |\n", row.join(" | "));
            if index == 0 {
                text += &format!("|---|{}\n", "--:|".repeat(row.len() - 1));
            }
        }
        text += "\n";
        for note in self.notes() {
            text += &format!("- {note}\n");
        }
        for criterion in &self.criteria {
            text += &format!("- {}\n", criterion.line());
        }
        text
    }

    /// For the README, of the experiment that has something to say there.
    pub(crate) fn headline(&self) -> Option<String> {
        let table = crate::experiment::headline(self.experiment.id, self.results)?;
        Some(format!("{table}\n{}.\n", self.conditions()))
    }

    fn notes(&self) -> Vec<String> {
        let missing = self.results.missing.iter();
        let mut notes: Vec<_> = missing
            .map(|(variant, why)| format!("{variant}: not run: {why}"))
            .collect();
        for variant in &self.experiment.variants {
            for note in self.results.notes(&variant.name) {
                let note = format!("{}: {note}", variant.name);
                if !notes.contains(&note) {
                    notes.push(note);
                }
            }
        }
        notes
    }

    /// Everything.
    pub(crate) fn raw(&self) -> Value {
        let variants: Vec<_> = self
            .experiment
            .variants
            .iter()
            .map(|variant| json!({ "name": variant.name, "how": variant.how }))
            .collect();
        json!({
            "experiment": self.experiment.id,
            "title": self.experiment.title,
            "setting": self.experiment.setting,
            "conditions": self.conditions(),
            "variants": variants,
            "criteria": self.criteria,
            "results": self.results,
        })
    }

    /// The plot.
    pub(crate) fn plot(&self) -> String {
        let title = format!("{}: {}", self.experiment.id, self.experiment.title);
        let captions = [self.experiment.setting.clone(), self.conditions()];
        let variants = || self.experiment.variants.iter();
        match self.experiment.plot {
            Plot::Bars(key) => {
                let metric = self
                    .experiment
                    .metrics
                    .iter()
                    .find(|metric| metric.key == key);
                let unit = metric.map_or(String::new(), |metric| match metric.unit {
                    "" => metric.label.to_owned(),
                    unit => format!("{}, {unit}", metric.label),
                });
                let bars: Vec<_> = variants()
                    .filter_map(|variant| {
                        let value = self.results.median(&variant.name, key);
                        let refused = self.results.value(&variant.name, "refused") == Some(1.0);
                        let absent = match (refused, self.results.missing.get(&variant.name)) {
                            (true, _) => "refused at start",
                            (false, Some(_)) => "not run",
                            // It is about something else.
                            (false, None) if value.is_none() => return None,
                            (false, None) => "",
                        };
                        Some(svg::Bar {
                            name: variant.name.clone(),
                            value,
                            absent,
                        })
                    })
                    .collect();
                svg::bars(&title, &captions, &unit, &bars)
            }
            Plot::Curves(unit) => {
                let lines: Vec<_> = variants()
                    .map(|variant| (variant.name.clone(), self.results.curve(&variant.name)))
                    .filter(|(_, curve)| !curve.is_empty())
                    .collect();
                svg::curves(&title, &captions, unit, &crate::vm::QUANTILES, &lines)
            }
        }
    }
}

/// The machine, in a few words.
fn machine() -> String {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let version = match std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        true => 2,
        false => 1,
    };
    format!(
        "Linux {}, {cpus} CPUs, cgroup v{version}",
        read("/proc/sys/kernel/osrelease").trim()
    )
}

pub(crate) fn cell(median: Median) -> String {
    let Median {
        value, low, high, ..
    } = median;
    if median.runs < 2 {
        return number(value);
    }
    format!("{} [{}, {}]", number(value), number(low), number(high))
}

/// Three digits, or all before the point.
pub(crate) fn number(value: f64) -> String {
    let digits = match value.abs() {
        0.0 => 0,
        size if size < 1.0 => 3,
        size if size < 10.0 => 2,
        size if size < 100.0 => 1,
        _ => 0,
    };
    format!("{value:.digits$}")
}
