//! The user's terminal while a guest's console is on it: raw input, and back again whatever happens.
//!
//! Input goes to the guest key by key, Ctrl-C included; Ctrl-A is the user's way out ([`Escape`]). Output processing stays
//! on, so that messages of the VMM itself still look right. The terminal is restored when [`RawMode`] is dropped, when a
//! thread panics, and by [`restore_now`] in a signal handler.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::RawFd,
    panic,
    sync::{
        Once, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

/// The terminal and what it was like before. Set once in a process: there is one standard input.
static SAVED: OnceLock<(RawFd, libc::termios)> = OnceLock::new();
static IS_RAW: AtomicBool = AtomicBool::new(false);

/// While it lives, the terminal on standard input is in raw mode.
#[derive(Debug)]
pub struct RawMode(());

impl RawMode {
    /// Puts the terminal on standard input into raw mode. `None` where standard input is no terminal, or one that belongs to
    /// another job.
    ///
    /// # Errors
    /// When the terminal refuses.
    pub fn enter() -> io::Result<Option<Self>> {
        const STDIN: RawFd = libc::STDIN_FILENO;
        let mut before = MaybeUninit::<libc::termios>::uninit();
        // SAFETY: `before` is written by the call, and read only if the call says so.
        let is_terminal = unsafe { libc::tcgetattr(STDIN, before.as_mut_ptr()) } == 0;
        // SAFETY: no arguments to get wrong. A background job would be stopped for touching the terminal.
        let in_foreground = unsafe { libc::tcgetpgrp(STDIN) == libc::getpgrp() };
        if !is_terminal || !in_foreground {
            return Ok(None);
        }
        // SAFETY: `tcgetattr` has filled it in.
        let before = unsafe { before.assume_init() };
        let (fd, _) = SAVED.get_or_init(|| (STDIN, before));
        restore_on_panic();
        let mut raw = before;
        raw.c_iflag &= !(libc::BRKINT
            | libc::ICRNL
            | libc::INLCR
            | libc::IGNCR
            | libc::INPCK
            | libc::ISTRIP
            | libc::IXON);
        raw.c_lflag &= !(libc::ECHO | libc::ECHONL | libc::ICANON | libc::IEXTEN | libc::ISIG);
        raw.c_cc[libc::VMIN] = 1;
        raw.c_cc[libc::VTIME] = 0;
        IS_RAW.store(true, Ordering::Release);
        // SAFETY: a valid `termios`.
        if unsafe { libc::tcsetattr(*fd, libc::TCSANOW, &raw const raw) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Some(Self(())))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore_now();
    }
}

/// Restores the terminal if it is raw. Async-signal-safe.
pub fn restore_now() {
    if IS_RAW.swap(false, Ordering::AcqRel)
        && let Some((fd, before)) = SAVED.get()
    {
        // SAFETY: a valid `termios`; nothing can be done about a failure.
        unsafe { libc::tcsetattr(*fd, libc::TCSANOW, before) };
    }
}

fn restore_on_panic() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let report = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            restore_now();
            report(info);
        }));
    });
}

/// What a stretch of typed bytes amounts to.
#[derive(Debug, PartialEq, Eq)]
pub struct Typed {
    /// Bytes for the guest.
    pub bytes: Vec<u8>,
    /// The user wants to leave: nothing after this counts.
    pub leave: bool,
}

/// Watches for Ctrl-A: `x` after it leaves, Ctrl-A again sends one, anything else is dropped with it.
#[derive(Debug, Default)]
pub struct Escape {
    armed: bool,
}

impl Escape {
    const CTRL_A: u8 = 0x01;

    /// Takes what was typed.
    pub fn filter(&mut self, typed: &[u8]) -> Typed {
        let mut bytes = Vec::with_capacity(typed.len());
        for &byte in typed {
            match (std::mem::take(&mut self.armed), byte) {
                (true, b'x' | b'X') => return Typed { bytes, leave: true },
                (true, Self::CTRL_A) => bytes.push(byte),
                (true, _) => {}
                (false, Self::CTRL_A) => self.armed = true,
                (false, _) => bytes.push(byte),
            }
        }
        Typed {
            bytes,
            leave: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_x_leaves_even_when_typed_in_two_reads() {
        let mut escape = Escape::default();
        assert_eq!(
            escape.filter(b"ls\r\x01"),
            Typed {
                bytes: b"ls\r".to_vec(),
                leave: false
            }
        );
        assert_eq!(
            escape.filter(b"xyz"),
            Typed {
                bytes: vec![],
                leave: true
            }
        );
    }

    #[test]
    fn ctrl_a_twice_is_one_and_ctrl_c_is_the_guests() {
        let mut escape = Escape::default();
        assert_eq!(escape.filter(b"\x01\x01\x03x\x01qz").bytes, b"\x01\x03xz");
    }
}
