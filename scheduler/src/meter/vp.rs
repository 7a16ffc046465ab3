//! What one VP's run loop tells its meter: a few stores an exit, none of them contended.

use std::sync::{
    Mutex, MutexGuard, OnceLock, PoisonError,
    atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
};

use super::{
    clock,
    histogram::Histogram,
    threads::{ThreadCounts, ThreadFiles},
};
use crate::{Tid, sys::monotonic_ns};

/// Written by the thread that runs a VP, read by whoever samples.
///
/// ```
/// use scheduler::{Meter, MeterOptions, SchedMode};
///
/// const KINDS: &[&str] = &["port_read", "port_write"];
/// let meter = Meter::new(MeterOptions::new("vm", SchedMode::Root, 1, KINDS));
/// let vp = meter.vp(0).unwrap();
/// vp.attach(); // on the VP's thread, once
/// for _ in 0..3 {
///     vp.entering(); // RUN_VP is next
///     vp.exited(1); // it has come back, with an exit of this kind
/// }
/// vp.entering(); // the last exit has been dealt with
/// assert_eq!(meter.sample().vcpus[0].exits["port_write"].count, 3);
/// ```
#[derive(Debug)]
#[repr(align(128))]
pub struct VpMeter {
    /// By kind: how many, and ticks until the VP went on.
    exits: Box<[[AtomicU64; 2]]>,
    /// Since when an exit is being dealt with, and which kind it is.
    since: AtomicU64,
    kind: AtomicU64,
    /// Kick to notice, in ticks.
    pub(super) kicks: Histogram,
    /// Interrupt to run, in ticks.
    interrupts: Histogram,
    threads: Mutex<Threads>,
    partition: OnceLock<u64>,
    pending: Pending,
}

/// Who runs a VP, and what those got who ran it before.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Threads {
    /// The thread, and since when it is the VP's.
    pub(super) now: Option<(Tid, u64)>,
    /// All that have gone.
    pub(super) before: Option<(ThreadCounts, Halted)>,
}

/// Nanoseconds.
type Halted = u64;

/// Written by other threads, so in a place of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Pending {
    /// Since when somebody wants the VP out of the guest; 0 if nobody does.
    kick: AtomicU64,
    /// Since when an interrupt is on its way.
    interrupt: AtomicU64,
    /// Has there ever been one?
    told: AtomicBool,
}

impl VpMeter {
    pub(super) fn new(kinds: usize) -> Self {
        Self {
            exits: (0..kinds).map(|_| Default::default()).collect(),
            since: AtomicU64::new(0),
            kind: AtomicU64::new(0),
            kicks: Histogram::default(),
            interrupts: Histogram::default(),
            threads: Mutex::default(),
            partition: OnceLock::new(),
            pending: Pending::default(),
        }
    }

    /// The calling thread is the one that runs the VP from now on.
    pub fn attach(&self) {
        self.since.store(0, Relaxed);
        self.pending.kick.store(0, Relaxed);
        self.pending.interrupt.store(0, Relaxed);
        self.lock().now = Some((Tid::current(), monotonic_ns()));
    }

    /// The calling thread, which is the VP's, will not run it any more. What it got is kept, and another that comes counts on.
    pub fn detach(&self) {
        let mut threads = self.lock();
        let Some((tid, since)) = threads.now.filter(|(tid, _)| *tid == Tid::current()) else {
            return;
        };
        let counts = ThreadFiles::open(tid)
            .ok()
            .and_then(|files| files.read(&mut Vec::new()));
        if let Some(counts) = counts {
            let halted = counts.halted_ns(since, monotonic_ns());
            let (before, halted_before) = threads.before.unwrap_or_default();
            threads.before = Some((counts + before, halted + halted_before));
        }
        threads.now = None;
    }

    fn lock(&self) -> MutexGuard<'_, Threads> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `RUN_VP` is next: what the VP came back for has been dealt with. On the VP's thread.
    pub fn entering(&self) {
        let since = self.since.load(Relaxed);
        let raised = self.pending.interrupt.load(Relaxed);
        if since == 0 && raised == 0 {
            return;
        }
        let now = clock::now();
        if since != 0 {
            let kind = self.kind.load(Relaxed) as usize;
            if let Some([_, ticks]) = self.exits.get(kind) {
                ticks.store(ticks.load(Relaxed) + now.saturating_sub(since), Relaxed);
            }
            self.since.store(0, Relaxed);
        }
        if raised != 0 {
            self.pending.interrupt.store(0, Relaxed);
            self.interrupts.record(now.saturating_sub(raised));
        }
    }

    /// `RUN_VP` has come back, with an exit of kind `kind`: an index into the names the meter was made with. On the VP's thread.
    pub fn exited(&self, kind: usize) {
        let now = clock::now();
        self.since.store(now, Relaxed);
        self.kind.store(kind as u64, Relaxed);
        if let Some([count, _]) = self.exits.get(kind) {
            count.store(count.load(Relaxed) + 1, Relaxed);
        }
        let raised = self.pending.interrupt.load(Relaxed);
        if raised != 0 {
            self.pending.interrupt.store(0, Relaxed);
            self.interrupts.record(now.saturating_sub(raised));
        }
    }

    /// The VP is one of the partition with id `partition`, as the messages of the hypervisor say; the first says it for good.
    pub fn belongs_to(&self, partition: u64) {
        self.partition.get_or_init(|| partition);
    }

    /// Somebody wants the VP to stop and look. On any thread, just before the kick; of several that are not noticed the first counts.
    pub fn kicked(&self) {
        let _ = self
            .pending
            .kick
            .compare_exchange(0, clock::now(), Relaxed, Relaxed);
    }

    /// The VP has stopped and looked. On the VP's thread.
    pub fn noticed(&self) {
        let kicked = self.pending.kick.swap(0, Relaxed);
        if kicked != 0 {
            self.kicks.record(clock::now().saturating_sub(kicked));
        }
    }

    /// An interrupt is on its way to the VP. On any thread, just before it is raised, and only for interrupts whose handlers come
    /// back to the VMM. What is recorded is the time until the VP is next seen outside of the guest: no less than the time until it
    /// ran.
    pub fn interrupted(&self) {
        self.pending.told.store(true, Relaxed);
        let _ = self
            .pending
            .interrupt
            .compare_exchange(0, clock::now(), Relaxed, Relaxed);
    }

    /// Interrupt to run, in ticks; `None` if nobody has ever told of an interrupt.
    pub(super) fn interrupts(&self) -> Option<&Histogram> {
        self.pending.told.load(Relaxed).then_some(&self.interrupts)
    }

    /// Count and nanoseconds of one kind.
    pub(super) fn exit(&self, kind: usize, ns_per_tick: f64) -> (u64, u64) {
        let [count, ticks] = &self.exits[kind];
        (
            count.load(Relaxed),
            (ticks.load(Relaxed) as f64 * ns_per_tick) as u64,
        )
    }

    /// The partition's id, once it is known.
    pub(super) fn partition(&self) -> Option<u64> {
        self.partition.get().copied()
    }

    /// Who runs it, and who did.
    pub(super) fn threads(&self) -> Threads {
        *self.lock()
    }
}
