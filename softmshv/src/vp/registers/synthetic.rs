//! Registers of the hypervisor that no KVM register stands for.

use mshv_bindings::{self as hv, hv_register_value};

use super::{wide, word};
use crate::vp::cpuid::{FEATURES, VERSION};
use crate::vp::engine::Engine;

const SUSPENDED: u64 = 1;
/// Notify when an interrupt could be delivered; with the priority it must have.
pub(in crate::vp) const NOTIFY_INTERRUPT: u64 = 1 << 1;
const NOTIFY_PRIORITY: u64 = 0xf << 2;

/// Information registers and the CPUID leaves they repeat.
fn leaf(name: u32) -> Option<u32> {
    match name {
        hv::hv_register_name_HV_REGISTER_HYPERVISOR_VERSION => Some(VERSION),
        hv::hv_register_name_HV_REGISTER_PRIVILEGES_AND_FEATURES_INFO
            ..=hv::hv_register_name_HV_REGISTER_IPT_FEATURES_INFO => {
            Some(FEATURES + name - hv::hv_register_name_HV_REGISTER_PRIVILEGES_AND_FEATURES_INFO)
        }
        _ => None,
    }
}

/// The value of register `name`, when it is one of these.
pub(super) fn get(engine: &Engine, name: u32) -> Option<hv_register_value> {
    if let Some(leaf) = leaf(name) {
        let [eax, ebx, ecx, edx] = engine.cpuid.values(leaf, 0, engine.context.sregs().cr4, 1);
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        return Some(wide([pair(eax, ebx), pair(ecx, edx)]));
    }
    Some(word(match name {
        hv::hv_register_name_HV_REGISTER_EXPLICIT_SUSPEND => u64::from(engine.explicit_suspend),
        hv::hv_register_name_HV_REGISTER_INTERCEPT_SUSPEND => u64::from(engine.intercept_suspend),
        hv::hv_register_name_HV_REGISTER_DISPATCH_SUSPEND
        | hv::hv_register_name_HV_REGISTER_INSTRUCTION_EMULATION_HINTS => 0,
        hv::hv_register_name_HV_REGISTER_VP_INDEX
        | hv::hv_register_name_HV_X64_REGISTER_INITIAL_APIC_ID
        | hv::hv_register_name_HV_X64_REGISTER_APIC_ID => u64::from(engine.context.vp_index()),
        hv::hv_register_name_HV_REGISTER_DELIVERABILITY_NOTIFICATIONS => engine.notifications,
        _ => return None,
    }))
}

/// Sets register `name`; false when it is none of these, or is not the client's to set.
pub(super) fn set(engine: &mut Engine, name: u32, value: u64) -> bool {
    match name {
        hv::hv_register_name_HV_REGISTER_EXPLICIT_SUSPEND => {
            engine.explicit_suspend = value & SUSPENDED != 0;
        }
        hv::hv_register_name_HV_REGISTER_INTERCEPT_SUSPEND => {
            engine.intercept_suspend = value & SUSPENDED != 0;
        }
        hv::hv_register_name_HV_REGISTER_DELIVERABILITY_NOTIFICATIONS
            if value & !(NOTIFY_INTERRUPT | NOTIFY_PRIORITY) == 0 =>
        {
            engine.notifications = value;
        }
        hv::hv_register_name_HV_REGISTER_VP_INDEX => {
            return value == u64::from(engine.context.vp_index());
        }
        _ => return false,
    }
    true
}
