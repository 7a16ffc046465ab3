//! The block device (virtio 1.3, section 5.2): a disk whose data is an [`Image`].
//!
//! Each queue has a thread of its own (`blk0-q0` …) and a [`Backend`](backend::Backend) on the image, so that queues share
//! nothing but the image itself and the limits to its rate.
//!
//! ```text
//! VirtQueue ─▶ request (checks) ─▶ Gate (rate) ─▶ Backend: io_uring | threads | null ─▶ Image: raw | qcow2
//! ```
//!
//! A flush that is answered means that everything answered before it is on the host's disk. A driver that does not want to
//! flush (without `VIRTIO_BLK_F_FLUSH`, or `writeback` set to 0) gets each write answered only when it is there.

pub mod backend;
mod bounce;
mod config;
mod counts;
pub mod image;
mod queue;
mod request;

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use tracing::warn;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_ID_BYTES,
};

use super::{
    Activation, Counted, Counters, DeviceError, DeviceKind, Notify, VirtioDevice, Worker,
    rate_limiter::RateLimiter, read_bytes,
};
use backend::{Geometry, Image, Unmap};
use queue::QueueHandler;
use request::Rules;
use virtio_queue::QueueT;

/// What names a disk to the driver, padded with zeroes.
type Serial = [u8; VIRTIO_BLK_ID_BYTES as usize];

/// How a disk looks, apart from its data.
#[derive(Clone, Debug)]
pub struct BlockConfig {
    /// What its threads are called after, for instance `blk0`.
    pub name: String,
    /// How many queues; at least one.
    pub queues: u16,
    /// Entries of a queue; a power of two.
    pub queue_size: u16,
    /// What the driver can ask for to know the disk again; 20 bytes are seen.
    pub serial: String,
    /// Whether the driver may give space back to the host.
    pub unmap: Unmap,
    /// What the driver may do per time.
    pub limits: RateLimiter,
}

/// A disk.
pub struct Block {
    config: BlockConfig,
    disk: Arc<Disk>,
    counters: Arc<Counters<4>>,
    workers: Vec<Worker<QueueHandler>>,
}

/// What the queues of a disk have in common.
struct Disk {
    image: Arc<dyn Image>,
    geometry: Geometry,
    serial: Serial,
    /// In bytes; whole sectors.
    capacity: AtomicU64,
    /// Whether writes may wait for a flush.
    writeback: AtomicBool,
    /// The driver, while there is one.
    notify: Mutex<Option<Arc<dyn Notify>>>,
}

impl Block {
    /// A disk with the data of `image`.
    ///
    /// # Errors
    /// When the host cannot say how large the image is.
    pub fn new(image: Arc<dyn Image>, config: BlockConfig) -> io::Result<Self> {
        let mut geometry = image.geometry();
        if config.unmap == Unmap::Forbidden {
            geometry.discard_granularity = None;
        }
        let mut serial = Serial::default();
        for (to, from) in serial.iter_mut().zip(config.serial.bytes()) {
            *to = from;
        }
        let disk = Disk {
            geometry,
            serial,
            capacity: AtomicU64::new(0),
            writeback: AtomicBool::new(true),
            notify: Mutex::new(None),
            image,
        };
        let lost = disk.measure()?;
        if lost > 0 {
            warn!(
                "{}: the last {lost} bytes of the image are no whole block, and are left out",
                config.name
            );
        }
        Ok(Self {
            counters: Arc::new(counts::counters(config.queues.into())),
            config,
            disk: Arc::new(disk),
            workers: Vec::new(),
        })
    }

    /// What changes the size of the disk, for as long as there is one.
    #[must_use]
    pub fn resizer(&self) -> Resizer {
        Resizer(Arc::downgrade(&self.disk))
    }

    fn space(&self) -> config::Space {
        config::Space {
            geometry: self.disk.geometry,
            unmap: self.config.unmap,
            capacity: self.disk.capacity.load(Ordering::Acquire),
            queues: self.config.queues,
            queue_size: self.config.queue_size,
            writeback: self.disk.writeback.load(Ordering::Relaxed),
        }
    }
}

