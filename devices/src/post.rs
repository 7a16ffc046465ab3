//! Port 0x80: power-on self-test codes.
//!
//! Linux writes here to wait for about a microsecond between accesses to old hardware, so the port must exist, and do
//! nothing.

use crate::BusDevice;

/// A port that swallows what is written and reads as all ones.
#[derive(Debug, Clone, Copy, Default)]
pub struct PostPort;

impl BusDevice for PostPort {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}
