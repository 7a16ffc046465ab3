//! Between a stopped VP's registers and [`Cpu`]: through the register page where there is one, else by hypercall.

use std::ptr::NonNull;

use mshv_bindings::{
    HV_X64_REGISTER_CLASS_FLAGS, HV_X64_REGISTER_CLASS_GENERAL, HV_X64_REGISTER_CLASS_IP,
    hv_register_name_HV_X64_REGISTER_CR0 as CR0, hv_register_name_HV_X64_REGISTER_CR3 as CR3,
    hv_register_name_HV_X64_REGISTER_CR4 as CR4, hv_register_name_HV_X64_REGISTER_CS as CS,
    hv_register_name_HV_X64_REGISTER_DS as DS, hv_register_name_HV_X64_REGISTER_EFER as EFER,
    hv_register_name_HV_X64_REGISTER_ES as ES, hv_register_name_HV_X64_REGISTER_FS as FS,
    hv_register_name_HV_X64_REGISTER_GS as GS, hv_register_name_HV_X64_REGISTER_R15 as R15,
    hv_register_name_HV_X64_REGISTER_RAX as RAX, hv_register_name_HV_X64_REGISTER_RFLAGS as RFLAGS,
    hv_register_name_HV_X64_REGISTER_RIP as RIP, hv_register_name_HV_X64_REGISTER_SS as SS,
    hv_register_name_HV_X64_REGISTER_XFEM as XFEM, hv_vp_register_page, hv_x64_segment_register,
};

use crate::{
    emulate::{Cpu, Segment},
    vp::{Register, VpError},
};

const GENERAL: u32 = 1 << HV_X64_REGISTER_CLASS_GENERAL;
const IP: u32 = 1 << HV_X64_REGISTER_CLASS_IP;
const FLAGS: u32 = 1 << HV_X64_REGISTER_CLASS_FLAGS;

/// Places behind the 16 general registers.
const RIP_INDEX: usize = 16;
const RFLAGS_INDEX: usize = 17;

/// The register page of one VP, valid while the VP is stopped in an intercept.
pub(crate) struct RegisterPage(NonNull<hv_vp_register_page>);

// SAFETY: the mapping belongs to the process, not to a thread, and only the owner of this value touches it.
unsafe impl Send for RegisterPage {}

impl RegisterPage {
    /// Takes over a mapping of the page.
    ///
    /// # Safety
    /// `page` must be a live mapping of a VP's register page that nothing else unmaps or accesses from now on.
    pub(crate) unsafe fn new(page: NonNull<hv_vp_register_page>) -> Self {
        Self(page)
    }

    fn get(&self) -> &hv_vp_register_page {
        // SAFETY: a live mapping; the hypervisor writes to it only while the VP runs, which needs `&mut Vp`.
        unsafe { self.0.as_ref() }
    }

    fn get_mut(&mut self) -> &mut hv_vp_register_page {
        // SAFETY: as in `get`.
        unsafe { self.0.as_mut() }
    }

    /// Whether the hypervisor has filled in the page.
    pub(crate) fn is_valid(&self) -> bool {
        self.get().isvalid != 0
    }

    /// Moves RIP, and sets general register `index` (0 to 15) where one is given: the end of most exits.
    pub(crate) fn advance(&mut self, rip: u64, register: Option<(usize, u64)>) {
        let mut dirty = IP;
        self.write(RIP_INDEX, rip);
        if let Some((index, value)) = register {
            self.write(index, value);
            dirty |= GENERAL;
        }
        self.get_mut().dirty |= dirty;
    }

    /// Writes one of the 16 general registers, RIP or RFLAGS, which lie side by side in the page.
    fn write(&mut self, index: usize, value: u64) {
        // SAFETY: the array variant covers the whole union, and every bit pattern is a valid register.
        unsafe {
            let registers = &raw mut (*self.0.as_ptr()).__bindgen_anon_1.registers;
            (&raw mut (*registers)[index]).write_unaligned(value);
        }
    }

    pub(crate) fn load(&self) -> Cpu {
        let page = self.get();
        // SAFETY: all variants of the unions are plain integers.
        let (gpr, rip, rflags, segments) = unsafe {
            let general = &page.__bindgen_anon_1.__bindgen_anon_1;
            let gpr = { general.__bindgen_anon_1 }.gp_registers;
            (
                gpr,
                general.rip,
                general.rflags,
                { page.__bindgen_anon_3 }.segment_registers,
            )
        };
        Cpu {
            gpr,
            rip,
            rflags,
            segments: segments.map(segment),
            cr0: page.cr0,
            cr3: page.cr3,
            cr4: page.cr4,
            efer: page.efer,
            xcr0: page.xfem,
        }
    }

    /// Writes back what emulation may change, and marks only what it did change.
    pub(crate) fn store(&mut self, before: &Cpu, after: &Cpu) {
        let mut dirty = 0;
        for (index, (old, new)) in before.gpr.iter().zip(&after.gpr).enumerate() {
            if old != new {
                self.write(index, *new);
                dirty |= GENERAL;
            }
        }
        if before.rip != after.rip {
            self.write(RIP_INDEX, after.rip);
            dirty |= IP;
        }
        if before.rflags != after.rflags {
            self.write(RFLAGS_INDEX, after.rflags);
            dirty |= FLAGS;
        }
        self.get_mut().dirty |= dirty;
    }
}

