//! A request: the buffers of one descriptor chain, checked before a device sees them.
//!
//! The buffers are kept as `iovec`s, as system calls take them, next to the guest memory that they lie in: so they stay valid
//! for as long as the [`Chain`] lives, also while the kernel works on them.

use std::sync::Arc;

use virtio_queue::{DescriptorChain, desc::split::Descriptor};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

use super::DeviceError;

/// The most buffers a chain may have. A driver may use as many as the queue has entries; no driver known uses a tenth of this.
const MOST_BUFFERS: usize = 4096;

/// Buffers in the guest's memory, one behind the other.
#[derive(Default)]
pub struct Buffers {
    /// Keeps the memory that `vectors` points into.
    memory: Arc<GuestMemoryMmap>,
    vectors: Vec<libc::iovec>,
    length: usize,
}

// SAFETY: the pointers lead into guest memory, which `memory` keeps, and through which no references are ever made; it may be
// touched from any thread.
unsafe impl Send for Buffers {}

impl Buffers {
    /// Bytes in all buffers.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there is not a byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The buffers as the kernel takes them. They are valid for as long as `self` (or the chain it belongs to) is neither
    /// dropped nor filled again.
    #[must_use]
    pub fn vectors(&self) -> &[libc::iovec] {
        &self.vectors
    }

    /// Copies from the buffers, from byte `offset` on. Returns how many bytes there were.
    pub fn read_at(&self, offset: usize, into: &mut [u8]) -> usize {
        let mut done = 0;
        self.visit(offset, into.len(), |piece| {
            done += piece.copy_to(&mut into[done..]);
        });
        done
    }

    /// Copies into the buffers, from byte `offset` on. Returns for how many bytes there was room.
    pub fn write_at(&self, offset: usize, from: &[u8]) -> usize {
        let mut done = 0;
        self.visit(offset, from.len(), |piece| {
            piece.copy_from(&from[done..done + piece.len()]);
            done += piece.len();
        });
        done
    }

