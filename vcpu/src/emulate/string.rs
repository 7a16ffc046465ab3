//! String instructions with their repetitions: movs, stos, lods, scas, cmps, ins, outs.
//!
//! Each iteration is complete in itself: operands resolved, moved, then registers. So a fault or the end of a share leaves exactly
//! the state from which the instruction goes on when it is executed again.

use iced_x86::{Mnemonic, OpKind};
use vm_memory::GuestMemoryBackend;

use super::alu::{self, Output, Width};
use super::cpu::{DF, ES, RAX, RCX, RDI, RDX, RSI, ZF};
use super::error::Step;
use super::execute::Flow;
use super::operand::{Machine, segment_index};
use super::view::{Access, Span};

/// Iterations before the VP gets a chance to take interrupts: with bytes, one page.
const SHARE: u32 = 4096;

/// When a string instruction ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Repeat {
    /// After one iteration; rCX is not used.
    Once,
    /// When rCX is zero.
    Count,
    /// When rCX is zero or ZF differs from this value.
    While(u64),
}

impl<M: GuestMemoryBackend + ?Sized> Machine<'_, '_, M> {
    /// Executes a string instruction, or a share of its iterations.
    pub(super) fn string(&mut self) -> Step<Flow> {
        let mask = self.string_address_mask();
        let repeat = self.repeat();
        if repeat == Repeat::Once {
            if let Some(output) = self.iterate(mask)? {
                output.set_flags(self.cpu);
            }
            return Ok(Flow::Next);
        }
        // A fault between iterations leaves the flags of before the instruction.
        let mut compared = None;
        for _ in 0..SHARE {
            let count = self.cpu.gpr[RCX] & mask;
            if count == 0 {
                break;
            }
            compared = self.iterate(mask)?;
            self.cpu.set_masked(RCX, mask, count - 1);
            if let (Repeat::While(zero), Some(output)) = (repeat, compared)
                && output.flags & ZF != zero
            {
                output.set_flags(self.cpu);
                return Ok(Flow::Next);
            }
        }
        if let Some(output) = compared {
            output.set_flags(self.cpu);
        }
        Ok(if self.cpu.gpr[RCX] & mask == 0 {
            Flow::Next
        } else {
            Flow::Repeat
        })
    }

    /// One iteration; the flags to set, if it compares.
    fn iterate(&mut self, mask: u64) -> Step<Option<Output>> {
        let bytes = self.instruction.memory_size().size();
        let width = Width::new(bytes).ok_or_else(|| self.unsupported())?;
        let accumulator = self.cpu.gpr[RAX] & width.mask();
        let port = self.cpu.gpr[RDX] as u16;
        let mut data = [0; 8];
        let data = &mut data[..bytes];
        let mut output = None;
        match self.instruction.mnemonic() {
            Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq => {
                let source = self.string_source(bytes, mask)?;
                let target = self.string_target(bytes, mask, Access::Write)?;
                self.view.load(&source, data);
                self.view.store(&target, data);
                self.advance(RSI, bytes, mask);
                self.advance(RDI, bytes, mask);
            }
            Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq => {
                let target = self.string_target(bytes, mask, Access::Write)?;
                self.store(&target, width, accumulator);
                self.advance(RDI, bytes, mask);
            }
            Mnemonic::Lodsb | Mnemonic::Lodsw | Mnemonic::Lodsd | Mnemonic::Lodsq => {
                let source = self.string_source(bytes, mask)?;
                let value = self.load(&source, width);
                self.cpu.set_masked(RAX, width.mask(), value);
                self.advance(RSI, bytes, mask);
            }
            Mnemonic::Scasb | Mnemonic::Scasw | Mnemonic::Scasd | Mnemonic::Scasq => {
                let target = self.string_target(bytes, mask, Access::Read)?;
                let value = self.load(&target, width);
                output = Some(alu::subtract(width, accumulator, value, 0));
                self.advance(RDI, bytes, mask);
            }
            Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd | Mnemonic::Cmpsq => {
                let source = self.string_source(bytes, mask)?;
                let target = self.string_target(bytes, mask, Access::Read)?;
                let (left, right) = (self.load(&source, width), self.load(&target, width));
                output = Some(alu::subtract(width, left, right, 0));
                self.advance(RSI, bytes, mask);
                self.advance(RDI, bytes, mask);
            }
            Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => {
                let target = self.string_target(bytes, mask, Access::Write)?;
                self.view.bus().port_read(port, data);
                self.view.store(&target, data);
                self.advance(RDI, bytes, mask);
            }
            Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => {
                let source = self.string_source(bytes, mask)?;
                self.view.load(&source, data);
                self.view.bus().port_write(port, data);
                self.advance(RSI, bytes, mask);
            }
            _ => return Err(self.unsupported()),
        }
        Ok(output)
    }

    /// The operand at rSI, in DS or the segment of the prefix.
    fn string_source(&mut self, bytes: usize, mask: u64) -> Step<Span> {
        let segment = segment_index(self.instruction.memory_segment());
        self.segment_memory(segment, self.cpu.gpr[RSI] & mask, bytes, Access::Read)
    }

    /// The operand at rDI, always in ES.
    fn string_target(&mut self, bytes: usize, mask: u64, access: Access) -> Step<Span> {
        self.segment_memory(ES, self.cpu.gpr[RDI] & mask, bytes, access)
    }

    /// Moves an index register by one element, in the direction of DF.
    fn advance(&mut self, index: usize, bytes: usize, mask: u64) {
        let old = self.cpu.gpr[index];
        let step = bytes as u64;
        let new = if self.cpu.rflags & DF == 0 {
            old.wrapping_add(step)
        } else {
            old.wrapping_sub(step)
        };
        self.cpu.set_masked(index, mask, new);
    }

    fn repeat(&self) -> Repeat {
        let instruction = &self.instruction;
        let compares = matches!(
            instruction.mnemonic(),
            Mnemonic::Scasb
                | Mnemonic::Scasw
                | Mnemonic::Scasd
                | Mnemonic::Scasq
                | Mnemonic::Cmpsb
                | Mnemonic::Cmpsw
                | Mnemonic::Cmpsd
                | Mnemonic::Cmpsq
        );
        if instruction.has_repne_prefix() {
            if compares {
                Repeat::While(0)
            } else {
                Repeat::Count
            }
        } else if instruction.has_rep_prefix() {
            if compares {
                Repeat::While(ZF)
            } else {
                Repeat::Count
            }
        } else {
            Repeat::Once
        }
    }

    /// All ones in the address size.
    fn string_address_mask(&self) -> u64 {
        let implied = |kind| match kind {
            OpKind::MemorySegSI | OpKind::MemoryESDI => Some(0xffff),
            OpKind::MemorySegESI | OpKind::MemoryESEDI => Some(0xffff_ffff),
            OpKind::MemorySegRSI | OpKind::MemoryESRDI => Some(u64::MAX),
            _ => None,
        };
        let instruction = &self.instruction;
        implied(instruction.op0_kind())
            .or_else(|| implied(instruction.op1_kind()))
            .unwrap_or(u64::MAX)
    }
}
