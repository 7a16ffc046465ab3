//! General-purpose registers, RIP and RFLAGS.

use kvm_bindings::kvm_regs;
use mshv_bindings as hv;

/// RFLAGS bits that are reserved and zero.
const RFLAGS_ZERO: u64 = !0x003f_7fd7;
const RFLAGS_ONE: u64 = 1 << 1;

/// The register `name` within `regs`, when it is one of these.
pub(super) fn slot(regs: &mut kvm_regs, name: u32) -> Option<&mut u64> {
    Some(match name {
        hv::hv_register_name_HV_X64_REGISTER_RAX => &mut regs.rax,
        hv::hv_register_name_HV_X64_REGISTER_RCX => &mut regs.rcx,
        hv::hv_register_name_HV_X64_REGISTER_RDX => &mut regs.rdx,
        hv::hv_register_name_HV_X64_REGISTER_RBX => &mut regs.rbx,
        hv::hv_register_name_HV_X64_REGISTER_RSP => &mut regs.rsp,
        hv::hv_register_name_HV_X64_REGISTER_RBP => &mut regs.rbp,
        hv::hv_register_name_HV_X64_REGISTER_RSI => &mut regs.rsi,
        hv::hv_register_name_HV_X64_REGISTER_RDI => &mut regs.rdi,
        hv::hv_register_name_HV_X64_REGISTER_R8 => &mut regs.r8,
        hv::hv_register_name_HV_X64_REGISTER_R9 => &mut regs.r9,
        hv::hv_register_name_HV_X64_REGISTER_R10 => &mut regs.r10,
        hv::hv_register_name_HV_X64_REGISTER_R11 => &mut regs.r11,
        hv::hv_register_name_HV_X64_REGISTER_R12 => &mut regs.r12,
        hv::hv_register_name_HV_X64_REGISTER_R13 => &mut regs.r13,
        hv::hv_register_name_HV_X64_REGISTER_R14 => &mut regs.r14,
        hv::hv_register_name_HV_X64_REGISTER_R15 => &mut regs.r15,
        hv::hv_register_name_HV_X64_REGISTER_RIP => &mut regs.rip,
        hv::hv_register_name_HV_X64_REGISTER_RFLAGS => &mut regs.rflags,
        _ => return None,
    })
}

/// What `name` becomes when `value` is written to it; `None` when the processor could not hold the value.
pub(super) fn checked(name: u32, value: u64) -> Option<u64> {
    if name != hv::hv_register_name_HV_X64_REGISTER_RFLAGS {
        return Some(value);
    }
    (value & RFLAGS_ZERO == 0).then_some(value | RFLAGS_ONE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_register_has_its_own_place() {
        let mut regs = kvm_regs::default();
        let names: Vec<u32> = (hv::hv_register_name_HV_X64_REGISTER_RAX
            ..=hv::hv_register_name_HV_X64_REGISTER_RFLAGS)
            .collect();
        for (value, &name) in (1..).zip(&names) {
            *slot(&mut regs, name).unwrap() = value;
        }
        for (value, &name) in (1..).zip(&names) {
            assert_eq!(*slot(&mut regs, name).unwrap(), value);
        }
        assert_eq!((regs.rax, regs.rcx, regs.rip, regs.rflags), (1, 2, 17, 18));
        assert!(slot(&mut regs, hv::hv_register_name_HV_X64_REGISTER_CR0).is_none());
    }

    #[test]
    fn rflags_has_reserved_bits() {
        let name = hv::hv_register_name_HV_X64_REGISTER_RFLAGS;
        assert_eq!(checked(name, 0), Some(2));
        assert_eq!(checked(name, 1 << 40), None);
        assert_eq!(checked(name, 1 << 3), None);
        assert_eq!(checked(name, 0x246), Some(0x246));
    }
}
