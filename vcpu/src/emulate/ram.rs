//! Aligned scalars in guest memory that other processors may be changing at the same time.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, BitmapSlice};
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileMemory, VolatileSlice};

/// An atomic integer of any size.
trait Cell {
    fn get(&self) -> u64;
    /// Stores `new` if the cell holds `current`; whether it did.
    fn replace(&self, current: u64, new: u64) -> bool;
}

macro_rules! cell {
    ($atomic:ty, $integer:ty) => {
        impl Cell for $atomic {
            fn get(&self) -> u64 {
                self.load(Ordering::SeqCst) as u64
            }

            fn replace(&self, current: u64, new: u64) -> bool {
                let (current, new) = (current as $integer, new as $integer);
                self.compare_exchange(current, new, Ordering::SeqCst, Ordering::SeqCst)
                    .is_ok()
            }
        }
    };
}

cell!(AtomicU8, u8);
cell!(AtomicU16, u16);
cell!(AtomicU32, u32);
cell!(AtomicU64, u64);

/// The whole of `slice` as one atomic integer, if it has the size and alignment of one.
fn cell<'a, B: BitmapSlice>(slice: &'a VolatileSlice<'a, B>) -> Option<&'a dyn Cell> {
    match slice.len() {
        1 => slice
            .get_atomic_ref::<AtomicU8>(0)
            .ok()
            .map(|cell| cell as &dyn Cell),
        2 => slice
            .get_atomic_ref::<AtomicU16>(0)
            .ok()
            .map(|cell| cell as &dyn Cell),
        4 => slice
            .get_atomic_ref::<AtomicU32>(0)
            .ok()
            .map(|cell| cell as &dyn Cell),
        8 => slice
            .get_atomic_ref::<AtomicU64>(0)
            .ok()
            .map(|cell| cell as &dyn Cell),
        _ => None,
    }
}

/// Reads the `len` bytes at `gpa`. `None` if they are not in guest memory or not naturally aligned.
pub(super) fn load<M>(memory: &M, gpa: u64, len: usize) -> Option<u64>
where
    M: GuestMemoryBackend + ?Sized,
{
    let slice = memory.get_slice(GuestAddress(gpa), len).ok()?;
    Some(cell(&slice)?.get())
}

/// Replaces the `len` bytes at `gpa` by `new` if they hold `current`; whether they did. `None` as for [`load`].
pub(super) fn compare_exchange<M>(
    memory: &M,
    gpa: u64,
    len: usize,
    current: u64,
    new: u64,
) -> Option<bool>
where
    M: GuestMemoryBackend + ?Sized,
{
    let slice = memory.get_slice(GuestAddress(gpa), len).ok()?;
    let replaced = cell(&slice)?.replace(current, new);
    if replaced {
        slice.bitmap().mark_dirty(0, len);
    }
    Some(replaced)
}
