//! The state the first VP starts in, as one batch of registers.

use mshv_bindings::{
    hv_register_assoc, hv_register_name_HV_X64_REGISTER_CR0 as CR0,
    hv_register_name_HV_X64_REGISTER_CR3 as CR3, hv_register_name_HV_X64_REGISTER_CR4 as CR4,
    hv_register_name_HV_X64_REGISTER_CS as CS, hv_register_name_HV_X64_REGISTER_DS as DS,
    hv_register_name_HV_X64_REGISTER_EFER as EFER, hv_register_name_HV_X64_REGISTER_ES as ES,
    hv_register_name_HV_X64_REGISTER_FS as FS, hv_register_name_HV_X64_REGISTER_GDTR as GDTR,
    hv_register_name_HV_X64_REGISTER_GS as GS, hv_register_name_HV_X64_REGISTER_IDTR as IDTR,
    hv_register_name_HV_X64_REGISTER_MSR_MTRR_DEF_TYPE as MTRR_DEF_TYPE,
    hv_register_name_HV_X64_REGISTER_RBX as RBX, hv_register_name_HV_X64_REGISTER_RFLAGS as RFLAGS,
    hv_register_name_HV_X64_REGISTER_RIP as RIP, hv_register_name_HV_X64_REGISTER_RSI as RSI,
    hv_register_name_HV_X64_REGISTER_SS as SS, hv_register_name_HV_X64_REGISTER_TR as TR,
    hv_register_value, hv_x64_segment_register, hv_x64_segment_register__bindgen_ty_1,
    hv_x64_table_register,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::BootError;
use crate::layout::BOOT_GDT;

/// A register and the value to start with.
pub type Register = hv_register_assoc;

/// How the first VP starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// In long mode at a bzImage's 64-bit entry point.
    Linux64 {
        /// Where.
        entry: u64,
        /// The zero page, for RSI.
        zero_page: u64,
        /// The PML4, for CR3.
        page_tables: u64,
    },
    /// In 32-bit protected mode at an ELF image's PVH entry point.
    Pvh {
        /// Where.
        entry: u64,
        /// The `hvm_start_info`, for RBX.
        start_info: u64,
    },
}

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;
/// Bit 1 is always set, interrupts are off.
const RFLAGS_START: u64 = 2;
/// MTRRs on, everything write-back: what firmware leaves behind.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// Selector and attribute words of the boot GDT. Linux wants code at 0x10 and data at 0x18.
const CODE_64: Segment = Segment {
    selector: 0x10,
    attributes: 0xa09b,
    limit: 0xffff_ffff,
};
const DATA: Segment = Segment {
    selector: 0x18,
    attributes: 0xc093,
    limit: 0xffff_ffff,
};
const CODE_32: Segment = Segment {
    selector: 0x20,
    attributes: 0xc09b,
    limit: 0xffff_ffff,
};
const TASK: Segment = Segment {
    selector: 0x28,
    attributes: 0x008b,
    limit: 0x67,
};

/// A flat segment as both the GDT and a segment register describe it.
#[derive(Clone, Copy)]
struct Segment {
    selector: u16,
    attributes: u16,
    limit: u32,
}

impl Segment {
    /// The descriptor (base 0) for the GDT.
    fn descriptor(self) -> u64 {
        let granular = self.attributes & 0x8000 != 0;
        let limit = u64::from(if granular {
            self.limit >> 12
        } else {
            self.limit
        });
        (limit & 0xffff) | (limit & 0xf_0000) << 32 | u64::from(self.attributes & 0xf0ff) << 40
    }

    fn register(self) -> hv_register_value {
        hv_register_value {
            segment: hv_x64_segment_register {
                base: 0,
                limit: self.limit,
                selector: self.selector,
                __bindgen_anon_1: hv_x64_segment_register__bindgen_ty_1 {
                    attributes: self.attributes,
                },
            },
        }
    }
}

