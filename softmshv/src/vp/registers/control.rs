//! Control, debug, segment and table registers, EFER, the APIC base and XCR0.

use kvm_bindings::{kvm_debugregs, kvm_sregs};
use kvm_ioctls::VcpuFd;
use mshv_bindings::{self as hv, hv_register_value};

use super::segment::{from_hv, table_from_hv, table_to_hv, to_hv};
use super::{Failure, word};
use crate::errno::Errno;
use crate::vp::context::Context;
use crate::vp::walk::bits::{CR0_PG, EFER_LMA, EFER_LME};

/// CR0 bits that exist.
const CR0_BITS: u64 = 0xe005_003f;
/// EFER bits that exist: SCE, LME, LMA, NXE, SVME, FFXSR, TCE, AIBRSE.
const EFER_BITS: u64 = 1 | 1 << 8 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 14 | 1 << 15 | 1 << 21;
/// CR4 bits that exist: up to PCE, OSFXSR, OSXMMEXCPT, UMIP, LA57, VMXE, SMXE, FSGSBASE, PCIDE, OSXSAVE, SMEP, SMAP,
/// PKE, CET, PKS.
const CR4_BITS: u64 = 0x01f7_7fff;

/// The value of register `name`, when it is one of these.
pub(super) fn get(context: &Context, name: u32) -> Result<Option<hv_register_value>, Failure> {
    let sregs = context.sregs();
    let value = match name {
        hv::hv_register_name_HV_X64_REGISTER_CR0
        | hv::hv_register_name_HV_X64_REGISTER_INTERMEDIATE_CR0 => sregs.cr0,
        hv::hv_register_name_HV_X64_REGISTER_CR2 => sregs.cr2,
        hv::hv_register_name_HV_X64_REGISTER_CR3
        | hv::hv_register_name_HV_X64_REGISTER_INTERMEDIATE_CR3 => sregs.cr3,
        hv::hv_register_name_HV_X64_REGISTER_CR4
        | hv::hv_register_name_HV_X64_REGISTER_INTERMEDIATE_CR4 => sregs.cr4,
        hv::hv_register_name_HV_X64_REGISTER_CR8
        | hv::hv_register_name_HV_X64_REGISTER_INTERMEDIATE_CR8 => sregs.cr8,
        hv::hv_register_name_HV_X64_REGISTER_EFER => sregs.efer,
        hv::hv_register_name_HV_X64_REGISTER_APIC_BASE => sregs.apic_base,
        hv::hv_register_name_HV_X64_REGISTER_XFEM => xcr0(context.vcpu())?,
        hv::hv_register_name_HV_X64_REGISTER_IDTR | hv::hv_register_name_HV_X64_REGISTER_GDTR => {
            let table = if name == hv::hv_register_name_HV_X64_REGISTER_IDTR {
                &sregs.idt
            } else {
                &sregs.gdt
            };
            let mut value = word(0);
            value.table = table_to_hv(table);
            return Ok(Some(value));
        }
        _ if is_debug(name) => *debug_slot(&mut context.vcpu().get_debug_regs()?, name),
        _ => {
            let mut sregs = *sregs;
            return Ok(segment_slot(&mut sregs, name).map(|segment| {
                let mut value = word(0);
                value.segment = to_hv(segment);
                value
            }));
        }
    };
    Ok(Some(word(value)))
}

/// Sets register `name`, when it is one of these; false when it is not.
pub(super) fn set(
    context: &mut Context,
    name: u32,
    value: &hv_register_value,
) -> Result<bool, Failure> {
    // SAFETY: every variant of the union is plain integers.
    let (number, segment, table) = unsafe { (value.reg64, value.segment, value.table) };
    let in_range = |bits: u64| {
        if number & !bits == 0 {
            Ok(number)
        } else {
            Err(Failure::BadValue)
        }
    };
    match name {
        hv::hv_register_name_HV_X64_REGISTER_CR0
        | hv::hv_register_name_HV_X64_REGISTER_INTERMEDIATE_CR0 => {
            context.sregs_mut().cr0 = in_range(CR0_BITS)?;
            note_long_mode(context.sregs_mut());
        }
        hv::hv_register_name_HV_X64_REGISTER_CR2 => context.sregs_mut().cr2 = number,
        hv::hv_register_name_HV_X64_REGISTER_CR3
        | hv::hv_register_name_HV_X64_REGISTER_INTERMEDIATE_CR3 => {
            context.sregs_mut().cr3 = number;
        }
        hv::hv_register_name_HV_X64_REGISTER_CR4
        | hv::hv_register_name_HV_X64_REGISTER_INTERMEDIATE_CR4 => {
            context.sregs_mut().cr4 = in_range(CR4_BITS)?;
        }
        hv::hv_register_name_HV_X64_REGISTER_CR8
        | hv::hv_register_name_HV_X64_REGISTER_INTERMEDIATE_CR8 => {
            context.sregs_mut().cr8 = in_range(0xf)?;
        }
        hv::hv_register_name_HV_X64_REGISTER_EFER => {
            context.sregs_mut().efer = in_range(EFER_BITS)?;
            note_long_mode(context.sregs_mut());
        }
        hv::hv_register_name_HV_X64_REGISTER_APIC_BASE => context.sregs_mut().apic_base = number,
        hv::hv_register_name_HV_X64_REGISTER_XFEM => set_xcr0(context.vcpu(), number)?,
        hv::hv_register_name_HV_X64_REGISTER_IDTR => {
            context.sregs_mut().idt = table_from_hv(&table);
        }
        hv::hv_register_name_HV_X64_REGISTER_GDTR => {
            context.sregs_mut().gdt = table_from_hv(&table);
        }
        _ if is_debug(name) => {
            let upper_half = name >= hv::hv_register_name_HV_X64_REGISTER_DR6;
            if upper_half && number >> 32 != 0 {
                return Err(Failure::BadValue);
            }
            let mut debug = context.vcpu().get_debug_regs()?;
            *debug_slot(&mut debug, name) = number;
            context.vcpu().set_debug_regs(&debug)?;
        }
        _ => {
            let mut sregs = *context.sregs();
            let Some(slot) = segment_slot(&mut sregs, name) else {
                return Ok(false);
            };
            *slot = from_hv(&segment);
            *context.sregs_mut() = sregs;
        }
    }
    Ok(true)
}

