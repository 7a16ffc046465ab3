//! Locks on image files: one machine may write an image, or any number may read it.
//!
//! They are locks of the open file (`F_OFD_SETLK`), which end with the last descriptor of it, however the process ends.
//! cloud-hypervisor takes the same; QEMU's, on single bytes of the file, are seen and see ours.

use std::{fs::File, io, os::fd::AsRawFd};

use crate::virtio::block::backend::Access;

/// What came of a lock.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Locked {
    /// The file is ours, or ours among other readers.
    Yes,
    /// Somebody has it.
    Elsewhere,
}

/// Locks all of `file`: shared to read it, exclusive to write it.
pub(super) fn lock(file: &File, access: Access) -> io::Result<Locked> {
    let kind = match access {
        Access::ReadOnly => libc::F_RDLCK,
        Access::ReadWrite => libc::F_WRLCK,
    };
    // A length of zero is everything up to the end, wherever that will be.
    let range = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open and `range` lives for the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const range) };
    if result == 0 {
        return Ok(Locked::Yes);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(Locked::Elsewhere),
        _ => Err(error),
    }
}
