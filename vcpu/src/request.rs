//! Asking a VP thread to pause or to end, without losing the request.
//!
//! A VP thread spends its life inside `MSHV_RUN_VP`. It is asked through an atomic word it reads before every run, and a
//! signal that makes the ioctl return. A signal that lands between the reading and the ioctl is spent for nothing, so the
//! asking side sends it again until the VP thread acknowledges: no request is lost, and the path of an exit pays one load.

use std::{
    io,
    sync::{
        Condvar, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

/// How long to wait for an acknowledgement before the signal is sent again.
const KICK_AGAIN: Duration = Duration::from_millis(2);

const RUN: u8 = 0;
const PAUSE: u8 = 1;
const STOP: u8 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Thread {
    NotStarted,
    Running(libc::pid_t),
    Parked(libc::pid_t),
    Ended,
}

/// What a VP thread should do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    Run,
    Stop,
}

/// Somebody who times how long a VP thread takes to notice that it is wanted.
pub trait KickWatch: Send + Sync {
    /// The VP thread is about to be asked, and kicked. On the thread that asks.
    fn kicked(&self);
    /// The VP thread has seen that something is asked of it. On that thread.
    fn noticed(&self);
}

/// The door between one VP thread and whoever controls it.
pub struct Requests {
    word: AtomicU8,
    thread: Mutex<Thread>,
    changed: Condvar,
    watch: OnceLock<Box<dyn KickWatch>>,
}

impl Default for Requests {
    fn default() -> Self {
        Self {
            word: AtomicU8::new(RUN),
            thread: Mutex::new(Thread::NotStarted),
            changed: Condvar::new(),
            watch: OnceLock::new(),
        }
    }
}

impl Requests {
    /// Has kicks timed by `watch` from now on; the first one stays.
    pub fn watch(&self, watch: Box<dyn KickWatch>) {
        let _ = self.watch.set(watch);
    }

    /// Makes the VP thread stop running the guest and wait; returns once it does (or has ended).
    pub fn pause(&self) {
        self.ask(PAUSE);
    }

    /// Lets a paused VP thread run again.
    pub fn resume(&self) {
        let _held = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        // A stop is final: resuming does not take it back.
        let _ = self
            .word
            .compare_exchange(PAUSE, RUN, Ordering::Release, Ordering::Relaxed);
        self.changed.notify_all();
    }

    /// Makes the VP thread end; returns once it has (at once when it never started).
    pub fn stop(&self) {
        self.ask(STOP);
    }

    fn ask(&self, request: u8) {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        let first = self.word.load(Ordering::Relaxed) == RUN;
        if let (Thread::Running(_), true, Some(watch)) = (*thread, first, self.watch.get()) {
            // Before the word, which the VP thread may see without a kick.
            watch.kicked();
        }
        self.word.fetch_max(request, Ordering::Release);
        self.changed.notify_all();
        loop {
            match *thread {
                Thread::NotStarted | Thread::Ended => return,
                Thread::Parked(_) if request == PAUSE => return,
                Thread::Parked(_) => {}
                Thread::Running(tid) => kick(tid),
            }
            thread = self
                .changed
                .wait_timeout(thread, KICK_AGAIN)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// VP thread: announces itself. The returned guard announces the end, also when the thread panics.
    pub(crate) fn enter(&self) -> Running<'_> {
        // SAFETY: `gettid` has no preconditions.
        let tid = unsafe { libc::gettid() };
        self.set(Thread::Running(tid));
        Running(self)
    }

    /// VP thread: one load where nothing is asked; waits here while paused.
    pub(crate) fn next(&self) -> Next {
        match self.word.load(Ordering::Acquire) {
            RUN => Next::Run,
            asked => self.notice(asked),
        }
    }

    #[cold]
    fn notice(&self, asked: u8) -> Next {
        if let Some(watch) = self.watch.get() {
            watch.noticed();
        }
        match asked {
            STOP => Next::Stop,
            _ => self.park(),
        }
    }

    fn park(&self) -> Next {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if let Thread::Running(tid) = *thread {
            *thread = Thread::Parked(tid);
            self.changed.notify_all();
            while self.word.load(Ordering::Acquire) == PAUSE {
                thread = self
                    .changed
                    .wait(thread)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            *thread = Thread::Running(tid);
        }
        if self.word.load(Ordering::Acquire) == STOP {
            Next::Stop
        } else {
            Next::Run
        }
    }

    fn set(&self, state: Thread) {
        *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = state;
        self.changed.notify_all();
    }
}

/// While it lives, its thread runs the VP.
pub(crate) struct Running<'a>(&'a Requests);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.set(Thread::Ended);
    }
}

