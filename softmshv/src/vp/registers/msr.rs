//! Registers that are model-specific registers of the processor or of the hypervisor: which is which.

use mshv_bindings as hv;

/// `IA32_TIME_STAMP_COUNTER`, the one MSR a snapshot must not treat as a constant.
#[cfg(test)]
const TSC: u32 = 0x10;

/// Registers with one MSR each, that of the same meaning.
const SINGLE: &[(u32, u32)] = &[
    (hv::hv_register_name_HV_X64_REGISTER_TSC, 0x10),
    (hv::hv_register_name_HV_X64_REGISTER_TSC_ADJUST, 0x3b),
    (hv::hv_register_name_HV_X64_REGISTER_TSC_AUX, 0xc000_0103),
    (
        hv::hv_register_name_HV_X64_REGISTER_KERNEL_GS_BASE,
        0xc000_0102,
    ),
    (hv::hv_register_name_HV_X64_REGISTER_PAT, 0x277),
    (hv::hv_register_name_HV_X64_REGISTER_SYSENTER_CS, 0x174),
    (hv::hv_register_name_HV_X64_REGISTER_SYSENTER_ESP, 0x175),
    (hv::hv_register_name_HV_X64_REGISTER_SYSENTER_EIP, 0x176),
    (hv::hv_register_name_HV_X64_REGISTER_STAR, 0xc000_0081),
    (hv::hv_register_name_HV_X64_REGISTER_LSTAR, 0xc000_0082),
    (hv::hv_register_name_HV_X64_REGISTER_CSTAR, 0xc000_0083),
    (hv::hv_register_name_HV_X64_REGISTER_SFMASK, 0xc000_0084),
    (hv::hv_register_name_HV_X64_REGISTER_MSR_MTRR_CAP, 0xfe),
    (
        hv::hv_register_name_HV_X64_REGISTER_MSR_MTRR_DEF_TYPE,
        0x2ff,
    ),
    (
        hv::hv_register_name_HV_X64_REGISTER_MSR_MTRR_FIX64K00000,
        0x250,
    ),
    (
        hv::hv_register_name_HV_X64_REGISTER_MSR_MTRR_FIX16K80000,
        0x258,
    ),
    (
        hv::hv_register_name_HV_X64_REGISTER_MSR_MTRR_FIX16KA0000,
        0x259,
    ),
    (hv::hv_register_name_HV_X64_REGISTER_BNDCFGS, 0xd90),
    (hv::hv_register_name_HV_X64_REGISTER_DEBUG_CTL, 0x1d9),
    (hv::hv_register_name_HV_X64_REGISTER_SPEC_CTRL, 0x48),
    (hv::hv_register_name_HV_X64_REGISTER_PRED_CMD, 0x49),
    (
        hv::hv_register_name_HV_X64_REGISTER_VIRT_SPEC_CTRL,
        0xc001_011f,
    ),
    (hv::hv_register_name_HV_X64_REGISTER_U_XSS, 0xda0),
    (hv::hv_register_name_HV_X64_REGISTER_U_CET, 0x6a0),
    (hv::hv_register_name_HV_X64_REGISTER_S_CET, 0x6a2),
    (hv::hv_register_name_HV_X64_REGISTER_PL0_SSP, 0x6a4),
    (hv::hv_register_name_HV_X64_REGISTER_PL1_SSP, 0x6a5),
    (hv::hv_register_name_HV_X64_REGISTER_PL2_SSP, 0x6a6),
    (hv::hv_register_name_HV_X64_REGISTER_PL3_SSP, 0x6a7),
    (
        hv::hv_register_name_HV_X64_REGISTER_INTERRUPT_SSP_TABLE_ADDR,
        0x6a8,
    ),
    (
        hv::hv_register_name_HV_X64_REGISTER_MSR_IA32_MISC_ENABLE,
        0x1a0,
    ),
    (
        hv::hv_register_name_HV_X64_REGISTER_IA32_FEATURE_CONTROL,
        0x3a,
    ),
    (hv::hv_register_name_HV_X64_REGISTER_PERF_GLOBAL_CTRL, 0x38f),
    (
        hv::hv_register_name_HV_X64_REGISTER_PERF_GLOBAL_STATUS,
        0x38e,
    ),
    (hv::hv_register_name_HV_X64_REGISTER_FIXED_CTR_CTRL, 0x38d),
    (hv::hv_register_name_HV_X64_REGISTER_DS_AREA, 0x600),
    (hv::hv_register_name_HV_X64_REGISTER_PEBS_ENABLE, 0x3f1),
    (hv::hv_register_name_HV_REGISTER_GUEST_OS_ID, 0x4000_0000),
    (hv::hv_register_name_HV_X64_REGISTER_HYPERCALL, 0x4000_0001),
    (hv::hv_register_name_HV_REGISTER_VP_RUNTIME, 0x4000_0010),
    (hv::hv_register_name_HV_REGISTER_TIME_REF_COUNT, 0x4000_0020),
    (hv::hv_register_name_HV_REGISTER_REFERENCE_TSC, 0x4000_0021),
    (
        hv::hv_register_name_HV_REGISTER_PROCESSOR_CLOCK_FREQUENCY,
        0x4000_0022,
    ),
    (
        hv::hv_register_name_HV_REGISTER_INTERRUPT_CLOCK_FREQUENCY,
        0x4000_0023,
    ),
    (
        hv::hv_register_name_HV_X64_REGISTER_SYNTHETIC_TPR,
        0x4000_0072,
    ),
    (hv::hv_register_name_HV_REGISTER_VP_ASSIST_PAGE, 0x4000_0073),
    (hv::hv_register_name_HV_REGISTER_SCONTROL, 0x4000_0080),
    (hv::hv_register_name_HV_REGISTER_SVERSION, 0x4000_0081),
    (hv::hv_register_name_HV_REGISTER_SIEFP, 0x4000_0082),
    (hv::hv_register_name_HV_REGISTER_SIMP, 0x4000_0083),
    (hv::hv_register_name_HV_REGISTER_EOM, 0x4000_0084),
    (
        hv::hv_register_name_HV_REGISTER_GUEST_CRASH_CTL,
        0x4000_0105,
    ),
];

