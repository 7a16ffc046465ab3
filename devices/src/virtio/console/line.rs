//! The line between the device and the host's end: what is on its way out, and whether there is somebody.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, ErrorKind, Read, Write},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::net::UnixListener,
    },
};

use tracing::info;

use super::backend::{Backend, is_attached, without_waiting};

/// Bytes that are on their way out before the guest has to wait; and that are kept for the one who comes.
pub(super) const CAPACITY: usize = 64 << 10;

/// What reading from a line gives.
pub(super) enum Input {
    /// So many bytes.
    Bytes(usize),
    /// Nothing yet.
    Later,
    /// Nothing any more: the line has been hung up.
    End,
}

/// What writing to a line gives.
pub(super) enum Output {
    /// Nothing is on its way any more.
    Done,
    /// The other end takes nothing now.
    Later,
    /// The line has been hung up.
    End,
}

/// Where the ends of a line come from.
enum Source {
    /// The files are there, or they are gone for good.
    Fixed,
    Pty(File),
    Socket(UnixListener),
}

/// A line to the host's end of a console.
pub(super) struct Line {
    source: Source,
    input: Option<File>,
    output: Option<File>,
    pending: VecDeque<u8>,
}

impl Line {
    pub(super) fn new(backend: Backend) -> io::Result<Self> {
        let mut line = Self {
            source: Source::Fixed,
            input: None,
            output: None,
            pending: VecDeque::new(),
        };
        match backend {
            Backend::Null => {}
            Backend::Files { input, output } => {
                line.input = input.map(without_waiting).transpose()?;
                line.output = Some(without_waiting(output)?);
            }
            Backend::Pty(master) => {
                // Until its other side is opened for the first time, it does not say that nobody is there.
                drop(open_peer(&master));
                line.source = Source::Pty(without_waiting(master)?);
                line.look_for_peer()?;
            }
            Backend::Socket(listener) => {
                listener.set_nonblocking(true)?;
                line.source = Source::Socket(listener);
            }
        }
        Ok(line)
    }

    /// The file that input comes from, if there is one now.
    pub(super) fn input(&self) -> Option<&File> {
        self.input.as_ref()
    }

    /// The file that output goes to, if there is one now.
    pub(super) fn output(&self) -> Option<&File> {
        self.output.as_ref()
    }

    /// The socket that clients come to.
    pub(super) fn listener(&self) -> Option<&UnixListener> {
        match &self.source {
            Source::Socket(listener) => Some(listener),
            _ => None,
        }
    }

    /// Whether only looking now and then tells when somebody comes.
    pub(super) fn needs_looking(&self) -> bool {
        matches!(self.source, Source::Pty(_)) && self.output.is_none()
    }

    /// Whether somebody has opened the other side of the pseudo-terminal; if so, the line is up.
    pub(super) fn look_for_peer(&mut self) -> io::Result<bool> {
        let Source::Pty(master) = &self.source else {
            return Ok(false);
        };
        if !is_attached(master.as_raw_fd()) {
            return Ok(false);
        }
        (self.input, self.output) = (Some(master.try_clone()?), Some(master.try_clone()?));
        Ok(true)
    }

    /// A client has come to the socket. The line must be down.
    pub(super) fn accept(&mut self) -> io::Result<()> {
        let Source::Socket(listener) = &self.source else {
            return Ok(());
        };
        let (client, _) = listener.accept()?;
        client.set_nonblocking(true)?;
        let client = File::from(OwnedFd::from(client));
        self.input = Some(client.try_clone()?);
        self.output = Some(client);
        info!("the console has a client");
        Ok(())
    }

    /// The line is down, until somebody comes. What is on its way to an end that is gone for good is lost.
    pub(super) fn hang_up(&mut self) {
        (self.input, self.output) = (None, None);
        if matches!(self.source, Source::Fixed) {
            self.pending = VecDeque::new();
        }
    }

    /// There is no more input.
    pub(super) fn end_input(&mut self) {
        self.input = None;
    }

    /// Whether the end of the input is the end of the line.
    pub(super) fn is_one_connection(&self) -> bool {
        !matches!(self.source, Source::Fixed)
    }

    /// For how many bytes there is room.
    pub(super) fn room(&self) -> usize {
        match self.output {
            Some(_) => CAPACITY - self.pending.len(),
            None => CAPACITY,
        }
    }

    /// Takes `bytes`, at most as many as there is [`Line::room`] for. Where nobody is, the oldest bytes make way.
    pub(super) fn take(&mut self, bytes: &[u8]) {
        if self.output.is_none() {
            if matches!(self.source, Source::Fixed) {
                return;
            }
            let surplus = (self.pending.len() + bytes.len()).saturating_sub(CAPACITY);
            self.pending.drain(..surplus.min(self.pending.len()));
        }
        self.pending.extend(bytes);
    }

    /// Writes what is on its way out.
    pub(super) fn flush(&mut self) -> Output {
        let Some(output) = &mut self.output else {
            return Output::Done;
        };
        if let Source::Pty(master) = &self.source
            && !is_attached(master.as_raw_fd())
        {
            return Output::End;
        }
        while !self.pending.is_empty() {
            match output.write(self.pending.as_slices().0) {
                Ok(count) => {
                    self.pending.drain(..count);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Output::Later,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    info!("the other end of the console takes nothing any more: {error}");
                    return Output::End;
                }
            }
        }
        Output::Done
    }

    /// Reads input into `bytes`, which has room for one at least.
    pub(super) fn read(&mut self, bytes: &mut [u8]) -> Input {
        let Some(input) = &mut self.input else {
            return Input::End;
        };
        loop {
            return match input.read(bytes) {
                Ok(0) => Input::End,
                Ok(count) => Input::Bytes(count),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => Input::Later,
                Err(_) => Input::End,
            };
        }
    }
}

/// Opens the other side of a pseudo-terminal.
fn open_peer(master: &File) -> io::Result<OwnedFd> {
    // SAFETY: the call takes flags and gives a new descriptor, which is nobody else's.
    unsafe {
        match libc::ioctl(
            master.as_raw_fd(),
            libc::TIOCGPTPEER,
            libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC,
        ) {
            -1 => Err(io::Error::last_os_error()),
            peer => Ok(OwnedFd::from_raw_fd(peer)),
        }
    }
}
