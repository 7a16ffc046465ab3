//! Which writes are done by the thread of the queue itself, and not passed to the kernel's threads.

use std::time::{Duration, Instant};

use crate::virtio::block::{
    backend::{Action, Job},
    image::Cache,
};

/// The most bytes: more are worth a thread.
const MOST_BYTES: u64 = 64 << 10;
/// A write that takes so long has waited for something else than memory.
const SLOW: Duration = Duration::from_millis(1);
/// So many writes are passed on after a slow one: the other requests of the queue are not to wait as well.
const PASSED_ON: u32 = 64;

/// Decides for each job, by how long those before have taken.
pub(super) struct AtOnce {
    cache: Cache,
    /// Writes still to be passed on.
    passed_on: u32,
}

impl AtOnce {
    pub(super) fn new(cache: Cache) -> Self {
        Self {
            cache,
            passed_on: 0,
        }
    }

    /// Whether `job` is to be done at once.
    pub(super) fn takes(&mut self, job: &Job<'_>) -> bool {
        let fits = self.cache == Cache::Buffered
            && job.action == Action::Write
            && job.length <= MOST_BYTES;
        if fits && self.passed_on > 0 {
            self.passed_on -= 1;
            return false;
        }
        fits
    }

    /// Does a job and learns from how long it takes.
    pub(super) fn time<T>(&mut self, job: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = job();
        self.learn(start.elapsed());
        result
    }

    fn learn(&mut self, taken: Duration) {
        if taken >= SLOW {
            self.passed_on = PASSED_ON;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(action: Action, length: u64) -> Job<'static> {
        Job {
            tag: 0,
            action,
            offset: 0,
            length,
            vectors: &[],
        }
    }

    #[test]
    fn short_writes_into_the_page_cache_are_done_at_once() {
        let mut cached = AtOnce::new(Cache::Buffered);
        assert!(cached.takes(&job(Action::Write, MOST_BYTES)));
        assert!(!cached.takes(&job(Action::Write, MOST_BYTES + 1)));
        assert!(!cached.takes(&job(Action::Read, 4096)));
        assert!(!cached.takes(&job(Action::Flush, 0)));
        assert!(!AtOnce::new(Cache::Direct).takes(&job(Action::Write, 4096)));
    }

    #[test]
    fn after_a_slow_write_others_are_passed_on_for_a_while() {
        let mut cached = AtOnce::new(Cache::Buffered);
        cached.learn(SLOW / 2);
        assert!(cached.takes(&job(Action::Write, 512)));
        cached.learn(SLOW);
        for _ in 0..PASSED_ON {
            assert!(!cached.takes(&job(Action::Read, 512)));
            assert!(!cached.takes(&job(Action::Write, 512)));
        }
        assert!(cached.takes(&job(Action::Write, 512)));
    }
}
