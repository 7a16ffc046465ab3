//! `cargo xtask test`: everything that has to hold, in four phases.
//!
//! | phase | what | needs |
//! |---|---|---|
//! | lint | formatting, clippy, documentation, licences | – |
//! | unit | the tests inside the crates | – |
//! | native | the crate `rota-tests`, on this machine | `/dev/kvm` |
//! | lab | the crate `rota-tests`, and of `scheduler` what takes control groups of version 2, in the lab | – |

pub(crate) mod device;
pub(crate) mod harness;
mod licences;
mod lint;

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use serde_json::Value;

use crate::error::{Context, Error, Result};
use crate::guest;
use crate::inside;
use crate::lab::{Addition, Lab};
use crate::progress::step;
use crate::terminal::Style;
use crate::workspace::{Profile, Workspace};
use device::Suite;
use harness::Counts;

/// A part of the tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Phase {
    /// Formatting, clippy, documentation, licences
    Lint,
    /// The tests inside the crates
    Unit,
    /// The device and boot tests on this machine, as far as it can run them
    Native,
    /// The device and boot tests in the lab
    Lab,
}

/// What to test.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// Only this phase (may be given several times)
    #[arg(long, value_name = "PHASE")]
    only: Vec<Phase>,
    /// Leave out formatting, clippy and documentation
    #[arg(long)]
    no_lint: bool,
    /// Only tests whose name contains this
    filter: Option<String>,
}

/// What softmshv is made of; without it the native tests have no device.
const KVM: &str = "/dev/kvm";
/// A program that takes longer on this machine hangs.
const NATIVE_LIMIT: Duration = Duration::from_secs(120);
/// Where Debian has virtiofsd, by release; the oldest brings it with QEMU.
const VIRTIOFSD: &[&str] = &["/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"];
/// Serves disks to other processes; it comes with QEMU.
const STORAGE_DAEMON: &str = "/usr/bin/qemu-storage-daemon";
/// Longer than all lab tests may take.
const LAB_LIMIT: Duration = Duration::from_secs(20 * 60);
/// Runs the tests; the exit status is 1 if one failed.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<i32> {
    let wanted = |phase| {
        if options.only.is_empty() {
            phase != Phase::Lint || !options.no_lint
        } else {
            options.only.contains(&phase)
        }
    };
    let filter = options.filter.as_deref();
    let mut total = Counts::default();
    if wanted(Phase::Lint) {
        phase("lint", &mut total, || Ok(lint::run(workspace)))?;
    }
    if wanted(Phase::Unit) {
        // Some of them run themselves again under softmshv, whose library `cargo test` does not build.
        step("building rota, softmshv and the unit tests", || {
            workspace.build(Profile::Dev)?;
            cargo_ok(workspace.cargo().args(UNIT).arg("--no-run"))
        })?;
        phase("unit", &mut total, || unit(workspace, filter))?;
    }
    if wanted(Phase::Native) || wanted(Phase::Lab) {
        let mut programs = step("building rota, softmshv and their tests", || {
            workspace.build(Profile::Dev)?;
            test_programs(workspace, "rota-tests", "--tests")
        })?;
        if wanted(Phase::Native) {
            phase("native", &mut total, || {
                native(workspace, &programs, filter)
            })?;
        }
        if wanted(Phase::Lab) {
            programs.extend(test_programs(workspace, "scheduler", "--lib")?);
            phase("lab", &mut total, || in_lab(workspace, &programs, filter))?;
        }
    }
    let colour = crate::terminal::colours();
    let style = if total.failed == 0 {
        Style::GREEN
    } else {
        Style::RED
    };
    println!("{}", style.show(&total.to_string(), colour));
    Ok(i32::from(total.failed > 0))
}

/// Runs one phase under its heading and adds its counts.
fn phase(name: &str, total: &mut Counts, work: impl FnOnce() -> Result<Counts>) -> Result<()> {
    println!("{name}:");
    let start = Instant::now();
    let counts = work()?;
    println!("{name}: {counts} ({:.1} s)", start.elapsed().as_secs_f64());
    *total += counts;
    Ok(())
}

/// Runs cargo with its messages on standard error.
fn cargo_ok(command: &mut Command) -> Result<()> {
    let status = command
        .stdout(io::stderr())
        .status()
        .context(|| "cannot start cargo")?;
    if status.success() {
        return Ok(());
    }
    let words: Vec<_> = command
        .get_args()
        .map(|word| word.to_string_lossy())
        .collect();
    Err(Error::new(format!("cargo {} failed", words.join(" "))))
}

/// The crates whose tests need no device.
const UNIT: &[&str] = &[
    "test",
    "--workspace",
    "--exclude",
    "rota-tests",
    "--no-fail-fast",
];

