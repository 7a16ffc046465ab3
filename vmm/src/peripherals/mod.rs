//! The devices on the PCI bus: which of them the configuration asks for, and how each is plugged in.
//!
//! A new kind of device is one line in [`plug_all`], and a file where making it takes more than that. Devices that can also
//! come while the guest runs have a method of [`Plug`], and any but the host bridge goes when the guest ejects it.

mod device_memory;
mod disk;
mod fs;
pub(crate) mod mem;
mod net;
mod occupants;
mod pmem;

use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use devices::{
    hotplug::Ejector,
    pci::{GuestEvent, PVPANIC_BAR_LENGTH, PciBus, PciError, PciFunction, PvPanic, Range, Slot},
    power::PowerSwitch,
    virtio::{
        HostMemory, VirtioDevice,
        balloon::{Balloon, BalloonError, BalloonOptions},
        block::image::ImageError,
        console::Console,
        pci::{BAR_LENGTH, Doorbells, Environment, VirtioPci},
        rate_limiter::{Limits, RateLimiter},
        rng::Rng,
        vhost_user,
        vsock::{Vsock, VsockError},
        watchdog::{self, Watchdog},
    },
};
use tracing::warn;
use vm_allocator::{AddressAllocator, AllocPolicy, RangeInclusive};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

pub use net::NetworkError;
pub(crate) use occupants::Handle;
pub use pmem::PmemError;

use device_memory::DeviceMemory;
use occupants::{Belongings, Occupant, Occupants};

