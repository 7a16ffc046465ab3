//! The run loop: run, look at the intercept, let the machine answer, move on.

use std::fmt;

use mshv_bindings::hv_message;
use vm_memory::GuestMemoryMmap;

use crate::{
    Vp,
    bus::Bus,
    counters::ExitKind,
    emulate::{Cpu, EmulateError, Exit, Hint, Outcome, cpu, emulate},
    intercept::{Intercept, MemoryAccess, MsrAccess, PortAccess},
    request::Next,
    vector::Vectors,
    vp::VpError,
};

/// What a VP needs of the machine around it.
pub trait Machine: Bus {
    /// The guest has ended its service of a level-triggered interrupt.
    fn end_of_interrupt(&self, vector: u8);
}

/// Somebody who watches a VP come and go, on the VP's own thread.
pub trait Watch: Send {
    /// The VP is about to enter the guest.
    fn entering(&self);
    /// It has come back, for this.
    fn exited(&self, kind: ExitKind);
    /// It has come back with a message, whose sender is the partition with this id. No ioctl tells the id.
    fn told_by(&self, partition: u64);
}

/// How a VP's life ended.
#[derive(Debug)]
pub enum End {
    /// It was asked to stop.
    Stopped,
    /// The guest cannot go on.
    Crashed(Box<Crash>),
}

/// Why a guest cannot go on, and where it stood.
#[derive(Debug)]
pub struct Crash {
    /// The VP it happened on.
    pub vp: u32,
    /// What happened.
    pub reason: CrashReason,
    /// The registers, where they could be read.
    pub registers: Option<Cpu>,
    /// The last exits, one line each, oldest first.
    pub history: String,
}

