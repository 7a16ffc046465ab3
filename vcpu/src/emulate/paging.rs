//! The walk through the guest's page tables, as the processor does it: 32-bit, PAE, four and five levels.
//!
//! Not modelled: protection keys and shadow stacks, whose state the register page does not carry, and physical address bits
//! above the processor's width, which are reserved on hardware and ignored here.

use vm_memory::GuestMemoryBackend;

use super::cpu::{
    AC, CR0_PG, CR0_WP, CR4_LA57, CR4_PAE, CR4_PSE, CR4_SMAP, CR4_SMEP, Cpu, EFER_NXE,
};
use super::error::{EmulateError, Fault, Step};
use super::ram;
use super::view::Access;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

const ERROR_PRESENT: u32 = 1 << 0;
const ERROR_WRITE: u32 = 1 << 1;
const ERROR_USER: u32 = 1 << 2;
const ERROR_RESERVED: u32 = 1 << 3;
const ERROR_FETCH: u32 = 1 << 4;

/// How linear addresses are translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    /// No paging.
    Off,
    /// Two levels of 32-bit entries.
    Legacy,
    /// Three levels of 64-bit entries, the first without rights.
    Pae,
    /// Four or five levels of 64-bit entries.
    Long { levels: u32 },
}

/// The registers that decide a translation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Paging {
    format: Format,
    root: u64,
    user: bool,
    write_protect: bool,
    no_execute: bool,
    large_pages: bool,
    smep: bool,
    smap: bool,
}

/// One page table entry as it was seen during a walk.
#[derive(Clone, Copy, Default)]
struct Entry {
    gpa: u64,
    value: u64,
}

impl Paging {
    /// Takes the state from `cpu`.
    pub(super) fn new(cpu: &Cpu) -> Self {
        let format = if cpu.cr0 & CR0_PG == 0 {
            Format::Off
        } else if cpu.cr4 & CR4_PAE == 0 {
            Format::Legacy
        } else if !cpu.is_long_mode() {
            Format::Pae
        } else {
            Format::Long {
                levels: if cpu.cr4 & CR4_LA57 != 0 { 5 } else { 4 },
            }
        };
        Self {
            format,
            root: match format {
                Format::Pae => cpu.cr3 & 0xffff_ffe0,
                Format::Legacy => cpu.cr3 & 0xffff_f000,
                Format::Off | Format::Long { .. } => cpu.cr3 & ADDRESS,
            },
            user: cpu.privilege_level() == 3,
            write_protect: cpu.cr0 & CR0_WP != 0,
            no_execute: cpu.efer & EFER_NXE != 0,
            large_pages: format != Format::Legacy || cpu.cr4 & CR4_PSE != 0,
            smep: cpu.cr4 & CR4_SMEP != 0,
            smap: cpu.cr4 & CR4_SMAP != 0 && cpu.rflags & AC == 0,
        }
    }

    /// Translates `linear` for `access` and sets the accessed and dirty bits on the way.
    ///
    /// # Errors
    ///
    /// #PF as the processor would raise it, or a page table outside of guest memory.
    pub(super) fn translate<M>(&self, memory: &M, linear: u64, access: Access) -> Step<u64>
    where
        M: GuestMemoryBackend + ?Sized,
    {
        if self.format == Format::Off {
            return Ok(linear);
        }
        loop {
            if let Some(gpa) = self.walk(memory, linear, access)? {
                return Ok(gpa);
            }
        }
    }

    /// One attempt; `None` if another processor changed an entry meanwhile.
    fn walk<M>(&self, memory: &M, linear: u64, access: Access) -> Step<Option<u64>>
    where
        M: GuestMemoryBackend + ?Sized,
    {
        let (levels, index_bits) = match self.format {
            Format::Off => return Ok(Some(linear)),
            Format::Legacy => (2, 10),
            Format::Pae => (3, 9),
            Format::Long { levels } => (levels, 9),
        };
        let mut entries = [Entry::default(); 5];
        let mut used = 0;
        let mut table = self.root;
        let mut rights = WRITABLE | USER;
        let mut no_execute = false;
        let mut level = levels;
        loop {
            level -= 1;
            let shift = 12 + level * index_bits;
            let index = linear >> shift & ((1 << index_bits) - 1);
            let gpa = table + index * self.entry_len() as u64;
            let value = ram::load(memory, gpa, self.entry_len())
                .ok_or(EmulateError::PageTableOutsideMemory { gpa, linear })?;
            if value & PRESENT == 0 {
                return Err(self.fault(linear, access, 0).into());
            }
            let top_of_pae = self.format == Format::Pae && level == 2;
            let leaf =
                level == 0 || level <= 2 && !top_of_pae && self.large_pages && value & LARGE != 0;
            if value & self.reserved(level, leaf) != 0 {
                return Err(self
                    .fault(linear, access, ERROR_PRESENT | ERROR_RESERVED)
                    .into());
            }
            if !top_of_pae {
                rights &= value;
                no_execute |= value & NO_EXECUTE != 0;
                entries[used] = Entry { gpa, value };
                used += 1;
            }
            if leaf {
                if !self.allows(access, rights, no_execute) {
                    return Err(self.fault(linear, access, ERROR_PRESENT).into());
                }
                let marked = self.mark(memory, &entries[..used], access, linear)?;
                let offset = linear & ((1 << shift) - 1);
                return Ok(marked.then(|| self.frame(value, level, shift) | offset));
            }
            table = value & ADDRESS;
        }
    }

