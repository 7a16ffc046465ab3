//! `rota plan`: where a machine's vCPUs would run, without starting anything.

use std::{
    error::Error,
    fs,
    path::{Path, PathBuf},
};

use clap::Args;
use scheduler::{
    Host, Ledger, LedgerState, Request, SchedMode, VmId, VmPlan, VmPolicy, plan,
    policy::{Count, CpusOption, HELP, libvirt},
};
use vmm::config::MemoryConfig;

use crate::{FAILURE, chain, say};

const EXAMPLES: &str = "\
Examples:
  rota plan --cpus boot=4
  rota plan --cpus boot=2 --sched placement=dedicated,cores=whole,strict=on
  rota plan --cpus boot=4,affinity=[0@[0-1],1@[2,3]] --sched weight=200,cap=150%:10ms,burst=2ms
  rota plan --cpus boot=8 --sched gang=adaptive:20ms,reserve=2,overcommit=2
  rota plan --libvirt domain.xml            (what a <cputune> comes to)
  rota plan --print-host > host.json        (on one machine)
  rota plan --host host.json --cpus boot=64 --sched placement=numa-local,require=on";

const STATUS: &str = "\
Exit status:
  0  there is such a plan
  1  there is none (the reason and the nearest request that can be had are printed), or an error
  2  wrong usage";

#[derive(Args)]
#[command(after_help = format!("{EXAMPLES}\n\n{HELP}\n\n{STATUS}"))]
pub(crate) struct Plan {
    // Not a doc comment: rustdoc takes the brackets for a link.
    #[arg(
        long,
        value_name = "OPTIONS",
        default_value = "boot=1",
        help = "Virtual processors: boot=N[,topology=T:C:D:P][,affinity=[VCPU@[CPUS],…]][,core_scheduling=vm|vcpu|off]"
    )]
    cpus: CpusOption,
    /// What is wanted for them: key=value,…
    #[arg(long, value_name = "POLICY", default_value = "")]
    sched: VmPolicy,
    /// Guest memory, as for `rota run`
    #[arg(long, value_name = "OPTIONS", default_value = "size=512M")]
    memory: MemoryConfig,
    /// Name of the machine; one that is in the ledger is planned again
    #[arg(long, value_name = "NAME", default_value = "new")]
    name: String,
    /// Take a libvirt domain's `<cputune>` (or one alone) instead of --sched
    #[arg(long, value_name = "FILE", conflicts_with = "sched")]
    libvirt: Option<PathBuf>,
    /// Plan for the host recorded in FILE instead of this one
    #[arg(long, value_name = "FILE")]
    host: Option<PathBuf>,
    /// Plan beside the machines in this ledger; without it those of this host
    #[arg(long, value_name = "FILE")]
    ledger: Option<PathBuf>,
    /// Who schedules VPs: root, integrated, core or classic; without it what can be seen
    #[arg(long, value_name = "MODE")]
    sched_mode: Option<SchedMode>,
    /// Print the plan or the refusal as JSON
    #[arg(long)]
    json: bool,
    /// Print this host as JSON, for --host, and plan nothing
    #[arg(long)]
    print_host: bool,
}

impl Plan {
    /// Plans; returns the process's exit status.
    pub(crate) fn run(self) -> u8 {
        match self.answer() {
            Ok(status) => status,
            Err(error) => {
                say(chain(&*error));
                FAILURE
            }
        }
    }

    fn answer(mut self) -> Result<u8, Box<dyn Error>> {
        let host = self.read_host()?;
        if self.print_host {
            print(&format!("{}\n", serde_json::to_string_pretty(&host)?));
            return Ok(0);
        }
        let mut vcpus = self.cpus.boot;
        if let Some(path) = &self.libvirt {
            let cgroup = host.abilities.cgroup.version;
            let import = libvirt::import(&read(path)?, vcpus, cgroup)
                .map_err(|error| format!("{}: {error}", path.display()))?;
            vcpus = import.vcpus.unwrap_or(vcpus);
            for line in &import.mapped {
                say(format_args!("mapped {line}"));
            }
            for line in &import.unmapped {
                say(format_args!("not mapped {line}"));
            }
            self.sched = import.policy;
        }
        self.cpus.complete(&mut self.sched)?;
        if let Some(unseen) = self.cpus.unseen() {
            say(format_args!("note: {unseen}"));
        }
        let request = Request {
            vm: VmId(self.name.clone()),
            vcpus,
            threads_per_core: self.cpus.threads_per_core,
            memory_mib: self.memory.size >> 20,
            policy: self.sched.clone(),
        };
        let answer = plan(&host, &self.read_ledger()?, &[request]);
        let status = if answer.is_ok() { 0 } else { FAILURE };
        if self.json {
            let json = match &answer {
                Ok(plan) => serde_json::to_string_pretty(plan)?,
                Err(rejection) => serde_json::to_string_pretty(rejection)?,
            };
            print(&format!("{json}\n"));
            return Ok(status);
        }
        match &answer {
            Ok(plan) => {
                print(&head(&host));
                for vm in &plan.vms {
                    print(&described(vm));
                }
                for vm in &plan.adjusted {
                    print(&format!("\nmoves: {}", described(vm)));
                }
            }
            Err(rejection) => {
                say(rejection);
            }
        }
        Ok(status)
    }

    fn read_host(&self) -> Result<Host, Box<dyn Error>> {
        let mut host = match &self.host {
            Some(path) => serde_json::from_str(&read(path)?)
                .map_err(|error| format!("{} is no recorded host: {error}", path.display()))?,
            None => {
                let mut host = Host::read()?;
                if let Ok(device) = fs::File::open("/dev/mshv") {
                    host.mode = scheduler::detect(&device).verdict;
                }
                host
            }
        };
        if let Some(mode) = self.sched_mode {
            host.mode = mode;
        }
        Ok(host)
    }

    /// Machines of another host are not in this one's ledger, nor are its processes here.
    fn read_ledger(&self) -> Result<LedgerState, Box<dyn Error>> {
        match (&self.ledger, &self.host) {
            (Some(path), host) => {
                // A name that was mistyped is no empty ledger.
                fs::metadata(path)
                    .map_err(|error| format!("cannot read {}: {error}", path.display()))?;
                let ledger = Ledger::at(path);
                Ok(match host {
                    Some(_) => ledger.recorded()?,
                    None => ledger.read()?,
                })
            }
            (None, Some(_)) => Ok(LedgerState::default()),
            (None, None) => Ok(Ledger::open(None)?.read()?),
        }
    }
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("cannot read {}: {error}", path.display()))
}

/// The host in a line.
fn head(host: &Host) -> String {
    let cores = host.cpus.iter().map(|cpu| cpu.core);
    let cores: std::collections::BTreeSet<u32> = cores.collect();
    let mut text = format!(
        "host: CPUs {} on {}, {}, tick {} ms ({}), VPs scheduled by: {}",
        host.usable(),
        Count(cores.len(), "core"),
        Count(host.nodes.len(), "NUMA node"),
        host.tick_ns as f64 / 1e6,
        host.tick_source,
        host.mode
    );
    if !host.isolated.is_empty() {
        text += &format!(", isolated {}", host.isolated);
    }
    text + "\n"
}

/// A machine's name, wish and plan.
fn described(vm: &VmPlan) -> String {
    let request = &vm.request;
    format!(
        "{}: {}, {}\n{vm}",
        request.vm,
        Count(request.vcpus, "vCPU"),
        request.policy
    )
}

/// Prints; nobody is left to tell that standard output is closed.
fn print(text: &str) {
    let _ = std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes());
}