/// Writes the GDT that [`Start::registers`] points to.
pub(super) fn write_gdt(memory: &GuestMemoryMmap) -> Result<(), BootError> {
    let gdt = gdt();
    memory.write_slice(
        gdt.map(u64::to_le_bytes).as_flattened(),
        GuestAddress(BOOT_GDT),
    )?;
    Ok(())
}

fn gdt() -> [u64; 6] {
    let [code_64, data, code_32, task] = [CODE_64, DATA, CODE_32, TASK].map(Segment::descriptor);
    [0, 0, code_64, data, code_32, task]
}

impl Start {
    /// Everything the first VP needs that reset does not give it. Other VPs wait for their INIT and SIPI as reset left them.
    #[must_use]
    pub fn registers(self) -> Vec<Register> {
        let (code, cr0, cr3, cr4, efer) = match self {
            Self::Linux64 { page_tables, .. } => (
                CODE_64,
                CR0_PE | CR0_ET | CR0_PG,
                page_tables,
                CR4_PAE,
                EFER_LME_LMA,
            ),
            Self::Pvh { .. } => (CODE_32, CR0_PE | CR0_ET, 0, 0, 0),
        };
        let (entry, argument) = match self {
            Self::Linux64 {
                entry, zero_page, ..
            } => (entry, (RSI, zero_page)),
            Self::Pvh { entry, start_info } => (entry, (RBX, start_info)),
        };
        let data = DATA.register();
        let gdt_limit = u16::try_from(size_of_val(&gdt()) - 1).unwrap_or(u16::MAX);
        let table = |base, limit| hv_register_value {
            table: hv_x64_table_register {
                pad: [0; 3],
                limit,
                base,
            },
        };
        let number = |value| hv_register_value { reg64: value };
        [
            (CS, code.register()),
            (DS, data),
            (ES, data),
            (FS, data),
            (GS, data),
            (SS, data),
            (TR, TASK.register()),
            (GDTR, table(BOOT_GDT, gdt_limit)),
            (IDTR, table(0, 0)),
            (EFER, number(efer)),
            (CR3, number(cr3)),
            (CR4, number(cr4)),
            (CR0, number(cr0)),
            (RIP, number(entry)),
            (RFLAGS, number(RFLAGS_START)),
            (argument.0, number(argument.1)),
        ]
        .into_iter()
        .map(|(name, value)| Register {
            name,
            value,
            ..Default::default()
        })
        .chain([memory_types()])
        .collect()
    }
}

/// The memory types that every VP starts with: firmware sets them alike on all processors, and Linux complains if they
/// differ.
#[must_use]
pub fn memory_types() -> Register {
    Register {
        name: MTRR_DEF_TYPE,
        value: hv_register_value {
            reg64: MTRR_ENABLED_WRITE_BACK,
        },
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_flat_ones_everybody_knows() {
        assert_eq!(
            gdt()[2..],
            [
                0x00af_9b00_0000_ffff,
                0x00cf_9300_0000_ffff,
                0x00cf_9b00_0000_ffff,
                0x0000_8b00_0000_0067
            ]
        );
    }

    #[test]
    fn long_mode_and_protected_mode_start_states() {
        let value = |registers: &[Register], name| {
            let found = registers
                .iter()
                .find(|register| register.name == name)
                .unwrap();
            // SAFETY: the registers asked for below are 64-bit numbers.
            unsafe { found.value.reg64 }
        };
        let linux = Start::Linux64 {
            entry: 0x100_0200,
            zero_page: 0x7000,
            page_tables: 0x9000,
        }
        .registers();
        assert_eq!(value(&linux, RIP), 0x100_0200);
        assert_eq!(value(&linux, RSI), 0x7000);
        assert_eq!(value(&linux, CR3), 0x9000);
        assert_eq!(value(&linux, EFER), 0x500);
        let pvh = Start::Pvh {
            entry: 0x100_0000,
            start_info: 0x6000,
        }
        .registers();
        assert_eq!(value(&pvh, RBX), 0x6000);
        assert_eq!(value(&pvh, CR0) & CR0_PG, 0);
        assert_eq!(value(&pvh, EFER), 0);
    }
}