fn unit(workspace: &Workspace, filter: Option<&str>) -> Result<Counts> {
    let mut command = workspace.cargo();
    command.args(UNIT).arg("--quiet").args(filter);
    let terminal = io::stdout().is_terminal();
    let (text, status) = harness::follow(command, |line| {
        if terminal && line.starts_with("test result") {
            print!(".");
            let _ = io::stdout().flush();
        }
    })?;
    if terminal {
        println!();
    }
    let (mut counts, reasons) = harness::read(&text);
    for (reason, count) in reasons {
        println!("  skipped {count}: {reason}");
    }
    if !status.success() {
        println!("{}", text.trim_end());
        counts.failed = counts.failed.max(1);
    }
    Ok(counts)
}

/// The test programs of a crate, by name; of those that `targets` chooses.
fn test_programs(
    workspace: &Workspace,
    package: &str,
    targets: &str,
) -> Result<Vec<(String, PathBuf)>> {
    let mut command = workspace.cargo();
    command.args([
        "test",
        "--package",
        package,
        targets,
        "--no-run",
        "--message-format=json-render-diagnostics",
    ]);
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .context(|| "cannot start cargo")?;
    if !output.status.success() {
        return Err(Error::new(format!(
            "the tests of {package} do not build (see above)"
        )));
    }
    let mut programs = Vec::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let message: Value = serde_json::from_str(line).unwrap_or_default();
        if let (Some(path), Some(name)) = (
            message["executable"].as_str(),
            message["target"]["name"].as_str(),
        ) {
            programs.push((name.to_owned(), PathBuf::from(path)));
        }
    }
    programs.sort();
    Ok(programs)
}

fn native(
    workspace: &Workspace,
    programs: &[(String, PathBuf)],
    filter: Option<&str>,
) -> Result<Counts> {
    let suite: Vec<_> = programs
        .iter()
        .map(|(name, path)| (name.clone(), path.display().to_string()))
        .collect();
    if let Err(error) = fs::File::options().read(true).write(true).open(KVM) {
        let skipped = suite.iter().map(|(_, path)| count_tests(path)).sum();
        println!("  skipped {skipped}: {KVM} cannot be opened on this machine: {error}");
        return Ok(Counts {
            skipped,
            ..Counts::default()
        });
    }
    let softmshv = workspace
        .target
        .join(Profile::Dev.folder())
        .join("softmshv");
    // Where the tests look for guests, which is `/guest` unless they are told.
    let guests = workspace.lab().join("guest").display().to_string();
    let suite = Suite {
        softmshv: &softmshv.to_string_lossy(),
        programs: &suite,
        filter,
        environment: &[("ROTA_GUEST_DIR", &guests)],
        limit: NATIVE_LIMIT,
        results: None,
    };
    suite.run()
}

/// How many tests a program has.
fn count_tests(program: &str) -> usize {
    let output = Command::new(program)
        .args(["--list", "--format", "terse"])
        .output();
    output.map_or(0, |output| {
        String::from_utf8_lossy(&output.stdout)
            .lines()
            .filter(|line| line.ends_with(": test"))
            .count()
    })
}

fn in_lab(
    workspace: &Workspace,
    programs: &[(String, PathBuf)],
    filter: Option<&str>,
) -> Result<Counts> {
    // A lab that has stopped and is started again goes on where it was.
    let results = format!("tests-{}.json", std::process::id());
    let mut command = vec![inside::executable(workspace)?];
    command.extend(["inside", "tests", "--results", &format!("/out/{results}")].map(String::from));
    if let Some(filter) = filter {
        command.extend(["--filter", filter].map(String::from));
    }
    for (name, path) in programs {
        let path = inside::in_lab(workspace, path).ok_or_else(|| {
            Error::new(format!(
                "{} is not below {}",
                path.display(),
                workspace.target.display()
            ))
        })?;
        command.push(format!("{name}={path}"));
    }
    guest::debian::prepare(workspace)?;
    let virtiofsd = VIRTIOFSD
        .iter()
        .find_map(|path| path.parse::<Addition>().ok());
    let lab = Lab {
        additions: virtiofsd
            .into_iter()
            .chain(STORAGE_DAEMON.parse().ok())
            .collect(),
        timeout: Some(LAB_LIMIT),
        // In the lab nothing may be missing, so a test that skips itself there fails.
        environment: vec![("ROTA_REQUIRE".into(), "all".into())],
        ..Lab::default()
    };
    let file = workspace.lab().join("out").join(results);
    let mut ended = lab.run(workspace, &command);
    if device::forget_failures(&file)? {
        println!("  programs with failures once more, in a machine that has just started");
        ended = lab.run(workspace, &command);
    }
    let mut counts: Counts = device::read_results(&file).into_values().sum();
    let _ = fs::remove_file(&file);
    let problem = match ended {
        Ok(0) => return Ok(counts),
        Ok(status) => format!("status {status}"),
        Err(error) => error.to_string(),
    };
    println!("  the lab tests did not come to an end: {problem}");
    counts.failed += 1;
    Ok(counts)
}
