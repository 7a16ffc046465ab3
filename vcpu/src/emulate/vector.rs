//! Moves between memory and vector registers, as memcpy and non-temporal stores use them on devices: SSE, and AVX up to 256 bits.

use std::io;

use iced_x86::{EncodingKind, Mnemonic, OpKind, Register};
use vm_memory::GuestMemoryBackend;

use super::cpu::{CR0_EM, CR0_TS, CR4_OSFXSR, CR4_OSXSAVE, XCR0_AVX};
use super::error::{DEVICE_NOT_AVAILABLE, EmulateError, Fault, INVALID_OPCODE, Step};
use super::execute::Flow;
use super::operand::Machine;
use super::view::Access;

/// The vector registers of a VP, fetched only when an instruction names one.
pub trait VectorRegisters {
    /// Reads the low bytes of register `index` (0 to 15) into `value`: 16 (XMM) or 32 (YMM) of them.
    ///
    /// # Errors
    ///
    /// What kept the register from being read; the emulation ends with it.
    fn read(&mut self, index: usize, value: &mut [u8]) -> io::Result<()>;

    /// Writes register `index` (0 to 15). With 16 bytes the rest of the register stays; with 32 bytes everything above them
    /// is cleared.
    ///
    /// # Errors
    ///
    /// What kept the register from being written; the emulation ends with it.
    fn write(&mut self, index: usize, value: &[u8]) -> io::Result<()>;
}

/// Which part of the register a move touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// The low bytes, as many as the memory operand has; loading clears the rest.
    Low,
    /// The low eight bytes; loading keeps the rest.
    LowHalf,
    /// The second eight bytes; loading keeps the rest.
    HighHalf,
    /// As `Low`, from or to memory aligned to its size.
    Aligned,
}

impl<M: GuestMemoryBackend + ?Sized> Machine<'_, '_, M> {
    /// Executes a vector move, or ends the emulation for an instruction that nobody knows.
    pub(super) fn vector(&mut self) -> Step<Flow> {
        let part = self.part()?;
        let avx = self.check_enabled()?;
        let access = if self.is_memory(0) {
            Access::Write
        } else {
            Access::Read
        };
        let len = self.instruction.memory_size().size().clamp(1, 32);
        let alignment = if part == Part::Aligned { len as u64 } else { 1 };
        let span = self.memory_aligned(access, alignment)?;
        let start = if part == Part::HighHalf { 8 } else { 0 };
        let mut value = [0; 32];
        if access == Access::Write {
            self.read_vector(1, &mut value[..len.max(16)])?;
            self.view.store(&span, &value[start..start + len]);
            return Ok(Flow::Next);
        }
        if matches!(part, Part::LowHalf | Part::HighHalf) {
            // AVX forms name the register to merge with.
            let merged = self.instruction.op_count() - 2;
            self.read_vector(merged, &mut value[..16])?;
        }
        self.view.load(&span, &mut value[start..start + len]);
        self.write_vector(0, &value[..if avx { 32 } else { 16 }])?;
        Ok(Flow::Next)
    }

    /// Checks that the guest may use the unit; whether the instruction is an AVX one, which clears the register's upper part.
    fn check_enabled(&self) -> Result<bool, Fault> {
        let cpu = &self.cpu;
        let avx = self.instruction.encoding() == EncodingKind::VEX;
        let enabled = if avx {
            let extended = cpu.cr4 & CR4_OSXSAVE != 0 && cpu.xcr0 & XCR0_AVX == XCR0_AVX;
            extended && !cpu.is_real_mode() && !cpu.is_virtual_8086()
        } else {
            cpu.cr0 & CR0_EM == 0 && cpu.cr4 & CR4_OSFXSR != 0
        };
        if !enabled {
            return Err(Fault::plain(INVALID_OPCODE));
        }
        if cpu.cr0 & CR0_TS != 0 {
            return Err(Fault::plain(DEVICE_NOT_AVAILABLE));
        }
        Ok(avx)
    }

    /// What the instruction moves, if it is one of ours: a plain move between memory and a register of at most 256 bits.
    fn part(&self) -> Step<Part> {
        let part = match self.instruction.mnemonic() {
            Mnemonic::Movups | Mnemonic::Movupd | Mnemonic::Movdqu | Mnemonic::Lddqu => Part::Low,
            Mnemonic::Vmovups | Mnemonic::Vmovupd | Mnemonic::Vmovdqu | Mnemonic::Vlddqu => {
                Part::Low
            }
            Mnemonic::Movd | Mnemonic::Movq | Mnemonic::Movss | Mnemonic::Movsd => Part::Low,
            Mnemonic::Vmovd | Mnemonic::Vmovq | Mnemonic::Vmovss | Mnemonic::Vmovsd => Part::Low,
            Mnemonic::Movaps | Mnemonic::Movapd | Mnemonic::Movdqa => Part::Aligned,
            Mnemonic::Vmovaps | Mnemonic::Vmovapd | Mnemonic::Vmovdqa => Part::Aligned,
            Mnemonic::Movntps | Mnemonic::Movntpd | Mnemonic::Movntdq | Mnemonic::Movntdqa => {
                Part::Aligned
            }
            Mnemonic::Vmovntps | Mnemonic::Vmovntpd | Mnemonic::Vmovntdq | Mnemonic::Vmovntdqa => {
                Part::Aligned
            }
            Mnemonic::Movlps | Mnemonic::Movlpd | Mnemonic::Vmovlps | Mnemonic::Vmovlpd => {
                Part::LowHalf
            }
            Mnemonic::Movhps | Mnemonic::Movhpd | Mnemonic::Vmovhps | Mnemonic::Vmovhpd => {
                Part::HighHalf
            }
            _ => return Err(self.unsupported()),
        };
        let instruction = &self.instruction;
        let operands = 0..instruction.op_count();
        let known = operands
            .clone()
            .all(|operand| match instruction.op_kind(operand) {
                OpKind::Register => vector_index(instruction.op_register(operand)).is_some(),
                OpKind::Memory => true,
                _ => false,
            });
        let memory = operands.filter(|&operand| self.is_memory(operand)).count();
        let encoded = matches!(
            instruction.encoding(),
            EncodingKind::Legacy | EncodingKind::VEX
        );
        if !known || memory != 1 || !encoded {
            return Err(self.unsupported());
        }
        Ok(part)
    }

    fn read_vector(&mut self, operand: u32, value: &mut [u8]) -> Step<()> {
        let register = self.instruction.op_register(operand);
        let (vectors, index) = self.vector_register(register)?;
        vectors
            .read(index, value)
            .map_err(EmulateError::VectorRegister)?;
        Ok(())
    }

    fn write_vector(&mut self, operand: u32, value: &[u8]) -> Step<()> {
        let register = self.instruction.op_register(operand);
        let (vectors, index) = self.vector_register(register)?;
        vectors
            .write(index, value)
            .map_err(EmulateError::VectorRegister)?;
        Ok(())
    }

    fn vector_register(&mut self, register: Register) -> Step<(&mut dyn VectorRegisters, usize)> {
        let index = vector_index(register).ok_or_else(|| self.unsupported())?;
        match &mut self.vectors {
            Some(vectors) => Ok((&mut **vectors, index)),
            None => Err(EmulateError::NoVectorRegisters { rip: self.cpu.rip }.into()),
        }
    }
}

/// Number of an XMM or YMM register that SSE and AVX instructions can name.
fn vector_index(register: Register) -> Option<usize> {
    let index = register.number();
    ((register.is_xmm() || register.is_ymm()) && index < 16).then_some(index)
}
