//! The machine around the VPs: buses, devices, and the ways their interrupts and power requests take.

use std::{
    io::{self, Write},
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
};

use devices::{
    Bus, BusError,
    cmos::Cmos,
    hotplug::Hotplug,
    i8042::I8042,
    ioapic::Ioapic,
    modules::Modules,
    pci::{ConfigPorts, Ecam, HostBridge, PciBus, PciError, Slot, Window},
    post::PostPort,
    power::{AcpiPower, PowerRequest, PowerSwitch},
    processors::Processors,
    serial::Serial,
};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{
    config::VmConfig,
    hvc::Hvc,
    interrupts::{PinRoutes, Routes},
    layout::{self, MemoryLayout},
    modules::{ModuleArea, ModuleError},
    partition::{Partition, PartitionError},
    peripherals::{self, PeripheralError, Plug},
};

/// Why a machine cannot be put together.
#[derive(Debug, thiserror::Error)]
pub enum BoardError {
    /// Two devices want the same addresses.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// Two functions want the same slot.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// The partition refuses an interrupt.
    #[error(transparent)]
    Partition(#[from] PartitionError),
    /// A device on the PCI bus.
    #[error(transparent)]
    Peripheral(#[from] PeripheralError),
    /// Memory that the guest is to begin with in modules.
    #[error("memory")]
    Module(#[from] ModuleError),
    /// The host has no more of something a device needs.
    #[error("cannot create the {device}")]
    Host {
        /// The device.
        device: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

/// Whether a machine has events for its guest: devices that come and go, and a power button. A guest that looks for them takes
/// longer to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Events {
    /// It has.
    On,
    /// Nothing will ever happen to it.
    Off,
}

/// All devices of a machine.
pub struct Board {
    ports: Bus,
    mmio: Bus,
    ioapic: Arc<Ioapic<PinRoutes>>,
    routes: Arc<Routes>,
    serial: Option<Arc<Serial>>,
    power: Arc<Power>,
    plug: Arc<Plug>,
    events: Option<Told>,
}

/// What tells the guest of things that happen to its machine.
struct Told {
    hotplug: Arc<Hotplug>,
    processors: Arc<Processors>,
    modules: Option<ModuleArea>,
}

impl Board {
    /// Puts the machine that `config` describes together; `console` is where the serial port prints, `None` for a machine
    /// without one; `hvc` is the other end of the virtio console. With `events`, devices can come and go while the guest runs.
    ///
    /// # Errors
    /// When the host or the partition has not what a device needs.
    pub fn new(
        partition: &Arc<Partition>,
        config: &VmConfig,
        memory: &GuestMemoryMmap,
        layout: &MemoryLayout,
        console: Option<Box<dyn Write + Send>>,
        hvc: &Hvc,
        events: Events,
    ) -> Result<Self, BoardError> {
        let event = |device| move |source| BoardError::Host { device, source };
        let vcpus = config.cpus.boot_vcpus;
        let power = Arc::new(Power {
            asked: AtomicU8::new(NOTHING),
            event: EventFd::new(EFD_NONBLOCK).map_err(event("power switch"))?,
        });
        let switch = || Arc::clone(&power) as Arc<dyn PowerSwitch>;
        let routes = Arc::new(Routes::new(Arc::clone(partition)));
        let ioapic = Arc::new(Ioapic::new(PinRoutes(Arc::clone(&routes))));

        let pci = Arc::new(PciBus::default());
        pci.insert(Slot::device(0), Arc::new(HostBridge))?;
        let plug = Arc::new(Plug::new(
            Arc::clone(partition),
            Arc::clone(&routes),
            memory.clone(),
            layout,
            &config.rate_limit_groups,
            Arc::clone(&pci),
        ));
        peripherals::plug_all(&plug, config, layout, hvc, &switch())?;

        let mut mmio = Bus::new("mmio");
        mmio.insert(
            layout::IOAPIC_START,
            layout::IOAPIC_LENGTH,
            "ioapic",
            Arc::clone(&ioapic) as _,
        )?;
        mmio.insert(
            layout::ECAM_START,
            layout::ECAM_LENGTH,
            "ecam",
            Arc::new(Ecam::new(Arc::clone(&pci))),
        )?;
        mmio.insert(
            layout::PCI_WINDOW_START,
            layout::PCI_WINDOW_LENGTH,
            "pci",
            Arc::new(Window::new(Arc::clone(&pci), layout::PCI_WINDOW_START)),
        )?;

        let mut ports = Bus::new("port");
        let ram = &layout.ram;
        let (below, above) = (ram[0].length, ram.get(1).map_or(0, |range| range.length));
        ports.insert(
            layout::CMOS_PORT,
            layout::CMOS_PORTS,
            "cmos",
            Arc::new(Cmos::new(below, above)),
        )?;
        ports.insert(
            layout::I8042_COMMAND_PORT,
            1,
            "i8042",
            Arc::new(I8042::new(switch())),
        )?;
        ports.insert(layout::POST_PORT, 1, "post", Arc::new(PostPort))?;
        let acpi = Arc::new(AcpiPower::new(switch()));
        ports.insert(
            layout::ACPI_POWER_PORT,
            layout::ACPI_POWER_PORTS,
            "acpi-power",
            acpi,
        )?;
        ports.insert(
            layout::PCI_CONFIG_PORT,
            layout::PCI_CONFIG_PORTS,
            "pci-config",
            Arc::new(ConfigPorts::new(pci)),
        )?;

        let mut serial = None;
        if let Some(sink) = console {
            let interrupt = EventFd::new(EFD_NONBLOCK).map_err(event("serial port"))?;
            partition.register_irqfd(&interrupt, layout::COM1_PIN)?;
            let routes = Arc::clone(&routes);
            let edge = move || {
                routes.about_to_raise(layout::COM1_PIN);
                interrupt.write(1)
            };
            let port = Arc::new(Serial::new(edge, sink).map_err(event("serial port"))?);
            ports.insert(
                layout::COM1_PORT,
                layout::COM1_PORTS,
                "com1",
                Arc::clone(&port) as _,
            )?;
            serial = Some(port);
        }
        let mut told = None;
        if events == Events::On {
            let interrupt = EventFd::new(EFD_NONBLOCK).map_err(event("event device"))?;
            partition.register_irqfd(&interrupt, layout::HOTPLUG_PIN)?;
            let device = Arc::new(Hotplug::new(interrupt, Arc::clone(&plug) as _));
            ports.insert(
                layout::HOTPLUG_PORT,
                layout::HOTPLUG_PORTS,
                "hot-plug",
                Arc::clone(&device) as _,
            )?;
            let processors = Arc::new(Processors::new(
                vcpus,
                Arc::clone(&device),
                EventFd::new(EFD_NONBLOCK).map_err(event("processors' registers"))?,
            ));
            ports.insert(
                layout::PROCESSORS_PORT,
                layout::PROCESSORS_PORTS,
                "processors",
                Arc::clone(&processors) as _,
            )?;
            let mut modules = None;
            if let Some(range) = config.memory.module_area(layout) {
                let registers = Arc::new(Modules::new(Arc::clone(&device)));
                let area = ModuleArea::new(
                    partition,
                    &config.memory,
                    memory,
                    range,
                    Arc::clone(&registers),
                )?;
                ports.insert(
                    layout::MODULES_PORT,
                    layout::MODULES_PORTS,
                    "memory-modules",
                    registers,
                )?;
                modules = Some(area);
            }
            told = Some(Told {
                hotplug: device,
                processors,
                modules,
            });
        }
        Ok(Self {
            ports,
            mmio,
            ioapic,
            routes,
            serial,
            power,
            plug,
            events: told,
        })
    }

    /// Has `tell` told of interrupts for a VP, by its index, just before Rota raises them. Those of PCI functions are left out: their
    /// handlers never come back to Rota, so that nobody sees when they run.
    pub fn watch_interrupts(&self, tell: impl Fn(u32) + Send + Sync + 'static) {
        self.routes.watch(Box::new(tell));
    }

    /// The serial port.
    #[must_use]
    pub fn serial(&self) -> Option<&Serial> {
        self.serial.as_deref()
    }

    /// What the guest has asked the power switch for.
    #[must_use]
    pub fn power(&self) -> &Power {
        &self.power
    }

    /// Where devices are plugged in.
    pub(crate) fn plug(&self) -> &Plug {
        &self.plug
    }

    /// What tells the guest of devices that come and go, if it can be told.
    #[must_use]
    pub fn hotplug(&self) -> Option<&Hotplug> {
        self.events.as_ref().map(|told| told.hotplug.as_ref())
    }

    /// What tells the guest of processors that come and go, likewise.
    #[must_use]
    pub fn processors(&self) -> Option<&Processors> {
        self.events.as_ref().map(|told| told.processors.as_ref())
    }

    /// Where memory modules come, if they can.
    pub(crate) fn modules(&self) -> Option<&ModuleArea> {
        self.events.as_ref()?.modules.as_ref()
    }

    /// Accesses that no device claimed, on ports and in memory.
    #[must_use]
    pub fn unclaimed(&self) -> (u64, u64) {
        (self.ports.unclaimed(), self.mmio.unclaimed())
    }
}

const IOAPIC: std::ops::Range<u64> =
    layout::IOAPIC_START..layout::IOAPIC_START + layout::IOAPIC_LENGTH;

impl vcpu::bus::Bus for Board {
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        self.mmio.read(gpa, data);
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.mmio.write(gpa, data);
        // What happened while its pin was masked was not heard.
        if let Some(told) = &self.events
            && IOAPIC.contains(&gpa)
        {
            told.hotplug.remind();
        }
    }

    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.ports.read(port.into(), data);
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        self.ports.write(port.into(), data);
    }
}

impl vcpu::Machine for Board {
    fn end_of_interrupt(&self, vector: u8) {
        self.ioapic.end_of_interrupt(vector);
    }
}

const NOTHING: u8 = 0;
const RESET: u8 = 1;
const POWER_OFF: u8 = 2;

/// The power switch: remembers the guest's first request and wakes the control thread.
pub struct Power {
    asked: AtomicU8,
    event: EventFd,
}

impl Power {
    /// Readable once there is a request.
    #[must_use]
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// The request, if there is one.
    #[must_use]
    pub fn request(&self) -> Option<PowerRequest> {
        match self.asked.load(Ordering::Acquire) {
            RESET => Some(PowerRequest::Reset),
            POWER_OFF => Some(PowerRequest::PowerOff),
            _ => None,
        }
    }
}

impl PowerSwitch for Power {
    fn request(&self, request: PowerRequest) {
        let asked = match request {
            PowerRequest::Reset => RESET,
            PowerRequest::PowerOff => POWER_OFF,
        };
        if self
            .asked
            .compare_exchange(NOTHING, asked, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
        {
            // An eventfd that has never been written to has room.
            let _ = self.event.write(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_power_request_wins() {
        let power = Power {
            asked: AtomicU8::new(NOTHING),
            event: EventFd::new(EFD_NONBLOCK).unwrap(),
        };
        assert_eq!(Power::request(&power), None);
        PowerSwitch::request(&power, PowerRequest::PowerOff);
        PowerSwitch::request(&power, PowerRequest::Reset);
        assert_eq!(Power::request(&power), Some(PowerRequest::PowerOff));
        assert_eq!(power.event().read().unwrap(), 1);
    }
}
