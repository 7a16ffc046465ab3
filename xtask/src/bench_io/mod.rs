//! `cargo xtask bench io`: what disks and networks do under rota, beside a peer, in one run of the lab; and what the models of the
//! devices cost by themselves, on this machine.

mod figures;
mod native;

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};
use crate::guest::debian;
use crate::inside;
use crate::inside::io::{Measured, load::ROWS};
use crate::lab::{Addition, Lab};
use crate::workspace::{Profile, Workspace};
use figures::Figures;

/// What to measure.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Options {
    /// Another VMM to measure beside rota; cloud-hypervisor (built with its feature `mshv`) is the one known
    #[arg(long, value_name = "cloud-hypervisor=PATH", value_parser = crate::peer)]
    peer: Option<PathBuf>,
    /// Only these rows: block-read-1, block-read-32, block-write-1, block-write-32, block-read-seq, block-write-seq, net-up, net-down,
    /// net-round-trip, native
    #[arg(long, value_name = "ROW", value_delimiter = ',', value_parser = row)]
    only: Vec<String>,
    /// How often each does all of it
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// How long each row's work takes
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..=60))]
    seconds: u32,
    /// Print the figures as one JSON object on the last line, too
    #[arg(long)]
    json: bool,
}

/// The rows without a VM.
const NATIVE: &str = "native";

fn row(name: &str) -> std::result::Result<String, String> {
    let mut names = ROWS.iter().map(|row| row.name).chain([NATIVE]);
    if names.any(|known| known == name) {
        return Ok(name.into());
    }
    let names: Vec<_> = ROWS.iter().map(|row| row.name).chain([NATIVE]).collect();
    Err(format!("there are {}", names.join(", ")))
}

/// Runs the benchmark and prints its figures; the exit status says nothing about them.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<i32> {
    let is_wanted =
        |name: &str| options.only.is_empty() || options.only.iter().any(|it| it == name);
    let mut figures = Figures::default();
    if ROWS.iter().any(|row| is_wanted(row.name)) {
        workspace.build(Profile::Release)?;
        debian::prepare(workspace)?;
        eprintln!(
            "one guest: Debian's cloud kernel, 1 processor, 512 MiB; its fio, iperf3 and ping for {} s a row, {} times each",
            options.seconds, options.runs
        );
        let Some(timed) = in_lab(workspace, options, options.runs, false)? else {
            return Ok(1);
        };
        eprintln!("the same once more, with system calls counted; these times do not count");
        let Some(counted) = in_lab(workspace, options, 1, true)? else {
            return Ok(1);
        };
        figures = Figures::of(&timed, &counted)?;
        print!("{}", figures.table());
    }
    if is_wanted(NATIVE) {
        figures.native = native::measure(workspace)?;
        print!("{}", native::table(&figures.native));
    }
    if options.json {
        println!(
            "{}",
            serde_json::to_string(&figures).context(|| "cannot print JSON")?
        );
    }
    Ok(0)
}

/// What the lab measures; none if it failed, and said why.
fn in_lab(
    workspace: &Workspace,
    options: &Options,
    runs: u32,
    syscalls: bool,
) -> Result<Option<Measured>> {
    let mut lab = Lab {
        profile: Profile::Release,
        syscalls,
        ..Lab::default()
    };
    let name = format!("bench-io-{}.json", std::process::id());
    let mut command = vec![inside::executable(workspace)?];
    command.extend(["inside", "bench-io"].map(String::from));
    for (option, value) in [
        ("--runs", runs.to_string()),
        ("--seconds", options.seconds.to_string()),
        ("--result", format!("/out/{name}")),
    ] {
        command.extend([option.into(), value]);
    }
    for row in options.only.iter().filter(|row| *row != NATIVE) {
        command.extend(["--only".into(), row.clone()]);
    }
    if syscalls {
        command.push("--syscalls".into());
    }
    if let Some(from) = &options.peer {
        let to = "/tmp-peer/cloud-hypervisor";
        command.extend(["--cloud-hypervisor", to].map(String::from));
        lab.additions.push(addition(from, to)?);
    }
    if lab.run(workspace, &command)? != 0 {
        return Ok(None);
    }
    let file = workspace.lab().join("out").join(name);
    let text =
        fs::read(&file).context(|| format!("the lab left no figures in {}", file.display()))?;
    let _ = fs::remove_file(&file);
    serde_json::from_slice(&text)
        .map(Some)
        .context(|| "the lab's figures")
}

fn addition(from: &Path, to: &str) -> Result<Addition> {
    let from = from
        .canonicalize()
        .context(|| format!("{}", from.display()))?;
    if !from.is_file() {
        return Err(Error::new(format!("{} is not a program", from.display())));
    }
    Ok(Addition {
        from,
        to: to.into(),
    })
}
