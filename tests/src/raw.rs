//! The bare system calls: `ioctl` on a `/dev/mshv` file descriptor with nothing in between.
//!
//! Request numbers are computed here from the layout of `_IOC` and the table in `include/uapi/linux/mshv.h`, not taken from
//! `mshv-ioctls`, so that a mistake there cannot hide one here.

use std::fmt;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use mshv_bindings::{
    mshv_create_partition, mshv_create_vp, mshv_get_set_vp_state, mshv_gpap_access_bitmap,
    mshv_root_hvcall, mshv_run_vp, mshv_user_ioeventfd, mshv_user_irq_table, mshv_user_irqfd,
    mshv_user_mem_region,
};

const READ: u64 = 2;
const WRITE: u64 = 1;

/// An ioctl request number of the mshv family: direction bits (1 write, 2 read), number, size of the argument in bytes.
#[must_use]
pub const fn request(direction: u64, number: u64, size: usize) -> u64 {
    (direction << 30) | ((size as u64) << 16) | (0xB8 << 8) | number
}

/// `MSHV_CREATE_PARTITION` on the device.
pub const CREATE_PARTITION: u64 = request(WRITE, 0x00, size_of::<mshv_create_partition>());
/// `MSHV_INITIALIZE_PARTITION` on a partition.
pub const INITIALIZE_PARTITION: u64 = request(0, 0x00, 0);
/// `MSHV_CREATE_VP` on a partition.
pub const CREATE_VP: u64 = request(WRITE, 0x01, size_of::<mshv_create_vp>());
/// `MSHV_SET_GUEST_MEMORY` on a partition.
pub const SET_GUEST_MEMORY: u64 = request(WRITE, 0x02, size_of::<mshv_user_mem_region>());
/// `MSHV_IRQFD` on a partition.
pub const IRQFD: u64 = request(WRITE, 0x03, size_of::<mshv_user_irqfd>());
/// `MSHV_IOEVENTFD` on a partition.
pub const IOEVENTFD: u64 = request(WRITE, 0x04, size_of::<mshv_user_ioeventfd>());
/// `MSHV_SET_MSI_ROUTING` on a partition.
pub const SET_MSI_ROUTING: u64 = request(WRITE, 0x05, size_of::<mshv_user_irq_table>());
/// `MSHV_GET_GPAP_ACCESS_BITMAP` on a partition.
pub const GET_GPAP_ACCESS_BITMAP: u64 =
    request(READ | WRITE, 0x06, size_of::<mshv_gpap_access_bitmap>());
/// `MSHV_ROOT_HVCALL` on a partition, a VP, and (newer kernels) the device.
pub const ROOT_HVCALL: u64 = request(READ | WRITE, 0x07, size_of::<mshv_root_hvcall>());
/// `MSHV_RUN_VP` on a VP.
pub const RUN_VP: u64 = request(READ, 0x00, size_of::<mshv_run_vp>());
/// `MSHV_GET_VP_STATE` on a VP.
pub const GET_VP_STATE: u64 = request(READ | WRITE, 0x01, size_of::<mshv_get_set_vp_state>());
/// `MSHV_SET_VP_STATE` on a VP.
pub const SET_VP_STATE: u64 = request(READ | WRITE, 0x02, size_of::<mshv_get_set_vp_state>());

/// An error number, printed by name.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.0 {
            libc::EAGAIN => "EAGAIN",
            libc::EBADF => "EBADF",
            libc::EBUSY => "EBUSY",
            libc::EEXIST => "EEXIST",
            libc::EFAULT => "EFAULT",
            libc::EINTR => "EINTR",
            libc::EINVAL => "EINVAL",
            libc::EIO => "EIO",
            libc::ENODEV => "ENODEV",
            libc::ENOENT => "ENOENT",
            libc::ENOMEM => "ENOMEM",
            libc::ENOTTY => "ENOTTY",
            libc::EOPNOTSUPP => "EOPNOTSUPP",
            other => return write!(f, "errno {other}"),
        };
        f.write_str(name)
    }
}

/// What a system call answers here: its value, or the error number.
pub type Sys<T> = Result<T, Errno>;

