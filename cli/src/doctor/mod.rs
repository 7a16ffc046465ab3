//! `rota doctor`: what this machine is, who schedules VPs on it, how that is known, and what each kind of request would get.

mod table;

use std::{
    fs::File,
    io,
    os::fd::AsFd,
    time::{Duration, Instant},
};

use clap::Args;
use scheduler::{BUDGET, Detection, Effect, Host, PartitionProperties, ProbePartition, SchedMode};
use serde::Serialize;

use crate::{FAILURE, colour, say};

const DEVICE: &str = "/dev/mshv";

#[derive(Args)]
#[command(after_help = "Examples:\n  \
    rota doctor\n  \
    rota doctor --json | jq '.scheduler.verdict, .scheduler.evidence[].value'\n  \
    rota doctor --quick                       (declarations only, nothing is run)\n  \
    rota doctor --sched-mode core             (what requests would get if the hypervisor scheduled)\n  \
    softmshv --scheduler core -- rota doctor  (on a machine without the Microsoft Hypervisor)\n\n\
It makes two small partitions, runs a VP in each for a tenth of a second and looks at what becomes of its thread, and it \
prepares one machine for every kind of request without starting it. All of it is gone when it ends.\n\n\
Exit status:\n  \
    0  machines can be run here, and it is known who schedules their VPs\n  \
    1  not so (the report says why), or an error\n  \
    2  wrong usage")]
pub(crate) struct Doctor {
    /// Print one JSON object instead of tables
    #[arg(long)]
    json: bool,
    /// Look at what is declared, and not at what happens
    #[arg(long)]
    quick: bool,
    /// Take this for who schedules VPs: root, integrated, core or classic; the evidence stays what it is
    #[arg(long, value_name = "MODE")]
    sched_mode: Option<SchedMode>,
    /// Take --sched-mode even where VPs were seen to run otherwise
    #[arg(long, requires = "sched_mode")]
    sched_mode_force: bool,
}

/// Everything that was found.
#[derive(Serialize)]
struct Report {
    device: Device,
    scheduler: Scheduler,
    host: Host,
    /// What each kind of request would get.
    effects: Vec<Effect>,
}

#[derive(Serialize)]
struct Device {
    path: &'static str,
    usable: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

#[derive(Serialize)]
struct Scheduler {
    #[serde(flatten)]
    detection: Detection,
    /// What the verdict means.
    meaning: &'static str,
    /// The mode policies are carried out in.
    mode: SchedMode,
    /// How long it took to find out.
    took_ms: f64,
    /// Why the hypervisor, which schedules, cannot be asked what it gives.
    #[serde(skip_serializing_if = "Option::is_none")]
    unasked: Option<String>,
}

impl Doctor {
    /// Looks and reports; returns the process's exit status.
    pub(crate) fn run(&self) -> u8 {
        match self.examine() {
            Ok(report) => self.print(&report),
            Err(error) => {
                say(error);
                FAILURE
            }
        }
    }

    fn examine(&self) -> Result<Report, Box<dyn std::error::Error>> {
        let device = File::open(DEVICE);
        let begun = Instant::now();
        let budget = if self.quick { Duration::ZERO } else { BUDGET };
        let detection = scheduler::examine(device.as_ref().map(AsFd::as_fd), budget);
        let took_ms = begun.elapsed().as_secs_f64() * 1e3;
        let mode = detection.mode(self.sched_mode, self.sched_mode_force)?;
        let mut host = Host::read()?;
        host.mode = mode;
        let partition = match &device {
            Ok(device) if mode.hypervisor_schedules() => {
                Some(ProbePartition::create(device.as_fd()))
            }
            _ => None,
        };
        let (partition, unasked) = match partition.transpose() {
            Ok(partition) => (partition, None),
            Err(error) => (None, Some(error.to_string())),
        };
        let asked = partition
            .as_ref()
            .map(|partition| partition as &dyn PartitionProperties);
        Ok(Report {
            effects: scheduler::rehearse(&host, asked),
            device: Device {
                path: DEVICE,
                usable: device.is_ok(),
                problem: device.as_ref().err().map(problem),
            },
            scheduler: Scheduler {
                meaning: detection.verdict.meaning(),
                detection,
                mode,
                took_ms,
                unasked,
            },
            host,
        })
    }

    fn print(&self, report: &Report) -> u8 {
        let text = if self.json {
            match serde_json::to_string(report) {
                Ok(json) => json + "\n",
                Err(error) => {
                    say(error);
                    return FAILURE;
                }
            }
        } else {
            table::of(report, colour::wanted(&io::stdout()))
        };
        // Nobody is left to tell that standard output is closed.
        let _ = io::Write::write_all(&mut io::stdout(), text.as_bytes());
        let known =
            report.scheduler.mode.linux_schedules() || report.scheduler.mode.hypervisor_schedules();
        if report.device.usable && known {
            0
        } else {
            FAILURE
        }
    }
}

/// Why the device cannot be used, and what to do about it.
fn problem(error: &io::Error) -> String {
    let advice = match error.kind() {
        io::ErrorKind::NotFound => {
            "this machine has no Microsoft Hypervisor, or its mshv module is not loaded; try `softmshv -- rota doctor`"
        }
        io::ErrorKind::PermissionDenied => "only root, or who the device file lets, may use it",
        _ => return error.to_string(),
    };
    format!("{error}: {advice}")
}
