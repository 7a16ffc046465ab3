//! The demo's half inside the lab: two guests at once, their consoles side by side, and what it took.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, IsTerminal, Read, Write};
use std::process::{Command, ExitStatus};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use super::vm::{self, AtInit, GuestFiles, Input, News, Running, Trace, Vm};
use crate::error::{Context, Error, Result};
use crate::table::Table;
use crate::terminal::Style;

/// How to show it.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Options {
    /// End in a shell of the first guest
    #[arg(long)]
    pub(crate) shell: bool,
    /// Print the figures as one JSON object on the last line
    #[arg(long)]
    pub(crate) json: bool,
    /// Colour the output
    #[arg(long)]
    pub(crate) colour: bool,
}

const NAMES: [&str; 2] = ["vm1", "vm2"];
const COLOURS: [Style; 2] = [Style::CYAN, Style::MAGENTA];
const CPUS: u32 = 2;
const MEMORY_MIB: u64 = 512;
const KERNEL: &str = "/guest/vmlinuz-cloud";
const INITRAMFS: &str = "/guest/initramfs.cpio";

/// Longer than the slowest machine needs for two guests.
const LIMIT: Duration = Duration::from_secs(180);

/// What one guest amounted to, as `--json` prints it.
#[derive(Serialize)]
struct Guest {
    name: String,
    vcpus: u32,
    init_ms: u64,
    exits: std::collections::BTreeMap<String, u64>,
    ioctls: std::collections::BTreeMap<String, u64>,
    vmm_overhead_kib: Option<u64>,
}

#[derive(Serialize)]
struct Summary {
    guests: Vec<Guest>,
    scheduler: Value,
}

/// Runs the demo; returns the exit status.
pub(crate) fn run(options: Options) -> Result<i32> {
    let (sender, receiver) = mpsc::channel();
    let mut running = Vec::new();
    for (index, name) in NAMES.into_iter().enumerate() {
        let sender = sender.clone();
        let vm = guest(name, options.shell && index == 0);
        running.push(Some(vm.start(move |news| {
            let _ = sender.send((index, news));
        })?));
    }
    drop(sender);

    let mut consoles = [
        Console::new(0, options.colour),
        Console::new(1, options.colour),
    ];
    let mut at_init: [Option<AtInit>; 2] = [None; 2];
    let mut closed = [false; 2];
    let deadline = Instant::now() + LIMIT;
    let stays = |index: usize| options.shell && index == 0;
    while !(0..2).all(|index| closed[index] || (stays(index) && at_init[index].is_some())) {
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok((index, news)) = receiver.recv_timeout(left) else {
            return Err(Error::new(format!(
                "the guests did not come up within {LIMIT:?}"
            )));
        };
        match news {
            News::Console(bytes) => consoles[index].show(&bytes),
            News::Message(line) => consoles[index].line(&line),
            News::Init(at) => at_init[index] = Some(at),
            News::Closed => {
                consoles[index].flush();
                closed[index] = true;
            }
        }
    }

    let mut guests = Vec::new();
    for (index, name) in NAMES.into_iter().enumerate() {
        let trace = match running[index].take() {
            Some(guest) if stays(index) => {
                let trace = guest.trace_so_far()?;
                running[index] = Some(guest);
                trace
            }
            Some(guest) => guest.finish()?,
            None => Trace::default(),
        };
        let at = at_init[index]
            .ok_or_else(|| Error::new(format!("{name} ended without reaching its init")))?;
        guests.push(Guest {
            name: name.to_owned(),
            vcpus: CPUS,
            init_ms: at.after.as_millis() as u64,
            exits: trace.intercepts,
            ioctls: trace.ioctls,
            vmm_overhead_kib: at.vmm_overhead_kib,
        });
    }
    let scheduler = NAMES
        .iter()
        .rev()
        .find_map(|name| scheduler(name))
        .unwrap_or(Value::Null);
    let summary = Summary { guests, scheduler };
    println!("\n{}", table(&summary, options.colour));
    if let Some(guest) = running[0].take() {
        shell(guest, &receiver)?;
    }
    if options.json {
        println!(
            "{}",
            serde_json::to_string(&summary).context(|| "cannot print JSON")?
        );
    }
    Ok(0)
}

fn guest(name: &str, interactive: bool) -> Vm {
    let files = GuestFiles {
        kernel: KERNEL.into(),
        initramfs: INITRAMFS.into(),
    };
    let then = if interactive { "shell" } else { "poweroff" };
    // Each character of the console takes two exits, and an emulated machine inside an emulated one some milliseconds for
    // them: the kernel's notices are enough to watch.
    let cmdline = format!("console=ttyS0 loglevel=6 panic=-1 rota.then={then}");
    let mut command = vm::rota("rota", &files, CPUS, MEMORY_MIB, &cmdline);
    command.extend(["--report".into(), report(name)]);
    Vm {
        name: name.into(),
        command,
        memory_mib: MEMORY_MIB,
        input: if interactive {
            Input::Pipe
        } else {
            Input::Nothing
        },
    }
}

