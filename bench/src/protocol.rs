//! How a comparison is run: every variant in every round, in random order, and what the machine did meanwhile.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::{
    Result, clock,
    experiment::{Experiment, Outcome, Settings},
    stats::{Median, Random},
};

/// More steal than this, and a run says nothing.
const MOST_STEAL: f64 = 0.01;
/// Runs repeated for such reasons, for each that counts.
const PATIENCE: u32 = 2;

/// One run of one variant.
#[derive(Debug, Serialize)]
pub(crate) struct Sample {
    pub(crate) variant: String,
    pub(crate) round: u32,
    /// Not counted: the machine lost too much time to its own host, or to others.
    pub(crate) discarded: bool,
    #[serde(flatten)]
    pub(crate) outcome: Outcome,
}

/// Everything that was measured in one experiment.
#[derive(Debug, Serialize)]
pub(crate) struct Results {
    pub(crate) rounds: u32,
    pub(crate) seconds: f64,
    pub(crate) samples: Vec<Sample>,
    /// Variants that cannot be had here, and why.
    pub(crate) missing: BTreeMap<String, String>,
}

/// Runs an experiment. Runs in which others used more than `most_others` of the machine do not count either.
pub(crate) fn run(
    experiment: &Experiment,
    settings: &Settings,
    rounds: u32,
    most_others: f64,
) -> Result<Results> {
    let mut random = Random(clock::now_ns());
    let mut results = Results {
        rounds,
        seconds: settings.time.as_secs_f64(),
        samples: Vec::new(),
        missing: BTreeMap::new(),
    };
    let mut patience = rounds * PATIENCE * experiment.variants.len() as u32;
    eprintln!("{}: {}", experiment.id, experiment.title);
    for round in 1..=rounds {
        let mut order: Vec<_> = experiment.variants.iter().collect();
        random.shuffle(&mut order);
        for variant in order {
            if results.missing.contains_key(&variant.name) {
                continue;
            }
            loop {
                let outcome = match (variant.run)(settings) {
                    Ok(outcome) => outcome,
                    Err(error) => {
                        eprintln!("  {}: {error}", variant.name);
                        results
                            .missing
                            .insert(variant.name.clone(), error.to_string());
                        break;
                    }
                };
                let disturbed = outcome.steal > MOST_STEAL
                    || outcome.others.is_some_and(|others| others > most_others);
                let discarded = disturbed && patience > 0;
                results.samples.push(Sample {
                    variant: variant.name.clone(),
                    round,
                    discarded,
                    outcome,
                });
                if !discarded {
                    break;
                }
                patience -= 1;
            }
        }
        eprintln!("  round {round} of {rounds}");
    }
    Ok(results)
}

impl Results {
    fn of(&self, variant: &str) -> Vec<&Outcome> {
        self.samples
            .iter()
            .filter(|sample| sample.variant == variant && !sample.discarded)
            .map(|sample| &sample.outcome)
            .collect()
    }

    /// The median of what a variant came to.
    pub(crate) fn median(&self, variant: &str, metric: &str) -> Option<Median> {
        let values: Vec<f64> = self
            .of(variant)
            .iter()
            .filter_map(|outcome| outcome.metrics.get(metric).copied())
            .collect();
        Median::of(&values)
    }

    /// The median alone.
    pub(crate) fn value(&self, variant: &str, metric: &str) -> Option<f64> {
        self.median(variant, metric).map(|median| median.value)
    }

    /// The medians of a variant's curve.
    pub(crate) fn curve(&self, variant: &str) -> Vec<f64> {
        let curves: Vec<_> = self
            .of(variant)
            .into_iter()
            .map(|outcome| &outcome.curve)
            .collect();
        let points = curves.iter().map(|curve| curve.len()).max().unwrap_or(0);
        (0..points)
            .filter_map(|point| {
                let values: Vec<f64> = curves
                    .iter()
                    .filter_map(|curve| curve.get(point).copied())
                    .collect();
                Median::of(&values).map(|median| median.value)
            })
            .collect()
    }

    /// Something that was said in a variant's last run.
    pub(crate) fn notes(&self, variant: &str) -> &[String] {
        self.of(variant)
            .last()
            .map_or(&[], |outcome| &outcome.notes)
    }

    /// How many runs did not count.
    pub(crate) fn discarded(&self) -> usize {
        self.samples
            .iter()
            .filter(|sample| sample.discarded)
            .count()
    }

    /// The medians of steal and of what others used, as parts of the machine.
    pub(crate) fn disturbance(&self) -> (f64, Option<f64>) {
        let counted = || self.samples.iter().filter(|sample| !sample.discarded);
        let steal: Vec<f64> = counted().map(|sample| sample.outcome.steal).collect();
        let others: Vec<f64> = counted()
            .filter_map(|sample| sample.outcome.others)
            .collect();
        let value = |median: Median| median.value;
        (
            Median::of(&steal).map_or(0.0, value),
            Median::of(&others).map(value),
        )
    }
}
