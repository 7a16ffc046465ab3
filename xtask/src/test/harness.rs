//! Runs one compiled test program and reads from its output what came of it.
//!
//! The programs speak the language of Rust's test harness. A test that cannot run where it is says so by a line
//! `SKIP <name>: <reason>` on standard error and passes; it counts as skipped here.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::error::{Context, Result};

/// How many tests ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Counts {
    /// Those that ran and succeeded.
    pub(crate) passed: usize,
    /// Those that ran and failed.
    pub(crate) failed: usize,
    /// Those that could not run.
    pub(crate) skipped: usize,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl std::iter::Sum for Counts {
    fn sum<I: Iterator<Item = Self>>(counts: I) -> Self {
        counts.fold(Self::default(), |mut sum, counts| {
            sum += counts;
            sum
        })
    }
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.skipped
        )
    }
}

/// What came of one program.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// Its counts.
    pub(crate) counts: Counts,
    /// Why tests were skipped, and how many for each reason.
    pub(crate) reasons: BTreeMap<String, usize>,
    /// Everything it printed.
    pub(crate) output: String,
    /// How long it took.
    pub(crate) elapsed: Duration,
}

/// A program that takes longer says what it has done so far.
const QUIET: Duration = Duration::from_secs(5);

/// Runs a test program to its end, or for as long as `limit`; of one that takes its time each test is shown when it ends.
pub(crate) fn run(mut command: Command, limit: Duration) -> Result<Outcome> {
    let shown = command.get_program().to_string_lossy().into_owned();
    let started = Instant::now();
    let (reader, writer) = io::pipe().context(|| "cannot make a pipe")?;
    let errors = writer.try_clone().context(|| "cannot make a pipe")?;
    // A group of its own, so that what it starts can be ended with it.
    command.process_group(0);
    let child = command
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(errors)
        .spawn();
    // The command holds the pipe's writing end, and with it the reader.
    drop(command);
    let mut child = child.context(|| format!("cannot run {shown}"))?;
    let collected = Collected::start(reader);
    let mut shown_until = 0;
    let status = loop {
        if let Some(status) = child
            .try_wait()
            .context(|| format!("cannot wait for {shown}"))?
        {
            break Some(status);
        }
        if started.elapsed() > limit {
            break None;
        }
        if started.elapsed() > QUIET {
            for verdict in collected.verdicts(&mut shown_until) {
                println!("    {verdict}");
            }
        }
        thread::sleep(Duration::from_millis(10));
    };
    // SAFETY: no pointer is involved. The group is the child's own; if nothing is left of it, nothing happens.
    unsafe { libc::kill(-child.id().cast_signed(), libc::SIGKILL) };
    let _ = child.wait();
    let mut output = collected.finish();
    let (mut counts, reasons) = read(&output);
    match status {
        None => output.push_str(&format!("\n{shown} was ended after {limit:?}\n")),
        // A program that dies tells nothing about the tests it had not come to.
        Some(status) if !status.success() => {
            output.push_str(&format!("\n{shown} ended with {status}\n"));
        }
        Some(_) => {}
    }
    if counts.failed == 0 && !status.is_some_and(|status| status.success()) {
        counts.failed = 1;
    }
    Ok(Outcome {
        counts,
        reasons,
        output,
        elapsed: started.elapsed(),
    })
}

/// Runs a command that runs test programs to its end and hands each line it prints to `each`; returns all of them, and how it
/// ended. Both streams are read: that a test could not run is said on standard error.
pub(crate) fn follow(
    mut command: Command,
    mut each: impl FnMut(&str),
) -> Result<(String, ExitStatus)> {
    let shown = command.get_program().to_string_lossy().into_owned();
    let (reader, writer) = io::pipe().context(|| "cannot make a pipe")?;
    let errors = writer.try_clone().context(|| "cannot make a pipe")?;
    let child = command.stdout(writer).stderr(errors).spawn();
    // As in `run`.
    drop(command);
    let mut child = child.context(|| format!("cannot run {shown}"))?;
    let mut output = String::new();
    for line in BufReader::new(reader)
        .split(b'\n')
        .map_while(io::Result::ok)
    {
        let line = String::from_utf8_lossy(&line);
        each(&line);
        output.push_str(&line);
        output.push('\n');
    }
    let status = child
        .wait()
        .context(|| format!("cannot wait for {shown}"))?;
    Ok((output, status))
}

