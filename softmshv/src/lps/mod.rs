//! The world in which the hypervisor schedules: logical processors that the client has no say over.
//!
//! Where the core scheduler is at work, `RUN_VP` puts the calling thread to sleep until there is a message, and the VP runs
//! wherever the hypervisor likes. Here each VP then has a thread of softmshv's own ([`crate::vp`]), which may be in the guest
//! only while it has a logical processor: a CPU, whatever the affinity, priority or control group of the client's threads.
//!
//! ```text
//!   VP's thread      take ─► in the guest ─► leave (a message)      │ queue   who is where: rules
//!                      ▲          │                                 │ shares  weight, cap, reserve
//!                      └─ is_over ┘                                 │ host    affinity, control groups
//!   dispatcher       what has each run? who halts? whose time is over? who is next?
//! ```
//!
//! The dispatcher sleeps while nobody waits and nobody is capped. A VP that halts stays in KVM, where interrupts reach it,
//! and gives its logical processor to whoever wants it; when it wakes it runs at once and is sorted in a moment later, which
//! is the boost every hypervisor gives.

mod host;
mod queue;
pub(crate) mod shares;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::config::config;
use crate::memory::Kick;
use crate::partition::Partition;
use crate::vp::HaltStat;
use queue::{Key, Place, Queue};

/// How often to ask again who halts or has woken.
const HALT_POLL: Duration = Duration::from_millis(1);
/// How long to wait for a VP that was asked to give way before it is asked again.
const ASK_AGAIN: Duration = Duration::from_micros(200);
/// Closer events are dealt with together.
const MIN_SLEEP: Duration = Duration::from_micros(50);

/// The logical processors of this process, and the VPs that want them.
struct Lps {
    cpus: Vec<usize>,
    began: Instant,
    state: Mutex<State>,
    /// Something the dispatcher should look at.
    changed: Condvar,
}

struct State {
    queue: Queue,
    turns: BTreeMap<Key, Arc<Turn>>,
    next_key: Key,
    dispatching: bool,
}

/// One VP's claim on the logical processors.
pub(crate) struct Turn {
    key: Key,
    partition: Arc<Partition>,
    kick: Arc<Kick>,
    halt: Option<HaltStat>,
    /// The thread that runs the VP, once it has started.
    tid: AtomicI32,
    /// What of that thread's CPU time has been charged.
    charged: AtomicU64,
    /// The thread is in the guest, or about to be.
    inside: AtomicBool,
    /// Its time is over.
    over: AtomicBool,
    /// The client wants the VP to stop.
    suspend: AtomicBool,
    granted: Condvar,
}

fn lps() -> &'static Lps {
    static LPS: OnceLock<Lps> = OnceLock::new();
    LPS.get_or_init(|| {
        let cpus = host::cpus();
        let quantum = config().quantum.as_nanos() as u64;
        Lps {
            began: Instant::now(),
            state: Mutex::new(State {
                queue: Queue::new(cpus.len(), quantum),
                turns: BTreeMap::new(),
                next_key: 0,
                dispatching: false,
            }),
            changed: Condvar::new(),
            cpus,
        }
    })
}

