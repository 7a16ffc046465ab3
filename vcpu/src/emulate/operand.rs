//! Operands: registers, immediates and memory, read and written by their number in the instruction.

use iced_x86::{Instruction, OpKind, Register};
use vm_memory::GuestMemoryBackend;

use super::alu::{Output, Width};
use super::cpu::{self, Cpu};
use super::error::{EmulateError, Fault, GENERAL_PROTECTION, InstructionBytes, Step, Stop};
use super::vector::VectorRegisters;
use super::view::{Access, GuestView, Span};

/// One instruction on its way through execution.
pub(super) struct Machine<'a, 'v, M: ?Sized> {
    pub(super) cpu: &'a mut Cpu,
    pub(super) view: GuestView<'a, M>,
    pub(super) vectors: Option<&'v mut dyn VectorRegisters>,
    pub(super) instruction: Instruction,
    /// The encoding, to be named if the instruction turns out to be unknown.
    pub(super) bytes: InstructionBytes,
}

/// A resolved operand that can be written.
#[derive(Clone, Copy)]
pub(super) enum Place {
    /// A general register or a part of one.
    Register(Register),
    /// Memory, checked for the access that was asked for.
    Memory(Span),
}

impl<M: GuestMemoryBackend + ?Sized> Machine<'_, '_, M> {
    /// The end of an instruction that this emulator does not know.
    pub(super) fn unsupported(&self) -> Stop {
        let mnemonic = self.instruction.mnemonic();
        EmulateError::Unsupported {
            mnemonic,
            bytes: self.bytes,
            rip: self.cpu.rip,
        }
        .into()
    }

    /// Size of integer operand `operand`; an immediate is as wide as operand 0.
    pub(super) fn width(&self, operand: u32) -> Step<Width> {
        let bytes = match self.instruction.op_kind(operand) {
            OpKind::Register => self.instruction.op_register(operand).size(),
            kind if is_memory(kind) => self.instruction.memory_size().size(),
            _ if operand != 0 => return self.width(0),
            _ => (-self.instruction.stack_pointer_increment()).max(0) as usize,
        };
        Width::new(bytes).ok_or_else(|| self.unsupported())
    }

    /// Offset of the memory operand in its segment.
    pub(super) fn effective_address(&self) -> u64 {
        let instruction = &self.instruction;
        let base = instruction.memory_base();
        let mut address = instruction.memory_displacement64();
        // For RIP-relative operands the decoder has added RIP to the displacement.
        if base != Register::None && base != Register::RIP && base != Register::EIP {
            address = address.wrapping_add(read_register(self.cpu, base));
        }
        let index = instruction.memory_index();
        if index != Register::None {
            let scale = u64::from(instruction.memory_index_scale());
            address = address.wrapping_add(read_register(self.cpu, index).wrapping_mul(scale));
        }
        address & self.address_mask()
    }

    /// All ones in the address size of the memory operand.
    pub(super) fn address_mask(&self) -> u64 {
        let instruction = &self.instruction;
        let bytes = match (instruction.memory_base(), instruction.memory_index()) {
            (Register::None, Register::None) => match instruction.memory_displ_size() {
                2 => 2,
                8 => 8,
                _ => 4,
            },
            (Register::None, index) => index.size(),
            (base, _) => base.size(),
        };
        u64::MAX >> (64 - 8 * bytes.clamp(1, 8))
    }

    /// Resolves the memory operand at `offset` in its segment, `len` bytes long.
    pub(super) fn memory_at(&mut self, offset: u64, len: usize, access: Access) -> Step<Span> {
        let segment = segment_index(self.instruction.memory_segment());
        self.segment_memory(segment, offset, len, access)
    }

    /// Resolves `len` bytes at `offset` in segment `segment`.
    pub(super) fn segment_memory(
        &mut self,
        segment: usize,
        offset: u64,
        len: usize,
        access: Access,
    ) -> Step<Span> {
        let linear = self.cpu.linear(segment, offset, len as u64, access)?;
        self.view.span(linear, len, access)
    }

    /// Resolves the memory operand with its own length.
    pub(super) fn memory(&mut self, access: Access) -> Step<Span> {
        self.memory_aligned(access, 1)
    }

    /// Resolves the memory operand with its own length; #GP if its linear address is no multiple of `alignment`.
    pub(super) fn memory_aligned(&mut self, access: Access, alignment: u64) -> Step<Span> {
        let len = self.instruction.memory_size().size();
        if !(1..=64).contains(&len) {
            return Err(self.unsupported());
        }
        let segment = segment_index(self.instruction.memory_segment());
        let linear = self
            .cpu
            .linear(segment, self.effective_address(), len as u64, access)?;
        if linear % alignment != 0 {
            return Err(Fault::zero(GENERAL_PROTECTION).into());
        }
        self.view.span(linear, len, access)
    }

    /// Whether `operand` is a memory operand with a ModRM or direct address.
    pub(super) fn is_memory(&self, operand: u32) -> bool {
        self.instruction.op_kind(operand) == OpKind::Memory
    }

