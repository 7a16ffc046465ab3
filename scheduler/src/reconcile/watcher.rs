//! The thread that keeps a plan true.

use std::{
    collections::VecDeque,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::{
    events::{CpuEvents, FileEvents, cpuset_files, effective_cpus_file},
    remap::{Place, remap},
};
use crate::{
    Claim, CpuSet, Effect, Enforcer, ModeChange, ModeCheck, Outcome, Says, ThreadRole, Tid, VmPlan,
    enforce::{Shared, read_cpus},
    ledger::Entry,
    sys::{self, Attributes, StopSignal},
};

/// Corrections that somebody else may make necessary within [`FIGHT`].
const CORRECTIONS: usize = 3;
const FIGHT: Duration = Duration::from_secs(10);

/// The longest truce.
const LONGEST_TRUCE: Duration = Duration::from_secs(640);

/// What becomes of a vCPU whose own CPU is lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnLost {
    /// It goes on among the others.
    #[default]
    Shared,
    /// The VMM is told to pause the VM.
    Pause,
    /// The VMM is told to end the VM.
    Fail,
}

/// How a plan is kept true.
pub struct ReconcileOptions {
    /// For vCPUs with CPUs of their own.
    pub on_lost: OnLost,
    /// How often threads are looked at, since nobody tells when they are moved.
    pub look_every: Duration,
    /// Looks whether the same still schedules; where there is no device to ask, nobody does.
    pub mode: Option<ModeCheck>,
}

impl Default for ReconcileOptions {
    fn default() -> Self {
        Self {
            on_lost: OnLost::default(),
            look_every: Duration::from_millis(20),
            mode: None,
        }
    }
}

/// What has happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReconcileEvent {
    /// The CPUs that can be had at all are others now.
    Available {
        /// Before.
        before: CpuSet,
        /// Now.
        now: CpuSet,
    },
    /// A thread was elsewhere than it should be.
    Corrected {
        /// Which.
        role: ThreadRole,
        /// Where it was.
        found: CpuSet,
        /// Where it is now.
        now: CpuSet,
    },
    /// A vCPU has lost the CPU that was its own.
    Lost {
        /// Its number.
        vcpu: u32,
        /// What was its own.
        planned: CpuSet,
        /// Where it is now.
        now: CpuSet,
        /// What is to be done.
        on_lost: OnLost,
    },
    /// It has its own CPU back.
    Regained {
        /// Its number.
        vcpu: u32,
    },
    /// The plan is another now, because of what others planned.
    Replanned,
    /// Who schedules VPs is another now, says a source. Everything that Linux can do has been done anew; if it is the hypervisor that
    /// schedules, that has no effect.
    Mode(ModeChange),
    /// Somebody else keeps moving our threads; no more corrections for so long.
    Truce {
        /// How long.
        length: Duration,
    },
}

/// Keeps one VM's plan true until it is dropped.
pub struct Reconciler {
    stop: Arc<StopSignal>,
    thread: Option<JoinHandle<()>>,
}

