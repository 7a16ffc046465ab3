//! The experiments: one file each.

mod b1;
mod b10;
mod b11;
mod b13;
mod b2;
mod b3;
mod b4;
mod b5;
mod b6;
mod b7;
mod b8;
mod b9;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::Duration,
};

use scheduler::CpuSet;
use serde::Serialize;

use crate::{
    Result,
    clock::Machine,
    protocol::Results,
    vm::{self, Control, VmResult, VmSpec, Work},
};

/// What holds for all experiments of one call.
pub(crate) struct Settings {
    /// How long a run is measured.
    pub(crate) time: Duration,
    /// How much work a microsecond is.
    pub(crate) steps_per_us: f64,
    /// Where ledgers can be.
    pub(crate) scratch: PathBuf,
    /// The CPUs of this machine.
    pub(crate) cpus: Vec<u32>,
}

impl Settings {
    /// Work for so many microseconds, on a CPU that does nothing else.
    pub(crate) fn work(&self, us: f64) -> Work {
        Work {
            steps: (self.steps_per_us * us) as u64,
        }
    }
}

/// One comparison.
pub(crate) struct Experiment {
    pub(crate) id: &'static str,
    pub(crate) title: &'static str,
    /// Whether a run takes as long as `--seconds` says; else as long as it takes.
    pub(crate) timed: bool,
    /// What runs, in a sentence.
    pub(crate) setting: String,
    pub(crate) metrics: Vec<Metric>,
    pub(crate) variants: Vec<Variant>,
    pub(crate) criteria: fn(&Results) -> Vec<Criterion>,
    pub(crate) plot: Plot,
}

/// Something that is measured.
pub(crate) struct Metric {
    pub(crate) key: &'static str,
    pub(crate) label: &'static str,
    pub(crate) unit: &'static str,
}

/// One of those compared.
pub(crate) struct Variant {
    pub(crate) name: String,
    /// What it does to whom.
    pub(crate) how: String,
    pub(crate) run: Run,
}

/// Runs a variant once.
pub(crate) type Run = Box<dyn Fn(&Settings) -> Result<Outcome>>;

/// What one run came to.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Outcome {
    pub(crate) metrics: BTreeMap<&'static str, f64>,
    /// Microseconds at [`vm::QUANTILES`].
    pub(crate) curve: Vec<f64>,
    pub(crate) notes: Vec<String>,
    /// What the hypervisor below took of the CPUs meanwhile, as a part.
    pub(crate) steal: f64,
    /// What others on this machine used, as a part, where that can be told.
    pub(crate) others: Option<f64>,
}