/// Registers that come in rows, as their MSRs do: first name, how many, first MSR, MSRs from one to the next.
const ROWS: &[(u32, u32, u32, u32)] = &[
    (
        hv::hv_register_name_HV_X64_REGISTER_MSR_MTRR_PHYS_BASE0,
        16,
        0x200,
        2,
    ),
    (
        hv::hv_register_name_HV_X64_REGISTER_MSR_MTRR_PHYS_MASK0,
        16,
        0x201,
        2,
    ),
    (
        hv::hv_register_name_HV_X64_REGISTER_MSR_MTRR_FIX4KC0000,
        8,
        0x268,
        1,
    ),
    (
        hv::hv_register_name_HV_X64_REGISTER_SGX_LAUNCH_CONTROL0,
        4,
        0x8c,
        1,
    ),
    (
        hv::hv_register_name_HV_X64_REGISTER_PERF_EVT_SEL0,
        8,
        0x186,
        1,
    ),
    (hv::hv_register_name_HV_X64_REGISTER_PMC0, 8, 0xc1, 1),
    (hv::hv_register_name_HV_X64_REGISTER_FIXED_CTR0, 4, 0x309, 1),
    (hv::hv_register_name_HV_REGISTER_SINT0, 16, 0x4000_0090, 1),
    (
        hv::hv_register_name_HV_REGISTER_STIMER0_CONFIG,
        8,
        0x4000_00b0,
        1,
    ),
    (
        hv::hv_register_name_HV_REGISTER_GUEST_CRASH_P0,
        5,
        0x4000_0100,
        1,
    ),
];

/// The MSR that register `name` is.
pub(super) fn index(name: u32) -> Option<u32> {
    if let Some((_, index)) = SINGLE.iter().find(|(register, _)| *register == name) {
        return Some(*index);
    }
    ROWS.iter().find_map(|&(first, count, index, step)| {
        let nth = name.checked_sub(first)?;
        (nth < count).then(|| index + nth * step)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Registers the client library treats as MSRs and KVM as control registers.
    const CONTROL: [u32; 2] = [
        hv::hv_register_name_HV_X64_REGISTER_EFER,
        hv::hv_register_name_HV_X64_REGISTER_APIC_BASE,
    ];
    /// Registers whose number in the client library's table is none of the processor's.
    const MISNUMBERED: [u32; 2] = [
        hv::hv_register_name_HV_X64_REGISTER_U_XSS,
        hv::hv_register_name_HV_X64_REGISTER_SSP,
    ];

    #[test]
    fn agrees_with_the_client_library() {
        let mut compared = 0;
        for msr in (0..0x2000)
            .chain(0x4000_0000..0x4000_0200)
            .chain(0xc000_0000..0xc000_0200)
        {
            let Ok(name) = hv::msr_to_hv_reg_name(msr) else {
                continue;
            };
            if CONTROL.contains(&name) || MISNUMBERED.contains(&name) {
                continue;
            }
            assert_eq!(index(name), Some(msr), "register {name:#x}");
            compared += 1;
        }
        assert!(compared > 60, "{compared}");
        assert_eq!(index(hv::hv_register_name_HV_X64_REGISTER_TSC), Some(TSC));
        assert_eq!(index(hv::hv_register_name_HV_X64_REGISTER_RAX), None);
    }
}
