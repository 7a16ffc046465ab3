//! Where a writer of the ledger may be killed: between any two of its system calls. In tests a process can be told to die at one.

/// Dies here in a test that counts down to this point.
#[cfg(test)]
pub(super) fn point() {
    use std::sync::{
        OnceLock,
        atomic::{AtomicI64, Ordering},
    };
    static LEFT: OnceLock<AtomicI64> = OnceLock::new();
    let left = LEFT.get_or_init(|| {
        let step = std::env::var("ROTA_LEDGER_DIE_AT").ok();
        AtomicI64::new(step.and_then(|step| step.parse().ok()).unwrap_or(i64::MAX))
    });
    if left.fetch_sub(1, Ordering::Relaxed) == 0 {
        // SAFETY: ends this process, as if from outside.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    }
}

/// Nothing.
#[cfg(not(test))]
pub(super) fn point() {}
