//! Getting VPs out of the guest while guest memory changes, and keeping them in while it does not.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, Ordering};
use std::sync::{
    Arc, MutexGuard, Once, PoisonError, RwLockReadGuard, RwLockWriteGuard, TryLockError,
};
use std::time::Duration;

use super::Memory;
use crate::errno::Errno;

/// How to get one VP's thread out of `KVM_RUN`.
pub(crate) struct Kick {
    /// The thread inside the run guard, 0 when none is.
    tid: AtomicI32,
    /// The `immediate_exit` byte of the VP's `kvm_run` page.
    immediate_exit: AtomicPtr<u8>,
}

impl Kick {
    /// `immediate_exit` must stay valid for as long as the returned object lives.
    pub(crate) fn new(immediate_exit: *mut u8) -> Self {
        Self {
            tid: AtomicI32::new(0),
            immediate_exit: AtomicPtr::new(immediate_exit),
        }
    }

    fn set_immediate_exit(&self, value: u8) {
        // SAFETY: the pointer is valid by the contract of `new`; the kernel reads the byte at any time, hence
        // volatile.
        unsafe {
            self.immediate_exit
                .load(Ordering::Relaxed)
                .write_volatile(value);
        };
    }

    /// Makes `KVM_RUN` of this VP return, if its thread is inside.
    pub(crate) fn kick(&self) {
        let tid = self.tid.load(Ordering::Acquire);
        if tid != 0 {
            self.set_immediate_exit(1);
            // SAFETY: signals a thread of this process; the handler does nothing. A thread that has ended makes
            // it fail, which is fine.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, signal()) };
        }
    }
}

/// Held by a VP's thread around `KVM_RUN`: guest memory does not change meanwhile.
///
/// A change of memory gets the VPs out: `KVM_RUN` then fails with `EINTR`, and so does `RUN_VP`, as after any
/// signal.
pub(crate) struct RunGuard<'a> {
    _gate: RwLockReadGuard<'a, ()>,
    kick: &'a Kick,
}

/// No VP runs while this lives.
pub(super) struct Stopped<'a> {
    changing: &'a AtomicBool,
    _gate: RwLockWriteGuard<'a, ()>,
    _turn: MutexGuard<'a, ()>,
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        self.changing.store(false, Ordering::Release);
    }
}

impl Drop for RunGuard<'_> {
    fn drop(&mut self) {
        self.kick.tid.store(0, Ordering::Release);
    }
}

/// The real-time signal that interrupts `KVM_RUN`. Clients use the low ones.
pub(crate) fn signal() -> i32 {
    libc::SIGRTMAX() - 1
}

extern "C" fn nothing(_: i32) {}

/// Makes sure the calling thread can be interrupted by [`signal`]; returns its id.
fn prepare_thread() -> i32 {
    static HANDLER: Once = Once::new();
    thread_local!(static TID: i32 = unblock());
    HANDLER.call_once(|| {
        // SAFETY: installs a handler that does nothing, without SA_RESTART, for a signal of our own.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as extern "C" fn(i32) as usize;
            libc::sigaction(signal(), &raw const action, std::ptr::null_mut());
        }
    });
    TID.with(|tid| *tid)
}

fn unblock() -> i32 {
    // SAFETY: builds a signal set on the stack and unblocks it for this thread.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
        libc::gettid()
    }
}

impl Memory {
    /// Registers a VP that [`Self::run_guard`] will be called for.
    pub(crate) fn add_vp(&self, kick: Arc<Kick>) {
        self.vps
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(kick);
    }

    /// Applies pending slot changes and enters the section in which memory does not change. Clears
    /// `immediate_exit`.
    ///
    /// # Errors
    /// What KVM says when it refuses a slot.
    pub(crate) fn run_guard<'a>(&'a self, kick: &'a Kick) -> Result<RunGuard<'a>, Errno> {
        let tid = prepare_thread();
        loop {
            if self.changing.load(Ordering::Acquire) {
                drop(self.turnstile.lock());
            }
            let gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
            if !self.stale.load(Ordering::Acquire) {
                kick.set_immediate_exit(0);
                kick.tid.store(tid, Ordering::Release);
                return Ok(RunGuard { _gate: gate, kick });
            }
            drop(gate);
            let _stopped = self.stop_vps();
            self.lay_background()?;
        }
    }

    /// Gets every VP out of the guest and keeps it out while the result lives.
    pub(super) fn stop_vps(&self) -> Stopped<'_> {
        let turn = self
            .turnstile
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.changing.store(true, Ordering::Release);
        let gate = loop {
            match self.gate.try_write() {
                Ok(gate) => break gate,
                Err(TryLockError::Poisoned(poisoned)) => break poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => self.kick_all(),
            }
        };
        Stopped {
            changing: &self.changing,
            _gate: gate,
            _turn: turn,
        }
    }

    fn kick_all(&self) {
        for kick in self
            .vps
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
        {
            kick.kick();
        }
        std::thread::sleep(Duration::from_micros(100));
    }
}
