//! Doorbells: guest writes to a guest-physical address that signal an eventfd instead of reaching the client.
//!
//! They are matched here and not by KVM: where no memory is, KVM sees a background slot (see `memory`), so its
//! own ioeventfds would never be asked.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};

use mshv_bindings::mshv_user_ioeventfd;

use crate::errno::Errno;
use crate::eventfd;

const DATAMATCH: u32 = 1 << 0;
const PIO: u32 = 1 << 1;
const DEASSIGN: u32 = 1 << 2;
const FLAGS: u32 = DATAMATCH | PIO | DEASSIGN;

struct Doorbell {
    address: u64,
    /// Bytes of the access; 0: any.
    len: u32,
    /// The value written; none: any.
    value: Option<u64>,
    /// The identity of the eventfd, whatever its number.
    id: u64,
    fd: OwnedFd,
}

/// The doorbells of one partition.
#[derive(Default)]
pub(crate) struct IoEventFds {
    doorbells: RwLock<Vec<Doorbell>>,
    any: AtomicBool,
}

impl IoEventFds {
    /// `MSHV_IOEVENTFD`.
    ///
    /// # Errors
    /// As the driver: `EINVAL` for flags, reserved fields, length or a wrapping range, `EOPNOTSUPP` for ports,
    /// `EBADF`/`EINVAL` for what is not an eventfd, `EEXIST` for one registered already, `ENOENT` for none to
    /// remove.
    pub(crate) fn set(&self, args: &mshv_user_ioeventfd) -> Result<(), Errno> {
        let (flags, len, address) = (args.flags, args.len, args.addr);
        if flags & !FLAGS != 0 || args.rsvd != [0; 4] {
            return Err(Errno(libc::EINVAL));
        }
        if flags & PIO != 0 {
            return Err(Errno(libc::EOPNOTSUPP));
        }
        let value = (flags & DATAMATCH != 0).then_some(args.datamatch);
        let assign = flags & DEASSIGN == 0;
        if assign
            && (!matches!(len, 0 | 1 | 2 | 4 | 8) || address.checked_add(u64::from(len)).is_none())
        {
            return Err(Errno(libc::EINVAL));
        }
        let id = eventfd::id(args.fd)?;

        let mut doorbells = self
            .doorbells
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if assign {
            let collides = |d: &Doorbell| {
                d.address == address
                    && d.len == len
                    && (d.value.is_none() || value.is_none() || d.value == value)
            };
            if doorbells.iter().any(collides) {
                return Err(Errno(libc::EEXIST));
            }
            let fd = eventfd::duplicate(args.fd)?;
            doorbells.push(Doorbell {
                address,
                len,
                value,
                id,
                fd,
            });
        } else {
            let index = doorbells
                .iter()
                .position(|d| {
                    d.id == id && d.address == address && d.len == len && d.value == value
                })
                .ok_or(Errno(libc::ENOENT))?;
            doorbells.swap_remove(index);
        }
        self.any.store(!doorbells.is_empty(), Ordering::Release);
        Ok(())
    }

    /// The partition's descriptor is closed: doorbells end, whatever else lives on.
    pub(crate) fn release(&self) {
        self.doorbells
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
        self.any.store(false, Ordering::Release);
    }

    /// A guest is about to write `data` at `gpa` where no memory is. True when a doorbell took it: the
    /// instruction is then complete, the client sees nothing.
    pub(crate) fn signal_mmio(&self, gpa: u64, data: &[u8]) -> bool {
        if self.is_empty() || data.len() > 8 {
            return false;
        }
        let mut bytes = [0; 8];
        bytes[..data.len()].copy_from_slice(data);
        let written = u64::from_le_bytes(bytes);
        let doorbells = self
            .doorbells
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let rung = doorbells.iter().find(|d| {
            d.address == gpa
                && (d.len == 0 || d.len as usize == data.len())
                && d.value.is_none_or(|value| value == written)
        });
        if let Some(doorbell) = rung {
            eventfd::signal(doorbell.fd.as_raw_fd());
        }
        rung.is_some()
    }

    /// Whether no doorbell is registered (a cheap question before decoding an instruction).
    pub(crate) fn is_empty(&self) -> bool {
        !self.any.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    fn request(fd: i32, flags: u32) -> mshv_user_ioeventfd {
        mshv_user_ioeventfd {
            addr: 0x1000,
            len: 2,
            fd,
            flags,
            datamatch: 7,
            ..Default::default()
        }
    }

    #[test]
    fn a_matching_write_rings_and_another_does_not() {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let doorbells = IoEventFds::default();
        assert!(doorbells.is_empty());
        doorbells
            .set(&request(event.as_raw_fd(), DATAMATCH))
            .unwrap();
        assert!(!doorbells.signal_mmio(0x1000, &[8, 0]));
        assert!(!doorbells.signal_mmio(0x1000, &[7, 0, 0, 0]));
        assert!(!doorbells.signal_mmio(0x1002, &[7, 0]));
        assert!(doorbells.signal_mmio(0x1000, &[7, 0]));
        assert_eq!(event.read().unwrap(), 1);
    }

    #[test]
    fn a_doorbell_is_removed_through_another_number_of_the_same_eventfd() {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let twin = event.try_clone().unwrap();
        let doorbells = IoEventFds::default();
        doorbells.set(&request(event.as_raw_fd(), 0)).unwrap();
        assert_eq!(
            doorbells.set(&request(twin.as_raw_fd(), DATAMATCH)),
            Err(Errno(libc::EEXIST))
        );
        assert_eq!(
            doorbells.set(&request(twin.as_raw_fd(), DEASSIGN | DATAMATCH)),
            Err(Errno(libc::ENOENT))
        );
        doorbells.set(&request(twin.as_raw_fd(), DEASSIGN)).unwrap();
        assert!(doorbells.is_empty());
    }

    #[test]
    fn bad_requests_are_refused_as_by_the_driver() {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let doorbells = IoEventFds::default();
        let refused = |change: fn(&mut mshv_user_ioeventfd)| {
            let mut args = request(event.as_raw_fd(), 0);
            change(&mut args);
            doorbells.set(&args).unwrap_err().0
        };
        assert_eq!(refused(|a| a.flags = 8), libc::EINVAL);
        assert_eq!(refused(|a| a.rsvd[0] = 1), libc::EINVAL);
        assert_eq!(refused(|a| a.flags = PIO), libc::EOPNOTSUPP);
        assert_eq!(refused(|a| a.len = 3), libc::EINVAL);
        assert_eq!(refused(|a| a.addr = u64::MAX), libc::EINVAL);
        assert_eq!(refused(|a| a.fd = 1 << 20), libc::EBADF);
        assert_eq!(refused(|a| a.fd = 0), libc::EINVAL);
    }
}
