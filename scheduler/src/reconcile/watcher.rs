//! The thread that keeps a plan true.

use std::{
    io,
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::{
    events::{CpuEvents, FileEvents, cpuset_files},
    remap::{Place, remap},
    truce::{CORRECTIONS, FIGHT, Truce},
};
use crate::{
    Claim, CpuSet, Effect, Enforcer, Host, LedgerState, ModeChange, ModeCheck, Outcome, Plan, Says,
    SchedMode, ThreadRole, Tid, VmPlan,
    enforce::Shared,
    ledger::Entry,
    plan::plan,
    sys::{self, Attributes, StopSignal},
};

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
    /// How long nobody is corrected after too many corrections; each time twice as long.
    pub truce: Duration,
    /// Looks whether the same still schedules; where there is no device to ask, nobody does.
    pub mode: Option<ModeCheck>,
}

impl Default for ReconcileOptions {
    fn default() -> Self {
        Self {
            on_lost: OnLost::default(),
            look_every: Duration::from_millis(20),
            truce: Duration::from_secs(10),
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
        /// Where it is now: there still, if it could not be moved.
        now: CpuSet,
    },
    /// Somebody had given our control groups other CPUs; they have theirs again.
    Regrouped,
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
    /// The plan is another now: because of what others planned, or because there are more CPUs for it.
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
            truce: Truce::new(options.truce),
            options,
            tell: Box::new(tell),
            stop: Arc::clone(&stop),
            files,
            cpus: CpuEvents::new().ok(),
            available: CpuSet::new(),
            limited_to: None,
            planned: None,
            lost: Vec::new(),
        };
        watcher.available = watcher.shared.available();
        watcher.limited_to = Some(&watcher.shared.host().allowed)
            .filter(|allowed| !watcher.available.is_subset(allowed))
            .cloned();
        watcher.planned = watcher.shared.effect(PLACEMENT);
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

/// The control that says where vCPUs are.
const PLACEMENT: &str = "placement";

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
    /// CPUs that can be had at all.
    available: CpuSet,
    /// Those that this process was told to stay on when it was started, if there were others.
    limited_to: Option<CpuSet>,
    /// What became of the placement, as long as nothing is in its way.
    planned: Option<Effect>,
    /// vCPUs without their own CPUs.
    lost: Vec<u32>,
    truce: Truce,
}

/// Why threads are looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Occasion {
    /// It is time.
    Routine,
    /// Something has changed.
    Told,
    /// Our own plan has.
    Replanned,
}

impl Watcher {
    fn run(&mut self) {
        become_prompt();
        let cpus = self.cpus.as_ref().map_or(-1, CpuEvents::fd);
        let fds = [self.stop.fd(), self.files.fd(), cpus];
        // Since the plan was made it may have been changed.
        let mut told = true;
        loop {
            let mut occasion = match told {
                true => Occasion::Told,
                false => Occasion::Routine,
            };
            if told && (self.read_plan() | self.grow()) {
                occasion = Occasion::Replanned;
            }
            if self.check_mode() {
                occasion = Occasion::Told;
            }
            self.look(occasion);
            let look = self.shared.has_threads().then_some(self.options.look_every);
            let check = self.options.mode.as_ref().map(ModeCheck::due_in);
            let timeout = look.into_iter().chain(check).min();
            let Ok(ready) = sys::wait_readable(&fds, timeout) else {
                return;
            };
            if ready[0] {
                return;
            }
            told = ready[1];
            if ready[1] {
                self.files.drain();
            }
            if ready[2] {
                told |= self.cpus.as_ref().is_some_and(CpuEvents::drain);
            }
        }
    }

