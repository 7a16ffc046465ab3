//! Typed intercepts: what `MSHV_RUN_VP` says about why the VP stopped.
//!
//! The kernel fills a 256-byte `hv_message`. [`Intercept::of`] looks at its type and borrows the payload in place: nothing
//! is copied and nothing is allocated on the way of an exit. The payload structs of `mshv-bindings` are packed, so a
//! reference into the message is always aligned; the bit fields that matter are read through small methods here.

use mshv_bindings::{
    HV_INTERCEPT_ACCESS_WRITE, hv_message, hv_message_type_HVMSG_GPA_INTERCEPT as GPA_INTERCEPT,
    hv_message_type_HVMSG_INVALID_VP_REGISTER_VALUE as INVALID_VP_REGISTER,
    hv_message_type_HVMSG_SYNIC_SINT_DELIVERABLE as SINT_DELIVERABLE,
    hv_message_type_HVMSG_UNMAPPED_GPA as UNMAPPED_GPA,
    hv_message_type_HVMSG_UNRECOVERABLE_EXCEPTION as UNRECOVERABLE_EXCEPTION,
    hv_message_type_HVMSG_UNSUPPORTED_FEATURE as UNSUPPORTED_FEATURE,
    hv_message_type_HVMSG_X64_APIC_EOI as APIC_EOI,
    hv_message_type_HVMSG_X64_CPUID_INTERCEPT as CPUID_INTERCEPT,
    hv_message_type_HVMSG_X64_EXCEPTION_INTERCEPT as EXCEPTION_INTERCEPT,
    hv_message_type_HVMSG_X64_HALT as HALT,
    hv_message_type_HVMSG_X64_INTERRUPTION_DELIVERABLE as INTERRUPTION_DELIVERABLE,
    hv_message_type_HVMSG_X64_IO_PORT_INTERCEPT as IO_PORT_INTERCEPT,
    hv_message_type_HVMSG_X64_MSR_INTERCEPT as MSR_INTERCEPT, hv_x64_apic_eoi_message,
    hv_x64_cpuid_intercept_message, hv_x64_exception_intercept_message,
    hv_x64_intercept_message_header, hv_x64_io_port_intercept_message,
    hv_x64_memory_intercept_message, hv_x64_msr_intercept_message,
};

