//! `rota run`: one machine in the foreground.

use std::{error::Error, path::PathBuf, str::FromStr, time::Instant};

use clap::Args;
use scheduler::{SchedMode, VmPolicy, policy::CpusOption};
use vmm::{
    api::ApiSocket,
    config::{
        BalloonConfig, ConsoleConfig, CpusConfig, DiskConfig, FsConfig, MemoryConfig, NetConfig,
        PayloadConfig, PmemConfig, RateLimitGroupConfig, RngConfig, SerialConfig, VmConfig,
        VsockConfig,
    },
    control::{self, Ended, RunError},
    partition::PartitionError,
    report::Report,
    scheduling::SchedulingConfig,
};

use crate::{CRASHED, FAILURE, chain, say};

#[derive(Args)]
#[command(after_help = "Examples:\n  \
    rota run --kernel vmlinuz --initramfs initrd.img --cmdline 'console=ttyS0'\n  \
    rota run --kernel vmlinuz --cpus boot=4 --memory size=2G,shared=on --serial file=guest.log\n  \
    rota run --kernel vmlinuz --cpus boot=2 --sched placement=dedicated,slice=latency\n  \
    softmshv rota run --kernel vmlinuz          (on a machine without the Microsoft Hypervisor)\n\n\
With --serial tty all keys go to the guest; Ctrl-A x ends the machine, Ctrl-A Ctrl-A sends one Ctrl-A.\n\
A guest's reset starts it again. SIGINT, SIGTERM and SIGHUP end the machine in order, a second one at once.\n\n\
Exit status:\n  \
    0  the guest powered off, or was ended by a signal or Ctrl-A x\n  \
    1  error: the machine could not be started or run\n  \
    2  wrong usage\n  \
    3  the guest crashed (triple fault, halt for ever, an instruction that cannot be emulated); its state is printed")]
pub(crate) struct Run {
    /// Kernel: a bzImage, or an ELF image with a PVH entry point
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// Initial RAM file system
    #[arg(long, value_name = "FILE")]
    initramfs: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    cmdline: Option<String>,
    // Not a doc comment: rustdoc takes the brackets for a link.
    #[arg(
        long,
        value_name = "OPTIONS",
        default_value = "boot=1",
        help = "Virtual processors: boot=N[,max=N][,topology=T:C:D:P][,affinity=[0@[0-1],1@[2,3]]][,core_scheduling=vm|vcpu|off]"
    )]
    cpus: Cpus,
    // Not a doc comment: rustdoc takes the brackets for a link.
    #[arg(
        long,
        value_name = "OPTIONS",
        default_value = "size=512M",
        help = "Guest memory: size=SIZE[,shared=on|off][,hugepages=on|off][,hotplug_size=SIZE[,hotplug_method=acpi|virtio-mem][,hotplugged_size=SIZE]], sizes as 512M or 2G"
    )]
    memory: MemoryConfig,
    /// Serial port: tty, file=PATH, pty, off (none at all) or null (one that prints nowhere)
    #[arg(long, value_name = "MODE", default_value = "tty")]
    serial: SerialConfig,
    #[command(flatten)]
    devices: DeviceArguments,
    #[command(flatten)]
    scheduling: SchedulingArguments,
    /// Listen for requests, as cloud-hypervisor's API has them, at a Unix socket: path=PATH or PATH, or fd=N
    /// for one that is listened at already
    #[arg(long, value_name = "SOCKET")]
    api_socket: Option<ApiSocket>,
    /// Write a JSON report at the end: exits and ioctls by kind, times, memory, scheduler
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

impl Run {
    /// Runs the machine; returns the process's exit status.
    pub(crate) fn run(self) -> u8 {
        let mut report = Report::new(Instant::now());
        let scheduling = match self.scheduling.complete(&self.cpus.placement) {
            Ok(scheduling) => scheduling,
            Err(error) => {
                say(error);
                return FAILURE;
            }
        };
        let config = VmConfig {
            payload: PayloadConfig {
                kernel: self.kernel,
                cmdline: self.cmdline,
                initramfs: self.initramfs,
            },
            cpus: self.cpus.config,
            memory: self.memory,
            serial: self.serial,
            rate_limit_groups: self.devices.rate_limit_group,
            disks: self.devices.disk,
            console: self.devices.console,
            rng: self.devices.rng,
            net: self.devices.net,
            balloon: self.devices.balloon,
            vsock: self.devices.vsock,
            watchdog: self.devices.watchdog,
            pvpanic: self.devices.pvpanic,
            fs: self.devices.fs,
            pmem: self.devices.pmem,
            scheduling,
        };
        let result = control::run(&config, self.api_socket.as_ref(), &mut report);
        let (status, ended) = match &result {
            Ok(Ended::PoweredOff) => (0, "powered off"),
            Ok(Ended::Interrupted) => (0, "interrupted"),
            Ok(Ended::Crashed(crash)) => {
                say(format_args!("the guest crashed: {crash}"));
                (CRASHED, "crashed")
            }
            Err(error) => {
                let error = explained(error);
                say(&error);
                report.error = Some(error);
                (FAILURE, "error")
            }
        };
        if let Some(path) = &self.report
            && let Err(error) = report.write(path, ended)
        {
            say(format_args!(
                "cannot write the report to {}: {error}",
                path.display()
            ));
            return status.max(FAILURE);
        }
        status
    }
}

/// `--cpus`: how many, and where they run.
#[derive(Clone)]
struct Cpus {
    config: CpusConfig,
    placement: CpusOption,
}

impl FromStr for Cpus {
    type Err = Box<dyn Error + Send + Sync>;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let placement: CpusOption = text.parse()?;
        let config = placement.others.parse()?;
        Ok(Self { config, placement })
    }
}

