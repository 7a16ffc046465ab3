//! Events that the machine has for the guest: PCI devices that come or are to go, and the power button.
//!
//! A hardware-reduced ACPI platform has no SCI and no fixed events. Its Generic Event Device is an interrupt and a method of
//! the DSDT, which reads these registers to find out what has happened:
//!
//! | offset | bytes | |
//! |---|---|---|
//! | 0 | 1 | what has happened since this was last read: [`PCI_EVENT`], [`POWER_BUTTON_EVENT`], [`PROCESSOR_EVENT`], [`MODULE_EVENT`] |
//! | 4 | 4 | PCI devices that have come since this was last read, one bit each |
//! | 8 | 4 | PCI devices that are asked to go since this was last read |
//! | 12 | 4 | written by the guest: the devices with these bits are ready to go |
//!
//! What is to be told is in the registers before the interrupt is raised, and a read takes it: nothing gets lost between. Which
//! processors come and go, and which memory modules come, is in registers of their own: [`crate::processors`] and
//! [`crate::modules`].

use std::sync::{
    Arc,
    atomic::{AtomicU8, AtomicU32, Ordering},
};

use vmm_sys_util::eventfd::EventFd;

use crate::BusDevice;

/// Offset of the byte that says what has happened.
pub const EVENTS: u64 = 0;
/// Offset of the double word with the PCI devices that have come.
pub const ARRIVED: u64 = 4;
/// Offset of the double word with the PCI devices that are asked to go.
pub const LEAVING: u64 = 8;
/// Offset of the double word that ejects PCI devices.
pub const EJECT: u64 = 12;
/// Bytes of the registers.
pub const LENGTH: u64 = 16;

/// In [`EVENTS`]: PCI devices have come or are asked to go.
pub const PCI_EVENT: u8 = 1 << 0;
/// In [`EVENTS`]: the power button was pressed.
pub const POWER_BUTTON_EVENT: u8 = 1 << 1;
/// In [`EVENTS`]: processors have come or are asked to go.
pub const PROCESSOR_EVENT: u8 = 1 << 2;
/// In [`EVENTS`]: memory modules have come.
pub const MODULE_EVENT: u8 = 1 << 3;

/// Takes devices out of the machine.
pub trait Ejector: Send + Sync {
    /// The guest is done with PCI device number `device`, below 32. Whether there is one that can go is not said. Called on
    /// the thread of the processor that ejects it.
    fn eject(&self, device: u8);
}

/// The registers behind the Generic Event Device.
pub struct Hotplug {
    interrupt: EventFd,
    ejector: Arc<dyn Ejector>,
    events: AtomicU8,
    arrived: AtomicU32,
    leaving: AtomicU32,
}

impl Hotplug {
    /// Registers that raise `interrupt` when there is something to be read.
    #[must_use]
    pub fn new(interrupt: EventFd, ejector: Arc<dyn Ejector>) -> Self {
        Self {
            interrupt,
            ejector,
            events: AtomicU8::new(0),
            arrived: AtomicU32::new(0),
            leaving: AtomicU32::new(0),
        }
    }

    /// Tells the guest that PCI device number `device` has come.
    pub fn arrived(&self, device: u8) {
        self.leaving.fetch_and(!bit(device), Ordering::AcqRel);
        self.arrived.fetch_or(bit(device), Ordering::AcqRel);
        self.raise(PCI_EVENT);
    }

    /// Asks the guest to let go of PCI device number `device`, and to eject it then.
    pub fn ask_to_leave(&self, device: u8) {
        self.leaving.fetch_or(bit(device), Ordering::AcqRel);
        self.raise(PCI_EVENT);
    }

    /// Presses the power button.
    pub fn press_power_button(&self) {
        self.raise(POWER_BUTTON_EVENT);
    }

    /// Tells the guest that there is something in the registers of [`crate::processors`].
    pub fn processors_changed(&self) {
        self.raise(PROCESSOR_EVENT);
    }

    /// Tells the guest that there is something in the registers of [`crate::modules`].
    pub fn modules_changed(&self) {
        self.raise(MODULE_EVENT);
    }

    /// Raises the interrupt again for what has not been read yet: one that came while nobody took interrupts is lost.
    pub fn remind(&self) {
        if self.events.load(Ordering::Acquire) != 0 {
            let _ = self.interrupt.write(1);
        }
    }

    fn raise(&self, event: u8) {
        self.events.fetch_or(event, Ordering::AcqRel);
        // An eventfd that is full will interrupt, too.
        let _ = self.interrupt.write(1);
    }

