//! Pending interruptions and events, the interrupt shadow, and why a VP is not executing.

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_SHADOW, kvm_sregs, kvm_vcpu_events,
};

/// Interruption types of the pending interruption register.
const EXTERNAL: u64 = 0;
const NMI: u64 = 2;
const EXCEPTION: u64 = 3;
const SOFTWARE_INTERRUPT: u64 = 4;
const PRIVILEGED_SOFTWARE_EXCEPTION: u64 = 5;
const SOFTWARE_EXCEPTION: u64 = 6;

/// Event types of the pending event registers.
const EVENT_EXCEPTION: u64 = 0;
const EVENT_EXTERNAL_INTERRUPT: u64 = 5;

const SHADOW: u64 = 1 << 0;
const NMI_MASKED: u64 = 1 << 1;

const STARTUP_SUSPEND: u64 = 1 << 0;
const HALT_SUSPEND: u64 = 1 << 1;
const IDLE_SUSPEND: u64 = 1 << 2;

const PAGE_FAULT: u8 = 14;
/// KVM's shadow flags: after STI and after MOV SS; the hypervisor has one bit for both.
const KVM_SHADOW: u8 = 3;

/// `HV_REGISTER_PENDING_INTERRUPTION`: what is being delivered to the guest.
pub(in crate::vp) fn pending_interruption(events: &kvm_vcpu_events) -> u64 {
    let pending = |kind: u64, vector: u8| 1 | kind << 1 | u64::from(vector) << 16;
    if events.exception.injected != 0 {
        let error = if events.exception.has_error_code != 0 {
            1 << 4 | u64::from(events.exception.error_code) << 32
        } else {
            0
        };
        pending(EXCEPTION, events.exception.nr) | error
    } else if events.nmi.injected != 0 {
        pending(NMI, 2)
    } else if events.interrupt.injected != 0 {
        let kind = if events.interrupt.soft != 0 {
            SOFTWARE_INTERRUPT
        } else {
            EXTERNAL
        };
        pending(kind, events.interrupt.nr)
    } else {
        0
    }
}

/// Makes `value` what is being delivered; false when no such interruption exists.
pub(super) fn set_pending_interruption(events: &mut kvm_vcpu_events, value: u64) -> bool {
    let (kind, vector, with_error) = (value >> 1 & 7, (value >> 16) as u16, value >> 4 & 1 != 0);
    let Ok(vector) = u8::try_from(vector) else {
        return false;
    };
    let mut new = *events;
    new.exception.injected = 0;
    new.interrupt.injected = 0;
    new.nmi.injected = 0;
    if value & 1 != 0 {
        match kind {
            EXTERNAL | SOFTWARE_INTERRUPT => {
                new.interrupt.injected = 1;
                new.interrupt.nr = vector;
                new.interrupt.soft = u8::from(kind == SOFTWARE_INTERRUPT);
            }
            NMI => new.nmi.injected = 1,
            EXCEPTION | PRIVILEGED_SOFTWARE_EXCEPTION | SOFTWARE_EXCEPTION if vector < 32 => {
                new.exception.injected = 1;
                new.exception.nr = vector;
                new.exception.has_error_code = u8::from(with_error);
                new.exception.error_code = if with_error { (value >> 32) as u32 } else { 0 };
            }
            _ => return false,
        }
    }
    *events = new;
    true
}

/// `HV_REGISTER_PENDING_EVENT0`: an exception waiting for its turn.
pub(super) fn pending_event(events: &kvm_vcpu_events) -> [u64; 2] {
    if events.exception.pending == 0 {
        return [0, 0];
    }
    let error = if events.exception.has_error_code != 0 {
        1 << 8 | u64::from(events.exception.error_code) << 32
    } else {
        0
    };
    let low = 1 | EVENT_EXCEPTION << 1 | u64::from(events.exception.nr) << 16 | error;
    [low, events.exception_payload]
}

/// Queues an event for delivery before the next instruction: an exception with its error code and parameter (CR2 of
/// a page fault), or an external interrupt. False when it is of another kind.
///
/// An exception goes in as one being delivered: without exception payloads KVM knows no other.
pub(super) fn set_pending_event(
    events: &mut kvm_vcpu_events,
    sregs: &mut kvm_sregs,
    value: [u64; 2],
) -> bool {
    let [low, parameter] = value;
    if low & 1 == 0 {
        events.exception.pending = 0;
        events.exception.injected = 0;
        return true;
    }
    match low >> 1 & 7 {
        EVENT_EXCEPTION => {
            let Some(vector) = u8::try_from(low >> 16 & 0xffff)
                .ok()
                .filter(|vector| *vector < 32)
            else {
                return false;
            };
            let with_error = low >> 8 & 1 != 0;
            events.exception.injected = 1;
            events.exception.pending = 0;
            events.exception.nr = vector;
            events.exception.has_error_code = u8::from(with_error);
            events.exception.error_code = if with_error { (low >> 32) as u32 } else { 0 };
            if vector == PAGE_FAULT {
                sregs.cr2 = parameter;
            }
            true
        }
        EVENT_EXTERNAL_INTERRUPT => {
            events.interrupt.injected = 1;
            events.interrupt.soft = 0;
            events.interrupt.nr = (low >> 8) as u8;
            true
        }
        _ => false,
    }
}