/// Why the VP stopped.
#[derive(Clone, Copy)]
pub enum Intercept<'a> {
    /// `in`, `out`, `ins` or `outs` on a port.
    Port(PortAccess<'a>),
    /// An access to guest-physical memory that is not mapped, or not with that right.
    Memory(MemoryAccess<'a>),
    /// `rdmsr` or `wrmsr` that the hypervisor does not handle.
    Msr(MsrAccess<'a>),
    /// `cpuid` of an intercepted leaf.
    Cpuid(&'a hv_x64_cpuid_intercept_message),
    /// An exception the VMM asked to see.
    Exception(&'a hv_x64_exception_intercept_message),
    /// End of interrupt for a level-triggered vector.
    Eoi {
        /// The vector whose service ended.
        vector: u8,
    },
    /// The VP halted and nothing can wake it.
    Halt(Header<'a>),
    /// Triple fault.
    Unrecoverable(Header<'a>),
    /// A register the VMM (or the guest's state) holds an illegal value in.
    InvalidRegister,
    /// The guest used something the hypervisor does not offer.
    UnsupportedFeature,
    /// A notification that needs no answer (an interruption or SINT has become deliverable).
    Notification,
    /// A message of a type this VMM does not know.
    Unknown(u32),
}

impl<'a> Intercept<'a> {
    /// Decodes `message` in place.
    #[must_use]
    pub fn of(message: &'a hv_message) -> Self {
        match message.header.message_type {
            IO_PORT_INTERCEPT => Self::Port(PortAccess(payload(message))),
            UNMAPPED_GPA | GPA_INTERCEPT => Self::Memory(MemoryAccess(payload(message))),
            MSR_INTERCEPT => Self::Msr(MsrAccess(payload(message))),
            CPUID_INTERCEPT => Self::Cpuid(payload(message)),
            EXCEPTION_INTERCEPT => Self::Exception(payload(message)),
            APIC_EOI => {
                let eoi: &hv_x64_apic_eoi_message = payload(message);
                // x86 has 256 vectors; the field is wider than its value.
                #[expect(clippy::cast_possible_truncation)]
                let vector = eoi.interrupt_vector as u8;
                Self::Eoi { vector }
            }
            HALT => Self::Halt(Header(payload(message))),
            UNRECOVERABLE_EXCEPTION => Self::Unrecoverable(Header(payload(message))),
            INVALID_VP_REGISTER => Self::InvalidRegister,
            UNSUPPORTED_FEATURE => Self::UnsupportedFeature,
            SINT_DELIVERABLE | INTERRUPTION_DELIVERABLE => Self::Notification,
            other => Self::Unknown(other),
        }
    }
}

/// Marks the payload structs that may be borrowed from a message.
///
/// # Safety
/// The type must have alignment 1, fit the 240-byte payload and be valid for every bit pattern.
unsafe trait Payload {}
// SAFETY: packed structs of integers, each no longer than the payload (checked at compile time in `payload`).
unsafe impl Payload for hv_x64_io_port_intercept_message {}
// SAFETY: as above.
unsafe impl Payload for hv_x64_memory_intercept_message {}
// SAFETY: as above.
unsafe impl Payload for hv_x64_msr_intercept_message {}
// SAFETY: as above.
unsafe impl Payload for hv_x64_cpuid_intercept_message {}
// SAFETY: as above.
unsafe impl Payload for hv_x64_exception_intercept_message {}
// SAFETY: as above.
unsafe impl Payload for hv_x64_apic_eoi_message {}
// SAFETY: as above.
unsafe impl Payload for hv_x64_intercept_message_header {}

fn payload<T: Payload>(message: &hv_message) -> &T {
    const { assert!(align_of::<T>() == 1 && size_of::<T>() <= 240) }
    // SAFETY: `T` has alignment 1, is no longer than the payload, and any bytes are a valid `T` (the trait's contract).
    unsafe { &*(&raw const message.u).cast::<T>() }
}

/// The part every x64 intercept message starts with.
#[derive(Clone, Copy)]
pub struct Header<'a>(&'a hv_x64_intercept_message_header);

impl Header<'_> {
    /// Address of the intercepted instruction, relative to CS.
    #[must_use]
    pub fn rip(self) -> u64 {
        self.0.rip
    }

    /// RFLAGS at the intercept.
    #[must_use]
    pub fn rflags(self) -> u64 {
        self.0.rflags
    }

    /// Length of the intercepted instruction in bytes; 0 where the hypervisor does not know it.
    #[must_use]
    pub fn instruction_length(self) -> u64 {
        self.0.instruction_length().into()
    }

    fn is_write(self) -> bool {
        u32::from(self.0.intercept_access_type) == HV_INTERCEPT_ACCESS_WRITE
    }
}

/// A port access that has not happened yet.
#[derive(Clone, Copy)]
pub struct PortAccess<'a>(&'a hv_x64_io_port_intercept_message);

impl<'a> PortAccess<'a> {
    /// Where the VP stands.
    #[must_use]
    pub fn header(self) -> Header<'a> {
        Header(&self.0.header)
    }

    /// The port.
    #[must_use]
    pub fn port(self) -> u16 {
        self.0.port_number
    }

    /// Whether the guest writes to the port.
    #[must_use]
    pub fn is_write(self) -> bool {
        self.header().is_write()
    }

    /// Width of one access in bytes: 1, 2 or 4.
    #[must_use]
    pub fn width(self) -> usize {
        usize::from(self.info() & 0x7)
    }

    /// Whether memory is the other operand (`ins`, `outs`), with or without `rep`.
    #[must_use]
    pub fn is_string(self) -> bool {
        self.info() & 0x8 != 0
    }

    /// RAX at the intercept.
    #[must_use]
    pub fn rax(self) -> u64 {
        self.0.rax
    }

    /// The bytes of the instruction the hypervisor has fetched; may be empty.
    #[must_use]
    pub fn instruction_bytes(self) -> &'a [u8] {
        fetched(&self.0.instruction_bytes, self.0.instruction_byte_count)
    }

    fn info(self) -> u8 {
        // SAFETY: every variant of the union is one byte of plain bits.
        unsafe { self.0.access_info.as_uint8 }
    }
}

/// An access to guest-physical memory that has not happened yet.
#[derive(Clone, Copy)]
pub struct MemoryAccess<'a>(&'a hv_x64_memory_intercept_message);

impl<'a> MemoryAccess<'a> {
    /// Where the VP stands.
    #[must_use]
    pub fn header(self) -> Header<'a> {
        Header(&self.0.header)
    }

    /// Whether the guest writes.
    #[must_use]
    pub fn is_write(self) -> bool {
        self.header().is_write()
    }

    /// Guest-physical address of the access.
    #[must_use]
    pub fn gpa(self) -> u64 {
        self.0.guest_physical_address
    }

    /// Guest-virtual address of the access, where the hypervisor says that it belongs to [`Self::gpa`].
    #[must_use]
    pub fn gva(self) -> Option<u64> {
        const GVA_VALID: u8 = 1;
        const GVA_GPA_VALID: u8 = 2;
        // SAFETY: every variant of the union is one byte of plain bits.
        let info = unsafe { self.0.memory_access_info.as_uint8 };
        (info & (GVA_VALID | GVA_GPA_VALID) == GVA_VALID | GVA_GPA_VALID)
            .then_some(self.0.guest_virtual_address)
    }

    /// The bytes of the instruction the hypervisor has fetched; may be empty.
    #[must_use]
    pub fn instruction_bytes(self) -> &'a [u8] {
        fetched(&self.0.instruction_bytes, self.0.instruction_byte_count)
    }
}

