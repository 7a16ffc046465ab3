//! Register names, short, and values for them.

use mshv_bindings::*;
macro_rules! names {
    ($($short:ident = $long:ident;)*) => {$(
        #[doc = concat!("`", stringify!($long), "`")]
        pub const $short: u32 = $long;
    )*};
}
names! {
    RAX = hv_register_name_HV_X64_REGISTER_RAX; RCX = hv_register_name_HV_X64_REGISTER_RCX;
    RDX = hv_register_name_HV_X64_REGISTER_RDX; RBX = hv_register_name_HV_X64_REGISTER_RBX;
    RSP = hv_register_name_HV_X64_REGISTER_RSP; RBP = hv_register_name_HV_X64_REGISTER_RBP;
    RSI = hv_register_name_HV_X64_REGISTER_RSI; RDI = hv_register_name_HV_X64_REGISTER_RDI;
    R8 = hv_register_name_HV_X64_REGISTER_R8; R15 = hv_register_name_HV_X64_REGISTER_R15;
    RIP = hv_register_name_HV_X64_REGISTER_RIP; RFLAGS = hv_register_name_HV_X64_REGISTER_RFLAGS;
    CS = hv_register_name_HV_X64_REGISTER_CS; DS = hv_register_name_HV_X64_REGISTER_DS;
    ES = hv_register_name_HV_X64_REGISTER_ES; FS = hv_register_name_HV_X64_REGISTER_FS;
    GS = hv_register_name_HV_X64_REGISTER_GS; SS = hv_register_name_HV_X64_REGISTER_SS;
    TR = hv_register_name_HV_X64_REGISTER_TR; LDTR = hv_register_name_HV_X64_REGISTER_LDTR;
    GDTR = hv_register_name_HV_X64_REGISTER_GDTR; IDTR = hv_register_name_HV_X64_REGISTER_IDTR;
    CR0 = hv_register_name_HV_X64_REGISTER_CR0; CR2 = hv_register_name_HV_X64_REGISTER_CR2;
    CR3 = hv_register_name_HV_X64_REGISTER_CR3; CR4 = hv_register_name_HV_X64_REGISTER_CR4;
    CR8 = hv_register_name_HV_X64_REGISTER_CR8; EFER = hv_register_name_HV_X64_REGISTER_EFER;
    XMM0 = hv_register_name_HV_X64_REGISTER_XMM0; XMM15 = hv_register_name_HV_X64_REGISTER_XMM15;
    DR0 = hv_register_name_HV_X64_REGISTER_DR0; DR7 = hv_register_name_HV_X64_REGISTER_DR7;
    PAT = hv_register_name_HV_X64_REGISTER_PAT; APIC_BASE = hv_register_name_HV_X64_REGISTER_APIC_BASE;
    STAR = hv_register_name_HV_X64_REGISTER_STAR; LSTAR = hv_register_name_HV_X64_REGISTER_LSTAR;
    KERNEL_GS_BASE = hv_register_name_HV_X64_REGISTER_KERNEL_GS_BASE;
    SYSENTER_CS = hv_register_name_HV_X64_REGISTER_SYSENTER_CS;
    TSC_AUX = hv_register_name_HV_X64_REGISTER_TSC_AUX;
    PENDING_INTERRUPTION = hv_register_name_HV_REGISTER_PENDING_INTERRUPTION;
    INTERRUPT_STATE = hv_register_name_HV_REGISTER_INTERRUPT_STATE;
    ACTIVITY_STATE = hv_register_name_HV_REGISTER_INTERNAL_ACTIVITY_STATE;
    EXPLICIT_SUSPEND = hv_register_name_HV_REGISTER_EXPLICIT_SUSPEND;
    INTERCEPT_SUSPEND = hv_register_name_HV_REGISTER_INTERCEPT_SUSPEND;
    VP_INDEX = hv_register_name_HV_REGISTER_VP_INDEX;
}

/// A 64-bit register value.
#[must_use]
pub fn value64(value: u64) -> hv_register_value {
    let mut register = hv_register_value {
        reg128: hv_u128::default(),
    };
    register.reg64 = value;
    register
}

/// A segment register value; attributes as in a descriptor (type, S, DPL, P in the low byte; AVL, L, D, G from bit 12).
#[must_use]
pub fn segment(selector: u16, base: u64, limit: u32, attributes: u16) -> hv_register_value {
    let mut register = hv_x64_segment_register {
        base,
        limit,
        selector,
        ..Default::default()
    };
    register.__bindgen_anon_1.attributes = attributes;
    hv_register_value { segment: register }
}

/// A descriptor table register value.
#[must_use]
pub fn table(base: u64, limit: u16) -> hv_register_value {
    hv_register_value {
        table: hv_x64_table_register {
            base,
            limit,
            ..Default::default()
        },
    }
}
