//! SIGINT, SIGTERM and SIGHUP: the first asks for an orderly end, the second gets an immediate one.

use std::{
    io, mem,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    ptr,
};

use crate::terminal;

const ENDING: [libc::c_int; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

/// The signals that end a run, as a descriptor to wait on.
pub struct Signals(OwnedFd);

impl Signals {
    /// Takes the signals for this descriptor. To be called before any thread is started: threads inherit the mask.
    ///
    /// # Errors
    /// What the host says.
    pub fn take() -> io::Result<Self> {
        let set = set();
        // SAFETY: a valid signal set; the old mask is not asked for.
        let masked =
            unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) };
        if masked != 0 {
            return Err(io::Error::from_raw_os_error(masked));
        }
        // SAFETY: a valid signal set; the result is checked.
        let fd =
            unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor that was just opened and that nothing else owns.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// The signal that has come, if one has.
    #[must_use]
    pub fn read(&self) -> Option<i32> {
        // SAFETY: all-zero is a valid `signalfd_siginfo`.
        let mut info: libc::signalfd_siginfo = unsafe { mem::zeroed() };
        let size = size_of_val(&info);
        // SAFETY: `info` is as large as the call is told, and plain integers.
        let read = unsafe { libc::read(self.0.as_raw_fd(), (&raw mut info).cast(), size) };
        (usize::try_from(read) == Ok(size)).then(|| info.ssi_signo.cast_signed())
    }

    /// From now on the next of the signals ends the process at once, with the terminal restored.
    pub fn make_next_fatal(&self) {
        extern "C" fn end(signal: libc::c_int) {
            terminal::restore_now();
            // SAFETY: async-signal-safe, and does not return.
            unsafe { libc::_exit(128 + signal) };
        }
        let set = set();
        // SAFETY: an all-zero `sigaction` is a valid one; the handler only makes async-signal-safe calls; the sets are
        // valid. A failure leaves the signals blocked, which loses nothing but the shortcut.
        unsafe {
            let mut action: libc::sigaction = mem::zeroed();
            action.sa_sigaction = end as extern "C" fn(libc::c_int) as libc::sighandler_t;
            for signal in ENDING {
                libc::sigaction(signal, &raw const action, ptr::null_mut());
            }
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, ptr::null_mut());
        }
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn set() -> libc::sigset_t {
    // SAFETY: the set is initialized by `sigemptyset`, and the signals exist.
    unsafe {
        let mut set = mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in ENDING {
            libc::sigaddset(&raw mut set, signal);
        }
        set
    }
}
