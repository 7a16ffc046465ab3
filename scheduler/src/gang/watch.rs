//! Watching the others: a VM that is held back when it should not be, because whoever should let it go does not, ends the turns
//! for everybody. Plain placement is what is left then, until the next common moment to try again.

use std::{fs::File, os::unix::fs::FileExt, path::PathBuf};

use super::turns::Turns;

/// Quanta that somebody may be in the wrong state without moving.
const PATIENCE: u32 = 3;

/// Everybody tries again at multiples of so many quanta.
const AGAIN: u64 = 256;

/// The state of the others, as far as it can be read.
#[derive(Default)]
pub(super) struct Watch {
    others: Vec<Other>,
    suspended_until: u64,
}

struct Other {
    index: usize,
    idle: File,
    /// As it was seen last.
    last: Option<bool>,
    /// Quanta it was wrong in since it last moved, and rightly.
    missed: u32,
}

impl Watch {
    /// Watches the contenders with these indices through these `cpu.idle` files; those that cannot be opened are trusted.
    pub(super) fn new(others: impl Iterator<Item = (usize, PathBuf)>) -> Self {
        Self {
            others: others
                .filter_map(|(index, path)| {
                    Some(Other {
                        index,
                        idle: File::options().read(true).write(true).open(path).ok()?,
                        last: None,
                        missed: 0,
                    })
                })
                .collect(),
            suspended_until: 0,
        }
    }

    /// Is there anybody to watch?
    pub(super) fn is_needed(&self) -> bool {
        !self.others.is_empty()
    }

    /// Is everybody to be normal in quantum `epoch`?
    pub(super) fn is_suspended(&self, epoch: u64) -> bool {
        epoch < self.suspended_until
    }

    /// Looks at the others, in the middle of quantum `epoch`: at its ends some are early and some late.
    pub(super) fn look(&mut self, turns: &Turns, epoch: u64) {
        for other in &mut self.others {
            let held_back = !turns.row(epoch)[other.index];
            let is = is_idle(&other.idle);
            if is.is_some_and(|is| is != held_back) {
                other.missed += 1;
            } else if is != other.last {
                other.missed = 0;
            }
            other.last = is;
        }
        if self.others.iter().all(|other| other.missed < PATIENCE) {
            return;
        }
        for other in self.others.iter_mut().filter(|other| other.missed > 0) {
            // Nobody else may be there to do it.
            let _ = other.idle.write_all_at(b"0", 0);
            other.missed = 0;
        }
        self.suspended_until = (epoch + AGAIN / 2).next_multiple_of(AGAIN);
    }
}

fn is_idle(file: &File) -> Option<bool> {
    let mut byte = [0; 1];
    match file.read_at(&mut byte, 0) {
        Ok(1) => Some(byte[0] == b'1'),
        _ => None,
    }
}
