//! One VP's engine: lets the guest run in KVM and turns each exit into what the hypervisor would do, which is often
//! nothing the client sees, and otherwise an intercept message.

use std::sync::Arc;

use iced_x86::{Instruction, InstructionInfoFactory};
use kvm_bindings::{
    KVM_CAP_DISABLE_QUIRKS2, KVM_CAP_HYPERV_ENFORCE_CPUID, KVM_CAP_HYPERV_SYNIC2,
    KVM_CAP_X86_USER_SPACE_MSR, KVM_EXIT_DEBUG, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_HYPERV,
    KVM_EXIT_HYPERV_HCALL, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO,
    KVM_EXIT_IOAPIC_EOI, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN,
    KVM_EXIT_SYSTEM_EVENT, KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, KVM_MSR_EXIT_REASON_FILTER,
    KVM_MSR_EXIT_REASON_INVAL, KVM_MSR_EXIT_REASON_UNKNOWN, KVM_SYSTEM_EVENT_CRASH,
    KVM_X86_QUIRK_OUT_7E_INC_RIP, kvm_enable_cap, kvm_sync_regs,
};
use kvm_ioctls::VmFd;
use mshv_bindings::{HV_STATUS_INVALID_CONNECTION_ID, hv_message, hv_u128};

use super::context::{Context, Outcome};
use super::cpuid::Table;
use super::decode::{Code, code_bits};
use super::fault::{Fault, Kind, Scene};
use super::page::Dirty;
use super::registers::{NOTIFY_INTERRUPT, fpu};
use super::signals::{self, Held};
use super::walk::bits::RFLAGS_IF;
use super::{message, msr, port, probe, store, xsave};
use crate::errno::Errno;
use crate::memory::Kick;
use crate::partition::Partition;
use crate::property::code;
use crate::trace;

/// How often an access KVM cannot serve may find everything in place before it counts as an error of the client's
/// memory itself.
const MAX_RETRIES: u32 = 16;
const RFLAGS_RF: u64 = 1 << 16;
/// Bit of `SYNTHETIC_PROC_FEATURES`: the guest has a SynIC.
const SYNIC_REGISTERS: u64 = 1 << 4;

/// What the VP does next.
pub(super) enum Next {
    /// Goes on; the client sees nothing.
    Again,
    /// `KVM_RUN` was interrupted.
    Interrupted,
    /// Stops with a message; `true` when the instruction uses XMM registers.
    Stop(Box<hv_message>, bool),
}

/// What KVM will still do about the last exit when it runs again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pending {
    Nothing,
    /// Completes the port access at this RIP, unless RIP is elsewhere by then.
    PortAt(u64),
}

/// The state of one VP.
pub(super) struct Engine {
    /// Registers.
    pub(super) context: Context,
    /// The partition.
    pub(super) partition: Arc<Partition>,
    /// What CPUID answers.
    pub(super) cpuid: Table,
    /// `HV_REGISTER_EXPLICIT_SUSPEND`.
    pub(super) explicit_suspend: bool,
    /// `HV_REGISTER_INTERCEPT_SUSPEND`.
    pub(super) intercept_suspend: bool,
    /// `HV_REGISTER_DELIVERABILITY_NOTIFICATIONS`.
    pub(super) notifications: u64,
    /// The SynIC's message and event flags page while the guest has them off.
    pub(super) synic_pages: Box<[[u8; 4096]; 2]>,
    single_step: bool,
    pending: Pending,
    generation: u64,
    held_back: Option<u64>,
    retries: u32,
    /// Tells the operands of instructions.
    pub(super) factory: InstructionInfoFactory,
    has_run: bool,
    /// Has been in the guest, or starts there: other VPs wait for a startup IPI.
    pub(super) started: bool,
}

/// Settings of the virtual machine the engine relies on.
fn prepare(vm: &VmFd) -> Result<(), Errno> {
    let enable = |cap: u32, argument: u64| {
        let mut cap = kvm_enable_cap {
            cap,
            ..Default::default()
        };
        cap.args[0] = argument;
        vm.enable_cap(&cap)
    };
    // An OUT to port 0x7e must stop before the instruction like any other.
    if vm.check_extension_raw(KVM_CAP_DISABLE_QUIRKS2.into()) as u32 & KVM_X86_QUIRK_OUT_7E_INC_RIP
        != 0
    {
        enable(KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_OUT_7E_INC_RIP.into())?;
    }
    let reasons =
        KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_FILTER;
    enable(KVM_CAP_X86_USER_SPACE_MSR, reasons.into())?;
    Ok(())
}