#[derive(Args)]
#[command(next_help_heading = "Devices")]
struct DeviceArguments {
    // Not a doc comment: rustdoc takes the brackets for a link.
    #[arg(
        long,
        value_name = "OPTIONS",
        help = "A disk (may be given again): path=PATH[,readonly=on|off][,direct=on|off][,num_queues=N][,queue_size=N][,id=NAME][,serial=TEXT][,image_type=raw|qcow2][,backing_files=on|off][,sparse=on|off][,bw_size=BYTES,bw_refill_time=MS[,bw_one_time_burst=BYTES]][,ops_size=N,ops_refill_time=MS[,ops_one_time_burst=N]][,rate_limit_group=NAME], or vhost_user=on,socket=PATH[,num_queues=N][,queue_size=N][,id=NAME] of another process"
    )]
    disk: Vec<DiskConfig>,
    // Not a doc comment: rustdoc takes the brackets for a link.
    #[arg(
        long,
        value_name = "OPTIONS",
        help = "Limits that disks have in common, once for each group: id=NAME[,bw_size=BYTES,bw_refill_time=MS[,bw_one_time_burst=BYTES]][,ops_size=N,ops_refill_time=MS[,ops_one_time_burst=N]]"
    )]
    rate_limit_group: Vec<RateLimitGroupConfig>,
    /// Virtio console (hvc0): off, null, tty, pty, file=PATH or socket=PATH
    #[arg(long, value_name = "MODE", default_value = "off")]
    console: ConsoleConfig,
    /// Randomness for the guest: src=PATH, for instance src=/dev/urandom
    #[arg(long, value_name = "OPTIONS")]
    rng: Option<RngConfig>,
    /// A network device, once for each: tap=NAME, fd=N, socket=PATH, passt or vhost_user=on,socket=PATH, with mac=…, ip=…, mask=…, mtu=…,
    /// num_queues=N, vhost=on and others
    #[arg(long, value_name = "OPTIONS")]
    net: Vec<NetConfig>,
    // Not a doc comment: rustdoc takes the brackets for a link.
    #[arg(
        long,
        value_name = "OPTIONS",
        help = "Memory balloon: size=SIZE[,deflate_on_oom=on|off][,free_page_reporting=on|off]"
    )]
    balloon: Option<BalloonConfig>,
    // Not a doc comment: rustdoc takes the brackets for a link.
    #[arg(
        long,
        value_name = "OPTIONS",
        help = "Sockets between guest and host: cid=CID,socket=PATH[,id=NAME]"
    )]
    vsock: Option<VsockConfig>,
    /// Reset a guest that has begun to give signs of life and stops
    #[arg(long)]
    watchdog: bool,
    /// A device for the guest to tell of a panic
    #[arg(long)]
    pvpanic: bool,
    // Not a doc comment: rustdoc takes the brackets for a link.
    #[arg(
        long,
        value_name = "OPTIONS",
        help = "A folder that virtiofsd serves, once for each: tag=NAME,socket=PATH[,num_queues=N][,queue_size=N][,id=NAME]"
    )]
    fs: Vec<FsConfig>,
    // Not a doc comment: rustdoc takes the brackets for a link.
    #[arg(
        long,
        value_name = "OPTIONS",
        help = "A file as persistent memory, once for each: file=PATH[,size=SIZE][,discard_writes=on|off][,id=NAME]"
    )]
    pmem: Vec<PmemConfig>,
}

#[derive(Args)]
#[command(next_help_heading = "Scheduling")]
struct SchedulingArguments {
    /// Where and when the vCPUs run, as key=value,… (see `rota plan --help`); without it they are left to Linux
    #[arg(long, value_name = "POLICY")]
    sched: Option<VmPolicy>,
    /// Name of the machine in the ledger of this host's machines
    #[arg(long)]
    name: Option<String>,
    /// Carry the policy out as in this mode (root, integrated, core, classic), whatever was found
    #[arg(long, value_name = "MODE")]
    sched_mode: Option<SchedMode>,
    /// … even if VPs were seen to run elsewhere than on their threads
    #[arg(long, requires = "sched_mode")]
    sched_mode_force: bool,
    /// Another ledger than this host's
    #[arg(long, value_name = "FILE")]
    ledger: Option<PathBuf>,
    /// Write what each vCPU gets to FILE every second: Prometheus' text format, or JSON if FILE ends in .json. Takes --sched
    #[arg(long, value_name = "FILE")]
    metrics: Option<PathBuf>,
}

impl SchedulingArguments {
    /// With what `--cpus` says.
    fn complete(self, cpus: &CpusOption) -> Result<SchedulingConfig, Box<dyn Error>> {
        let mut policy = self.sched;
        if !cpus.affinity.is_empty() || cpus.core_scheduling.is_some() || policy.is_some() {
            cpus.complete(policy.get_or_insert_default())?;
        }
        if let Some(unseen) = cpus.unseen() {
            say(format_args!("note: --cpus {unseen}"));
        }
        if self.metrics.is_some() && policy.is_none() {
            return Err("--metrics: only machines with --sched are metered; add --sched placement=shared for one that is placed as usual".into());
        }
        Ok(SchedulingConfig {
            policy,
            threads_per_core: Some(cpus.threads_per_core),
            mode: self.sched_mode,
            mode_force: self.sched_mode_force,
            name: self.name,
            ledger: self.ledger,
            metrics: self.metrics,
        })
    }
}

/// An error, its causes, and a hint where there is one, in one line.
fn explained(error: &RunError) -> String {
    let mut text = chain(error);
    if matches!(error, RunError::Partition(PartitionError::NoDevice)) {
        text += ": this machine has no Microsoft Hypervisor, or its mshv module is not loaded; try `softmshv rota run …`";
    }
    text
}
