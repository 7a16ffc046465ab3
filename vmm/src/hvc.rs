//! The host's end of the virtio console: opened once, and given to the device of each boot.

use std::{
    fs::File,
    io::{self, Read, Write},
    mem,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
    ptr,
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use devices::virtio::console::{Backend, ConsoleHandle};

use crate::{
    config::{ConsoleConfig, ConsoleMode},
    console::open_pty,
    terminal::{Escape, RawMode},
};

/// Why the host's end cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum HvcError {
    /// A file or socket.
    #[error("console: cannot create {path}")]
    Create {
        /// Its path.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// No pseudo-terminal.
    #[error("console: cannot open a pseudo-terminal")]
    Pty(#[source] io::Error),
    /// The terminal does not become raw.
    #[error("console: cannot set up the terminal")]
    Terminal(#[source] io::Error),
}

/// The host's end. It outlives reboots of the guest.
pub struct Hvc {
    kind: Kind,
    /// The console of the guest that runs, for the size of the terminal.
    current: Arc<Mutex<Option<ConsoleHandle>>>,
}

enum Kind {
    Off,
    Null,
    Standard {
        /// What is typed, but for what is not for the guest.
        typed: File,
        _raw: Option<RawMode>,
    },
    Pty {
        master: File,
        path: PathBuf,
    },
    File(File),
    Socket {
        listener: UnixListener,
        path: PathBuf,
    },
}

impl Hvc {
    /// Opens what `config` asks for. Call it on the main thread, before there are others.
    ///
    /// # Errors
    /// [`HvcError`], with the host's reason.
    pub fn open(config: &ConsoleConfig) -> Result<Self, HvcError> {
        let current = Arc::default();
        let path = |path: &Option<PathBuf>| path.clone().unwrap_or_default();
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| HvcError::Create { path, source }
        };
        let kind = match config.mode {
            ConsoleMode::Off => Kind::Off,
            ConsoleMode::Null => Kind::Null,
            ConsoleMode::Tty => standard(&current).map_err(HvcError::Terminal)?,
            ConsoleMode::Pty => {
                let (master, path) = open_pty().map_err(HvcError::Pty)?;
                Kind::Pty { master, path }
            }
            ConsoleMode::File => {
                let path = path(&config.file);
                Kind::File(File::create(&path).map_err(failed(&path))?)
            }
            ConsoleMode::Socket => {
                let path = path(&config.socket);
                let listener = UnixListener::bind(&path).map_err(failed(&path))?;
                Kind::Socket { listener, path }
            }
        };
        Ok(Self { kind, current })
    }

    /// The path of the pseudo-terminal, if it is one.
    #[must_use]
    pub fn pty(&self) -> Option<&Path> {
        match &self.kind {
            Kind::Pty { path, .. } => Some(path),
            _ => None,
        }
    }

    /// The device's other end; `None` for a machine without a console.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn backend(&self) -> io::Result<Option<Backend>> {
        Ok(Some(match &self.kind {
            Kind::Off => return Ok(None),
            Kind::Null => Backend::Null,
            Kind::Standard { typed, .. } => Backend::Files {
                input: Some(typed.try_clone()?),
                output: File::from(io::stdout().as_fd().try_clone_to_owned()?),
            },
            Kind::Pty { master, .. } => Backend::Pty(master.try_clone()?),
            Kind::File(file) => Backend::Files {
                input: None,
                output: file.try_clone()?,
            },
            Kind::Socket { listener, .. } => Backend::Socket(listener.try_clone()?),
        }))
    }

    /// The console of this boot.
    pub fn adopt(&self, console: ConsoleHandle) {
        if matches!(self.kind, Kind::Standard { .. }) {
            tell_size(&console);
        }
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = Some(console);
    }
}

impl Drop for Hvc {
    fn drop(&mut self) {
        if let Kind::Socket { path, .. } = &self.kind {
            // Somebody may have removed it already.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// The terminal on standard input and output. A thread passes on what is typed and how large the terminal is.
fn standard(current: &Arc<Mutex<Option<ConsoleHandle>>>) -> io::Result<Kind> {
    let raw = RawMode::enter()?;
    let mut escape = raw.as_ref().map(|_| Escape::default());
    let sizes = sizes()?;
    let (typed, keys) = pipe()?;
    // A terminal that belongs to another job must not be read.
    let readable = raw.is_some() || !is_terminal(&io::stdin());
    let stdin = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let current = Arc::clone(current);
    thread::Builder::new()
        .name("console-in".into())
        .spawn(move || {
            // Without its end of the pipe, the guest finds the end of its input.
            let mut input = readable.then_some((stdin, keys));
            loop {
                match next(input.as_ref().map(|(stdin, _)| stdin), &sizes) {
                    Next::Size => {
                        if let Some(console) =
                            &*current.lock().unwrap_or_else(PoisonError::into_inner)
                        {
                            tell_size(console);
                        }
                    }
                    Next::Input => {
                        input =
                            input.take_if(|(stdin, keys)| pass_on(stdin, keys, escape.as_mut()));
                    }
                }
            }
        })?;
    Ok(Kind::Standard { typed, _raw: raw })
}

/// What the thread has to do next.
enum Next {
    Input,
    Size,
}

fn next(input: Option<&File>, sizes: &OwnedFd) -> Next {
    let wait = |fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let mut polls = [
        wait(sizes.as_raw_fd()),
        wait(input.map_or(-1, AsRawFd::as_raw_fd)),
    ];
    loop {
        // SAFETY: a valid array and its length.
        if unsafe { libc::poll(polls.as_mut_ptr(), 2, -1) } > 0 {
            break;
        }
    }
    if polls[0].revents == 0 {
        return Next::Input;
    }
    let mut info = [0u8; mem::size_of::<libc::signalfd_siginfo>()];
    // SAFETY: the buffer is as large as the call is told.
    unsafe { libc::read(sizes.as_raw_fd(), info.as_mut_ptr().cast(), info.len()) };
    Next::Size
}

/// Passes on what is typed. Returns whether there may be more.
fn pass_on(input: &mut File, keys: &mut File, escape: Option<&mut Escape>) -> bool {
    let mut buffer = [0; 512];
    let typed = match input.read(&mut buffer) {
        Ok(0) => return false,
        Ok(length) => &buffer[..length],
        Err(error) => {
            return matches!(
                error.kind(),
                io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
            );
        }
    };
    let Some(escape) = escape else {
        return keys.write_all(typed).is_ok();
    };
    let typed = escape.filter(typed);
    if typed.leave {
        // SAFETY: a signal to this process, which ends a run in order.
        unsafe { libc::kill(libc::getpid(), libc::SIGTERM) };
    }
    keys.write_all(&typed.bytes).is_ok()
}

/// Readable when the terminal has another size.
fn sizes() -> io::Result<OwnedFd> {
    // SAFETY: the set is initialized by `sigemptyset`, and the signal exists; the old mask is not asked for. The descriptor
    // is nobody else's.
    unsafe {
        let mut set = mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGWINCH);
        let masked = libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut());
        if masked != 0 {
            return Err(io::Error::from_raw_os_error(masked));
        }
        match libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) {
            -1 => Err(io::Error::last_os_error()),
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}

/// Tells the guest how large the terminal is, if standard output is one.
fn tell_size(console: &ConsoleHandle) {
    // SAFETY: all-zero is a valid `winsize`, which the call fills.
    let (done, size) = unsafe {
        let mut size: libc::winsize = mem::zeroed();
        let done = libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &raw mut size);
        (done, size)
    };
    if done == 0 {
        console.resize(size.ws_col, size.ws_row);
    }
}

/// A pipe's end to read and its end to write.
fn pipe() -> io::Result<(File, File)> {
    let mut ends = [0; 2];
    // SAFETY: there is room for two descriptors, which are nobody else's.
    unsafe {
        match libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) {
            0 => Ok((File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1]))),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn is_terminal(file: &impl AsRawFd) -> bool {
    // SAFETY: no memory is involved.
    unsafe { libc::isatty(file.as_raw_fd()) == 1 }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn each_mode_has_its_other_end() {
        let path = std::env::temp_dir().join(format!("rota-hvc-{}", std::process::id()));
        let open = |mode, file: bool, socket: bool| {
            Hvc::open(&ConsoleConfig {
                mode,
                file: file.then(|| path.clone()),
                socket: socket.then(|| path.clone()),
            })
            .unwrap()
        };
        assert!(
            open(ConsoleMode::Off, false, false)
                .backend()
                .unwrap()
                .is_none()
        );
        let null = open(ConsoleMode::Null, false, false).backend().unwrap();
        assert!(matches!(null, Some(Backend::Null)));
        let socket = open(ConsoleMode::Socket, false, true);
        // For each boot, the same one.
        for _ in 0..2 {
            let backend = socket.backend().unwrap();
            assert!(matches!(backend, Some(Backend::Socket(_))));
            UnixStream::connect(&path).unwrap();
        }
        drop(socket);
        assert!(!path.exists());
        let file = open(ConsoleMode::File, true, false);
        assert!(matches!(
            file.backend().unwrap(),
            Some(Backend::Files { input: None, .. })
        ));
        std::fs::remove_file(&path).unwrap();
        let pty = open(ConsoleMode::Pty, false, false);
        assert!(pty.pty().is_some_and(Path::exists));
    }
}
