//! Instructions on single bits: bt, bts, btr, btc, and the scans and counts of a memory source.

use iced_x86::{Mnemonic, OpKind};
use vm_memory::GuestMemoryBackend;

use super::alu::{Output, flag};
use super::cpu::{CF, STATUS_FLAGS, ZF};
use super::error::Step;
use super::execute::Flow;
use super::operand::{Machine, Place};
use super::view::Access;

impl<M: GuestMemoryBackend + ?Sized> Machine<'_, '_, M> {
    /// bt, bts, btr, btc. A bit offset in a register counts, signed, from the memory operand on and reaches far outside of
    /// it; an immediate one stays inside.
    pub(super) fn bit_test(&mut self) -> Step<Flow> {
        let width = self.width(0)?;
        let bits = i64::from(width.bits());
        let mnemonic = self.instruction.mnemonic();
        let offset = width.sign_extend(self.read(1)?);
        let place = if self.is_memory(0) {
            let mut address = self.effective_address();
            if self.instruction.op_kind(1) == OpKind::Register {
                let bytes = offset.div_euclid(bits) * width.bytes() as i64;
                address = address.wrapping_add_signed(bytes) & self.address_mask();
            }
            let access = if mnemonic == Mnemonic::Bt {
                Access::Read
            } else {
                Access::Write
            };
            Place::Memory(self.memory_at(address, width.bytes(), access)?)
        } else {
            self.place(0)?
        };
        let index = offset.rem_euclid(bits);
        let bit = 1u64 << index;
        let old = match (mnemonic, place) {
            (Mnemonic::Bt, Place::Memory(span)) => self.load(&span, width),
            (Mnemonic::Bt, Place::Register(_)) => self.read(0)?,
            (Mnemonic::Bts, place) => self.update(place, |old| old | bit),
            (Mnemonic::Btr, place) => self.update(place, |old| old & !bit),
            (_, place) => self.update(place, |old| old ^ bit),
        };
        Output {
            value: 0,
            flags: flag(old >> index, CF),
            defined: CF,
        }
        .set_flags(self.cpu);
        Ok(Flow::Next)
    }

    /// bsf, bsr, tzcnt, lzcnt, popcnt.
    pub(super) fn bit_scan(&mut self) -> Step<Flow> {
        let width = self.width(0)?;
        let source = self.read(1)?;
        let bits = u64::from(width.bits());
        let leading = u64::from(source.leading_zeros()) - (64 - bits);
        let trailing = u64::from(source.trailing_zeros()).min(bits);
        let source_zero = flag(u64::from(source == 0), ZF);
        let counted = |count| flag(u64::from(source == 0), CF) | flag(u64::from(count == 0), ZF);
        let (value, flags, defined) = match self.instruction.mnemonic() {
            // The destination of a scan that finds nothing stays as it is.
            Mnemonic::Bsf if source != 0 => (Some(trailing), 0, ZF),
            Mnemonic::Bsr if source != 0 => (Some(bits - 1 - leading), 0, ZF),
            Mnemonic::Bsf | Mnemonic::Bsr => (None, source_zero, ZF),
            Mnemonic::Tzcnt => (Some(trailing), counted(trailing), CF | ZF),
            Mnemonic::Lzcnt => (Some(leading), counted(leading), CF | ZF),
            _ => (
                Some(u64::from(source.count_ones())),
                source_zero,
                STATUS_FLAGS,
            ),
        };
        if let Some(value) = value {
            self.write(0, value)?;
        }
        Output {
            value: 0,
            flags,
            defined,
        }
        .set_flags(self.cpu);
        Ok(Flow::Next)
    }
}
