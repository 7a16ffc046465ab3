//! Memory modules that come while the guest runs: which are there and where they lie, as the guest's ACPI reads it.
//!
//! | offset | bytes | |
//! |---|---|---|
//! | 0 | 4 | modules that are there, one bit each |
//! | 4 | 4 | modules that have come since this was last read |
//! | 16 + 48 n | 48 | where module n lies: what its `_CRS` returns |
//!
//! The interrupt that says that a module has come is that of the [event device](crate::hotplug). A module stays.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{BusDevice, hotplug::Hotplug};

/// Offset of the double word with the modules that are there.
pub const PRESENT: u64 = 0;
/// Offset of the double word with the modules that have come.
pub const ARRIVED: u64 = 4;
/// Offset of the first module's resources.
pub const RESOURCES: u64 = 16;
/// Bytes of a module's resources: a QWord address space descriptor and the end tag (ACPI 6.5, sections 6.4.3.5.1 and 6.4.2.9).
pub const RESOURCES_LENGTH: u64 = 48;
/// Most modules: numbers are below.
pub const MOST: usize = 16;
/// Bytes of the registers.
pub const LENGTH: u64 = RESOURCES + RESOURCES_LENGTH * MOST as u64;

type Resources = [u8; RESOURCES_LENGTH as usize];

#[derive(Default)]
struct State {
    modules: Vec<Resources>,
    arrived: u32,
}

/// All slots are taken.
#[derive(Debug, thiserror::Error)]
#[error("all {MOST} slots for memory modules are taken")]
pub struct NoSlot;

/// The registers.
pub struct Modules {
    events: Arc<Hotplug>,
    state: Mutex<State>,
}

impl Modules {
    /// Registers without any module. Those that come are told by `events`.
    #[must_use]
    pub fn new(events: Arc<Hotplug>) -> Self {
        Self {
            events,
            state: Mutex::default(),
        }
    }

    /// Whether there is no slot for another one.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.lock().modules.len() == MOST
    }

    /// Puts a module in that has `length` bytes from the guest physical address `start` on, and tells the guest.
    ///
    /// # Errors
    /// There is no slot for it.
    pub fn insert(&self, start: u64, length: u64) -> Result<(), NoSlot> {
        let mut state = self.lock();
        let number = state.modules.len();
        if number == MOST {
            return Err(NoSlot);
        }
        state.modules.push(resources(start, length));
        state.arrived |= 1 << number;
        drop(state);
        self.events.modules_changed();
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_word(&self, offset: u64) -> u32 {
        let mut state = self.lock();
        match offset {
            PRESENT => (1 << state.modules.len()) - 1,
            ARRIVED => std::mem::take(&mut state.arrived),
            RESOURCES..LENGTH => {
                let number = (offset - RESOURCES) / RESOURCES_LENGTH;
                let at = ((offset - RESOURCES) % RESOURCES_LENGTH) as usize;
                let module = state.modules.get(number as usize);
                let bytes = module.and_then(|bytes| bytes.get(at..)?.first_chunk());
                bytes.copied().map_or(0, u32::from_le_bytes)
            }
            _ => 0,
        }
    }
}

impl BusDevice for Modules {
    /// A double word is read as a whole. Anything else reads as zero and takes nothing.
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Ok(bytes) = <&mut [u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            *bytes = self.read_word(offset).to_le_bytes();
        }
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}

