//! The `rota` command.

mod colour;
mod doctor;
mod generate;
mod logging;
mod plan;
mod run;

use std::{
    error::Error,
    fmt::Display,
    io::{self, Write},
    process::ExitCode,
};

use clap::{CommandFactory, Parser, Subcommand, error::ErrorKind};

/// The status for an error.
const FAILURE: u8 = 1;
/// The status for a command line that makes no sense.
const USAGE: u8 = 2;
/// The status for a guest that could not go on.
const CRASHED: u8 = 3;

#[derive(Parser)]
#[command(
    name = "rota",
    version,
    about = "A virtual machine monitor for the Microsoft Hypervisor (/dev/mshv)",
    after_help = "Example:\n  rota run --kernel vmlinuz --initramfs initrd.img --cmdline 'console=ttyS0' --memory size=1G\n\n\
                  Exit status: 0 the guest powered off or was ended by a signal or Ctrl-A x, 1 error, 2 wrong usage, \
                  3 the guest crashed."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    logging: logging::Logging,
}

#[derive(Subcommand)]
enum Command {
    /// Run a virtual machine until it ends
    Run(Box<run::Run>),
    /// Look at this machine: device, who schedules VPs and how that is known, what policies would get
    Doctor(doctor::Doctor),
    /// Show where a machine's vCPUs would run, and why, without starting it
    Plan(Box<plan::Plan>),
    /// Print a completion script for a shell
    Completions(generate::Completions),
    /// Write the man pages of all commands
    Man(generate::Man),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return ExitCode::from(complain(&error)),
    };
    if let Err(error) = cli.logging.begin() {
        say(error);
        return ExitCode::from(FAILURE);
    }
    match cli.command {
        Command::Run(run) => ExitCode::from(run.run()),
        Command::Doctor(doctor) => ExitCode::from(doctor.run()),
        Command::Plan(plan) => ExitCode::from(plan.run()),
        Command::Completions(completions) => ExitCode::from(completions.run(Cli::command())),
        Command::Man(man) => ExitCode::from(man.run(Cli::command())),
    }
}

/// Tells the user something on standard error, if anybody is left to read it: what is told must not decide how it ends.
pub(crate) fn say(text: impl Display) {
    let _ = writeln!(io::stderr(), "rota: {}", text.to_string().trim_end());
}

/// An error and its causes in one line.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Transparent errors say what their cause says.
        let message = error.to_string();
        if !text.ends_with(&message) {
            text = format!("{text}: {message}");
        }
        cause = error.source();
    }
    text
}

/// Help and version go out whole; an error is one line.
fn complain(error: &clap::Error) -> u8 {
    if matches!(
        error.kind(),
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
    ) {
        // Nobody is left to tell that standard output is closed.
        let _ = error.print();
        return 0;
    }
    let text = error.to_string();
    let message: Vec<_> = text
        .lines()
        .take_while(|line| !line.is_empty())
        .map(str::trim)
        .collect();
    let _ = writeln!(io::stderr(), "{} (see --help)", message.join(" "));
    USAGE
}
