//! The devices on the PCI bus: which of them the configuration asks for, and how each is plugged in.
//!
//! A new kind of device is one line in [`plug_all`], and a file where making it takes more than that.

mod disk;
mod fs;
mod net;

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use devices::{
    pci::{GuestEvent, PVPANIC_BAR_LENGTH, PciBus, PciError, PciFunction, PvPanic, Range, Slot},
    power::PowerSwitch,
    virtio::{
        HostMemory, VirtioDevice,
        balloon::{Balloon, BalloonError, BalloonOptions},
        block::image::ImageError,
        console::Console,
        pci::{BAR_LENGTH, Doorbells, Environment, VirtioPci},
        rng::Rng,
        vhost_user,
        vsock::{Vsock, VsockError},
        watchdog::{self, Watchdog},
    },
};
use tracing::warn;
use vm_allocator::{AddressAllocator, AllocPolicy};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

pub use net::NetworkError;

use crate::{
    config::{BalloonConfig, VmConfig},
    hvc::Hvc,
    interrupts::Routes,
    layout,
    partition::Partition,
};

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
    /// The socket device.
    #[error("vsock")]
    Vsock(#[from] VsockError),
    /// The balloon.
    #[error("balloon")]
    Balloon(#[from] BalloonError),
    /// The process that is to do its work.
    #[error("{device}: {source}")]
    BackEnd {
        /// The device.
        device: String,
        /// Why it does not.
        source: vhost_user::Error,
    },
    /// A name that the driver cannot be told.
    #[error("{device}: {source}")]
    Tag {
        /// The device.
        device: String,
        /// Why.
        source: vhost_user::InvalidTag,
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
pub(crate) fn plug_all(
    plug: &Plug,
    config: &VmConfig,
    hvc: &Hvc,
    switch: &Arc<dyn PowerSwitch>,
) -> Result<(), PeripheralError> {
    for (index, disk) in config.disks.iter().enumerate() {
        disk::plug(plug, index, disk)?;
    }
    plug_console(plug, hvc)?;
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
    for config in &config.fs {
        fs::plug(plug, config)?;
    }
    if let Some(balloon) = &config.balloon {
        plug_balloon(plug, balloon)?;
    }
    if let Some(vsock) = &config.vsock {
        let device = Vsock::new(vsock.cid, &vsock.socket)?;
        plug.virtio("vsock", Box::new(device))?;
    }
    if config.watchdog {
        let device = Watchdog::new(watchdog::TIMEOUT, Arc::clone(switch));
        plug.virtio("watchdog", Box::new(device))?;
    }
    if config.pvpanic {
        plug.function("pvpanic", PVPANIC_BAR_LENGTH, |address| {
            Arc::new(PvPanic::new(address, report_panic()))
        })?;
    }
    Ok(())
}

fn plug_console(plug: &Plug, hvc: &Hvc) -> Result<(), PeripheralError> {
    let failed = |source| PeripheralError::Host {
        device: "console".into(),
        source,
    };
    if let Some(backend) = hvc.backend().map_err(failed)? {
        let device = Console::new(backend).map_err(failed)?;
        hvc.adopt(device.handle());
        plug.virtio("console", Box::new(device))?;
    }
    Ok(())
}

fn plug_balloon(plug: &Plug, config: &BalloonConfig) -> Result<(), PeripheralError> {
    let memory = HostMemory::new(&plug.memory).map_err(|source| PeripheralError::Host {
        device: "balloon".into(),
        source,
    })?;
    let options = BalloonOptions {
        size: config.size,
        deflate_on_oom: config.deflate_on_oom,
        free_page_reporting: config.free_page_reporting,
    };
    let device = Balloon::new(options, Arc::new(memory))?;
    plug.virtio("balloon", Box::new(device))?;
    Ok(())
}

/// Says that the guest has panicked: once, however often it is told.
fn report_panic() -> Box<dyn Fn(GuestEvent) + Send + Sync> {
    let told = [AtomicBool::new(false), AtomicBool::new(false)];
    Box::new(move |event| {
        let (told, text) = match event {
            GuestEvent::Panicked => (&told[0], "the guest's kernel has panicked"),
            GuestEvent::CrashLoaded => (
                &told[1],
                "the guest's kernel has panicked, and another is about to take a dump of it",
            ),
        };
        if !told.swap(true, Ordering::Relaxed) {
            warn!("{text}");
        }
    })
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
        let address = self.address(name, BAR_LENGTH)?;
        let vectors = self
            .routes
            .vectors(VirtioPci::vectors(device.as_ref()))
            .map_err(failed)?;
        let environment = Environment {
            memory: self.memory.clone(),
            vectors: Box::new(vectors),
            doorbells: Arc::clone(&self.doorbells),
            window: WINDOW,
            address,
        };
        let function = VirtioPci::new(name, device, environment).map_err(failed)?;
        self.bus.insert(slot, Arc::new(function)).map_err(no_slot)?;
        Ok(slot)
    }

    /// Plugs another function in, in the next free slot: `make` makes it with its BAR, of `length` bytes, at an address.
    fn function(
        &self,
        name: &str,
        length: u32,
        make: impl FnOnce(u32) -> Arc<dyn PciFunction>,
    ) -> Result<Slot, PeripheralError> {
        let no_slot = |source| PeripheralError::Slot {
            device: name.into(),
            source,
        };
        let slot = self.bus.free_slot().map_err(no_slot)?;
        let function = make(self.address(name, length)?);
        self.bus.insert(slot, function).map_err(no_slot)?;
        Ok(slot)
    }

    /// An address for a BAR of `length` bytes.
    fn address(&self, name: &str, length: u32) -> Result<u32, PeripheralError> {
        let length = u64::from(length);
        self.addresses
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .allocate(length, length, AllocPolicy::FirstMatch)
            .map(|place| place.start() as u32)
            .map_err(|_| PeripheralError::NoRoom {
                device: name.into(),
            })
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