impl Lps {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        self.began.elapsed().as_nanos() as u64
    }

    /// The dispatcher's life: until there is no VP any more.
    fn dispatch(&self) {
        host::become_dispatcher();
        let mut state = self.lock();
        while !state.queue.is_empty() {
            let sleep = state.tick(self.now());
            state = match sleep {
                None => self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(time) => {
                    self.changed
                        .wait_timeout(state, time.max(MIN_SLEEP))
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
        }
        state.dispatching = false;
    }
}

impl State {
    /// Brings everything up to date; returns when to do so again.
    fn tick(&mut self, now: u64) -> Option<Duration> {
        let turns: Vec<_> = self.turns.values().map(Arc::clone).collect();
        for turn in &turns {
            if self.queue.place(turn.key) != Place::Away {
                self.charge(turn, now);
            }
        }
        let contended = self.queue.is_contended();
        for turn in &turns {
            match self.queue.place(turn.key) {
                Place::On { .. } if contended && turn.is_halted() => self.queue.sleep(turn.key),
                Place::Asleep if !turn.is_halted() => self.queue.give_way(turn.key),
                _ => {}
            }
        }
        self.assign(now);
        self.queue.overdue(now);
        let (mut late, mut asleep) = (false, false);
        for turn in &turns {
            let place = self.queue.place(turn.key);
            asleep |= place == Place::Asleep;
            let astray = place == Place::Waiting && turn.inside.load(Ordering::Relaxed);
            if astray || self.queue.is_leaving(turn.key) {
                turn.over.store(true, Ordering::Release);
                turn.kick.kick();
                late = true;
            }
        }
        let mut next = self
            .queue
            .next_event(now)
            .map(|time| Duration::from_nanos(time.saturating_sub(now)));
        let mut within = |time: Duration| next = Some(next.map_or(time, |next| next.min(time)));
        if late {
            within(ASK_AGAIN);
        }
        if asleep || self.queue.is_contended() {
            within(HALT_POLL);
        }
        next
    }

    fn charge(&mut self, turn: &Turn, now: u64) {
        let shares = turn.partition.properties.shares();
        self.queue.charge(turn.key, turn.has_run(), shares, now);
    }

    /// Fills free logical processors and wakes who got one.
    fn assign(&mut self, now: u64) {
        for key in self.queue.assign(now) {
            if let Some(turn) = self.turns.get(&key) {
                turn.granted.notify_all();
            }
        }
    }
}

/// The client has changed what VPs are granted.
pub(crate) fn reconsider() {
    if config().hypervisor_schedules {
        lps().changed.notify_all();
    }
}

impl Turn {
    /// A claim for a VP of `partition`, to be given up by [`Self::end`].
    pub(crate) fn new(
        partition: &Arc<Partition>,
        kick: Arc<Kick>,
        halt: Option<HaltStat>,
    ) -> Arc<Self> {
        let lps = lps();
        let mut state = lps.lock();
        let key = state.next_key;
        state.next_key += 1;
        let turn = Arc::new(Self {
            key,
            partition: Arc::clone(partition),
            kick,
            halt,
            tid: AtomicI32::new(0),
            charged: AtomicU64::new(0),
            inside: AtomicBool::new(false),
            over: AtomicBool::new(false),
            suspend: AtomicBool::new(false),
            granted: Condvar::new(),
        });
        state
            .queue
            .add(key, partition.properties.shares(), lps.now());
        state.turns.insert(key, Arc::clone(&turn));
        if !state.dispatching {
            let dispatcher = thread::Builder::new()
                .name("softmshv-lps".into())
                .spawn(move || lps.dispatch());
            state.dispatching = dispatcher.is_ok();
        }
        turn
    }

    /// Gives the claim up.
    pub(crate) fn end(&self) {
        let lps = lps();
        let mut state = lps.lock();
        state.queue.remove(self.key);
        state.turns.remove(&self.key);
        state.assign(lps.now());
        lps.changed.notify_all();
    }

    /// The calling thread runs this VP from now on.
    pub(crate) fn adopt(&self) {
        host::become_processor();
        // SAFETY: takes no arguments.
        self.tid.store(unsafe { libc::gettid() }, Ordering::Release);
        self.charged.store(self.cpu_time(), Ordering::Relaxed);
    }

    /// VP's thread: waits for a logical processor and moves there; `new` after the VP was away, otherwise after its time
    /// was over. `false` when the client wants the VP to stop instead.
    pub(crate) fn take(&self, new: bool) -> bool {
        let lps = lps();
        let mut state = lps.lock();
        let now = lps.now();
        state.charge(self, now);
        self.inside.store(false, Ordering::Relaxed);
        if new {
            state.queue.enter(self.key, now);
        }
        state.assign(now);
        if self.partition.properties.shares().is_capped() || state.queue.is_contended() {
            lps.changed.notify_all();
        }
        loop {
            if self.suspend.load(Ordering::Acquire) {
                state.queue.leave(self.key);
                state.assign(now);
                return false;
            }
            if state.queue.is_leaving(self.key) {
                // Granted, and taken away again before this thread woke up.
                state.queue.give_way(self.key);
                state.assign(lps.now());
            }
            if let Place::On { lp, .. } = state.queue.place(self.key) {
                self.inside.store(true, Ordering::Relaxed);
                self.over.store(false, Ordering::Release);
                drop(state);
                host::move_to(lps.cpus[lp]);
                return true;
            }
            state = self
                .granted
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// VP's thread: the VP has a message, or an error.
    pub(crate) fn leave(&self) {
        let lps = lps();
        let mut state = lps.lock();
        let now = lps.now();
        state.charge(self, now);
        self.inside.store(false, Ordering::Relaxed);
        state.queue.leave(self.key);
        state.assign(now);
    }

    /// VP's thread: whether to come out of the guest and [`Self::take`] again.
    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire) || self.suspend.load(Ordering::Acquire)
    }

    /// Client: from now on the VP may run.
    pub(crate) fn allow(&self) {
        self.suspend.store(false, Ordering::Release);
    }

    /// Client: wants the VP to stop. To be repeated until it has: a kick between two runs is lost.
    pub(crate) fn suspend(&self) {
        let _state = lps().lock();
        self.suspend.store(true, Ordering::Release);
        self.granted.notify_all();
        self.kick.kick();
    }

    fn is_halted(&self) -> bool {
        self.halt.as_ref().is_some_and(HaltStat::is_halted)
    }

    /// The CPU time of the VP's thread, in nanoseconds.
    fn cpu_time(&self) -> u64 {
        let tid = self.tid.load(Ordering::Acquire);
        // The clock of a thread of this process, by its number: three bits say so.
        let clock = (!tid) << 3 | 0b110;
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: the kernel writes the time, or says that there is no such thread.
        unsafe { libc::clock_gettime(clock, &raw mut time) };
        (time.tv_sec * 1_000_000_000 + time.tv_nsec) as u64
    }

    /// What the VP's thread has run since the last question.
    fn has_run(&self) -> u64 {
        let time = self.cpu_time();
        let before = self.charged.swap(time, Ordering::Relaxed);
        time.saturating_sub(before)
    }
}