/// Sends the kick signal. The caller holds the lock that a VP thread needs to end, so `tid` is that thread still.
fn kick(tid: libc::pid_t) {
    // SAFETY: plain system calls on this process's own thread; a handler for the signal is installed before any VP runs.
    unsafe {
        libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, libc::SIGRTMIN());
    }
}

/// Installs the empty handler of the kick signal, for the whole process. Call it before the first VP thread starts.
///
/// # Errors
/// What `sigaction` says.
pub fn install_kick_handler() -> io::Result<()> {
    extern "C" fn wake(_: libc::c_int) {}
    // SAFETY: an all-zero `sigaction` is a valid one: no flags (so `RUN_VP` returns EINTR), nothing masked.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = wake as extern "C" fn(libc::c_int) as libc::sighandler_t;
    // SAFETY: the handler does nothing, which is async-signal-safe; `action` outlives the call.
    if unsafe { libc::sigaction(libc::SIGRTMIN(), &raw const action, std::ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Arc, atomic::AtomicU64},
        thread,
        time::Instant,
    };

    use super::*;

    /// Stands in for a VP: "runs the guest" by sleeping in a system call that only a signal ends.
    fn sleeper(requests: Arc<Requests>, runs: Arc<AtomicU64>) -> thread::JoinHandle<()> {
        thread::spawn(move || {
            let _running = requests.enter();
            while requests.next() == Next::Run {
                runs.fetch_add(1, Ordering::Relaxed);
                // SAFETY: no arguments to get wrong.
                unsafe { libc::pause() };
            }
        })
    }

    #[test]
    fn no_stop_is_lost_however_the_signal_races_the_sleep() {
        install_kick_handler().unwrap();
        for _ in 0..200 {
            let requests = Arc::new(Requests::default());
            let vp = sleeper(Arc::clone(&requests), Arc::default());
            requests.stop();
            let begun = Instant::now();
            vp.join().unwrap();
            assert!(begun.elapsed() < Duration::from_secs(5));
        }
    }

    /// Counts kicks that were sent, and requests that were seen.
    #[derive(Clone, Default)]
    struct Seen(Arc<[AtomicU64; 2]>);

    impl KickWatch for Seen {
        fn kicked(&self) {
            self.0[0].fetch_add(1, Ordering::Relaxed);
        }

        fn noticed(&self) {
            self.0[1].fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_kick_is_told_to_whoever_times_it_and_so_is_that_it_was_noticed() {
        install_kick_handler().unwrap();
        let (requests, seen) = (Arc::new(Requests::default()), Seen::default());
        requests.watch(Box::new(seen.clone()));
        let runs = Arc::<AtomicU64>::default();
        let vp = sleeper(Arc::clone(&requests), Arc::clone(&runs));
        while runs.load(Ordering::Relaxed) == 0 {
            thread::yield_now();
        }
        let counts = || [0, 1].map(|index: usize| seen.0[index].load(Ordering::Relaxed));
        assert_eq!(counts(), [0; 2]);
        requests.pause();
        let [kicks, noticed] = counts();
        assert_eq!(
            (kicks, noticed),
            (1, 1),
            "however often the signal was sent"
        );
        requests.stop();
        vp.join().unwrap();
        assert_eq!(counts()[0], kicks, "one that waits needs no kick");
    }

    #[test]
    fn a_paused_vp_does_not_run_until_resumed_and_can_be_stopped() {
        install_kick_handler().unwrap();
        let requests = Arc::new(Requests::default());
        let runs = Arc::<AtomicU64>::default();
        let vp = sleeper(Arc::clone(&requests), Arc::clone(&runs));
        while runs.load(Ordering::Relaxed) == 0 {
            thread::yield_now();
        }
        requests.pause();
        let paused_at = runs.load(Ordering::Relaxed);
        thread::sleep(Duration::from_millis(10));
        assert_eq!(runs.load(Ordering::Relaxed), paused_at);
        requests.resume();
        while runs.load(Ordering::Relaxed) == paused_at {
            thread::yield_now();
        }
        requests.pause();
        requests.stop();
        vp.join().unwrap();
        requests.pause();
        requests.stop();
    }
}
