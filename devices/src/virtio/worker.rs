//! The thread of a device: waits for kicks and for the host's side, and hands both to the device's [`Handler`].

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    sync::Arc,
    thread::{self, JoinHandle},
};

use tracing::{error, warn};
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd},
};

use super::{DeviceError, Notify};

/// What a worker waits for: descriptors, each with a token that the handler gave it.
pub struct Poll(Epoll);

/// The worker's own token: it is to stop.
const STOP: u64 = u64::MAX;
/// How many events are taken from the kernel at once.
const EVENTS: usize = 16;

impl Poll {
    /// Waits for `events` on `fd` from now on.
    ///
    /// # Errors
    /// What the kernel says, for instance when `fd` is waited for already.
    pub fn add(&self, fd: RawFd, token: u64, events: EventSet) -> io::Result<()> {
        let event = EpollEvent::new(events, token);
        self.0.ctl(ControlOperation::Add, fd, event)
    }

    /// Waits for `bell`, which is written to when there is something to do: a queue's kick, for one. Each time is told once, also what
    /// was before this call, so nobody reads it: a count is full after 2^64 - 2 times only.
    ///
    /// # Errors
    /// What the kernel says, for instance when `bell` is waited for already.
    pub fn add_bell(&self, bell: &EventFd, token: u64) -> io::Result<()> {
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        self.add(bell.as_raw_fd(), token, events)
    }

    /// Waits for other events on `fd`; none is possible, too.
    ///
    /// # Errors
    /// What the kernel says, for instance when `fd` is not waited for.
    pub fn change(&self, fd: RawFd, token: u64, events: EventSet) -> io::Result<()> {
        let event = EpollEvent::new(events, token);
        self.0.ctl(ControlOperation::Modify, fd, event)
    }

    /// Waits for `fd` no longer. Call it before `fd` is closed.
    ///
    /// # Errors
    /// What the kernel says, for instance when `fd` is not waited for.
    pub fn remove(&self, fd: RawFd) -> io::Result<()> {
        self.0
            .ctl(ControlOperation::Delete, fd, EpollEvent::default())
    }
}

/// What a device does on its thread.
pub trait Handler: Send + 'static {
    /// The thread has started: says what to wait for. Tokens are the handler's own, below `u64::MAX`.
    ///
    /// # Errors
    /// Ends the work; the driver is told that the device needs a reset.
    fn start(&mut self, poll: &Poll) -> Result<(), DeviceError>;

    /// Something has happened on the descriptor with this token.
    ///
    /// # Errors
    /// As above.
    fn ready(&mut self, token: u64, events: EventSet, poll: &Poll) -> Result<(), DeviceError>;
}

/// A running thread with a [`Handler`], which comes back when it is stopped.
pub struct Worker<H> {
    stop: EventFd,
    thread: Option<JoinHandle<H>>,
}

impl<H: Handler> Worker<H> {
    /// Starts the thread `name` (at most 15 bytes are seen). When `handler` fails, `notify` asks the driver for a reset.
    ///
    /// # Errors
    /// When the host has no more threads or descriptors.
    pub fn spawn(name: &str, mut handler: H, notify: Arc<dyn Notify>) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let poll = Poll(Epoll::new()?);
        poll.add(stop.as_raw_fd(), STOP, EventSet::IN)?;
        let label = name.to_owned();
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                if let Err(error) = work(&mut handler, &poll) {
                    match &error {
                        DeviceError::Host { what, source } => error!("{label}: {what}: {source}"),
                        error => warn!("{label}: {error}"),
                    }
                    notify.needs_reset();
                }
                handler
            })?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }

    /// Ends the thread and returns its handler; `None` if it has panicked.
    pub fn stop(mut self) -> Option<H> {
        self.end()
    }
}

impl<H> Worker<H> {
    fn end(&mut self) -> Option<H> {
        let thread = self.thread.take()?;
        // An eventfd that is written to once has room.
        let _ = self.stop.write(1);
        thread.join().ok()
    }
}

impl<H> Drop for Worker<H> {
    fn drop(&mut self) {
        self.end();
    }
}

fn work<H: Handler>(handler: &mut H, poll: &Poll) -> Result<(), DeviceError> {
    handler.start(poll)?;
    let mut events = [EpollEvent::default(); EVENTS];
    loop {
        let count = match poll.0.wait(-1, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(source) => {
                return Err(DeviceError::Host {
                    what: "cannot wait for events",
                    source,
                });
            }
        };
        for event in &events[..count] {
            if event.data() == STOP {
                return Ok(());
            }
            handler.ready(event.data(), event.event_set(), poll)?;
        }
    }
}
