//! A small machine for the emulator: memory, a device whose registers are plain bytes, page tables, registers in each mode.

use std::sync::Mutex;

use vcpu::bus::Bus;
use vcpu::emulate::{Cpu, EmulateError, Exit, Outcome, Segment, VectorRegisters, emulate};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Index of each segment register in [`Cpu::segments`].
pub(crate) const ES: usize = 0;
pub(crate) const CS: usize = 1;
pub(crate) const SS: usize = 2;
pub(crate) const DS: usize = 3;
pub(crate) const FS: usize = 4;
pub(crate) const GS: usize = 5;

pub(crate) const RAX: usize = 0;
pub(crate) const RCX: usize = 1;
pub(crate) const RDX: usize = 2;
pub(crate) const RBX: usize = 3;
pub(crate) const RSP: usize = 4;
pub(crate) const RBP: usize = 5;
pub(crate) const RSI: usize = 6;
pub(crate) const RDI: usize = 7;

pub(crate) const CF: u64 = 1;
pub(crate) const ZF: u64 = 1 << 6;
pub(crate) const DF: u64 = 1 << 10;

/// One access that reached the bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    Read { gpa: u64, len: usize },
    Write { gpa: u64, data: Vec<u8> },
    In { port: u16, len: usize },
    Out { port: u16, data: Vec<u8> },
}

/// A device of plain bytes from `base` on, which remembers what it saw. Reads outside of it float high. Port reads count up.
pub(crate) struct Device {
    base: u64,
    inside: Mutex<Inside>,
}

struct Inside {
    bytes: Vec<u8>,
    seen: Vec<Seen>,
    record: bool,
    port_value: u8,
}

impl Device {
    pub(crate) fn new(base: u64, len: usize) -> Self {
        let inside = Inside {
            bytes: vec![0; len],
            seen: Vec::new(),
            record: true,
            port_value: 0,
        };
        Self {
            base,
            inside: Mutex::new(inside),
        }
    }

    /// Stops remembering accesses, which long runs have no use for.
    pub(crate) fn forget(&self) {
        self.inside.lock().unwrap().record = false;
    }

    pub(crate) fn fill(&self, offset: usize, data: &[u8]) {
        self.inside.lock().unwrap().bytes[offset..offset + data.len()].copy_from_slice(data);
    }

    pub(crate) fn read(&self, offset: usize, data: &mut [u8]) {
        data.copy_from_slice(&self.inside.lock().unwrap().bytes[offset..offset + data.len()]);
    }

    /// The accesses since the last call.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.inside.lock().unwrap().seen)
    }
}

impl Inside {
    fn note(&mut self, seen: impl FnOnce() -> Seen) {
        if self.record {
            self.seen.push(seen());
        }
    }
}

impl Bus for Device {
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        let mut inside = self.inside.lock().unwrap();
        let start = gpa.wrapping_sub(self.base) as usize;
        match inside.bytes.get(start..start.wrapping_add(data.len())) {
            Some(bytes) => data.copy_from_slice(bytes),
            None => data.fill(0xff),
        }
        inside.note(|| Seen::Read {
            gpa,
            len: data.len(),
        });
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        let mut inside = self.inside.lock().unwrap();
        let start = gpa.wrapping_sub(self.base) as usize;
        if let Some(bytes) = inside.bytes.get_mut(start..start.wrapping_add(data.len())) {
            bytes.copy_from_slice(data);
        }
        inside.note(|| Seen::Write {
            gpa,
            data: data.to_vec(),
        });
    }

    fn port_read(&self, port: u16, data: &mut [u8]) {
        let mut inside = self.inside.lock().unwrap();
        for byte in &mut *data {
            inside.port_value = inside.port_value.wrapping_add(1);
            *byte = inside.port_value;
        }
        inside.note(|| Seen::In {
            port,
            len: data.len(),
        });
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        self.inside.lock().unwrap().note(|| Seen::Out {
            port,
            data: data.to_vec(),
        });
    }
}

/// Vector registers in an array.
pub(crate) struct Vectors(pub(crate) [[u8; 32]; 16]);

