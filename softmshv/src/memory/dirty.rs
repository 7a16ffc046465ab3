//! Which pages the guest wrote: the dirty bits behind `MSHV_GET_GPAP_ACCESS_BITMAP`.
//!
//! KVM's log forgets when it is read, the hypervisor's bits stay until they are cleared. So what KVM logged is
//! gathered into bits of our own.

use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Layout, Memory, PAGE, Region};
use crate::errno::{Errno, HvStatus};

/// What to do with the bits of a range after reading them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AccessOp {
    /// Leave them.
    Keep,
    /// Clear them.
    Clear,
    /// Set them.
    Set,
}

/// One bit per page of a region.
pub(super) struct PageBits {
    written: Vec<AtomicU64>,
    /// Pages whose bit a client has cleared and not set again.
    cleared: Vec<AtomicU64>,
}

fn words(pages: u64) -> Vec<AtomicU64> {
    (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect()
}

fn set(bits: &[AtomicU64], index: u64, value: bool) {
    let (word, bit) = (&bits[(index / 64) as usize], 1 << (index % 64));
    if value {
        word.fetch_or(bit, Ordering::Relaxed);
    } else {
        word.fetch_and(!bit, Ordering::Relaxed);
    }
}

impl PageBits {
    pub(super) fn new(pages: u64) -> Self {
        Self {
            written: words(pages),
            cleared: words(pages),
        }
    }

    /// Marks the pages of the region at `base` that `gpa..gpa + len` touches.
    pub(super) fn mark(&self, base: u64, gpa: u64, len: u64) {
        let end = base + self.written.len() as u64 * 64 * PAGE;
        let (start, stop) = (gpa.max(base), (gpa + len).min(end));
        if start < stop {
            for page in (start - base) / PAGE..=(stop - 1 - base) / PAGE {
                set(&self.written, page, true);
            }
        }
    }

    fn take(&self, page: u64, op: AccessOp) -> bool {
        let dirty =
            self.written[(page / 64) as usize].load(Ordering::Relaxed) >> (page % 64) & 1 != 0;
        if op != AccessOp::Keep {
            set(&self.written, page, op == AccessOp::Set);
            set(&self.cleared, page, op == AccessOp::Clear);
        }
        dirty
    }
}

impl Memory {
    /// Whether writes are tracked (`HV_PARTITION_PROPERTY_GPA_PAGE_ACCESS_TRACKING`).
    pub(crate) fn is_tracking(&self) -> bool {
        self.layout
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .tracking
    }

    /// Turns tracking of writes on or off.
    ///
    /// # Errors
    /// Off while pages a client cleared have not been set again: the hypervisor refuses that.
    pub(crate) fn set_tracking(&self, on: bool) -> Result<(), HvStatus> {
        let mut layout = self.layout.write().unwrap_or_else(PoisonError::into_inner);
        if layout.tracking == on {
            return Ok(());
        }
        let still_cleared = |region: &Region| {
            region.dirty.as_ref().is_some_and(|bits| {
                bits.cleared
                    .iter()
                    .any(|word| word.load(Ordering::Relaxed) != 0)
            })
        };
        if layout.regions.iter().any(still_cleared) {
            return Err(HvStatus::OPERATION_DENIED);
        }
        layout.tracking = on;
        for region in &mut layout.regions {
            let (backing, flags) = region.backing(on);
            self.set_slot(region.slot, flags, region.gpa, region.size, backing)
                .map_err(|_| HvStatus::INVALID_PARTITION_STATE)?;
            region.dirty = on.then(|| PageBits::new(region.size / PAGE));
        }
        Ok(())
    }

    /// Adds what KVM logged since the last time to the bits of `region`.
    fn gather(&self, region: &Region) -> Result<(), Errno> {
        let Some(bits) = &region.dirty else {
            return Ok(());
        };
        let size = usize::try_from(region.size).map_err(|_| Errno(libc::EINVAL))?;
        let log = self.vm.get_dirty_log(region.slot, size)?;
        for (word, new) in bits.written.iter().zip(log) {
            if new != 0 {
                word.fetch_or(new, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// The dirty bits of `count` pages from page number `base`, one bit per page, and `op` done to them.
    ///
    /// # Errors
    /// `EINVAL` when a page is unmapped, `EIO` when tracking is off: what the driver makes of the hypervisor's
    /// answers.
    pub(crate) fn dirty_bitmap(
        &self,
        base: u64,
        count: u64,
        op: AccessOp,
    ) -> Result<Vec<u8>, Errno> {
        let layout = self.layout.read().unwrap_or_else(PoisonError::into_inner);
        if !layout.tracking {
            return Err(Errno(libc::EIO));
        }
        let start = base.checked_mul(PAGE).ok_or(Errno(libc::EINVAL))?;
        let end = count
            .checked_mul(PAGE)
            .and_then(|len| start.checked_add(len))
            .ok_or(Errno(libc::EINVAL))?;
        if !covered(&layout, start, end) {
            return Err(Errno(libc::EINVAL));
        }
        let mut bitmap = vec![0u8; count.div_ceil(8) as usize];
        for region in layout
            .regions
            .iter()
            .filter(|r| r.gpa < end && start < r.end())
        {
            self.gather(region)?;
            let Some(bits) = &region.dirty else { continue };
            for gpa in (start.max(region.gpa)..end.min(region.end())).step_by(PAGE as usize) {
                if bits.take((gpa - region.gpa) / PAGE, op) {
                    let index = (gpa - start) / PAGE;
                    bitmap[(index / 8) as usize] |= 1 << (index % 8);
                }
            }
        }
        Ok(bitmap)
    }
}

/// Whether regions cover all of `start..end`.
fn covered(layout: &Layout, start: u64, end: u64) -> bool {
    let mut at = start;
    while at < end {
        match layout.at(at) {
            Some(region) => at = region.end(),
            None => return false,
        }
    }
    true
}
