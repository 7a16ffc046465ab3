//! Limits to what a guest may ask of the host: operations and bytes per time, as two token buckets.
//!
//! A bucket holds `size` tokens and fills up evenly within `refill_time`; `one_time_burst` tokens on top are there once, for
//! a guest that boots. A request is let through when both buckets have what it costs, and takes from both or from none. One
//! that costs more than a bucket holds is let through by a full bucket, and those behind it pay off the rest: so no request
//! waits for ever, and the rate holds in the long run.
//!
//! All queues of a device share one [`RateLimiter`]. Each of their threads looks through a [`Gate`] of its own, which has a
//! timer to wait for.
//!
//! ```
//! use devices::virtio::rate_limiter::{Bucket, Limits, RateLimiter};
//! use std::time::Duration;
//!
//! let second = Duration::from_secs(1);
//! let limits = Limits {
//!     operations: Some(Bucket { size: 2, one_time_burst: 0, refill_time: second }),
//!     bytes: None,
//! };
//! let mut gate = RateLimiter::new(&limits).gate().unwrap();
//! assert!(gate.admit(1, 4096).unwrap());
//! assert!(gate.admit(1, 4096).unwrap());
//! assert!(!gate.admit(1, 4096).unwrap());
//! assert!(gate.is_closed());
//! ```

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use vmm_sys_util::timerfd::TimerFd;

/// A token bucket as it is configured. One without size or without time to refill limits nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// How many tokens it holds, which is how many it gets in `refill_time`.
    pub size: u64,
    /// How many more there are once, at the start.
    pub one_time_burst: u64,
    /// How long an empty bucket takes to be full.
    pub refill_time: Duration,
}

/// What a device may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Requests, of whatever size.
    pub operations: Option<Bucket>,
    /// Bytes of data.
    pub bytes: Option<Bucket>,
}

/// The limits of one device, or of several; clones share their buckets.
#[derive(Clone, Debug, Default)]
pub struct RateLimiter(Option<Arc<Mutex<Levels>>>);

impl RateLimiter {
    /// A limiter with full buckets.
    #[must_use]
    pub fn new(limits: &Limits) -> Self {
        let now = Instant::now();
        let level = |bucket: Option<Bucket>| bucket.and_then(|bucket| Level::new(bucket, now));
        let levels = Levels {
            operations: level(limits.operations),
            bytes: level(limits.bytes),
        };
        let any = levels.operations.is_some() || levels.bytes.is_some();
        Self(any.then(|| Arc::new(Mutex::new(levels))))
    }

    /// A way through for one thread.
    ///
    /// # Errors
    /// When the host has no more descriptors.
    pub fn gate(&self) -> io::Result<Gate> {
        Ok(Gate {
            levels: self.0.clone(),
            timer: TimerFd::new()?,
            closed: false,
        })
    }
}

/// Lets requests through, or sets a timer for when to try again.
#[derive(Debug)]
pub struct Gate {
    levels: Option<Arc<Mutex<Levels>>>,
    timer: TimerFd,
    closed: bool,
}

impl Gate {
    /// Takes what a request costs, if it is there. Otherwise takes nothing and closes the gate: its timer runs out when it
    /// makes sense to [`reopen`](Gate::reopen) it and ask again.
    ///
    /// # Errors
    /// When the timer cannot be set.
    pub fn admit(&mut self, operations: u64, bytes: u64) -> io::Result<bool> {
        let Some(levels) = &self.levels else {
            return Ok(true);
        };
        let taken = levels.lock().unwrap_or_else(PoisonError::into_inner).take(
            operations,
            bytes,
            Instant::now(),
        );
        let Err(wait) = taken else {
            return Ok(true);
        };
        self.timer.reset(wait, None)?;
        self.closed = true;
        Ok(false)
    }

    /// Whether a request waits for the timer. There is no need to look at the queue meanwhile.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// The timer has run out: requests may be tried again.
    ///
    /// # Errors
    /// When the timer cannot be read.
    pub fn reopen(&mut self) -> io::Result<()> {
        // A timer that has not run out would block.
        if self.closed {
            self.timer.wait()?;
            self.closed = false;
        }
        Ok(())
    }
}

/// The timer: readable when it has run out.
impl AsRawFd for Gate {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}

#[derive(Debug)]
struct Levels {
    operations: Option<Level>,
    bytes: Option<Level>,
}

