//! `HV_REGISTER_VP_RUNTIME`: how long a VP has run, in units of 100 ns.
//!
//! It is the CPU time of the thread that runs the VP, as KVM has it for the guest's own MSR: where the hypervisor schedules that
//! thread does nothing else; elsewhere it is the client's, and what the client does between two `RUN_VP` counts too.

use std::cell::Cell;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, PoisonError};

/// Nanoseconds in a unit of the register.
const UNIT_NS: u64 = 100;

/// The run time of one VP.
#[derive(Default)]
pub(super) struct RunTime {
    /// The thread that runs the VP, or did last; 0 before.
    thread: AtomicI32,
    account: Mutex<Account>,
}

#[derive(Default)]
struct Account {
    /// What has been counted up to `since_ns`.
    counted_ns: u64,
    /// CPU time of the thread up to which it has been counted.
    since_ns: u64,
}

impl Account {
    /// Counts what `thread` has run since the last time. One that has ended adds nothing.
    fn count(&mut self, thread: i32) {
        if let Some(now) = cpu_time_ns(thread) {
            self.counted_ns += now.saturating_sub(self.since_ns);
            self.since_ns = now;
        }
    }
}

impl RunTime {
    /// The calling thread runs the VP from now on.
    pub(super) fn runs_here(&self) {
        let own = own_thread();
        if self.thread.load(Ordering::Relaxed) == own {
            return;
        }
        let mut account = self.account.lock().unwrap_or_else(PoisonError::into_inner);
        account.count(self.thread.swap(own, Ordering::Relaxed));
        account.since_ns = cpu_time_ns(own).unwrap_or_default();
    }

    /// The register.
    pub(super) fn units(&self) -> u64 {
        let mut account = self.account.lock().unwrap_or_else(PoisonError::into_inner);
        account.count(self.thread.load(Ordering::Relaxed));
        account.counted_ns / UNIT_NS
    }

    /// Sets the register: a VP is restored.
    pub(super) fn set(&self, units: u64) {
        let mut account = self.account.lock().unwrap_or_else(PoisonError::into_inner);
        account.count(self.thread.load(Ordering::Relaxed));
        account.counted_ns = units.saturating_mul(UNIT_NS);
    }
}

/// The calling thread, without a system call for each `RUN_VP`.
fn own_thread() -> i32 {
    thread_local! {
        static OWN: Cell<i32> = const { Cell::new(0) };
    }
    if OWN.get() == 0 {
        // SAFETY: takes no arguments.
        OWN.set(unsafe { libc::gettid() });
    }
    OWN.get()
}

/// The CPU time of a thread of this process, while it lives.
fn cpu_time_ns(thread: i32) -> Option<u64> {
    if thread == 0 {
        return None;
    }
    // The clock of a thread, by its number: three bits say so.
    let clock = (!thread) << 3 | 0b110;
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes the time, or says that there is no such thread.
    let told = unsafe { libc::clock_gettime(clock, &raw mut time) } == 0;
    told.then_some((time.tv_sec * 1_000_000_000 + time.tv_nsec) as u64)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn spin(time: Duration) {
        let begun = cpu_time_ns(own_thread()).unwrap();
        let wall = Instant::now();
        while cpu_time_ns(own_thread()).unwrap() - begun < time.as_nanos() as u64 {
            assert!(wall.elapsed() < Duration::from_secs(20));
        }
    }

    #[test]
    fn threads_that_take_over_go_on_from_what_was_counted() {
        const PART: Duration = Duration::from_millis(20);
        let time = RunTime::default();
        assert_eq!(time.units(), 0, "no thread has run it");
        spin(PART);
        time.runs_here();
        spin(PART);
        let first = time.units();
        let least = PART.as_nanos() as u64 / UNIT_NS;
        assert!(first >= least, "{first}");
        assert!(
            first < 2 * least,
            "what it did before is not the VP's: {first}"
        );
        std::thread::scope(|scope| {
            scope.spawn(|| {
                time.runs_here();
                spin(PART);
                assert!(time.units() >= 2 * least);
            });
        });
        let after = time.units();
        assert!(after >= first, "a thread that has ended takes nothing away");
        spin(PART);
        assert_eq!(time.units(), after, "this thread runs it no more");
        time.set(7);
        assert_eq!(time.units(), 7);
    }
}
