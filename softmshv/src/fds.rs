//! Which file descriptors of the process are ours, and what they stand for.
//!
//! A device, partition or VP descriptor is a real kernel descriptor, so that the kernel itself keeps the number
//! busy, closes it on exec and maps the pages of a VP (which is a memfd). This table says what it means. Descriptors
//! made with `dup` share one object; the last `close` drops it.

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Once, PoisonError, RwLock};

use crate::device::Device;
use crate::errno::Errno;
use crate::partition::PartitionHandle;
use crate::vp_file::VpFile;

/// Descriptors at or above this number are refused (`EMFILE`): the table below is indexed by number.
const LIMIT: usize = 1 << 16;

/// One flag per descriptor number: ours. It makes a foreign descriptor cost one load.
static OURS: [AtomicBool; LIMIT] = [const { AtomicBool::new(false) }; LIMIT];

static OBJECTS: RwLock<BTreeMap<RawFd, Object>> = RwLock::new(BTreeMap::new());

/// The process the objects belong to. A child made by `vfork` shares our memory but not our descriptors: what it
/// closes must not leave the table.
static OWNER: AtomicI32 = AtomicI32::new(0);

/// Set in a child made by `fork`: KVM refuses to serve it, and a lock may have been held while it was made.
static FORKED: AtomicBool = AtomicBool::new(false);

/// What a descriptor stands for.
#[derive(Clone)]
pub(crate) enum Object {
    /// `/dev/mshv`.
    Device(Arc<Device>),
    /// Made by `MSHV_CREATE_PARTITION`.
    Partition(Arc<PartitionHandle>),
    /// Made by `MSHV_CREATE_VP`.
    Vp(Arc<VpFile>),
}

/// Whether `fd` is one of ours. Cheap: asked about every descriptor the process uses.
pub(crate) fn is_ours(fd: RawFd) -> bool {
    usize::try_from(fd)
        .ok()
        .and_then(|index| OURS.get(index))
        .is_some_and(|ours| ours.load(Ordering::Acquire))
}

/// What `fd` stands for.
///
/// # Errors
/// `EBADF` when it is not ours, `EIO` in a forked child.
pub(crate) fn get(fd: RawFd) -> Result<Object, Errno> {
    if FORKED.load(Ordering::Relaxed) {
        return Err(Errno(libc::EIO));
    }
    let objects = OBJECTS.read().unwrap_or_else(PoisonError::into_inner);
    objects.get(&fd).cloned().ok_or(Errno(libc::EBADF))
}

/// Makes the kernel descriptor `fd` stand for `object`; takes it over, also on failure.
///
/// # Errors
/// `EMFILE` when the number is beyond the table.
pub(crate) fn adopt(fd: RawFd, object: Object) -> Result<RawFd, Errno> {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the handler only stores to an atomic.
        unsafe {
            OWNER.store(libc::getpid(), Ordering::Relaxed);
            libc::pthread_atfork(None, None, Some(in_child));
        }
    });
    let Some(ours) = usize::try_from(fd).ok().and_then(|index| OURS.get(index)) else {
        // SAFETY: the descriptor is ours to close.
        unsafe { libc::syscall(libc::SYS_close, fd) };
        return Err(Errno(libc::EMFILE));
    };
    OBJECTS
        .write()
        .unwrap_or_else(PoisonError::into_inner)
        .insert(fd, object);
    ours.store(true, Ordering::Release);
    Ok(fd)
}

extern "C" fn in_child() {
    FORKED.store(true, Ordering::Relaxed);
}

/// `fd` is about to be closed or replaced: forgets it. The object goes with the last descriptor, when the
/// returned value is dropped.
pub(crate) fn forget(fd: RawFd) -> Option<Object> {
    // SAFETY: takes no arguments.
    let me = unsafe { libc::getpid() };
    if FORKED.load(Ordering::Relaxed) || me != OWNER.load(Ordering::Relaxed) {
        return None;
    }
    OURS[usize::try_from(fd).ok()?].store(false, Ordering::Release);
    OBJECTS
        .write()
        .unwrap_or_else(PoisonError::into_inner)
        .remove(&fd)
}

/// [`forget`] for all of ours between `first` and `last`.
pub(crate) fn forget_range(first: u32, last: u32) -> Vec<Object> {
    (first as usize..LIMIT.min((last as usize).saturating_add(1)))
        .map(|fd| fd as RawFd)
        .filter(|fd| is_ours(*fd))
        .filter_map(forget)
        .collect()
}

/// A fresh descriptor for an object without pages of its own. An epoll instance is one that, like those of the
/// driver, can neither be read nor written nor mapped.
///
/// # Errors
/// Those of `epoll_create1`.
pub(crate) fn placeholder(cloexec: bool) -> Result<RawFd, Errno> {
    let flags = if cloexec { libc::EPOLL_CLOEXEC } else { 0 };
    // SAFETY: takes a flag word.
    let fd = unsafe { libc::epoll_create1(flags) };
    if fd < 0 { Err(Errno::last()) } else { Ok(fd) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_of_another_is_not_ours() {
        assert!(!is_ours(0));
        assert!(!is_ours(-1));
        assert!(!is_ours(i32::MAX));
        assert_eq!(get(0).err(), Some(Errno(libc::EBADF)));
    }
}
