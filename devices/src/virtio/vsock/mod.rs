//! The socket device (virtio 1.3, section 5.10): connections between the guest and programs of the host.
//!
//! The host's side is unix sockets, with the protocol that Firecracker and cloud-hypervisor have. Who wants to a port of the
//! guest's connects to the device's socket and says `CONNECT <port>` and a newline; when the guest has accepted, it reads
//! `OK <port>` with the host's port and a newline, and what follows is the connection's. When the guest connects to a port of
//! the host's (CID 2), somebody has to listen at the path of the device's socket with `_<port>` behind it.
//!
//! ```text
//! guest ◀─ receive queue ◀─ Mux ◀─ Connection ◀─ unix stream ◀─ program
//!       ── transmit queue ──▶        │  credit: what each side says it has room for
//! ```
//!
//! Nothing is kept without bound: a stream is read only when the guest has room and a buffer for what comes, the guest may send
//! only what a connection has room for (256 KiB), and when refusals wait for the guest to take them, no more of its packets are
//! taken. At most 1024 connections exist at a time.

mod connect;
mod connection;
mod greeting;
mod mux;
mod packet;
mod worker;

use std::{io, path::Path, sync::Arc};

use thiserror::Error;
use vmm_sys_util::{
    eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd},
    timerfd::TimerFd,
};

use self::{
    mux::{Mux, Socket, listen},
    worker::{CLIENTS, Switch},
};
use super::{Activation, DeviceError, DeviceKind, VirtioDevice, Worker, read_bytes};

const QUEUE_SIZE: u16 = 256;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const EVENT: u16 = 2;
/// `VIRTIO_VSOCK_F_STREAM`.
const F_STREAM: u64 = 1;
/// The first CID that is a guest's; those below, and the last one, have a meaning of their own.
const FIRST_CID: u32 = 3;

/// Why there can be no such device.
#[derive(Debug, Error)]
pub enum VsockError {
    /// The CID is not one that a guest can have.
    #[error("a guest's CID is at least {FIRST_CID} and below {max}, not {0}", max = u32::MAX)]
    Cid(u32),
    /// The socket cannot be made.
    #[error("cannot listen at {path}")]
    Listen {
        /// Where.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// The host has no more descriptors.
    #[error("cannot make an event")]
    Event(#[source] io::Error),
}

/// A socket device.
pub struct Vsock {
    cid: u64,
    socket: Arc<Socket>,
    void: EventFd,
    worker: Option<Worker<Switch>>,
}

impl Vsock {
    /// The device of the guest `cid`, with its socket at `path`, which is removed with the device.
    ///
    /// # Errors
    /// When a guest cannot have the CID, or there cannot be a socket at `path`, for instance because there is something.
    pub fn new(cid: u32, path: &Path) -> Result<Self, VsockError> {
        if !(FIRST_CID..u32::MAX).contains(&cid) {
            return Err(VsockError::Cid(cid));
        }
        let socket = listen(path).map_err(|source| VsockError::Listen {
            path: path.display().to_string(),
            source,
        })?;
        Ok(Self {
            cid: cid.into(),
            socket: Arc::new(socket),
            void: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(VsockError::Event)?,
            worker: None,
        })
    }

    /// A handle to end all connections with.
    ///
    /// # Errors
    /// When the host has no more descriptors.
    pub fn handle(&self) -> io::Result<VsockHandle> {
        self.void.try_clone().map(VsockHandle)
    }
}

/// What a VMM can do to a socket device.
pub struct VsockHandle(EventFd);

impl VsockHandle {
    /// Ends all connections and tells the guest that they are void and that it may have another CID: for a guest that goes on
    /// elsewhere, or from a snapshot.
    pub fn reset_transport(&self) {
        // An eventfd that is full is readable, too.
        let _ = self.0.write(1);
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> DeviceKind {
        DeviceKind {
            id: 19,
            pci_class: 0x0280,
        }
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 3]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, mut driver: Activation) -> Result<(), DeviceError> {
        let (receive, transmit) = (driver.queue(RECEIVE)?, driver.queue(TRANSMIT)?);
        let switch = Switch {
            cid: self.cid,
            mux: Mux::new(Arc::clone(&self.socket), CLIENTS),
            chain: receive.chain(),
            receive,
            transmit,
            events: driver.queue(EVENT)?,
            data: Vec::new(),
            clock: TimerFd::new()
                .map_err(|error| DeviceError::host("cannot make a timer")(error.into()))?,
            clock_runs: false,
            void: (self.void.try_clone()).map_err(DeviceError::host("cannot make an event"))?,
            announce: false,
        };
        let worker = Worker::spawn("vsock", switch, driver.notify)
            .map_err(DeviceError::host("cannot start a thread"))?;
        self.worker = Some(worker);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}
