//! Putting together what the sources say.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};

use super::{
    clock,
    histogram::Latency,
    hypervisor::{DEBUGFS, VpCounts, VpStats},
    threads::{ThreadCounts, ThreadFiles},
    vp::VpMeter,
};
use crate::{
    SchedMode, Tid, VmId,
    sys::{monotonic_ns, thread_cpu_ns},
};

/// A number, or why there is none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metered {
    /// Nobody here can tell.
    Unmetered(String),
    /// It was measured.
    #[serde(untagged)]
    Known(u64),
}

impl Metered {
    /// The number, if there is one.
    #[must_use]
    pub fn known(&self) -> Option<u64> {
        match self {
            Self::Known(number) => Some(*number),
            Self::Unmetered(_) => None,
        }
    }
}

/// What is metered, and how.
#[derive(Clone, Debug)]
pub struct MeterOptions {
    /// The VM.
    pub vm: VmId,
    /// Who schedules its VPs.
    pub mode: SchedMode,
    /// How many.
    pub vcpus: u32,
    /// Names of the kinds of exit.
    pub kinds: &'static [&'static str],
    /// The partition's id, where it is known: the hypervisor's counters are found by it.
    pub partition_id: Option<u64>,
    /// Where debugfs is mounted.
    pub debugfs: PathBuf,
    /// What was metered before, of a VM that is restored: counters go on from there.
    pub before: Option<Box<VmMeter>>,
}

impl MeterOptions {
    /// For a VM that starts.
    pub fn new(
        vm: impl Into<VmId>,
        mode: SchedMode,
        vcpus: u32,
        kinds: &'static [&'static str],
    ) -> Self {
        Self {
            vm: vm.into(),
            mode,
            vcpus,
            kinds,
            partition_id: None,
            debugfs: DEBUGFS.into(),
            before: None,
        }
    }
}

/// One VM at one moment. Counters only grow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmMeter {
    /// Whose.
    pub vm: VmId,
    /// Who schedules its VPs, and so who could tell.
    pub mode: SchedMode,
    /// When, in nanoseconds of `CLOCK_MONOTONIC`.
    pub at_ns: u64,
    /// Its vCPUs.
    pub vcpus: Vec<VcpuMeter>,
    /// CPU time that taking this sample cost, in nanoseconds.
    pub cost_ns: u64,
}

/// One vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuMeter {
    /// Its number.
    pub vcpu: u32,
    /// The thread that runs it.
    pub tid: Option<Tid>,
    /// Time it ran.
    pub run_ns: Metered,
    /// Time it was ready and had no CPU.
    pub wait_ns: Metered,
    /// Of the time Linux says it ran, what others had of the CPU beneath.
    pub steal_ns: Metered,
    /// Times it was given a CPU.
    pub slices: Metered,
    /// Times it gave its CPU up by itself, to wait.
    pub voluntary_switches: Metered,
    /// Times its CPU was taken.
    pub involuntary_switches: Metered,
    /// Moves to another CPU.
    pub migrations: Metered,
    /// Times it halted.
    pub halts: Metered,
    /// Time it neither ran nor wanted to.
    pub halted_ns: Metered,
    /// Times the guest told the hypervisor that it spins for long.
    pub long_spins: Metered,
    /// What it came back to the VMM for, by kind; kinds that did not occur are left out.
    pub exits: BTreeMap<String, ExitMeter>,
    /// From a kick to the next time it was about to run.
    pub kick_to_run: Latency,
    /// From an interrupt to the next time it was seen: an upper bound of the time until it ran.
    pub irq_to_run: Latency,
}

/// One kind of exit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitMeter {
    /// How many.
    pub count: u64,
    /// Time until the vCPU went on.
    pub ns: u64,
}

/// Meters one VM.
pub struct Meter {
    options: MeterOptions,
    vps: Vec<Arc<VpMeter>>,
    sources: Mutex<Vec<Sources>>,
}

/// Files and last readings of one vCPU.
#[derive(Default)]
struct Sources {
    thread: Option<ThreadFiles>,
    counts: Option<ThreadCounts>,
    /// When they were read.
    counts_ns: u64,
    hypervisor: Option<VpStats>,
    /// What was counted when the thread became the VP's.
    hypervisor_counts: Option<VpCounts>,
    looked_for_hypervisor: bool,
}

