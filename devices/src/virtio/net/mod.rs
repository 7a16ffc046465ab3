//! The network device (virtio 1.3, section 5.1): pairs of queues for frames, and one to talk to the device itself.
//!
//! A [`Net`] has two halves. The one in this folder is what the guest sees: configuration, features, the control queue. The
//! other half moves the frames, in one of two ways:
//!
//! ```text
//! Net ─┬─ threads: one for each pair ── Port ─┬─ tap      an interface of the host, offloads and all
//!      │                                      └─ stream   a socket, for instance to passt: needs no privileges
//!      └─ vhost: the host's kernel works on the queues itself, no thread of ours is in the way
//! ```
//!
//! With threads, frames go from the guest's buffers into a system call and back, and are not copied in between.

pub mod backend;
mod control;
pub mod counts;
pub mod features;
pub mod filter;
mod io;
pub mod mac;
mod pair;
pub mod receive;
mod shared;
pub mod stream;
pub mod tap;
mod threads;
pub mod transmit;
pub mod vhost;

use std::sync::Arc;

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_S_LINK_UP,
};
use vmm_sys_util::eventfd::EventFd;

use self::{
    backend::{Cable, FRAME, HEADER},
    control::{Control, Pairs},
    filter::Filter,
    mac::MacAddr,
    receive::Chains,
    shared::Shared,
    threads::Threads,
    vhost::Vhost,
};
use super::{
    Activation, Counted, DeviceError, DeviceKind, Notify, VirtQueue, VirtioDevice, Worker,
    rate_limiter::Limits, read_bytes,
};

/// Entries of the control queue.
const CONTROL_SIZE: u16 = 64;
/// Bytes of an IP packet, where nothing else is said.
const USUAL_MTU: u16 = 1500;

/// What a network device is like.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What its threads are called, with the number of a queue behind it.
    pub name: String,
    /// Its Ethernet address.
    pub mac: MacAddr,
    /// The longest IP packet in bytes, if the driver is to be told.
    pub mtu: Option<u16>,
    /// Entries of the queues for frames; a power of two.
    pub queue_size: u16,
    /// Which offloads may be offered, if the back end has them: of [`features`].
    pub offloads: u64,
    /// How much is let through, for each direction.
    pub limits: Limits,
}

/// A network device.
pub struct Net {
    settings: Settings,
    datapath: Box<dyn Datapath>,
    shared: Arc<Shared>,
    control: Option<Worker<Control>>,
}

impl Net {
    /// A device at `cable`, with a thread for each of its ports.
    #[must_use]
    pub fn new(settings: Settings, cable: Cable) -> Self {
        let threads = Threads::new(&settings, cable);
        Self::over(settings, Box::new(threads))
    }

    /// A device whose queues the host's kernel works on. It cannot limit rates, nor filter.
    #[must_use]
    pub fn with_vhost(settings: Settings, vhost: Vhost) -> Self {
        Self::over(settings, Box::new(vhost))
    }

    fn over(settings: Settings, datapath: Box<dyn Datapath>) -> Self {
        Self {
            shared: Arc::new(Shared::new(settings.mac)),
            settings,
            datapath,
            control: None,
        }
    }

    fn start(&mut self, mut driver: Activation) -> Result<(), DeviceError> {
        let agreed = driver.features;
        let multiqueue = driver.has(VIRTIO_NET_F_MQ);
        let control = driver
            .has(VIRTIO_NET_F_CTRL_VQ)
            .then(|| {
                // The control queue comes behind the pairs that the driver knows of.
                let known = if multiqueue { self.datapath.pairs() } else { 1 };
                driver.queue(2 * known as u16)
            })
            .transpose()?;
        let mut pairs = vec![(driver.queue(0)?, driver.queue(1)?)];
        if multiqueue {
            let others = (1..self.datapath.pairs() as u16).map_while(|pair| {
                Some((
                    driver.queue(2 * pair).ok()?,
                    driver.queue(2 * pair + 1).ok()?,
                ))
            });
            pairs.extend(others);
        }
        self.prepare_filter(&driver);
        let usual = match agreed & features::GUEST_SEGMENTS {
            0 => HEADER + 18 + usize::from(self.settings.mtu.unwrap_or(USUAL_MTU)),
            _ => HEADER + FRAME.end(),
        };
        let chains = match driver.has(VIRTIO_NET_F_MRG_RXBUF) {
            true => Chains::Any,
            false => Chains::One,
        };
        let running = self.datapath.start(Start {
            agreed,
            pairs,
            chains,
            usual,
            shared: &self.shared,
            notify: &driver.notify,
        })?;
        if control.is_none() && running.faults.is_empty() {
            return Ok(());
        }
        let control = Control::new(
            control,
            running.faults,
            agreed,
            running.pairs,
            Arc::clone(&self.shared),
        );
        let name = format!("{}-ctl", self.settings.name);
        let worker = Worker::spawn(&name, control, driver.notify)
            .map_err(DeviceError::host("cannot start a thread"))?;
        self.control = Some(worker);
        Ok(())
    }