impl Disk {
    /// Looks how large the image is. Returns how many bytes are left over behind the last block.
    fn measure(&self) -> io::Result<u64> {
        let size = self.image.size()?;
        let lost = size % u64::from(self.geometry.block_size.max(1));
        self.capacity.store(size - lost, Ordering::Release);
        Ok(lost)
    }

    fn set_driver(&self, driver: Option<Arc<dyn Notify>>) {
        *self.notify.lock().unwrap_or_else(PoisonError::into_inner) = driver;
    }
}

/// Changes the size of a disk while it is used. It does not keep the image, nor its lock.
#[derive(Clone)]
pub struct Resizer(Weak<Disk>);

impl Resizer {
    /// Makes the image `bytes` long and tells the driver. Returns how large the disk is.
    ///
    /// # Errors
    /// When the image's size is not Rota's to change (a block device), the host cannot, or the disk is gone.
    pub fn resize(&self, bytes: u64) -> io::Result<u64> {
        self.disk()?.image.resize(bytes)?;
        self.refresh()
    }

    /// Looks how large the image is, which somebody else has made larger or smaller, and tells the driver. Returns how large
    /// the disk is.
    ///
    /// # Errors
    /// When the host cannot say, or the disk is gone.
    pub fn refresh(&self) -> io::Result<u64> {
        let disk = self.disk()?;
        let before = disk.capacity.load(Ordering::Acquire);
        disk.measure()?;
        let now = disk.capacity.load(Ordering::Acquire);
        let driver = disk.notify.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(driver) = driver.as_ref().filter(|_| before != now) {
            driver.config_changed();
        }
        Ok(now)
    }

    fn disk(&self) -> io::Result<Arc<Disk>> {
        let gone = || io::Error::new(io::ErrorKind::NotFound, "the disk is gone");
        self.0.upgrade().ok_or_else(gone)
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
        config::features(
            &self.disk.geometry,
            self.disk.image.access(),
            self.config.queues,
        )
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.config.queue_size; self.config.queues.into()]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.space().bytes(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (config::WRITEBACK, [writeback @ (0 | 1)]) = (offset, data) {
            self.disk
                .writeback
                .store(*writeback == 1, Ordering::Relaxed);
        }
    }

    fn activate(&mut self, mut driver: Activation) -> Result<(), DeviceError> {
        // A driver that can switch the cache itself may have done so before it was ready.
        if !driver.has(VIRTIO_BLK_F_FLUSH) || !driver.has(VIRTIO_BLK_F_CONFIG_WCE) {
            let writeback = driver.has(VIRTIO_BLK_F_FLUSH);
            self.disk.writeback.store(writeback, Ordering::Relaxed);
        }
        let mut workers = Vec::new();
        for index in 0..self.config.queues {
            // A driver with fewer processors than there are queues needs not all of them, but the first.
            let queue = match driver.queue(index) {
                Err(_) if index > 0 => continue,
                queue => queue?,
            };
            let name = format!("{}-q{index}", self.config.name);
            let depth = queue.ring().size();
            let backend = self
                .disk
                .image
                .backend(&name, depth)
                .map_err(DeviceError::host("cannot work on the disk image"))?;
            let gate = self
                .config
                .limits
                .gate()
                .map_err(DeviceError::host("cannot set a timer"))?;
            let handler = QueueHandler::new(
                name.clone(),
                queue,
                backend,
                gate,
                Arc::clone(&self.disk),
                Rules::new(&self.disk, self.config.unmap, driver.features),
                self.counters.lane(index.into()),
            );
            let worker = Worker::spawn(&name, handler, Arc::clone(&driver.notify))
                .map_err(DeviceError::host("cannot start a thread"))?;
            workers.push(worker);
        }
        self.workers = workers;
        self.disk.set_driver(Some(driver.notify));
        Ok(())
    }

    fn counters(&self) -> Option<Arc<dyn Counted>> {
        Some(Arc::clone(&self.counters) as Arc<dyn Counted>)
    }

    fn reset(&mut self) {
        self.disk.set_driver(None);
        // Each waits for what its queue has in flight.
        self.workers.clear();
        self.disk.writeback.store(true, Ordering::Relaxed);
    }
}