/// What can end a guest.
#[derive(Debug, thiserror::Error)]
pub enum CrashReason {
    /// A triple fault.
    #[error("triple fault")]
    TripleFault,
    /// A halt that nothing can end.
    #[error("halted with interrupts off")]
    Halted,
    /// The hypervisor found a register value it cannot run with.
    #[error("a register holds a value the processor does not allow")]
    InvalidRegister,
    /// The hypervisor met a feature it does not offer.
    #[error("the guest used a feature the hypervisor does not offer")]
    UnsupportedFeature,
    /// The guest raised an exception nobody asked to see.
    #[error("unexpected intercept of exception {0}")]
    Exception(u16),
    /// A message of an unknown type.
    #[error("unknown message {0:#010x} from the hypervisor")]
    Unknown(u32),
    /// An instruction that cannot be emulated.
    #[error("cannot emulate")]
    Emulation(#[from] EmulateError),
    /// The driver or hypervisor refused something.
    #[error(transparent)]
    Vp(#[from] VpError),
}

fn sender(message: &hv_message) -> u64 {
    let header = { message.header };
    // SAFETY: both variants of the union are numbers.
    unsafe { header.__bindgen_anon_1.sender }
}

impl Vp {
    /// Runs the guest until it is asked to stop or the guest cannot go on. Call it on the VP's own thread.
    pub fn run(
        &mut self,
        memory: &GuestMemoryMmap,
        machine: &dyn Machine,
        watch: Option<&dyn Watch>,
    ) -> End {
        let requests = self.requests();
        let _running = requests.enter();
        while requests.next() == Next::Run {
            if let Some(watch) = watch {
                watch.entering();
            }
            let handled = match self.run_once() {
                Ok(Some(message)) => {
                    if let Some(watch) = watch {
                        watch.exited(ExitKind::of(Intercept::of(&message)));
                        watch.told_by(sender(&message));
                    }
                    self.handle(&message, memory, machine)
                }
                Ok(None) => {
                    if let Some(watch) = watch {
                        watch.exited(ExitKind::Interrupted);
                    }
                    self.counters.exits(ExitKind::Interrupted).bump();
                    Ok(())
                }
                Err(error) => Err(error.into()),
            };
            if let Err(reason) = handled {
                return End::Crashed(Box::new(self.crash(reason)));
            }
        }
        End::Stopped
    }

    fn handle(
        &mut self,
        message: &hv_message,
        memory: &GuestMemoryMmap,
        machine: &dyn Machine,
    ) -> Result<(), CrashReason> {
        let intercept = Intercept::of(message);
        let kind = ExitKind::of(intercept);
        self.counters.exits(kind).bump();
        self.history.record(kind, intercept);
        match intercept {
            Intercept::Port(access)
                if !access.is_string() && access.header().instruction_length() > 0 =>
            {
                self.port(access, machine)?;
            }
            Intercept::Port(access) => {
                self.emulate(access.instruction_bytes(), None, memory, machine)?;
            }
            Intercept::Memory(access) => {
                self.emulate(access.instruction_bytes(), hint(access), memory, machine)?;
            }
            Intercept::Msr(access) => self.msr(access)?,
            Intercept::Cpuid(message) => {
                let length = message.header.instruction_length();
                let rip = { message.header.rip }.wrapping_add(length.into());
                let mut after = self.load()?;
                let before = after.clone();
                after.rip = rip;
                after.gpr[cpu::RAX] = message.default_result_rax;
                after.gpr[cpu::RCX] = message.default_result_rcx;
                after.gpr[cpu::RDX] = message.default_result_rdx;
                after.gpr[cpu::RBX] = message.default_result_rbx;
                self.store(&before, &after)?;
            }
            Intercept::Eoi { vector } => machine.end_of_interrupt(vector),
            Intercept::Notification => {}
            Intercept::Exception(message) => {
                return Err(CrashReason::Exception(message.exception_vector));
            }
            Intercept::Halt(_) => return Err(CrashReason::Halted),
            Intercept::Unrecoverable(_) => return Err(CrashReason::TripleFault),
            Intercept::InvalidRegister => return Err(CrashReason::InvalidRegister),
            Intercept::UnsupportedFeature => return Err(CrashReason::UnsupportedFeature),
            Intercept::Unknown(kind) => return Err(CrashReason::Unknown(kind)),
        }
        Ok(())
    }

    /// `in` and `out` with a register: nearly every exit of a booting guest, so nothing but the device and the page.
    fn port(&mut self, access: PortAccess<'_>, machine: &dyn Machine) -> Result<(), VpError> {
        let rip = access
            .header()
            .rip()
            .wrapping_add(access.header().instruction_length());
        let width = access.width().clamp(1, 4);
        let rax = access.rax();
        if access.is_write() {
            machine.port_write(access.port(), &rax.to_le_bytes()[..width]);
            return self.advance(rip, None);
        }
        let mut bytes = [0; 8];
        machine.port_read(access.port(), &mut bytes[..width]);
        let value = u64::from_le_bytes(bytes);
        // A 32-bit result clears the upper half of RAX; narrower ones leave the rest as it is.
        let kept = if width == 4 {
            0
        } else {
            rax & (u64::MAX << (8 * width))
        };
        self.advance(rip, Some((cpu::RAX, kept | value)))
    }

    /// MSRs nobody implements read as zero and ignore what is written, as the hypervisor itself treats them.
    fn msr(&mut self, access: MsrAccess<'_>) -> Result<(), VpError> {
        self.counters.unknown_msrs.bump();
        let rip = access
            .header()
            .rip()
            .wrapping_add(access.header().instruction_length().max(2));
        if access.is_write() {
            return self.advance(rip, None);
        }
        let mut after = self.load()?;
        let before = after.clone();
        after.rip = rip;
        after.gpr[cpu::RAX] = 0;
        after.gpr[cpu::RDX] = 0;
        self.store(&before, &after)
    }

    fn emulate(
        &mut self,
        bytes: &[u8],
        hint: Option<Hint>,
        memory: &GuestMemoryMmap,
        machine: &dyn Machine,
    ) -> Result<(), CrashReason> {
        self.counters.emulated.bump();
        let before = self.load()?;
        let mut after = before.clone();
        let mut vectors = Vectors(self);
        let exit = Exit::new(bytes).with_hint(hint).with_vectors(&mut vectors);
        let outcome = emulate(&mut after, memory, machine, exit)?;
        self.store(&before, &after)?;
        match outcome {
            Outcome::Retired | Outcome::Continue => Ok(()),
            Outcome::Fault(fault) => Ok(self.inject(fault)?),
        }
    }

    fn crash(&self, reason: CrashReason) -> Crash {
        Crash {
            vp: self.index(),
            reason,
            registers: self.load().ok(),
            history: self.history.to_string(),
        }
    }
}

/// The hypervisor's translation of the access, where the message carries one.
fn hint(access: MemoryAccess<'_>) -> Option<Hint> {
    access.gva().map(|gva| Hint {
        gva,
        gpa: access.gpa(),
        write: access.is_write(),
    })
}

impl fmt::Display for Crash {
    /// A report for a person: what, where, and what led there.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VP {}: {}", self.vp, self.reason)?;
        let mut source = std::error::Error::source(&self.reason);
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        writeln!(f)?;
        if let Some(registers) = &self.registers {
            write_registers(f, registers)?;
        }
        write!(f, "last exits:\n{}", self.history)
    }
}

fn write_registers(f: &mut fmt::Formatter<'_>, state: &Cpu) -> fmt::Result {
    const GENERAL: [&str; 16] = [
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12",
        "r13", "r14", "r15",
    ];
    const SEGMENTS: [&str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];
    writeln!(f, "  rip {:016x}  rflags {:08x}", state.rip, state.rflags)?;
    for (row, names) in GENERAL.chunks(4).enumerate() {
        for (column, name) in names.iter().enumerate() {
            write!(f, "  {name:<3} {:016x}", state.gpr[row * 4 + column])?;
        }
        writeln!(f)?;
    }
    writeln!(
        f,
        "  cr0 {:016x}  cr3 {:016x}  cr4 {:016x}  efer {:x}",
        state.cr0, state.cr3, state.cr4, state.efer
    )?;
    for (name, segment) in SEGMENTS.iter().zip(&state.segments) {
        writeln!(
            f,
            "  {name}  {:04x}  base {:016x}  limit {:08x}  attributes {:04x}",
            segment.selector, segment.base, segment.limit, segment.attributes
        )?;
    }
    Ok(())
}
