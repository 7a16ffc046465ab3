//! The panic device: a PCI function whose one register a guest's kernel writes to when it panics.
//!
//! It is the one that QEMU and cloud-hypervisor have, and Linux' `pvpanic-pci` and Windows know. Reading the register gives the
//! events that the host takes note of; writing it is such an event.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{ConfigSpace, Identity, PciFunction, Range};

/// The BAR: one register, on a page of its own.
pub const PVPANIC_BAR_LENGTH: u32 = 0x1000;

const IDENTITY: Identity = Identity {
    id: (0x1b36, 0x0011),
    subsystem: (0x1af4, 0x1100),
    // A system peripheral of no further kind.
    class: 0x0880,
    revision: 1,
};

const PANICKED: u8 = 1 << 0;
const CRASH_LOADED: u8 = 1 << 1;

/// What a guest tells of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestEvent {
    /// Its kernel has panicked.
    Panicked,
    /// Its kernel has panicked, and another one is about to take a dump of it.
    CrashLoaded,
}

type Report = Box<dyn Fn(GuestEvent) + Send + Sync>;

/// The panic device.
pub struct PvPanic {
    config: Mutex<ConfigSpace>,
    report: Report,
}

impl PvPanic {
    /// The function with its BAR at `address`. `report` is called on the thread of the processor that tells; the guest may have
    /// it called as often as it likes.
    pub fn new(address: u32, report: Report) -> Self {
        Self {
            config: Mutex::new(ConfigSpace::new(&IDENTITY, PVPANIC_BAR_LENGTH, address)),
            report,
        }
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PciFunction for PvPanic {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.config().read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.config().write(offset, data);
    }

    fn mapped(&self) -> Option<Range> {
        self.config().mapped()
    }

    fn bar_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (0, Some(register)) = (offset, data.first_mut()) {
            *register = PANICKED | CRASH_LOADED;
        }
    }

    fn bar_write(&self, offset: u64, data: &[u8]) {
        let (0, Some(&events)) = (offset, data.first()) else {
            return;
        };
        for (bit, event) in [
            (PANICKED, GuestEvent::Panicked),
            (CRASH_LOADED, GuestEvent::CrashLoaded),
        ] {
            if events & bit != 0 {
                (self.report)(event);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn events_are_offered_and_reported() {
        let seen: Arc<Mutex<Vec<GuestEvent>>> = Arc::default();
        let log = Arc::clone(&seen);
        let device = PvPanic::new(
            0xc000_0000,
            Box::new(move |event| log.lock().unwrap().push(event)),
        );
        let mut id = [0; 4];
        device.config_read(0, &mut id);
        assert_eq!(id, [0x36, 0x1b, 0x11, 0]);
        assert_eq!(device.mapped(), None);
        device.config_write(4, &[2, 0]);
        let bar = Range {
            start: 0xc000_0000,
            length: 0x1000,
        };
        assert_eq!(device.mapped(), Some(bar));

        let mut register = [0xff; 4];
        device.bar_read(0, &mut register);
        assert_eq!(register, [3, 0, 0, 0]);
        device.bar_read(1, &mut register[..1]);
        assert_eq!(register[0], 0);

        for (offset, data) in [
            (0, &[1][..]),
            (0, &[2, 0]),
            (0, &[0xfc]),
            (1, &[1]),
            (0, &[]),
        ] {
            device.bar_write(offset, data);
        }
        assert_eq!(
            *seen.lock().unwrap(),
            [GuestEvent::Panicked, GuestEvent::CrashLoaded]
        );
    }
}