    /// Resolves operand `operand` to something that can be written. Memory may be read as well.
    pub(super) fn place(&mut self, operand: u32) -> Step<Place> {
        match self.instruction.op_kind(operand) {
            OpKind::Register if self.instruction.op_register(operand).is_gpr() => {
                Ok(Place::Register(self.instruction.op_register(operand)))
            }
            OpKind::Memory => Ok(Place::Memory(self.memory(Access::Write)?)),
            _ => Err(self.unsupported()),
        }
    }

    /// The value of integer operand `operand`.
    pub(super) fn read(&mut self, operand: u32) -> Step<u64> {
        let width = self.width(operand)?;
        match self.instruction.op_kind(operand) {
            OpKind::Register => {
                let register = self.instruction.op_register(operand);
                if register.is_gpr() {
                    Ok(read_register(self.cpu, register))
                } else if register.is_segment_register() {
                    Ok(u64::from(
                        self.cpu.segments[segment_index(register)].selector,
                    ))
                } else {
                    Err(self.unsupported())
                }
            }
            OpKind::Memory => {
                let span = self.memory(Access::Read)?;
                Ok(self.load(&span, width))
            }
            OpKind::Immediate8
            | OpKind::Immediate8_2nd
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64 => Ok(self.instruction.immediate(operand) & width.mask()),
            _ => Err(self.unsupported()),
        }
    }

    /// Writes integer operand `operand`.
    pub(super) fn write(&mut self, operand: u32, value: u64) -> Step<()> {
        let width = self.width(operand)?;
        match self.place(operand)? {
            Place::Register(register) => write_register(self.cpu, register, value),
            Place::Memory(span) => self.store(&span, width, value),
        }
        Ok(())
    }

    /// Loads an integer from a resolved span.
    pub(super) fn load(&self, span: &Span, width: Width) -> u64 {
        let mut bytes = [0; 8];
        self.view.load(span, &mut bytes[..width.bytes()]);
        u64::from_le_bytes(bytes)
    }

    /// Stores an integer to a resolved span.
    pub(super) fn store(&self, span: &Span, width: Width, value: u64) {
        self.view.store(span, &value.to_le_bytes()[..width.bytes()]);
    }

    /// Replaces the integer at `place` by what `change` makes of it and returns the old one. Flags are the caller's.
    pub(super) fn update(&mut self, place: Place, change: impl Fn(u64) -> u64) -> u64 {
        match place {
            Place::Register(register) => {
                let old = read_register(self.cpu, register);
                write_register(self.cpu, register, change(old));
                old
            }
            Place::Memory(span) => self.view.update(&span, change),
        }
    }

    /// Replaces the integer at `place` by the value of `operation` on it and sets the flags; returns the old integer.
    pub(super) fn apply(&mut self, place: Place, operation: impl Fn(u64) -> Output) -> u64 {
        let old = self.update(place, |old| operation(old).value);
        operation(old).set_flags(self.cpu);
        old
    }

    /// The carry flag as 0 or 1.
    pub(super) fn carry(&self) -> u64 {
        self.cpu.rflags & cpu::CF
    }
}

/// Whether `kind` is any memory operand, also the implied ones of string instructions.
fn is_memory(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::Memory
            | OpKind::MemorySegSI
            | OpKind::MemorySegESI
            | OpKind::MemorySegRSI
            | OpKind::MemorySegDI
            | OpKind::MemorySegEDI
            | OpKind::MemorySegRDI
            | OpKind::MemoryESDI
            | OpKind::MemoryESEDI
            | OpKind::MemoryESRDI
    )
}

/// Position of a segment register in [`Cpu::segments`].
pub(super) fn segment_index(register: Register) -> usize {
    match register {
        Register::ES => cpu::ES,
        Register::CS => cpu::CS,
        Register::SS => cpu::SS,
        Register::FS => cpu::FS,
        Register::GS => cpu::GS,
        _ => cpu::DS,
    }
}

/// Position of a general register in [`Cpu::gpr`] and the bit its value starts at (8 for AH, CH, DH, BH).
fn locate(register: Register) -> (usize, u32) {
    if !register.is_gpr8() {
        return (register.number() & 15, 0);
    }
    match register as usize - Register::AL as usize {
        low @ 0..4 => (low, 0),
        high @ 4..8 => (high - 4, 8),
        extended => ((extended - 4) & 15, 0),
    }
}

/// The value of general register `register`, zero-extended.
pub(super) fn read_register(cpu: &Cpu, register: Register) -> u64 {
    let (index, shift) = locate(register);
    let mask = u64::MAX >> (64 - 8 * register.size().clamp(1, 8));
    cpu.gpr[index] >> shift & mask
}

/// Writes general register `register` as the processor does: 32-bit writes clear the upper half, smaller ones keep the rest.
pub(super) fn write_register(cpu: &mut Cpu, register: Register, value: u64) {
    let (index, shift) = locate(register);
    let mask = u64::MAX >> (64 - 8 * register.size().clamp(1, 8));
    cpu.set_masked(index, mask << shift, value << shift);
}