/// The error number of the last failed call of this thread.
#[must_use]
pub fn last_errno() -> Errno {
    Errno(std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
}

/// `ioctl` with a pointer to `argument`.
///
/// # Errors
/// The error number of the call.
pub fn ioctl<T>(fd: RawFd, request: u64, argument: &mut T) -> Sys<i32> {
    // SAFETY: `argument` is a live, exclusive reference; the caller pairs `request` with its argument type.
    checked(unsafe { libc::ioctl(fd, request, std::ptr::from_mut(argument)) })
}

/// `ioctl` with a plain number in place of a pointer.
///
/// # Errors
/// The error number of the call.
pub fn ioctl_value(fd: RawFd, request: u64, argument: u64) -> Sys<i32> {
    // SAFETY: used with requests that take no pointer, with addresses that nothing can access, and with buffers as large as the request
    // says that the caller keeps.
    checked(unsafe { libc::ioctl(fd, request, argument) })
}

/// A call whose value of -1 means: look at `errno`.
///
/// # Errors
/// The error number of the call.
pub fn checked(value: i32) -> Sys<i32> {
    if value == -1 {
        Err(last_errno())
    } else {
        Ok(value)
    }
}

/// Closes a descriptor by number.
pub fn close(fd: RawFd) {
    // SAFETY: no pointer is involved; each caller owns the descriptor and does not use it further.
    let closed = unsafe { libc::close(fd) };
    assert_eq!(closed, 0, "close({fd})");
}

/// A duplicate with a number that no other test of the process gets again once it is closed.
///
/// # Panics
/// When the descriptor cannot be duplicated.
#[must_use]
pub fn high_duplicate(fd: RawFd) -> RawFd {
    static NEXT: std::sync::atomic::AtomicI32 = std::sync::atomic::AtomicI32::new(600);
    let wanted = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    // SAFETY: no pointer is involved.
    checked(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, wanted) }).expect("F_DUPFD_CLOEXEC")
}

/// The address of a page that exists and may be neither read nor written: every use by the kernel is `EFAULT`.
#[must_use]
pub fn forbidden_page() -> u64 {
    static PAGE: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
    *PAGE.get_or_init(|| {
        // SAFETY: a new anonymous mapping touches no existing memory.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                0x1000,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(page, libc::MAP_FAILED);
        page as u64
    })
}

/// `eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)`.
///
/// # Panics
/// When the process has no descriptors left.
#[must_use]
pub fn eventfd() -> OwnedFd {
    // SAFETY: no pointer is involved.
    let fd = checked(unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) })
        .expect("eventfd");
    // SAFETY: the call just returned this descriptor and nothing else owns it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Adds one to an eventfd.
///
/// # Panics
/// When the descriptor is no eventfd.
pub fn signal(fd: &OwnedFd) {
    let one = 1u64;
    // SAFETY: eight readable bytes.
    let written = unsafe { libc::write(fd.as_raw_fd(), std::ptr::from_ref(&one).cast(), 8) };
    assert_eq!(written, 8, "write to an eventfd");
}

/// Takes the count of an eventfd; 0 when it is not signalled.
#[must_use]
pub fn take(fd: &OwnedFd) -> u64 {
    let mut count = 0u64;
    // SAFETY: eight writable bytes.
    let read = unsafe { libc::read(fd.as_raw_fd(), std::ptr::from_mut(&mut count).cast(), 8) };
    if read == 8 { count } else { 0 }
}

/// Waits until an eventfd is signalled; false after `timeout_ms`.
#[must_use]
pub fn wait(fd: &OwnedFd, timeout_ms: i32) -> bool {
    let mut poll = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid pollfd.
    unsafe { libc::poll(&raw mut poll, 1, timeout_ms) == 1 }
}

/// Everything a generic hypercall reports back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// What the ioctl said.
    pub result: Sys<()>,
    /// `HV_STATUS_*`.
    pub status: u16,
    /// Repetitions completed.
    pub reps: u16,
}

/// The hypercall `code` on any mshv descriptor, with `reps` repetitions (0: a simple call).
pub fn hypercall(fd: RawFd, code: u32, reps: usize, input: &[u8], output: &mut [u8]) -> Outcome {
    let mut args = mshv_root_hvcall {
        code: code as u16,
        reps: reps as u16,
        in_sz: input.len() as u16,
        out_sz: output.len() as u16,
        in_ptr: input.as_ptr() as u64,
        out_ptr: if output.is_empty() {
            0
        } else {
            output.as_mut_ptr() as u64
        },
        ..Default::default()
    };
    let result = ioctl(fd, ROOT_HVCALL, &mut args).map(drop);
    Outcome {
        result,
        status: args.status,
        reps: args.reps,
    }
}

/// The bytes of a plain structure.
pub fn bytes_of<T: Copy>(value: &T) -> &[u8] {
    // SAFETY: the ABI structures are plain integers without padding that carries secrets; any initialised memory can be read as bytes.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// The writable bytes of a plain structure.
pub fn bytes_of_mut<T: Copy>(value: &mut T) -> &mut [u8] {
    // SAFETY: as `bytes_of`; the ABI structures accept every bit pattern.
    unsafe { std::slice::from_raw_parts_mut(std::ptr::from_mut(value).cast(), size_of::<T>()) }
}
