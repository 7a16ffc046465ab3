//! Guest-virtual to guest-physical translation, as the processor does it: no paging, 32-bit, PAE, 4-level and
//! 5-level, with large pages and the permission checks of CR0.WP, SMEP, SMAP and NX.
//!
//! KVM's own `KVM_TRANSLATE` says neither why a translation failed nor where, and the hypervisor says both.

use kvm_bindings::kvm_sregs;

use crate::memory::{Mapping, Memory, Unmapped};

/// Bits of CR0, CR4, EFER and RFLAGS that govern paging.
pub(crate) mod bits {
    pub(crate) const CR0_PE: u64 = 1 << 0;
    pub(crate) const CR0_WP: u64 = 1 << 16;
    pub(crate) const CR0_AM: u64 = 1 << 18;
    pub(crate) const CR0_PG: u64 = 1 << 31;
    pub(crate) const CR4_PSE: u64 = 1 << 4;
    pub(crate) const CR4_PAE: u64 = 1 << 5;
    pub(crate) const CR4_LA57: u64 = 1 << 12;
    pub(crate) const CR4_OSXSAVE: u64 = 1 << 18;
    pub(crate) const CR4_SMEP: u64 = 1 << 20;
    pub(crate) const CR4_SMAP: u64 = 1 << 21;
    pub(crate) const CR4_PKE: u64 = 1 << 22;
    pub(crate) const EFER_LME: u64 = 1 << 8;
    pub(crate) const EFER_LMA: u64 = 1 << 10;
    pub(crate) const EFER_NXE: u64 = 1 << 11;
    pub(crate) const RFLAGS_IF: u64 = 1 << 9;
    pub(crate) const RFLAGS_DF: u64 = 1 << 10;
    pub(crate) const RFLAGS_VM: u64 = 1 << 17;
    pub(crate) const RFLAGS_AC: u64 = 1 << 18;
}
use bits::*;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS_4K: u64 = 0x000f_ffff_ffff_f000;

/// Guest-physical memory, as translation and analysis see it.
pub(crate) trait Physical {
    /// Copies memory at `gpa` out.
    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), Unmapped>;
    /// Copies `data` to `gpa`.
    fn write(&self, gpa: u64, data: &[u8]) -> Result<(), Unmapped>;
    /// What lies at `gpa`.
    fn mapping(&self, gpa: u64) -> Mapping;
}

impl Physical for Memory {
    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), Unmapped> {
        Memory::read(self, gpa, buf)
    }

    fn write(&self, gpa: u64, data: &[u8]) -> Result<(), Unmapped> {
        Memory::write(self, gpa, data)
    }

    fn mapping(&self, gpa: u64) -> Mapping {
        self.lookup(gpa)
    }
}

/// Why a guest-virtual address has no guest-physical one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WalkError {
    /// An entry is not present, or the address is not canonical.
    NotPresent,
    /// The page exists and forbids this access.
    Privilege,
    /// An entry has reserved bits set.
    ReservedBits,
    /// A page table lies where the guest has no memory.
    TableUnmapped {
        /// The guest-physical address of the entry.
        gpa: u64,
    },
}

/// What the access is, for the permission checks. The default checks nothing but presence.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Access {
    /// The page must be readable by this privilege.
    pub(crate) read: bool,
    /// The page must be writable.
    pub(crate) write: bool,
    /// The page must be executable.
    pub(crate) execute: bool,
    /// The access is made at CPL 3.
    pub(crate) user: bool,
    /// Set accessed and dirty bits on the way.
    pub(crate) set_bits: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Off,
    Bits32,
    Pae,
    Long { levels: u32 },
}

/// The paging state of a VP.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Paging {
    mode: Mode,
    root: u64,
    pse: bool,
    nx: bool,
    write_protect: bool,
    smep: bool,
    /// Supervisor data accesses to user pages fault: CR4.SMAP, not suspended by RFLAGS.AC.
    pub(crate) smap: bool,
    /// Accesses are those of CPL 3.
    pub(crate) user: bool,
}

impl Paging {
    /// Takes the paging state out of the control registers.
    pub(crate) fn new(sregs: &kvm_sregs, rflags: u64) -> Self {
        let mode = if sregs.cr0 & CR0_PG == 0 {
            Mode::Off
        } else if sregs.efer & EFER_LMA != 0 {
            let levels = if sregs.cr4 & CR4_LA57 != 0 { 5 } else { 4 };
            Mode::Long { levels }
        } else if sregs.cr4 & CR4_PAE != 0 {
            Mode::Pae
        } else {
            Mode::Bits32
        };
        Self {
            mode,
            root: sregs.cr3,
            pse: sregs.cr4 & CR4_PSE != 0,
            nx: sregs.efer & EFER_NXE != 0,
            write_protect: sregs.cr0 & CR0_WP != 0,
            smep: sregs.cr4 & CR4_SMEP != 0,
            smap: sregs.cr4 & CR4_SMAP != 0 && rflags & RFLAGS_AC == 0,
            user: cpl(sregs, rflags) == 3,
        }
    }

