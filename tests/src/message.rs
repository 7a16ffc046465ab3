//! What `MSHV_RUN_VP` returns with, in plain types.

use mshv_bindings::*;

/// The part that most intercept messages begin with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Who.
    pub vp: u32,
    /// Length of the instruction in bytes, where the hypervisor knows it; 0 otherwise.
    pub length: u8,
    /// `HV_INTERCEPT_ACCESS_*`: 0 read, 1 write, 2 execute.
    pub access: u8,
    /// Base of CS.
    pub cs_base: u64,
    /// Where the intercepted instruction begins.
    pub rip: u64,
    /// Flags before it.
    pub rflags: u64,
    /// `cr0.pe`.
    pub protected: bool,
    /// `efer.lma`.
    pub long: bool,
}

/// A port access.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortIo {
    /// Common part.
    pub header: Header,
    /// Port number.
    pub port: u16,
    /// 1, 2 or 4 bytes.
    pub size: u8,
    /// `ins`/`outs`.
    pub string: bool,
    /// With a `rep` prefix.
    pub rep: bool,
    /// RAX before.
    pub rax: u64,
    /// RCX before.
    pub rcx: u64,
    /// RSI before.
    pub rsi: u64,
    /// RDI before.
    pub rdi: u64,
    /// Base of DS.
    pub ds_base: u64,
    /// Base of ES.
    pub es_base: u64,
}

/// An access to guest-physical memory that the partition has not, or not for this kind of access.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryAccess {
    /// Common part.
    pub header: Header,
    /// `HVMSG_UNMAPPED_GPA` rather than `HVMSG_GPA_INTERCEPT`.
    pub unmapped: bool,
    /// The guest-virtual address, if the message has one.
    pub gva: Option<u64>,
    /// The GPA is that of the GVA.
    pub gva_gpa_valid: bool,
    /// The guest-physical address.
    pub gpa: u64,
    /// Instruction bytes, as many as the hypervisor fetched.
    pub bytes: Vec<u8>,
}

/// What `MSHV_RUN_VP` returned with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// `HVMSG_X64_IO_PORT_INTERCEPT`.
    Port(PortIo),
    /// `HVMSG_UNMAPPED_GPA` or `HVMSG_GPA_INTERCEPT`.
    Memory(MemoryAccess),
    /// `HVMSG_X64_MSR_INTERCEPT`: MSR, RAX, RDX.
    Msr(Header, u32, u64, u64),
    /// `HVMSG_X64_CPUID_INTERCEPT`: RAX and RCX before, default results for RAX, RBX, RCX, RDX.
    Cpuid(Header, u64, u64, [u64; 4]),
    /// `HVMSG_X64_HALT`.
    Halt,
    /// `HVMSG_UNRECOVERABLE_EXCEPTION`.
    Unrecoverable(Header),
    /// `HVMSG_X64_APIC_EOI`: VP and vector.
    ApicEoi(u32, u32),
    /// Any other message type.
    Other(u32),
}

impl From<&hv_x64_intercept_message_header> for Header {
    fn from(h: &hv_x64_intercept_message_header) -> Header {
        // SAFETY: every bit pattern of the union is valid as its bit field.
        let state = unsafe { h.execution_state.__bindgen_anon_1 };
        Header {
            vp: h.vp_index,
            length: h.instruction_length(),
            access: h.intercept_access_type,
            cs_base: h.cs_segment.base,
            rip: h.rip,
            rflags: h.rflags,
            protected: state.cr0_pe() == 1,
            long: state.efer_lma() == 1,
        }
    }
}

impl From<&hv_message> for Exit {
    fn from(message: &hv_message) -> Exit {
        if let Ok(m) = message.to_ioport_info() {
            // SAFETY: every bit pattern of the union is valid as its bit field.
            let access = unsafe { m.access_info.__bindgen_anon_1 };
            return Exit::Port(PortIo {
                header: Header::from(&{ m.header }),
                port: m.port_number,
                size: access.access_size(),
                string: access.string_op() == 1,
                rep: access.rep_prefix() == 1,
                rax: m.rax,
                rcx: m.rcx,
                rsi: m.rsi,
                rdi: m.rdi,
                ds_base: { m.ds_segment }.base,
                es_base: { m.es_segment }.base,
            });
        }
        if let Ok(m) = message.to_memory_info() {
            // SAFETY: every bit pattern of the union is valid as its bit field.
            let access = unsafe { m.memory_access_info.__bindgen_anon_1 };
            let count = usize::from(m.instruction_byte_count).min(16);
            return Exit::Memory(MemoryAccess {
                header: Header::from(&{ m.header }),
                unmapped: { message.header.message_type } == hv_message_type_HVMSG_UNMAPPED_GPA,
                gva: (access.gva_valid() == 1).then_some(m.guest_virtual_address),
                gva_gpa_valid: access.gva_gpa_valid() == 1,
                gpa: m.guest_physical_address,
                bytes: { m.instruction_bytes }[..count].to_vec(),
            });
        }
        if let Ok(m) = message.to_msr_info() {
            return Exit::Msr(Header::from(&{ m.header }), m.msr_number, m.rax, m.rdx);
        }
        if let Ok(m) = message.to_cpuid_info() {
            let default = [
                m.default_result_rax,
                m.default_result_rbx,
                m.default_result_rcx,
                m.default_result_rdx,
            ];
            return Exit::Cpuid(Header::from(&{ m.header }), m.rax, m.rcx, default);
        }
        if let Ok(m) = message.to_apic_eoi_info() {
            return Exit::ApicEoi(m.vp_index, m.interrupt_vector);
        }
        let kind = message.header.message_type;
        if kind == hv_message_type_HVMSG_X64_HALT {
            return Exit::Halt;
        }
        if kind == hv_message_type_HVMSG_UNRECOVERABLE_EXCEPTION {
            // SAFETY: this message's payload is the common header; the payload may be unaligned.
            let header: hv_x64_intercept_message_header =
                unsafe { std::ptr::read_unaligned(std::ptr::addr_of!(message.u.payload).cast()) };
            return Exit::Unrecoverable(Header::from(&header));
        }
        Exit::Other(kind)
    }
}