    fn eject(&self, mut devices: u32) {
        while devices != 0 {
            let device = devices.trailing_zeros();
            devices &= devices - 1;
            for told in [&self.arrived, &self.leaving] {
                told.fetch_and(!(1 << device), Ordering::AcqRel);
            }
            self.ejector.eject(device as u8);
        }
    }
}

/// The bit of PCI device number `device`; none for a number that no device has.
fn bit(device: u8) -> u32 {
    1u32.checked_shl(device.into()).unwrap_or(0)
}

impl BusDevice for Hotplug {
    /// A register is read with its own length. Anything else reads as zero and takes nothing.
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match (offset, data.len()) {
            (EVENTS, 1) => data[0] = self.events.swap(0, Ordering::AcqRel),
            (ARRIVED, 4) => {
                data.copy_from_slice(&self.arrived.swap(0, Ordering::AcqRel).to_le_bytes());
            }
            (LEAVING, 4) => {
                data.copy_from_slice(&self.leaving.swap(0, Ordering::AcqRel).to_le_bytes());
            }
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == EJECT
            && let Ok(bytes) = data.try_into()
        {
            self.eject(u32::from_le_bytes(bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    #[derive(Default)]
    struct Ejected(Mutex<Vec<u8>>);

    impl Ejector for Ejected {
        fn eject(&self, device: u8) {
            self.0.lock().unwrap().push(device);
        }
    }

    fn hotplug() -> (Hotplug, EventFd, Arc<Ejected>) {
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let ejected = Arc::new(Ejected::default());
        let hotplug = Hotplug::new(interrupt.try_clone().unwrap(), ejected.clone());
        (hotplug, interrupt, ejected)
    }

    fn byte(hotplug: &Hotplug) -> u8 {
        let mut data = [0xaa];
        hotplug.read(EVENTS, &mut data);
        data[0]
    }

    fn dword(hotplug: &Hotplug, offset: u64) -> u32 {
        let mut data = [0xaa; 4];
        hotplug.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn what_happens_is_told_once() {
        let (hotplug, interrupt, _) = hotplug();
        assert!(interrupt.read().is_err());
        hotplug.arrived(3);
        hotplug.arrived(31);
        hotplug.ask_to_leave(5);
        hotplug.press_power_button();
        assert_eq!(interrupt.read().unwrap(), 4);
        assert_eq!(byte(&hotplug), PCI_EVENT | POWER_BUTTON_EVENT);
        assert_eq!(byte(&hotplug), 0);
        assert_eq!(dword(&hotplug, ARRIVED), 1 << 3 | 1 << 31);
        assert_eq!(dword(&hotplug, LEAVING), 1 << 5);
        assert_eq!(dword(&hotplug, ARRIVED), 0);
        assert_eq!(dword(&hotplug, LEAVING), 0);
    }

    #[test]
    fn what_was_not_heard_is_said_again() {
        let (hotplug, interrupt, _) = hotplug();
        hotplug.remind();
        assert!(interrupt.read().is_err(), "there is nothing to say");
        hotplug.processors_changed();
        assert_eq!(interrupt.read().unwrap(), 1);
        hotplug.remind();
        assert_eq!(interrupt.read().unwrap(), 1);
        assert_eq!(byte(&hotplug), PROCESSOR_EVENT);
        hotplug.remind();
        assert!(interrupt.read().is_err(), "it has been read");
    }

    #[test]
    fn who_ejects_gets_rid_of_each_device() {
        let (hotplug, _, ejected) = hotplug();
        hotplug.ask_to_leave(4);
        hotplug.write(EJECT, &(1u32 << 4 | 1 << 31 | 1).to_le_bytes());
        assert_eq!(*ejected.0.lock().unwrap(), [0, 4, 31]);
        assert_eq!(dword(&hotplug, LEAVING), 0, "it has gone already");
    }

    #[test]
    fn odd_accesses_take_and_do_nothing() {
        let (hotplug, _, ejected) = hotplug();
        hotplug.arrived(2);
        hotplug.arrived(32);
        for (offset, length) in [(0, 4), (4, 1), (4, 8), (5, 4), (12, 4), (16, 1), (4, 0)] {
            let mut data = vec![0xaa; length];
            hotplug.read(offset, &mut data);
            assert_eq!(data, vec![0; length]);
        }
        for (offset, length) in [(0, 1), (4, 4), (12, 1), (12, 8), (13, 4), (12, 0)] {
            hotplug.write(offset, &vec![0xff; length]);
        }
        assert_eq!(*ejected.0.lock().unwrap(), []);
        assert_eq!(dword(&hotplug, ARRIVED), 1 << 2);
    }
}
