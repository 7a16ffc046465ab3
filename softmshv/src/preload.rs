//! The C library functions this library puts itself before.
//!
//! Every function asks one question, "is this `/dev/mshv` or one of our descriptors?", and otherwise makes the
//! system call the C library would have made. Nothing here allocates, locks or looks up symbols on that way out,
//! so it is safe at any time: before `main`, in signal handlers, after `fork`.
//!
//! Functions that are variadic in C are declared with the arguments they can have: on x86-64 both are passed alike.

use std::ffi::{CStr, c_char, c_int, c_long, c_uint, c_ulong, c_void};

use crate::errno::Errno;
use crate::{device, fds, trace};

/// What status calls and permission checks about `/dev/mshv` are asked of instead: whoever may use the one may use
/// the other.
const ENGINE: &CStr = c"/dev/kvm";

/// The device number reported for `/dev/mshv`: the misc major, and a dynamic minor.
const DEVICE_NUMBER: (u32, u32) = (10, 122);

/// # Safety
/// `path` is null or a C string.
unsafe fn is_device(path: *const c_char) -> bool {
    // SAFETY: as promised by the caller.
    !path.is_null() && unsafe { CStr::from_ptr(path) } == device::PATH
}

/// Reports a result the C way.
fn answer(result: Result<i32, Errno>) -> c_int {
    match result {
        Ok(value) => value,
        Err(Errno(code)) => {
            // SAFETY: the calling thread's own errno.
            unsafe { *libc::__errno_location() = code };
            -1
        }
    }
}

macro_rules! syscall {
    ($number:expr, $($arg:expr),*) => {
        // SAFETY: the arguments are those the caller gave to the C function of that name.
        unsafe { libc::syscall($number, $($arg),*) }
    };
}

macro_rules! open_functions {
    ($($name:ident),*) => {
        $(
            /// See `open(2)`.
            #[unsafe(no_mangle)]
            unsafe extern "C" fn $name(path: *const c_char, flags: c_int, mode: c_uint) -> c_int {
                // SAFETY: a C string by the function's contract.
                if unsafe { is_device(path) } {
                    return answer(device::open(flags));
                }
                syscall!(libc::SYS_openat, libc::AT_FDCWD, path, flags, mode) as c_int
            }
        )*
    };
}
open_functions!(open, open64, __open, __open64);

macro_rules! fortified_open_functions {
    ($($name:ident),*) => {
        $(
            /// `open` as `_FORTIFY_SOURCE` spells it.
            #[unsafe(no_mangle)]
            unsafe extern "C" fn $name(path: *const c_char, flags: c_int) -> c_int {
                // SAFETY: the same contract.
                unsafe { open(path, flags, 0) }
            }
        )*
    };
}
fortified_open_functions!(__open_2, __open64_2);

macro_rules! openat_functions {
    ($($name:ident),*) => {
        $(
            /// See `openat(2)`.
            #[unsafe(no_mangle)]
            unsafe extern "C" fn $name(dir: c_int, path: *const c_char, flags: c_int, mode: c_uint) -> c_int {
                // SAFETY: a C string by the function's contract.
                if unsafe { is_device(path) } {
                    return answer(device::open(flags));
                }
                syscall!(libc::SYS_openat, dir, path, flags, mode) as c_int
            }
        )*
    };
}
openat_functions!(openat, openat64);

/// Gives the status of the engine the number of the device.
unsafe fn disguise(status: *mut libc::stat) {
    // SAFETY: a successful call filled the structure.
    unsafe { (*status).st_rdev = libc::makedev(DEVICE_NUMBER.0, DEVICE_NUMBER.1) };
}

unsafe fn status(dir: c_int, path: *const c_char, status: *mut libc::stat, flags: c_int) -> c_int {
    // SAFETY: a C string by the function's contract.
    let ours = unsafe { is_device(path) };
    let path = if ours { ENGINE.as_ptr() } else { path };
    let result = syscall!(libc::SYS_newfstatat, dir, path, status, flags) as c_int;
    if ours && result == 0 {
        // SAFETY: the call succeeded.
        unsafe { disguise(status) };
    }
    result
}

