//! Intercept messages: 256 bytes, a type, and the state of the VP when it stopped.

use mshv_bindings::{
    self as hv, HV_INTERCEPT_ACCESS_EXECUTE, HV_INTERCEPT_ACCESS_READ, HV_INTERCEPT_ACCESS_WRITE,
    hv_message, hv_x64_apic_eoi_message, hv_x64_cpuid_intercept_message,
    hv_x64_intercept_message_header, hv_x64_interruption_deliverable_message,
    hv_x64_invalid_vp_register_message, hv_x64_io_port_intercept_message,
    hv_x64_memory_intercept_message, hv_x64_msr_intercept_message,
    hv_x64_unrecoverable_exception_message, hv_x64_unsupported_feature_message,
};

use super::context::Stopped;
use super::fault::{Fault, Kind};
use super::registers::event;
use super::registers::segment::to_hv;
use super::walk::bits::{CR0_AM, CR0_PE, EFER_LMA};
use super::walk::cpl;

const PAYLOAD: usize = 240;
const DR7_ENABLED: u64 = 0xff;

/// A port access as the client is to see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Port {
    /// The port.
    pub(super) number: u16,
    /// 1, 2 or 4 bytes.
    pub(super) size: u8,
    /// The guest writes.
    pub(super) write: bool,
    /// INS or OUTS.
    pub(super) string: bool,
    /// With a REP prefix.
    pub(super) rep: bool,
    /// Bytes of the instruction, 0 when not known.
    pub(super) length: usize,
}

fn access_type(kind: Kind) -> u8 {
    match kind {
        Kind::Read => HV_INTERCEPT_ACCESS_READ as u8,
        Kind::Write => HV_INTERCEPT_ACCESS_WRITE as u8,
        Kind::Execute => HV_INTERCEPT_ACCESS_EXECUTE as u8,
    }
}

/// The header most messages begin with.
fn header(stopped: &Stopped<'_>, kind: Kind, length: usize) -> hv_x64_intercept_message_header {
    let (regs, sregs) = (stopped.regs, stopped.sregs);
    let mut header = hv_x64_intercept_message_header {
        vp_index: stopped.vp_index,
        intercept_access_type: access_type(kind),
        cs_segment: to_hv(&sregs.cs),
        rip: regs.rip,
        rflags: regs.rflags,
        ..Default::default()
    };
    header.set_instruction_length(length as u8);
    // SAFETY: a union of sixteen bits and their parts.
    let state = unsafe { &mut header.execution_state.__bindgen_anon_1 };
    state.set_cpl(cpl(sregs, regs.rflags).into());
    state.set_cr0_pe((sregs.cr0 & CR0_PE != 0).into());
    state.set_cr0_am((sregs.cr0 & CR0_AM != 0).into());
    state.set_efer_lma((sregs.efer & EFER_LMA != 0).into());
    state.set_debug_active((stopped.dr7 & DR7_ENABLED != 0).into());
    state.set_interruption_pending((event::pending_interruption(stopped.events) != 0).into());
    state.set_interrupt_shadow((stopped.events.interrupt.shadow != 0).into());
    header
}

/// Puts a payload behind a type.
fn message<T: Copy>(kind: u32, payload: &T) -> hv_message {
    const { assert!(size_of::<T>() <= PAYLOAD) };
    let mut message = hv_message::default();
    message.header.message_type = kind;
    message.header.payload_size = size_of::<T>() as u8;
    // SAFETY: a packed structure of integers copied into a larger array of integers.
    unsafe {
        std::ptr::copy_nonoverlapping(
            std::ptr::from_ref(payload).cast::<u8>(),
            (&raw mut message.u.payload).cast::<u8>(),
            size_of::<T>(),
        );
    }
    message
}

/// The bytes `RUN_VP` returns.
pub(super) fn bytes(message: &hv_message) -> [u8; 256] {
    // SAFETY: a packed structure of integers, of this size.
    unsafe { std::mem::transmute(*message) }
}

/// Up to 16 instruction bytes, as a message carries them.
fn instruction(code: &[u8]) -> (u8, [u8; 16]) {
    let mut bytes = [0; 16];
    let count = code.len().min(bytes.len());
    bytes[..count].copy_from_slice(&code[..count]);
    (count as u8, bytes)
}

