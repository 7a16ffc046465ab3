//! The configuration space of a function with one memory BAR: header, BAR, command register and capabilities.

use super::Range;

/// Bytes of a conventional function's configuration space. What PCI Express has behind them reads as all ones, which tells
/// Linux not to look for extended capabilities there.
pub(crate) const CONVENTIONAL: usize = 256;

const VENDOR: usize = 0x00;
const DEVICE: usize = 0x02;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const CLASS: usize = 0x0a;
const BAR0: usize = 0x10;
const SUBSYSTEM_VENDOR: usize = 0x2c;
const SUBSYSTEM: usize = 0x2e;
const CAPABILITIES: usize = 0x34;

/// The first byte behind the standard header.
const HEADER_END: usize = 0x40;
/// In the status register: there are capabilities.
const HAS_CAPABILITIES: u8 = 1 << 4;
/// In the command register: the function decodes memory, and may be a master; interrupts by pin are off.
const MEMORY: u8 = 1 << 1;
const COMMAND_WRITABLE: [u8; 2] = [MEMORY | 1 << 2, 1 << 2];

/// What a function is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor and device.
    pub id: (u16, u16),
    /// Subsystem vendor and subsystem.
    pub subsystem: (u16, u16),
    /// Base class and subclass, as `0xBBSS`.
    pub class: u16,
    /// Revision.
    pub revision: u8,
}

/// The registers of a function.
pub struct ConfigSpace {
    registers: [u8; CONVENTIONAL],
    writable: [u8; CONVENTIONAL],
    /// Where the next capability goes, and which byte is to point there.
    next: usize,
    link: usize,
    /// Length of BAR 0 in bytes: a power of two.
    bar: u32,
}

impl ConfigSpace {
    /// A function whose BAR 0 has `bar` bytes (a power of two, at least 16) and lies at `address`.
    #[must_use]
    pub fn new(identity: &Identity, bar: u32, address: u32) -> Self {
        let mut space = Self {
            registers: [0; CONVENTIONAL],
            writable: [0; CONVENTIONAL],
            next: HEADER_END,
            link: CAPABILITIES,
            bar,
        };
        let mut put = |at: usize, value: u16| {
            space.registers[at..at + 2].copy_from_slice(&value.to_le_bytes());
        };
        put(VENDOR, identity.id.0);
        put(DEVICE, identity.id.1);
        put(CLASS, identity.class);
        put(SUBSYSTEM_VENDOR, identity.subsystem.0);
        put(SUBSYSTEM, identity.subsystem.1);
        space.registers[REVISION] = identity.revision;
        space.writable[COMMAND..COMMAND + 2].copy_from_slice(&COMMAND_WRITABLE);
        space.set_bar(address);
        let mask = !(bar - 1);
        space.writable[BAR0..BAR0 + 4].copy_from_slice(&mask.to_le_bytes());
        // The interrupt line is a note that firmware leaves for drivers.
        space.writable[0x3c] = 0xff;
        space
    }

    /// Adds a capability: its id, and what follows the pointer to the next. `writable` says which bits of `body` can be
    /// written. Returns the offset of `body`.
    ///
    /// # Panics
    /// When there is no room: which capabilities a function has is known when it is written.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let (at, start) = (self.next, self.next + 2);
        let end = start + body.len();
        assert!(end <= CONVENTIONAL, "no room for capability {id:#x}");
        self.registers[STATUS] |= HAS_CAPABILITIES;
        self.registers[self.link] = at as u8;
        self.registers[at] = id;
        self.registers[start..end].copy_from_slice(body);
        self.writable[start..start + writable.len()].copy_from_slice(writable);
        self.link = at + 1;
        self.next = end.next_multiple_of(4);
        start
    }

    /// Fills `data` from `offset`.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = self.registers.get(at).copied().unwrap_or(0xff);
        }
    }

    /// Takes a write at `offset`: bits that cannot be written stay as they are.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (at, byte) in (usize::from(offset)..).zip(data) {
            let (Some(register), Some(mask)) = (self.registers.get_mut(at), self.writable.get(at))
            else {
                return;
            };
            *register = *register & !mask | byte & mask;
        }
    }

    /// A register of two bytes.
    #[must_use]
    pub fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.registers[at], self.registers[at + 1]])
    }

    /// A register of four bytes.
    #[must_use]
    pub fn dword(&self, at: usize) -> u32 {
        u32::from(self.word(at)) | u32::from(self.word(at + 2)) << 16
    }

    /// Puts `value` into the two bytes at `at`, whatever can be written there.
    pub fn set_word(&mut self, at: usize, value: u16) {
        self.registers[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    /// Where BAR 0 decodes memory, if it does.
    #[must_use]
    pub fn mapped(&self) -> Option<Range> {
        (self.registers[COMMAND] & MEMORY != 0).then(|| Range {
            start: self.dword(BAR0).into(),
            length: self.bar.into(),
        })
    }

    /// As after a reset of the function: it decodes nothing, and its BAR holds nothing.
    pub fn reset(&mut self) {
        self.set_word(COMMAND, 0);
        self.set_bar(0);
    }

    fn set_bar(&mut self, address: u32) {
        let base = address & !(self.bar - 1);
        self.registers[BAR0..BAR0 + 4].copy_from_slice(&base.to_le_bytes());
    }
}
