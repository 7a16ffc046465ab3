//! The devices on the PCI bus: which of them the configuration asks for, and how each is plugged in.
//!
//! A new kind of device is one line in [`plug_all`], and a file where making it takes more than that.

mod disk;
mod net;

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

use devices::{
    pci::{PciBus, PciError, Range, Slot},
    virtio::{
        VirtioDevice,
        block::image::ImageError,
        pci::{BAR_LENGTH, Doorbells, Environment, VirtioPci},
        rng::Rng,
    },
};
use vm_allocator::{AddressAllocator, AllocPolicy};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

pub use net::NetworkError;

use crate::{config::VmConfig, interrupts::Routes, layout, partition::Partition};

/// Why a device cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PeripheralError {
    /// Something on the host that the device is made of.
    #[error("{device}: cannot use {path}")]
    Open {
        /// The device.
        device: String,
        /// The file.
        path: String,
        /// What the host said.
        source: io::Error,
    },
    /// The image of a disk.
    #[error("{device}: {source}")]
    Image {
        /// The disk.
        device: String,
        /// What is wrong with it.
        source: ImageError,
    },
    /// The host has no more of something.
    #[error("{device}: cannot be created")]
    Host {
        /// The device.
        device: String,
        /// What the host said.
        source: io::Error,
    },
    /// A network device.
    #[error("{device}")]
    Net {
        /// The device.
        device: String,
        /// Why.
        source: NetworkError,
    },
    /// There is no place for it.
    #[error("{device}: no room for its registers in the guest's PCI window")]
    NoRoom {
        /// The device.
        device: String,
    },
    /// The bus is full.
    #[error("{device}: {source}")]
    Slot {
        /// The device.
        device: String,
        /// Why.
        source: PciError,
    },
}

/// Plugs everything in that `config` asks for.
///
/// # Errors
/// The first device that cannot be had.
pub(crate) fn plug_all(plug: &Plug, config: &VmConfig) -> Result<(), PeripheralError> {
    for (index, disk) in config.disks.iter().enumerate() {
        disk::plug(plug, index, disk)?;
    }
    if let Some(rng) = &config.rng {
        let device = Rng::open(&rng.src).map_err(|source| PeripheralError::Open {
            device: "rng".into(),
            path: rng.src.display().to_string(),
            source,
        })?;
        plug.virtio("rng", Box::new(device))?;
    }
    for (index, net) in config.net.iter().enumerate() {
        net::plug(plug, index, net)?;
    }
    Ok(())
}

/// Where devices are plugged in.
pub(crate) struct Plug {
    doorbells: Arc<dyn Doorbells>,
    routes: Arc<Routes>,
    memory: GuestMemoryMmap,
    bus: Arc<PciBus>,
    addresses: Mutex<AddressAllocator>,
}

/// Where BARs may be.
const WINDOW: Range = Range {
    start: layout::PCI_WINDOW_START,
    length: layout::PCI_WINDOW_LENGTH,
};

impl Plug {
    pub(crate) fn new(
        partition: Arc<Partition>,
        routes: Arc<Routes>,
        memory: GuestMemoryMmap,
        bus: Arc<PciBus>,
    ) -> Self {
        let addresses =
            AddressAllocator::new(WINDOW.start, WINDOW.length).expect("the window is not empty");
        Self {
            doorbells: Arc::new(IoEvents(partition)),
            routes,
            memory,
            bus,
            addresses: Mutex::new(addresses),
        }
    }

    /// Plugs a virtio device in, in the next free slot.
    pub(crate) fn virtio(
        &self,
        name: &str,
        device: Box<dyn VirtioDevice>,
    ) -> Result<Slot, PeripheralError> {
        let failed = |source| PeripheralError::Host {
            device: name.into(),
            source,
        };
        let no_slot = |source| PeripheralError::Slot {
            device: name.into(),
            source,
        };
        let slot = self.bus.free_slot().map_err(no_slot)?;
        let length = u64::from(BAR_LENGTH);
        let place = self
            .addresses
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .allocate(length, length, AllocPolicy::FirstMatch)
            .map_err(|_| PeripheralError::NoRoom {
                device: name.into(),
            })?;
        let vectors = self
            .routes
            .vectors(VirtioPci::vectors(device.as_ref()))
            .map_err(failed)?;
        let environment = Environment {
            memory: self.memory.clone(),
            vectors: Box::new(vectors),
            doorbells: Arc::clone(&self.doorbells),
            window: WINDOW,
            address: place.start() as u32,
        };
        let function = VirtioPci::new(name, device, environment).map_err(failed)?;
        self.bus.insert(slot, Arc::new(function)).map_err(no_slot)?;
        Ok(slot)
    }
}

/// Doorbells as ioeventfds of the partition.
struct IoEvents(Arc<Partition>);

impl Doorbells for IoEvents {
    fn connect(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.0.register_ioeventfd(event, address)
    }

    fn disconnect(&self, address: u64, event: &EventFd) {
        self.0.unregister_ioeventfd(event, address);
    }
}