macro_rules! stat_functions {
    ($flags:expr, $($name:ident),*) => {
        $(
            /// See `stat(2)`.
            #[unsafe(no_mangle)]
            unsafe extern "C" fn $name(path: *const c_char, buffer: *mut libc::stat) -> c_int {
                // SAFETY: the same contract.
                unsafe { status(libc::AT_FDCWD, path, buffer, $flags) }
            }
        )*
    };
}
stat_functions!(0, stat, stat64);
stat_functions!(libc::AT_SYMLINK_NOFOLLOW, lstat, lstat64);

macro_rules! versioned_stat_functions {
    ($flags:expr, $($name:ident),*) => {
        $(
            /// `stat` as programs built against an old C library call it.
            #[unsafe(no_mangle)]
            unsafe extern "C" fn $name(_: c_int, path: *const c_char, buffer: *mut libc::stat) -> c_int {
                // SAFETY: the same contract.
                unsafe { status(libc::AT_FDCWD, path, buffer, $flags) }
            }
        )*
    };
}
versioned_stat_functions!(0, __xstat, __xstat64);
versioned_stat_functions!(libc::AT_SYMLINK_NOFOLLOW, __lxstat, __lxstat64);

macro_rules! fstatat_functions {
    ($($name:ident),*) => {
        $(
            /// See `fstatat(2)`.
            #[unsafe(no_mangle)]
            unsafe extern "C" fn $name(
                dir: c_int,
                path: *const c_char,
                buffer: *mut libc::stat,
                flags: c_int,
            ) -> c_int {
                // SAFETY: the same contract.
                unsafe { status(dir, path, buffer, flags) }
            }
        )*
    };
}
fstatat_functions!(fstatat, fstatat64);

/// See `statx(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn statx(
    dir: c_int,
    path: *const c_char,
    flags: c_int,
    mask: c_uint,
    buffer: *mut libc::statx,
) -> c_int {
    // SAFETY: a C string by the function's contract.
    let ours = unsafe { is_device(path) };
    let path = if ours { ENGINE.as_ptr() } else { path };
    let result = syscall!(libc::SYS_statx, dir, path, flags, mask, buffer) as c_int;
    if ours && result == 0 {
        // SAFETY: the call succeeded and filled the structure.
        unsafe { ((*buffer).stx_rdev_major, (*buffer).stx_rdev_minor) = DEVICE_NUMBER };
    }
    result
}

/// See `access(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn access(path: *const c_char, mode: c_int) -> c_int {
    // SAFETY: a C string by the function's contract.
    let path = if unsafe { is_device(path) } {
        ENGINE.as_ptr()
    } else {
        path
    };
    syscall!(libc::SYS_faccessat, libc::AT_FDCWD, path, mode) as c_int
}

/// See `faccessat(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn faccessat(
    dir: c_int,
    path: *const c_char,
    mode: c_int,
    flags: c_int,
) -> c_int {
    // SAFETY: a C string by the function's contract.
    let path = if unsafe { is_device(path) } {
        ENGINE.as_ptr()
    } else {
        path
    };
    if flags == 0 {
        return syscall!(libc::SYS_faccessat, dir, path, mode) as c_int;
    }
    syscall!(libc::SYS_faccessat2, dir, path, mode, flags) as c_int
}

macro_rules! euidaccess_functions {
    ($($name:ident),*) => {
        $(
            /// See `euidaccess(3)`.
            #[unsafe(no_mangle)]
            unsafe extern "C" fn $name(path: *const c_char, mode: c_int) -> c_int {
                // SAFETY: the same contract.
                unsafe { faccessat(libc::AT_FDCWD, path, mode, libc::AT_EACCESS) }
            }
        )*
    };
}
euidaccess_functions!(euidaccess, eaccess);

/// See `ioctl(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, arg: *mut c_void) -> c_int {
    if fds::is_ours(fd) {
        // The kernel, too, takes 32 bits of the request.
        return answer(device::ioctl(fd, request as u32, arg as u64));
    }
    syscall!(libc::SYS_ioctl, fd, request, arg) as c_int
}

