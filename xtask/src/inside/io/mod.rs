//! `bench io`'s half inside the lab: guests of rota and of a peer do the same work on a disk and a network, in turns.
//!
//! The work is done by Debian's `fio`, `iperf3` and `ping`, out of the root file system on the guest's first disk; it is the same
//! image for both. What a program costs to start is measured first, and is not counted.

pub(crate) mod counts;
mod guest;
pub(crate) mod load;

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::bench::{copy_of_program, round_name, version};
use super::free_memory;
use super::vm::{self, GuestFiles, Input};
use crate::error::{Context, Error, Result};
use counts::{Counts, Meter};
use guest::Guest;
use load::{Done, Program, ROWS, Row};

/// What to measure.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// How often each VMM does all of it
    #[arg(long)]
    runs: u32,
    /// How long each row's work takes
    #[arg(long)]
    seconds: u32,
    /// cloud-hypervisor's executable in the lab
    #[arg(long)]
    cloud_hypervisor: Option<String>,
    /// Only these rows
    #[arg(long)]
    only: Vec<String>,
    /// Count system calls, which makes them slower
    #[arg(long)]
    syscalls: bool,
    /// Where to write the figures
    #[arg(long)]
    result: String,
}

/// One row's work by one VMM's guest, and what it took.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Sample {
    /// The row's name.
    pub(crate) row: String,
    /// What was done.
    pub(crate) done: Done,
    /// What it took.
    pub(crate) took: Counts,
}

/// What was measured.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Measured {
    /// With rota.
    pub(crate) rota: Vec<Sample>,
    /// With the peer, if there is one.
    pub(crate) peer: Vec<Sample>,
    /// What the peer calls itself.
    pub(crate) peer_version: Option<String>,
}

/// How many guests may crash before a VMM's turn fails.
const ATTEMPTS: u32 = 6;

const MEMORY_MIB: u64 = 512;
/// The guest's disk to work on.
const DATA: &str = "/tmp/data.raw";
const DATA_MIB: u64 = 128;
/// Where the lab has Debian's iperf3 and its libraries.
const IPERF3: &str = "/guest/iperf3";
const IPERF3_PORT: u16 = 5201;
/// The lab's address in the guest's network.
const HOST: &str = "192.0.2.1";

/// Has the work done in turns and writes the figures.
pub(crate) fn run(options: &Options) -> Result<i32> {
    // Read from memory, so that neither VMM pays for the way to the host's files.
    for (from, to) in [
        ("/guest/vmlinuz-cloud", "/tmp/kernel"),
        ("/guest/initramfs-root.cpio", "/tmp/initramfs"),
    ] {
        fs::copy(from, to).context(|| format!("cannot copy {from}"))?;
    }
    let rota = copy_of_program("rota")?;
    make_data()?;
    let rows: Vec<&Row> = ROWS
        .iter()
        .filter(|row| options.only.is_empty() || options.only.iter().any(|name| name == row.name))
        .collect();
    let mut measured = Measured {
        peer_version: options.cloud_hypervisor.as_deref().and_then(version),
        ..Measured::default()
    };
    for round in 1..=options.runs {
        eprintln!("  {}:", round_name(round, options.runs));
        let mut turns = vec![Vmm::Rota(&rota)];
        turns.extend(options.cloud_hypervisor.as_deref().map(Vmm::Peer));
        if round % 2 == 0 {
            turns.reverse();
        }
        for vmm in turns {
            let samples = measure(&vmm, &rows, options)?;
            match vmm {
                Vmm::Rota(_) => measured.rota.extend(samples),
                Vmm::Peer(_) => measured.peer.extend(samples),
            }
        }
    }
    let json = serde_json::to_vec(&measured).context(|| "cannot write JSON")?;
    fs::write(&options.result, json).context(|| format!("cannot write {}", options.result))?;
    Ok(0)
}

/// A VMM by its executable.
enum Vmm<'a> {
    Rota(&'a str),
    Peer(&'a str),
}

impl Vmm<'_> {
    fn name(&self) -> &'static str {
        match self {
            Vmm::Rota(_) => "rota",
            Vmm::Peer(_) => "cloud-hypervisor",
        }
    }

    /// What each listens to, where it is not in the foreground.
    fn input(&self) -> Input {
        match self {
            Vmm::Rota(_) => Input::Pipe,
            Vmm::Peer(_) => Input::Terminal,
        }
    }

    fn command(&self) -> Vec<String> {
        let files = GuestFiles {
            kernel: "/tmp/kernel".into(),
            initramfs: "/tmp/initramfs".into(),
        };
        let cmdline = "console=ttyS0 quiet panic=-1 rota.then=shell";
        let mut command = match self {
            Vmm::Rota(program) => vm::rota(program, &files, 1, MEMORY_MIB, cmdline),
            Vmm::Peer(program) => vm::cloud_hypervisor(program, &files, 1, MEMORY_MIB, cmdline),
        };
        let root = "path=/guest/debian.raw,readonly=on,image_type=raw".to_owned();
        let data = format!("path={DATA},image_type=raw");
        let net = format!("tap=bench0,ip={HOST},mask=255.255.255.0,mac=2e:00:00:00:00:01");
        match self {
            Vmm::Rota(_) => {
                for (option, value) in [("--disk", root), ("--disk", data), ("--net", net)] {
                    command.extend([option.to_owned(), value]);
                }
            }
            Vmm::Peer(_) => {
                command.extend(["--disk".into(), root, data, "--net".into(), net]);
            }
        }
        command
    }
}

