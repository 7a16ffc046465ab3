//! The host's end of the guest's serial port: where its output goes and where its input comes from.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use crate::{
    config::{SerialConfig, SerialMode},
    terminal::{Escape, RawMode, Typed},
};

/// Why the host's end cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The file cannot be created.
    #[error("serial: cannot create {path}")]
    File {
        /// Its path.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// No pseudo-terminal.
    #[error("serial: cannot open a pseudo-terminal")]
    Pty(#[source] io::Error),
    /// The terminal does not become raw.
    #[error("serial: cannot set up the terminal")]
    Terminal(#[source] io::Error),
}

/// The host's end. It outlives reboots of the guest.
pub struct Console {
    kind: Kind,
    escape: Option<Escape>,
}

enum Kind {
    Off,
    Null,
    Standard {
        /// Input comes from here until it ends.
        input: Option<File>,
        _raw: Option<RawMode>,
    },
    Pty {
        master: File,
        path: PathBuf,
    },
    File(File),
}

impl Console {
    /// Opens what `config` asks for.
    ///
    /// # Errors
    /// [`ConsoleError`], with the host's reason.
    pub fn open(config: &SerialConfig) -> Result<Self, ConsoleError> {
        let mut escape = None;
        let kind = match config.mode {
            SerialMode::Off => Kind::Off,
            SerialMode::Null => Kind::Null,
            SerialMode::Tty => {
                let raw = RawMode::enter().map_err(ConsoleError::Terminal)?;
                // A terminal that belongs to another job must not be read.
                let readable = raw.is_some() || !is_terminal(&io::stdin());
                // Without the standard library's buffer: what lies in there, nobody could wait for.
                let input = readable
                    .then(|| io::stdin().as_fd().try_clone_to_owned())
                    .transpose();
                let input = input.map_err(ConsoleError::Terminal)?.map(File::from);
                escape = raw.as_ref().map(|_| Escape::default());
                Kind::Standard { input, _raw: raw }
            }
            SerialMode::Pty => {
                let (master, path) = open_pty().map_err(ConsoleError::Pty)?;
                Kind::Pty { master, path }
            }
            SerialMode::File => {
                let path = config.file.as_deref().unwrap_or(Path::new(""));
                let file = File::create(path).map_err(|source| ConsoleError::File {
                    path: path.to_owned(),
                    source,
                })?;
                Kind::File(file)
            }
        };
        Ok(Self { kind, escape })
    }

    /// The path of the pseudo-terminal, if it is one.
    #[must_use]
    pub fn pty(&self) -> Option<&Path> {
        match &self.kind {
            Kind::Pty { path, .. } => Some(path),
            _ => None,
        }
    }

    /// Whether keys typed go to the guest, with Ctrl-A as the way out.
    #[must_use]
    pub fn is_interactive(&self) -> bool {
        self.escape.is_some()
    }

    /// Where the guest's output goes; `None` for a machine without a serial port.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn sink(&self) -> io::Result<Option<Box<dyn Write + Send>>> {
        Ok(match &self.kind {
            Kind::Off => None,
            Kind::Null => Some(Box::new(io::sink())),
            Kind::Standard { .. } => {
                // Unbuffered: the port has its own buffer and knows when to write.
                Some(Box::new(File::from(
                    io::stdout().as_fd().try_clone_to_owned()?,
                )))
            }
            Kind::Pty { master, .. } => Some(Box::new(PtySink::new(master.try_clone()?))),
            Kind::File(file) => Some(Box::new(file.try_clone()?)),
        })
    }

    /// What to wait on for input, while there is any to come.
    #[must_use]
    pub fn input(&self) -> Option<BorrowedFd<'_>> {
        match &self.kind {
            Kind::Standard {
                input: Some(input), ..
            } => Some(input.as_fd()),
            Kind::Pty { master, .. } => Some(master.as_fd()),
            _ => None,
        }
    }

    /// Takes the input that is ready.
    pub fn read(&mut self) -> Typed {
        let mut buffer = [0; 512];
        let result = match &mut self.kind {
            Kind::Standard {
                input: Some(file), ..
            }
            | Kind::Pty { master: file, .. } => file.read(&mut buffer),
            _ => Ok(0),
        };
        let length = match result {
            Ok(length) if length > 0 => length,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                ) =>
            {
                0
            }
            Ok(_) | Err(_) => {
                self.end_of_input();
                0
            }
        };
        let typed = &buffer[..length];
        match &mut self.escape {
            Some(escape) => escape.filter(typed),
            None => Typed {
                bytes: typed.to_vec(),
                leave: false,
            },
        }
    }

    fn end_of_input(&mut self) {
        if let Kind::Standard { input, .. } = &mut self.kind {
            *input = None;
        }
    }
}

