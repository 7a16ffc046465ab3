//! What adaptive gangs are judged by where nobody knows the guest: how often it tells the hypervisor that it spins for long.
//!
//! A guest that knows the hypervisor calls it when a lock was not to be had for as many tries as CPUID allows it, which is what happens
//! when the vCPU that has the lock is not running. Less of that with turns than without is what turns are for. A guest that does not know
//! the hypervisor never calls, and turns stay off.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{hypervisor::VpStats, vp::VpMeter};
use crate::GangSignal;

/// May this process read the hypervisor's counters at all, below `debugfs`?
pub(super) fn are_counted(debugfs: &Path) -> bool {
    fs::read_dir(debugfs.join("mshv/partition")).is_ok()
}

/// The hypervisor's counters of all VPs of one VM.
pub(super) struct LongSpins {
    vps: Vec<Arc<VpMeter>>,
    debugfs: PathBuf,
    partition: Option<u64>,
    /// In the order of the VPs; none before the partition's id is known.
    stats: Vec<VpStats>,
}

impl LongSpins {
    pub(super) fn new(vps: Vec<Arc<VpMeter>>, debugfs: PathBuf, partition: Option<u64>) -> Self {
        Self {
            vps,
            debugfs,
            partition,
            stats: Vec::new(),
        }
    }

    /// The files, as soon as the first VP has told which they are.
    fn open(&mut self) -> Option<()> {
        let told = || self.vps.iter().find_map(|vp| vp.partition());
        let partition = self.partition.or_else(told)?;
        let open = |vp| VpStats::open(&self.debugfs, partition, vp).ok();
        self.stats = (0..self.vps.len() as u32)
            .map(open)
            .collect::<Option<_>>()?;
        Some(())
    }
}

impl GangSignal for LongSpins {
    fn progress(&mut self) -> Option<u64> {
        None
    }

    /// Of all VPs together. Half an answer is none: what one VP waits for, another has.
    fn spins(&mut self) -> Option<u64> {
        if self.stats.is_empty() {
            self.open()?;
        }
        let mut buffer = Vec::new();
        self.stats
            .iter()
            .map(|stats| stats.read(&mut buffer)?.long_spins)
            .sum()
    }
}
