//! A barrier as guests have them: spinning for ever, as those that know nothing of a hypervisor do, or for a while.

use std::{
    hint::spin_loop,
    sync::atomic::{
        AtomicBool, AtomicU32,
        Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst},
    },
};

use crate::clock;

pub(super) struct Barrier {
    members: u32,
    arrived: AtomicU32,
    generation: AtomicU32,
    asleep: AtomicU32,
    over: AtomicBool,
}

impl Barrier {
    pub(super) fn new(members: u32) -> Self {
        Self {
            members,
            arrived: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            asleep: AtomicU32::new(0),
            over: AtomicBool::new(false),
        }
    }

    /// Waits for the others; asleep after `block_after_us` microseconds, if there is a number.
    pub(super) fn wait(&self, block_after_us: Option<u32>) {
        let generation = self.generation.load(Acquire);
        if self.arrived.fetch_add(1, AcqRel) + 1 == self.members {
            self.arrived.store(0, Relaxed);
            self.generation.fetch_add(1, SeqCst);
            if self.asleep.load(SeqCst) > 0 {
                self.wake();
            }
            return;
        }
        let begun = clock::now_ns();
        let mut looks = 0u32;
        while self.generation.load(Acquire) == generation && !self.over.load(Relaxed) {
            spin_loop();
            looks = looks.wrapping_add(1);
            if let Some(limit) = block_after_us
                && looks.is_multiple_of(64)
                && clock::now_ns() - begun > u64::from(limit) * 1000
            {
                self.sleep_while(generation);
            }
        }
    }

    /// Nobody waits any more.
    pub(super) fn end(&self) {
        self.over.store(true, Release);
        self.generation.fetch_add(1, SeqCst);
        self.wake();
    }

    fn sleep_while(&self, generation: u32) {
        self.asleep.fetch_add(1, SeqCst);
        // SAFETY: waits on a word that lives as long as this, without a time limit.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                self.generation.as_ptr(),
                libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                generation,
                std::ptr::null::<libc::timespec>(),
            );
        }
        self.asleep.fetch_sub(1, SeqCst);
    }

    fn wake(&self) {
        // SAFETY: wakes those that wait on the word.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                self.generation.as_ptr(),
                libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
                i32::MAX,
            );
        }
    }
}
