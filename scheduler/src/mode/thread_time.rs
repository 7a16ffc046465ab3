//! What became of a thread's time: it ran, it waited for a CPU, or neither. Each thread asks about itself, at moments when it
//! runs: only then has the kernel everything accounted for.

use std::{
    fs::File,
    mem,
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};

/// The calling thread's times up to a moment.
#[derive(Debug)]
pub(super) struct Stopwatch {
    /// Kept open: reading again is cheaper.
    schedstat: Option<File>,
    begun: Instant,
    run: Duration,
    wait: Option<Duration>,
}

/// Where the time went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Times {
    /// All of it.
    pub(super) wall: Duration,
    /// On a CPU.
    pub(super) run: Duration,
    /// Ready to run, without a CPU; `None` where the kernel does not count that.
    pub(super) wait: Option<Duration>,
}

impl Stopwatch {
    /// From now on.
    pub(super) fn start() -> Self {
        let schedstat = File::open("/proc/thread-self/schedstat").ok();
        let wait = schedstat.as_ref().and_then(waited);
        Self {
            schedstat,
            begun: Instant::now(),
            run: cpu_time(),
            wait,
        }
    }

    /// Since the start, on the thread that started it.
    pub(super) fn read(&self) -> Times {
        let wait = self.schedstat.as_ref().and_then(waited);
        Times {
            wall: self.begun.elapsed(),
            run: cpu_time().saturating_sub(self.run),
            wait: wait
                .zip(self.wait)
                .map(|(now, then)| now.saturating_sub(then)),
        }
    }

    /// How long the thread has waited for a CPU, as far as the kernel counts that.
    pub(super) fn wait(&self) -> Duration {
        self.schedstat.as_ref().and_then(waited).unwrap_or_default()
    }
}

impl Times {
    /// A time as a share of all of it.
    pub(super) fn share(&self, part: Duration) -> f64 {
        if self.wall.is_zero() {
            return 0.0;
        }
        part.as_secs_f64() / self.wall.as_secs_f64()
    }
}

fn cpu_time() -> Duration {
    // SAFETY: an all-zero time is a valid one, and the call fills it in.
    let time = unsafe {
        let mut time: libc::timespec = mem::zeroed();
        libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time);
        time
    };
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// The second number of "run wait slices", in nanoseconds.
fn waited(schedstat: &File) -> Option<Duration> {
    let mut text = [0; 128];
    let length = schedstat.read_at(&mut text, 0).ok()?;
    let text = std::str::from_utf8(&text[..length]).ok()?;
    let nanos = text.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Some(Duration::from_nanos(nanos))
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn sleeping_and_running_are_told_apart() {
        let watch = Stopwatch::start();
        thread::sleep(Duration::from_millis(30));
        let asleep = watch.read();
        assert!(asleep.share(asleep.run) < 0.2, "{asleep:?}");
        let watch = Stopwatch::start();
        while watch.begun.elapsed() < Duration::from_millis(30) {}
        let awake = watch.read();
        assert!(
            awake.run > Duration::ZERO && awake.run <= awake.wall,
            "{awake:?}"
        );
    }
}