/// Makes KVM a Microsoft Hypervisor towards the guest, within what the partition was given.
fn enable_hyperv(context: &Context, partition: &Partition) -> Result<(), Errno> {
    let features = partition
        .properties
        .get(code::SYNTHETIC_PROC_FEATURES)
        .unwrap_or(0);
    for (cap, argument, wanted) in [
        (KVM_CAP_HYPERV_SYNIC2, 0, features & SYNIC_REGISTERS != 0),
        (KVM_CAP_HYPERV_ENFORCE_CPUID, 1, true),
    ] {
        if wanted && partition.vm.check_extension_raw(cap.into()) > 0 {
            let mut cap = kvm_enable_cap {
                cap,
                ..Default::default()
            };
            cap.args[0] = argument;
            context.vcpu().enable_cap(&cap)?;
        }
    }
    Ok(())
}

impl Engine {
    /// The engine of a new VP, in its reset state.
    ///
    /// # Errors
    /// What KVM says.
    pub(super) fn new(partition: &Arc<Partition>, vp_index: u32) -> Result<Self, Errno> {
        prepare(&partition.vm)?;
        let context = Context::new(&partition.vm, vp_index)?;
        let single_step = !probe::stops_before_access();
        if single_step {
            context.single_step()?;
        }
        enable_hyperv(&context, partition)?;
        let mut engine = Self {
            context,
            partition: Arc::clone(partition),
            cpuid: Table::new(partition, vp_index),
            explicit_suspend: true,
            intercept_suspend: false,
            notifications: 0,
            synic_pages: vec![[0; 4096]; 2]
                .try_into()
                .map_err(|_| Errno(libc::ENOMEM))?,
            single_step,
            pending: Pending::Nothing,
            generation: partition.intercepts.generation(),
            held_back: None,
            retries: 0,
            factory: InstructionInfoFactory::new(),
            has_run: false,
            started: vp_index == 0,
        };
        engine.install_cpuid()?;
        msr::install_filter(&partition.vm, &partition.intercepts)?;
        engine.context.reload()?;
        Ok(engine)
    }

    /// Takes over what the client registered or installed since last time.
    ///
    /// # Errors
    /// What KVM says.
    pub(super) fn update_configuration(&mut self) -> Result<(), Errno> {
        let generation = self.partition.intercepts.generation();
        if generation == self.generation {
            return Ok(());
        }
        self.generation = generation;
        msr::install_filter(&self.partition.vm, &self.partition.intercepts)?;
        self.cpuid = Table::new(&self.partition, self.context.vp_index());
        self.install_cpuid()
    }

