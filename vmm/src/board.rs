//! The machine around the VPs: buses, devices, and the ways their interrupts and power requests take.

use std::{
    io::{self, Write},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
};

use devices::{
    Bus, BusError,
    cmos::Cmos,
    i8042::I8042,
    ioapic::{InterruptRoutes, Ioapic, Msi, PINS},
    pci::{ConfigPorts, Ecam, HostBridge, PciBus, PciError, Slot},
    post::PostPort,
    power::{AcpiPower, PowerRequest, PowerSwitch},
    serial::Serial,
};
use mshv_bindings::mshv_user_irq_entry;
use mshv_ioctls::InterruptRequest;
use tracing::warn;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{
    layout,
    partition::{Partition, PartitionError},
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
    /// The host has no more of something a device needs.
    #[error("cannot create the {device}")]
    Host {
        /// The device.
        device: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

/// All devices of a machine.
pub struct Board {
    ports: Bus,
    mmio: Bus,
    ioapic: Arc<Ioapic<Routes>>,
    serial: Option<Arc<Serial>>,
    power: Arc<Power>,
}

impl Board {
    /// Puts the machine together; `console` is where the serial port prints, `None` for a machine without one.
    ///
    /// # Errors
    /// When the host or the partition has not what a device needs.
    pub fn new(
        partition: &Arc<Partition>,
        ram: &[layout::Range],
        console: Option<Box<dyn Write + Send>>,
    ) -> Result<Self, BoardError> {
        let event = |device| move |source| BoardError::Host { device, source };
        let power = Arc::new(Power {
            asked: AtomicU8::new(NOTHING),
            event: EventFd::new(EFD_NONBLOCK).map_err(event("power switch"))?,
        });
        let switch = || Arc::clone(&power) as Arc<dyn PowerSwitch>;
        let routes = Routes {
            partition: Arc::clone(partition),
            table: Mutex::default(),
        };
        let ioapic = Arc::new(Ioapic::new(routes));

        let mut pci = PciBus::default();
        pci.insert(
            Slot {
                device: 0,
                function: 0,
            },
            Arc::new(HostBridge),
        )?;
        let pci = Arc::new(pci);

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

        let mut ports = Bus::new("port");
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
        let config = Arc::new(ConfigPorts::new(pci));
        ports.insert(
            layout::PCI_CONFIG_PORT,
            layout::PCI_CONFIG_PORTS,
            "pci-config",
            config,
        )?;

        let mut serial = None;
        if let Some(sink) = console {
            let interrupt = EventFd::new(EFD_NONBLOCK).map_err(event("serial port"))?;
            partition.register_irqfd(&interrupt, layout::COM1_PIN)?;
            let port = Arc::new(Serial::new(interrupt, sink).map_err(event("serial port"))?);
            ports.insert(
                layout::COM1_PORT,
                layout::COM1_PORTS,
                "com1",
                Arc::clone(&port) as _,
            )?;
            serial = Some(port);
        }
        Ok(Self {
            ports,
            mmio,
            ioapic,
            serial,
            power,
        })
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

    /// Accesses that no device claimed, on ports and in memory.
    #[must_use]
    pub fn unclaimed(&self) -> (u64, u64) {
        (self.ports.unclaimed(), self.mmio.unclaimed())
    }
}

impl vcpu::bus::Bus for Board {
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        self.mmio.read(gpa, data);
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.mmio.write(gpa, data);
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

/// The IOAPIC's interrupts on their way to the hypervisor: pins with an irqfd through the routing table, others by hypercall.
struct Routes {
    partition: Arc<Partition>,
    table: Mutex<[Option<Msi>; PINS as usize]>,
}

impl InterruptRoutes for Routes {
    fn set_route(&self, pin: u32, route: Option<Msi>) -> io::Result<()> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(entry) = table.get_mut(pin as usize) else {
            return Ok(());
        };
        let before = std::mem::replace(entry, route);
        let entries: Vec<_> = (0..)
            .zip(table.iter())
            .filter_map(|(gsi, route)| route.map(|msi| routing_entry(gsi, msi)))
            .collect();
        let result = self.partition.set_msi_routing(&entries);
        if let Err(error) = &result {
            warn!("interrupt pin {pin}: the hypervisor refuses the route: {error}");
            table[pin as usize] = before;
        }
        result
    }

    fn assert(&self, msi: Msi, level: bool) {
        if let Err(error) = self.partition.interrupt(&request(msi, level)) {
            warn!(
                "interrupt with vector {:#x} refused: {error}",
                msi.data & 0xff
            );
        }
    }
}

fn routing_entry(gsi: u32, msi: Msi) -> mshv_user_irq_entry {
    mshv_user_irq_entry {
        gsi,
        // The two halves of the address.
        #[expect(clippy::cast_possible_truncation)]
        address_lo: msi.address as u32,
        address_hi: (msi.address >> 32) as u32,
        data: msi.data,
    }
}

/// An MSI as the hypervisor's request: vector, delivery mode and destination stand in the same places on all processors.
fn request(msi: Msi, level: bool) -> InterruptRequest {
    const LOGICAL: u64 = 1 << 2;
    const LEVEL_TRIGGERED: u32 = 1 << 15;
    InterruptRequest {
        interrupt_type: msi.data >> 8 & 7,
        apic_id: msi.address >> 12 & 0xff,
        vector: msi.data & 0xff,
        level_triggered: level && msi.data & LEVEL_TRIGGERED != 0,
        logical_destination_mode: msi.address & LOGICAL != 0,
        long_mode: false,
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

    #[test]
    fn an_msi_becomes_the_hypervisors_request() {
        // Level-triggered, lowest priority, vector 0x31, logical destination 3.
        let request = request(
            Msi {
                address: 0xfee0_300c,
                data: 0xc131,
            },
            true,
        );
        assert_eq!(
            (request.interrupt_type, request.apic_id, request.vector),
            (1, 3, 0x31)
        );
        assert!(request.level_triggered && request.logical_destination_mode);
        let entry = routing_entry(
            4,
            Msi {
                address: 0xfee0_1000,
                data: 0x24,
            },
        );
        assert_eq!(
            (entry.gsi, entry.address_lo, entry.address_hi, entry.data),
            (4, 0xfee0_1000, 0, 0x24)
        );
    }
}
