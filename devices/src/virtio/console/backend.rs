//! What is at the host's end of a console.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, RawFd},
        unix::{
            fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
            net::UnixListener,
        },
    },
};

/// The host's end of a console.
pub enum Backend {
    /// Nothing comes in, and what the guest prints is lost.
    Null,
    /// Files: those of a terminal, of pipes, or one that takes the output.
    Files {
        /// Where the guest's input comes from.
        input: Option<File>,
        /// Where its output goes.
        output: File,
    },
    /// The master of a pseudo-terminal, which somebody may open the other side of.
    Pty(File),
    /// A socket to connect to. There is one client at a time: the last that came.
    Socket(UnixListener),
}

/// Device numbers of `/dev/ptmx`.
const PTMX: (u32, u32) = (5, 2);

/// `file`, such that reading and writing never wait.
///
/// A terminal is opened again for this where it can be: whether calls wait is a property of the open file, which others — the
/// shell that started us — may share. Ordinary files never wait for anybody, and stay what they are.
pub(super) fn without_waiting(file: File) -> io::Result<File> {
    let metadata = file.metadata()?;
    let kind = metadata.file_type();
    if !(kind.is_char_device() || kind.is_fifo() || kind.is_socket()) {
        return Ok(file);
    }
    let device = metadata.rdev();
    let master = (libc::major(device), libc::minor(device)) == PTMX;
    if !kind.is_socket() && !master {
        let (readable, writable) = directions(file.as_raw_fd())?;
        let again = OpenOptions::new()
            .read(readable)
            .write(writable)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(format!("/proc/self/fd/{}", file.as_raw_fd()));
        if let Ok(again) = again {
            return Ok(again);
        }
    }
    let flags = flags(file.as_raw_fd())?;
    // SAFETY: this sets a flag of an open file, and touches no memory.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(file),
    }
}

/// Whether somebody has the other side of the pseudo-terminal with this master open.
pub(super) fn is_attached(master: RawFd) -> bool {
    let mut poll = libc::pollfd {
        fd: master,
        events: 0,
        revents: 0,
    };
    // SAFETY: the pointer leads to one `pollfd`; the call does not wait.
    let found = unsafe { libc::poll(&raw mut poll, 1, 0) };
    found == 0 || poll.revents & libc::POLLHUP == 0
}

fn flags(fd: RawFd) -> io::Result<i32> {
    // SAFETY: this reads flags of an open file, and touches no memory.
    match unsafe { libc::fcntl(fd, libc::F_GETFL) } {
        -1 => Err(io::Error::last_os_error()),
        flags => Ok(flags),
    }
}

/// Whether a file is open for reading, and for writing.
fn directions(fd: RawFd) -> io::Result<(bool, bool)> {
    let mode = flags(fd)? & libc::O_ACCMODE;
    Ok((mode != libc::O_WRONLY, mode != libc::O_RDONLY))
}
