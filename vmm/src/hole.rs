//! Makes the kernel put the next mapping at an address that is a multiple of 2 MiB.
//!
//! A guest's memory is mapped by 2 MiB at a time, in the host's page tables and in the nested ones, only where guest and
//! host addresses agree in their lower 21 bits. Linux before 6.7 puts a mapping just below the one before it, wherever that
//! is. A hole of the mapping's very size is where it goes next. Should it go elsewhere, nothing is lost but speed.

use std::ptr::{self, NonNull};

/// Length of a large page in bytes.
const LARGE_PAGE: usize = 2 << 20;

/// A hole in this process's address space, as long as its surroundings live.
pub(crate) struct Hole {
    before: Reserved,
    after: Reserved,
}

impl Hole {
    /// Makes a hole of `length` bytes; none when the address space is too full.
    pub(crate) fn new(length: usize) -> Option<Self> {
        let whole = Reserved::new(length.checked_add(LARGE_PAGE)?)?;
        let start = whole.start.as_ptr().addr();
        let padding = start.next_multiple_of(LARGE_PAGE) - start;
        let (before, rest) = whole.split(padding);
        let (hole, after) = rest.split(length);
        drop(hole);
        Some(Self { before, after })
    }

    /// Closes it, whatever is in it by now.
    pub(crate) fn close(self) {
        drop((self.before, self.after));
    }
}

/// Address space without memory.
struct Reserved {
    start: NonNull<u8>,
    length: usize,
}

impl Reserved {
    fn new(length: usize) -> Option<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh mapping without access rights, wherever the kernel likes.
        let start = unsafe { libc::mmap(ptr::null_mut(), length, libc::PROT_NONE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return None;
        }
        NonNull::new(start.cast()).map(|start| Self { start, length })
    }

    /// The first `length` bytes, and the others.
    fn split(self, length: usize) -> (Self, Self) {
        let whole = std::mem::ManuallyDrop::new(self);
        let first = Self {
            start: whole.start,
            length,
        };
        let second = Self {
            // SAFETY: `length` is within the mapping, or at its end.
            start: unsafe { whole.start.add(length) },
            length: whole.length - length,
        };
        (first, second)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if self.length > 0 {
            // SAFETY: a range this object alone has reserved, without memory behind it.
            unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_of_its_size_goes_into_the_hole() {
        const LENGTH: usize = 8 << 20;
        // Other tests map memory too: one of several attempts is left alone by them.
        let aligned = (0..16).any(|_| {
            let hole = Hole::new(LENGTH).unwrap();
            let mapping = Reserved::new(LENGTH).unwrap();
            hole.close();
            mapping.start.as_ptr().addr().is_multiple_of(LARGE_PAGE)
        });
        assert!(aligned);
    }

    #[test]
    fn too_long_a_hole_is_none() {
        assert!(Hole::new(usize::MAX).is_none());
        assert!(Hole::new(1 << 56).is_none());
    }
}