    /// Reads an array of `N` bytes at `offset`, if the buffers reach that far.
    #[must_use]
    pub fn array_at<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        (self.read_at(offset, &mut bytes) == N).then_some(bytes)
    }

    /// Moves the first `count` bytes (at most all) into `head`, in place of what that held.
    pub fn split_front(&mut self, count: usize, head: &mut Self) {
        head.restart(&self.memory);
        let mut missing = count.min(self.length);
        self.length -= missing;
        head.length = missing;
        let mut whole = 0;
        for vector in &mut self.vectors {
            if vector.iov_len > missing {
                if missing > 0 {
                    head.vectors.push(libc::iovec {
                        iov_len: missing,
                        ..*vector
                    });
                }
                // SAFETY: `missing` is less than the buffer's length.
                vector.iov_base = unsafe { vector.iov_base.byte_add(missing) };
                vector.iov_len -= missing;
                break;
            }
            missing -= vector.iov_len;
            head.vectors.push(*vector);
            whole += 1;
        }
        self.vectors.drain(..whole);
    }

    /// Moves the last `count` bytes (at most all) into `tail`, in place of what that held.
    pub fn split_back(&mut self, count: usize, tail: &mut Self) {
        let within = |last: &&mut libc::iovec| count > 0 && last.iov_len >= count;
        if let Some(last) = self.vectors.last_mut().filter(within) {
            tail.restart(&self.memory);
            tail.length = count;
            self.length -= count;
            last.iov_len -= count;
            tail.vectors.push(libc::iovec {
                // SAFETY: behind what is left of the last buffer come the bytes taken off it.
                iov_base: unsafe { last.iov_base.byte_add(last.iov_len) },
                iov_len: count,
            });
            if last.iov_len == 0 {
                self.vectors.pop();
            }
            return;
        }
        let front = self.length - count.min(self.length);
        self.split_front(front, tail);
        std::mem::swap(self, tail);
    }

    /// Moves all buffers of `other` behind those of `self`. Both are in the same memory.
    pub fn append(&mut self, other: &mut Self) {
        self.vectors.append(&mut other.vectors);
        self.length = self.length.saturating_add(other.length);
        other.length = 0;
    }

    /// Forgets the first `count` bytes (at most all).
    pub fn skip_front(&mut self, count: usize) {
        let mut missing = count.min(self.length);
        self.length -= missing;
        let mut whole = 0;
        for vector in &mut self.vectors {
            if vector.iov_len > missing {
                // SAFETY: `missing` is less than the buffer's length.
                vector.iov_base = unsafe { vector.iov_base.byte_add(missing) };
                vector.iov_len -= missing;
                break;
            }
            missing -= vector.iov_len;
            whole += 1;
        }
        self.vectors.drain(..whole);
    }

    fn visit(&self, offset: usize, count: usize, mut visit: impl FnMut(VolatileSlice<'_>)) {
        let (mut skip, mut left) = (offset, count);
        for vector in &self.vectors {
            if left == 0 {
                return;
            }
            if skip >= vector.iov_len {
                skip -= vector.iov_len;
                continue;
            }
            let length = (vector.iov_len - skip).min(left);
            // SAFETY: `fill` made the vector from a slice of guest memory, which `memory` keeps mapped; `skip + length` is
            // within it. Nothing but volatile accesses is made through it.
            let piece =
                unsafe { VolatileSlice::new(vector.iov_base.cast::<u8>().byte_add(skip), length) };
            visit(piece);
            (skip, left) = (0, left - length);
        }
    }

    fn clear(&mut self) {
        self.vectors.clear();
        self.length = 0;
    }

    /// Empties `self`, to hold buffers in `memory` from now on.
    fn restart(&mut self, memory: &Arc<GuestMemoryMmap>) {
        self.clear();
        if !Arc::ptr_eq(&self.memory, memory) {
            self.memory = Arc::clone(memory);
        }
    }

    fn add(&mut self, descriptor: &Descriptor) -> Result<(), DeviceError> {
        let length = descriptor.len() as usize;
        for piece in GuestMemoryBackend::get_slices(&*self.memory, descriptor.addr(), length) {
            let piece =
                piece.map_err(|_| DeviceError::Malformed("a buffer outside the guest's memory"))?;
            self.vectors.push(libc::iovec {
                iov_base: piece.ptr_guard_mut().as_ptr().cast(),
                iov_len: piece.len(),
            });
        }
        // A chain of 2^32 bytes ends the iterator, so this cannot overflow.
        self.length += length;
        Ok(())
    }
}

/// One request: what the driver wants read, and where it wants something written.
#[derive(Default)]
pub struct Chain {
    head: u16,
    /// What the driver has written for the device.
    pub readable: Buffers,
    /// What the device is to write for the driver.
    pub writable: Buffers,
}

impl Chain {
    /// An empty chain over `memory`, to be filled by [`VirtQueue::pop`](super::VirtQueue::pop).
    #[must_use]
    pub fn new(memory: &GuestMemoryMmap) -> Self {
        let memory = Arc::new(memory.clone());
        let buffers = || Buffers {
            memory: Arc::clone(&memory),
            ..Buffers::default()
        };
        Self {
            head: 0,
            readable: buffers(),
            writable: buffers(),
        }
    }

    /// What names the chain in the queue.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Fills `self` with the buffers of `descriptors`. Their vectors are used again, so nothing is allocated once they have
    /// grown.
    pub(super) fn fill(
        &mut self,
        descriptors: DescriptorChain<&GuestMemoryMmap>,
    ) -> Result<(), DeviceError> {
        self.readable.clear();
        self.writable.clear();
        self.head = descriptors.head_index();
        let (mut count, mut more) = (0, true);
        for descriptor in descriptors {
            count += 1;
            if count > MOST_BUFFERS {
                return Err(DeviceError::Malformed("a chain of too many buffers"));
            }
            more = descriptor.has_next();
            if descriptor.is_write_only() {
                self.writable.add(&descriptor)?;
            } else if self.writable.vectors.is_empty() {
                self.readable.add(&descriptor)?;
            } else {
                return Err(DeviceError::Malformed(
                    "a buffer to be read behind one to be written",
                ));
            }
        }
        // The iterator just ends where a chain cannot be followed: then the last descriptor seen says that there are more.
        if more {
            return Err(DeviceError::Malformed("a chain that leads nowhere"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000), (GuestAddress(0x4000), 0x4000)])
            .unwrap()
    }

