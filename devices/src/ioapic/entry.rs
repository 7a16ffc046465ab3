//! One entry of the redirection table, and the MSI it stands for.

use super::Msi;

const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASK: u64 = 1 << 16;
/// Delivery status, which is never pending here, and remote IRR.
const READ_ONLY: u64 = 1 << 12 | REMOTE_IRR;
const DELIVERY_MODE: u64 = 0b111 << 8;
const LOGICAL: u64 = 1 << 11;
const DESTINATION_SHIFT: u32 = 56;
/// Vector, delivery mode, destination mode, status, polarity, remote IRR, trigger mode, mask, destination.
const DEFINED: u64 = 0xff00_0000_0001_ffff;

/// Window of the local APICs that MSIs are written to.
const MSI_BASE: u64 = 0xfee0_0000;
const MSI_DESTINATION_SHIFT: u32 = 12;
const MSI_LOGICAL: u64 = 1 << 2;
/// Redirection hint: any one processor of the destination set, as lowest-priority delivery asks for.
const MSI_HINT: u64 = 1 << 3;
const MSI_LEVEL_ASSERT: u32 = 1 << 14;
const MSI_TRIGGER_LEVEL: u32 = 1 << 15;
const LOWEST_PRIORITY: u64 = 1;

/// A redirection table entry; after reset it is masked and otherwise zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry(u64);

impl Default for Entry {
    fn default() -> Self {
        Self(MASK)
    }
}

impl Entry {
    pub(super) fn vector(self) -> u8 {
        self.0 as u8
    }

    pub(super) fn is_level(self) -> bool {
        self.0 & LEVEL != 0
    }

    pub(super) fn is_masked(self) -> bool {
        self.0 & MASK != 0
    }

    /// Whether a level-triggered interrupt was sent and its end has not come yet.
    pub(super) fn remote_irr(self) -> bool {
        self.0 & REMOTE_IRR != 0
    }

    pub(super) fn set_remote_irr(&mut self, sent: bool) {
        self.0 = if sent {
            self.0 | REMOTE_IRR
        } else {
            self.0 & !REMOTE_IRR
        };
    }

    /// One half as the guest reads it.
    pub(super) fn dword(self, high: bool) -> u32 {
        (if high { self.0 >> 32 } else { self.0 }) as u32
    }

    /// Takes one half from the guest. Read-only bits stay, but making the pin edge-triggered clears remote IRR: that is
    /// how drivers end an interrupt without an EOI register.
    pub(super) fn set_dword(&mut self, high: bool, value: u32) {
        let (shift, half) = if high {
            (32, 0xffff_ffff << 32)
        } else {
            (0, 0xffff_ffff)
        };
        let writable = half & DEFINED & !READ_ONLY;
        self.0 = (self.0 & !writable) | (u64::from(value) << shift & writable);
        if !self.is_level() {
            self.set_remote_irr(false);
        }
    }

    /// The MSI that delivers this entry's interrupt.
    pub(super) fn msi(self) -> Msi {
        let mode = (self.0 & DELIVERY_MODE) >> 8;
        let mut address = MSI_BASE | (self.0 >> DESTINATION_SHIFT) << MSI_DESTINATION_SHIFT;
        if self.0 & LOGICAL != 0 {
            address |= MSI_LOGICAL;
        }
        if mode == LOWEST_PRIORITY {
            address |= MSI_HINT;
        }
        let mut data = u32::from(self.vector()) | (mode as u32) << 8;
        if self.is_level() {
            data |= MSI_LEVEL_ASSERT | MSI_TRIGGER_LEVEL;
        }
        Msi { address, data }
    }
}
