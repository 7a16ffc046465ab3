//! A network card (virtio 1.3, section 5.1) whose packets another process moves.
//!
//! The configuration and the control queue are Rota's own: a back end knows packets only. While it is away, the link is down.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use vhost::vhost_user::VhostUserProtocolFeatures;
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_OK,
    VIRTIO_NET_S_LINK_UP,
};

use super::{
    Error,
    backend::{Needs, Running},
    link::Link,
    watch::{Loss, Role},
};
use crate::virtio::{
    Activation, Chain, DeviceError, DeviceKind, VirtQueue, VirtioDevice, read_bytes,
};

/// What a driver and a back end may agree on.
const FEATURES: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_GUEST_UFO
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_HOST_UFO
    | 1 << VIRTIO_NET_F_MRG_RXBUF;
/// What is between the driver and Rota, and means nothing to a back end.
const OWN_FEATURES: u64 = 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_MTU
    | 1 << VIRTIO_NET_F_CTRL_VQ
    | 1 << VIRTIO_NET_F_MQ;
const CONTROL_QUEUE_SIZE: u16 = 64;

/// A network card.
pub struct Net {
    link: Link<Card>,
    features: u64,
    mac: [u8; 6],
    mtu: Option<u16>,
    pairs: u16,
    queue_size: u16,
    up: Arc<AtomicBool>,
}

impl Net {
    /// The card with the address `mac` whose packets the back end at `socket` moves, through so many pairs of queues. `mtu` is
    /// said to the driver; the back end has to know it from elsewhere.
    ///
    /// # Errors
    /// When there is no such back end, or it has not so many queues.
    pub fn connect(
        socket: PathBuf,
        mac: [u8; 6],
        mtu: Option<u16>,
        pairs: u16,
        queue_size: u16,
    ) -> Result<Self, Error> {
        let needs = Needs {
            queues: pairs.saturating_mul(2),
            protocol: VhostUserProtocolFeatures::empty(),
        };
        let (link, features) = Link::new("vhost-user-net", socket, needs, |backend| {
            Ok(backend.features())
        })?;
        let mut own = 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS;
        if mtu.is_some() {
            own |= 1 << VIRTIO_NET_F_MTU;
        }
        if pairs > 1 {
            own |= 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_MQ;
        }
        Ok(Self {
            link,
            features: features & FEATURES | own,
            mac,
            mtu,
            pairs,
            queue_size,
            up: Arc::new(AtomicBool::new(true)),
        })
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
        self.features
    }

    fn ring_features(&self) -> u64 {
        self.link.ring_features()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![self.queue_size; 2 * usize::from(self.pairs)];
        if self.pairs > 1 {
            sizes.push(CONTROL_QUEUE_SIZE);
        }
        sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let status = if self.up.load(Ordering::Relaxed) {
            VIRTIO_NET_S_LINK_UP as u16
        } else {
            0
        };
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.mac);
        config[6..8].copy_from_slice(&status.to_le_bytes());
        config[8..10].copy_from_slice(&self.pairs.to_le_bytes());
        config[10..].copy_from_slice(&self.mtu.unwrap_or_default().to_le_bytes());
        read_bytes(&config, offset, data);
    }

    fn activate(&mut self, mut driver: Activation) -> Result<(), DeviceError> {
        let control = driver
            .has(VIRTIO_NET_F_CTRL_VQ)
            .then(|| driver.queue(2 * self.pairs))
            .transpose()?
            .map(|queue| Control {
                chain: queue.chain(),
                queue,
                most: self.pairs,
            });
        let card = Card {
            control,
            pairs: 1,
            up: Arc::clone(&self.up),
        };
        let mut running = Running::all_queues(driver);
        running.features &= !OWN_FEATURES;
        running
            .queues
            .retain(|queue| queue.index() < 2 * self.pairs);
        self.link.start(running, card)
    }

    fn reset(&mut self) {
        self.link.stop();
    }
}

struct Card {
    control: Option<Control>,
    /// How many pairs of queues the driver uses.
    pairs: u16,
    up: Arc<AtomicBool>,
}

impl Role for Card {
    /// Packets may be lost or doubled.
    fn loss(&mut self, _queues: &[VirtQueue]) -> Loss {
        Loss::GoOn
    }

    fn present(&mut self, present: bool) {
        self.up.store(present, Ordering::Relaxed);
    }

    fn enabled(&self, index: u16) -> bool {
        index / 2 < self.pairs
    }

    fn own_queue(&self) -> Option<&VirtQueue> {
        self.control.as_ref().map(|control| &control.queue)
    }

    fn kicked(&mut self) -> Result<bool, DeviceError> {
        let Some(control) = &mut self.control else {
            return Ok(false);
        };
        let before = self.pairs;
        control.serve(&mut self.pairs)?;
        Ok(self.pairs != before)
    }
}

/// The control queue, which takes one command: how many pairs of queues the driver uses.
struct Control {
    queue: VirtQueue,
    chain: Chain,
    /// How many pairs there are.
    most: u16,
}

impl Control {
    fn serve(&mut self, pairs: &mut u16) -> Result<(), DeviceError> {
        loop {
            while self.queue.pop(&mut self.chain)? {
                let answer = match self.asked_pairs() {
                    Some(asked) => {
                        *pairs = asked;
                        VIRTIO_NET_OK
                    }
                    None => VIRTIO_NET_ERR,
                };
                let written = self.chain.writable.write_at(0, &[answer as u8]);
                self.queue.push(self.chain.head(), written as u32)?;
            }
            self.queue.signal()?;
            if !self.queue.enable_kicks()? {
                return Ok(());
            }
        }
    }

    /// `None`: another command, or not a sensible number.
    fn asked_pairs(&self) -> Option<u16> {
        let [class, command, low, high] = self.chain.readable.array_at(0)?;
        let asked = u16::from_le_bytes([low, high]);
        let known = (u32::from(class), u32::from(command))
            == (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET);
        (known && (1..=self.most).contains(&asked)).then_some(asked)
    }
}
