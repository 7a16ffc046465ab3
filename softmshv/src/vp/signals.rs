//! Signals while a VP runs.
//!
//! The driver returns `EINTR` when a signal arrives at any moment of `RUN_VP`. Here part of that time is spent outside
//! `KVM_RUN`, where a signal would run its handler and be forgotten. So all of them wait while the call lasts, and only
//! `KVM_RUN` lets them in, atomically (`KVM_SET_SIGNAL_MASK`).

use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr;
use std::time::Duration;

use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_ptr;

use crate::errno::Errno;
use crate::memory::kick_signal;

/// Signals the kernel sends for what an instruction did: blocking them would kill the process.
const SYNCHRONOUS: [i32; 6] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGTRAP,
    libc::SIGSYS,
];

/// `KVM_SET_SIGNAL_MASK`: `_IOW(KVMIO, 0x8b, struct kvm_signal_mask)`, whose fixed part is a length of four bytes.
const KVM_SET_SIGNAL_MASK: libc::c_ulong = 0x4004_ae8b;

/// The kernel's own signal set: one bit per signal, signal 1 first.
type KernelSet = u64;

#[repr(C, packed)]
struct SignalMask {
    len: u32,
    set: KernelSet,
}

/// Holds signals back for as long as it lives.
pub(super) struct Held {
    before: libc::sigset_t,
}

impl Held {
    /// Holds back all signals but the synchronous ones.
    pub(super) fn new() -> Self {
        let mut before = MaybeUninit::uninit();
        // SAFETY: builds a set on the stack; the old mask is written in full by a call that cannot fail with these
        // arguments.
        unsafe {
            let mut all = MaybeUninit::uninit();
            libc::sigfillset(all.as_mut_ptr());
            for signal in SYNCHRONOUS {
                libc::sigdelset(all.as_mut_ptr(), signal);
            }
            libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
            Self {
                before: before.assume_init(),
            }
        }
    }

    fn blocks(&self, signal: i32) -> bool {
        // SAFETY: a set initialised by the system.
        unsafe { libc::sigismember(&raw const self.before, signal) == 1 }
    }

    /// Sleeps until `fd` is readable, or until a signal of the client has been dealt with. As in `KVM_RUN`, letting the
    /// signals in and falling asleep are one step.
    pub(super) fn sleep(&self, fd: RawFd) -> Woken {
        poll(fd, None, &raw const self.before)
    }

    /// The signals `KVM_RUN` must hold back too: those the thread blocked, except the one memory changes use.
    pub(super) fn during_run(&self) -> KernelSet {
        (1..=64)
            .filter(|signal| *signal != kick_signal() && self.blocks(*signal))
            .fold(0, |set, signal| set | 1 << (signal - 1))
    }

    /// Whether a signal for the client waits, after taking away the one that only interrupts `KVM_RUN`, and those the
    /// client ignores: held back they are kept all the same. True also when nothing waits at all: then what
    /// interrupted is gone already (a stop and continue), and the driver would have returned.
    pub(super) fn client_is_signalled(&self, kicked: bool) -> bool {
        let mut explained = take(kick_signal()) || kicked;
        let mut waits = false;
        for signal in pending().filter(|signal| !self.blocks(*signal)) {
            if is_ignored(signal) {
                explained |= take(signal);
            } else {
                waits = true;
            }
        }
        waits || !explained
    }
}

/// Why a sleep ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Woken {
    /// The descriptor is readable.
    Ready,
    /// A signal's handler has run.
    Signalled,
    /// The time is over.
    Late,
}

/// Sleeps until `fd` is readable, for a limited time and without letting any signal in that is held back.
pub(super) fn nap(fd: RawFd, limit: Duration) -> Woken {
    poll(fd, Some(limit), ptr::null())
}

