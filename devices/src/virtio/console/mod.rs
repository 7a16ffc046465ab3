//! The console device (virtio 1.3, section 5.3): one port, which Linux calls `hvc0`.
//!
//! What the guest prints goes to a [`Backend`]; what comes from there is the guest's input. Both ways are held up when the
//! other side does not take anything: a guest that does not read leaves input where it is, and a terminal that is stopped
//! leaves the guest's output in its queue. Neither costs a byte or a spinning thread. Where nobody is at the other end — a
//! pseudo-terminal that no one has opened, a socket without a client — the guest is not held up; the last of what it prints is
//! kept for the one who comes.

mod backend;
mod line;
mod port;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use vmm_sys_util::timerfd::TimerFd;

use self::{line::Line, port::Port};
use super::{Activation, Announcer, DeviceError, DeviceKind, VirtioDevice, Worker, read_bytes};

pub use backend::Backend;

const QUEUE_SIZE: u16 = 256;
/// The queue of buffers for the guest's input.
const RECEIVE: u16 = 0;
/// The queue of the guest's output.
const TRANSMIT: u16 = 1;
/// `VIRTIO_CONSOLE_F_SIZE`: the configuration has the size of the terminal.
const F_SIZE: u64 = 1;

/// A console with one port.
pub struct Console {
    size: Arc<Size>,
    state: State,
}

enum State {
    /// There is no driver.
    Idle(Line),
    Running(Worker<Port>),
    /// The line was lost to a thread that has died.
    Broken,
}

impl Console {
    /// A console whose other end is `backend`.
    ///
    /// # Errors
    /// When its files cannot be used as a console's.
    pub fn new(backend: Backend) -> io::Result<Self> {
        Ok(Self {
            size: Arc::default(),
            state: State::Idle(Line::new(backend)?),
        })
    }

    /// A handle to change the size of the terminal with.
    #[must_use]
    pub fn handle(&self) -> ConsoleHandle {
        ConsoleHandle(Arc::clone(&self.size))
    }
}

/// The size of a console's terminal, as the VMM changes it.
#[derive(Clone)]
pub struct ConsoleHandle(Arc<Size>);

impl ConsoleHandle {
    /// The terminal has this many columns and rows from now on.
    pub fn resize(&self, columns: u16, rows: u16) {
        let new = u32::from(rows) << 16 | u32::from(columns);
        if self.0.packed.swap(new, Ordering::Relaxed) != new {
            self.0.announcer.announce();
        }
    }
}

/// Columns in the low half of `packed`, rows in the high one, as the configuration begins; zero while nobody knows.
#[derive(Default)]
struct Size {
    packed: AtomicU32,
    announcer: Announcer,
}

impl VirtioDevice for Console {
    fn kind(&self) -> DeviceKind {
        DeviceKind {
            id: 3,
            pci_class: 0x0780,
        }
    }

    fn features(&self) -> u64 {
        F_SIZE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let size = self.size.packed.load(Ordering::Relaxed);
        read_bytes(&size.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, mut driver: Activation) -> Result<(), DeviceError> {
        let (receive, transmit) = (driver.queue(RECEIVE)?, driver.queue(TRANSMIT)?);
        self.reset();
        let State::Idle(line) = std::mem::replace(&mut self.state, State::Broken) else {
            return Err(DeviceError::host("the console has failed")(
                io::ErrorKind::BrokenPipe.into(),
            ));
        };
        let look = TimerFd::new()
            .map_err(|error| DeviceError::host("cannot make a timer")(error.into()))?;
        let port = Port::new(line, receive, transmit, look);
        let worker = Worker::spawn("console", port, Arc::clone(&driver.notify))
            .map_err(DeviceError::host("cannot start a thread"))?;
        self.state = State::Running(worker);
        if driver.features & F_SIZE != 0 {
            self.size.announcer.set(Some(driver.notify));
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.size.announcer.set(None);
        self.state = match std::mem::replace(&mut self.state, State::Broken) {
            State::Running(worker) => worker
                .stop()
                .map_or(State::Broken, |port| State::Idle(port.into_line())),
            other => other,
        };
    }
}