/// Where rota is told to write its report.
fn report(name: &str) -> String {
    format!("/tmp/{name}-report.json")
}

/// What rota found out about the scheduler, from its report.
fn scheduler(name: &str) -> Option<Value> {
    let text = fs::read(report(name)).ok()?;
    let mut report: Value = serde_json::from_slice(&text).ok()?;
    Some(report["scheduler"].take()).filter(|scheduler| !scheduler.is_null())
}

fn table(summary: &Summary, colour: bool) -> String {
    let guests = &summary.guests;
    let mut table = Table::default();
    let row = |table: &mut Table, title: &str, cell: &dyn Fn(&Guest) -> String| {
        table.row(std::iter::once(title.to_owned()).chain(guests.iter().map(cell)));
    };
    row(&mut table, "", &|guest| guest.name.clone());
    row(&mut table, "processors", &|guest| guest.vcpus.to_string());
    row(&mut table, "start to init", &|guest| {
        format!("{:.2} s", guest.init_ms as f64 / 1000.0)
    });
    row(&mut table, "VMM memory beside the guest's", &|guest| {
        guest.vmm_overhead_kib.map_or("unknown".into(), |kib| {
            format!("{:.1} MiB", kib as f64 / 1024.0)
        })
    });
    row(&mut table, "exits to the VMM", &|guest| {
        guest.exits.values().sum::<u64>().to_string()
    });
    for kind in guests
        .iter()
        .flat_map(|guest| guest.exits.keys())
        .collect::<BTreeSet<_>>()
    {
        row(&mut table, &format!("  {kind}"), &|guest| {
            guest.exits.get(kind).unwrap_or(&0).to_string()
        });
    }
    row(&mut table, "ioctls", &|guest| {
        guest.ioctls.values().sum::<u64>().to_string()
    });
    for name in guests
        .iter()
        .flat_map(|guest| guest.ioctls.keys())
        .collect::<BTreeSet<_>>()
    {
        row(&mut table, &format!("  {name}"), &|guest| {
            guest.ioctls.get(name).unwrap_or(&0).to_string()
        });
    }
    let mut text = table.render();
    let verdict = summary.scheduler["verdict"].as_str().unwrap_or("unknown");
    text.push_str(&format!(
        "\nscheduler: {}\n",
        Style::BOLD.show(verdict, colour)
    ));
    for evidence in summary.scheduler["evidence"]
        .as_array()
        .into_iter()
        .flatten()
    {
        let part = |key: &str| evidence[key].as_str().unwrap_or_default().to_owned();
        text.push_str(&format!(
            "  {}: {} ({})\n",
            part("source"),
            part("value"),
            part("meaning")
        ));
    }
    text
}

/// One guest's lines, each with the guest's name in front.
struct Console {
    prefix: String,
    partial: Vec<u8>,
}

impl Console {
    fn new(index: usize, colour: bool) -> Self {
        Self {
            prefix: COLOURS[index].show(&format!("{}│", NAMES[index]), colour),
            partial: Vec::new(),
        }
    }

    fn show(&mut self, bytes: &[u8]) {
        self.partial.extend_from_slice(bytes);
        while let Some(end) = self.partial.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.partial.drain(..=end).collect();
            self.line(&String::from_utf8_lossy(&line));
        }
    }

    fn line(&self, line: &str) {
        let line: String = line
            .chars()
            .filter(|character| !character.is_control())
            .collect();
        println!("{} {line}", self.prefix);
    }

    fn flush(&mut self) {
        let rest = std::mem::take(&mut self.partial);
        if !rest.is_empty() {
            self.line(&String::from_utf8_lossy(&rest));
        }
    }
}

/// Connects the terminal with the guest's console until the guest ends.
fn shell(mut guest: Running, news: &mpsc::Receiver<(usize, News)>) -> Result<()> {
    let terminal = io::stdin().is_terminal();
    println!("vm1's shell. `poweroff -f` ends it.");
    if terminal {
        stty(&["raw", "-echo"])?;
    }
    if let Some(mut keyboard) = guest.keyboard.take() {
        // The guest printed its prompt before anybody looked.
        let _ = keyboard.write_all(b"\n");
        thread::spawn(move || type_into(keyboard));
    }
    let mut screen = io::stdout();
    for (index, news) in news {
        match news {
            News::Console(bytes) if index == 0 => {
                let _ = screen.write_all(&bytes).and_then(|()| screen.flush());
            }
            News::Closed if index == 0 => break,
            _ => {}
        }
    }
    if terminal {
        stty(&["sane"])?;
    }
    guest.finish().map(drop)
}

fn type_into(mut keyboard: impl Write) {
    let mut buffer = [0; 256];
    while let Ok(count @ 1..) = io::stdin().read(&mut buffer) {
        if keyboard
            .write_all(&buffer[..count])
            .and_then(|()| keyboard.flush())
            .is_err()
        {
            return;
        }
    }
}

fn stty(settings: &[&str]) -> Result<()> {
    let status = Command::new("stty").args(settings).status();
    status
        .map(|_: ExitStatus| ())
        .context(|| "cannot set the terminal (stty)")
}
