//! The launcher: runs a command with `/dev/mshv` provided by libsoftmshv.so.

use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use clap::{Parser, ValueEnum};

#[path = "../cpu_list.rs"]
mod cpu_list;

/// Run a command that uses /dev/mshv on a machine without the Microsoft Hypervisor.
///
/// The command sees a /dev/mshv made of /dev/kvm: softmshv is preloaded into it and into what it starts.
#[derive(Parser)]
#[command(version, about)]
struct Options {
    /// Write counts of ioctls, hypercalls and intercepts to FILE, as JSON, when the command ends ("%p" in it stands
    /// for the process id).
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,

    /// The hypervisor's scheduler: with root and integrated the command's threads run the virtual processors, with
    /// core they wait while softmshv's own threads do.
    #[arg(long, value_enum, default_value_t = Scheduler::Integrated)]
    scheduler: Scheduler,

    /// Declare --scheduler and do the other thing.
    #[arg(long)]
    lie: bool,

    /// The CPUs virtual processors run on with the core scheduler, as "0-3,8" (default: all that are online).
    #[arg(long, value_name = "LIST")]
    lps: Option<String>,

    /// How long a virtual processor keeps a CPU others wait for, with the core scheduler, in microseconds.
    #[arg(long, value_name = "US", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
    quantum_us: u32,

    /// Take no hypercalls on the device itself, as drivers before Linux 6.19.
    #[arg(long)]
    no_passthrough: bool,

    /// Offer no register page, as some hypervisors do not.
    #[arg(long)]
    no_register_page: bool,

    /// The command and its arguments.
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Scheduler {
    Root,
    Integrated,
    Core,
}

impl Scheduler {
    fn name(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::Integrated => "integrated",
            Self::Core => "core",
        }
    }
}

/// The library beside the launcher, or in `../lib` of it.
fn find_library(launcher: &Path) -> Result<PathBuf, String> {
    const NAME: &str = "libsoftmshv.so";
    let folder = launcher.parent().unwrap_or(Path::new("/"));
    [folder.join(NAME), folder.join("../lib").join(NAME)]
        .into_iter()
        .find(|path| path.is_file())
        .ok_or_else(|| {
            format!(
                "{NAME} is neither in {0} nor in {0}/../lib",
                folder.display()
            )
        })
}

/// The value of `LD_PRELOAD` with `library` first.
fn preload(library: &Path, existing: Option<&OsStr>) -> OsString {
    let mut value = library.as_os_str().to_owned();
    if let Some(existing) = existing.filter(|existing| !existing.is_empty()) {
        value.push(":");
        value.push(existing);
    }
    value
}

fn on_off(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

/// A file name the command can use from any directory.
fn absolute(path: &Path) -> Result<PathBuf, String> {
    std::path::absolute(path).map_err(|error| format!("{}: {error}", path.display()))
}

fn run(options: &Options) -> Result<(), String> {
    let launcher =
        std::env::current_exe().map_err(|error| format!("cannot find myself: {error}"))?;
    let library = find_library(&launcher)?;
    std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map_err(|error| format!("/dev/kvm, which /dev/mshv is made of, is unusable: {error}"))?;

    let (program, arguments) = options.command.split_first().ok_or("no command")?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env(
            "LD_PRELOAD",
            preload(&library, std::env::var_os("LD_PRELOAD").as_deref()),
        )
        .env("SOFTMSHV_SCHEDULER", options.scheduler.name())
        .env("SOFTMSHV_REGISTER_PAGE", on_off(!options.no_register_page))
        .env("SOFTMSHV_PASSTHROUGH", on_off(!options.no_passthrough))
        .env("SOFTMSHV_LIE", on_off(options.lie))
        .env("SOFTMSHV_QUANTUM_US", options.quantum_us.to_string());
    match &options.lps {
        Some(list) if cpu_list::parse(list).is_some() => command.env("SOFTMSHV_LPS", list),
        Some(list) => return Err(format!("--lps {list}: not a list of CPUs like 0-3,8")),
        None => command.env_remove("SOFTMSHV_LPS"),
    };
    match &options.trace {
        Some(file) => command.env("SOFTMSHV_TRACE", absolute(file)?),
        None => command.env_remove("SOFTMSHV_TRACE"),
    };
    Err(format!("{}: {}", program.display(), command.exec()))
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("softmshv: {message}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_existing_preload_is_kept() {
        let library = Path::new("/lib/libsoftmshv.so");
        assert_eq!(preload(library, None), "/lib/libsoftmshv.so");
        assert_eq!(
            preload(library, Some(OsStr::new(""))),
            "/lib/libsoftmshv.so"
        );
        assert_eq!(
            preload(library, Some(OsStr::new("other.so"))),
            "/lib/libsoftmshv.so:other.so"
        );
    }

    #[test]
    fn options_end_at_the_command() {
        let options = Options::parse_from([
            "softmshv",
            "--scheduler",
            "core",
            "--",
            "rota",
            "--trace",
            "x",
        ]);
        assert_eq!(options.scheduler.name(), "core");
        assert_eq!(options.command, ["rota", "--trace", "x"]);
        assert!(options.trace.is_none());
        assert!(Options::try_parse_from(["softmshv"]).is_err());
    }
}