    fn buffers(memory: &GuestMemoryMmap, ranges: &[(u64, u32)]) -> Buffers {
        let mut buffers = Chain::new(memory).readable;
        for (address, length) in ranges {
            buffers
                .add(&Descriptor::new(*address, *length, 0, 0))
                .unwrap();
        }
        buffers
    }

    #[test]
    fn bytes_go_through_all_buffers() {
        let memory = memory();
        // One of them reaches from one region of memory into the next.
        let buffers = buffers(&memory, &[(0x100, 3), (0x3ffe, 4), (0x200, 0), (0x300, 2)]);
        assert_eq!((buffers.len(), buffers.vectors().len()), (9, 4));
        assert_eq!(buffers.write_at(1, b"bcdefghijk"), 8);
        let mut bytes = [0; 12];
        assert_eq!(buffers.read_at(0, &mut bytes), 9);
        assert_eq!(&bytes, b"\0bcdefghi\0\0\0");
        assert_eq!(buffers.array_at(7), Some(*b"hi"));
        assert_eq!(buffers.array_at::<3>(7), None);
        assert_eq!(
            memory.read_obj::<u32>(GuestAddress(0x3ffe)).unwrap(),
            u32::from_le_bytes(*b"defg")
        );
        assert_eq!(buffers.read_at(usize::MAX, &mut bytes), 0);
    }

    #[test]
    fn buffers_are_split_anywhere() {
        let memory = memory();
        let ranges = [(0x100, 3), (0x3ffe, 4), (0x200, 0), (0x300, 2)];
        buffers(&memory, &ranges).write_at(0, b"abcdefghi");
        for at in 0..=10 {
            let whole = b"abcdefghi";
            let cut = at.min(9);
            let text = |buffers: &Buffers| {
                let mut bytes = vec![0; 16];
                let length = buffers.read_at(0, &mut bytes);
                assert_eq!(length, buffers.len());
                bytes.truncate(length);
                bytes
            };
            let (mut front, mut back) = (Buffers::default(), buffers(&memory, &ranges));
            back.split_front(at, &mut front);
            assert_eq!(
                (text(&front), text(&back)),
                (whole[..cut].to_vec(), whole[cut..].to_vec())
            );
            let (mut front, mut back) = (buffers(&memory, &ranges), Buffers::default());
            front.split_back(at, &mut back);
            assert_eq!(
                (text(&front), text(&back)),
                (whole[..9 - cut].to_vec(), whole[9 - cut..].to_vec())
            );
        }
    }

    #[test]
    fn buffers_are_joined_and_forgotten() {
        let memory = memory();
        let ranges = [(0x100, 3), (0x3ffe, 4), (0x200, 0), (0x300, 2)];
        buffers(&memory, &ranges).write_at(0, b"abcdefghi");
        for at in 0..=10 {
            let mut joined = buffers(&memory, &ranges[..2]);
            let mut others = buffers(&memory, &ranges[2..]);
            joined.append(&mut others);
            assert_eq!((joined.len(), others.len()), (9, 0));
            assert!(others.vectors().is_empty());
            joined.skip_front(at);
            let mut bytes = vec![0; 16];
            let length = joined.read_at(0, &mut bytes);
            assert_eq!(&bytes[..length], &b"abcdefghi"[at.min(9)..]);
            assert_eq!(length, joined.len());
        }
    }

    #[test]
    fn a_buffer_outside_memory_is_refused() {
        let memory = memory();
        for (address, length) in [(0x7fff, 2), (0x8000, 1), (u64::MAX, 1), (u64::MAX - 1, 8)] {
            let mut buffers = Chain::new(&memory).readable;
            let error = buffers.add(&Descriptor::new(address, length, 0, 0));
            assert!(
                matches!(error, Err(DeviceError::Malformed(_))),
                "{address:#x}"
            );
        }
    }
}
