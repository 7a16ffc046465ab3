//! Memory that comes and goes in blocks (virtio 1.3, section 5.15): what Linux calls `virtio-mem`.
//!
//! The device has a region of the guest's address space, reserved at the start and empty. A [`MemHandle`] says how much of it
//! the guest is to have; its driver plugs and unplugs blocks of 2 MiB until it has that, and the host gets the memory of
//! unplugged ones back.
//!
//! `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE` is offered, and a driver without it is refused. Without it, a guest may read unplugged
//! memory: for a dump, say, which reads all of a region. Over a memfd or a hypervisor that pins what it maps, each page read
//! is a page of the host's, so that a guest that was never given the region would take it from the host by looking at it; and a
//! VMM that maps only what is plugged could not be asked for. Linux has the feature since 5.17.
//!
//! The device keeps the guest's account, and no more: what it costs the guest to touch what it has not plugged is decided by
//! [`Backing`].

mod region;
mod request;
mod worker;

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use thiserror::Error;

use self::{region::Region, worker::Plugger};
use super::{
    Activation, Announcer, DeviceError, DeviceKind, Reclaim, VirtioDevice, Worker, read_bytes,
};

const QUEUE_SIZE: u16 = 128;
/// `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`.
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// Bytes of a block: what the region and all sizes are multiples of. A huge page of the host's is given back whole.
pub const BLOCK: u64 = 2 << 20;

/// Where the memory of blocks comes from and goes to.
pub trait Backing: Send + Sync {
    /// The guest is about to use `length` bytes at guest physical `address`, which read as zero.
    ///
    /// # Errors
    /// When the host has not got them; the guest asks again later.
    fn plug(&self, address: u64, length: u64) -> io::Result<()>;

    /// The guest uses `length` bytes at `address` no longer; they may include some that it has not used.
    ///
    /// # Errors
    /// When the host does not take them back; the guest asks again later.
    fn unplug(&self, address: u64, length: u64) -> io::Result<()>;
}

/// Memory that is mapped for the guest all the time, and that the host finds when it is touched.
impl<R: Reclaim> Backing for R {
    fn plug(&self, _address: u64, _length: u64) -> io::Result<()> {
        Ok(())
    }

    fn unplug(&self, address: u64, length: u64) -> io::Result<()> {
        self.reclaim(address, length)
    }
}

/// Why a size cannot be.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum MemError {
    /// It is not in whole blocks.
    #[error("{0:#x} is not a multiple of 2 MiB")]
    Unaligned(u64),
    /// There is less.
    #[error("{requested} bytes are more than the {available} there are")]
    TooMuch {
        /// What was asked for.
        requested: u64,
        /// What there is.
        available: u64,
    },
}

/// Memory in blocks.
pub struct Mem {
    shared: Arc<Shared>,
    backing: Arc<dyn Backing>,
    worker: Option<Worker<Plugger>>,
}

impl Mem {
    /// A device with the region of `length` bytes at guest physical address `start`, of which the guest is to have `requested`.
    ///
    /// # Errors
    /// When one of them is not in whole blocks, or more is requested than there is.
    pub fn new(
        start: u64,
        length: u64,
        requested: u64,
        backing: Arc<dyn Backing>,
    ) -> Result<Self, MemError> {
        in_blocks(start)?;
        in_blocks(length)?;
        if start.checked_add(length).is_none() {
            return Err(MemError::TooMuch {
                requested: length,
                available: u64::MAX - start,
            });
        }
        let state = State {
            requested: 0,
            region: Region::new(start, length),
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            announcer: Announcer::default(),
        });
        let device = Self {
            shared,
            backing,
            worker: None,
        };
        device.handle().resize(requested)?;
        Ok(device)
    }

    /// A handle to change how much the guest is to have.
    #[must_use]
    pub fn handle(&self) -> MemHandle {
        MemHandle(Arc::clone(&self.shared))
    }
}

fn in_blocks(bytes: u64) -> Result<u64, MemError> {
    if bytes.is_multiple_of(BLOCK) {
        Ok(bytes)
    } else {
        Err(MemError::Unaligned(bytes))
    }
}

/// The VMM's side of the device.
#[derive(Clone)]
pub struct MemHandle(Arc<Shared>);

impl MemHandle {
    /// The guest is to have `bytes`. It gets there in its own time; for less, it has to find memory that it can do without.
    ///
    /// # Errors
    /// When that is not in whole blocks, or more than there is.
    pub fn resize(&self, bytes: u64) -> Result<(), MemError> {
        in_blocks(bytes)?;
        {
            let mut state = self.0.state();
            let available = state.region.length();
            if bytes > available {
                return Err(MemError::TooMuch {
                    requested: bytes,
                    available,
                });
            }
            if std::mem::replace(&mut state.requested, bytes) == bytes {
                return Ok(());
            }
        }
        self.0.announcer.announce();
        Ok(())
    }

    /// How many bytes the guest is to have.
    #[must_use]
    pub fn requested(&self) -> u64 {
        self.0.state().requested
    }

    /// How many bytes it has.
    #[must_use]
    pub fn plugged(&self) -> u64 {
        self.0.state().region.plugged()
    }
}

/// What device, thread and handles have in common.
struct Shared {
    state: Mutex<State>,
    announcer: Announcer,
}

struct State {
    requested: u64,
    region: Region,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VirtioDevice for Mem {
    fn kind(&self) -> DeviceKind {
        DeviceKind {
            id: 24,
            pci_class: 0xff00,
        }
    }

    fn features(&self) -> u64 {
        F_UNPLUGGED_INACCESSIBLE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let state = self.shared.state();
        let region = &state.region;
        let words = [
            BLOCK,
            // The node, which is not told.
            0,
            region.start(),
            region.length(),
            // All of the region is usable: it is reserved anyway.
            region.length(),
            region.plugged(),
            state.requested,
        ];
        let mut config = [0; 56];
        for (place, word) in config.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        read_bytes(&config, offset, data);
    }

    fn activate(&mut self, mut driver: Activation) -> Result<(), DeviceError> {
        if driver.features & F_UNPLUGGED_INACCESSIBLE == 0 {
            return Err(DeviceError::Malformed(
                "it does not keep away from unplugged memory",
            ));
        }
        let plugger = Plugger::new(
            driver.queue(0)?,
            Arc::clone(&self.shared),
            Arc::clone(&self.backing),
        );
        let worker = Worker::spawn("mem", plugger, Arc::clone(&driver.notify))
            .map_err(DeviceError::host("cannot start a thread"))?;
        self.worker = Some(worker);
        self.shared.announcer.set(Some(driver.notify));
        Ok(())
    }

    /// What is plugged stays: a driver that starts again finds out, or has all unplugged.
    fn reset(&mut self) {
        self.shared.announcer.set(None);
        self.worker = None;
    }
}