impl Levels {
    /// Takes from both buckets, or says how long to wait.
    fn take(&mut self, operations: u64, bytes: u64, now: Instant) -> Result<(), Duration> {
        let mut costs = [(&mut self.operations, operations), (&mut self.bytes, bytes)];
        let mut wait = Duration::ZERO;
        for (level, cost) in &mut costs {
            if let Some(level) = level {
                level.refill(now);
                wait = wait.max(level.wait_for(*cost));
            }
        }
        if !wait.is_zero() {
            return Err(wait);
        }
        for (level, cost) in costs {
            if let Some(level) = level {
                level.take(cost);
            }
        }
        Ok(())
    }
}

/// A bucket with what is in it.
///
/// It counts in fractions of a token, `1 / refill_ns`: of these, `size` come in each nanosecond, and nothing is rounded.
#[derive(Debug)]
struct Level {
    size: i128,
    refill_ns: i128,
    burst: u64,
    /// What is in the bucket; below zero, what is owed to it.
    fractions: i128,
    /// When it was filled last.
    filled: Instant,
}

/// The largest size and time to refill that are told apart: products of both fit into an `i128`, also with a cost of 2^64.
const MOST: u128 = 1 << 62;

impl Level {
    fn new(bucket: Bucket, now: Instant) -> Option<Self> {
        let size = u128::from(bucket.size).min(MOST) as i128;
        let refill_ns = bucket.refill_time.as_nanos().min(MOST) as i128;
        (size > 0 && refill_ns > 0).then(|| Self {
            size,
            refill_ns,
            burst: bucket.one_time_burst,
            fractions: size * refill_ns,
            filled: now,
        })
    }

    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.filled);
        let elapsed_ns = elapsed.as_nanos().min(MOST) as i128;
        let full = self.size * self.refill_ns;
        self.fractions = full.min(self.fractions.saturating_add(elapsed_ns * self.size));
        self.filled = self.filled.max(now);
    }

    /// How long until `cost` tokens can be taken; zero when they are there.
    fn wait_for(&self, cost: u64) -> Duration {
        let wanted = i128::from(cost.saturating_sub(self.burst)).min(self.size) * self.refill_ns;
        if wanted == 0 || self.fractions >= wanted {
            return Duration::ZERO;
        }
        let missing = wanted.saturating_sub(self.fractions).unsigned_abs();
        let wait_ns = missing.div_ceil(self.size.unsigned_abs());
        Duration::from_nanos(wait_ns.min(MOST) as u64)
    }

    fn take(&mut self, cost: u64) {
        let from_burst = cost.min(self.burst);
        self.burst -= from_burst;
        self.fractions -= i128::from(cost - from_burst) * self.refill_ns;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn level(size: u64, one_time_burst: u64, refill_time: Duration) -> (Level, Instant) {
        let now = Instant::now();
        let bucket = Bucket {
            size,
            one_time_burst,
            refill_time,
        };
        (Level::new(bucket, now).expect("a limit"), now)
    }

    fn try_take(level: &mut Level, cost: u64, now: Instant) -> Result<(), Duration> {
        level.refill(now);
        let wait = level.wait_for(cost);
        if wait.is_zero() {
            level.take(cost);
            return Ok(());
        }
        Err(wait)
    }

    #[test]
    fn a_bucket_fills_evenly_and_not_over_its_size() {
        let (mut level, start) = level(10, 0, SECOND);
        for _ in 0..10 {
            assert_eq!(try_take(&mut level, 1, start), Ok(()));
        }
        let tenth = SECOND / 10;
        assert_eq!(try_take(&mut level, 1, start), Err(tenth));
        assert_eq!(try_take(&mut level, 3, start), Err(3 * tenth));
        assert_eq!(try_take(&mut level, 3, start + 3 * tenth), Ok(()));
        assert_eq!(try_take(&mut level, 1, start + 3 * tenth), Err(tenth));
        assert_eq!(try_take(&mut level, 10, start + 100 * SECOND), Ok(()));
        assert_eq!(try_take(&mut level, 1, start + 100 * SECOND), Err(tenth));
    }

    #[test]
    fn a_rate_holds_however_often_one_asks() {
        // Three tokens in ten seconds, asked for every millisecond for a hundred.
        let (mut level, start) = level(3, 0, 10 * SECOND);
        let mut taken = 0;
        for millisecond in 0..=100_000 {
            let now = start + Duration::from_millis(millisecond);
            taken += u32::from(try_take(&mut level, 1, now).is_ok());
        }
        assert_eq!(taken, 3 + 30);
    }

    #[test]
    fn the_burst_is_there_once() {
        let (mut level, start) = level(10, 15, SECOND);
        assert_eq!(try_take(&mut level, 12, start), Ok(()));
        assert_eq!(try_take(&mut level, 13, start), Ok(()));
        assert_eq!(try_take(&mut level, 1, start), Err(SECOND / 10));
        assert_eq!(try_take(&mut level, 10, start + SECOND), Ok(()));
        assert_eq!(try_take(&mut level, 1, start + SECOND), Err(SECOND / 10));
    }

    #[test]
    fn what_is_larger_than_the_bucket_passes_and_is_paid_off() {
        let (mut level, start) = level(10, 0, SECOND);
        assert_eq!(try_take(&mut level, 30, start), Ok(()));
        assert_eq!(try_take(&mut level, 1, start), Err(SECOND * 21 / 10));
        assert_eq!(
            try_take(&mut level, 1, start + SECOND * 2),
            Err(SECOND / 10)
        );
        assert_eq!(try_take(&mut level, 30, start + SECOND * 2), Err(SECOND));
        assert_eq!(try_take(&mut level, 30, start + SECOND * 3), Ok(()));
    }

    #[test]
    fn what_costs_nothing_passes_an_empty_bucket() {
        let (mut level, start) = level(1, 0, SECOND);
        assert_eq!(try_take(&mut level, 5, start), Ok(()));
        assert_eq!(try_take(&mut level, 0, start), Ok(()));
    }

    #[test]
    fn a_request_takes_from_both_buckets_or_from_none() {
        let (operations, start) = level(10, 0, SECOND);
        let (bytes, _) = level(100, 0, SECOND);
        let mut levels = Levels {
            operations: Some(operations),
            bytes: Some(Level {
                filled: start,
                ..bytes
            }),
        };
        assert_eq!(levels.take(1, 100, start), Ok(()));
        assert_eq!(levels.take(1, 50, start), Err(SECOND / 2));
        for _ in 0..9 {
            assert_eq!(levels.take(1, 0, start), Ok(()));
        }
        assert_eq!(levels.take(1, 0, start), Err(SECOND / 10));
    }

    #[test]
    fn extremes_do_not_overflow() {
        for (size, burst, nanoseconds) in [
            (u64::MAX, u64::MAX, u64::MAX),
            (1, 0, u64::MAX),
            (u64::MAX, 0, 1),
            (1, 0, 1),
        ] {
            let (mut level, start) = level(size, burst, Duration::from_nanos(nanoseconds));
            for seconds in [0, 1, 1 << 33] {
                for cost in [1, u64::MAX, u64::MAX] {
                    let now = start + Duration::from_secs(seconds);
                    let _ = try_take(&mut level, cost, now);
                    let _ = try_take(&mut level, cost, start);
                }
            }
        }
    }

    #[test]
    fn what_has_no_size_or_time_is_no_limit() {
        let nothing = Bucket {
            size: 0,
            one_time_burst: 5,
            refill_time: SECOND,
        };
        let never = Bucket {
            size: 5,
            one_time_burst: 5,
            refill_time: Duration::ZERO,
        };
        let limiter = RateLimiter::new(&Limits {
            operations: Some(nothing),
            bytes: Some(never),
        });
        let mut gate = limiter.gate().unwrap();
        for _ in 0..100 {
            assert!(gate.admit(1, 1 << 40).unwrap());
        }
    }

    #[test]
    fn gates_share_the_buckets_and_open_again() {
        let limiter = RateLimiter::new(&Limits {
            operations: Some(Bucket {
                size: 2,
                one_time_burst: 0,
                refill_time: Duration::from_millis(20),
            }),
            bytes: None,
        });
        let (mut first, mut second) = (limiter.gate().unwrap(), limiter.clone().gate().unwrap());
        // The second gate cannot be passed until the first has lost its tokens again.
        while first.admit(2, 0).unwrap() {}
        assert!(first.is_closed() && !second.is_closed());
        if second.admit(2, 0).unwrap() {
            assert!(!second.admit(2, 0).unwrap());
        }
        first.reopen().unwrap();
        assert!(!first.is_closed());
        let mut waits = 0;
        while !first.admit(2, 0).unwrap() {
            first.reopen().unwrap();
            waits += 1;
            assert!(waits < 100);
        }
    }
}
