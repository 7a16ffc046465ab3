//! What the guest says of its memory (virtio 1.3, section 5.5.6.3).

use crate::virtio::Buffers;

/// Bytes of one statistic in the guest's buffer: a tag and a value, packed.
const ENTRY: usize = 10;
/// The most statistics that are looked at.
const MOST_ENTRIES: usize = 64;

/// A number that the guest keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Statistic {
    /// Bytes swapped in.
    SwapIn,
    /// Bytes swapped out.
    SwapOut,
    /// Page faults that needed I/O.
    MajorFaults,
    /// Page faults that did not.
    MinorFaults,
    /// Bytes that are used for nothing.
    Free,
    /// Bytes that there are.
    Total,
    /// Bytes that could be had without swapping.
    Available,
    /// Bytes that can be taken from caches.
    Caches,
    /// Huge pages allocated.
    HugePages,
    /// Huge pages that could not be.
    HugePageFailures,
    /// Processes killed for want of memory.
    OomKills,
    /// Allocations that had to wait.
    AllocationStalls,
    /// Pages scanned in the background.
    BackgroundScans,
    /// Pages scanned by who wanted memory.
    DirectScans,
    /// Pages reclaimed in the background.
    BackgroundReclaims,
    /// Pages reclaimed by who wanted memory.
    DirectReclaims,
}

/// By tag.
const ALL: [Statistic; 16] = [
    Statistic::SwapIn,
    Statistic::SwapOut,
    Statistic::MajorFaults,
    Statistic::MinorFaults,
    Statistic::Free,
    Statistic::Total,
    Statistic::Available,
    Statistic::Caches,
    Statistic::HugePages,
    Statistic::HugePageFailures,
    Statistic::OomKills,
    Statistic::AllocationStalls,
    Statistic::BackgroundScans,
    Statistic::DirectScans,
    Statistic::BackgroundReclaims,
    Statistic::DirectReclaims,
];

/// What the guest has said at one time. It may say anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics([Option<u64>; ALL.len()]);

impl Statistics {
    /// What it has said of `statistic`, if anything.
    #[must_use]
    pub fn get(&self, statistic: Statistic) -> Option<u64> {
        self.0[statistic as usize]
    }

    /// All that it has said.
    pub fn iter(&self) -> impl Iterator<Item = (Statistic, u64)> {
        ALL.into_iter()
            .zip(self.0)
            .filter_map(|(statistic, value)| Some((statistic, value?)))
    }

    pub(super) fn read(buffers: &Buffers) -> Self {
        let mut all = Self::default();
        for index in 0..MOST_ENTRIES {
            let Some([low, high, value @ ..]) = buffers.array_at::<ENTRY>(ENTRY * index) else {
                break;
            };
            let tag = usize::from(u16::from_le_bytes([low, high]));
            let value = u64::from_le_bytes(value);
            // The guest says -1 of what it does not know.
            if let Some(place) = all.0.get_mut(tag) {
                *place = (value != u64::MAX).then_some(value);
            }
        }
        all
    }
}
