//! Eventfds of the client: is it one, which one is it, ring it.

use std::fs;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use crate::errno::Errno;

/// The kernel's identity of the eventfd behind descriptor `fd`: equal for all its duplicates.
///
/// # Errors
/// `EBADF` when the descriptor is closed, `EINVAL` when it is not an eventfd.
pub(crate) fn id(fd: RawFd) -> Result<u64, Errno> {
    let info =
        fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).map_err(|_| Errno(libc::EBADF))?;
    info.lines()
        .find_map(|line| line.strip_prefix("eventfd-id:"))
        .and_then(|id| id.trim().parse().ok())
        .ok_or(Errno(libc::EINVAL))
}

/// A descriptor of our own for the same eventfd, so that the client may close its.
///
/// # Errors
/// Those of `fcntl`.
pub(crate) fn duplicate(fd: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: duplicating a descriptor touches no memory.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
    if copy < 0 {
        return Err(Errno::last());
    }
    // SAFETY: just made, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Takes what has been added to the eventfd so far; true if there was anything.
pub(crate) fn take(fd: RawFd) -> bool {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let mut count = [0u8; 8];
    // SAFETY: `poll` writes the structure it is given, `read` eight bytes; it does not block after `poll` said so.
    unsafe {
        libc::poll(&raw mut poll, 1, 0) == 1
            && libc::read(fd, count.as_mut_ptr().cast(), count.len()) == 8
    }
}

/// Adds one to the eventfd. A full counter is as good as rung.
pub(crate) fn signal(fd: RawFd) {
    let one = 1u64.to_ne_bytes();
    // SAFETY: eight readable bytes.
    unsafe { libc::write(fd, one.as_ptr().cast(), one.len()) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use vmm_sys_util::eventfd::EventFd;

    #[test]
    fn duplicates_share_an_identity_and_others_do_not() {
        let (a, b) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
        let copy = duplicate(a.as_raw_fd()).unwrap();
        assert_eq!(id(a.as_raw_fd()), id(copy.as_raw_fd()));
        assert_ne!(id(a.as_raw_fd()), id(b.as_raw_fd()));
        assert!(!take(copy.as_raw_fd()));
        signal(a.as_raw_fd());
        assert!(take(copy.as_raw_fd()));
        assert!(!take(a.as_raw_fd()));
        assert_eq!(id(0), Err(Errno(libc::EINVAL)));
        assert_eq!(id(-1), Err(Errno(libc::EBADF)));
    }
}
