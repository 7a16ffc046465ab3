//! What a device has done since it was made, as its threads count it.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// Something that has counted.
pub trait Counted: Send + Sync {
    /// Each count with its name, as it is now. None ever falls.
    fn counts(&self) -> Vec<(&'static str, u64)>;
}

/// Counts of `N` kinds, in a [`Lane`] for each thread, so that threads do not wait for each other.
pub struct Counters<const N: usize> {
    names: [&'static str; N],
    lanes: Vec<Arc<Lane<N>>>,
}

/// The counts of one thread.
#[repr(align(64))]
pub struct Lane<const N: usize>([AtomicU64; N]);

impl<const N: usize> Lane<N> {
    fn new() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }

    /// So many more of `kind`. Only one thread at a time does this.
    pub fn add(&self, kind: usize, more: u64) {
        let count = &self.0[kind];
        let sum = count.load(Ordering::Relaxed).wrapping_add(more);
        count.store(sum, Ordering::Relaxed);
    }
}

impl<const N: usize> Counters<N> {
    /// Nothing yet, for so many threads.
    #[must_use]
    pub fn new(names: [&'static str; N], threads: usize) -> Self {
        Self {
            names,
            lanes: (0..threads).map(|_| Arc::new(Lane::new())).collect(),
        }
    }

    /// The counts of the thread with this number.
    #[must_use]
    pub fn lane(&self, thread: usize) -> Arc<Lane<N>> {
        Arc::clone(&self.lanes[thread])
    }
}

impl<const N: usize> Counted for Counters<N> {
    fn counts(&self) -> Vec<(&'static str, u64)> {
        let sum = |kind: usize| {
            let counts = self.lanes.iter().map(|lane| &lane.0[kind]);
            counts.fold(0, |sum: u64, count| {
                sum.wrapping_add(count.load(Ordering::Relaxed))
            })
        };
        let named = self.names.iter().enumerate();
        named.map(|(kind, name)| (*name, sum(kind))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counts_of_all_threads_are_one_sum() {
        let counters = Counters::new(["bytes", "frames"], 2);
        counters.lane(0).add(0, 5);
        counters.lane(1).add(0, 7);
        counters.lane(1).add(1, 1);
        assert_eq!(counters.counts(), [("bytes", 12), ("frames", 1)]);
    }
}
