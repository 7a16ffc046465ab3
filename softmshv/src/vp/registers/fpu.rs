//! x87, MMX and XMM registers with their control and status.

use kvm_bindings::kvm_fpu;
use mshv_bindings::{
    self as hv, hv_register_value, hv_u128, hv_x64_fp_control_status_register__bindgen_ty_1,
    hv_x64_fp_control_status_register__bindgen_ty_1__bindgen_ty_1,
    hv_x64_xmm_control_status_register__bindgen_ty_1,
    hv_x64_xmm_control_status_register__bindgen_ty_1__bindgen_ty_1,
};

use super::word;

/// MXCSR bits that exist.
const MXCSR_BITS: u32 = 0xffff;

/// Whether register `name` is one of these.
pub(super) fn contains(name: u32) -> bool {
    (hv::hv_register_name_HV_X64_REGISTER_XMM0
        ..=hv::hv_register_name_HV_X64_REGISTER_XMM_CONTROL_STATUS)
        .contains(&name)
}

/// The 16 bytes of a register in KVM's form as the hypervisor's.
pub(in crate::vp) fn from_bytes(bytes: &[u8; 16]) -> hv_u128 {
    let value = u128::from_le_bytes(*bytes);
    hv_u128 {
        low_part: value as u64,
        high_part: (value >> 64) as u64,
    }
}

/// The reverse of [`from_bytes`].
pub(in crate::vp) fn to_bytes(value: hv_u128) -> [u8; 16] {
    (u128::from(value.low_part) | u128::from(value.high_part) << 64).to_le_bytes()
}

/// The value of register `name` within `fpu`.
pub(super) fn get(fpu: &kvm_fpu, name: u32) -> hv_register_value {
    let mut value = word(0);
    match name {
        hv::hv_register_name_HV_X64_REGISTER_FP_CONTROL_STATUS => {
            value.fp_control_status.__bindgen_anon_1 =
                hv_x64_fp_control_status_register__bindgen_ty_1 {
                    fp_control: fpu.fcw,
                    fp_status: fpu.fsw,
                    fp_tag: fpu.ftwx,
                    reserved: 0,
                    last_fp_op: fpu.last_opcode,
                    __bindgen_anon_1:
                        hv_x64_fp_control_status_register__bindgen_ty_1__bindgen_ty_1 {
                            last_fp_rip: fpu.last_ip,
                        },
                };
        }
        hv::hv_register_name_HV_X64_REGISTER_XMM_CONTROL_STATUS => {
            value.xmm_control_status.__bindgen_anon_1 =
                hv_x64_xmm_control_status_register__bindgen_ty_1 {
                    __bindgen_anon_1:
                        hv_x64_xmm_control_status_register__bindgen_ty_1__bindgen_ty_1 {
                            last_fp_rdp: fpu.last_dp,
                        },
                    xmm_status_control: fpu.mxcsr,
                    xmm_status_control_mask: MXCSR_BITS,
                };
        }
        _ => value.reg128 = from_bytes(slot(&mut fpu.clone(), name)),
    }
    value
}

/// Sets register `name` within `fpu`; false when the processor could not hold the value.
pub(super) fn set(fpu: &mut kvm_fpu, name: u32, value: &hv_register_value) -> bool {
    // SAFETY: every variant of the union is plain integers.
    unsafe {
        match name {
            hv::hv_register_name_HV_X64_REGISTER_FP_CONTROL_STATUS => {
                let status = value.fp_control_status.__bindgen_anon_1;
                fpu.fcw = status.fp_control;
                fpu.fsw = status.fp_status;
                fpu.ftwx = status.fp_tag;
                fpu.last_opcode = status.last_fp_op;
                fpu.last_ip = status.__bindgen_anon_1.last_fp_rip;
            }
            hv::hv_register_name_HV_X64_REGISTER_XMM_CONTROL_STATUS => {
                let status = value.xmm_control_status.__bindgen_anon_1;
                if status.xmm_status_control & !MXCSR_BITS != 0 {
                    return false;
                }
                fpu.mxcsr = status.xmm_status_control;
                fpu.last_dp = status.__bindgen_anon_1.last_fp_rdp;
            }
            _ => *slot(fpu, name) = to_bytes(value.reg128),
        }
    }
    true
}

fn slot(fpu: &mut kvm_fpu, name: u32) -> &mut [u8; 16] {
    let first_mmx = hv::hv_register_name_HV_X64_REGISTER_FP_MMX0;
    if name < first_mmx {
        &mut fpu.xmm[(name - hv::hv_register_name_HV_X64_REGISTER_XMM0) as usize & 15]
    } else {
        &mut fpu.fpr[(name - first_mmx) as usize & 7]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_register_survives_both_ways() {
        let mut fpu = kvm_fpu::default();
        let first = hv::hv_register_name_HV_X64_REGISTER_XMM0;
        for name in first..first + 24 {
            let mut value = word(u64::from(name));
            value.reg128.high_part = !u64::from(name);
            assert!(set(&mut fpu, name, &value));
        }
        for name in first..first + 24 {
            // SAFETY: plain integers.
            let got = unsafe { get(&fpu, name).reg128 };
            assert_eq!({ got.low_part }, u64::from(name));
            assert_eq!({ got.high_part }, !u64::from(name));
        }
        assert!(!contains(first + 26));
    }

    #[test]
    fn control_words() {
        let fpu = kvm_fpu {
            fcw: 0x37f,
            fsw: 1,
            ftwx: 0xff,
            last_opcode: 7,
            last_ip: 0x1234,
            last_dp: 0x5678,
            mxcsr: 0x1f80,
            ..Default::default()
        };
        let mut copy = kvm_fpu::default();
        for name in [
            hv::hv_register_name_HV_X64_REGISTER_FP_CONTROL_STATUS,
            hv::hv_register_name_HV_X64_REGISTER_XMM_CONTROL_STATUS,
        ] {
            assert!(set(&mut copy, name, &get(&fpu, name)));
        }
        assert_eq!(copy, fpu);
        let mut bad = get(
            &fpu,
            hv::hv_register_name_HV_X64_REGISTER_XMM_CONTROL_STATUS,
        );
        bad.xmm_control_status.__bindgen_anon_1.xmm_status_control = 1 << 31;
        assert!(!set(
            &mut copy,
            hv::hv_register_name_HV_X64_REGISTER_XMM_CONTROL_STATUS,
            &bad
        ));
    }
}
