//! The thread that moves a VM's lever.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use super::{
    adaptive::{GangSignal, Phase, Trial, decide, phase},
    lever::Lever,
    turns::{Contender, Turns, neighbours},
    watch::Watch,
};
use tracing::{info, warn};

use crate::{
    Claim, CpuSet, Effect, Enforcer, Gang, LedgerEntry, LedgerError, LedgerState, Outcome, Owner,
    Rotation, Tid, VmPolicy,
    enforce::{Shared, ThreadRole, group_name},
    ledger::Entry,
    reconcile::events::FileEvents,
    sys::{self, Attributes, StopSignal},
};

/// How long adaptive gangs are measured, without turns and with.
const WINDOW: Duration = Duration::from_secs(3);

/// Of a window, what belongs to the change and is not counted.
const SETTLING: u32 = 10;

/// How often the ledger is looked at for processes that have died without a word, and again if it cannot be read.
const ALIVE: Duration = Duration::from_secs(1);

/// Which effect says whether there are turns.
fn control(policy: &VmPolicy) -> &'static str {
    match policy.rotate_us {
        Some(_) => "rotate",
        None => "gang",
    }
}

const ENDED: &str = "whoever took them has ended";
const SUSPENDED: &str = "another machine's rotator on these CPUs stands still, so everybody runs as placed until the next common moment to try again";

/// Why there are no turns.
#[derive(Debug, thiserror::Error)]
pub enum RotatorError {
    /// The others cannot be told.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The host has no more of something.
    #[error("cannot take turns")]
    Io(#[from] io::Error),
}

/// What the rotation does, for those who want to know.
#[derive(Debug, Default)]
pub struct RotatorState {
    /// Quanta that have begun.
    pub turns: AtomicU64,
    /// Of those, our own.
    pub own: AtomicU64,
    /// The latest that a boundary was noticed, in nanoseconds.
    pub latest_ns: AtomicU64,
    /// Are turns being taken now?
    pub active: AtomicBool,
    /// Times that somebody else's failure ended the turns.
    pub suspensions: AtomicU64,
}

/// Takes turns for one VM until it is dropped.
pub struct Rotator {
    stop: Arc<StopSignal>,
    state: Arc<RotatorState>,
    thread: Option<JoinHandle<()>>,
    #[cfg(test)]
    stalled: Arc<AtomicBool>,
    #[cfg(test)]
    stuck: Arc<AtomicBool>,
}

impl Rotator {
    /// Starts taking turns for the VM of `enforcer`, if its policy asks for that and the kernel can do it: call it when the
    /// vCPUs have been adopted. `None` where there is nothing to do. `signal` is what adaptive gangs are judged by.
    ///
    /// # Errors
    /// The ledger cannot be written, or there is no thread.
    pub fn start(
        enforcer: &Enforcer<'_>,
        claim: &Claim,
        signal: Option<Box<dyn GangSignal>>,
    ) -> Result<Option<Self>, RotatorError> {
        Self::start_with(enforcer, claim, signal, WINDOW)
    }

    pub(super) fn start_with(
        enforcer: &Enforcer<'_>,
        claim: &Claim,
        signal: Option<Box<dyn GangSignal>>,
        window: Duration,
    ) -> Result<Option<Self>, RotatorError> {
        let shared = enforcer.shared();
        let policy = shared.plan().request.policy;
        let adaptive = matches!(policy.gang, Gang::Adaptive { .. });
        let turns = policy.rotate_us.is_some() || !policy.gang.is_off();
        let Some(arena) = shared.arena().filter(|_| turns) else {
            return Ok(None);
        };
        claim.entry().set_rotation(Some(Rotation {
            since_ns: sys::monotonic_ns(),
            adaptive,
            arena: arena.clone(),
            gain_milli: None,
        }))?;
        let (stop, state) = (Arc::new(StopSignal::new()?), Arc::default());
        let changes = FileEvents::new()?;
        changes.watch_directory(claim.ledger().directory())?;
        let mut thread = RotatorThread {
            usual: shared.effect(control(&policy)),
            hindered: None,
            shared,
            entry: claim.entry().clone(),
            arena,
            adaptive,
            window,
            signal,
            trial: Trial::default(),
            changes,
            seen: LedgerState::default(),
            threads: Vec::new(),
            stop: Arc::clone(&stop),
            state: Arc::clone(&state),
            levers: Vec::new(),
            #[cfg(test)]
            stalled: Arc::default(),
            #[cfg(test)]
            stuck: Arc::default(),
        };
        #[cfg(test)]
        let (stalled, stuck) = (Arc::clone(&thread.stalled), Arc::clone(&thread.stuck));
        let thread = thread::Builder::new()
            .name("turns".into())
            .spawn(move || thread.run())?;
        Ok(Some(Self {
            stop,
            state,
            thread: Some(thread),
            #[cfg(test)]
            stalled,
            #[cfg(test)]
            stuck,
        }))
    }