fn is_terminal(file: &impl AsRawFd) -> bool {
    // SAFETY: no memory is involved.
    unsafe { libc::isatty(file.as_raw_fd()) == 1 }
}

/// A pseudo-terminal that need not have anybody at its other end: what is printed meanwhile is kept, the newest of it, and
/// comes out before the next output once somebody has opened it.
struct PtySink {
    master: File,
    kept: VecDeque<u8>,
}

impl PtySink {
    const CAPACITY: usize = 64 << 10;

    fn new(master: File) -> Self {
        Self {
            master,
            kept: VecDeque::new(),
        }
    }
}

impl Write for PtySink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if is_hung_up(&self.master) {
            let room = Self::CAPACITY.saturating_sub(self.kept.len());
            let excess = bytes.len().saturating_sub(room).min(self.kept.len());
            self.kept.drain(..excess);
            self.kept
                .extend(&bytes[bytes.len().saturating_sub(Self::CAPACITY)..]);
            return Ok(bytes.len());
        }
        if !self.kept.is_empty() {
            self.master.write_all(self.kept.make_contiguous())?;
            self.kept.clear();
        }
        self.master.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether nobody has the other end of the pseudo-terminal open.
fn is_hung_up(master: &File) -> bool {
    let mut poll = libc::pollfd {
        fd: master.as_raw_fd(),
        events: 0,
        revents: 0,
    };
    // SAFETY: one valid `pollfd`, and no waiting.
    unsafe { libc::poll(&raw mut poll, 1, 0) > 0 && poll.revents & libc::POLLHUP != 0 }
}

/// A new pseudo-terminal in raw mode, and the path of its other end.
pub(crate) fn open_pty() -> io::Result<(File, PathBuf)> {
    let (mut master, mut slave) = (-1, -1);
    let mut name = [0u8; 128];
    // SAFETY: all-zero is a valid `termios`, which `cfmakeraw` then sets up.
    let mut raw: libc::termios = unsafe { std::mem::zeroed() };
    raw.c_cflag = libc::CS8 | libc::CREAD | libc::B115200;
    // SAFETY: a valid `termios`.
    unsafe { libc::cfmakeraw(&raw mut raw) };
    // SAFETY: the name of a pseudo-terminal ("/dev/pts/N") is far shorter than the buffer; the rest are valid or null.
    let result = unsafe {
        libc::openpty(
            &raw mut master,
            &raw mut slave,
            name.as_mut_ptr().cast(),
            &raw const raw,
            std::ptr::null(),
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: two descriptors that were just opened and that nothing else owns. Closing the slave makes the master report
    // that nobody is there.
    let (master, _slave) = unsafe { (File::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) };
    // SAFETY: no memory is involved.
    unsafe { libc::fcntl(master.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) };
    let end = name
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(name.len());
    Ok((
        master,
        PathBuf::from(String::from_utf8_lossy(&name[..end]).into_owned()),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pty_carries_bytes_both_ways_unchanged_and_keeps_what_nobody_reads() {
        let config = SerialConfig {
            mode: SerialMode::Pty,
            file: None,
        };
        let mut console = Console::open(&config).unwrap();
        let path = console.pty().unwrap().to_owned();
        let mut sink = console.sink().unwrap().unwrap();
        sink.write_all(b"log").unwrap();
        let mut user = File::options().read(true).write(true).open(path).unwrap();
        sink.write_all(b"in:\r\n").unwrap();
        let mut seen = [0; 8];
        user.read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"login:\r\n");
        user.write_all(b"root\r\x01x").unwrap();
        assert_eq!(
            console.read(),
            Typed {
                bytes: b"root\r\x01x".to_vec(),
                leave: false
            }
        );
    }

    #[test]
    fn a_file_takes_output_and_gives_no_input() {
        let path = std::env::temp_dir().join(format!("rota-console-{}", std::process::id()));
        let config = SerialConfig {
            mode: SerialMode::File,
            file: Some(path.clone()),
        };
        let console = Console::open(&config).unwrap();
        console
            .sink()
            .unwrap()
            .unwrap()
            .write_all(b"hello")
            .unwrap();
        assert!(console.input().is_none());
        assert_eq!(std::fs::read(&path).unwrap(), b"hello");
        std::fs::remove_file(path).unwrap();
        let bad = SerialConfig {
            mode: SerialMode::File,
            file: Some("/nonexistent/x".into()),
        };
        assert!(Console::open(&bad).is_err());
    }

    #[test]
    fn off_has_no_sink_and_null_has_one() {
        let open = |mode| {
            Console::open(&SerialConfig { mode, file: None })
                .unwrap()
                .sink()
                .unwrap()
        };
        assert!(open(SerialMode::Off).is_none());
        assert!(open(SerialMode::Null).is_some());
    }
}