    /// Bits that must be zero in a present entry.
    fn reserved(&self, level: u32, leaf: bool) -> u64 {
        let no_execute = if self.no_execute { 0 } else { NO_EXECUTE };
        match self.format {
            Format::Off => 0,
            Format::Legacy => {
                if leaf && level == 1 {
                    1 << 21
                } else {
                    0
                }
            }
            Format::Pae => {
                let high = 0x7ff0_0000_0000_0000 | no_execute;
                high | match level {
                    2 => NO_EXECUTE | 0x1e6,
                    1 if leaf => 0x001f_e000,
                    _ => 0,
                }
            }
            Format::Long { .. } => {
                no_execute
                    | match level {
                        3.. => LARGE,
                        2 if leaf => 0x3fff_e000,
                        1 if leaf => 0x001f_e000,
                        _ => 0,
                    }
            }
        }
    }

    /// The page frame that leaf entry `value` names.
    fn frame(&self, value: u64, level: u32, shift: u32) -> u64 {
        let frame = value & ADDRESS & !((1 << shift) - 1);
        if self.format == Format::Legacy && level == 1 {
            // PSE-36: bits 39 to 32 of the address lie in bits 20 to 13.
            frame | (value >> 13 & 0xff) << 32
        } else {
            frame
        }
    }

    /// Whether a page with these accumulated rights may be accessed.
    fn allows(&self, access: Access, rights: u64, no_execute: bool) -> bool {
        let user_page = rights & USER != 0;
        let writable = rights & WRITABLE != 0;
        if self.user && !user_page {
            return false;
        }
        match access {
            Access::Execute if self.smep && !self.user && user_page => false,
            Access::Execute => !no_execute,
            _ if self.smap && !self.user && user_page => false,
            Access::Read => true,
            Access::Write => writable || !self.user && !self.write_protect,
        }
    }

    /// The page fault for `access`, with the bits of `cause`.
    fn fault(&self, linear: u64, access: Access, cause: u32) -> Fault {
        let mut code = cause;
        if access == Access::Write {
            code |= ERROR_WRITE;
        }
        if self.user {
            code |= ERROR_USER;
        }
        let reports_fetch = self.smep || self.no_execute && self.format != Format::Legacy;
        if access == Access::Execute && reports_fetch {
            code |= ERROR_FETCH;
        }
        Fault::page(code, linear)
    }

    /// Sets accessed bits, and the dirty bit of the last entry for a write. False if an entry is no longer what the walk
    /// saw.
    fn mark<M>(&self, memory: &M, entries: &[Entry], access: Access, linear: u64) -> Step<bool>
    where
        M: GuestMemoryBackend + ?Sized,
    {
        for (index, entry) in entries.iter().enumerate() {
            let last = index + 1 == entries.len();
            let dirty = if last && access == Access::Write {
                DIRTY
            } else {
                0
            };
            let wanted = entry.value | ACCESSED | dirty;
            if wanted == entry.value {
                continue;
            }
            let len = self.entry_len();
            match ram::compare_exchange(memory, entry.gpa, len, entry.value, wanted) {
                Some(true) => {}
                Some(false) => return Ok(false),
                None => {
                    return Err(EmulateError::PageTableOutsideMemory {
                        gpa: entry.gpa,
                        linear,
                    }
                    .into());
                }
            }
        }
        Ok(true)
    }

    /// Bytes in one page table entry.
    fn entry_len(&self) -> usize {
        if self.format == Format::Legacy { 4 } else { 8 }
    }
}
