//! Putting together what the sources say.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};

use super::{
    clock,
    histogram::Latency,
    hypervisor::{self, DEBUGFS, RunTimes, VpCounts, VpStats},
    spins::{self, LongSpins},
    threads::{ThreadCounts, ThreadFiles},
    vp::{Threads, VpMeter},
};
use crate::{
    GangSignal, SchedMode, Tid, VmId,
    sys::{monotonic_ns, thread_cpu_ns},
};

/// A number (or what is told of many), or why there is none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metered<T = u64> {
    /// Nobody here can tell.
    Unmetered(String),
    /// It was measured.
    #[serde(untagged)]
    Known(T),
}

impl<T: Clone> Metered<T> {
    /// The number, if there is one.
    #[must_use]
    pub fn known(&self) -> Option<T> {
        match self {
            Self::Known(number) => Some(number.clone()),
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
    /// The partition's id, where it is known before a VP tells it ([`VpMeter::belongs_to`]): the hypervisor's counters are found by
    /// it.
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
    /// Times it halted. Where Linux schedules and the hypervisor's counters cannot be read: times its thread went to sleep, which a
    /// halt makes it do; so does a device that makes it wait.
    pub halts: Metered,
    /// Time it neither ran nor wanted to.
    pub halted_ns: Metered,
    /// Times the guest told the hypervisor that it spins for long.
    pub long_spins: Metered,
    /// What it came back to the VMM for, by kind; kinds that did not occur are left out.
    pub exits: BTreeMap<String, ExitMeter>,
    /// From a kick to the moment its thread ran and noticed.
    pub kick_to_run: Latency,
    /// From an interrupt to the next time it was seen outside of the guest: an upper bound of the time until it ran. Of interrupts
    /// whose handlers come back to the VMM; the others are delivered without anybody seeing it.
    pub irq_to_run: Metered<Latency>,
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
    vcpus: Mutex<Vcpus>,
}

/// The vCPUs that are or were there.
struct Vcpus {
    metered: Vec<(Arc<VpMeter>, Sources)>,
    /// How many of them are there now.
    present: u32,
}

/// Files and last readings of one vCPU.
#[derive(Default)]
struct Sources {
    /// The thread, and its files while it lives.
    tid: Option<Tid>,
    thread: Option<ThreadFiles>,
    counts: Option<ThreadCounts>,
    halted_ns: u64,
    hypervisor: Option<VpStats>,
    /// What was counted when the thread became the VP's.
    hypervisor_counts: Option<VpCounts>,
    looked_for_hypervisor: bool,
    /// What the hypervisor said last of how long the VP has run.
    run_ns: Option<u64>,
}

impl Meter {
    /// Nothing is counted yet.
    #[must_use]
    pub fn new(options: MeterOptions) -> Self {
        clock::begin();
        let vcpus = options.vcpus;
        let before = options.before.as_ref().map_or(0, |vm| vm.vcpus.len());
        let meter = Self {
            options,
            vcpus: Mutex::new(Vcpus {
                metered: Vec::new(),
                present: vcpus,
            }),
        };
        // Those that had gone before keep what they had got.
        meter.resize(vcpus.max(before as u32));
        meter.lock().present = vcpus;
        meter
    }

    /// There are `vcpus` vCPUs from now on. Of those that go, what they got until then stays.
    pub fn resize(&self, vcpus: u32) {
        let mut all = self.lock();
        all.present = vcpus;
        while all.metered.len() < vcpus as usize {
            let vp = Arc::new(VpMeter::new(self.options.kinds.len()));
            all.metered.push((vp, Sources::default()));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vcpus> {
        self.vcpus.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the thread of vCPU `vcpu` writes to.
    #[must_use]
    pub fn vp(&self, vcpu: u32) -> Option<Arc<VpMeter>> {
        let all = self.lock();
        all.metered.get(vcpu as usize).map(|(vp, _)| Arc::clone(vp))
    }

    /// What adaptive gangs of the vCPUs that are there now can be judged by, if this process may read the hypervisor's counters at all.
    #[must_use]
    pub fn gang_signal(&self) -> Option<Box<dyn GangSignal>> {
        let MeterOptions {
            debugfs,
            partition_id,
            ..
        } = &self.options;
        if !spins::are_counted(debugfs) {
            return None;
        }
        let all = self.lock();
        let present = all.metered.iter().take(all.present as usize);
        let vps = present.map(|(vp, _)| Arc::clone(vp)).collect();
        let signal = LongSpins::new(vps, debugfs.clone(), *partition_id);
        Some(Box::new(signal))
    }

    /// How things stand, without asking for registers of the hypervisor.
    #[must_use]
    pub fn sample(&self) -> VmMeter {
        self.sample_of(None)
    }

    /// How things stand. `hypervisor` is asked where Linux cannot tell how long VPs have run.
    #[must_use]
    pub fn sample_with(&self, hypervisor: &dyn RunTimes) -> VmMeter {
        let asked = !self.options.mode.linux_schedules();
        self.sample_of(asked.then_some(hypervisor))
    }

    fn sample_of(&self, hypervisor: Option<&dyn RunTimes>) -> VmMeter {
        let (at_ns, cpu_ns) = (monotonic_ns(), thread_cpu_ns());
        let ns_per_tick = clock::ns_per_tick();
        let mut all = self.lock();
        let mut buffer = Vec::new();
        let known = || all.metered.iter().find_map(|(vp, _)| vp.partition());
        let partition = self.options.partition_id.or_else(known);
        let vcpus = (0u32..)
            .zip(&mut all.metered)
            .map(|(vcpu, (vp, sources))| {
                sources.read(vp.threads(), &mut buffer);
                if let Some(partition) = partition {
                    sources.read_counters(&self.options.debugfs, partition, vcpu, &mut buffer);
                }
                if let Some(times) = hypervisor {
                    sources.run_ns = hypervisor::run_ns(times, vcpu).or(sources.run_ns);
                }
                let mut meter = self.vcpu(vcpu, vp, sources, ns_per_tick);
                let before = self.options.before.as_ref();
                if let Some(before) = before.and_then(|vm| vm.vcpus.get(vcpu as usize)) {
                    meter.go_on_from(before, vp.threads());
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
        let counts = Counts::of(self.options.mode, sources);
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
            tid: vp.threads().now.map(|(tid, _)| tid),
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
            irq_to_run: match vp.interrupts() {
                Some(interrupts) => Metered::Known(interrupts.latency(ns_per_tick)),
                None => Metered::Unmetered(UNSEEN.into()),
            },
        }
    }
}

impl Sources {
    /// A thread that has ended without a word keeps what was read last.
    fn read(&mut self, threads: Threads, buffer: &mut Vec<u8>) {
        let tid = threads.now.map(|(tid, _)| tid);
        if self.tid != tid || self.thread.is_none() && self.counts.is_none() {
            self.tid = tid;
            // The VP may be younger than its place here.
            self.looked_for_hypervisor = self.hypervisor.is_some();
            self.thread = tid.and_then(|tid| ThreadFiles::open(tid).ok());
        }
        let before = threads.before.unwrap_or_default();
        let now = self
            .thread
            .as_ref()
            .zip(threads.now)
            .map(|(files, (_, since))| (files.read(buffer), since));
        match (now, threads.before) {
            (Some((Some(counts), since)), _) => {
                self.halted_ns = counts.halted_ns(since, monotonic_ns()) + before.1;
                self.counts = Some(counts + before.0);
            }
            (Some((None, _)), _) => self.thread = None,
            (None, Some((counts, halted))) if tid.is_none() => {
                self.halted_ns = halted;
                self.counts = Some(counts);
            }
            (None, _) => {}
        }
    }

    /// The hypervisor's counters, which are looked for once for each thread.
    fn read_counters(&mut self, debugfs: &Path, partition: u64, vcpu: u32, buffer: &mut Vec<u8>) {
        if !std::mem::replace(&mut self.looked_for_hypervisor, true) {
            self.hypervisor = VpStats::open(debugfs, partition, vcpu).ok();
        }
        let stats = self.hypervisor.as_ref();
        if let Some(counts) = stats.and_then(|stats| stats.read(buffer)) {
            self.hypervisor_counts = Some(counts);
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

const UNSEEN: &str =
    "every interrupt went from an event to the hypervisor, and no handler came back to the VMM";
const NO_THREAD: &str = "no thread has been attached";
const NO_STATS: &str =
    "the hypervisor's counters for this VP cannot be read (debugfs mshv/partition/<id>/vp)";
const ASLEEP: &str = "the hypervisor schedules: the thread sleeps while the VP runs";
const DOUBTFUL: &str = "nobody knows who schedules, so the thread's times may not be the VP's";

impl Counts {
    fn of(mode: SchedMode, sources: &Sources) -> Self {
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
                let halted = sources.counts.map(|_| sources.halted_ns);
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
                    run: or(
                        sources.run_ns.or(hypervisor.run_ns),
                        &format!(
                            "{why}; the hypervisor does not show its register VP_RUNTIME, and {NO_STATS}"
                        ),
                    ),
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
    /// Counts on from an earlier life. Who has not run in this one has what it had.
    fn go_on_from(&mut self, before: &Self, threads: Threads) {
        if threads.now.is_none() && threads.before.is_none() {
            *self = Self {
                tid: None,
                ..before.clone()
            };
            return;
        }
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
        self.kick_to_run.add(&before.kick_to_run);
        match (&mut self.irq_to_run, &before.irq_to_run) {
            (Metered::Known(now), Metered::Known(before)) => now.add(before),
            (now, Metered::Known(_)) => *now = before.irq_to_run.clone(),
            (_, Metered::Unmetered(_)) => {}
        }
        for (kind, before) in &before.exits {
            let now = self.exits.entry(kind.clone()).or_default();
            now.count += before.count;
            now.ns += before.ns;
        }
    }
}