fn poll(fd: RawFd, limit: Option<Duration>, mask: *const libc::sigset_t) -> Woken {
    let mut polled = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let limit = limit.map(|limit| libc::timespec {
        tv_sec: limit.as_secs() as libc::time_t,
        tv_nsec: limit.subsec_nanos().into(),
    });
    let limit = limit.as_ref().map_or(ptr::null(), ptr::from_ref);
    // SAFETY: one descriptor; time and mask are absent or live on the callers' stacks.
    match unsafe { libc::ppoll(&raw mut polled, 1, limit, mask) } {
        0 => Woken::Late,
        1.. => Woken::Ready,
        _ => Woken::Signalled,
    }
}

/// The signals that wait for this thread.
fn pending() -> impl Iterator<Item = i32> {
    // SAFETY: a set on the stack, initialised by the calls.
    let set = unsafe {
        let mut set = MaybeUninit::uninit();
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigpending(set.as_mut_ptr());
        set.assume_init()
    };
    // SAFETY: an initialised set.
    (1..=libc::SIGRTMAX())
        .filter(move |signal| unsafe { libc::sigismember(&raw const set, *signal) } == 1)
}

/// Takes a waiting signal away without its handler; false when it does not wait.
fn take(signal: i32) -> bool {
    // SAFETY: a set on the stack, and a wait of no time.
    unsafe {
        let mut set = MaybeUninit::uninit();
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), signal);
        let none = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        libc::sigtimedwait(set.as_ptr(), ptr::null_mut(), &raw const none) > 0
    }
}

/// Whether the process ignores `signal`, by its choice or by default.
fn is_ignored(signal: i32) -> bool {
    // SAFETY: reads the disposition into a structure on the stack.
    let handler = unsafe {
        let mut action = MaybeUninit::<libc::sigaction>::zeroed();
        libc::sigaction(signal, ptr::null(), action.as_mut_ptr());
        action.assume_init().sa_sigaction
    };
    let by_default = [libc::SIGCHLD, libc::SIGURG, libc::SIGWINCH, libc::SIGCONT];
    handler == libc::SIG_IGN || handler == libc::SIG_DFL && by_default.contains(&signal)
}

impl Drop for Held {
    fn drop(&mut self) {
        // SAFETY: the mask the thread had.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, ptr::null_mut())
        };
    }
}

/// Tells KVM which signals to hold back inside `KVM_RUN`.
///
/// # Errors
/// What KVM says.
pub(super) fn set_mask(vcpu: &VcpuFd, set: KernelSet) -> Result<(), Errno> {
    let mask = SignalMask {
        len: size_of::<KernelSet>() as u32,
        set,
    };
    // SAFETY: KVM reads a length and as many bytes.
    let result = unsafe { ioctl_with_ptr(&vcpu.as_raw_fd(), KVM_SET_SIGNAL_MASK, &raw const mask) };
    if result < 0 {
        Err(Errno::last())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    extern "C" fn nothing(_: i32) {}

    #[test]
    fn a_signal_waits_and_is_seen() {
        // SAFETY: a handler that does nothing, for a signal only this test uses; raised to this thread.
        unsafe {
            let signal = libc::SIGRTMIN() + 7;
            libc::signal(signal, nothing as extern "C" fn(i32) as usize);
            let held = Held::new();
            assert!(!held.client_is_signalled(true));
            assert!(held.client_is_signalled(false));
            libc::raise(signal);
            assert!(held.client_is_signalled(true));
            drop(held);
            assert!(!Held::new().client_is_signalled(true));
        }
    }

    #[test]
    fn an_ignored_signal_is_dropped() {
        let held = Held::new();
        // SAFETY: raised to this thread, held back, and taken away below.
        unsafe { libc::raise(libc::SIGWINCH) };
        assert!(!held.client_is_signalled(false));
        assert_eq!(pending().find(|signal| *signal == libc::SIGWINCH), None);
    }

    #[test]
    fn a_kick_is_none_of_the_clients() {
        let held = Held::new();
        // SAFETY: raised to this thread, held back, and taken away below.
        unsafe { libc::raise(kick_signal()) };
        assert!(!held.client_is_signalled(false));
    }
}
