//! Which instruction is executed where.

use iced_x86::{ConditionCode, Mnemonic};
use vm_memory::GuestMemoryBackend;

use super::cpu::{CF, OF, PF, SF, ZF};
use super::error::Step;
use super::operand::Machine;
use super::shift::Shift;
use super::view::Access;

/// Where execution goes after an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flow {
    /// To the next instruction.
    Next,
    /// To this offset in CS.
    Jump(u64),
    /// Back to the same instruction, which has more iterations to do.
    Repeat,
}

impl<M: GuestMemoryBackend + ?Sized> Machine<'_, '_, M> {
    /// Executes the instruction up to, but without, moving RIP.
    ///
    /// # Errors
    ///
    /// The guest's fault, or an instruction that is not known.
    pub(super) fn execute(&mut self) -> Step<Flow> {
        if self.instruction.is_string_instruction() {
            return self.string();
        }
        match self.instruction.mnemonic() {
            Mnemonic::Mov | Mnemonic::Movnti | Mnemonic::Movdiri | Mnemonic::Movzx => self.mov(),
            Mnemonic::Movsx | Mnemonic::Movsxd => self.movsx(),
            Mnemonic::Movbe => self.movbe(),
            Mnemonic::Xlatb => self.xlat(),
            Mnemonic::Add | Mnemonic::Adc | Mnemonic::Sub | Mnemonic::Sbb => self.sum(),
            Mnemonic::And | Mnemonic::Or | Mnemonic::Xor => self.logic(),
            Mnemonic::Cmp | Mnemonic::Test => self.compare(),
            Mnemonic::Inc | Mnemonic::Dec | Mnemonic::Neg | Mnemonic::Not => self.unary(),
            Mnemonic::Mul | Mnemonic::Imul => self.multiply(),
            Mnemonic::Div | Mnemonic::Idiv => self.divide(),
            Mnemonic::Shl | Mnemonic::Sal => self.shift(Shift::Left),
            Mnemonic::Shr => self.shift(Shift::Right),
            Mnemonic::Sar => self.shift(Shift::Arithmetic),
            Mnemonic::Rol => self.shift(Shift::RotateLeft),
            Mnemonic::Ror => self.shift(Shift::RotateRight),
            Mnemonic::Rcl => self.shift(Shift::CarryLeft),
            Mnemonic::Rcr => self.shift(Shift::CarryRight),
            Mnemonic::Shld | Mnemonic::Shrd => self.double_shift(),
            Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc => self.bit_test(),
            Mnemonic::Bsf
            | Mnemonic::Bsr
            | Mnemonic::Tzcnt
            | Mnemonic::Lzcnt
            | Mnemonic::Popcnt => self.bit_scan(),
            Mnemonic::Xchg => self.exchange(),
            Mnemonic::Xadd => self.exchange_add(),
            Mnemonic::Cmpxchg => self.compare_exchange(),
            Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b => self.compare_exchange_pair(),
            Mnemonic::Push => self.push(),
            Mnemonic::Pop => self.pop(),
            Mnemonic::Call => self.call(),
            Mnemonic::Jmp => self.jump(),
            Mnemonic::Clflush
            | Mnemonic::Clflushopt
            | Mnemonic::Clwb
            | Mnemonic::Prefetchnta
            | Mnemonic::Prefetcht0
            | Mnemonic::Prefetcht1
            | Mnemonic::Prefetcht2
            | Mnemonic::Prefetchw => self.cache_hint(),
            _ => match self.instruction.condition_code() {
                ConditionCode::None => self.vector(),
                condition => self.conditional(condition),
            },
        }
    }

    /// mov and its relatives that copy or zero-extend.
    fn mov(&mut self) -> Step<Flow> {
        let value = self.read(1)?;
        self.write(0, value)?;
        Ok(Flow::Next)
    }

    fn movsx(&mut self) -> Step<Flow> {
        let value = self.width(1)?.sign_extend(self.read(1)?);
        self.write(0, value as u64)?;
        Ok(Flow::Next)
    }

    fn movbe(&mut self) -> Step<Flow> {
        let unused = 64 - self.width(0)?.bits();
        let value = self.read(1)?.swap_bytes() >> unused;
        self.write(0, value)?;
        Ok(Flow::Next)
    }

    /// xlatb: a byte from a table at rBX, indexed by AL.
    fn xlat(&mut self) -> Step<Flow> {
        let span = self.memory(Access::Read)?;
        let mut byte = [0];
        self.view.load(&span, &mut byte);
        self.cpu.gpr[super::cpu::RAX] = self.cpu.gpr[super::cpu::RAX] & !0xff | u64::from(byte[0]);
        Ok(Flow::Next)
    }

    /// Cache control on memory that has no cache: the address is checked where the processor checks it, and that is all.
    fn cache_hint(&mut self) -> Step<Flow> {
        let flushes = matches!(
            self.instruction.mnemonic(),
            Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb
        );
        if flushes {
            self.memory_at(self.effective_address(), 1, Access::Read)?;
        }
        Ok(Flow::Next)
    }

    /// setcc and cmovcc. The latter reads its source, and clears the upper half of a 32-bit destination, in any case.
    fn conditional(&mut self, condition: ConditionCode) -> Step<Flow> {
        let holds = self.holds(condition);
        if self.instruction.op_count() == 1 && self.is_memory(0) {
            self.write(0, u64::from(holds))?;
        } else if self.instruction.op_count() == 2 && self.is_memory(1) {
            let source = self.read(1)?;
            let value = if holds { source } else { self.read(0)? };
            self.write(0, value)?;
        } else {
            return Err(self.unsupported());
        }
        Ok(Flow::Next)
    }

    fn holds(&self, condition: ConditionCode) -> bool {
        let flag = |mask| self.cpu.rflags & mask != 0;
        match condition {
            ConditionCode::None => true,
            ConditionCode::o => flag(OF),
            ConditionCode::no => !flag(OF),
            ConditionCode::b => flag(CF),
            ConditionCode::ae => !flag(CF),
            ConditionCode::e => flag(ZF),
            ConditionCode::ne => !flag(ZF),
            ConditionCode::be => flag(CF | ZF),
            ConditionCode::a => !flag(CF | ZF),
            ConditionCode::s => flag(SF),
            ConditionCode::ns => !flag(SF),
            ConditionCode::p => flag(PF),
            ConditionCode::np => !flag(PF),
            ConditionCode::l => flag(SF) != flag(OF),
            ConditionCode::ge => flag(SF) == flag(OF),
            ConditionCode::le => flag(ZF) || flag(SF) != flag(OF),
            ConditionCode::g => !flag(ZF) && flag(SF) == flag(OF),
        }
    }
}
