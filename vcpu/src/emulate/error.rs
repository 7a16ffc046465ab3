//! How an emulation can end other than by success: the guest's fault, or the limits of this emulator.

use iced_x86::Mnemonic;

/// Divide error.
pub(crate) const DIVIDE_ERROR: u8 = 0;
/// Invalid opcode.
pub(crate) const INVALID_OPCODE: u8 = 6;
/// Device not available: CR0.TS is set.
pub(crate) const DEVICE_NOT_AVAILABLE: u8 = 7;
/// Stack-segment fault.
pub(crate) const STACK_FAULT: u8 = 12;
/// General protection.
pub(crate) const GENERAL_PROTECTION: u8 = 13;
/// Page fault.
pub(crate) const PAGE_FAULT: u8 = 14;

/// An exception that the guest earned; the caller injects it and resumes at the unchanged RIP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Exception vector.
    pub vector: u8,
    /// Error code to push, where the vector has one in the current mode.
    pub error_code: Option<u32>,
    /// The value for CR2, with a page fault.
    pub cr2: Option<u64>,
}

impl Fault {
    /// A fault that pushes no error code.
    pub(crate) fn plain(vector: u8) -> Self {
        Self {
            vector,
            error_code: None,
            cr2: None,
        }
    }

    /// A fault that pushes error code 0 (unless in real mode).
    pub(crate) fn zero(vector: u8) -> Self {
        Self {
            vector,
            error_code: Some(0),
            cr2: None,
        }
    }

    /// A page fault at linear address `cr2`.
    pub(crate) fn page(error_code: u32, cr2: u64) -> Self {
        Self {
            vector: PAGE_FAULT,
            error_code: Some(error_code),
            cr2: Some(cr2),
        }
    }
}

/// The bytes of an instruction, for a message a person can look up.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct InstructionBytes {
    bytes: [u8; 15],
    len: u8,
}

impl InstructionBytes {
    /// Keeps up to 15 of `bytes`.
    pub(crate) fn new(bytes: &[u8]) -> Self {
        let len = bytes.len().min(15);
        let mut kept = [0; 15];
        kept[..len].copy_from_slice(&bytes[..len]);
        Self {
            bytes: kept,
            len: len as u8,
        }
    }
}

impl AsRef<[u8]> for InstructionBytes {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

impl std::fmt::Debug for InstructionBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (index, byte) in self.as_ref().iter().enumerate() {
            let space = if index == 0 { "" } else { " " };
            write!(f, "{space}{byte:02x}")?;
        }
        Ok(())
    }
}

/// Why an instruction could not be emulated at all. The VM cannot continue from here.
#[derive(Debug, thiserror::Error)]
pub enum EmulateError {
    /// A valid instruction that this emulator does not know.
    #[error("instruction {mnemonic:?} ({bytes:?}) at rip {rip:#x} is not emulated")]
    Unsupported {
        /// Its name.
        mnemonic: Mnemonic,
        /// Its encoding.
        bytes: InstructionBytes,
        /// Where it is.
        rip: u64,
    },
    /// The code itself is not in guest memory, and the intercept did not bring its bytes.
    #[error("instruction at rip {rip:#x} lies outside guest memory (gpa {gpa:#x})")]
    CodeOutsideMemory {
        /// Where RIP points.
        rip: u64,
        /// The guest physical address it translates to.
        gpa: u64,
    },
    /// The guest's page tables point outside guest memory.
    #[error(
        "page table entry at gpa {gpa:#x}, outside guest memory, on the way to linear address {linear:#x}"
    )]
    PageTableOutsideMemory {
        /// Guest physical address of the entry.
        gpa: u64,
        /// The linear address under translation.
        linear: u64,
    },
    /// The instruction uses vector registers and the caller gave no access to them.
    #[error("instruction at rip {rip:#x} needs vector registers, which are not available here")]
    NoVectorRegisters {
        /// Where it is.
        rip: u64,
    },
    /// Reading or writing a vector register of the VP failed.
    #[error("vector register access")]
    VectorRegister(#[source] std::io::Error),
}

/// What interrupts the emulation of one instruction.
#[derive(Debug)]
pub(crate) enum Stop {
    /// An exception for the guest.
    Fault(Fault),
    /// An end of the emulation.
    Error(EmulateError),
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl From<EmulateError> for Stop {
    fn from(error: EmulateError) -> Self {
        Self::Error(error)
    }
}

/// The result of a step within one instruction.
pub(crate) type Step<T> = Result<T, Stop>;
