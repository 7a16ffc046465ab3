//! Which blocks of a region are plugged.

use std::ops::Range;

use super::{
    BLOCK,
    request::{Blocks, Plugged},
};

/// A region of memory in blocks.
pub(super) struct Region {
    start: u64,
    plugged: Vec<bool>,
    count: u64,
}

impl Region {
    /// `length` bytes at `start`, with nothing plugged. Both are multiples of [`BLOCK`].
    pub(super) fn new(start: u64, length: u64) -> Self {
        Self {
            start,
            plugged: vec![false; (length / BLOCK) as usize],
            count: 0,
        }
    }

    pub(super) fn start(&self) -> u64 {
        self.start
    }

    pub(super) fn length(&self) -> u64 {
        self.plugged.len() as u64 * BLOCK
    }

    /// Bytes that are plugged.
    pub(super) fn plugged(&self) -> u64 {
        self.count * BLOCK
    }

    /// The blocks by number; `None` where there are no such ones.
    pub(super) fn find(&self, blocks: Blocks) -> Option<Range<usize>> {
        let offset = blocks.address.checked_sub(self.start)?;
        if !offset.is_multiple_of(BLOCK) || blocks.count == 0 {
            return None;
        }
        let first = usize::try_from(offset / BLOCK).ok()?;
        let end = first.checked_add(blocks.count.into())?;
        (end <= self.plugged.len()).then_some(first..end)
    }

    pub(super) fn state(&self, range: Range<usize>) -> Plugged {
        let count = range.len();
        let plugged = self.plugged[range].iter().filter(|plugged| **plugged);
        match plugged.count() {
            0 => Plugged::None,
            all if all == count => Plugged::All,
            _ => Plugged::Some,
        }
    }

    pub(super) fn set(&mut self, range: Range<usize>, plugged: bool) {
        for block in &mut self.plugged[range] {
            if *block != plugged {
                *block = plugged;
                if plugged {
                    self.count += 1;
                } else {
                    self.count -= 1;
                }
            }
        }
    }

    pub(super) fn clear(&mut self) {
        self.set(0..self.plugged.len(), false);
    }
}