impl Reconciler {
    /// Starts to look after the VM of `enforcer`. `claim` is its place in the ledger, if it has one; `tell` is told what happens, on
    /// the thread of the reconciler.
    ///
    /// # Errors
    /// The host has no more descriptors or threads.
    pub fn start(
        enforcer: &Enforcer<'_>,
        claim: Option<&Claim>,
        options: ReconcileOptions,
        tell: impl FnMut(ReconcileEvent) + Send + 'static,
    ) -> io::Result<Self> {
        let stop = Arc::new(StopSignal::new()?);
        let shared = enforcer.shared();
        let files = FileEvents::new()?;
        let group = shared.cpuset_place();
        if let Some(group) = &group {
            for file in cpuset_files(group) {
                // One that cannot be watched is still looked at.
                let _ = files.watch_file(&file);
            }
        }
        for group in shared.cpuset_groups() {
            let _ = files.watch_file(&group.join("cpuset.cpus"));
        }
        if let Some(claim) = claim {
            files.watch_directory(claim.ledger().directory())?;
        }
        let mut watcher = Watcher {
            plan: shared.plan(),
            shared,
            entry: claim.map(|claim| claim.entry().clone()),
            options,
            tell: Box::new(tell),
            stop: Arc::clone(&stop),
            files,
            cpus: CpuEvents::new().ok(),
            effective: group.as_deref().and_then(effective_cpus_file),
            available: CpuSet::new(),
            lost: Vec::new(),
            corrections: VecDeque::new(),
            truce: Truce::default(),
        };
        watcher.available = watcher.read_available();
        let thread = thread::Builder::new()
            .name("reconcile".into())
            .spawn(move || watcher.run())?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Reconciler {
    fn drop(&mut self) {
        self.stop.raise();
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Asks for the shortest slice, with which the kernel lets a thread that wakes go before vCPUs that never sleep. Needs no privilege;
/// kernels before 6.12 take it and make nothing of it.
fn become_prompt() {
    const SHORTEST_NS: u64 = 100_000;
    let own = Tid::current();
    if let Ok(attributes) = sys::attributes(own) {
        let prompt = Attributes {
            runtime_ns: SHORTEST_NS,
            ..attributes
        };
        // Without it, it may be a few ticks late.
        let _ = sys::set_attributes(own, &prompt);
    }
}

struct Watcher {
    shared: Arc<Shared>,
    plan: VmPlan,
    entry: Option<Entry>,
    options: ReconcileOptions,
    tell: Box<dyn FnMut(ReconcileEvent) + Send>,
    stop: Arc<StopSignal>,
    files: FileEvents,
    cpus: Option<CpuEvents>,
    effective: Option<PathBuf>,
    /// CPUs that can be had at all.
    available: CpuSet,
    /// vCPUs without their own CPUs.
    lost: Vec<u32>,
    /// When others made corrections necessary.
    corrections: VecDeque<Instant>,
    truce: Truce,
}

/// When somebody else has won.
#[derive(Default)]
struct Truce {
    until: Option<Instant>,
    length: Duration,
    /// The effect that does not hold meanwhile.
    suspended: Option<Effect>,
}

impl Watcher {
    fn run(&mut self) {
        become_prompt();
        let cpus = self.cpus.as_ref().map_or(-1, CpuEvents::fd);
        let fds = [self.stop.fd(), self.files.fd(), cpus];
        loop {
            let look = self.shared.has_threads().then_some(self.options.look_every);
            let check = self.options.mode.as_ref().map(ModeCheck::due_in);
            let timeout = look.into_iter().chain(check).min();
            let Ok(ready) = sys::wait_readable(&fds, timeout) else {
                return;
            };
            if ready[0] {
                return;
            }
            let mut changed = ready[1];
            if ready[1] {
                self.files.drain();
                self.read_plan();
            }
            if ready[2] {
                changed |= self.cpus.as_ref().is_some_and(CpuEvents::drain);
            }
            changed |= self.check_mode();
            self.look(changed);
        }
    }

    /// Has somebody changed their mind about who schedules?
    fn check_mode(&mut self) -> bool {
        let Some(change) = self.options.mode.as_mut().and_then(ModeCheck::look) else {
            return false;
        };
        let planned = self.plan.mode;
        let outcome = if (change.says == Says::Linux) == planned.linux_schedules() {
            Outcome::Enforced
        } else {
            Outcome::Advisory {
                why: format!(
                    "since the start the {} has become \"{}\" (it was \"{}\"), so what was planned may have no effect; a new start \
                     plans for what is now",
                    change.source, change.now, change.before
                ),
            }
        };
        self.shared.set_effect(Effect {
            control: "mode".into(),
            requested: planned.to_string(),
            outcome,
        });
        (self.tell)(ReconcileEvent::Mode(change));
        true
    }

    fn read_available(&self) -> CpuSet {
        let online = || read_cpus(Path::new("/sys/devices/system/cpu/online"));
        self.effective
            .as_deref()
            .map_or_else(online, read_cpus)
            .unwrap_or_default()
    }

    /// Others may have changed our plan on making theirs.
    fn read_plan(&mut self) {
        let Some(Ok(Some(plan))) = self.entry.as_ref().map(Entry::plan) else {
            return;
        };
        if plan != self.plan {
            self.plan = plan;
            self.shared.replan(&self.plan);
            (self.tell)(ReconcileEvent::Replanned);
        }
    }

    /// Compares what is with what should be. `certain`: something has changed, so every thread is told again what it should be.
    fn look(&mut self, certain: bool) {
        if !self.shared.places_threads() {
            return;
        }
        if !certain && self.shared.is_in_place() {
            return;
        }
        let available = self.read_available();
        let moved_by_kernel = available != self.available;
        if moved_by_kernel {
            let before = std::mem::replace(&mut self.available, available.clone());
            (self.tell)(ReconcileEvent::Available {
                before,
                now: available.clone(),
            });
        }
        let places = remap(&self.plan.vcpus, &available, &self.taken());
        self.note_lost(&places);
        let helpers = match &self.plan.helpers & &available {
            rest if rest.is_empty() => available.clone(),
            rest => rest,
        };
        let regrouped = self.shared.confine(
            places.iter().map(|place| place.cpus.clone()).collect(),
            &helpers,
        );
        let own_doing = moved_by_kernel || regrouped;
        let mut corrected = false;
        for (tid, role) in self.shared.threads() {
            let cpus = match role {
                ThreadRole::Helper => Some(&helpers),
                ThreadRole::Vcpu(vcpu) => places.get(vcpu as usize).map(|place| &place.cpus),
            };
            if let Some(cpus) = cpus.filter(|cpus| !cpus.is_empty()) {
                corrected |= self.correct(tid, role, cpus, own_doing);
            }
        }
        if corrected && !own_doing {
            self.count_correction();
        }
    }

    /// Puts one thread where it should be, if it is not. Was it somewhere else?
    fn correct(&mut self, tid: Tid, role: ThreadRole, cpus: &CpuSet, own_doing: bool) -> bool {
        let found = match sys::affinity(tid) {
            Ok(found) => found,
            Err(error) => {
                if error.raw_os_error() == Some(libc::ESRCH) {
                    self.shared.forget(tid);
                }
                return false;
            }
        };
        if found == *cpus || !own_doing && self.truce_holds() {
            return false;
        }
        let now = match self.shared.move_thread(role, tid) {
            Ok(()) => sys::affinity(tid).unwrap_or_default(),
            Err(_) => found.clone(),
        };
        let right = now == *cpus;
        (self.tell)(ReconcileEvent::Corrected { role, found, now });
        right
    }

    /// CPUs that are others' own.
    fn taken(&self) -> CpuSet {
        let state = self.entry.as_ref().map(|entry| entry.ledger().read());
        let Some(Ok(state)) = state else {
            return CpuSet::new();
        };
        let others = state
            .entries
            .iter()
            .filter(|entry| entry.plan.request.vm != self.plan.request.vm);
        others.fold(CpuSet::new(), |all, entry| &all | &entry.plan.exclusive)
    }

    fn note_lost(&mut self, places: &[Place]) {
        for (vcpu, place) in self.plan.vcpus.iter().zip(places) {
            let was_lost = self.lost.contains(&vcpu.vcpu);
            if !vcpu.exclusive || place.displaced == was_lost {
                continue;
            }
            let number = vcpu.vcpu;
            if !place.displaced {
                self.lost.retain(|lost| *lost != number);
                (self.tell)(ReconcileEvent::Regained { vcpu: number });
                continue;
            }
            self.lost.push(number);
            (self.tell)(ReconcileEvent::Lost {
                vcpu: number,
                planned: vcpu.cpus.clone(),
                now: place.cpus.clone(),
                on_lost: self.options.on_lost,
            });
        }
    }

    fn truce_holds(&mut self) -> bool {
        match self.truce.until {
            Some(until) if Instant::now() < until => true,
            Some(_) => {
                self.truce.until = None;
                if let Some(effect) = self.truce.suspended.take() {
                    self.shared.set_effect(effect);
                }
                false
            }
            None => false,
        }
    }

    fn count_correction(&mut self) {
        let now = Instant::now();
        while self
            .corrections
            .front()
            .is_some_and(|then| now - *then > FIGHT)
        {
            self.corrections.pop_front();
        }
        self.corrections.push_back(now);
        if self.corrections.len() < CORRECTIONS {
            return;
        }
        self.corrections.clear();
        self.truce.length = (self.truce.length * 2).clamp(FIGHT, LONGEST_TRUCE);
        self.truce.until = Some(now + self.truce.length);
        self.truce.suspended = self.shared.effect("placement");
        self.shared.set_effect(Effect {
            control: "placement".into(),
            requested: "as planned".into(),
            outcome: Outcome::Advisory {
                why: format!(
                    "another program keeps moving these threads: {CORRECTIONS} corrections in {} s, none for {} s now",
                    FIGHT.as_secs(),
                    self.truce.length.as_secs()
                ),
            },
        });
        (self.tell)(ReconcileEvent::Truce {
            length: self.truce.length,
        });
    }
}
