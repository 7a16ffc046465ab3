//! The host bridge at 00.0: there so that a scan of the bus finds a PCI host, and without a function of its own.

use super::{PciFunction, config::CONVENTIONAL};

/// The PCIe host bridge that virtual machines know: no quirk of real hardware is keyed to its id.
const VENDOR: u16 = 0x1b36;
const DEVICE: u16 = 0x0008;
/// Base class 06 (bridge), subclass 00 (host).
const CLASS: u16 = 0x0600;

/// Header of a device without capabilities, BARs or interrupt.
const HEADER: [u8; 16] = {
    let mut header = [0; 16];
    [header[0x0], header[0x1]] = VENDOR.to_le_bytes();
    [header[0x2], header[0x3]] = DEVICE.to_le_bytes();
    [header[0xa], header[0xb]] = CLASS.to_le_bytes();
    header
};

/// The host bridge. All its registers are read-only; those behind the header read as zero.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostBridge;

impl PciFunction for HostBridge {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        for (register, byte) in (usize::from(offset)..).zip(data) {
            let absent = if register < CONVENTIONAL { 0 } else { 0xff };
            *byte = HEADER.get(register).copied().unwrap_or(absent);
        }
    }

    fn config_write(&self, _offset: u16, _data: &[u8]) {}
}
