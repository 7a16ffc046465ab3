//! The programs of the crate `rota-tests`, and that of `scheduler`. Those of the conformance suite are clients of `/dev/mshv` themselves and run under
//! softmshv; the others start what they need.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::harness::{self, Counts};
use crate::error::{Context, Result};

/// The programs that hold the conformance suite are named so.
const CONFORMANCE: &str = "conformance";

/// The tests inside the crate `scheduler`. Most of them have run before, where the crate was built; here it is those that want a machine
/// of their own with control groups of version 2, one after the other.
const SCHEDULER: (&str, &[&str]) = (
    "scheduler",
    &[
        "version_2::",
        "a_dedicated_cpu_that_goes_offline_is_told",
        "--test-threads=1",
    ],
);

/// The worlds it is run in, as options of the launcher: Linux schedules, and the hypervisor does.
const WORLDS: [&[&str]; 2] = [&[], &["--scheduler", "core"]];

/// Test programs and how to run them.
#[derive(Debug)]
pub(crate) struct Suite<'a> {
    /// The launcher.
    pub(crate) softmshv: &'a str,
    /// Names with paths.
    pub(crate) programs: &'a [(String, String)],
    /// Run only tests whose name contains this.
    pub(crate) filter: Option<&'a str>,
    /// Environment variables for the programs.
    pub(crate) environment: &'a [(&'a str, &'a str)],
    /// The longest time a program may take.
    pub(crate) limit: Duration,
    /// Where to note what came of each program. Programs that stand there have run, and do not run again.
    pub(crate) results: Option<PathBuf>,
}

/// What came of each program: its counts.
pub(crate) type Results = BTreeMap<String, Counts>;

/// What was noted in `file`; nothing if there is no such file.
pub(crate) fn read_results(file: &Path) -> Results {
    fs::read(file)
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok())
        .unwrap_or_default()
}

impl Suite<'_> {
    /// Runs each program, where needed under the launcher, says how it went, and returns the sum.
    pub(crate) fn run(&self) -> Result<Counts> {
        let mut results = self
            .results
            .as_deref()
            .map(read_results)
            .unwrap_or_default();
        let mut reasons = BTreeMap::<String, usize>::new();
        for (name, path) in self.programs {
            let commands = if name.starts_with(CONFORMANCE) {
                let in_world = |world: &[&str]| {
                    let mut command = Command::new(self.softmshv);
                    command.args(world).arg("--").arg(path);
                    (world.join(" "), command)
                };
                WORLDS.map(in_world).into()
            } else {
                vec![(String::new(), Command::new(path))]
            };
            for (world, mut command) in commands {
                let label = format!("{name} {world}").trim_end().to_owned();
                if results.contains_key(&label) {
                    continue;
                }
                match (self.filter, SCHEDULER) {
                    (None, (scheduler, its)) if name == scheduler => {
                        command.args(its).env("ROTA_TEST_OFFLINE", "1")
                    }
                    (filter, _) => command.args(filter),
                };
                command.envs(self.environment.iter().copied());
                let mut again = Command::new(command.get_program());
                again
                    .args(command.get_args())
                    .envs(self.environment.iter().copied());
                let mut outcome = harness::run(command, self.limit)?;
                // The emulated machine loses a start-up interrupt once in many boots; what fails there twice fails.
                if outcome.counts.failed > 0 && self.results.is_some() {
                    println!("  {label}: {}; once more, after", outcome.counts);
                    println!("{}", failures(&outcome.output));
                    outcome = harness::run(again, self.limit)?;
                }
                println!(
                    "  {label}: {} ({:.1} s)",
                    outcome.counts,
                    outcome.elapsed.as_secs_f64()
                );
                if outcome.counts.failed > 0 {
                    println!("{}", failures(&outcome.output));
                }
                for (reason, count) in outcome.reasons {
                    *reasons.entry(reason).or_default() += count;
                }
                results.insert(label, outcome.counts);
                if let Some(file) = &self.results {
                    let json = serde_json::to_vec(&results).context(|| "cannot write JSON")?;
                    fs::write(file, json).context(|| format!("cannot write {}", file.display()))?;
                }
            }
        }
        for (reason, count) in reasons {
            println!("  skipped {count}: {reason}");
        }
        Ok(results.into_values().sum())
    }
}

/// What a test program says about its failures: the part of its output after the list of all tests.
fn failures(output: &str) -> &str {
    let start = output.find("\nfailures:\n").map_or(0, |at| at + 1);
    output[start..].trim_end()
}