/// `HV_REGISTER_INTERRUPT_STATE`.
pub(in crate::vp) fn interrupt_state(events: &kvm_vcpu_events) -> u64 {
    let shadow = if events.interrupt.shadow != 0 {
        SHADOW
    } else {
        0
    };
    let masked = if events.nmi.masked != 0 {
        NMI_MASKED
    } else {
        0
    };
    shadow | masked
}

/// Sets what [`interrupt_state`] reads.
pub(super) fn set_interrupt_state(events: &mut kvm_vcpu_events, value: u64) -> bool {
    if value & !(SHADOW | NMI_MASKED) != 0 {
        return false;
    }
    events.flags |= KVM_VCPUEVENT_VALID_SHADOW;
    events.interrupt.shadow = match value & SHADOW {
        0 => 0,
        _ if events.interrupt.shadow != 0 => events.interrupt.shadow & KVM_SHADOW,
        _ => 1,
    };
    events.nmi.masked = u8::from(value & NMI_MASKED != 0);
    true
}

/// `HV_REGISTER_INTERNAL_ACTIVITY_STATE` for a state of KVM's.
pub(super) fn activity(mp_state: u32) -> u64 {
    match mp_state {
        KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => STARTUP_SUSPEND,
        KVM_MP_STATE_HALTED => HALT_SUSPEND,
        _ => 0,
    }
}

/// The reverse of [`activity`]; `None` when there is no such state.
pub(super) fn mp_state(activity: u64) -> Option<u32> {
    match activity {
        0 => Some(KVM_MP_STATE_RUNNABLE),
        STARTUP_SUSPEND => Some(KVM_MP_STATE_UNINITIALIZED),
        HALT_SUSPEND | IDLE_SUSPEND => Some(KVM_MP_STATE_HALTED),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interruptions_survive_both_ways() {
        for value in [
            0,
            1 | 0x30 << 16,
            1 | NMI << 1 | 2 << 16,
            1 | EXCEPTION << 1 | 6 << 16,
            1 | EXCEPTION << 1 | 1 << 4 | 14 << 16 | 0x7 << 32,
            1 | SOFTWARE_INTERRUPT << 1 | 0x80 << 16,
        ] {
            let mut events = kvm_vcpu_events::default();
            events.interrupt.injected = 1;
            assert!(set_pending_interruption(&mut events, value));
            assert_eq!(pending_interruption(&events), value, "{value:#x}");
        }
    }

    #[test]
    fn interruptions_that_do_not_exist_are_refused() {
        let mut events = kvm_vcpu_events::default();
        assert!(!set_pending_interruption(&mut events, 1 | 1 << 1));
        assert!(!set_pending_interruption(
            &mut events,
            1 | EXCEPTION << 1 | 40 << 16
        ));
        assert!(!set_pending_interruption(&mut events, 1 | 0x100 << 16));
        assert_eq!(pending_interruption(&events), 0);
    }

    #[test]
    fn a_page_fault_event_sets_cr2() {
        let (mut events, mut sregs) = (kvm_vcpu_events::default(), kvm_sregs::default());
        let event = [1 | 1 << 8 | 14 << 16 | 2 << 32, 0xdead_b000];
        assert!(set_pending_event(&mut events, &mut sregs, event));
        assert_eq!(sregs.cr2, 0xdead_b000);
        assert_eq!((events.exception.nr, events.exception.error_code), (14, 2));
        assert!(!set_pending_event(&mut events, &mut sregs, [1 | 3 << 1, 0]));
    }

    #[test]
    fn the_interrupt_shadow_keeps_its_kind() {
        let mut events = kvm_vcpu_events::default();
        events.interrupt.shadow = 2;
        assert!(set_interrupt_state(&mut events, SHADOW | NMI_MASKED));
        assert_eq!((events.interrupt.shadow, events.nmi.masked), (2, 1));
        assert_eq!(interrupt_state(&events), SHADOW | NMI_MASKED);
        assert!(set_interrupt_state(&mut events, 0));
        assert_eq!(interrupt_state(&events), 0);
        assert!(!set_interrupt_state(&mut events, 4));
    }

    #[test]
    fn activity_states() {
        for state in [
            KVM_MP_STATE_RUNNABLE,
            KVM_MP_STATE_UNINITIALIZED,
            KVM_MP_STATE_HALTED,
        ] {
            assert_eq!(mp_state(activity(state)), Some(state));
        }
        assert_eq!(mp_state(8), None);
    }
}