fn segment_slot(sregs: &mut kvm_sregs, name: u32) -> Option<&mut kvm_bindings::kvm_segment> {
    Some(match name {
        hv::hv_register_name_HV_X64_REGISTER_ES => &mut sregs.es,
        hv::hv_register_name_HV_X64_REGISTER_CS => &mut sregs.cs,
        hv::hv_register_name_HV_X64_REGISTER_SS => &mut sregs.ss,
        hv::hv_register_name_HV_X64_REGISTER_DS => &mut sregs.ds,
        hv::hv_register_name_HV_X64_REGISTER_FS => &mut sregs.fs,
        hv::hv_register_name_HV_X64_REGISTER_GS => &mut sregs.gs,
        hv::hv_register_name_HV_X64_REGISTER_LDTR => &mut sregs.ldt,
        hv::hv_register_name_HV_X64_REGISTER_TR => &mut sregs.tr,
        _ => return None,
    })
}

fn is_debug(name: u32) -> bool {
    (hv::hv_register_name_HV_X64_REGISTER_DR0..=hv::hv_register_name_HV_X64_REGISTER_DR7)
        .contains(&name)
}

fn debug_slot(debug: &mut kvm_debugregs, name: u32) -> &mut u64 {
    match name {
        hv::hv_register_name_HV_X64_REGISTER_DR6 => &mut debug.dr6,
        hv::hv_register_name_HV_X64_REGISTER_DR7 => &mut debug.dr7,
        name => &mut debug.db[(name & 3) as usize],
    }
}

/// EFER.LMA is no register a client can choose: long mode is active when it is enabled and paging is on.
pub(in crate::vp) fn complete_efer(sregs: &mut kvm_sregs) {
    if sregs.efer & EFER_LME != 0 && sregs.cr0 & CR0_PG != 0 {
        sregs.efer |= EFER_LMA;
    } else {
        sregs.efer &= !EFER_LMA;
    }
}

/// A client that enables long mode and paging one after the other has long mode from then on.
fn note_long_mode(sregs: &mut kvm_sregs) {
    if sregs.efer & EFER_LME != 0 && sregs.cr0 & CR0_PG != 0 {
        sregs.efer |= EFER_LMA;
    }
}

/// XCR0, as the guest has it.
pub(in crate::vp) fn xcr0(vcpu: &VcpuFd) -> Result<u64, Errno> {
    let xcrs = vcpu.get_xcrs()?;
    Ok(xcrs
        .xcrs
        .iter()
        .take(xcrs.nr_xcrs as usize)
        .find(|entry| entry.xcr == 0)
        .map_or(1, |entry| entry.value))
}

fn set_xcr0(vcpu: &VcpuFd, value: u64) -> Result<(), Failure> {
    let mut xcrs = kvm_bindings::kvm_xcrs {
        nr_xcrs: 1,
        ..Default::default()
    };
    xcrs.xcrs[0].value = value;
    vcpu.set_xcrs(&xcrs).map_err(|_| Failure::BadValue)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_mode_is_active_with_paging_only() {
        let mut sregs = kvm_sregs {
            efer: EFER_LME,
            cr0: 1,
            ..Default::default()
        };
        complete_efer(&mut sregs);
        assert_eq!(sregs.efer, EFER_LME);
        sregs.cr0 |= CR0_PG;
        complete_efer(&mut sregs);
        assert_eq!(sregs.efer, EFER_LME | EFER_LMA);
        sregs.efer = EFER_LMA;
        complete_efer(&mut sregs);
        assert_eq!(sregs.efer, 0);
    }
}