impl Meter {
    /// Nothing is counted yet.
    #[must_use]
    pub fn new(options: MeterOptions) -> Self {
        clock::begin();
        Self {
            vps: (0..options.vcpus)
                .map(|_| Arc::new(VpMeter::new(options.kinds.len())))
                .collect(),
            sources: Mutex::new((0..options.vcpus).map(|_| Sources::default()).collect()),
            options,
        }
    }

    /// What the thread of vCPU `vcpu` writes to.
    #[must_use]
    pub fn vp(&self, vcpu: u32) -> Option<Arc<VpMeter>> {
        self.vps.get(vcpu as usize).cloned()
    }

    /// How things stand.
    #[must_use]
    pub fn sample(&self) -> VmMeter {
        let (at_ns, cpu_ns) = (monotonic_ns(), thread_cpu_ns());
        let ns_per_tick = clock::ns_per_tick();
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = Vec::new();
        let vcpus = (0u32..)
            .zip(self.vps.iter().zip(sources.iter_mut()))
            .map(|(vcpu, (vp, sources))| {
                sources.read(&self.options, vcpu, vp, &mut buffer);
                let mut meter = self.vcpu(vcpu, vp, sources, ns_per_tick);
                let before = self.options.before.as_ref();
                if let Some(before) = before.and_then(|vm| vm.vcpus.get(vcpu as usize)) {
                    meter.go_on_from(before);
                }
                meter
            })
            .collect();
        VmMeter {
            vm: self.options.vm.clone(),
            mode: self.options.mode,
            at_ns,
            vcpus,
            cost_ns: thread_cpu_ns() - cpu_ns,
        }
    }

    fn vcpu(&self, vcpu: u32, vp: &VpMeter, sources: &Sources, ns_per_tick: f64) -> VcpuMeter {
        let thread = vp.thread();
        let counts = Counts::of(self.options.mode, sources, thread.map(|(_, since)| since));
        let exits = self
            .options
            .kinds
            .iter()
            .enumerate()
            .filter_map(|(kind, name)| {
                let (count, ns) = vp.exit(kind, ns_per_tick);
                (count > 0).then(|| ((*name).to_owned(), ExitMeter { count, ns }))
            })
            .collect();
        VcpuMeter {
            vcpu,
            tid: thread.map(|(tid, _)| tid),
            run_ns: counts.run,
            wait_ns: counts.wait,
            steal_ns: counts.steal,
            slices: counts.slices,
            voluntary_switches: counts.voluntary,
            involuntary_switches: counts.involuntary,
            migrations: counts.migrations,
            halts: counts.halts,
            halted_ns: counts.halted,
            long_spins: counts.long_spins,
            exits,
            kick_to_run: vp.kicks.latency(ns_per_tick),
            irq_to_run: vp.interrupts.latency(ns_per_tick),
        }
    }
}

impl Sources {
    /// A thread that has ended keeps what was read last.
    fn read(&mut self, options: &MeterOptions, vcpu: u32, vp: &VpMeter, buffer: &mut Vec<u8>) {
        if let Some((tid, _)) = vp.thread() {
            if self.thread.is_none() && self.counts.is_none() {
                self.thread = ThreadFiles::open(tid).ok();
            }
            if let Some(files) = &self.thread {
                match files.read(buffer) {
                    Some(counts) => {
                        self.counts = Some(counts);
                        self.counts_ns = monotonic_ns();
                    }
                    None => self.thread = None,
                }
            }
        }
        if let Some(partition) = options.partition_id {
            if !std::mem::replace(&mut self.looked_for_hypervisor, true) {
                self.hypervisor = VpStats::open(&options.debugfs, partition, vcpu).ok();
            }
            if let Some(counts) = self
                .hypervisor
                .as_ref()
                .and_then(|stats| stats.read(buffer))
            {
                self.hypervisor_counts = Some(counts);
            }
        }
    }
}