    /// Has somebody changed their mind about who schedules?
    fn check_mode(&mut self) -> bool {
        let Some(change) = self.options.mode.as_mut().and_then(ModeCheck::look) else {
            return false;
        };
        let planned = self.plan.mode;
        let as_planned = match planned {
            SchedMode::Root | SchedMode::Integrated => change.says == Says::Linux,
            SchedMode::Core | SchedMode::Classic => change.says == Says::Hypervisor,
            SchedMode::Disputed | SchedMode::Unknown => false,
        };
        let outcome = if as_planned {
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

    /// Others may have changed our plan on making theirs. Is it another?
    fn read_plan(&mut self) -> bool {
        let Some(Ok(Some(plan))) = self.entry.as_ref().map(Entry::plan) else {
            return false;
        };
        if plan == self.plan {
            return false;
        }
        self.plan = plan;
        self.shared.replan(&self.plan);
        let planned = self.shared.effect(PLACEMENT).zip(self.planned.take());
        self.planned = planned.map(|(now, before)| Effect {
            requested: now.requested,
            ..before
        });
        (self.tell)(ReconcileEvent::Replanned);
        true
    }

    /// A VM that shares CPUs takes up those that have become free since it was planned, because another VM has ended or the cpuset has
    /// grown. Has it?
    fn grow(&mut self) -> bool {
        let Some(entry) = self
            .entry
            .as_ref()
            .filter(|_| self.plan.exclusive.is_empty())
        else {
            return false;
        };
        let available = self.shared.available();
        if (&available - &self.taken()).is_subset(&self.plan.pool) {
            return false;
        }
        let Ok(mut host) = self.shared.host().reread() else {
            return false;
        };
        host.allowed = match &self.limited_to {
            Some(allowed) => &available & allowed,
            None => available,
        };
        let Ok(state) = entry.ledger().read() else {
            return false;
        };
        if grown(&host, &state, &self.plan).is_none() {
            return false;
        }
        // Again, with nobody else doing so at the same time.
        let grown = entry.replan(|state, own| grown(&host, state, own));
        grown.is_ok_and(|grown| grown) && self.read_plan()
    }

    /// Compares what is with what should be; on an occasion that is not routine every thread is told again what it should be.
    fn look(&mut self, occasion: Occasion) {
        if !self.shared.places_threads() {
            return;
        }
        let peace = self.truce.end_at(Instant::now());
        if occasion == Occasion::Routine
            && !peace
            && (self.truce.holds() || self.shared.is_in_place())
        {
            return;
        }
        let available = self.shared.available();
        let moved_by_kernel = available != self.available;
        if moved_by_kernel {
            let before = std::mem::replace(&mut self.available, available.clone());
            (self.tell)(ReconcileEvent::Available {
                before,
                now: available.clone(),
            });
        }
        let own_doing = moved_by_kernel || occasion == Occasion::Replanned;
        if self.truce.holds() && !own_doing {
            return;
        }
        if occasion != Occasion::Routine {
            self.shared.adopt_newcomers();
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
        if regrouped && !own_doing {
            (self.tell)(ReconcileEvent::Regrouped);
        }
        let mut corrected = regrouped;
        for (tid, role) in self.shared.threads() {
            let cpus = match role {
                ThreadRole::Helper => Some(&helpers),
                ThreadRole::Vcpu(vcpu) => places.get(vcpu as usize).map(|place| &place.cpus),
            };
            if let Some(cpus) = cpus.filter(|cpus| !cpus.is_empty()) {
                corrected |= self.correct(tid, role, cpus);
            }
        }
        if corrected && !own_doing {
            self.count_correction();
        }
        self.show_placement(&places);
    }

    /// Puts one thread where it should be, if it is not. Was it somewhere else?
    fn correct(&mut self, tid: Tid, role: ThreadRole, cpus: &CpuSet) -> bool {
        let found = match sys::affinity(tid) {
            Ok(found) => found,
            Err(error) => {
                if error.raw_os_error() == Some(libc::ESRCH) {
                    self.shared.forget(tid);
                }
                return false;
            }
        };
        if found == *cpus {
            return false;
        }
        let now = match self.shared.move_thread(role, tid) {
            Ok(()) => sys::affinity(tid).unwrap_or_default(),
            Err(_) => found.clone(),
        };
        (self.tell)(ReconcileEvent::Corrected { role, found, now });
        true
    }

    /// Says where vCPUs are if that is not where they were planned, and that they are when they are again.
    fn show_placement(&self, places: &[Place]) {
        let Some(planned) = self.planned.clone().filter(|_| !self.truce.holds()) else {
            return;
        };
        let mut now = self.plan.clone();
        for (vcpu, place) in now.vcpus.iter_mut().zip(places) {
            vcpu.cpus.clone_from(&place.cpus);
        }
        let as_planned = now.vcpus == self.plan.vcpus;
        let outcome = match planned.outcome {
            Outcome::Enforced | Outcome::Approximated { .. } if !as_planned => {
                let gone = |vcpu: &crate::VcpuPlan| &vcpu.cpus - &self.available;
                let gone = self.plan.vcpus.iter().map(gone);
                Outcome::Approximated {
                    requested: planned.requested.clone(),
                    effective: now.placement_in_words(),
                    why: format!(
                        "CPUs {} are offline, or outside the cpuset",
                        gone.fold(CpuSet::new(), |all, some| &all | &some)
                    ),
                }
            }
            outcome => outcome,
        };
        self.shared.set_effect(Effect { outcome, ..planned });
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

    fn count_correction(&mut self) {
        let Some(length) = self.truce.count(Instant::now()) else {
            return;
        };
        self.shared.set_effect(Effect {
            control: PLACEMENT.into(),
            requested: "as planned".into(),
            outcome: Outcome::Advisory {
                why: format!(
                    "another program keeps moving these threads: {CORRECTIONS} corrections in {} s, none for {} s now",
                    FIGHT.as_secs(),
                    length.as_secs()
                ),
            },
        });
        (self.tell)(ReconcileEvent::Truce { length });
    }
}

/// What a VM that shares CPUs would be planned as now, if there were more CPUs for it to share.
fn grown(host: &Host, state: &LedgerState, own: &VmPlan) -> Option<Plan> {
    let new = plan(host, state, std::slice::from_ref(&own.request)).ok()?;
    let [vm] = new.vms.as_slice() else {
        return None;
    };
    let more = own.pool.is_subset(&vm.pool) && own.pool != vm.pool;
    (more && !own.pool.is_empty()).then_some(new)
}