/// A range of memory, as resource descriptors.
fn resources(start: u64, length: u64) -> Resources {
    /// The descriptor and the bytes behind its own length.
    const QWORD_ADDRESS_SPACE: [u8; 3] = [0x8a, 0x2b, 0];
    /// A memory range; its first and last address are fixed; it is cacheable and can be written to.
    const KIND_AND_FLAGS: [u8; 3] = [0, 0b1100, 0b011];
    const END_TAG: [u8; 2] = [0x79, 0];
    let last = start.wrapping_add(length).wrapping_sub(1);
    let mut bytes = Vec::with_capacity(RESOURCES_LENGTH as usize);
    bytes.extend(QWORD_ADDRESS_SPACE);
    bytes.extend(KIND_AND_FLAGS);
    // Granularity, first, last, offset and length.
    for number in [0, start, last, 0, length] {
        bytes.extend(number.to_le_bytes());
    }
    bytes.extend(END_TAG);
    let mut resources = [0; RESOURCES_LENGTH as usize];
    resources.copy_from_slice(&bytes);
    resources
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;
    use crate::hotplug::{EVENTS, Ejector, MODULE_EVENT};

    struct Nothing;

    impl Ejector for Nothing {
        fn eject(&self, _device: u8) {}
    }

    fn modules() -> (Modules, Arc<Hotplug>, EventFd) {
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let events = Hotplug::new(interrupt.try_clone().unwrap(), Arc::new(Nothing));
        let events = Arc::new(events);
        (Modules::new(Arc::clone(&events)), events, interrupt)
    }

    fn dword(modules: &Modules, offset: u64) -> u32 {
        let mut data = [0xaa; 4];
        modules.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_module_that_comes_is_told_once_and_stays() {
        let (modules, events, interrupt) = modules();
        assert_eq!((dword(&modules, PRESENT), dword(&modules, ARRIVED)), (0, 0));
        modules.insert(4 << 30, 128 << 20).unwrap();
        modules.insert((4 << 30) + (128 << 20), 1 << 30).unwrap();
        assert_eq!(interrupt.read().unwrap(), 2);
        let mut event = [0];
        events.read(EVENTS, &mut event);
        assert_eq!(event, [MODULE_EVENT]);
        assert_eq!(dword(&modules, ARRIVED), 0b11);
        assert_eq!(dword(&modules, ARRIVED), 0);
        assert_eq!(dword(&modules, PRESENT), 0b11);
    }

    #[test]
    fn its_resources_say_where_it_lies() {
        let (modules, ..) = modules();
        modules.insert(0x1_2000_0000, 0x800_0000).unwrap();
        let read = |number: u64| -> Vec<u8> {
            let start = RESOURCES + number * RESOURCES_LENGTH;
            let words = (start..start + RESOURCES_LENGTH).step_by(4);
            words
                .flat_map(|offset| dword(&modules, offset).to_le_bytes())
                .collect()
        };
        let bytes = read(0);
        assert_eq!(bytes[..6], [0x8a, 0x2b, 0, 0, 0xc, 3]);
        assert_eq!(bytes[14..22], 0x1_2000_0000_u64.to_le_bytes());
        assert_eq!(bytes[22..30], 0x1_27ff_ffff_u64.to_le_bytes());
        assert_eq!(bytes[38..46], 0x800_0000_u64.to_le_bytes());
        assert_eq!(bytes[46..], [0x79, 0]);
        assert_eq!(read(1), [0; 48], "there is none");
    }

    #[test]
    fn there_are_as_many_as_there_are_slots() {
        let (modules, ..) = modules();
        for number in 0..MOST as u64 {
            assert!(!modules.is_full());
            modules.insert(number << 30, 1 << 30).unwrap();
        }
        assert!(modules.is_full());
        assert!(modules.insert(1 << 40, 1 << 30).is_err());
        assert_eq!(dword(&modules, PRESENT), 0xffff);
    }

    #[test]
    fn odd_accesses_take_nothing() {
        let (modules, ..) = modules();
        modules.insert(4 << 30, 1 << 30).unwrap();
        for (offset, length) in [(ARRIVED, 1), (ARRIVED, 8), (2, 4), (LENGTH, 4)] {
            let mut data = vec![0xaa; length];
            modules.read(offset, &mut data);
            assert_eq!(data, vec![0; length]);
        }
        modules.write(ARRIVED, &[0; 4]);
        assert_eq!(dword(&modules, ARRIVED), 1);
    }
}
