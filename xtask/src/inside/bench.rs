//! `bench boot`'s half inside the lab: rota and a peer boot the same guest in turns.

use std::fs;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::free_memory;
use super::vm::{self, AtInit, GuestFiles, Input, Trace, Vm};
use crate::error::{Context, Result};

/// What to measure.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// How often each VMM boots
    #[arg(long)]
    pub(crate) runs: u32,
    /// cloud-hypervisor's executable in the lab
    #[arg(long)]
    pub(crate) cloud_hypervisor: Option<String>,
    /// Where to write the figures
    #[arg(long)]
    pub(crate) result: String,
}

/// One boot's figures.
#[derive(Clone, Debug, Serialize, serde::Deserialize)]
pub(crate) struct Boot {
    /// Process start to init.
    pub(crate) init_ms: f64,
    /// Exits to the VMM from start to init.
    pub(crate) exits: u64,
    /// ioctls, all of them.
    pub(crate) ioctls: u64,
    /// The VMM's memory beside the guest's, when init ran.
    pub(crate) vmm_overhead_kib: u64,
}

/// What was measured: each VMM's boots.
#[derive(Clone, Debug, Default, Serialize, serde::Deserialize)]
pub(crate) struct Measured {
    /// Rota's.
    pub(crate) rota: Vec<Boot>,
    /// The peer's, if there is one.
    pub(crate) peer: Vec<Boot>,
    /// What the peer calls itself.
    pub(crate) peer_version: Option<String>,
}

const MEMORY_MIB: u64 = 512;
const LIMIT: Duration = Duration::from_secs(120);
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 rota.then=wait";

/// Boots in turns and writes the figures.
pub(crate) fn run(options: &Options) -> Result<i32> {
    // Everything is read from memory, so that neither VMM pays for the way to the host's files.
    for (from, to) in [
        ("/guest/vmlinuz-cloud", "/tmp/kernel"),
        ("/guest/initramfs.cpio", "/tmp/initramfs"),
    ] {
        fs::copy(from, to).context(|| format!("cannot copy {from}"))?;
    }
    let rota_path = copy_of_program("rota")?;
    let files = GuestFiles {
        kernel: "/tmp/kernel".into(),
        initramfs: "/tmp/initramfs".into(),
    };
    let mut measured = Measured::default();
    if let Some(program) = &options.cloud_hypervisor {
        measured.peer_version = version(program);
    }
    // The first round warms caches and does not count.
    for round in 0..=options.runs {
        let rota = boot("rota", vm::rota(&rota_path, &files, 1, MEMORY_MIB, CMDLINE))?;
        let mut line = format!(
            "{}: rota {}",
            round_name(round, options.runs),
            describe(&rota)
        );
        let peer = match &options.cloud_hypervisor {
            Some(program) => {
                let command = vm::cloud_hypervisor(program, &files, 1, MEMORY_MIB, CMDLINE);
                let peer = boot("cloud-hypervisor", command)?;
                line.push_str(&format!(" · cloud-hypervisor {}", describe(&peer)));
                Some(peer)
            }
            None => None,
        };
        eprintln!("  {line}");
        if round > 0 {
            measured.rota.push(rota);
            measured.peer.extend(peer);
        }
    }
    let json = serde_json::to_vec(&measured).context(|| "cannot write JSON")?;
    fs::write(&options.result, json).context(|| format!("cannot write {}", options.result))?;
    Ok(0)
}

/// Boots once. QEMU keeps its translation of code for as long as the memory under it is not written; a VMM that gets memory
/// which was a guest's kernel before pays for that. So all free memory is written first.
fn boot(name: &str, command: Vec<String>) -> Result<Boot> {
    free_memory::overwrite()?;
    let vm = Vm {
        name: name.into(),
        command,
        memory_mib: MEMORY_MIB,
        input: Input::Nothing,
    };
    let (at, trace) = vm::to_init(vm, LIMIT)?;
    Ok(figures(at, &trace))
}

fn figures(at: AtInit, trace: &Trace) -> Boot {
    Boot {
        init_ms: at.after.as_secs_f64() * 1000.0,
        exits: trace.exit_count(),
        ioctls: trace.ioctl_count(),
        vmm_overhead_kib: at.vmm_overhead_kib.unwrap_or(0),
    }
}

pub(super) fn copy_of_program(name: &str) -> Result<String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let from = std::env::split_paths(&path)
        .map(|folder| folder.join(name))
        .find(|file| file.is_file());
    let from =
        from.ok_or_else(|| crate::error::Error::new(format!("{name} is not on the lab's PATH")))?;
    let to = format!("/tmp/{name}");
    fs::copy(&from, &to).context(|| format!("cannot copy {}", from.display()))?;
    Ok(to)
}

pub(super) fn version(program: &str) -> Option<String> {
    let output = std::process::Command::new(program)
        .arg("--version")
        .output()
        .ok()?;
    // cloud-hypervisor says more below its version.
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().next().map(str::to_owned)
}

pub(super) fn round_name(round: u32, runs: u32) -> String {
    if round == 0 {
        "warm-up".into()
    } else {
        format!("run {round} of {runs}")
    }
}

fn describe(boot: &Boot) -> String {
    format!(
        "{:.0} ms, {} exits, {} ioctls",
        boot.init_ms, boot.exits, boot.ioctls
    )
}