    fn install_cpuid(&mut self) -> Result<(), Errno> {
        let Some(cpuid) = self.cpuid.for_kvm() else {
            trace::unimplemented("more CPUID results than KVM has room for");
            return Ok(());
        };
        match self.context.vcpu().set_cpuid2(&cpuid) {
            Ok(()) => Ok(()),
            Err(_) if self.has_run => {
                trace::unimplemented("CPUID results registered after the VP has run");
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Takes over what the client wrote into the register page.
    ///
    /// # Errors
    /// What KVM says of XMM registers.
    pub(super) fn take_page(&mut self, dirty: &Dirty) -> Result<(), Errno> {
        let mut regs = *self.context.regs();
        if dirty.apply_regs(&mut regs) {
            *self.context.regs_mut() = regs;
        }
        if let Some([es, cs, ss, ds, fs, gs]) = dirty.segments() {
            let sregs = self.context.sregs_mut();
            (sregs.es, sregs.cs, sregs.ss) = (es, cs, ss);
            (sregs.ds, sregs.fs, sregs.gs) = (ds, fs, gs);
        }
        if let Some(xmm) = dirty.xmm() {
            let mut state = xsave::fpu(self)?;
            for (register, value) in state.xmm.iter_mut().zip(xmm) {
                *register = fpu::to_bytes(value);
            }
            xsave::set_fpu(self, &state)?;
        }
        Ok(())
    }

    /// XMM0 to XMM5.
    ///
    /// # Errors
    /// What KVM says.
    pub(super) fn xmm(&self) -> Result<[hv_u128; 6], Errno> {
        let state = xsave::fpu(self)?;
        Ok(std::array::from_fn(|i| fpu::from_bytes(&state.xmm[i])))
    }

    /// Runs the guest until the next exit and deals with it.
    ///
    /// # Errors
    /// What `RUN_VP` returns to the client.
    pub(super) fn step(&mut self, kick: &Kick, held: &Held) -> Result<Next, Errno> {
        self.update_configuration()?;
        let held_back = held.during_run();
        if self.held_back != Some(held_back) {
            signals::set_mask(self.context.vcpu(), held_back)?;
            self.held_back = Some(held_back);
        }
        if let Pending::PortAt(rip) = std::mem::replace(&mut self.pending, Pending::Nothing)
            && self.context.regs().rip == rip
        {
            let wanted = self.context.snapshot();
            self.rewind(kick, &wanted)?;
        }
        if let Some(next) = self.before_run(kick)? {
            return Ok(next);
        }
        let before = self.single_step.then(|| self.context.snapshot());
        let guard = self.partition.memory.run_guard(kick)?;
        let outcome = self.context.run();
        drop(guard);
        self.has_run = true;
        let outcome = outcome?;
        self.started |= outcome != Outcome::Interrupted;
        match outcome {
            Outcome::Interrupted => Ok(Next::Interrupted),
            Outcome::Woken => Ok(Next::Again),
            Outcome::Refused => Ok(stop(message::invalid_register(self.context.vp_index()))),
            Outcome::Fault { gpa } => {
                let at = self.context.snapshot();
                self.access(kick, &at, gpa, false)
            }
            Outcome::Exit(reason) => self.exit(reason, kick, before.as_ref()),
        }
    }

    /// What stops the VP although the guest has done nothing: an interrupt window the client waits for, and on a
    /// single-stepping engine what the instruction at hand is about to do.
    fn before_run(&mut self, kick: &Kick) -> Result<Option<Next>, Errno> {
        if self.notifications & NOTIFY_INTERRUPT != 0 {
            let events = self.context.events();
            let busy = events.interrupt.injected | events.exception.injected | events.nmi.injected;
            if self.context.regs().rflags & RFLAGS_IF != 0
                && events.interrupt.shadow == 0
                && busy == 0
            {
                return self.interrupt_window().map(Some);
            }
            self.context.kvm_run_mut().request_interrupt_window = 1;
        }
        if self.single_step {
            return self.look_ahead(kick);
        }
        Ok(None)
    }

    fn interrupt_window(&mut self) -> Result<Next, Errno> {
        self.notifications &= !NOTIFY_INTERRUPT;
        self.context.kvm_run_mut().request_interrupt_window = 0;
        Ok(stop(message::interrupt_deliverable(
            &self.context.stopped()?,
        )))
    }

    /// Makes KVM forget what it has pending and takes the registers back to `to`.
    fn rewind(&mut self, kick: &Kick, to: &kvm_sync_regs) -> Result<u64, Errno> {
        let _guard = self.partition.memory.run_guard(kick)?;
        self.context.rewind(to)
    }

    /// An exit with a reason. `before` are the registers before the instruction, on a single-stepping engine.
    fn exit(
        &mut self,
        reason: u32,
        kick: &Kick,
        before: Option<&kvm_sync_regs>,
    ) -> Result<Next, Errno> {
        match reason {
            KVM_EXIT_DEBUG => {
                self.look_back(before)?;
                Ok(Next::Again)
            }
            KVM_EXIT_INTR => Ok(Next::Again),
            KVM_EXIT_IO => self.port(kick, before),
            KVM_EXIT_MMIO => self.mmio(kick, before),
            KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR => self.msr(reason == KVM_EXIT_X86_WRMSR, kick),
            KVM_EXIT_IOAPIC_EOI => {
                // SAFETY: a plain integer, valid for this exit.
                let vector = unsafe { self.context.kvm_run_mut().__bindgen_anon_1.eoi.vector };
                if self.partition.interrupts.eoi(vector) {
                    return Ok(Next::Again);
                }
                Ok(stop(message::apic_eoi(self.context.vp_index(), vector)))
            }
            KVM_EXIT_IRQ_WINDOW_OPEN => self.interrupt_window(),
            KVM_EXIT_SHUTDOWN => Ok(stop(message::unrecoverable(&self.context.stopped()?))),
            KVM_EXIT_HLT => Ok(stop(message::halt(&self.context.stopped()?))),
            KVM_EXIT_HYPERV => Ok(self.hyperv()),
            KVM_EXIT_SYSTEM_EVENT => {
                // SAFETY: a plain integer, valid for this exit.
                let kind = unsafe {
                    self.context
                        .kvm_run_mut()
                        .__bindgen_anon_1
                        .system_event
                        .type_
                };
                // What a guest reports of its crash stays in its crash registers.
                if kind != KVM_SYSTEM_EVENT_CRASH {
                    trace::unimplemented(&format!("KVM system event {kind}"));
                }
                Ok(Next::Again)
            }
            KVM_EXIT_FAIL_ENTRY => {
                // SAFETY: a plain integer, valid for this exit.
                let why = unsafe { self.context.kvm_run_mut().__bindgen_anon_1.fail_entry };
                let why = why.hardware_entry_failure_reason;
                trace::unimplemented(&format!("KVM could not enter the guest: {why:#x}"));
                Ok(stop(message::invalid_register(self.context.vp_index())))
            }
            KVM_EXIT_INTERNAL_ERROR => {
                // SAFETY: a plain integer, valid for this exit.
                let suberror = unsafe {
                    self.context
                        .kvm_run_mut()
                        .__bindgen_anon_1
                        .internal
                        .suberror
                };
                let rip = self.context.regs().rip;
                trace::unimplemented(&format!("KVM internal error {suberror} at RIP {rip:#x}"));
                Ok(stop(message::unsupported(
                    self.context.vp_index(),
                    suberror.into(),
                )))
            }
            other => {
                trace::unimplemented(&format!("KVM exit {other}"));
                Err(Errno(libc::EIO))
            }
        }
    }

    /// A hypercall or SynIC change KVM leaves to userspace. There are no ports or connections in a partition, so a
    /// message or signal goes nowhere.
    fn hyperv(&mut self) -> Next {
        let page = self.context.kvm_run_mut();
        // SAFETY: the exit was for Hyper-V; the fields are plain integers.
        unsafe {
            let exit = &mut page.__bindgen_anon_1.hyperv;
            if exit.type_ == KVM_EXIT_HYPERV_HCALL {
                exit.u.hcall.result = HV_STATUS_INVALID_CONNECTION_ID.into();
                let code = exit.u.hcall.input & 0xffff;
                trace::unimplemented(&format!("hypercall {code:#x} of the guest"));
            }
        }
        Next::Again
    }

    fn port(&mut self, kick: &Kick, before: Option<&kvm_sync_regs>) -> Result<Next, Errno> {
        let access = self.context.port_access();
        let left = self.context.snapshot();
        let data = self.context.port_data(&access).to_vec();
        let memory = &self.partition.memory;
        let mut drained = false;
        let scene = Scene::new(&left.regs, &left.sregs, memory);
        let found = if let Some(before) = before.filter(|_| access.out) {
            let earlier = Scene::new(&before.regs, &before.sregs, memory);
            port::carried_out(&earlier, &access, left.regs.rip)
                .or_else(|| port::completed_out(&scene, &access))
                .unwrap_or_else(|| port::identify(&scene, &access, &data).found())
        } else {
            match port::identify(&scene, &access, &data) {
                port::Answer::Ambiguous(plain) => {
                    drained = self.rewind(kick, &left)? != left.regs.rip;
                    let scene = Scene::new(&left.regs, &left.sregs, &self.partition.memory);
                    if drained {
                        plain
                    } else {
                        port::completed_outs(&scene, &access, &data).unwrap_or(plain)
                    }
                }
                answer @ port::Answer::Found(_) => answer.found(),
            }
        };
        let emulated = found.port.string || before.is_some();
        if access.out {
            if found.regs != left.regs {
                *self.context.regs_mut() = found.regs;
            }
        } else if emulated {
            // KVM would store what it reads: let it store what is there.
            let mut kept = data;
            let scene = Scene::new(&left.regs, &left.sregs, &self.partition.memory);
            port::preserve(&scene, &access, &mut kept);
            self.context.port_data(&access).copy_from_slice(&kept);
            self.rewind(kick, &left)?;
        }
        if !emulated && !drained {
            self.pending = Pending::PortAt(found.regs.rip);
        }
        let stopped = self.context.stopped()?;
        Ok(stop(message::port(
            &stopped,
            &found.port,
            found.code.bytes(),
        )))
    }

    /// `KVM_EXIT_MMIO`: KVM's emulator met the access. Of a load the registers are as before the instruction, of a
    /// store as after it.
    fn mmio(&mut self, kick: &Kick, before: Option<&kvm_sync_regs>) -> Result<Next, Errno> {
        let access = self.context.mmio_access();
        let left = self.context.snapshot();
        if !access.write {
            return self.access(kick, &left, Some(access.gpa), true);
        }
        let memory = &self.partition.memory;
        match store::origin(memory, &mut self.factory, &left, before, &access) {
            Some(origin) => self.access(kick, &origin, Some(access.gpa), true),
            None => {
                trace::unimplemented("store whose instruction cannot be told");
                self.rewind(kick, &left)?;
                let fault = self.bare_fault(access.gpa, Kind::Write);
                Ok(stop(message::memory(&self.context.stopped()?, &fault, &[])))
            }
        }
    }

    fn bare_fault(&self, gpa: u64, kind: Kind) -> Fault {
        Fault {
            kind,
            gva: None,
            gpa,
            translated: false,
            protected: self.partition.memory.lookup(gpa) != crate::memory::Mapping::Unmapped,
        }
    }

    /// The instruction at `at` makes an access that memory does not serve: rings a doorbell, or tells the client.
    /// When KVM has `begun` the instruction it is made to forget it.
    pub(super) fn access(
        &mut self,
        kick: &Kick,
        at: &kvm_sync_regs,
        gpa: Option<u64>,
        begun: bool,
    ) -> Result<Next, Errno> {
        let partition = Arc::clone(&self.partition);
        let scene = Scene::new(&at.regs, &at.sregs, &partition.memory);
        let (fault, code, instruction) = match scene.code() {
            Err(fetch) => (Some(Fault::from(fetch)), Code::default(), None),
            Ok(code) => match code.decode(&at.sregs, at.regs.rip) {
                Err(fetch) => (Some(Fault::from(fetch)), code, None),
                Ok(instruction) => {
                    let fault = scene
                        .fault(&instruction, &mut self.factory)
                        .or_else(|| scene.implicit_fault(&at.events));
                    (fault, code, Some(instruction))
                }
            },
        };
        let doorbell = fault
            .filter(|fault| {
                fault.kind == Kind::Write && !fault.protected && !partition.ioeventfds.is_empty()
            })
            .zip(instruction.and_then(|instruction| scene.store(&instruction)));
        if let Some((fault, store)) = doorbell
            && partition.ioeventfds.signal_mmio(fault.gpa, store.data())
        {
            if begun {
                self.rewind(kick, at)?;
            }
            self.retries = 0;
            self.skip(instruction.map_or(0, |instruction| instruction.len() as u64));
            return Ok(Next::Again);
        }
        if begun {
            self.rewind(kick, at)?;
        }
        let fault = match (fault, gpa) {
            (Some(fault), _) => fault,
            // Memory may have changed between the exit and now; and KVM knows accesses the decoder does not.
            (None, Some(gpa)) if self.retries > 0 => self.bare_fault(gpa, Kind::Read),
            (None, _) if self.retries < MAX_RETRIES => {
                self.retries += 1;
                return Ok(Next::Again);
            }
            (None, _) => {
                self.retries = 0;
                trace::unimplemented(&format!(
                    "KVM cannot serve the instruction at RIP {:#x}",
                    at.regs.rip
                ));
                return Err(Errno(libc::EFAULT));
            }
        };
        self.retries = 0;
        let uses_xmm = instruction.is_some_and(|instruction| uses_vectors(&instruction));
        let stopped = self.context.stopped()?;
        let message = message::memory(&stopped, &fault, code.bytes());
        Ok(Next::Stop(Box::new(message), uses_xmm))
    }

    /// Moves RIP behind an instruction that has been carried out here.
    fn skip(&mut self, length: u64) {
        let mask = match code_bits(self.context.sregs()) {
            64 => u64::MAX,
            bits => (1 << bits) - 1,
        };
        let regs = self.context.regs_mut();
        regs.rip = regs.rip.wrapping_add(length) & mask;
        regs.rflags &= !RFLAGS_RF;
        if self.context.events().interrupt.shadow != 0 {
            self.context.events_mut().interrupt.shadow = 0;
        }
    }

    fn msr(&mut self, write: bool, kick: &Kick) -> Result<Next, Errno> {
        let access = self.context.msr_access();
        match msr::decide(&self.partition, access.index, access.reason, write) {
            msr::Decision::Answer(answer) => self.context.complete_msr(answer),
            msr::Decision::PassOn => {
                let answer = msr::pass_on(self, access.index, write.then_some(access.data));
                self.context.complete_msr(answer);
            }
            msr::Decision::Intercept => {
                let at = self.context.snapshot();
                self.context.complete_msr(Some(0));
                self.rewind(kick, &at)?;
                return Ok(stop(message::msr(
                    &self.context.stopped()?,
                    access.index,
                    write,
                )));
            }
        }
        Ok(Next::Again)
    }
}

/// Stops the VP with a message about an instruction that uses no XMM registers.
pub(super) fn stop(message: hv_message) -> Next {
    Next::Stop(Box::new(message), false)
}

fn uses_vectors(instruction: &Instruction) -> bool {
    (0..instruction.op_count()).any(|operand| instruction.op_register(operand).is_vector_register())
}