/// The registers of [`Cpu`] in the order of its fields, for a hypercall: 16 general ones, RIP, RFLAGS, six segments, five
/// control registers.
pub(crate) fn names() -> [Register; 29] {
    let mut registers = [Register::default(); 29];
    let rest = [ES, CS, SS, DS, FS, GS, CR0, CR3, CR4, EFER, XFEM];
    // RAX to R15, RIP and RFLAGS are numbered one after the other.
    let numbers = (RAX..=RFLAGS).chain(rest);
    for (register, name) in registers.iter_mut().zip(numbers) {
        register.name = name;
    }
    registers
}

const _: () = assert!(R15 - RAX == 15 && RIP - RAX == 16 && RFLAGS - RAX == 17);

/// The answer to a hypercall for [`names`].
pub(crate) fn from_values(registers: &[Register; 29]) -> Cpu {
    // SAFETY: all variants of the union are plain integers.
    let number = |index: usize| unsafe { registers[index].value.reg64 };
    // SAFETY: as above.
    let segment_at = |index: usize| segment(unsafe { registers[18 + index].value.segment });
    Cpu {
        gpr: std::array::from_fn(number),
        rip: number(16),
        rflags: number(17),
        segments: std::array::from_fn(segment_at),
        cr0: number(24),
        cr3: number(25),
        cr4: number(26),
        efer: number(27),
        xcr0: number(28),
    }
}

/// What emulation has changed, for a hypercall.
pub(crate) fn changes(before: &Cpu, after: &Cpu) -> Vec<Register> {
    let old = before.gpr.iter().chain([&before.rip, &before.rflags]);
    let new = after.gpr.iter().chain([&after.rip, &after.rflags]);
    (RAX..)
        .zip(old.zip(new))
        .filter(|(_, (old, new))| old != new)
        .map(|(name, (_, new))| number(name, *new))
        .collect()
}

/// A 64-bit register for a hypercall.
pub(crate) fn number(name: u32, value: u64) -> Register {
    let value = mshv_bindings::hv_register_value { reg64: value };
    Register {
        name,
        value,
        ..Default::default()
    }
}

fn segment(register: hv_x64_segment_register) -> Segment {
    Segment {
        base: register.base,
        limit: register.limit,
        selector: register.selector,
        // SAFETY: both variants are the same 16 bits.
        attributes: unsafe { register.__bindgen_anon_1.attributes },
    }
}

impl crate::Vp {
    /// The registers of the stopped VP.
    pub(crate) fn load(&self) -> Result<Cpu, VpError> {
        if let Some(page) = self.valid_page() {
            return Ok(page.load());
        }
        let mut registers = names();
        self.get_registers(&mut registers)?;
        Ok(from_values(&registers))
    }

    /// Writes back what differs between `before` and `after`.
    pub(crate) fn store(&mut self, before: &Cpu, after: &Cpu) -> Result<(), VpError> {
        if let Some(page) = self.valid_page_mut() {
            page.store(before, after);
            return Ok(());
        }
        let changes = changes(before, after);
        if changes.is_empty() {
            Ok(())
        } else {
            self.set_registers(&changes)
        }
    }

    /// Moves RIP past the intercepted instruction and sets one general register, if any.
    pub(crate) fn advance(
        &mut self,
        rip: u64,
        register: Option<(usize, u64)>,
    ) -> Result<(), VpError> {
        if let Some(page) = self.valid_page_mut() {
            page.advance(rip, register);
            return Ok(());
        }
        match register {
            None => self.set_registers(&[number(RIP, rip)]),
            Some((index, value)) => {
                self.set_registers(&[number(RIP, rip), number(RAX + index as u32, value)])
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> Box<hv_vp_register_page> {
        // SAFETY: a page of zeros is a valid register page.
        let mut page: Box<hv_vp_register_page> = Box::new(unsafe { std::mem::zeroed() });
        page.isvalid = 1;
        page
    }

    #[test]
    fn only_what_changed_is_marked_dirty() {
        let mut memory = page();
        // SAFETY: `memory` outlives the page and is not used while it lives.
        let mut page = unsafe { RegisterPage::new(NonNull::from(memory.as_mut())) };
        let before = page.load();
        let mut after = before.clone();
        after.rip = 0x1003;
        page.store(&before, &after);
        assert_eq!({ page.get().dirty }, IP);
        after.rflags = 0x46;
        after.gpr[15] = 7;
        page.store(&before, &after);
        assert_eq!({ page.get().dirty }, IP | FLAGS | GENERAL);
        assert_eq!(page.load(), after);
        page.advance(0x1004, Some((2, 9)));
        assert_eq!((page.load().rip, page.load().gpr[2]), (0x1004, 9));
    }

    #[test]
    fn hypercalls_carry_the_same_registers_as_the_page() {
        let mut answer = names();
        for (index, register) in answer.iter_mut().enumerate() {
            if (18..24).contains(&index) {
                let segment = hv_x64_segment_register {
                    base: index as u64,
                    ..Default::default()
                };
                register.value.segment = segment;
            } else {
                register.value.reg64 = 100 + index as u64;
            }
        }
        let before = from_values(&answer);
        assert_eq!(before.gpr[7], 107);
        assert_eq!((before.rip, before.rflags), (116, 117));
        assert_eq!(before.segments[5].base, 23);
        assert_eq!((before.cr0, before.xcr0), (124, 128));

        let mut after = before.clone();
        assert!(changes(&before, &after).is_empty());
        after.gpr[3] = 1;
        after.rip = 2;
        let names: Vec<u32> = changes(&before, &after)
            .iter()
            .map(|change| change.name)
            .collect();
        assert_eq!(names, [RAX + 3, RIP]);
    }
}
