//! Configuration mechanism #1: the address port 0xcf8 and the data port 0xcfc.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::PciBus;
use crate::BusDevice;

/// Offsets of the two registers.
const ADDRESS: u64 = 0;
const DATA: u64 = 4;

const ENABLE: u32 = 1 << 31;
/// Bits of the address that can be written: enable, bus, function, register.
const ADDRESS_MASK: u32 = 0x80ff_fffc;

/// The address and the data port, eight ports from 0xcf8.
pub struct ConfigPorts {
    bus: Arc<PciBus>,
    address: AtomicU32,
}

impl ConfigPorts {
    /// The ports to `bus`.
    pub fn new(bus: Arc<PciBus>) -> Self {
        Self {
            bus,
            address: AtomicU32::new(0),
        }
    }

    /// The function and the register that an access at `offset` means, if it means one of this bus.
    fn target(&self, offset: u64) -> Option<(u8, u16)> {
        let address = self.address.load(Ordering::Relaxed);
        let [register, function, bus, _] = address.to_le_bytes();
        let byte = u16::try_from(offset.checked_sub(DATA)?).ok()?;
        (address & ENABLE != 0 && bus == 0).then(|| (function, u16::from(register) + byte))
    }
}

impl BusDevice for ConfigPorts {
    /// The address answers only to accesses of 32 bits; others, and data of an absent function, read as all ones.
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset == ADDRESS && data.len() == 4 {
            data.copy_from_slice(&self.address.load(Ordering::Relaxed).to_le_bytes());
        } else if let Some((function, register)) = self.target(offset) {
            self.bus.read(function, register, data);
        } else {
            data.fill(0xff);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == ADDRESS {
            if let Ok(bytes) = <[u8; 4]>::try_from(data) {
                self.address
                    .store(u32::from_le_bytes(bytes) & ADDRESS_MASK, Ordering::Relaxed);
            }
        } else if let Some((function, register)) = self.target(offset) {
            self.bus.write(function, register, data);
        }
    }
}
