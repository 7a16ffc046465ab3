//! What a VP that runs one instruction at a time meets next. The KVM such a VP stands on emulates every instruction, and
//! some of them otherwise than a processor with an interceptor: it stores before it says that it could not load, gives up
//! on an instruction that is not in memory, and goes on behind a HLT. So the instruction is looked at before and after.

use iced_x86::{Instruction, Mnemonic};
use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_sync_regs};

use super::engine::{Engine, Next, stop};
use super::fault::Scene;
use super::message;
use crate::errno::Errno;
use crate::intercepts::ACCESS_EXECUTE;
use crate::memory::Kick;

impl Engine {
    /// Stops the VP before an instruction that memory does not serve, or an intercepted CPUID.
    ///
    /// # Errors
    /// What `RUN_VP` returns to the client.
    pub(super) fn look_ahead(&mut self, kick: &Kick) -> Result<Option<Next>, Errno> {
        let at = self.context.snapshot();
        let scene = Scene::new(&at.regs, &at.sregs, &self.partition.memory);
        let unserved = match scene.instruction() {
            Err(_) => true,
            Ok(instruction) if instruction.mnemonic() == Mnemonic::Cpuid => {
                return self.intercepted_cpuid(&instruction);
            }
            Ok(instruction) => scene.fault(&instruction, &mut self.factory).is_some(),
        };
        if unserved && self.is_runnable()? {
            return self.access(kick, &at, None, false).map(Some);
        }
        Ok(None)
    }

    /// Whether the registers are those of the next instruction. KVM takes notice of a startup IPI at any call, also at
    /// the one that asks for the state, so a VP that has not yet left the guest may be elsewhere already.
    fn is_runnable(&self) -> Result<bool, Errno> {
        let state = self.context.vcpu().get_mp_state()?.mp_state;
        Ok(self.started && state == KVM_MP_STATE_RUNNABLE)
    }

    /// Puts the VP to sleep when the instruction at `before` was a HLT that KVM went past.
    ///
    /// # Errors
    /// What KVM says.
    pub(super) fn look_back(&mut self, before: Option<&kvm_sync_regs>) -> Result<(), Errno> {
        let Some(before) = before else { return Ok(()) };
        let scene = Scene::new(&before.regs, &before.sregs, &self.partition.memory);
        if let Ok(instruction) = scene.instruction()
            && instruction.mnemonic() == Mnemonic::Hlt
            && self.context.regs().rip == before.regs.rip + instruction.len() as u64
        {
            self.context.vcpu().set_mp_state(kvm_mp_state {
                mp_state: KVM_MP_STATE_HALTED,
            })?;
        }
        Ok(())
    }

    fn intercepted_cpuid(&self, instruction: &Instruction) -> Result<Option<Next>, Errno> {
        let regs = self.context.regs();
        let (leaf, subleaf) = (regs.rax as u32, regs.rcx as u32);
        if self.partition.intercepts.cpuid(leaf) & ACCESS_EXECUTE == 0 {
            return Ok(None);
        }
        let stopped = self.context.stopped()?;
        let values = self
            .cpuid
            .values(leaf, subleaf, stopped.sregs.cr4, stopped.xfem);
        Ok(Some(stop(message::cpuid(
            &stopped,
            instruction.len(),
            values,
        ))))
    }
}