macro_rules! mmap_functions {
    ($($name:ident),*) => {
        $(
            /// See `mmap(2)`.
            #[unsafe(no_mangle)]
            unsafe extern "C" fn $name(
                address: *mut c_void,
                len: usize,
                protection: c_int,
                flags: c_int,
                fd: c_int,
                offset: i64,
            ) -> *mut c_void {
                if flags & libc::MAP_ANONYMOUS == 0
                    && fds::is_ours(fd)
                    && let Err(errno) = device::check_mmap(fd, offset)
                {
                    answer(Err(errno));
                    return libc::MAP_FAILED;
                }
                syscall!(libc::SYS_mmap, address, len, protection, flags, fd, offset) as *mut c_void
            }
        )*
    };
}
mmap_functions!(mmap, mmap64);

/// See `close(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn close(fd: c_int) -> c_int {
    let object = if fds::is_ours(fd) {
        fds::forget(fd)
    } else {
        None
    };
    let result = syscall!(libc::SYS_close, fd) as c_int;
    drop(object);
    result
}

/// See `close_range(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
    const CLOSE_RANGE_CLOEXEC: c_int = 1 << 2;
    let objects = if flags & CLOSE_RANGE_CLOEXEC == 0 {
        fds::forget_range(first, last)
    } else {
        Vec::new()
    };
    let result = syscall!(libc::SYS_close_range, first, last, flags) as c_int;
    drop(objects);
    result
}

/// See `closefrom(3)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn closefrom(first: c_int) {
    // SAFETY: the same contract.
    unsafe { close_range(first.max(0) as c_uint, c_uint::MAX, 0) };
}

/// Lets the copy of one of our descriptors stand for the same object.
fn duplicated(from: c_int, to: c_int) -> c_int {
    if to < 0 || !fds::is_ours(from) {
        return to;
    }
    answer(fds::get(from).and_then(|object| fds::adopt(to, object)))
}

/// See `dup(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn dup(fd: c_int) -> c_int {
    duplicated(fd, syscall!(libc::SYS_dup, fd) as c_int)
}

fn replace(from: c_int, to: c_int, call: impl FnOnce() -> c_int) -> c_int {
    let replaced = if from != to && fds::is_ours(to) {
        fds::forget(to)
    } else {
        None
    };
    let result = call();
    let result = if from == to {
        result
    } else {
        duplicated(from, result)
    };
    drop(replaced);
    result
}

/// See `dup2(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn dup2(from: c_int, to: c_int) -> c_int {
    replace(from, to, || syscall!(libc::SYS_dup2, from, to) as c_int)
}

/// See `dup3(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn dup3(from: c_int, to: c_int, flags: c_int) -> c_int {
    replace(from, to, || {
        syscall!(libc::SYS_dup3, from, to, flags) as c_int
    })
}

/// The owner of a descriptor's signals: a process group is a negative number, which a system call cannot return.
fn signal_owner(fd: c_int) -> c_int {
    /// `struct f_owner_ex`.
    #[repr(C)]
    struct Owner {
        kind: c_int,
        id: c_int,
    }
    const F_GETOWN_EX: c_int = 16;
    const PROCESS_GROUP: c_int = 2;
    let mut owner = Owner { kind: 0, id: 0 };
    if syscall!(libc::SYS_fcntl, fd, F_GETOWN_EX, &raw mut owner) < 0 {
        return -1;
    }
    if owner.kind == PROCESS_GROUP {
        -owner.id
    } else {
        owner.id
    }
}

macro_rules! fcntl_functions {
    ($($name:ident),*) => {
        $(
            /// See `fcntl(2)`.
            #[unsafe(no_mangle)]
            unsafe extern "C" fn $name(fd: c_int, command: c_int, arg: c_long) -> c_int {
                if command == libc::F_GETOWN {
                    return signal_owner(fd);
                }
                let result = syscall!(libc::SYS_fcntl, fd, command, arg) as c_int;
                if matches!(command, libc::F_DUPFD | libc::F_DUPFD_CLOEXEC) {
                    return duplicated(fd, result);
                }
                result
            }
        )*
    };
}
fcntl_functions!(fcntl, fcntl64);

macro_rules! exit_functions {
    ($($name:ident),*) => {
        $(
            /// See `_exit(2)`.
            #[unsafe(no_mangle)]
            unsafe extern "C" fn $name(code: c_int) -> ! {
                trace::finish();
                loop {
                    syscall!(libc::SYS_exit_group, code);
                }
            }
        )*
    };
}
exit_functions!(_exit, _Exit);
