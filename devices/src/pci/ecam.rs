//! The memory-mapped configuration space of PCI Express.

use std::sync::Arc;

use super::PciBus;
use crate::BusDevice;

/// Bits of a window offset: 12 for the register, 8 for the function.
const REGISTER_BITS: u32 = 12;
const FUNCTION_BITS: u32 = 8;
/// Size of the window of one bus, in bytes.
const WINDOW: u64 = 1 << (REGISTER_BITS + FUNCTION_BITS);

/// The window through which each function of the bus shows its 4 KiB.
///
/// An access that goes beyond a function's last byte reads ones there; the specification allows only aligned ones.
pub struct Ecam {
    bus: Arc<PciBus>,
}

impl Ecam {
    /// Size of the window in bytes.
    pub const LENGTH: u64 = WINDOW;

    /// The window to `bus`.
    pub fn new(bus: Arc<PciBus>) -> Self {
        Self { bus }
    }
}

/// Function and register of a window offset; offsets beyond the window do not reach here.
fn decode(offset: u64) -> (u8, u16) {
    let register = offset & ((1 << REGISTER_BITS) - 1);
    ((offset >> REGISTER_BITS) as u8, register as u16)
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let (function, register) = decode(offset);
        self.bus.read(function, register, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (function, register) = decode(offset);
        self.bus.write(function, register, data);
    }
}
