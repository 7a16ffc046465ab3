//! A disk (virtio 1.3, section 5.2) that another process serves.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use vhost::vhost_user::VhostUserProtocolFeatures;
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_GEOMETRY,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

use super::{
    Error,
    backend::{Backend, Needs, Running},
    link::Link,
    watch::{Loss, Role, is_idle},
};
use crate::virtio::{Activation, DeviceError, DeviceKind, VirtQueue, VirtioDevice, read_bytes};

/// What the driver may know of a back end. Nothing that it writes to the configuration is among it.
const FEATURES: u64 = 1 << VIRTIO_BLK_F_SIZE_MAX
    | 1 << VIRTIO_BLK_F_SEG_MAX
    | 1 << VIRTIO_BLK_F_GEOMETRY
    | 1 << VIRTIO_BLK_F_RO
    | 1 << VIRTIO_BLK_F_BLK_SIZE
    | 1 << VIRTIO_BLK_F_FLUSH
    | 1 << VIRTIO_BLK_F_TOPOLOGY
    | 1 << VIRTIO_BLK_F_MQ
    | 1 << VIRTIO_BLK_F_DISCARD
    | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
/// Bytes of the configuration, up to what those features have in it.
const CONFIG: usize = 60;
/// Where the number of queues is.
const NUM_QUEUES: usize = 34;

type Config = [u8; CONFIG];

/// A disk.
pub struct Block {
    link: Link<Disk>,
    features: u64,
    config: Arc<Mutex<Config>>,
    queues: u16,
    queue_size: u16,
}

impl Block {
    /// The disk that the back end at `socket` serves, with so many queues.
    ///
    /// # Errors
    /// When there is no such back end, or it has not so many queues.
    pub fn connect(socket: PathBuf, queues: u16, queue_size: u16) -> Result<Self, Error> {
        let needs = Needs {
            queues,
            protocol: VhostUserProtocolFeatures::CONFIG,
        };
        let (link, (features, config)) = Link::new("vhost-user-blk", socket, needs, |backend| {
            Ok((backend.features(), backend.config()?))
        })?;
        Ok(Self {
            link,
            features: features & FEATURES,
            config: Arc::new(Mutex::new(config)),
            queues,
            queue_size,
        })
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> DeviceKind {
        DeviceKind {
            id: 2,
            pci_class: 0x0180,
        }
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn ring_features(&self) -> u64 {
        self.link.ring_features()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.queue_size; self.queues.into()]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = *self.config.lock().unwrap_or_else(PoisonError::into_inner);
        // The back end says how many it could have.
        config[NUM_QUEUES..NUM_QUEUES + 2].copy_from_slice(&self.queues.to_le_bytes());
        read_bytes(&config, offset, data);
    }

    fn activate(&mut self, driver: Activation) -> Result<(), DeviceError> {
        let disk = Disk(Arc::clone(&self.config));
        self.link.start(Running::all_queues(driver), disk)
    }

    fn reset(&mut self) {
        self.link.stop();
    }
}

struct Disk(Arc<Mutex<Config>>);

impl Role for Disk {
    /// The ring does not tell which of several requests a back end has answered that were not answered in order: one of them
    /// would be done twice, and another not at all. But where there were none, there is nothing to tell.
    fn loss(&mut self, queues: &[VirtQueue]) -> Loss {
        if queues.iter().all(is_idle) {
            Loss::GoOn
        } else {
            Loss::Reset
        }
    }

    fn config_changed(&mut self, backend: &mut Backend) -> Result<(), Error> {
        let config = backend.config()?;
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = config;
        Ok(())
    }
}