/// An `rdmsr` or `wrmsr` that has not happened yet.
#[derive(Clone, Copy)]
pub struct MsrAccess<'a>(&'a hv_x64_msr_intercept_message);

impl<'a> MsrAccess<'a> {
    /// Where the VP stands.
    #[must_use]
    pub fn header(self) -> Header<'a> {
        Header(&self.0.header)
    }

    /// Whether it is a `wrmsr`.
    #[must_use]
    pub fn is_write(self) -> bool {
        self.header().is_write()
    }

    /// The register's number.
    #[must_use]
    pub fn number(self) -> u32 {
        self.0.msr_number
    }
}

fn fetched(bytes: &[u8; 16], count: u8) -> &[u8] {
    &bytes[..usize::from(count).min(bytes.len())]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(message_type: u32, payload: &[u8]) -> hv_message {
        let mut message = hv_message::default();
        message.header.message_type = message_type;
        let mut words = [0u64; 30];
        for (index, byte) in payload.iter().enumerate() {
            words[index / 8] |= u64::from(*byte) << (index % 8 * 8);
        }
        message.u.payload = words;
        message
    }

    /// vp_index, length and access type, execution state, CS, RIP, RFLAGS.
    fn header(length: u8, write: bool, rip: u64) -> Vec<u8> {
        let mut bytes = vec![0; 40];
        bytes[4] = length;
        bytes[5] = u8::from(write);
        bytes[24..32].copy_from_slice(&rip.to_le_bytes());
        bytes[32..40].copy_from_slice(&2u64.to_le_bytes());
        bytes
    }

    #[test]
    fn port_write_of_two_bytes() {
        let mut bytes = header(2, true, 0xfff0);
        bytes.extend_from_slice(&0x3f8u16.to_le_bytes());
        bytes.extend_from_slice(&[2, 1, 0, 0, 0, 0]);
        bytes.extend_from_slice(&0x1234_5678u64.to_le_bytes());
        bytes.extend_from_slice(&[0xef; 16]);
        let message = message(IO_PORT_INTERCEPT, &bytes);
        let Intercept::Port(access) = Intercept::of(&message) else {
            panic!("not a port access");
        };
        assert_eq!(access.port(), 0x3f8);
        assert!(access.is_write() && !access.is_string());
        assert_eq!(access.width(), 2);
        assert_eq!(access.rax(), 0x1234_5678);
        assert_eq!(access.header().rip(), 0xfff0);
        assert_eq!(access.header().instruction_length(), 2);
        assert_eq!(access.instruction_bytes(), [0xef]);
    }

    #[test]
    fn string_port_read() {
        let mut bytes = header(2, false, 0);
        bytes.extend_from_slice(&[0x70, 0, 0b1_1001, 40]);
        let message = message(IO_PORT_INTERCEPT, &bytes);
        let Intercept::Port(access) = Intercept::of(&message) else {
            panic!("not a port access");
        };
        assert!(access.is_string() && !access.is_write());
        assert_eq!(access.width(), 1);
        assert_eq!(
            access.instruction_bytes().len(),
            16,
            "a lying count is cut to the field"
        );
    }

    #[test]
    fn memory_access_without_a_valid_gva() {
        let mut bytes = header(0, true, 0x1000);
        bytes.extend_from_slice(&[0, 0, 0, 0, 3, 1, 0, 0]);
        bytes.extend_from_slice(&0xffff_0000u64.to_le_bytes());
        bytes.extend_from_slice(&0xfec0_0010u64.to_le_bytes());
        bytes.extend_from_slice(&[0x89, 0x07, 0xc3]);
        let mut message = message(UNMAPPED_GPA, &bytes);
        let Intercept::Memory(access) = Intercept::of(&message) else {
            panic!("not a memory access");
        };
        assert_eq!((access.gpa(), access.gva()), (0xfec0_0010, None));
        assert_eq!(access.instruction_bytes(), [0x89, 0x07, 0xc3]);

        bytes[45] = 3;
        message = self::message(GPA_INTERCEPT, &bytes);
        let Intercept::Memory(access) = Intercept::of(&message) else {
            panic!("not a memory access");
        };
        assert_eq!(access.gva(), Some(0xffff_0000));
    }

    #[test]
    fn msr_eoi_and_the_unknown() {
        let mut bytes = header(2, true, 0);
        bytes.extend_from_slice(&0xc001_0015u32.to_le_bytes());
        let msr = message(MSR_INTERCEPT, &bytes);
        assert!(matches!(Intercept::of(&msr), Intercept::Msr(access)
            if access.number() == 0xc001_0015 && access.is_write()));
        let eoi = message(APIC_EOI, &[0, 0, 0, 0, 0x31, 0, 0, 0]);
        assert!(matches!(
            Intercept::of(&eoi),
            Intercept::Eoi { vector: 0x31 }
        ));
        let odd = message(0x8fff_ffff, &[]);
        assert!(matches!(
            Intercept::of(&odd),
            Intercept::Unknown(0x8fff_ffff)
        ));
    }
}
