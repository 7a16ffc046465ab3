//! The project's own commands: `cargo xtask lab`, and what is built on it.

mod apt;
mod bench;
mod bench_io;
mod bench_sched;
mod cpio;
mod demo;
mod error;
mod guest;
mod inside;
mod kernel;
mod lab;
mod progress;
mod shared_libraries;
mod table;
mod terminal;
mod test;
mod workspace;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::error::Result;
use crate::lab::{Addition, Lab};
use crate::workspace::{Profile, Workspace};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Rota's own commands")]
struct Cli {
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Show two Debian guests booting side by side under rota
    Demo {
        /// End in a shell of the first guest
        #[arg(long)]
        shell: bool,
        /// Print the figures as one JSON object on the last line
        #[arg(long)]
        json: bool,
    },
    /// Run every test
    Test(test::Options),
    /// Measure
    Bench {
        #[command(subcommand)]
        what: Bench,
    },
    /// Run a command in the lab: a Linux machine under QEMU with a working /dev/kvm
    Lab(LabArgs),
    /// What the other commands run in the lab
    #[command(hide = true)]
    Inside {
        #[command(subcommand)]
        what: Inside,
    },
}

#[derive(Subcommand)]
enum Bench {
    /// How a guest boots: time, exits, ioctls, memory
    Boot {
        /// Another VMM to measure beside rota; cloud-hypervisor (built with its feature `mshv`) is the one known
        #[arg(long, value_name = "cloud-hypervisor=PATH", value_parser = peer)]
        peer: Option<PathBuf>,
        /// How often each boots
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
        runs: u32,
        /// Print the figures as one JSON object on the last line, too
        #[arg(long)]
        json: bool,
    },
    /// How a guest's disks and networks work: throughput, and what an operation costs
    Io(bench_io::Options),
    /// The scheduler beside the control planes of others
    Sched {
        /// Measure in the lab, on a kernel from Debian's backports and control groups of version 2 (before the benchmark's options)
        #[arg(long)]
        lab: bool,
        /// Another kernel for the lab, as for `cargo xtask lab`
        #[arg(long, value_name = "FILE", requires = "lab")]
        kernel: Option<PathBuf>,
        /// What the benchmark takes: --only B2,B3 --runs N --seconds S --out DIR --book --list
        #[arg(
            trailing_var_arg = true,
            allow_hyphen_values = true,
            value_name = "OPTIONS"
        )]
        options: Vec<String>,
    },
}

#[derive(Subcommand)]
enum Inside {
    Demo(inside::demo::Options),
    Bench(inside::bench::Options),
    BenchIo(inside::io::Options),
    /// Keep the lab's kernel from rewriting its code
    Steady,
    Tests(inside::tests::Options),
}

/// The path in `cloud-hypervisor=PATH`.
pub(crate) fn peer(text: &str) -> std::result::Result<PathBuf, String> {
    match text.split_once('=') {
        Some(("cloud-hypervisor", path)) if !path.is_empty() => Ok(path.into()),
        _ => Err("expected cloud-hypervisor=PATH".into()),
    }
}

#[derive(Args)]
struct LabArgs {
    /// The number of the lab's processors
    #[arg(long, default_value_t = 2)]
    smp: u32,
    /// The lab's memory
    #[arg(long, value_name = "SIZE", default_value = "3G")]
    mem: String,
    /// Another kernel for the lab: a linux-image .deb, or a bzImage whose modules are installed or in ../lib/modules
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// A file or folder to have in the lab, at /add/NAME (which is on PATH) or at PATH
    #[arg(long, value_name = "FILE[=PATH]")]
    add: Vec<Addition>,
    /// End the run after so many seconds, with exit status 124
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Show the lab's kernel messages
    #[arg(long)]
    verbose: bool,
    /// Use binaries built with optimization
    #[arg(long)]
    release: bool,
    /// Do not build first
    #[arg(long)]
    no_build: bool,
    /// The command to run; without one, a shell
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "CMD"
    )]
    command: Vec<String>,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        // The checkout is not there in the lab.
        Action::Inside {
            what: Inside::Demo(options),
        } => inside::demo::run(options),
        Action::Inside {
            what: Inside::Bench(options),
        } => inside::bench::run(&options),
        Action::Inside {
            what: Inside::BenchIo(options),
        } => inside::io::run(&options),
        Action::Inside {
            what: Inside::Steady,
        } => inside::steady::run(),
        Action::Inside {
            what: Inside::Tests(options),
        } => inside::tests::run(&options),
        action => Workspace::find().and_then(|workspace| on_host(&workspace, action)),
    };
    match result {
        // An exit status is a byte; the lab's shell already tells it that way.
        Ok(status) => ExitCode::from(status as u8),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn on_host(workspace: &Workspace, action: Action) -> Result<i32> {
    match action {
        Action::Demo { shell, json } => demo::run(workspace, shell, json),
        Action::Test(options) => test::run(workspace, &options),
        Action::Bench {
            what: Bench::Boot { peer, runs, json },
        } => bench::boot(workspace, peer, runs, json),
        Action::Bench {
            what: Bench::Io(options),
        } => bench_io::run(workspace, &options),
        Action::Bench {
            what:
                Bench::Sched {
                    lab: false,
                    options,
                    ..
                },
        } => bench_sched::here(workspace, &options),
        Action::Bench {
            what: Bench::Sched {
                kernel, options, ..
            },
        } => bench_sched::in_lab(workspace, kernel, &options),
        Action::Lab(args) => run_in_lab(workspace, args),
        Action::Inside { .. } => unreachable!("handled before the checkout was looked for"),
    }
}

fn run_in_lab(workspace: &Workspace, args: LabArgs) -> Result<i32> {
    let profile = if args.release {
        Profile::Release
    } else {
        Profile::Dev
    };
    if !args.no_build {
        workspace.build(profile)?;
    }
    let lab = Lab {
        cpus: args.smp,
        memory: args.mem,
        kernel: args.kernel,
        additions: args.add,
        timeout: args.timeout.map(Duration::from_secs),
        verbose: args.verbose,
        profile,
        terminal: true,
        ..Lab::default()
    };
    let command = if args.command.is_empty() {
        vec!["sh".into()]
    } else {
        args.command
    };
    lab.run(workspace, &command)
}