    /// Translates `gva` for an access of any kind.
    ///
    /// # Errors
    /// Why the processor would not get to the page.
    pub(crate) fn translate<M: Physical + ?Sized>(
        &self,
        memory: &M,
        gva: u64,
        access: Access,
    ) -> Result<u64, WalkError> {
        match self.mode {
            Mode::Off => Ok(gva & 0xffff_ffff),
            Mode::Bits32 => self.walk32(memory, gva & 0xffff_ffff, access),
            Mode::Pae => {
                let gva = gva & 0xffff_ffff;
                let gpa = (self.root & 0xffff_ffe0) + (gva >> 30) * 8;
                let entry = read_u64(memory, gpa)?;
                if entry & PRESENT == 0 {
                    return Err(WalkError::NotPresent);
                }
                // The four top entries carry neither permissions nor accessed bits.
                self.walk64(memory, gva, access, entry & ADDRESS_4K, 2)
            }
            Mode::Long { levels } => {
                let shift = 64 - (12 + 9 * levels);
                if (((gva << shift) as i64) >> shift) as u64 != gva {
                    return Err(WalkError::NotPresent);
                }
                self.walk64(memory, gva, access, self.root & ADDRESS_4K, levels)
            }
        }
    }

    fn walk64<M: Physical + ?Sized>(
        &self,
        memory: &M,
        gva: u64,
        access: Access,
        root: u64,
        levels: u32,
    ) -> Result<u64, WalkError> {
        let mut table = root;
        let mut rights = Rights::ALL;
        for level in (1..=levels).rev() {
            let shift = 12 + 9 * (level - 1);
            let gpa = table + ((gva >> shift) & 0x1ff) * 8;
            let entry = read_u64(memory, gpa)?;
            if entry & PRESENT == 0 {
                return Err(WalkError::NotPresent);
            }
            if entry & NO_EXECUTE != 0 && !self.nx || entry & LARGE != 0 && level >= 4 {
                return Err(WalkError::ReservedBits);
            }
            rights.narrow(
                entry & WRITABLE != 0,
                entry & USER != 0,
                entry & NO_EXECUTE == 0,
            );
            let leaf = level == 1 || entry & LARGE != 0;
            if leaf {
                self.check(rights, access)?;
            }
            if access.set_bits {
                let mut updated = entry | ACCESSED;
                if leaf && access.write {
                    updated |= DIRTY;
                }
                if updated != entry {
                    memory
                        .write(gpa, &updated.to_le_bytes())
                        .map_err(|Unmapped| WalkError::TableUnmapped { gpa })?;
                }
            }
            if leaf {
                let offset = (1 << shift) - 1;
                // Bits between the PAT bit of a large page and its address are reserved.
                if level > 1 && entry & ADDRESS_4K & offset & !0x1fff != 0 {
                    return Err(WalkError::ReservedBits);
                }
                return Ok((entry & ADDRESS_4K & !offset) | (gva & offset));
            }
            table = entry & ADDRESS_4K;
        }
        Err(WalkError::NotPresent)
    }

    fn walk32<M: Physical + ?Sized>(
        &self,
        memory: &M,
        gva: u64,
        access: Access,
    ) -> Result<u64, WalkError> {
        let mut table = self.root & 0xffff_f000;
        let mut rights = Rights::ALL;
        for level in [2, 1] {
            let shift = 12 + 10 * (level - 1);
            let gpa = table + ((gva >> shift) & 0x3ff) * 4;
            let mut raw = [0; 4];
            memory
                .read(gpa, &mut raw)
                .map_err(|Unmapped| WalkError::TableUnmapped { gpa })?;
            let entry = u64::from(u32::from_le_bytes(raw));
            if entry & PRESENT == 0 {
                return Err(WalkError::NotPresent);
            }
            rights.narrow(entry & WRITABLE != 0, entry & USER != 0, true);
            let leaf = level == 1 || (entry & LARGE != 0 && self.pse);
            if leaf {
                self.check(rights, access)?;
            }
            if access.set_bits {
                let mut updated = entry as u32 | ACCESSED as u32;
                if leaf && access.write {
                    updated |= DIRTY as u32;
                }
                if u64::from(updated) != entry {
                    memory
                        .write(gpa, &updated.to_le_bytes())
                        .map_err(|Unmapped| WalkError::TableUnmapped { gpa })?;
                }
            }
            if leaf && level == 2 {
                // PSE-36: bits 13 to 20 are address bits 32 to 39.
                let high = ((entry >> 13) & 0xff) << 32;
                return Ok(high | (entry & 0xffc0_0000) | (gva & 0x3f_ffff));
            }
            if leaf {
                return Ok((entry & 0xffff_f000) | (gva & 0xfff));
            }
            table = entry & 0xffff_f000;
        }
        Err(WalkError::NotPresent)
    }