/// What is drawn.
pub(crate) enum Plot {
    /// A metric, as bars.
    Bars(&'static str),
    /// The curves, in this unit.
    Curves(&'static str),
}

/// Something that was to be reached.
#[derive(Debug, Serialize)]
pub(crate) struct Criterion {
    /// What.
    pub(crate) what: String,
    /// What is.
    pub(crate) measured: String,
    /// Is it? `None` if that is not known.
    pub(crate) met: Option<bool>,
}

/// A criterion that nothing here says anything about: what was to be measured cannot be done.
const NOT_HERE: &str = "cannot be done here: ";

impl Criterion {
    /// One about a number, which is not known if something was not run.
    pub(crate) fn number(
        what: impl Into<String>,
        value: Option<f64>,
        is_met: impl Fn(f64) -> bool,
    ) -> Self {
        Self {
            what: what.into(),
            measured: value.map_or("not measured".into(), crate::report::number),
            met: value.map(is_met),
        }
    }

    /// One that cannot be judged here, and why.
    pub(crate) fn not_here(what: impl Into<String>, why: &str) -> Self {
        Self {
            what: what.into(),
            measured: format!("{NOT_HERE}{why}"),
            met: None,
        }
    }

    pub(crate) fn line(&self) -> String {
        let word = match self.met {
            Some(true) => "pass",
            Some(false) => "MISS",
            None if self.measured.starts_with(NOT_HERE) => "none",
            None => "????",
        };
        format!("{word}  {}: {}", self.what, self.measured)
    }
}

/// All experiments.
pub(crate) fn all(settings: &Settings) -> Vec<Experiment> {
    vec![
        b1::experiment(settings),
        b2::experiment(settings),
        b3::experiment(settings),
        b4::experiment(settings),
        b5::experiment(settings),
        b6::experiment(settings),
        b7::experiment(settings),
        b8::experiment(settings),
        b9::experiment(settings),
        b10::experiment(settings),
        b11::experiment(settings),
        b13::experiment(settings),
    ]
}

/// What an experiment has to say in the README: a table of B7, in Markdown.
pub(crate) fn headline(id: &str, results: &Results) -> Option<String> {
    (id == "B7").then(|| b7::headline(results))
}

/// The CPUs this process may use; the first two are used.
pub(crate) fn cpus() -> Result<Vec<u32>> {
    let text = std::fs::read_to_string("/proc/self/status")?;
    let list = text
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let cpus: CpuSet = list.unwrap_or_default().trim().parse()?;
    let cpus: Vec<u32> = cpus.iter().take(2).collect();
    match cpus.len() {
        2 => Ok(cpus),
        _ => Err("two CPUs are needed".into()),
    }
}

/// `sched-bench inside detect`, under softmshv.
pub(crate) fn detect_inside() -> Result<()> {
    b10::inside()
}

/// A ledger nobody else uses.
fn own_ledger(settings: &Settings) -> Result<PathBuf> {
    static LEDGERS: AtomicU32 = AtomicU32::new(0);
    let number = LEDGERS.fetch_add(1, Relaxed);
    let folder = settings.scratch.join(number.to_string());
    std::fs::create_dir_all(&folder)?;
    Ok(folder.join("ledger.json"))
}

/// Runs something else than VMs of threads, and notes what the hypervisor below took meanwhile. What others used is not told apart
/// from what it used itself.
fn undisturbed(run: impl Fn() -> Result<Outcome>) -> Result<Outcome> {
    let before = Machine::read()?;
    let mut outcome = run()?;
    outcome.steal = Machine::read()?.since(&before, Duration::ZERO).0;
    Ok(outcome)
}

/// VMs under the control planes that a variant is made of; the same names for all experiments.
pub(crate) struct Planes {
    pub(crate) first: CpuSet,
    pub(crate) second: CpuSet,
    pub(crate) both: CpuSet,
}

impl Planes {
    pub(crate) fn new(settings: &Settings) -> Self {
        let [first, second] = [0, 1].map(|index| CpuSet::one(settings.cpus[index]));
        let both = [settings.cpus[0], settings.cpus[1]].into_iter().collect();
        Self {
            first,
            second,
            both,
        }
    }

    /// `<vcpupin>` and nothing else.
    pub(crate) fn libvirt(pins: Vec<CpuSet>) -> Control {
        Control::Libvirt {
            pins,
            emulator: None,
            shares: None,
            quota: None,
            fifo: None,
        }
    }
}

/// A variant whose VMs are processes of threads. `measure` gets their results and the seconds they were measured for.
pub(crate) fn vms(
    name: impl Into<String>,
    how: impl Into<String>,
    warm_up: Duration,
    specs: Vec<VmSpec>,
    measure: impl Fn(&[VmResult], f64) -> BTreeMap<&'static str, f64> + 'static,
) -> Variant {
    Variant {
        name: name.into(),
        how: how.into(),
        run: Box::new(move |settings| {
            let own = own_ledger(settings)?;
            let mut specs = specs.clone();
            for spec in &mut specs {
                if let Control::Rota { ledger, .. } = &mut spec.control {
                    ledger.clone_from(&own);
                }
            }
            let together = vm::run(&specs, warm_up, settings.time, &mut |_| Ok(()))?;
            let mut outcome = Outcome {
                metrics: measure(&together.vms, settings.time.as_secs_f64()),
                steal: together.steal,
                others: Some(together.others),
                ..Outcome::default()
            };
            if let Some(first) = together.vms.first() {
                outcome.curve.clone_from(&first.curve);
            }
            Ok(outcome)
        }),
    }
}

/// `rota run --sched`; the ledger is the run's.
pub(crate) fn rota(sched: impl Into<String>) -> Control {
    Control::Rota {
        sched: sched.into(),
        ledger: PathBuf::new(),
    }
}
