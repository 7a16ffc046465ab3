//! Instructions that calculate: sums, logic, comparisons, products, quotients, shifts.

use iced_x86::Mnemonic;
use vm_memory::GuestMemoryBackend;

use super::alu::{self, Width};
use super::cpu::{RAX, RDX};
use super::error::{DIVIDE_ERROR, Fault, Step};
use super::execute::Flow;
use super::operand::Machine;
use super::shift::{self, Shift};

impl<M: GuestMemoryBackend + ?Sized> Machine<'_, '_, M> {
    /// add, adc, sub, sbb.
    pub(super) fn sum(&mut self) -> Step<Flow> {
        let width = self.width(0)?;
        let place = self.place(0)?;
        let source = self.read(1)?;
        let carry = self.carry();
        match self.instruction.mnemonic() {
            Mnemonic::Add => self.apply(place, |old| alu::add(width, old, source, 0)),
            Mnemonic::Adc => self.apply(place, |old| alu::add(width, old, source, carry)),
            Mnemonic::Sub => self.apply(place, |old| alu::subtract(width, old, source, 0)),
            _ => self.apply(place, |old| alu::subtract(width, old, source, carry)),
        };
        Ok(Flow::Next)
    }

    /// and, or, xor.
    pub(super) fn logic(&mut self) -> Step<Flow> {
        let width = self.width(0)?;
        let place = self.place(0)?;
        let source = self.read(1)?;
        match self.instruction.mnemonic() {
            Mnemonic::And => self.apply(place, |old| alu::logic(width, old & source)),
            Mnemonic::Or => self.apply(place, |old| alu::logic(width, old | source)),
            _ => self.apply(place, |old| alu::logic(width, old ^ source)),
        };
        Ok(Flow::Next)
    }

    /// cmp and test.
    pub(super) fn compare(&mut self) -> Step<Flow> {
        let width = self.width(0)?;
        let left = self.read(0)?;
        let right = self.read(1)?;
        let output = match self.instruction.mnemonic() {
            Mnemonic::Cmp => alu::subtract(width, left, right, 0),
            _ => alu::logic(width, left & right),
        };
        output.set_flags(self.cpu);
        Ok(Flow::Next)
    }

    /// inc, dec, neg, not.
    pub(super) fn unary(&mut self) -> Step<Flow> {
        let width = self.width(0)?;
        let place = self.place(0)?;
        match self.instruction.mnemonic() {
            Mnemonic::Inc => self.apply(place, |old| alu::increment(width, old)),
            Mnemonic::Dec => self.apply(place, |old| alu::decrement(width, old)),
            Mnemonic::Neg => self.apply(place, |old| alu::subtract(width, 0, old, 0)),
            _ => self.apply(place, |old| alu::not(width, old)),
        };
        Ok(Flow::Next)
    }

    /// mul, and imul in its forms with one, two and three operands.
    pub(super) fn multiply(&mut self) -> Step<Flow> {
        let width = self.width(0)?;
        match self.instruction.op_count() {
            1 => {
                let source = self.read(0)?;
                let accumulator = self.cpu.gpr[RAX] & width.mask();
                let (output, high) = match self.instruction.mnemonic() {
                    Mnemonic::Mul => alu::multiply(width, accumulator, source),
                    _ => alu::multiply_signed(width, accumulator, source),
                };
                self.set_pair(width, high, output.value);
                output.set_flags(self.cpu);
            }
            operands => {
                let left = self.read(operands - 2)?;
                let right = self.read(operands - 1)?;
                let (output, _) = alu::multiply_signed(width, left, right);
                self.write(0, output.value)?;
                output.set_flags(self.cpu);
            }
        }
        Ok(Flow::Next)
    }

    /// div and idiv. Flags, all undefined, stay as they are.
    pub(super) fn divide(&mut self) -> Step<Flow> {
        let width = self.width(0)?;
        let divisor = self.read(0)?;
        let (high, low) = match width.bytes() {
            1 => (self.cpu.gpr[RAX] >> 8, self.cpu.gpr[RAX]),
            _ => (self.cpu.gpr[RDX], self.cpu.gpr[RAX]),
        };
        let (high, low) = (high & width.mask(), low & width.mask());
        let result = match self.instruction.mnemonic() {
            Mnemonic::Div => alu::divide(width, high, low, divisor),
            _ => alu::divide_signed(width, high, low, divisor),
        };
        let (quotient, remainder) = result.ok_or(Fault::plain(DIVIDE_ERROR))?;
        self.set_pair(width, remainder, quotient);
        Ok(Flow::Next)
    }

    /// Writes rDX:rAX, or AH:AL for bytes.
    fn set_pair(&mut self, width: Width, high: u64, low: u64) {
        if width.bytes() == 1 {
            self.cpu.set_masked(RAX, 0xffff, high << 8 | low);
        } else {
            self.cpu.set_masked(RAX, width.mask(), low);
            self.cpu.set_masked(RDX, width.mask(), high);
        }
    }

    /// Shifts and rotates of one operand.
    pub(super) fn shift(&mut self, kind: Shift) -> Step<Flow> {
        let width = self.width(0)?;
        let place = self.place(0)?;
        let count = self.read(1)?;
        let carry = self.carry();
        self.apply(place, |old| shift::shift(kind, width, old, count, carry));
        Ok(Flow::Next)
    }

    /// shld and shrd.
    pub(super) fn double_shift(&mut self) -> Step<Flow> {
        let width = self.width(0)?;
        let place = self.place(0)?;
        let filler = self.read(1)?;
        let count = self.read(2)?;
        match self.instruction.mnemonic() {
            Mnemonic::Shld => {
                self.apply(place, |old| shift::double_left(width, old, filler, count))
            }
            _ => self.apply(place, |old| shift::double_right(width, old, filler, count)),
        };
        Ok(Flow::Next)
    }
}