/// `UNMAPPED_GPA` or `GPA_INTERCEPT`. The instruction's length stays 0: the processor does not tell it on such an
/// exit, and a client that emulates finds it out by itself.
pub(super) fn memory(stopped: &Stopped<'_>, fault: &Fault, code: &[u8]) -> hv_message {
    let (instruction_byte_count, instruction_bytes) = instruction(code);
    let mut payload = hv_x64_memory_intercept_message {
        header: header(stopped, fault.kind, 0),
        instruction_byte_count,
        instruction_bytes,
        tpr_priority: stopped.sregs.cr8 as u8,
        guest_virtual_address: fault.gva.unwrap_or(0),
        guest_physical_address: fault.gpa,
        ..Default::default()
    };
    // SAFETY: a union of eight bits and their parts.
    unsafe {
        let info = &mut payload.memory_access_info.__bindgen_anon_1;
        info.set_gva_valid(fault.gva.is_some().into());
        info.set_gva_gpa_valid((fault.gva.is_some() && fault.translated).into());
    }
    let kind = if fault.protected {
        hv::hv_message_type_HVMSG_GPA_INTERCEPT
    } else {
        hv::hv_message_type_HVMSG_UNMAPPED_GPA
    };
    message(kind, &payload)
}

/// `X64_IO_PORT_INTERCEPT`.
pub(super) fn port(stopped: &Stopped<'_>, port: &Port, code: &[u8]) -> hv_message {
    let (regs, sregs) = (stopped.regs, stopped.sregs);
    let (instruction_byte_count, instruction_bytes) = instruction(code);
    let kind = if port.write { Kind::Write } else { Kind::Read };
    let mut payload = hv_x64_io_port_intercept_message {
        header: header(stopped, kind, port.length),
        port_number: port.number,
        instruction_byte_count,
        instruction_bytes,
        rax: regs.rax,
        ds_segment: to_hv(&sregs.ds),
        es_segment: to_hv(&sregs.es),
        rcx: regs.rcx,
        rsi: regs.rsi,
        rdi: regs.rdi,
        ..Default::default()
    };
    // SAFETY: a union of eight bits and their parts.
    unsafe {
        let info = &mut payload.access_info.__bindgen_anon_1;
        info.set_access_size(port.size);
        info.set_string_op(port.string.into());
        info.set_rep_prefix(port.rep.into());
    }
    message(hv::hv_message_type_HVMSG_X64_IO_PORT_INTERCEPT, &payload)
}

/// `X64_MSR_INTERCEPT`; RDMSR and WRMSR are two bytes long.
pub(super) fn msr(stopped: &Stopped<'_>, index: u32, write: bool) -> hv_message {
    let kind = if write { Kind::Write } else { Kind::Read };
    let payload = hv_x64_msr_intercept_message {
        header: header(stopped, kind, 2),
        msr_number: index,
        rdx: stopped.regs.rdx,
        rax: stopped.regs.rax,
        ..Default::default()
    };
    message(hv::hv_message_type_HVMSG_X64_MSR_INTERCEPT, &payload)
}

/// `X64_CPUID_INTERCEPT`, with what the instruction would have answered.
pub(super) fn cpuid(
    stopped: &Stopped<'_>,
    length: usize,
    [eax, ebx, ecx, edx]: [u32; 4],
) -> hv_message {
    let regs = stopped.regs;
    let payload = hv_x64_cpuid_intercept_message {
        header: header(stopped, Kind::Execute, length),
        rax: regs.rax,
        rcx: regs.rcx,
        rdx: regs.rdx,
        rbx: regs.rbx,
        default_result_rax: eax.into(),
        default_result_rcx: ecx.into(),
        default_result_rdx: edx.into(),
        default_result_rbx: ebx.into(),
    };
    message(hv::hv_message_type_HVMSG_X64_CPUID_INTERCEPT, &payload)
}

/// `X64_APIC_EOI`: a level-triggered interrupt has ended.
pub(super) fn apic_eoi(vp_index: u32, vector: u8) -> hv_message {
    let payload = hv_x64_apic_eoi_message {
        vp_index,
        interrupt_vector: vector.into(),
    };
    message(hv::hv_message_type_HVMSG_X64_APIC_EOI, &payload)
}

/// `UNRECOVERABLE_EXCEPTION`: a triple fault.
pub(super) fn unrecoverable(stopped: &Stopped<'_>) -> hv_message {
    let payload = hv_x64_unrecoverable_exception_message {
        header: header(stopped, Kind::Execute, 0),
    };
    message(hv::hv_message_type_HVMSG_UNRECOVERABLE_EXCEPTION, &payload)
}

