//! Background slots: memory nobody may touch, wherever the client mapped nothing.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::{Layout, Memory, Region};
use crate::errno::Errno;

/// The LAPIC page stays out: KVM answers it itself.
const LAPIC: Range<u64> = 0xfee0_0000..0xfee0_1000;

/// The largest piece one slot covers; KVM takes a little less than 8 TiB.
const LARGEST: u64 = 1 << 42;

/// Above this width the bookkeeping KVM keeps per slot would cost more than it is worth.
const WIDEST: u8 = 46;

/// How much space is covered behind the last region, and below the end of all space. That is where VMMs put
/// devices. KVM before Linux 6.6 may keep two bytes for every page of a slot, so the vast middle stays bare: there a store is
/// reported after KVM has emulated it.
const MARGIN: u64 = 4 << 30;

/// One background slot.
pub(super) struct Piece {
    range: Range<u64>,
    slot: u32,
}

/// Where background ends for guest-physical addresses of `physical_bits` bits.
pub(super) fn end(physical_bits: u8) -> u64 {
    1 << physical_bits.min(WIDEST)
}

/// The host address of `len` bytes nobody may touch. One reservation serves all slots of all partitions: it has no pages.
fn reservation(len: u64) -> Result<u64, Errno> {
    static RESERVATION: OnceLock<Result<u64, Errno>> = OnceLock::new();
    *RESERVATION.get_or_init(|| {
        // SAFETY: a new anonymous mapping at an address of the kernel's choice.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len as usize,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if address == libc::MAP_FAILED {
            Err(Errno::last())
        } else {
            Ok(address as u64)
        }
    })
}

/// What `taken` (in order, without overlap) leaves of `0..end`, in pieces of at most `largest` bytes.
fn complement(taken: impl Iterator<Item = Range<u64>>, end: u64, largest: u64) -> Vec<Range<u64>> {
    let mut pieces = Vec::new();
    let mut at = 0;
    for next in taken.chain(std::iter::once(end..end)) {
        let stop = next.start.min(end);
        while at < stop {
            let piece = at..stop.min(at + largest);
            at = piece.end;
            pieces.push(piece);
        }
        at = at.max(next.end);
    }
    pieces
}

/// What stays bare between the space around memory that ends at `ram_end` and the space below `end`.
fn middle(ram_end: u64, end: u64) -> Option<Range<u64>> {
    const GIB4: u64 = 4 << 30;
    let start = ram_end.max(1).next_multiple_of(GIB4) + MARGIN;
    let stop = end.saturating_sub(MARGIN);
    (start < stop).then_some(start..stop)
}

impl Memory {
    /// Removes the background slots that meet `start..end`; what they covered beyond it is laid again before the
    /// next VP runs.
    pub(super) fn remove_background(
        &self,
        layout: &mut Layout,
        start: u64,
        end: u64,
    ) -> Result<(), Errno> {
        let mut index = 0;
        while index < layout.background.len() {
            let piece = &layout.background[index];
            if piece.range.start < end && start < piece.range.end {
                self.set_slot(piece.slot, 0, piece.range.start, 0, 0)?;
                let piece = layout.background.swap_remove(index);
                layout.free_slots.push(piece.slot);
                self.stale.store(true, Ordering::Release);
            } else {
                index += 1;
            }
        }
        Ok(())
    }

    /// Covers every hole. VPs are stopped.
    pub(super) fn lay_background(&self) -> Result<(), Errno> {
        let Some(end) = self.background_end else {
            return Ok(());
        };
        let host = reservation(end.min(LARGEST))?;
        let mut layout = self.layout.write().unwrap_or_else(PoisonError::into_inner);
        let mut taken: Vec<Range<u64>> = layout
            .regions
            .iter()
            .map(|region| region.gpa..region.end())
            .collect();
        taken.extend(layout.background.iter().map(|piece| piece.range.clone()));
        taken.push(LAPIC);
        taken.extend(middle(layout.regions.last().map_or(0, Region::end), end));
        taken.sort_unstable_by_key(|range| range.start);
        for range in complement(taken.into_iter(), end, LARGEST) {
            let slot = layout.take_slot();
            if let Err(errno) = self.set_slot(slot, 0, range.start, range.end - range.start, host) {
                layout.free_slots.push(slot);
                return Err(errno);
            }
            layout.background.push(Piece { range, slot });
        }
        self.stale.store(false, Ordering::Release);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_complement_and_what_is_taken_cover_everything_once() {
        let taken = [0x1000..0x3000, 0x3000..0x4000, 0x8000..0x9000];
        let pieces = complement(taken.iter().cloned(), 0x10_000, 0x4000);
        assert_eq!(
            pieces,
            [0..0x1000, 0x4000..0x8000, 0x9000..0xd000, 0xd000..0x10_000]
        );
    }

    #[test]
    fn the_middle_of_a_wide_space_stays_bare() {
        const GIB: u64 = 1 << 30;
        assert_eq!(middle(6 * GIB, 1 << 40), Some(12 * GIB..1020 * GIB));
        assert_eq!(middle(0, 1 << 36), Some(8 * GIB..60 * GIB));
        assert_eq!(middle(56 * GIB, 1 << 36), None);
    }

    #[test]
    fn nothing_is_laid_over_regions_beyond_the_end() {
        let laid = |taken| complement(std::iter::once(taken), 0x4000, 0x1000);
        assert_eq!(laid(0x1000..0x9000), std::slice::from_ref(&(0..0x1000)));
        assert_eq!(laid(0x5000..0x6000).len(), 4);
    }
}
