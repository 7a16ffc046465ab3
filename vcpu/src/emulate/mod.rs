//! The instruction emulator: executes the one instruction that the hypervisor intercepted.
//!
//! An MMIO or string port I/O intercept leaves the instruction unexecuted. [`emulate`] decodes it, resolves its operands through the
//! guest's segments and page tables, moves the bytes between registers, guest memory and the [`Bus`], sets flags and moves RIP:
//!
//! ```text
//! bytes ─ fetch ─▶ Instruction ─ execute ─▶ arithmetic │ bits │ exchange │ stack │ string │ vector
//!                                               └── operand ── segment ── view ─┬─ paging
//!                                                                               ├─ guest memory
//!                                                                               └─ Bus
//! ```
//!
//! An instruction that faults leaves registers, memory and devices untouched, except for the finished iterations of a repeated
//! string instruction. A guest cannot make the emulator panic: what it does not know is an [`EmulateError`] with the
//! instruction's name and bytes.
//!
//! ```
//! use vcpu::bus::Bus;
//! use vcpu::emulate::{Cpu, Exit, Outcome, emulate};
//! use vm_memory::{GuestAddress, GuestMemoryMmap};
//!
//! struct Register;
//! impl Bus for Register {
//!     fn mmio_read(&self, _gpa: u64, data: &mut [u8]) {
//!         data.fill(0x5a);
//!     }
//!     fn mmio_write(&self, _gpa: u64, _data: &[u8]) {}
//!     fn port_read(&self, _port: u16, _data: &mut [u8]) {}
//!     fn port_write(&self, _port: u16, _data: &[u8]) {}
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)])?;
//! let mut cpu = Cpu::default(); // real mode
//! cpu.segments[3].limit = 0xffff;
//! let outcome = emulate(&mut cpu, &memory, &Register, Exit::new(&[0xa1, 0x00, 0x80]))?; // mov ax,[0x8000]
//! assert_eq!((outcome, cpu.gpr[0], cpu.rip), (Outcome::Retired, 0x5a5a, 3));
//! # Ok(())
//! # }
//! ```

mod alu;
mod arithmetic;
mod bits;
pub mod cpu;
mod error;
mod exchange;
mod execute;
mod fetch;
mod operand;
mod paging;
mod ram;
mod segment;
mod shift;
mod stack;
mod string;
mod vector;
mod view;

use vm_memory::GuestMemoryBackend;

pub use self::cpu::{Cpu, Segment};
pub use self::error::{EmulateError, Fault, InstructionBytes};
pub use self::vector::VectorRegisters;
pub use self::view::Hint;

use self::error::Stop;
use self::execute::Flow;
use self::operand::Machine;
use self::view::GuestView;
use crate::bus::Bus;

/// What the intercept says about the instruction beside the registers.
#[derive(Default)]
pub struct Exit<'a> {
    bytes: &'a [u8],
    hint: Option<Hint>,
    vectors: Option<&'a mut dyn VectorRegisters>,
}

impl<'a> Exit<'a> {
    /// Starts from the instruction bytes in the intercept message. They may end early or be absent: what is missing is
    /// fetched from guest memory.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        Self {
            bytes,
            ..Self::default()
        }
    }

    /// Adds the translation of the intercepted access that the message carries.
    #[must_use]
    pub fn with_hint(self, hint: Option<Hint>) -> Self {
        Self { hint, ..self }
    }

    /// Adds access to the VP's vector registers, used only by instructions that name one.
    #[must_use]
    pub fn with_vectors(self, vectors: &'a mut dyn VectorRegisters) -> Self {
        Self {
            vectors: Some(vectors),
            ..self
        }
    }
}

/// How the emulation of an instruction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The instruction is done and RIP stands at the next one. If RFLAGS.TF was set before, a single-step #DB is due.
    Retired,
    /// A repeated string instruction has done its share: registers show its progress, RIP still points to it. Interrupts
    /// may be delivered before it goes on.
    Continue,
    /// The guest faults; RIP is unchanged.
    Fault(Fault),
}

/// Executes the instruction at `cpu.rip`.
///
/// Everything that is not in `memory` goes to `bus`. Only `cpu.gpr`, `cpu.rip` and `cpu.rflags` are ever changed.
///
/// # Errors
///
/// [`EmulateError`] where the instruction cannot be emulated at all. Nothing has been changed then, except by finished
/// iterations of a repeated string instruction.
pub fn emulate<M>(
    cpu: &mut Cpu,
    memory: &M,
    bus: &dyn Bus,
    exit: Exit<'_>,
) -> Result<Outcome, EmulateError>
where
    M: GuestMemoryBackend + ?Sized,
{
    let mut view = GuestView::new(cpu, memory, bus).with_hint(exit.hint);
    let result = fetch::fetch(cpu, &mut view, exit.bytes).and_then(|(instruction, bytes)| {
        let next = instruction.next_ip() & cpu.instruction_pointer_mask();
        let flow = Machine {
            cpu,
            view,
            vectors: exit.vectors,
            instruction,
            bytes,
        }
        .execute()?;
        Ok((flow, next))
    });
    match result {
        Ok((Flow::Repeat, _)) => {
            // An instruction breakpoint must not hit again on the way back into the instruction.
            cpu.rflags |= cpu::RF;
            Ok(Outcome::Continue)
        }
        Ok((flow, next)) => {
            cpu.rip = if let Flow::Jump(target) = flow {
                target
            } else {
                next
            };
            cpu.rflags &= !cpu::RF;
            Ok(Outcome::Retired)
        }
        Err(Stop::Fault(mut fault)) => {
            if cpu.is_real_mode() {
                fault.error_code = None;
            }
            Ok(Outcome::Fault(fault))
        }
        Err(Stop::Error(error)) => Err(error),
    }
}
