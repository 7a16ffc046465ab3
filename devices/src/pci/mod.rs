//! PCI bus 0: its functions, and the two ways to their configuration space.
//!
//! [`Ecam`] is the memory-mapped way of PCI Express, one exit an access; [`ConfigPorts`] is the old way through an address
//! and a data port, two exits an access, which early boot code and firmware use. Both lead to [`PciBus`].

mod ecam;
mod host_bridge;
mod ports;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use thiserror::Error;

pub use ecam::Ecam;
pub use host_bridge::HostBridge;
pub use ports::ConfigPorts;

/// Bytes of a function's configuration space.
pub const CONFIG_SPACE: u16 = 4096;
/// Devices on a bus.
pub const DEVICES: u8 = 32;
/// Functions of a device.
pub const FUNCTIONS: u8 = 8;

/// One function of a device: what its configuration space does.
///
/// Accesses are of any length, and never leave the [`CONFIG_SPACE`].
pub trait PciFunction: Send + Sync {
    /// Fills `data` from the configuration space at `offset`.
    fn config_read(&self, offset: u16, data: &mut [u8]);
    /// Takes a write to the configuration space at `offset`.
    fn config_write(&self, offset: u16, data: &[u8]);
}

/// Where on the bus a function is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// Device number, below [`DEVICES`].
    pub device: u8,
    /// Function number, below [`FUNCTIONS`].
    pub function: u8,
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
}

/// The functions of bus 0. A place without one reads as all ones and ignores writes.
pub struct PciBus {
    functions: Vec<Option<Arc<dyn PciFunction>>>,
}

impl Default for PciBus {
    fn default() -> Self {
        Self {
            functions: vec![None; usize::from(DEVICES) * usize::from(FUNCTIONS)],
        }
    }
}

impl PciBus {
    /// Puts `function` into `slot`.
    ///
    /// # Errors
    /// When there is no such slot, or it is taken.
    pub fn insert(&mut self, slot: Slot, function: Arc<dyn PciFunction>) -> Result<(), PciError> {
        if slot.device >= DEVICES || slot.function >= FUNCTIONS {
            return Err(PciError::NoSuchSlot(slot));
        }
        let place = &mut self.functions[usize::from(slot.device * FUNCTIONS + slot.function)];
        if place.is_some() {
            return Err(PciError::Taken(slot));
        }
        *place = Some(function);
        Ok(())
    }

    /// Reads at `offset` of the function numbered `device * 8 + function`.
    fn read(&self, function: u8, offset: u16, data: &mut [u8]) {
        let inside = inside(offset, data.len());
        let (data, beyond) = data.split_at_mut(inside);
        beyond.fill(0xff);
        match &self.functions[usize::from(function)] {
            Some(function) if !data.is_empty() => function.config_read(offset, data),
            _ => data.fill(0xff),
        }
    }

    fn write(&self, function: u8, offset: u16, data: &[u8]) {
        let data = &data[..inside(offset, data.len())];
        if let Some(function) = &self.functions[usize::from(function)]
            && !data.is_empty()
        {
            function.config_write(offset, data);
        }
    }
}

/// How many of `length` bytes at `offset` lie in the configuration space.
fn inside(offset: u16, length: usize) -> usize {
    length.min(usize::from(CONFIG_SPACE.saturating_sub(offset)))
}