impl VectorRegisters for Vectors {
    fn read(&mut self, index: usize, value: &mut [u8]) -> std::io::Result<()> {
        value.copy_from_slice(&self.0[index][..value.len()]);
        Ok(())
    }

    fn write(&mut self, index: usize, value: &[u8]) -> std::io::Result<()> {
        self.0[index][..value.len()].copy_from_slice(value);
        Ok(())
    }
}

/// Where the device of a [`Guest`] begins.
pub(crate) const MMIO: u64 = 0xd000_0000;

/// 1 MiB of RAM from address 0 and 64 KiB of device registers at [`MMIO`].
pub(crate) struct Guest {
    pub(crate) memory: GuestMemoryMmap<()>,
    pub(crate) device: Device,
}

impl Guest {
    pub(crate) fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        Self {
            memory,
            device: Device::new(MMIO, 0x1_0000),
        }
    }

    pub(crate) fn emulate(&self, cpu: &mut Cpu, bytes: &[u8]) -> Result<Outcome, EmulateError> {
        emulate(cpu, &self.memory, &self.device, Exit::new(bytes))
    }

    pub(crate) fn write(&self, gpa: u64, data: &[u8]) {
        self.memory.write_slice(data, GuestAddress(gpa)).unwrap();
    }

    pub(crate) fn read<const N: usize>(&self, gpa: u64) -> [u8; N] {
        let mut data = [0; N];
        self.memory
            .read_slice(&mut data, GuestAddress(gpa))
            .unwrap();
        data
    }

    pub(crate) fn write_u64(&self, gpa: u64, value: u64) {
        self.write(gpa, &value.to_le_bytes());
    }

    pub(crate) fn read_u64(&self, gpa: u64) -> u64 {
        u64::from_le_bytes(self.read(gpa))
    }

    /// Maps the page of `linear` to `gpa` in the four-level tables under `root`, with `flags` in the last entry. The tables
    /// for the upper levels follow the root, one page each.
    pub(crate) fn map(&self, root: u64, linear: u64, gpa: u64, flags: u64) {
        let mut table = root;
        for level in (1..4).rev() {
            let entry = table + (linear >> (12 + 9 * level) & 0x1ff) * 8;
            if self.read_u64(entry) == 0 {
                self.write_u64(entry, (root + (4 - level) * 0x1000) | 7);
            }
            table = self.read_u64(entry) & !0xfff;
        }
        self.write_u64(table + (linear >> 12 & 0x1ff) * 8, gpa | flags);
    }
}

fn segment(base: u64, limit: u32, selector: u16, attributes: u16) -> Segment {
    Segment {
        base,
        limit,
        selector,
        attributes,
    }
}

/// Real mode, all segments at 0 with 64 KiB.
pub(crate) fn real_mode() -> Cpu {
    let mut cpu = Cpu {
        rflags: 2,
        ..Cpu::default()
    };
    cpu.segments = [segment(0, 0xffff, 0, 0x93); 6];
    cpu
}

/// Flat 32-bit protected mode at level 0 without paging.
pub(crate) fn protected_mode() -> Cpu {
    let mut cpu = Cpu {
        rflags: 2,
        cr0: 0x11,
        cr4: 0x600,
        ..Cpu::default()
    };
    cpu.segments = [segment(0, 0xffff_ffff, 0x10, 0xc093); 6];
    cpu.segments[CS] = segment(0, 0xffff_ffff, 0x8, 0xc09b);
    cpu
}

/// 64-bit mode at level 0 with page tables at `cr3`.
pub(crate) fn long_mode(cr3: u64) -> Cpu {
    let mut cpu = Cpu {
        rflags: 2,
        cr0: 0x8001_0011,
        cr3,
        cr4: 0x4_0620,
        efer: 0xd00,
        xcr0: 7,
        ..Cpu::default()
    };
    cpu.segments = [segment(0, 0xffff_ffff, 0x10, 0xc093); 6];
    cpu.segments[CS] = segment(0, 0xffff_ffff, 0x8, 0xa09b);
    cpu
}