    /// What it does.
    #[must_use]
    pub fn state(&self) -> &RotatorState {
        &self.state
    }

    #[cfg(test)]
    pub(super) fn shared_state(&self) -> Arc<RotatorState> {
        Arc::clone(&self.state)
    }

    #[cfg(test)]
    pub(super) fn stall(&self) {
        self.stalled.store(true, Relaxed);
    }

    /// Its levers do not move.
    #[cfg(test)]
    pub(super) fn stick(&self, stuck: bool) {
        self.stuck.store(stuck, Relaxed);
    }
}

impl Drop for Rotator {
    fn drop(&mut self) {
        self.stop.raise();
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

struct RotatorThread {
    shared: Arc<Shared>,
    /// The effect while nothing stands in the way of turns.
    usual: Option<Effect>,
    /// What stands in their way.
    hindered: Option<String>,
    entry: Entry,
    arena: String,
    adaptive: bool,
    window: Duration,
    signal: Option<Box<dyn GangSignal>>,
    trial: Trial,
    changes: FileEvents,
    /// The ledger as it was read last.
    seen: LedgerState,
    /// The threads that the levers are on.
    threads: Vec<(Tid, ThreadRole)>,
    stop: Arc<StopSignal>,
    state: Arc<RotatorState>,
    /// Own contenders' levers, and whether each is held back; `None` before the first time.
    levers: Vec<(Lever, Option<bool>)>,
    #[cfg(test)]
    stalled: Arc<AtomicBool>,
    #[cfg(test)]
    stuck: Arc<AtomicBool>,
}

/// Who takes turns with whom, as the ledger says.
struct Company {
    turns: Turns,
    /// Index of our contenders in the table.
    own: Vec<usize>,
    quantum_ns: u64,
    since_ns: u64,
    /// Turns whatever is measured: somebody is not adaptive.
    always: bool,
    gains: Vec<i32>,
    watch: Watch,
}

impl RotatorThread {
    fn run(&mut self) {
        sys::precise_timers();
        first_among_threads();
        loop {
            let hindered = match self.company() {
                Ok(Some(company)) => match self.turn_until_change(company) {
                    true => continue,
                    false => break,
                },
                Ok(None) => "this machine is not in the ledger any more".to_owned(),
                Err(error) => error.to_string(),
            };
            // Nobody stays held back, and whatever is wrong may pass.
            self.let_go();
            self.state.active.store(false, Relaxed);
            self.hinder(Some(hindered));
            let again = sys::monotonic_ns() + ALIVE.as_nanos() as u64;
            if matches!(self.wait_until(again), Woken::Stop) {
                break;
            }
        }
        self.let_go();
        self.state.active.store(false, Relaxed);
        self.hinder(Some(ENDED.into()));
        let _ = self.entry.set_rotation(None);
    }

    /// Says in the effects what stands in the way of turns, or that nothing does any more.
    fn hinder(&mut self, why: Option<String>) {
        if self.hindered == why {
            return;
        }
        self.hindered = why;
        let Some(usual) = &self.usual else { return };
        let control = &usual.control;
        match &self.hindered {
            None => {
                info!("{control}: turns again");
                self.shared.set_effect(usual.clone());
            }
            Some(why) => {
                if why != ENDED {
                    warn!("{control}: no turns are taken now: {why}");
                }
                self.shared.set_effect(Effect {
                    outcome: Outcome::Advisory {
                        why: format!("no turns are taken now: {why}"),
                    },
                    ..usual.clone()
                });
            }
        }
    }

    /// Says what the effect is while nothing stands in the way.
    fn set_usual(&mut self, effect: Effect) {
        if self.hindered.is_none() {
            self.shared.set_effect(effect.clone());
        }
        self.usual = Some(effect);
    }

    /// Takes turns until the ledger changes. `false` to stop.
    fn turn_until_change(&mut self, mut company: Company) -> bool {
        let mut alive_until = sys::monotonic_ns() + ALIVE.as_nanos() as u64;
        let mut settled_at = None;
        let mut was = None;
        let (mut begun, mut looked_at) = (None, None);
        loop {
            let now = sys::monotonic_ns();
            let (phase, phase_ends) = match company.always {
                true => (Phase::Decided, u64::MAX),
                false => phase(now, company.since_ns, self.window),
            };
            if was != Some(phase) {
                was = Some(phase);
                settled_at = Some(now + self.window.as_nanos() as u64 / u64::from(SETTLING));
                self.enter(phase, now, &mut company);
            }
            if settled_at.is_some_and(|at| now >= at) {
                settled_at = None;
                if let Some(signal) = &mut self.signal {
                    self.trial.settle(now, signal.as_mut());
                }
            }
            let on = match phase {
                _ if company.turns.is_trivial() => false,
                Phase::Without => false,
                Phase::With => true,
                Phase::Decided => company.always || decide(company.gains.iter().copied()),
            };
            let epoch = now / company.quantum_ns;
            let middle = epoch * company.quantum_ns + company.quantum_ns / 2;
            if self.state.active.load(Relaxed) && now >= middle && looked_at != Some(epoch) {
                looked_at = Some(epoch);
                company.watch.look(&company.turns, epoch);
            }
            let suspended = on && company.watch.is_suspended(epoch);
            let active = on && !suspended;
            if self.state.active.swap(active, Relaxed) && suspended {
                self.state.suspensions.fetch_add(1, Relaxed);
            }
            if active {
                let before = begun.replace(epoch);
                if before != Some(epoch) {
                    // The first one is in the middle of a quantum by right.
                    let late = before.map_or(0, |_| now - epoch * company.quantum_ns);
                    self.note_turn(&company, epoch, late);
                }
                let moved = self.move_levers(|own| !company.turns.row(epoch)[company.own[own]]);
                if let Err(error) = &moved {
                    // The others are looked at no more than they look at us, and the next quantum may be better.
                    self.state.active.store(false, Relaxed);
                    self.let_go();
                    self.hinder(Some(format!(
                        "the lever on its vCPUs does not move: {error}"
                    )));
                } else {
                    self.hinder(None);
                }
            } else {
                self.let_go();
                self.hinder(suspended.then(|| SUSPENDED.to_owned()));
            }
            let boundary = match (on, active && company.watch.is_needed()) {
                (true, true) if now < middle => middle,
                (true, _) => (epoch + 1) * company.quantum_ns,
                (false, _) => u64::MAX,
            };
            // Deaths are told by nobody. While there is nobody to take turns with they do not matter.
            let look_again = if on { alive_until } else { u64::MAX };
            let settle = settled_at
                .filter(|_| !company.always && self.signal.is_some())
                .unwrap_or(u64::MAX);
            let next = boundary.min(phase_ends).min(look_again).min(settle);
            match self.wait_until(next) {
                Woken::Stop => return false,
                Woken::Time if sys::monotonic_ns() < look_again => {}
                Woken::Change | Woken::Time => {
                    alive_until = sys::monotonic_ns() + ALIVE.as_nanos() as u64;
                    let ledger = self.entry.ledger().read();
                    if ledger.is_ok_and(|state| state != self.seen)
                        || self.shared.threads() != self.threads
                    {
                        return true;
                    }
                }
            }
            #[cfg(test)]
            while self.stalled.load(Relaxed) {
                match self.wait_until(sys::monotonic_ns() + 10_000_000) {
                    Woken::Stop => return false,
                    _ => continue,
                }
            }
        }
    }

    /// A phase of the trials begins. What one has shown goes to the ledger, and to the effects.
    fn enter(&mut self, phase: Phase, now: u64, company: &mut Company) {
        let Some(signal) = self.signal.as_mut().filter(|_| self.adaptive) else {
            return;
        };
        let Some(gain) = self.trial.enter(phase, now, signal.as_mut()) else {
            return;
        };
        company.gains = vec![gain];
        // The change of the ledger will bring everybody's.
        let _ = self.entry.set_gain(gain);
        let percent = f64::from(gain) / 10.0;
        self.set_usual(Effect {
            control: "gang".into(),
            requested: "adaptive".into(),
            outcome: if decide(std::iter::once(gain)) {
                Outcome::Enforced
            } else {
                Outcome::Approximated {
                    requested: "turns while they help".into(),
                    effective: "no turns, unless the others on these CPUs gain more".into(),
                    why: format!("measured with and without, the gain was {percent:.1} %"),
                }
            },
        });
    }

    fn note_turn(&self, company: &Company, epoch: u64, late_ns: u64) {
        self.state.turns.fetch_add(1, Relaxed);
        self.state.latest_ns.fetch_max(late_ns, Relaxed);
        if company.own.iter().any(|own| company.turns.row(epoch)[*own]) {
            self.state.own.fetch_add(1, Relaxed);
        }
    }

    fn wait_until(&self, time_ns: u64) -> Woken {
        let fds = [self.stop.fd(), self.changes.fd()];
        let timeout = (time_ns != u64::MAX)
            .then(|| Duration::from_nanos(time_ns.saturating_sub(sys::monotonic_ns())));
        match sys::wait_readable(&fds, timeout).as_deref() {
            Ok([true, _]) => Woken::Stop,
            // Without a way to wait there is no way to be on time either.
            Err(error) => {
                warn!("turns end: {error}");
                Woken::Stop
            }
            Ok([_, true]) => {
                self.changes.drain();
                Woken::Change
            }
            Ok(_) => Woken::Time,
        }
    }

    /// Moves each, whatever becomes of the others; the first failure. One that has failed is moved again, even to where it was.
    fn move_levers(&mut self, held_back: impl Fn(usize) -> bool) -> io::Result<()> {
        let mut result = Ok(());
        for (index, (lever, was)) in self.levers.iter_mut().enumerate() {
            let wanted = held_back(index);
            if *was == Some(wanted) {
                continue;
            }
            #[cfg(test)]
            if self.stuck.load(Relaxed) {
                *was = None;
                result = Err(io::Error::other("it is stuck"));
                continue;
            }
            match lever.set(wanted) {
                Ok(()) => *was = Some(wanted),
                Err(error) => {
                    *was = None;
                    result = result.and(Err(error));
                }
            }
        }
        result
    }

    fn let_go(&mut self) {
        let _ = self.move_levers(|_| false);
    }

    /// Reads the ledger, and takes hold of the levers if that has not been done. `None` if this VM is not in it any more.
    fn company(&mut self) -> Result<Option<Company>, LedgerError> {
        self.seen = self.entry.ledger().read()?;
        let state = self.seen.clone();
        let mut entries: Vec<&LedgerEntry> = state
            .entries
            .iter()
            .filter(|entry| {
                entry
                    .rotation
                    .as_ref()
                    .is_some_and(|rotation| rotation.arena == self.arena)
            })
            .collect();
        entries.sort_by(|a, b| {
            let key = |entry: &LedgerEntry| {
                let since = entry.rotation.as_ref().map(|rotation| rotation.since_ns);
                (since, entry.plan.request.vm.clone())
            };
            key(a).cmp(&key(b))
        });
        let all: Vec<(Contender, &LedgerEntry, String)> = entries
            .into_iter()
            .flat_map(|entry| {
                contenders(entry)
                    .into_iter()
                    .map(move |(contender, part)| (contender, entry, part))
            })
            .collect();
        let table: Vec<Contender> = all
            .iter()
            .map(|(contender, ..)| contender.clone())
            .collect();
        let near = neighbours(&table, |index| self.entry.is(all[index].1));
        let own: Vec<usize> = (0..near.len())
            .filter(|index| self.entry.is(all[near[*index]].1))
            .collect();
        if own.is_empty() {
            return Ok(None);
        }
        let near: Vec<_> = near.into_iter().map(|index| &all[index]).collect();
        self.take_levers(own.len());
        let rotations = || {
            near.iter()
                .filter_map(|(_, entry, _)| entry.rotation.as_ref())
        };
        let contenders: Vec<Contender> = near
            .iter()
            .map(|(contender, ..)| contender.clone())
            .collect();
        Ok(Some(Company {
            turns: Turns::new(&contenders),
            quantum_ns: near
                .iter()
                .filter_map(|(_, entry, _)| quantum_us(entry))
                .max()
                .map_or(u64::MAX, |us| u64::from(us) * 1000),
            since_ns: rotations()
                .map(|rotation| rotation.since_ns)
                .max()
                .unwrap_or(0),
            always: rotations().any(|rotation| !rotation.adaptive),
            gains: rotations()
                .filter_map(|rotation| rotation.gain_milli)
                .collect(),
            watch: Watch::new(
                near.iter()
                    .enumerate()
                    .filter(|(index, _)| !own.contains(index))
                    .map(|(index, (_, entry, part))| (index, idle_file(&self.arena, entry, part))),
            ),
            own,
        }))
    }

    /// One lever for each own contender, taken anew each time: there may be other threads now.
    fn take_levers(&mut self, count: usize) {
        self.let_go();
        self.threads = self.shared.threads();
        let threads = &self.threads;
        let vcpus_of = |contender: usize| -> Vec<Tid> {
            threads
                .iter()
                .filter(|(_, role)| match role {
                    ThreadRole::Vcpu(vcpu) => count == 1 || *vcpu as usize == contender,
                    ThreadRole::Helper => false,
                })
                .map(|(tid, _)| *tid)
                .collect()
        };
        self.levers = (0..count)
            .filter_map(|contender| {
                self.shared
                    .lever(contender, &vcpus_of(contender))
                    .map(|lever| (lever, None))
            })
            .collect();
    }
}

enum Woken {
    Stop,
    Change,
    Time,
}

fn quantum_us(entry: &LedgerEntry) -> Option<u32> {
    let policy = &entry.plan.request.policy;
    match (policy.rotate_us, policy.gang) {
        (Some(us), _) => Some(us.max(1)),
        (None, Gang::Soft { quantum_us } | Gang::Adaptive { quantum_us }) => {
            Some(quantum_us.max(1))
        }
        (None, Gang::Off) => None,
    }
}

/// What of a VM takes turns, and in which of its groups that is.
fn contenders(entry: &LedgerEntry) -> Vec<(Contender, String)> {
    let policy = &entry.plan.request.policy;
    let weight = policy.weight.unwrap_or(100);
    let vcpus = entry.plan.vcpus.iter().map(|vcpu| vcpu.cpus.clone());
    if policy.rotate_us.is_some() {
        return vcpus
            .enumerate()
            .map(|(index, cpus)| {
                let vcpus = vec![cpus];
                (Contender { vcpus, weight }, format!("vcpu{index}"))
            })
            .collect();
    }
    let vcpus: Vec<CpuSet> = vcpus.collect();
    vec![(Contender { vcpus, weight }, "vcpu".into())]
}

fn idle_file(arena: &str, entry: &LedgerEntry, part: &str) -> PathBuf {
    let owner: &Owner = &entry.owner;
    Path::new(arena)
        .join(group_name(&entry.plan.request.vm, owner, part))
        .join("cpu.idle")
}

/// This thread is late for whoever waits: before all others if that is allowed, otherwise soon.
fn first_among_threads() {
    let Ok(has) = sys::attributes(Tid::current()) else {
        return;
    };
    let fifo = Attributes {
        policy: libc::SCHED_FIFO as u32,
        priority: 1,
        nice: 0,
        runtime_ns: 0,
        ..has
    };
    if sys::set_attributes(Tid::current(), &fifo).is_err() {
        let soon = Attributes {
            runtime_ns: 100_000,
            ..has
        };
        let _ = sys::set_attributes(Tid::current(), &soon);
    }
}
