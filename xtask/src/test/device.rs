//! The programs of the crate `rota-tests`, and that of `scheduler`. Those of the conformance suite are clients of `/dev/mshv` themselves and run under
//! softmshv; the others start what they need.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::harness::{self, Counts, Outcome};
use crate::error::{Context, Result};
use crate::lab::OFFLINE;

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

/// How often a test that fails in the lab runs again, alone. The machine that QEMU 7.2 and 10.0 emulate now and then saves its own
/// registers as those of the guest it has just left, on a busy host; that guest then crashes, with the
/// address of the lab's `kvm_amd` as its instruction pointer or with a triple fault. What fails every time fails.
const MORE_TRIES: usize = 2;

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

/// Takes the programs with failures out of what was noted in `file`, so that they run again; false if there are none.
pub(crate) fn forget_failures(file: &Path) -> Result<bool> {
    let mut results = read_results(file);
    let before = results.len();
    results.retain(|_, counts| counts.failed == 0);
    if results.len() == before {
        return Ok(false);
    }
    write_results(file, &results)?;
    Ok(true)
}

fn write_results(file: &Path, results: &Results) -> Result<()> {
    let json = serde_json::to_vec(results).context(|| "cannot write JSON")?;
    fs::write(file, json).context(|| format!("cannot write {}", file.display()))
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
                let its = match SCHEDULER {
                    (scheduler, its) if name == scheduler => {
                        command.env(OFFLINE, "1");
                        its
                    }
                    _ => &[],
                };
                command.envs(self.environment.iter().copied());
                let same = || copy_of(&command);
                let mut first = same();
                match self.filter {
                    None => first.args(its),
                    filter => first.args(filter),
                };
                let mut outcome = harness::run(first, self.limit)?;
                if self.results.is_some() {
                    for _ in 0..MORE_TRIES {
                        let failed = failed(&outcome.output);
                        if failed.is_empty() {
                            break;
                        }
                        println!("  {label}: {}; those alone, after", outcome.counts);
                        println!("{}", failures(&outcome.output));
                        let mut alone = same();
                        alone.args(["--exact", "--test-threads=1"]).args(&failed);
                        outcome = after(&outcome, harness::run(alone, self.limit)?);
                    }
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
                    write_results(file, &results)?;
                }
            }
        }
        for (reason, count) in reasons {
            println!("  skipped {count}: {reason}");
        }
        Ok(results.into_values().sum())
    }
}

/// A command that does the same.
fn copy_of(command: &Command) -> Command {
    let mut copy = Command::new(command.get_program());
    copy.args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => copy.env(name, value),
            None => copy.env_remove(name),
        };
    }
    copy
}

/// The tests that failed, by name: the list at the end of the output.
fn failed(output: &str) -> Vec<String> {
    let Some((_, list)) = output.rsplit_once("\nfailures:\n") else {
        return Vec::new();
    };
    list.lines()
        .map_while(|line| line.strip_prefix("    "))
        .map(str::to_owned)
        .collect()
}

/// What came of a program when those of its tests that failed at `first` have run again. One that did not run then still fails.
fn after(first: &Outcome, again: Outcome) -> Outcome {
    Outcome {
        counts: Counts {
            passed: first.counts.passed + again.counts.passed,
            failed: first
                .counts
                .failed
                .saturating_sub(again.counts.passed + again.counts.skipped)
                .max(again.counts.failed),
            skipped: first.counts.skipped + again.counts.skipped,
        },
        reasons: first.reasons.iter().chain(&again.reasons).fold(
            BTreeMap::new(),
            |mut sum, (reason, count)| {
                *sum.entry(reason.clone()).or_default() += count;
                sum
            },
        ),
        output: again.output,
        elapsed: first.elapsed + again.elapsed,
    }
}

/// What a test program says about its failures: the part of its output after the list of all tests.
fn failures(output: &str) -> &str {
    let start = output.find("\nfailures:\n").map_or(0, |at| at + 1);
    output[start..].trim_end()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_failed_counts_anew() {
        let outcome = |passed, failed, output: &str| Outcome {
            counts: Counts {
                passed,
                failed,
                skipped: 1,
            },
            reasons: [("why".to_owned(), 1)].into(),
            output: output.to_owned(),
            elapsed: Duration::from_secs(1),
        };
        let first = outcome(
            3,
            2,
            "test a ... ok\n\nfailures:\n\n---- d stdout ----\n\nfailures:\n    b::c\n    d\n\ntest result: FAILED",
        );
        assert_eq!(failed(&first.output), ["b::c", "d"]);
        let all = after(
            &first,
            outcome(1, 1, "\nfailures:\n    d\n\ntest result: FAILED"),
        );
        assert_eq!((all.counts.passed, all.counts.failed), (4, 1));
        assert_eq!(all.reasons["why"], 2);
        assert_eq!(failed(&all.output), ["d"]);
        let not_run = Outcome {
            counts: Counts::default(),
            ..outcome(0, 0, "")
        };
        assert_eq!(after(&first, not_run).counts.failed, 2);
    }
}
