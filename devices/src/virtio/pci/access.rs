//! The capabilities that say where in the BAR what is (virtio 1.3, section 4.1.4), and the one that leads there by itself.

use crate::pci::ConfigSpace;

/// `VIRTIO_PCI_CAP_*`: what a capability leads to.
pub(super) const COMMON: u8 = 1;
const NOTIFY: u8 = 2;
pub(super) const ISR: u8 = 3;
pub(super) const DEVICE: u8 = 4;
const CFG: u8 = 5;

/// Vendor-specific capability.
const VENDOR: u8 = 0x09;
/// Bytes of a capability, with its id and the pointer to the next.
const LENGTH: u8 = 16;
/// Bytes of the body of the [`CFG`] capability before its window to the BAR.
pub(super) const CFG_CAPABILITY_LENGTH: usize = 14;

/// `cap_len`, `cfg_type`, `bar`, `id`, two of padding, `offset`, `length`.
fn body(kind: u8, offset: u64, length: u64, extra: usize) -> Vec<u8> {
    let mut body = vec![LENGTH + extra as u8, kind, 0, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend((length as u32).to_le_bytes());
    body.resize(body.len() + extra, 0);
    body
}

/// Adds a capability for each kind, offset and length.
pub(super) fn add_capabilities(space: &mut ConfigSpace, parts: &[(u8, u64, u64)]) {
    for (kind, offset, length) in parts {
        space.add_capability(VENDOR, &body(*kind, *offset, *length, 0), &[]);
    }
}

/// Adds the capability for the doorbells, which are `distance` bytes apart.
pub(super) fn add_notify_capability(
    space: &mut ConfigSpace,
    offset: u64,
    length: u64,
    distance: u32,
) {
    let mut body = body(NOTIFY, offset, length, 4);
    body[14..].copy_from_slice(&distance.to_le_bytes());
    space.add_capability(VENDOR, &body, &[]);
}

/// Adds the window to the BAR in the configuration space; returns where the capability's body starts.
pub(super) fn add_cfg_capability(space: &mut ConfigSpace) -> usize {
    let mut writable = [0; CFG_CAPABILITY_LENGTH];
    // The bar, the offset and the length are the driver's to choose.
    writable[2] = 0xff;
    writable[6..].fill(0xff);
    space.add_capability(VENDOR, &body(CFG, 0, 0, 4), &writable)
}

/// Where the window to the BAR leads.
pub(super) struct Access {
    pub(super) offset: u64,
    /// Bytes: one, two or four.
    pub(super) length: usize,
}

impl Access {
    /// What the driver has written into the capability whose body is at `at`; nothing if it leads nowhere.
    pub(super) fn read(space: &ConfigSpace, at: usize) -> Option<Self> {
        let bar = space.word(at + 2) & 0xff;
        let (offset, length) = (space.dword(at + 6), space.dword(at + 10));
        let inside = u64::from(offset) + u64::from(length) <= super::BAR_LENGTH.into();
        (bar == 0 && matches!(length, 1 | 2 | 4) && inside).then_some(Self {
            offset: offset.into(),
            length: length as usize,
        })
    }
}
