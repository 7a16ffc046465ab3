//! PCI bus 0: its functions, the two ways to their configuration space, and the window that their memory BARs lie in.
//!
//! [`Ecam`] is the memory-mapped way of PCI Express, one exit an access; [`ConfigPorts`] is the old way through an address
//! and a data port, two exits an access, which early boot code and firmware use. Both lead to [`PciBus`]. [`Window`] leads
//! to the BARs, wherever in the window the guest has put them.
//!
//! Functions come and go while the machine runs, and BARs move. Look-ups take no lock for that: both tables are replaced
//! whole.

mod config;
mod ecam;
mod host_bridge;
pub mod msix;
mod ports;
mod pvpanic;
mod window;

#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use thiserror::Error;

pub use config::{ConfigSpace, Identity};
pub use ecam::Ecam;
pub use host_bridge::HostBridge;
pub use ports::ConfigPorts;
pub use pvpanic::{GuestEvent, PVPANIC_BAR_LENGTH, PvPanic};
pub use window::Window;

/// Bytes of a function's configuration space.
pub const CONFIG_SPACE: u16 = 4096;
/// Devices on a bus.
pub const DEVICES: u8 = 32;
/// Functions of a device.
pub const FUNCTIONS: u8 = 8;
/// The registers that decide where BARs lie end here: command and BARs.
const BARS_END: u16 = 0x28;

/// Guest physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The first.
    pub start: u64,
    /// How many.
    pub length: u64,
}

impl Range {
    /// Whether all of `other` is in here.
    #[must_use]
    pub fn holds(&self, other: &Self) -> bool {
        other.start >= self.start
            && other
                .start
                .checked_add(other.length)
                .is_some_and(|end| end - self.start <= self.length)
    }
}

/// One function of a device: what its configuration space does, and its memory BAR if it has one.
///
/// Accesses are of any length, and never leave the [`CONFIG_SPACE`] or the BAR.
pub trait PciFunction: Send + Sync {
    /// Fills `data` from the configuration space at `offset`.
    fn config_read(&self, offset: u16, data: &mut [u8]);
    /// Takes a write to the configuration space at `offset`.
    fn config_write(&self, offset: u16, data: &[u8]);

    /// Where its BAR decodes memory now.
    fn mapped(&self) -> Option<Range> {
        None
    }
    /// Fills `data` from the BAR at `offset`.
    fn bar_read(&self, offset: u64, data: &mut [u8]) {
        let _ = offset;
        data.fill(0xff);
    }
    /// Takes a write to the BAR at `offset`.
    fn bar_write(&self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }
}

/// Where on the bus a function is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// Device number, below [`DEVICES`].
    pub device: u8,
    /// Function number, below [`FUNCTIONS`].
    pub function: u8,
}

impl Slot {
    /// Function 0 of `device`.
    #[must_use]
    pub const fn device(device: u8) -> Self {
        Self {
            device,
            function: 0,
        }
    }

    fn index(self) -> Option<usize> {
        (self.device < DEVICES && self.function < FUNCTIONS)
            .then(|| usize::from(self.device * FUNCTIONS + self.function))
    }
}

/// Why a function cannot be where it was to be.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PciError {
    /// There is no such device or function number.
    #[error("there is no PCI slot {:02x}.{:x}", .0.device, .0.function)]
    NoSuchSlot(Slot),
    /// Another function is there.
    #[error("PCI slot {:02x}.{:x} is taken", .0.device, .0.function)]
    Taken(Slot),
    /// All slots have a function.
    #[error("all {DEVICES} PCI slots are taken")]
    Full,
}

type Function = Arc<dyn PciFunction>;

/// A BAR that decodes memory.
#[derive(Clone)]
struct Mapping {
    first: u64,
    last: u64,
    function: Function,
}

/// The functions of bus 0. A place without one reads as all ones and ignores writes.
pub struct PciBus {
    functions: ArcSwap<Vec<Option<Function>>>,
    /// BARs in ascending order, without overlap.
    mappings: ArcSwap<Vec<Mapping>>,
    /// Held while one of the two is replaced.
    change: Mutex<()>,
}

impl Default for PciBus {
    fn default() -> Self {
        let places = usize::from(DEVICES) * usize::from(FUNCTIONS);
        Self {
            functions: ArcSwap::from_pointee(vec![None; places]),
            mappings: ArcSwap::default(),
            change: Mutex::default(),
        }
    }
}

impl PciBus {
    /// Puts `function` into `slot`.
    ///
    /// # Errors
    /// When there is no such slot, or it is taken.
    pub fn insert(&self, slot: Slot, function: Function) -> Result<(), PciError> {
        let index = slot.index().ok_or(PciError::NoSuchSlot(slot))?;
        let _change = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let mut functions = Vec::clone(&self.functions.load());
        if functions[index].replace(function).is_some() {
            return Err(PciError::Taken(slot));
        }
        self.functions.store(Arc::new(functions));
        self.map_all();
        Ok(())
    }

    /// Takes the function out of `slot`.
    pub fn remove(&self, slot: Slot) -> Option<Function> {
        let index = slot.index()?;
        let _change = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let mut functions = Vec::clone(&self.functions.load());
        let removed = functions[index].take();
        self.functions.store(Arc::new(functions));
        self.map_all();
        removed
    }

    /// A device number that nothing has.
    ///
    /// # Errors
    /// When there is none left.
    pub fn free_slot(&self) -> Result<Slot, PciError> {
        let functions = self.functions.load();
        (0..DEVICES)
            .map(Slot::device)
            .find(|slot| slot.index().is_some_and(|index| functions[index].is_none()))
            .ok_or(PciError::Full)
    }

    /// Reads at `offset` of the function numbered `device * 8 + function`.
    fn read(&self, function: u8, offset: u16, data: &mut [u8]) {
        let inside = inside(offset, data.len());
        let (data, beyond) = data.split_at_mut(inside);
        beyond.fill(0xff);
        match &self.functions.load()[usize::from(function)] {
            Some(function) if !data.is_empty() => function.config_read(offset, data),
            _ => data.fill(0xff),
        }
    }

    fn write(&self, function: u8, offset: u16, data: &[u8]) {
        let data = &data[..inside(offset, data.len())];
        let functions = self.functions.load();
        let Some(function) = &functions[usize::from(function)] else {
            return;
        };
        if data.is_empty() {
            return;
        }
        // What is written elsewhere can reset the function, too.
        let before = function.mapped();
        function.config_write(offset, data);
        if offset < BARS_END || before != function.mapped() {
            let _change = self.change.lock().unwrap_or_else(PoisonError::into_inner);
            self.map_all();
        }
    }

    /// Asks all functions where their BARs are. Where two overlap, the one in the lower slot answers.
    fn map_all(&self) {
        let mut mappings: Vec<Mapping> = Vec::new();
        for function in self.functions.load().iter().flatten() {
            let Some(range) = function.mapped().filter(|range| range.length > 0) else {
                continue;
            };
            let (first, last) = (range.start, range.start.saturating_add(range.length - 1));
            let index = mappings.partition_point(|other| other.last < first);
            if mappings.get(index).is_none_or(|other| other.first > last) {
                let function = Arc::clone(function);
                mappings.insert(
                    index,
                    Mapping {
                        first,
                        last,
                        function,
                    },
                );
            }
        }
        self.mappings.store(Arc::new(mappings));
    }
}

/// How many of `length` bytes at `offset` lie in the configuration space.
fn inside(offset: u16, length: usize) -> usize {
    length.min(usize::from(CONFIG_SPACE.saturating_sub(offset)))
}
