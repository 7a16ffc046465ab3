//! Instructions that take a memory operand to or from the stack, or jump through one.

use vm_memory::GuestMemoryBackend;

use super::alu::Width;
use super::cpu::{RSP, SS};
use super::error::Step;
use super::execute::Flow;
use super::operand::{Machine, Place, write_register};
use super::view::{Access, Span};

impl<M: GuestMemoryBackend + ?Sized> Machine<'_, '_, M> {
    /// push of memory, register or immediate.
    pub(super) fn push(&mut self) -> Step<Flow> {
        if self.instruction.op_register(0).is_segment_register() {
            return Err(self.unsupported());
        }
        let width = self.stack_width()?;
        let value = self.read(0)?;
        let (pointer, span) = self.below_stack(width)?;
        self.store(&span, width, value);
        self.set_stack_pointer(pointer);
        Ok(Flow::Next)
    }

    /// pop to memory or register. A destination address that uses rSP uses its value after the pop.
    pub(super) fn pop(&mut self) -> Step<Flow> {
        if self.instruction.op_register(0).is_segment_register() {
            return Err(self.unsupported());
        }
        let width = self.stack_width()?;
        let before = self.cpu.gpr[RSP];
        let mask = self.cpu.stack_pointer_mask();
        let span = self.segment_memory(SS, before & mask, width.bytes(), Access::Read)?;
        self.set_stack_pointer(before.wrapping_add(width.bytes() as u64));
        let place = self.place(0).inspect_err(|_| self.cpu.gpr[RSP] = before)?;
        let value = self.load(&span, width);
        match place {
            Place::Register(register) => write_register(self.cpu, register, value),
            Place::Memory(target) => self.store(&target, width, value),
        }
        Ok(Flow::Next)
    }

    /// Near call through memory or register.
    pub(super) fn call(&mut self) -> Step<Flow> {
        let target = self.branch_target()?;
        let width = self.stack_width()?;
        let (pointer, span) = self.below_stack(width)?;
        let next = self.instruction.next_ip() & self.cpu.instruction_pointer_mask();
        self.store(&span, width, next);
        self.set_stack_pointer(pointer);
        Ok(Flow::Jump(target))
    }

    /// Near jump through memory or register.
    pub(super) fn jump(&mut self) -> Step<Flow> {
        Ok(Flow::Jump(self.branch_target()?))
    }

    fn branch_target(&mut self) -> Step<u64> {
        let instruction = &self.instruction;
        if !instruction.is_call_near_indirect() && !instruction.is_jmp_near_indirect() {
            return Err(self.unsupported());
        }
        let target = self.read(0)?;
        self.cpu.check_branch(target)?;
        Ok(target)
    }

    /// Size of what this instruction pushes or pops.
    fn stack_width(&self) -> Step<Width> {
        let bytes = self.instruction.stack_pointer_increment().unsigned_abs() as usize;
        Width::new(bytes).ok_or_else(|| self.unsupported())
    }

    /// The stack pointer after a push, and the place to push to.
    fn below_stack(&mut self, width: Width) -> Step<(u64, Span)> {
        let pointer = self.cpu.gpr[RSP].wrapping_sub(width.bytes() as u64);
        let offset = pointer & self.cpu.stack_pointer_mask();
        Ok((
            pointer,
            self.segment_memory(SS, offset, width.bytes(), Access::Write)?,
        ))
    }

    fn set_stack_pointer(&mut self, value: u64) {
        let mask = self.cpu.stack_pointer_mask();
        self.cpu.set_masked(RSP, mask, value);
    }
}
