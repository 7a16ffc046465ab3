//! A detour for data whose buffers lie where direct I/O cannot take them.

use super::backend::{Geometry, MOST_VECTORS};
use crate::virtio::Buffers;

/// Bytes of a page, the strictest alignment there is.
const PAGE: usize = 4096;
/// Bytes that take the detour at once; for more, the request goes on from there.
const SIZE: usize = 64 * PAGE;

#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u8; PAGE]);

/// Memory that is aligned. It is there from the first time it is used.
#[derive(Default)]
pub(super) struct Bounce {
    pages: Vec<Page>,
    vector: Vec<libc::iovec>,
}

// SAFETY: the vector leads to `pages`, which belong to the same object.
unsafe impl Send for Bounce {}

/// Whether `data` must take the detour on a disk of this shape.
pub(super) fn is_needed(data: &Buffers, geometry: &Geometry) -> bool {
    let mask = geometry.memory_alignment as usize - 1;
    mask != 0
        && (data.vectors().len() > MOST_VECTORS
            || data
                .vectors()
                .iter()
                .any(|vector| (vector.iov_base.addr() | vector.iov_len) & mask != 0))
}

impl Bounce {
    /// Makes room for what of `length` bytes takes the detour now, and returns how many bytes that are.
    pub(super) fn prepare(&mut self, length: usize) -> usize {
        if self.pages.is_empty() {
            self.pages = vec![Page([0; PAGE]); SIZE / PAGE];
        }
        let length = length.min(SIZE);
        self.vector.clear();
        self.vector.push(libc::iovec {
            iov_base: self.pages.as_mut_ptr().cast(),
            iov_len: length,
        });
        length
    }

    /// The memory as the kernel takes it.
    pub(super) fn vectors(&self) -> &[libc::iovec] {
        &self.vector
    }

    /// Copies from the first `length` bytes of `data`.
    pub(super) fn fill(&mut self, data: &Buffers, length: usize) {
        for (index, page) in self.pages.iter_mut().enumerate() {
            let start = index * PAGE;
            let Some(left) = length.checked_sub(start) else {
                return;
            };
            data.read_at(start, &mut page.0[..left.min(PAGE)]);
        }
    }

    /// Copies `length` bytes to the start of `data`.
    pub(super) fn empty(&self, data: &Buffers, length: usize) {
        for (index, page) in self.pages.iter().enumerate() {
            let start = index * PAGE;
            let Some(left) = length.checked_sub(start) else {
                return;
            };
            data.write_at(start, &page.0[..left.min(PAGE)]);
        }
    }
}