/// What comes out of a pipe.
struct Collected {
    bytes: Arc<Mutex<Vec<u8>>>,
    thread: JoinHandle<()>,
}

impl Collected {
    fn start(mut pipe: io::PipeReader) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&bytes);
        let thread = thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            while let Ok(count @ 1..) = pipe.read(&mut buffer) {
                if let Ok(mut bytes) = sink.lock() {
                    bytes.extend_from_slice(&buffer[..count]);
                }
            }
        });
        Self { bytes, thread }
    }

    /// The lines `test NAME ... VERDICT` that are complete, from byte `position` on, which moves behind them.
    fn verdicts(&self, position: &mut usize) -> Vec<String> {
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let new = &bytes[*position..];
        let Some(end) = new.iter().rposition(|byte| *byte == b'\n') else {
            return Vec::new();
        };
        *position += end + 1;
        String::from_utf8_lossy(&new[..end])
            .lines()
            .filter_map(|line| line.strip_prefix("test ").filter(|it| it.contains(" ... ")))
            .map(str::to_owned)
            .collect()
    }

    /// Everything until the end of the pipe. A process that left the group may keep the pipe open: then what there is.
    fn finish(self) -> String {
        let deadline = Instant::now() + Duration::from_secs(2);
        while !self.thread.is_finished() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Runs of test programs, as their output is read line by line. A test may run its own program again, and then that run's lines are
/// among its own: only runs that are in no other count.
#[derive(Default)]
struct Runs {
    counts: Counts,
    /// How many tests those that have begun and not ended have.
    open: Vec<usize>,
    /// The last result that counted for nothing.
    inner: Counts,
}

impl Runs {
    fn line(&mut self, line: &str) {
        if let Some(tests) = begun(line) {
            self.open.push(tests);
        } else if let Some((counts, tests)) = ended(line) {
            // One that was killed has left its beginning behind.
            let own = self.open.iter().rposition(|open| *open == tests);
            self.open.truncate(own.unwrap_or(0));
            if self.open.is_empty() {
                self.counts += counts;
                self.inner = Counts::default();
            } else {
                self.inner = counts;
            }
        } else if line.starts_with("error: test failed") {
            self.close();
        }
    }

    /// The program has ended, said cargo, or there is no more output. If something is open still, one has been killed, and what came
    /// last is the program's own.
    fn close(&mut self) {
        if !self.open.is_empty() {
            self.counts += std::mem::take(&mut self.inner);
            self.open.clear();
        }
    }
}

/// `running 4 tests`.
fn begun(line: &str) -> Option<usize> {
    let (number, what) = line.strip_prefix("running ")?.split_once(' ')?;
    matches!(what, "test" | "tests")
        .then(|| number.parse().ok())
        .flatten()
}

/// `test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.00s`, and how many tests that are.
fn ended(line: &str) -> Option<(Counts, usize)> {
    let (_, rest) = line.split_once("test result: ")?;
    let (_, numbers) = rest.split_once(". ")?;
    let (mut counts, mut tests) = (Counts::default(), 0);
    for part in numbers.split("; ") {
        let Some((number, what)) = part.split_once(' ') else {
            continue;
        };
        let Ok(number) = number.parse::<usize>() else {
            continue;
        };
        match what {
            "passed" => counts.passed = number,
            "failed" => counts.failed = number,
            "ignored" => counts.skipped = number,
            "measured" => {}
            _ => continue,
        }
        tests += number;
    }
    Some((counts, tests))
}

/// The counts in a test program's output (or in that of several).
pub(crate) fn read(output: &str) -> (Counts, BTreeMap<String, usize>) {
    let mut runs = Runs::default();
    output.lines().for_each(|line| runs.line(line));
    runs.close();
    let mut counts = runs.counts;
    let skips: BTreeSet<_> = output
        .lines()
        .filter_map(|line| {
            line.split_once("SKIP ")
                .and_then(|(_, skip)| skip.split_once(": "))
        })
        .collect();
    let mut reasons = BTreeMap::new();
    for (_, reason) in &skips {
        *reasons.entry((*reason).to_owned()).or_default() += 1;
    }
    let skipped = skips.len().min(counts.passed);
    counts.passed -= skipped;
    counts.skipped += skipped;
    (counts, reasons)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const OUTPUT: &str = "\
running 4 tests
SKIP needs_paging: 64-bit code does not run here
test needs_paging ... ok
test a ... ok
test b ... FAILED
test c ... ignored
test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s
";

    #[test]
    fn a_skip_is_not_a_pass() {
        let (counts, reasons) = read(OUTPUT);
        assert_eq!(
            counts,
            Counts {
                passed: 1,
                failed: 1,
                skipped: 2
            }
        );
        assert_eq!(reasons["64-bit code does not run here"], 1);
    }

    fn result(passed: usize, failed: usize) -> String {
        let word = if failed > 0 { "FAILED" } else { "ok" };
        format!(
            "test result: {word}. {passed} passed; {failed} failed; 0 ignored; 0 measured; 7 filtered out\n"
        )
    }

    fn counted(output: &str) -> (usize, usize) {
        let (counts, _) = read(output);
        (counts.passed, counts.failed)
    }

    #[test]
    fn a_test_that_runs_its_program_again_counts_once() {
        let again = format!("\nrunning 1 test\ntest inner ... ok\n\n{}", result(1, 0));
        let output = format!(
            "running 3 tests\n{again}{again}test outer ... ok\n{}",
            result(3, 0)
        );
        assert_eq!(counted(&output), (3, 0));
        assert_eq!(counted(&output.repeat(2)), (6, 0), "of two programs");
    }

    #[test]
    fn a_run_that_was_killed_hides_nothing() {
        let killed = "running 1 test\n";
        let outer = format!("running 3 tests\n{killed}{}", result(2, 1));
        assert_eq!(counted(&outer.repeat(2)), (4, 2));
        let alone = format!("running 1 test\n{killed}{}", result(0, 1));
        assert_eq!(counted(&alone), (0, 1));
        let crashed = "running 3 tests\nerror: test failed, to rerun pass `-p rota`\n";
        let output = format!("{crashed}running 2 tests\n{}", result(2, 0));
        assert_eq!(counted(&output), (2, 0));
    }

    #[test]
    fn a_skip_is_read_from_standard_error() {
        let script = "printf '..'; echo 'SKIP gang::two: two CPUs are needed' >&2; echo; \
                      echo 'test result: ok. 2 passed; 0 failed; 0 ignored'";
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let mut lines = 0;
        let (output, status) = follow(command, |_| lines += 1).unwrap();
        assert!(status.success());
        assert_eq!(lines, 3, "{output}");
        let (counts, reasons) = read(&output);
        assert_eq!((counts.passed, counts.skipped), (1, 1), "{output}");
        assert_eq!(reasons["two CPUs are needed"], 1);
    }

    #[test]
    fn verdicts_are_shown_once_and_only_whole() {
        let (reader, mut writer) = io::pipe().unwrap();
        let collected = Collected::start(reader);
        let mut position = 0;
        writer
            .write_all(b"running 2 tests\ntest a ... ok\ntest b ... F")
            .unwrap();
        while collected.bytes.lock().unwrap().len() < 42 {
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(collected.verdicts(&mut position), ["a ... ok"]);
        writer.write_all(b"AILED\n").unwrap();
        drop(writer);
        while !collected.thread.is_finished() {
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(collected.verdicts(&mut position), ["b ... FAILED"]);
    }

    #[test]
    fn a_program_that_dies_has_failed() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo running 3 tests; kill -SEGV $$"]);
        let outcome = run(command, Duration::from_secs(10)).unwrap();
        assert_eq!(
            outcome.counts,
            Counts {
                failed: 1,
                ..Counts::default()
            }
        );
        assert!(outcome.output.contains("signal: 11"));
    }

    #[test]
    fn a_program_that_hangs_is_ended_with_what_it_started() {
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 100 & sleep 100"]);
        let outcome = run(command, Duration::from_millis(50)).unwrap();
        assert_eq!(outcome.counts.failed, 1);
        assert!(outcome.output.contains("was ended after"));
    }
}