/// Has a guest do the work of all rows. The emulated machine now and then crashes a guest; another one then goes on with the row.
fn measure(vmm: &Vmm<'_>, rows: &[&Row], options: &Options) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    for attempt in 1.. {
        match measure_rest(vmm, rows, options, &mut samples) {
            Ok(()) => break,
            Err(error) if attempt == ATTEMPTS => return Err(error),
            Err(error) => eprintln!("    {error}\n    going on in another guest"),
        }
    }
    Ok(samples)
}

/// Boots a guest and has it do the work of the rows that have no sample yet.
fn measure_rest(
    vmm: &Vmm<'_>,
    rows: &[&Row],
    options: &Options,
    samples: &mut Vec<Sample>,
) -> Result<()> {
    free_memory::overwrite()?;
    let mut guest = Guest::boot(vmm.name(), vmm.command(), MEMORY_MIB, vmm.input())?;
    guest.prepare()?;
    let mut meter = Meter::new(guest.pid(), options.syscalls)?;
    let mut started: Option<(Program, Counts)> = None;
    for row in &rows[samples.len()..] {
        let program = row.load.program();
        let start = match started {
            Some((of, counts)) if of == program => counts,
            _ => {
                // Once to have it in memory, and once to see what it takes.
                let server = Server::for_program(program)?;
                guest.runs(&row.load.start())?;
                drop(server);
                let _server = Server::for_program(program)?;
                let (_, counts) = meter.around(&mut guest, &row.load.start())?;
                started = Some((program, counts));
                counts
            }
        };
        let server = Server::for_program(program)?;
        let (said, counts) = meter.around(&mut guest, &row.load.command(options.seconds))?;
        drop(server);
        let done = row
            .load
            .done(&said)
            .ok_or_else(|| Error::new(format!("{}: {} said {said:?}", vmm.name(), row.name)))?;
        let sample = Sample {
            row: row.name.into(),
            done,
            took: counts.without(&start),
        };
        eprintln!(
            "    {:<17} {:<18} {}",
            vmm.name(),
            row.name,
            row.describe(&sample)
        );
        samples.push(sample);
    }
    guest.end()
}

/// A disk whose bytes are all there, and differ.
fn make_data() -> Result<()> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity((DATA_MIB << 20) as usize);
    while bytes.len() < (DATA_MIB << 20) as usize {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    fs::write(DATA, bytes).context(|| format!("cannot write {DATA}"))
}

/// iperf3's other end, for one test: it does not survive all that a client may do.
struct Server(Child);

impl Server {
    /// Starts it if `program` needs it, and waits until it listens.
    fn for_program(program: Program) -> Result<Option<Self>> {
        if program != Program::Iperf3 {
            return Ok(None);
        }
        let loader = fs::read_dir(IPERF3)
            .context(|| format!("cannot read {IPERF3}"))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                name.starts_with("ld-linux")
            })
            .ok_or_else(|| Error::new(format!("{IPERF3} has no dynamic loader")))?;
        let server = Command::new(loader)
            .args(["--library-path", IPERF3])
            .arg(Path::new(IPERF3).join("iperf3"))
            .args(["--server", "--one-off", "--bind", HOST])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()
            .map(Self)
            .context(|| "cannot start iperf3")?;
        let deadline = Instant::now() + Duration::from_secs(30);
        while !is_listening(IPERF3_PORT) {
            if Instant::now() > deadline {
                return Err(Error::new("iperf3 does not listen"));
            }
            thread::sleep(Duration::from_millis(50));
        }
        Ok(Some(server))
    }
}

/// Whether somebody waits for TCP connections at this port, by the kernel's table (Linux: Documentation/networking/proc_net_tcp.rst).
fn is_listening(port: u16) -> bool {
    const LISTEN: &str = "0A";
    let table = fs::read_to_string("/proc/net/tcp").unwrap_or_default();
    table.lines().any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let own = fields.next().unwrap_or_default();
        own.ends_with(&format!(":{port:04X}")) && fields.nth(1) == Some(LISTEN)
    })
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