/// `X64_HALT`.
pub(super) fn halt(stopped: &Stopped<'_>) -> hv_message {
    let payload = header(stopped, Kind::Execute, 1);
    message(hv::hv_message_type_HVMSG_X64_HALT, &payload)
}

/// `INVALID_VP_REGISTER_VALUE`: the registers are not a state a processor can be in.
pub(super) fn invalid_register(vp_index: u32) -> hv_message {
    let payload = hv_x64_invalid_vp_register_message {
        vp_index,
        ..Default::default()
    };
    message(
        hv::hv_message_type_HVMSG_INVALID_VP_REGISTER_VALUE,
        &payload,
    )
}

/// `UNSUPPORTED_FEATURE`: the guest did what the engine below cannot do; the parameter says what the engine said.
pub(super) fn unsupported(vp_index: u32, parameter: u64) -> hv_message {
    /// `HV_UNSUPPORTED_FEATURE_INTERCEPT`.
    const INTERCEPT: u32 = 1;
    let payload = hv_x64_unsupported_feature_message {
        vp_index,
        feature_code: INTERCEPT,
        feature_parameter: parameter,
    };
    message(hv::hv_message_type_HVMSG_UNSUPPORTED_FEATURE, &payload)
}

/// `X64_INTERRUPTION_DELIVERABLE`: the VP would take an external interrupt now.
pub(super) fn interrupt_deliverable(stopped: &Stopped<'_>) -> hv_message {
    let payload = hv_x64_interruption_deliverable_message {
        header: header(stopped, Kind::Execute, 0),
        ..Default::default()
    };
    message(
        hv::hv_message_type_HVMSG_X64_INTERRUPTION_DELIVERABLE,
        &payload,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::{kvm_regs, kvm_sregs, kvm_vcpu_events};

    #[test]
    fn a_memory_message_reads_back_as_the_client_reads_it() {
        let regs = kvm_regs {
            rip: 0x7c00,
            rflags: 0x246,
            ..Default::default()
        };
        let mut sregs = kvm_sregs {
            cr0: CR0_PE,
            cr8: 5,
            ..Default::default()
        };
        sregs.ss.dpl = 3;
        let events = kvm_vcpu_events::default();
        let stopped = Stopped {
            vp_index: 3,
            regs: &regs,
            sregs: &sregs,
            events: &events,
            dr7: 0x400,
            xfem: 1,
        };
        let fault = Fault {
            kind: Kind::Write,
            gva: Some(0xffff_8000_0000_1234),
            gpa: 0xfe00_0234,
            translated: true,
            protected: false,
        };
        let message = memory(&stopped, &fault, &[0x89, 0x03]);
        let info = message.to_memory_info().unwrap();
        assert_eq!({ info.guest_physical_address }, 0xfe00_0234);
        assert_eq!({ info.guest_virtual_address }, 0xffff_8000_0000_1234);
        assert_eq!(info.instruction_byte_count, 2);
        assert_eq!(info.instruction_bytes[..3], [0x89, 0x03, 0]);
        assert_eq!((info.header.vp_index, info.tpr_priority), (3, 5));
        assert_eq!({ info.header.rip }, 0x7c00);
        // SAFETY: unions of integers.
        unsafe {
            assert_eq!(info.memory_access_info.as_uint8, 0b11);
            let state = info.header.execution_state.__bindgen_anon_1;
            assert_eq!(
                (state.cpl(), state.cr0_pe(), state.debug_active()),
                (3, 1, 0)
            );
        }
        let header = message.header;
        assert_eq!(usize::from(header.payload_size), size_of_val(&info));
        let bytes = bytes(&message);
        assert_eq!(
            bytes[..4],
            hv::hv_message_type_HVMSG_UNMAPPED_GPA.to_le_bytes()
        );
    }

    #[test]
    fn protected_memory_is_another_type() {
        let (regs, sregs, events) = Default::default();
        let stopped = Stopped {
            vp_index: 0,
            regs: &regs,
            sregs: &sregs,
            events: &events,
            dr7: 0,
            xfem: 1,
        };
        let fault = Fault {
            kind: Kind::Write,
            gva: None,
            gpa: 0xf_0000,
            translated: false,
            protected: true,
        };
        let message = memory(&stopped, &fault, &[]);
        let kind = message.header.message_type;
        assert_eq!(kind, hv::hv_message_type_HVMSG_GPA_INTERCEPT);
        let _: (kvm_regs, kvm_sregs, kvm_vcpu_events) = (regs, sregs, events);
    }
}
