//! How often something took how long: eight buckets for each power of two, in 4 KiB, written by one thread without locks.

use std::{
    collections::BTreeMap,
    fmt,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use serde::{Deserialize, Serialize};

/// Buckets within a power of two.
const STEPS: usize = 8;

const BUCKETS: usize = (64 - 3 + 1) * STEPS;

/// A histogram of times, in whatever unit is recorded. A bucket is an eighth of a power of two wide, so what is read off it is at
/// most that much too high.
pub struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    sum: AtomicU64,
    max: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: [const { AtomicU64::new(0) }; BUCKETS],
            sum: AtomicU64::new(0),
            max: AtomicU64::new(0),
        }
    }
}

impl fmt::Debug for Histogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.latency(1.0).fmt(f)
    }
}

/// Below 8 each value has its own bucket; above, the three bits after the first say which eighth it is.
fn bucket_of(value: u64) -> usize {
    if value < STEPS as u64 {
        return value as usize;
    }
    let power = value.ilog2() as usize;
    let eighth = (value >> (power - 3)) as usize & (STEPS - 1);
    (power - 2) * STEPS + eighth
}

/// The highest value in a bucket.
fn top_of(bucket: usize) -> u64 {
    if bucket < STEPS {
        return bucket as u64;
    }
    let (power, eighth) = (bucket / STEPS + 2, (bucket % STEPS) as u64);
    let width = 1u64 << (power - 3);
    ((STEPS as u64 + eighth) << (power - 3)).saturating_add(width - 1)
}

/// Adds to a number only this thread writes.
fn add(number: &AtomicU64, more: u64) {
    number.store(number.load(Relaxed).wrapping_add(more), Relaxed);
}

impl Histogram {
    /// Counts `value`. One thread at a time may.
    pub fn record(&self, value: u64) {
        add(&self.buckets[bucket_of(value)], 1);
        add(&self.sum, value);
        if value > self.max.load(Relaxed) {
            self.max.store(value, Relaxed);
        }
    }

    /// What it amounts to, with each value multiplied by `unit_ns`, which must always be the same or counts would change their places.
    /// What is being recorded meanwhile is in it or not.
    #[must_use]
    pub fn latency(&self, unit_ns: f64) -> Latency {
        let ns = |value: u64| (value as f64 * unit_ns) as u64;
        let mut buckets = BTreeMap::new();
        for (bucket, count) in self.buckets.iter().enumerate() {
            let count = count.load(Relaxed);
            if count > 0 {
                let end = top_of(bucket_of(ns(top_of(bucket))));
                *buckets.entry(end).or_default() += count;
            }
        }
        Latency::of(
            buckets,
            ns(self.sum.load(Relaxed)),
            ns(self.max.load(Relaxed)),
        )
    }
}

/// A histogram summed up, in nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latency {
    /// How many.
    pub count: u64,
    /// All together.
    pub sum_ns: u64,
    /// Half took no longer.
    pub p50_ns: u64,
    /// 99 of 100 took no longer.
    pub p99_ns: u64,
    /// 999 of 1000 took no longer.
    pub p999_ns: u64,
    /// The longest.
    pub max_ns: u64,
    /// Buckets in which there are any: the end of each, eight to a power of two of nanoseconds, and how many are in it.
    pub buckets: BTreeMap<u64, u64>,
}

impl Latency {
    fn of(buckets: BTreeMap<u64, u64>, sum_ns: u64, max_ns: u64) -> Self {
        let count: u64 = buckets.values().sum();
        let at = |share: f64| {
            let rank = ((count as f64 * share).ceil() as u64).max(1);
            let mut seen = 0;
            let reached = buckets.iter().find(|(_, count)| {
                seen += **count;
                seen >= rank
            });
            reached.map_or(0, |(end, _)| (*end).min(max_ns))
        };
        Self {
            count,
            sum_ns,
            p50_ns: at(0.5),
            p99_ns: at(0.99),
            p999_ns: at(0.999),
            max_ns,
            buckets,
        }
    }

    /// With those of an earlier life.
    pub(super) fn add(&mut self, before: &Self) {
        let mut buckets = std::mem::take(&mut self.buckets);
        for (end, count) in &before.buckets {
            *buckets.entry(*end).or_default() += count;
        }
        *self = Self::of(
            buckets,
            self.sum_ns + before.sum_ns,
            self.max_ns.max(before.max_ns),
        );
    }

    /// How many certainly took no longer than `ns`.
    pub(super) fn within(&self, ns: u64) -> u64 {
        self.buckets.range(..=ns).map(|(_, count)| count).sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn quantiles_are_an_eighth_too_high_at_most() {
        let histogram = Histogram::default();
        for value in 1..=1000 {
            histogram.record(value);
        }
        let latency = histogram.latency(1.0);
        assert_eq!((latency.count, latency.max_ns), (1000, 1000));
        assert_eq!(latency.sum_ns, 500_500);
        assert!((500..=562).contains(&latency.p50_ns), "{latency:?}");
        assert!((990..=1000).contains(&latency.p99_ns), "{latency:?}");
        assert_eq!(latency.buckets.values().sum::<u64>(), 1000);
        assert_eq!(Histogram::default().latency(1.0), Latency::default());
    }

    #[test]
    fn two_lives_are_one_histogram() {
        let (first, second, both) = (
            Histogram::default(),
            Histogram::default(),
            Histogram::default(),
        );
        for value in 1..=1000 {
            let life = if value % 3 == 0 { &first } else { &second };
            life.record(value);
            both.record(value);
        }
        let mut sum = second.latency(0.4);
        sum.add(&first.latency(0.4));
        // Sums are rounded once each.
        sum.sum_ns = both.latency(0.4).sum_ns;
        assert_eq!(sum, both.latency(0.4));
        assert_eq!((sum.within(0), sum.within(u64::MAX)), (2, 1000));
    }

    #[test]
    fn it_fits_4_kib() {
        assert!(size_of::<Histogram>() <= 4096);
    }

    proptest! {
        #[test]
        fn every_value_has_its_bucket(value: u64) {
            let bucket = bucket_of(value);
            prop_assert!(value <= top_of(bucket));
            prop_assert!(bucket == 0 || value > top_of(bucket - 1));
            prop_assert!(top_of(bucket) - value <= value / 8);
        }
    }
}
