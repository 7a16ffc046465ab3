//! Virtio devices (virtio 1.3), and what they have in common.
//!
//! A device is one folder with one [`VirtioDevice`] in it. It says what it is — kind, features, queues, configuration — and
//! gets an [`Activation`] when the guest's driver is ready: the guest's memory, the queues the driver has set up, and a
//! [`Notify`] to interrupt it with. How the driver found it is the business of a transport, of which there is one: [`pci`].
//!
//! ```text
//! driver ── kick (ioeventfd) ──▶ Worker ──▶ VirtQueue::pop ──▶ Chain ──▶ device ──▶ VirtQueue::push ──▶ Notify ──▶ driver
//! ```
//!
//! Everything in guest memory is hostile: a chain that breaks the rules of the queue ends in [`DeviceError::Malformed`], and
//! that in a device that says it needs a reset. Nothing else happens to the machine.

mod announcer;
pub mod balloon;
pub mod block;
mod chain;
pub mod console;
mod counters;
pub mod mem;
pub mod net;
pub mod pci;
pub mod pmem;
mod queue;
pub mod rate_limiter;
mod reclaim;
pub mod rng;
pub mod vhost_user;
pub mod vsock;
pub mod watchdog;
mod worker;

use std::{io, sync::Arc};

use thiserror::Error;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

pub(crate) use announcer::Announcer;
pub use chain::{Buffers, Chain};
pub use counters::{Counted, Counters, Lane};
pub use queue::VirtQueue;
pub use reclaim::{HostMemory, Reclaim};
pub use worker::{Handler, Poll, Worker};

/// What a device is, as the driver that is to be found for it knows it (virtio 1.3, section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceKind {
    /// The virtio device type.
    pub id: u16,
    /// Base class and subclass of the PCI function, as `0xBBSS`.
    pub pci_class: u16,
}

/// A virtio device.
///
/// Calls come one at a time, from whichever VP touches the device. None of them may wait for the guest.
pub trait VirtioDevice: Send {
    /// What it is.
    fn kind(&self) -> DeviceKind;

    /// Feature bits of its own kind. Those of the ring and the transport are not its business.
    fn features(&self) -> u64;

    /// Feature bits of the rings, as far as whoever works on them knows them: all that a [`VirtQueue`] does, unless that is
    /// somebody else.
    fn ring_features(&self) -> u64 {
        VirtQueue::FEATURES
    }

    /// The largest size of each queue; each a power of two.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Fills `data` from the device's configuration at `offset`. What lies behind the configuration reads as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Takes a write to the configuration. Devices with nothing to write ignore it.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The driver is ready: queues may be used from now on, until [`VirtioDevice::reset`].
    ///
    /// # Errors
    /// What the device needs and does not get, from the driver or the host. The transport then tells the driver that the
    /// device needs a reset.
    fn activate(&mut self, driver: Activation) -> Result<(), DeviceError>;

    /// What it counts of its work, if it does.
    fn counters(&self) -> Option<Arc<dyn Counted>> {
        None
    }

    /// Ends everything that [`VirtioDevice::activate`] started: when this returns, nothing touches the guest's memory any
    /// more. Also called on a device that is not active.
    fn reset(&mut self);
}

/// What a device gets when its driver is ready.
pub struct Activation {
    /// The features both sides agreed on.
    pub features: u64,
    /// The guest's memory.
    pub memory: GuestMemoryMmap,
    /// The queues by index; `None` where the driver set none up.
    pub queues: Vec<Option<VirtQueue>>,
    /// The way to the driver.
    pub notify: Arc<dyn Notify>,
}

impl Activation {
    /// Takes queue `index` out.
    ///
    /// # Errors
    /// When the driver has not set it up.
    pub fn queue(&mut self, index: u16) -> Result<VirtQueue, DeviceError> {
        self.queues
            .get_mut(usize::from(index))
            .and_then(Option::take)
            .ok_or(DeviceError::MissingQueue(index))
    }

    /// Whether feature `bit` was agreed on.
    #[must_use]
    pub fn has(&self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }
}

/// How a device reaches its driver.
pub trait Notify: Send + Sync {
    /// There are used buffers in queue `index`, and the driver wants to hear of it.
    fn used(&self, index: u16);

    /// An event that tells the driver of used buffers in queue `index`, for a back end that is in the kernel or in another
    /// process. `None` where there is no interrupt for the queue.
    fn call(&self, index: u16) -> Option<EventFd>;

    /// The configuration has changed.
    fn config_changed(&self);

    /// The device can do nothing any more until the driver resets it.
    fn needs_reset(&self);
}

/// Why a device stops.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// The driver has broken the rules of a queue.
    #[error("the driver broke a rule: {0}")]
    Malformed(&'static str),
    /// A queue that the device cannot work without.
    #[error("the driver has not set up queue {0}")]
    MissingQueue(u16),
    /// The host's side has failed in a way that no request can carry.
    #[error("{what}: {source}")]
    Host {
        /// What failed.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

impl DeviceError {
    /// For `map_err`: what the host was asked for.
    pub fn host(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}

/// Fills `data` from `config` at `offset`; what lies behind it is zero.
pub(crate) fn read_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let Some(rest) = usize::try_from(offset)
        .ok()
        .and_then(|offset| config.get(offset..))
    else {
        return;
    };
    let length = rest.len().min(data.len());
    data[..length].copy_from_slice(&rest[..length]);
}
