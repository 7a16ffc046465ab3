//! Instructions that exchange: xchg, xadd, cmpxchg, cmpxchg8b, cmpxchg16b.

use vm_memory::GuestMemoryBackend;

use super::alu;
use super::cpu::{Cpu, RAX, RBX, RCX, RDX, ZF};
use super::error::Step;
use super::execute::Flow;
use super::operand::Machine;
use super::view::Access;

impl<M: GuestMemoryBackend + ?Sized> Machine<'_, '_, M> {
    /// xchg: the memory operand, if any, is the first one.
    pub(super) fn exchange(&mut self) -> Step<Flow> {
        let place = self.place(0)?;
        let new = self.read(1)?;
        let old = self.update(place, |_| new);
        self.write(1, old)?;
        Ok(Flow::Next)
    }

    /// xadd: the sum goes to the first operand, the first operand to the second.
    pub(super) fn exchange_add(&mut self) -> Step<Flow> {
        if !self.is_memory(0) {
            return Err(self.unsupported());
        }
        let width = self.width(0)?;
        let place = self.place(0)?;
        let source = self.read(1)?;
        let old = self.apply(place, |old| alu::add(width, old, source, 0));
        self.write(1, old)?;
        Ok(Flow::Next)
    }

    /// cmpxchg: writes the memory operand in any case, as the processor does.
    pub(super) fn compare_exchange(&mut self) -> Step<Flow> {
        if !self.is_memory(0) {
            return Err(self.unsupported());
        }
        let width = self.width(0)?;
        let place = self.place(0)?;
        let new = self.read(1)?;
        let expected = self.cpu.gpr[RAX] & width.mask();
        let old = self.update(place, |old| if old == expected { new } else { old });
        alu::subtract(width, expected, old, 0).set_flags(self.cpu);
        if old != expected {
            self.cpu.set_masked(RAX, width.mask(), old);
        }
        Ok(Flow::Next)
    }

    /// cmpxchg8b and cmpxchg16b: compares with rDX:rAX, replaces by rCX:rBX.
    ///
    /// 16 bytes of RAM are not replaced atomically; no intercept leads there, since the operand is aligned and lies in one page.
    pub(super) fn compare_exchange_pair(&mut self) -> Step<Flow> {
        let len = self.instruction.memory_size().size();
        let alignment = if len == 16 { 16 } else { 1 };
        let span = self.memory_aligned(Access::Write, alignment)?;
        let mask = if len == 16 { u64::MAX } else { 0xffff_ffff };
        let bits = len as u32 * 4;
        let pair = |cpu: &Cpu, high: usize, low: usize| {
            u128::from(cpu.gpr[high] & mask) << bits | u128::from(cpu.gpr[low] & mask)
        };
        let expected = pair(self.cpu, RDX, RAX);
        let new = pair(self.cpu, RCX, RBX);
        let old = if len == 16 {
            let mut bytes = [0; 16];
            self.view.load(&span, &mut bytes);
            let old = u128::from_le_bytes(bytes);
            self.view.store(
                &span,
                &if old == expected { new } else { old }.to_le_bytes(),
            );
            old
        } else {
            let exchange = |old| {
                if u128::from(old) == expected {
                    new as u64
                } else {
                    old
                }
            };
            u128::from(self.view.update(&span, exchange))
        };
        if old == expected {
            self.cpu.rflags |= ZF;
        } else {
            self.cpu.rflags &= !ZF;
            self.cpu.set_masked(RAX, mask, old as u64);
            self.cpu.set_masked(RDX, mask, (old >> bits) as u64);
        }
        Ok(Flow::Next)
    }
}
