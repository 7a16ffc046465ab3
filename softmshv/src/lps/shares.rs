//! What a partition's properties grant each of its VPs.

/// All of one logical processor, as the properties `CpuCap` and `CpuReserve` count.
pub(crate) const WHOLE: u64 = 0x1_0000;
/// `CpuWeight` unless the client sets another.
pub(crate) const DEFAULT_WEIGHT: u64 = 100;
/// The largest `CpuWeight`.
pub(crate) const MAX_WEIGHT: u64 = 10_000;

/// The scheduling properties of a partition; each counts for every VP of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shares {
    /// Share of what several VPs compete for, against their weights: 1 to [`MAX_WEIGHT`].
    pub(crate) weight: u64,
    /// The most it gets: 1 to [`WHOLE`].
    pub(crate) cap: u64,
    /// What it gets first: 0 to the cap.
    pub(crate) reserve: u64,
}

impl Shares {
    /// Whether there is a limit at all.
    pub(super) fn is_capped(self) -> bool {
        self.cap < WHOLE
    }
}