use crate::{
    config::{
        BalloonConfig, DiskConfig, FsConfig, NetConfig, PmemConfig, RateLimitGroupConfig, VmConfig,
        VsockConfig, name,
    },
    hvc::Hvc,
    interrupts::Routes,
    layout::{self, MemoryLayout},
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
    /// Persistent memory.
    #[error("{device}")]
    Pmem {
        /// The device.
        device: String,
        /// Why.
        source: PmemError,
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
    /// Another device has its name.
    #[error("there is a device '{device}' already")]
    SameName {
        /// The name.
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
    layout: &MemoryLayout,
    hvc: &Hvc,
    switch: &Arc<dyn PowerSwitch>,
) -> Result<(), PeripheralError> {
    for (index, disk) in config.disks.iter().enumerate() {
        plug.disk(index, disk)?;
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
        plug.net(index, net)?;
    }
    for fs in &config.fs {
        plug.fs(fs)?;
    }
    for pmem in &config.pmem {
        plug.pmem(pmem)?;
    }
    if let Some(range) = config.memory.virtio_mem_area(layout) {
        mem::plug(plug, &config.memory, range)?;
    }
    if let Some(balloon) = &config.balloon {
        plug_balloon(plug, balloon)?;
    }
    if let Some(vsock) = &config.vsock {
        plug.vsock(vsock)?;
    }
    if config.watchdog {
        let device = Watchdog::new(watchdog::TIMEOUT, Arc::clone(switch));
        plug.virtio("watchdog", Box::new(device))?;
    }
    if config.pvpanic {
        let nothing = Belongings::default();
        plug.function("pvpanic", PVPANIC_BAR_LENGTH, nothing, |address| {
            Ok(Arc::new(PvPanic::new(address, report_panic())))
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
    let handle = Handle::Balloon(device.handle());
    plug.virtio_with("balloon", Box::new(device), handle)?;
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
    partition: Arc<Partition>,
    doorbells: Arc<dyn Doorbells>,
    routes: Arc<Routes>,
    memory: GuestMemoryMmap,
    device_memory: Arc<DeviceMemory>,
    /// What groups of disks may do, by name.
    limits: BTreeMap<String, RateLimiter>,
    bus: Arc<PciBus>,
    addresses: Mutex<AddressAllocator>,
    occupants: Occupants,
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
        layout: &MemoryLayout,
        groups: &[RateLimitGroupConfig],
        bus: Arc<PciBus>,
    ) -> Self {
        let limits = groups
            .iter()
            .map(|group| {
                let limits = Limits::from(&group.rate_limiter_config);
                (group.id.clone(), RateLimiter::new(&limits))
            })
            .collect();
        let addresses =
            AddressAllocator::new(WINDOW.start, WINDOW.length).expect("the window is not empty");
        Self {
            doorbells: Arc::new(IoEvents(Arc::clone(&partition))),
            device_memory: Arc::new(DeviceMemory::new(Arc::clone(&partition), layout.devices)),
            partition,
            limits,
            routes,
            memory,
            bus,
            addresses: Mutex::new(addresses),
            occupants: Occupants::default(),
        }
    }

    /// Plugs in the disk that is number `index`.
    pub(crate) fn disk(&self, index: usize, config: &DiskConfig) -> Result<Slot, PeripheralError> {
        disk::plug(self, index, config)
    }

    /// Plugs in the network device that is number `index`.
    pub(crate) fn net(&self, index: usize, config: &NetConfig) -> Result<Slot, PeripheralError> {
        net::plug(self, index, config)
    }

    /// Plugs in a folder.
    pub(crate) fn fs(&self, config: &FsConfig) -> Result<Slot, PeripheralError> {
        fs::plug(self, config)
    }

    /// Plugs in persistent memory.
    pub(crate) fn pmem(&self, config: &PmemConfig) -> Result<Slot, PeripheralError> {
        pmem::plug(self, config)
    }

    /// Plugs in the socket device.
    pub(crate) fn vsock(&self, config: &VsockConfig) -> Result<Slot, PeripheralError> {
        let device = Vsock::new(config.cid, &config.socket)?;
        self.virtio(name(&config.id), Box::new(device))
    }

    /// Where the device `name` is.
    pub(crate) fn slot(&self, name: &str) -> Option<Slot> {
        self.occupants.slot(name)
    }

    /// What the device in `slot` is called.
    pub(crate) fn name(&self, slot: Slot) -> Option<String> {
        self.occupants.name(slot)
    }

    /// What belongs to the device `name`.
    pub(crate) fn handle(&self, name: &str) -> Option<Handle> {
        self.occupants.handle(name)
    }

    /// All devices and where they are.
    pub(crate) fn list(&self) -> Vec<(String, Slot)> {
        self.occupants.list()
    }

    /// What each device that counts its work has counted.
    pub(crate) fn counts(&self) -> BTreeMap<String, BTreeMap<&'static str, u64>> {
        self.occupants.counts()
    }

    fn virtio(&self, name: &str, device: Box<dyn VirtioDevice>) -> Result<Slot, PeripheralError> {
        self.virtio_with(name, device, Handle::Fixed)
    }

    /// Plugs a virtio device in, in the next free slot.
    fn virtio_with(
        &self,
        name: &str,
        device: Box<dyn VirtioDevice>,
        handle: Handle,
    ) -> Result<Slot, PeripheralError> {
        let belongings = Belongings {
            counters: device.counters(),
            handle,
        };
        self.function(name, BAR_LENGTH, belongings, |address| {
            let vectors = self.routes.vectors(VirtioPci::vectors(device.as_ref()))?;
            let environment = Environment {
                memory: self.memory.clone(),
                vectors: Box::new(vectors),
                doorbells: Arc::clone(&self.doorbells),
                window: WINDOW,
                address,
            };
            Ok(Arc::new(VirtioPci::new(name, device, environment)?))
        })
    }

    /// Plugs a function in, in the next free slot: `make` makes it with its BAR, of `length` bytes, at an address.
    fn function(
        &self,
        name: &str,
        length: u32,
        belongings: Belongings,
        make: impl FnOnce(u32) -> io::Result<Arc<dyn PciFunction>>,
    ) -> Result<Slot, PeripheralError> {
        let device = || name.to_owned();
        if self.occupants.slot(name).is_some() {
            return Err(PeripheralError::SameName { device: device() });
        }
        let no_slot = |source| PeripheralError::Slot {
            device: device(),
            source,
        };
        let slot = self.bus.free_slot().map_err(no_slot)?;
        let addresses = self.address(name, length)?;
        let plugged = make(addresses.start() as u32)
            .map_err(|source| PeripheralError::Host {
                device: device(),
                source,
            })
            .and_then(|function| self.bus.insert(slot, function).map_err(no_slot));
        if let Err(error) = plugged {
            self.free(&addresses);
            return Err(error);
        }
        let occupant = Occupant {
            slot,
            addresses,
            belongings,
        };
        self.occupants.insert(name, occupant);
        Ok(slot)
    }

    /// Addresses for a BAR of `length` bytes.
    fn address(&self, name: &str, length: u32) -> Result<RangeInclusive, PeripheralError> {
        let length = u64::from(length);
        self.allocator()
            .allocate(length, length, AllocPolicy::FirstMatch)
            .map_err(|_| PeripheralError::NoRoom {
                device: name.into(),
            })
    }

    fn free(&self, addresses: &RangeInclusive) {
        if let Err(error) = self.allocator().free(addresses) {
            warn!("addresses of a device do not get free: {error}");
        }
    }

    fn allocator(&self) -> MutexGuard<'_, AddressAllocator> {
        self.addresses
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ejector for Plug {
    /// The function goes with the last access to it, and with it its threads, its interrupts and its doorbells.
    fn eject(&self, device: u8) {
        let slot = Slot::device(device);
        if let Some(occupant) = self.occupants.remove(slot) {
            drop(self.bus.remove(slot));
            self.free(&occupant.addresses);
        }
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
