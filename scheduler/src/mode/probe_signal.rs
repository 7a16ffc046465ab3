//! A signal to end `MSHV_RUN_VP` with, borrowed for a moment.
//!
//! The ioctl ends when a signal comes whose handler runs. A real-time signal nobody uses gets an empty handler while this
//! lives, and its old disposition back afterwards. The first real-time signal is left alone: it is the one that kicks the VPs
//! of a running machine.

use std::{io, mem, ptr};

/// Signals at the end of the range that are left alone.
const RESERVED: libc::c_int = 2;

extern "C" fn nothing(_: libc::c_int) {}

/// The borrowed signal.
#[derive(Debug)]
pub(super) struct ProbeSignal {
    number: libc::c_int,
}

/// The calling thread's signal mask from before; it is restored when this is dropped.
pub(super) struct Blocked(libc::sigset_t);

impl ProbeSignal {
    /// Borrows one.
    ///
    /// # Errors
    /// When every real-time signal is in use.
    pub(super) fn borrow() -> io::Result<Self> {
        let free = |number: &libc::c_int| {
            disposition(*number).is_some_and(|old| old.sa_sigaction == libc::SIG_DFL)
        };
        let number = (libc::SIGRTMIN() + 1..=libc::SIGRTMAX() - RESERVED)
            .find(free)
            .ok_or_else(|| io::Error::other("every real-time signal is in use"))?;
        // SAFETY: an all-zero `sigaction` is a valid one: no flags, so that the ioctl returns, and nothing masked. The
        // handler does nothing, which is async-signal-safe.
        unsafe {
            let mut action: libc::sigaction = mem::zeroed();
            action.sa_sigaction = handler();
            if libc::sigaction(number, &raw const action, ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(Self { number })
    }

    /// Sends it to a thread of this process, which the caller knows to be there.
    pub(super) fn send(&self, thread: libc::pid_t) {
        // SAFETY: plain system calls; the handler is installed.
        unsafe {
            libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, self.number);
        }
    }

    /// Lets it through to the calling thread.
    pub(super) fn admit(&self) {
        // SAFETY: a set on the stack, with one signal that exists.
        unsafe {
            let mut set: libc::sigset_t = mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, self.number);
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, ptr::null_mut());
        }
    }
}

impl Drop for ProbeSignal {
    fn drop(&mut self) {
        // Somebody else may have taken it meanwhile.
        if disposition(self.number).is_some_and(|now| now.sa_sigaction == handler()) {
            // SAFETY: an all-zero `sigaction` is the default disposition, which it had.
            unsafe {
                let action: libc::sigaction = mem::zeroed();
                libc::sigaction(self.number, &raw const action, ptr::null_mut());
            }
        }
    }
}

fn handler() -> libc::sighandler_t {
    nothing as extern "C" fn(libc::c_int) as libc::sighandler_t
}

fn disposition(number: libc::c_int) -> Option<libc::sigaction> {
    // SAFETY: asks only; the structure is filled in where the call succeeds.
    unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        (libc::sigaction(number, ptr::null(), &raw mut action) == 0).then_some(action)
    }
}

impl Blocked {
    /// Blocks every signal on the calling thread, so that threads it starts are born so.
    pub(super) fn all() -> Self {
        // SAFETY: two sets on the stack; the call fills in the second.
        unsafe {
            let (mut all, mut before): (libc::sigset_t, libc::sigset_t) =
                (mem::zeroed(), mem::zeroed());
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
            Self(before)
        }
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // SAFETY: the mask the thread had.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, ptr::null_mut()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_left_behind() {
        let signal = ProbeSignal::borrow().unwrap();
        let number = signal.number;
        assert!(number > libc::SIGRTMIN());
        assert_eq!(disposition(number).unwrap().sa_sigaction, handler());
        drop(signal);
        assert_eq!(disposition(number).unwrap().sa_sigaction, libc::SIG_DFL);
    }
}