    fn check(&self, rights: Rights, access: Access) -> Result<(), WalkError> {
        let data = access.read || access.write;
        let denied = if access.user {
            (data || access.execute) && !rights.user || access.write && !rights.write
        } else {
            access.write && !rights.write && self.write_protect
                || access.execute && rights.user && self.smep
                || data && rights.user && self.smap
        };
        if denied || access.execute && !rights.execute {
            return Err(WalkError::Privilege);
        }
        Ok(())
    }
}

/// What all levels of the tables together allow.
#[derive(Clone, Copy)]
struct Rights {
    write: bool,
    user: bool,
    execute: bool,
}

impl Rights {
    const ALL: Self = Self {
        write: true,
        user: true,
        execute: true,
    };

    fn narrow(&mut self, write: bool, user: bool, execute: bool) {
        self.write &= write;
        self.user &= user;
        self.execute &= execute;
    }
}

fn read_u64<M: Physical + ?Sized>(memory: &M, gpa: u64) -> Result<u64, WalkError> {
    let mut raw = [0; 8];
    memory
        .read(gpa, &mut raw)
        .map_err(|Unmapped| WalkError::TableUnmapped { gpa })?;
    Ok(u64::from_le_bytes(raw))
}

/// The current privilege level: the DPL of SS, 0 in real mode and 3 in virtual-8086 mode.
pub(crate) fn cpl(sregs: &kvm_sregs, rflags: u64) -> u8 {
    if sregs.cr0 & CR0_PE == 0 {
        0
    } else if rflags & RFLAGS_VM != 0 {
        3
    } else {
        sregs.ss.dpl
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::cell::RefCell;

    /// Memory from 0 on, with nothing above.
    pub(crate) struct Ram(pub(crate) RefCell<Vec<u8>>);

    impl Ram {
        pub(crate) fn new(size: usize) -> Self {
            Self(RefCell::new(vec![0; size]))
        }

        pub(crate) fn put(&self, gpa: u64, data: &[u8]) {
            self.write(gpa, data).unwrap();
        }
    }

    impl Physical for Ram {
        fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), Unmapped> {
            let ram = self.0.borrow();
            let start = usize::try_from(gpa).map_err(|_| Unmapped)?;
            let end = start.checked_add(buf.len()).ok_or(Unmapped)?;
            buf.copy_from_slice(ram.get(start..end).ok_or(Unmapped)?);
            Ok(())
        }

        fn write(&self, gpa: u64, data: &[u8]) -> Result<(), Unmapped> {
            let mut ram = self.0.borrow_mut();
            let start = usize::try_from(gpa).map_err(|_| Unmapped)?;
            let end = start.checked_add(data.len()).ok_or(Unmapped)?;
            ram.get_mut(start..end)
                .ok_or(Unmapped)?
                .copy_from_slice(data);
            Ok(())
        }

        fn mapping(&self, gpa: u64) -> Mapping {
            if gpa < self.0.borrow().len() as u64 {
                Mapping::Mapped {
                    writable: true,
                    executable: true,
                }
            } else {
                Mapping::Unmapped
            }
        }
    }

    pub(crate) fn long_mode() -> kvm_sregs {
        kvm_sregs {
            cr0: CR0_PG | CR0_PE | CR0_WP,
            cr3: 0x1000,
            cr4: CR4_PAE,
            efer: EFER_LMA | EFER_LME | EFER_NXE,
            ..Default::default()
        }
    }

    const READ: Access = Access {
        read: true,
        write: false,
        execute: false,
        user: false,
        set_bits: false,
    };

    #[test]
    fn without_paging_an_address_is_itself() {
        let paging = Paging::new(&kvm_sregs::default(), 2);
        assert_eq!(paging.translate(&Ram::new(0), 0x1234, READ), Ok(0x1234));
    }

    #[test]
    fn four_levels_with_every_page_size() {
        let ram = Ram::new(0x8000);
        ram.put(0x1000, &0x2003u64.to_le_bytes());
        ram.put(0x2000, &0x3003u64.to_le_bytes());
        ram.put(0x2008, &(0x4000_0000u64 | 0x83).to_le_bytes());
        ram.put(0x3000, &0x4003u64.to_le_bytes());
        ram.put(0x3008, &(0x60_0000u64 | 0x83).to_le_bytes());
        ram.put(0x4008, &0x1234_5003u64.to_le_bytes());
        let paging = Paging::new(&long_mode(), 2);
        assert_eq!(paging.translate(&ram, 0x1678, READ), Ok(0x1234_5678));
        assert_eq!(paging.translate(&ram, 0x20_0123, READ), Ok(0x60_0123));
        assert_eq!(paging.translate(&ram, 0x4000_0123, READ), Ok(0x4000_0123));
        assert_eq!(
            paging.translate(&ram, 0x2000, READ),
            Err(WalkError::NotPresent)
        );
        assert_eq!(
            paging.translate(&ram, 0x8000_0000_0000, READ),
            Err(WalkError::NotPresent)
        );
    }

    #[test]
    fn a_fifth_level_when_cr4_says_so() {
        let ram = Ram::new(0x8000);
        ram.put(0x1008, &0x2003u64.to_le_bytes());
        ram.put(0x2000, &0x3003u64.to_le_bytes());
        ram.put(0x3000, &0x83u64.to_le_bytes());
        let mut sregs = long_mode();
        sregs.cr4 |= CR4_LA57;
        let paging = Paging::new(&sregs, 2);
        assert_eq!(paging.translate(&ram, (1 << 48) + 0x77, READ), Ok(0x77));
    }

    #[test]
    fn a_table_outside_memory_is_named() {
        let ram = Ram::new(0x2000);
        ram.put(0x1000, &0x9_0003u64.to_le_bytes());
        let paging = Paging::new(&long_mode(), 2);
        assert_eq!(
            paging.translate(&ram, 0x20_0000, READ),
            Err(WalkError::TableUnmapped { gpa: 0x9_0000 })
        );
    }

    #[test]
    fn pae_and_32_bit() {
        let ram = Ram::new(0x8000);
        ram.put(0x1018, &0x2001u64.to_le_bytes());
        ram.put(0x2000, &(0x1_0020_0000u64 | 0x83).to_le_bytes());
        let mut sregs = long_mode();
        sregs.efer = 0;
        assert_eq!(
            Paging::new(&sregs, 2).translate(&ram, 0xc000_0042, READ),
            Ok(0x1_0020_0042)
        );
        sregs.cr4 = CR4_PSE;
        sregs.cr3 = 0x4000;
        ram.put(0x4000, &0x5003u32.to_le_bytes());
        ram.put(0x4004, &(0x0080_0083u32 | 1 << 13).to_le_bytes());
        ram.put(0x5004, &0x0000_7003u32.to_le_bytes());
        let paging = Paging::new(&sregs, 2);
        assert_eq!(paging.translate(&ram, 0x1abc, READ), Ok(0x7abc));
        assert_eq!(paging.translate(&ram, 0x40_0abc, READ), Ok(0x1_0080_0abc));
    }

    #[test]
    fn permissions() {
        let ram = Ram::new(0x8000);
        ram.put(0x1000, &0x2007u64.to_le_bytes());
        ram.put(0x2000, &0x3007u64.to_le_bytes());
        ram.put(0x3000, &0x4007u64.to_le_bytes());
        ram.put(0x4000, &(0x5005u64 | NO_EXECUTE).to_le_bytes());
        let mut sregs = long_mode();
        let write = Access {
            write: true,
            ..READ
        };
        let execute = Access {
            execute: true,
            ..Access::default()
        };
        let user = Access { user: true, ..READ };
        let paging = Paging::new(&sregs, 2);
        assert_eq!(paging.translate(&ram, 0, user), Ok(0x5000));
        assert_eq!(paging.translate(&ram, 0, write), Err(WalkError::Privilege));
        assert_eq!(
            paging.translate(&ram, 0, execute),
            Err(WalkError::Privilege)
        );
        sregs.cr0 &= !CR0_WP;
        assert_eq!(Paging::new(&sregs, 2).translate(&ram, 0, write), Ok(0x5000));
        sregs.cr4 |= CR4_SMAP;
        assert_eq!(
            Paging::new(&sregs, 2).translate(&ram, 0, READ),
            Err(WalkError::Privilege)
        );
        assert_eq!(
            Paging::new(&sregs, RFLAGS_AC).translate(&ram, 0, READ),
            Ok(0x5000)
        );
    }

    #[test]
    fn accessed_and_dirty_bits_are_set_on_request() {
        let ram = Ram::new(0x8000);
        ram.put(0x1000, &0x2003u64.to_le_bytes());
        ram.put(0x2000, &0x83u64.to_le_bytes());
        let paging = Paging::new(&long_mode(), 2);
        let write = Access {
            write: true,
            set_bits: true,
            ..READ
        };
        assert_eq!(paging.translate(&ram, 0x10, write), Ok(0x10));
        assert_eq!(read_u64(&ram, 0x1000), Ok(0x2003 | ACCESSED));
        assert_eq!(read_u64(&ram, 0x2000), Ok(0x83 | ACCESSED | DIRTY));
    }
}