/// What can be told of one vCPU, by who schedules.
struct Counts {
    run: Metered,
    wait: Metered,
    steal: Metered,
    slices: Metered,
    voluntary: Metered,
    involuntary: Metered,
    migrations: Metered,
    halts: Metered,
    halted: Metered,
    long_spins: Metered,
}

const NO_THREAD: &str = "no thread has been attached";
const NO_STATS: &str =
    "the hypervisor's counters for this VP cannot be read (debugfs mshv/partition/<id>/vp)";
const ASLEEP: &str = "the hypervisor schedules: the thread sleeps while the VP runs";
const DOUBTFUL: &str = "nobody knows who schedules, so the thread's times may not be the VP's";

impl Counts {
    fn of(mode: SchedMode, sources: &Sources, since_ns: Option<u64>) -> Self {
        let hypervisor = sources.hypervisor_counts.unwrap_or_default();
        let or = |value: Option<u64>, why: &str| match value {
            Some(value) => Metered::Known(value),
            None => Metered::Unmetered(why.into()),
        };
        match mode {
            SchedMode::Root | SchedMode::Integrated => {
                let thread = |value: fn(&ThreadCounts) -> u64| {
                    or(sources.counts.as_ref().map(value), NO_THREAD)
                };
                let halted = sources
                    .counts
                    .as_ref()
                    .zip(since_ns)
                    .map(|(counts, since)| {
                        sources
                            .counts_ns
                            .saturating_sub(since)
                            .saturating_sub(counts.run_ns + counts.wait_ns)
                    });
                Self {
                    run: thread(|counts| counts.run_ns),
                    wait: thread(|counts| counts.wait_ns),
                    steal: or(
                        hypervisor.wait_ns,
                        "no counter of this machine shows what its own processors lose; `rota doctor` measures it",
                    ),
                    slices: thread(|counts| counts.slices),
                    voluntary: thread(|counts| counts.voluntary),
                    involuntary: thread(|counts| counts.involuntary),
                    migrations: or(
                        sources.counts.and_then(|counts| counts.migrations),
                        "this kernel has no /proc/<tid>/sched",
                    ),
                    // A VP that halts leaves its CPU: its thread goes to sleep inside RUN_VP.
                    halts: hypervisor
                        .halts
                        .map_or_else(|| thread(|counts| counts.voluntary), Metered::Known),
                    halted: or(halted, NO_THREAD),
                    long_spins: or(hypervisor.long_spins, NO_STATS),
                }
            }
            _ => {
                let why = match mode {
                    SchedMode::Core | SchedMode::Classic => ASLEEP,
                    _ => DOUBTFUL,
                };
                let told = |value| or(value, &format!("{why}; and {NO_STATS}"));
                Self {
                    run: told(hypervisor.run_ns),
                    wait: told(hypervisor.wait_ns),
                    steal: told(hypervisor.wait_ns),
                    slices: told(hypervisor.dispatches),
                    voluntary: or(None, why),
                    involuntary: or(None, why),
                    migrations: told(hypervisor.migrations),
                    halts: told(hypervisor.halts),
                    halted: or(None, why),
                    long_spins: or(hypervisor.long_spins, NO_STATS),
                }
            }
        }
    }
}

impl VcpuMeter {
    /// Counts on from an earlier life.
    fn go_on_from(&mut self, before: &Self) {
        let add = |now: &mut Metered, before: &Metered| {
            if let (Metered::Known(now), Metered::Known(before)) = (now, before) {
                *now += before;
            }
        };
        add(&mut self.run_ns, &before.run_ns);
        add(&mut self.wait_ns, &before.wait_ns);
        add(&mut self.steal_ns, &before.steal_ns);
        add(&mut self.slices, &before.slices);
        add(&mut self.voluntary_switches, &before.voluntary_switches);
        add(&mut self.involuntary_switches, &before.involuntary_switches);
        add(&mut self.migrations, &before.migrations);
        add(&mut self.halts, &before.halts);
        add(&mut self.halted_ns, &before.halted_ns);
        add(&mut self.long_spins, &before.long_spins);
        for (kind, before) in &before.exits {
            let now = self.exits.entry(kind.clone()).or_default();
            now.count += before.count;
            now.ns += before.ns;
        }
    }
}
