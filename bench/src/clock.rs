//! Time: of the machine, of threads, and that others took.

use std::{fs, hint::black_box, io, time::Duration};

/// The monotonic clock, in nanoseconds: the same in every process.
pub(crate) fn now_ns() -> u64 {
    read(libc::CLOCK_MONOTONIC)
}

/// What this process has used of CPUs, in nanoseconds.
pub(crate) fn process_ns() -> u64 {
    read(libc::CLOCK_PROCESS_CPUTIME_ID)
}

/// What this thread has used of CPUs, in nanoseconds.
pub(crate) fn thread_ns() -> u64 {
    read(libc::CLOCK_THREAD_CPUTIME_ID)
}

fn read(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes a time on the stack.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// What a thread of this process has run, in nanoseconds; 0 if it is gone.
pub(crate) fn run_ns(tid: i32) -> u64 {
    fs::read_to_string(format!("/proc/self/task/{tid}/schedstat"))
        .ok()
        .and_then(|text| text.split(' ').next()?.parse().ok())
        .unwrap_or(0)
}

/// The same of all threads of a name.
pub(crate) fn run_ns_named(name: &str) -> u64 {
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten();
    tasks
        .flatten()
        .filter(|task| {
            fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim_end() == name)
        })
        .filter_map(|task| task.file_name().to_str()?.parse().ok())
        .map(run_ns)
        .sum()
}

/// Sleeps until `ns` on the monotonic clock.
pub(crate) fn sleep_until(ns: u64) {
    let time = libc::timespec {
        tv_sec: (ns / 1_000_000_000) as libc::time_t,
        tv_nsec: (ns % 1_000_000_000) as libc::c_long,
    };
    // SAFETY: reads a time on the stack.
    while unsafe {
        libc::clock_nanosleep(
            libc::CLOCK_MONOTONIC,
            libc::TIMER_ABSTIME,
            &raw const time,
            std::ptr::null_mut(),
        )
    } == libc::EINTR
    {}
}

/// Steps of work: nothing but a CPU is needed for them.
pub(crate) fn work(steps: u64) {
    let mut value = steps;
    for _ in 0..steps {
        value = black_box(
            value
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1),
        );
    }
}

/// Steps of [`work`] in a microsecond: the most of many tries, since others may run meanwhile.
pub(crate) fn steps_per_us() -> f64 {
    const STEPS: u64 = 50_000;
    (0..100)
        .map(|_| {
            let begun = now_ns();
            work(STEPS);
            STEPS as f64 * 1e3 / (now_ns() - begun).max(1) as f64
        })
        .fold(0.0, f64::max)
}

/// What the whole machine has done so far, in jiffies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Machine {
    busy: u64,
    steal: u64,
    total: u64,
}

impl Machine {
    pub(crate) fn read() -> io::Result<Self> {
        let text = fs::read_to_string("/proc/stat")?;
        let line = text.lines().next().unwrap_or_default();
        let jiffies: Vec<u64> = line
            .split_whitespace()
            .skip(1)
            .take(8)
            .map(|number| number.parse().unwrap_or(0))
            .collect();
        let of = |index: usize| jiffies.get(index).copied().unwrap_or(0);
        let total: u64 = jiffies.iter().sum();
        Ok(Self {
            busy: total - of(3) - of(4) - of(7),
            steal: of(7),
            total,
        })
    }

    /// The parts of all CPUs' time since `before` that the hypervisor below took, and that others than `own` used.
    pub(crate) fn since(&self, before: &Self, own: Duration) -> (f64, f64) {
        let total = (self.total - before.total).max(1) as f64;
        // SAFETY: takes a number.
        let hertz = unsafe { libc::sysconf(libc::_SC_CLK_TCK) }.max(1) as f64;
        let others = (self.busy - before.busy) as f64 - own.as_secs_f64() * hertz;
        let steal = self.steal.saturating_sub(before.steal) as f64;
        (steal / total, (others / total).max(0.0))
    }
}