    fn prepare_filter(&self, driver: &Activation) {
        let mut filter = Filter::open(self.settings.mac);
        if driver.has(VIRTIO_NET_F_CTRL_VLAN) {
            filter.name_vlans();
        }
        self.shared.filter.store(Arc::new(filter));
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind {
            id: 1,
            pci_class: 0x0200,
        }
    }

    fn features(&self) -> u64 {
        let mut offered = features::ALWAYS;
        let mut offloads = self.settings.offloads;
        // Nothing is cut into segments that is not summed.
        if offloads & features::CHECKSUM != features::CHECKSUM {
            offloads = 0;
        }
        let of_datapath = self.datapath.features();
        offered |= of_datapath & (offloads | features::FILTERS);
        if offered & features::GUEST_OFFLOADS != 0 {
            offered |= features::SWITCHES_OFFLOADS;
        }
        if self.settings.mtu.is_some() {
            offered |= 1 << VIRTIO_NET_F_MTU;
        }
        if self.datapath.pairs() > 1 {
            offered |= 1 << VIRTIO_NET_F_MQ;
        }
        offered
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![self.settings.queue_size; 2 * self.datapath.pairs()];
        sizes.push(CONTROL_SIZE);
        sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let status = match self.shared.is_connected() {
            true => VIRTIO_NET_S_LINK_UP as u16,
            false => 0,
        };
        let pairs = self.datapath.pairs() as u16;
        let mtu = self.settings.mtu.unwrap_or(0);
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.shared.address().0);
        config[6..8].copy_from_slice(&status.to_le_bytes());
        config[8..10].copy_from_slice(&pairs.to_le_bytes());
        config[10..].copy_from_slice(&mtu.to_le_bytes());
        read_bytes(&config, offset, data);
    }

    fn activate(&mut self, driver: Activation) -> Result<(), DeviceError> {
        let started = self.start(driver);
        if started.is_err() {
            self.reset();
        }
        started
    }

    fn counters(&self) -> Option<Arc<dyn Counted>> {
        self.datapath.counters()
    }

    fn reset(&mut self) {
        // The control queue's thread first: it works on the others.
        self.control = None;
        self.datapath.stop();
        self.shared.set_address(self.settings.mac);
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.reset();
    }
}

/// The half of the device that moves frames.
trait Datapath: Send {
    /// What it can do: of [`features`].
    fn features(&self) -> u64;

    /// How many pairs of queues it has; not zero.
    fn pairs(&self) -> usize;

    /// What it counts, if it does.
    fn counters(&self) -> Option<Arc<dyn Counted>> {
        None
    }

    /// Moves frames, through the first pair to begin with.
    fn start(&mut self, start: Start<'_>) -> Result<Running, DeviceError>;

    /// Moves frames no longer. When this returns, nothing touches the queues.
    fn stop(&mut self);
}

/// What a [`Datapath`] starts with.
struct Start<'a> {
    agreed: u64,
    /// Receive and transmit queues; not empty.
    pairs: Vec<(VirtQueue, VirtQueue)>,
    chains: Chains,
    usual: usize,
    shared: &'a Arc<Shared>,
    notify: &'a Arc<dyn Notify>,
}

/// What the control queue needs of a [`Datapath`] that has started.
struct Running {
    pairs: Arc<dyn Pairs>,
    /// Written to when it cannot go on.
    faults: Vec<EventFd>,
}
