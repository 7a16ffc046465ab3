//! Copies to and from addresses a client handed to an ioctl.
//!
//! The kernel answers a bad address with `EFAULT`. In user space a plain load would kill the client instead, so
//! copies go through `process_vm_readv` on the process itself, which checks as it goes.

use std::mem::{MaybeUninit, size_of};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::errno::Errno;

/// Set when the system refuses `process_vm_readv` (an old container sandbox): then copies are plain.
static REFUSED: AtomicBool = AtomicBool::new(false);

/// A type any bit pattern of which is valid, without padding that matters.
///
/// # Safety
/// The type must be plain data: integers, and arrays, structs and unions of them.
pub(crate) unsafe trait Plain: Copy {}

macro_rules! plain {
    ($($type:ty),* $(,)?) => {
        $(
            // SAFETY: a C structure of integers.
            unsafe impl Plain for $type {}
        )*
    };
}

plain!(
    mshv_bindings::mshv_create_partition,
    mshv_bindings::mshv_create_partition_v2,
    mshv_bindings::mshv_create_vp,
    mshv_bindings::mshv_user_mem_region,
    mshv_bindings::mshv_user_irqfd,
    mshv_bindings::mshv_user_ioeventfd,
    mshv_bindings::mshv_user_irq_entry,
    mshv_bindings::mshv_gpap_access_bitmap,
    mshv_bindings::mshv_root_hvcall,
    mshv_bindings::mshv_get_set_vp_state,
    [u32; 2],
    u32,
);

#[derive(Clone, Copy)]
enum Direction {
    In,
    Out,
}

fn transfer(direction: Direction, local: *mut u8, address: u64, len: usize) -> Result<(), Errno> {
    if len == 0 {
        return Ok(());
    }
    if !REFUSED.load(Ordering::Relaxed) {
        let ours = libc::iovec {
            iov_base: local.cast(),
            iov_len: len,
        };
        let theirs = libc::iovec {
            iov_base: address as *mut libc::c_void,
            iov_len: len,
        };
        // SAFETY: `local` is valid for `len` bytes (both callers pass a slice); the other side is checked by the
        // kernel.
        let done = unsafe {
            match direction {
                Direction::In => libc::process_vm_readv(
                    libc::getpid(),
                    &raw const ours,
                    1,
                    &raw const theirs,
                    1,
                    0,
                ),
                Direction::Out => libc::process_vm_writev(
                    libc::getpid(),
                    &raw const ours,
                    1,
                    &raw const theirs,
                    1,
                    0,
                ),
            }
        };
        if done == len as isize {
            return Ok(());
        }
        let refused = done < 0 && matches!(Errno::last().0, libc::EPERM | libc::ENOSYS);
        if !refused {
            return Err(Errno(libc::EFAULT));
        }
        REFUSED.store(true, Ordering::Relaxed);
    }
    // SAFETY: `local` is valid for `len` bytes; the client vouches for its own address, as for any C function.
    unsafe {
        match direction {
            Direction::In => std::ptr::copy(address as *const u8, local, len),
            Direction::Out => std::ptr::copy(local, address as *mut u8, len),
        }
    }
    Ok(())
}

/// Fills `buf` from the client's `address`.
///
/// # Errors
/// `EFAULT` when the address is bad.
pub(crate) fn copy_in(address: u64, buf: &mut [u8]) -> Result<(), Errno> {
    transfer(Direction::In, buf.as_mut_ptr(), address, buf.len())
}

/// Writes `data` to the client's `address`.
///
/// # Errors
/// `EFAULT` when the address is bad or read-only.
pub(crate) fn copy_out(address: u64, data: &[u8]) -> Result<(), Errno> {
    transfer(
        Direction::Out,
        data.as_ptr().cast_mut(),
        address,
        data.len(),
    )
}

/// Reads a structure from the client's `address`.
///
/// # Errors
/// `EFAULT` when the address is bad.
pub(crate) fn read<T: Plain>(address: u64) -> Result<T, Errno> {
    let mut value = MaybeUninit::<T>::zeroed();
    transfer(
        Direction::In,
        value.as_mut_ptr().cast(),
        address,
        size_of::<T>(),
    )?;
    // SAFETY: zeroed, then overwritten; any bit pattern is valid for `Plain`.
    Ok(unsafe { value.assume_init() })
}

/// Writes a structure to the client's `address`.
///
/// # Errors
/// `EFAULT` when the address is bad or read-only.
pub(crate) fn write<T: Plain>(address: u64, value: &T) -> Result<(), Errno> {
    transfer(
        Direction::Out,
        (&raw const *value).cast::<u8>().cast_mut(),
        address,
        size_of::<T>(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_address_is_efault_in_both_directions() {
        let mut buf = [0u8; 8];
        assert_eq!(copy_in(8, &mut buf), Err(Errno(libc::EFAULT)));
        assert_eq!(copy_out(8, &buf), Err(Errno(libc::EFAULT)));
        assert_eq!(read::<u32>(u64::MAX - 2), Err(Errno(libc::EFAULT)));
    }

    #[test]
    fn values_pass_both_ways() {
        let mut cell = 7u32;
        let address = (&raw mut cell) as u64;
        assert_eq!(read::<u32>(address), Ok(7));
        write(address, &9u32).unwrap();
        assert_eq!(cell, 9);
    }
}
