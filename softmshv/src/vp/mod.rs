//! A virtual processor: everything behind a VP's file descriptor.
//!
//! ```text
//!   mod        the interface: run, registers, state, translation, CPUID
//!   engine     one KVM_RUN and what follows: exits become messages, or nothing
//!   ├ context  registers, shared with KVM           ├ signals  EINTR as the driver has it
//!   ├ fault    which access of an instruction       ├ decode   … the instruction itself
//!   │          left memory                          ├ walk     … guest page tables
//!   ├ port     IN, OUT, INS, OUTS                   ├ store    stores KVM has carried out
//!   ├ msr      RDMSR, WRMSR                         │
//!   ├ cpuid    the CPUID table                      ├ probe    how precise this KVM is
//!   │                                               └ ahead    … and what to do if it is not
//!   worker, halt     the thread that runs it where the hypervisor schedules
//!   message, page                  what the client sees when the VP has stopped
//!   registers, state, xsave        what it reads and writes then
//!   run_time                       how long it has run, at any time
//! ```
//!
//! What the client must see is what the Microsoft Hypervisor shows: an intercepted instruction has *not* run, and the
//! client moves RIP. KVM's habits differ from exit to exit; each file says how it gets from one to the other.

mod ahead;
mod context;
mod cpuid;
mod decode;
mod engine;
mod fault;
mod halt;
mod message;
mod msr;
mod page;
mod port;
mod probe;
mod registers;
mod run_time;
mod signals;
mod state;
mod store;
#[cfg(test)]
mod tests;
mod walk;
mod worker;
mod xsave;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::Duration;

use mshv_bindings::{
    self as hv, HV_TRANSLATE_GVA_ENFORCE_SMAP, HV_TRANSLATE_GVA_OVERRIDE_SMAP,
    HV_TRANSLATE_GVA_PRIVILEGE_EXEMPT, HV_TRANSLATE_GVA_SET_PAGE_TABLE_BITS,
    HV_TRANSLATE_GVA_SUPERVISOR_ACCESS, HV_TRANSLATE_GVA_USER_ACCESS,
    HV_TRANSLATE_GVA_VALIDATE_EXECUTE, HV_TRANSLATE_GVA_VALIDATE_READ,
    HV_TRANSLATE_GVA_VALIDATE_WRITE, hv_register_assoc, hv_register_value, hv_u128,
};

use crate::config::config;
use crate::errno::{Errno, HvStatus};
use crate::lps::Turn;
use crate::memory::Kick;
use crate::partition::Partition;
use crate::trace;
use engine::{Engine, Next};
pub(crate) use halt::HaltStat;
use page::Pages;
use run_time::RunTime;
use signals::Held;
use walk::{Access, Paging, WalkError};
use worker::Worker;

const VP_RUNTIME: u32 = hv::hv_register_name_HV_REGISTER_VP_RUNTIME;

/// How long to wait between two attempts to get a VP out of the guest.
const KICK_INTERVAL: Duration = Duration::from_micros(50);

/// Whether KVM stops before an instruction whose memory access it cannot serve: guest-physical space without memory
/// then wants background slots. If not, VPs run one instruction at a time and need none.
pub(crate) fn precise() -> bool {
    probe::stops_before_access()
}

/// Whether CPUID can be intercepted. KVM answers it by itself; only a VP that runs one instruction at a time sees it
/// coming.
pub(crate) fn can_intercept_cpuid() -> bool {
    !precise()
}

/// One virtual processor.
///
/// Any thread may call anything at any time. What reads or writes a VP that runs gets it out of the guest for that
/// moment; `run` does not return for it.
pub(crate) struct Vp {
    partition: Arc<Partition>,
    pages: Pages,
    kick: Arc<Kick>,
    engine: Mutex<Engine>,
    /// Threads that wait for the engine while it runs.
    visitors: AtomicU32,
    run_time: RunTime,
    /// The thread that runs it, where the hypervisor schedules; elsewhere the client's do.
    worker: Option<Worker>,
}

/// A message as the client gets it.
type Message = [u8; 256];

/// What ends a stretch in the guest, besides a message.
#[derive(Clone, Copy)]
enum Until<'a> {
    /// A signal for the client's thread, which this is.
    Signal,
    /// The VP's turn on its logical processor is over.
    Over(&'a Turn),
}

impl Vp {
    /// Creates VP `index` of a partition, in the state after reset: the first VP runnable, the others waiting for a
    /// startup IPI.
    ///
    /// # Errors
    /// What KVM says.
    pub(crate) fn new(partition: &Arc<Partition>, index: u32) -> Result<Self, Errno> {
        let mut engine = Engine::new(partition, index)?;
        let kick = Arc::new(Kick::new(
            &raw mut engine.context.kvm_run_mut().immediate_exit,
        ));
        let pages = Pages::new()?;
        if config().register_page {
            pages.publish(&engine.context.stopped()?, None);
        }
        partition.memory.add_vp(Arc::clone(&kick));
        let worker = if config().hypervisor_schedules {
            let halt = HaltStat::of(engine.context.vcpu());
            let turn = Turn::new(partition, Arc::clone(&kick), halt);
            Some(Worker::start(index, turn)?)
        } else {
            None
        };
        Ok(Self {
            partition: Arc::clone(partition),
            pages,
            kick,
            engine: Mutex::new(engine),
            visitors: AtomicU32::new(0),
            run_time: RunTime::default(),
            worker,
        })
    }

    /// The memory behind the pages a client maps: registers, intercept message, GHCB.
    pub(crate) fn memfd(&self) -> &OwnedFd {
        self.pages.memfd()
    }

    /// `MSHV_RUN_VP`: lets the guest run until an intercept, and returns the message about it.
    ///
    /// # Errors
    /// `EINTR` when a signal arrived first, `EFAULT` when memory the client mapped cannot be used, what KVM says.
    pub(crate) fn run(self: &Arc<Self>) -> Result<Message, Errno> {
        if let Some(worker) = &self.worker {
            return worker.run(self);
        }
        let held = Held::new();
        self.begin()?;
        if let Some(message) = self.stretch(&held, Until::Signal)? {
            return Ok(message);
        }
        self.suspend()?;
        Err(Errno(libc::EINTR))
    }

    /// Takes over what the client wrote while the VP was stopped; from here on it counts as running.
    fn begin(&self) -> Result<(), Errno> {
        self.run_time.runs_here();
        let mut engine = self.lock();
        if let Some(dirty) = self.pages.take() {
            engine.take_page(&dirty)?;
        }
        self.pages.invalidate();
        (engine.intercept_suspend, engine.explicit_suspend) = (false, false);
        Ok(())
    }

    /// A stretch in the guest, on the calling thread. `None`: it ended because of `until`, and the VP counts as running
    /// still.
    fn stretch(&self, held: &Held, until: Until<'_>) -> Result<Option<Message>, Errno> {
        let mut engine = self.lock();
        loop {
            if self.visitors.load(Ordering::Acquire) != 0 {
                drop(engine);
                while self.visitors.load(Ordering::Acquire) != 0 {
                    thread::yield_now();
                }
                engine = self.lock();
            }
            if let Until::Over(turn) = until
                && turn.is_over()
            {
                return Ok(None);
            }
            match engine.step(&self.kick, held)? {
                Next::Again => {}
                Next::Interrupted => {
                    let kicked =
                        std::mem::take(&mut engine.context.kvm_run_mut().immediate_exit) != 0;
                    if held.client_is_signalled(kicked) && matches!(until, Until::Signal) {
                        return Ok(None);
                    }
                }
                Next::Stop(mut stopped, uses_xmm) => {
                    stopped.header.__bindgen_anon_1.sender = self.partition.id;
                    engine.intercept_suspend = true;
                    let xmm = if uses_xmm { Some(engine.xmm()?) } else { None };
                    self.publish(&engine, xmm)?;
                    self.pages.post(&stopped);
                    trace::intercept({ stopped.header }.message_type);
                    return Ok(Some(message::bytes(&stopped)));
                }
            }
        }
    }

    /// Stops a VP that has no message: a signal came first.
    fn suspend(&self) -> Result<(), Errno> {
        let mut engine = self.lock();
        engine.explicit_suspend = true;
        self.publish(&engine, None)
    }

    /// Shows the registers of the stopped VP in its page.
    fn publish(&self, engine: &Engine, xmm: Option<[hv_u128; 6]>) -> Result<(), Errno> {
        if config().register_page {
            self.pages.publish(&engine.context.stopped()?, xmm);
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Engine> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does `work` on the engine, out of the guest if need be, with what the client wrote into the register page taken
    /// over before and the page right again after.
    fn visit<R>(&self, work: impl FnOnce(&mut Engine) -> R) -> Result<R, Errno> {
        self.visitors.fetch_add(1, Ordering::AcqRel);
        let mut engine = loop {
            match self.engine.try_lock() {
                Ok(engine) => break engine,
                Err(TryLockError::Poisoned(poisoned)) => break poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => {
                    self.kick.kick();
                    thread::sleep(KICK_INTERVAL);
                }
            }
        };
        let result = self.visit_locked(&mut engine, work);
        drop(engine);
        self.visitors.fetch_sub(1, Ordering::AcqRel);
        result
    }

    fn visit_locked<R>(
        &self,
        engine: &mut Engine,
        work: impl FnOnce(&mut Engine) -> R,
    ) -> Result<R, Errno> {
        if let Some(dirty) = self.pages.take() {
            engine.take_page(&dirty)?;
        }
        engine.update_configuration()?;
        let result = work(engine);
        engine.context.forget_unshared();
        if self.pages.is_valid() {
            let xmm = engine.xmm()?;
            self.pages.publish(&engine.context.stopped()?, Some(xmm));
        }
        Ok(result)
    }

    /// `HVCALL_GET_VP_REGISTERS`: the status, and how many of `names` were read. Who asks for nothing but the run time does not
    /// disturb the VP.
    pub(crate) fn get_registers(
        &self,
        names: &[u32],
        values: &mut [hv_register_value],
    ) -> (HvStatus, usize) {
        if names.iter().all(|name| *name == VP_RUNTIME) {
            values.fill_with(|| registers::word(self.run_time.units()));
            return (HvStatus::SUCCESS, names.len());
        }
        let read = |engine: &mut Engine| {
            for (done, (name, value)) in names.iter().zip(values).enumerate() {
                if *name == VP_RUNTIME {
                    *value = registers::word(self.run_time.units());
                    continue;
                }
                match registers::get(engine, *name) {
                    Ok(got) => *value = got,
                    Err(status) => return (status, done),
                }
            }
            (HvStatus::SUCCESS, names.len())
        };
        self.visit(read).unwrap_or((HvStatus::INVALID_VP_STATE, 0))
    }

    /// `HVCALL_SET_VP_REGISTERS`: the status, and how many of `assocs` were written.
    pub(crate) fn set_registers(&self, assocs: &[hv_register_assoc]) -> (HvStatus, usize) {
        let write = |engine: &mut Engine| {
            for (done, assoc) in assocs.iter().enumerate() {
                if let Err(status) = registers::set(engine, assoc) {
                    return (status, done);
                }
                if { assoc.name } == VP_RUNTIME {
                    // SAFETY: every bit pattern is a number.
                    self.run_time.set(unsafe { assoc.value.reg64 });
                }
            }
            (HvStatus::SUCCESS, assocs.len())
        };
        self.visit(write).unwrap_or((HvStatus::INVALID_VP_STATE, 0))
    }

    /// `HVCALL_TRANSLATE_VIRTUAL_ADDRESS`: the result code and the guest-physical address. Only page tables have to
    /// be in memory: an address that maps to nothing translates, as MMIO does. Where a table is not, its address is
    /// the answer.
    pub(crate) fn translate(&self, flags: u64, gva: u64) -> (u32, u64) {
        let walk = |engine: &mut Engine| {
            let context = &engine.context;
            let mut paging = Paging::new(context.sregs(), context.regs().rflags);
            let access = access(&mut paging, flags);
            paging.translate(&engine.partition.memory, gva, access)
        };
        match self.visit(walk) {
            Ok(Ok(gpa)) => (
                hv::hv_translate_gva_result_code_HV_TRANSLATE_GVA_SUCCESS,
                gpa,
            ),
            Ok(Err(WalkError::TableUnmapped { gpa })) => (
                hv::hv_translate_gva_result_code_HV_TRANSLATE_GVA_GPA_UNMAPPED,
                gpa,
            ),
            Ok(Err(WalkError::Privilege)) => (
                hv::hv_translate_gva_result_code_HV_TRANSLATE_GVA_PRIVILEGE_VIOLATION,
                0,
            ),
            Ok(Err(WalkError::ReservedBits)) => (
                hv::hv_translate_gva_result_code_HV_TRANSLATE_GVA_INVALIDE_PAGE_TABLE_FLAGS,
                0,
            ),
            Ok(Err(WalkError::NotPresent)) | Err(_) => (
                hv::hv_translate_gva_result_code_HV_TRANSLATE_GVA_PAGE_NOT_PRESENT,
                0,
            ),
        }
    }

    /// `HVCALL_GET_VP_CPUID_VALUES`: EAX, EBX, ECX, EDX with these contents of XCR0 (0: those of the VP).
    pub(crate) fn cpuid_values(&self, leaf: u32, subleaf: u32, xfem: u64, _xss: u64) -> [u32; 4] {
        let look_up = |engine: &mut Engine| {
            let xfem = match xfem {
                0 => engine.context.stopped().map_or(1, |stopped| stopped.xfem),
                chosen => chosen,
            };
            engine
                .cpuid
                .values(leaf, subleaf, engine.context.sregs().cr4, xfem)
        };
        self.visit(look_up).unwrap_or([0; 4])
    }

    /// How many bytes a kind of state is.
    ///
    /// # Errors
    /// `EINVAL` for a kind that does not exist.
    pub(crate) fn state_size(&self, kind: u8) -> Result<usize, Errno> {
        state::size(&self.partition, kind)
    }

    /// `MSHV_GET_VP_STATE` of one kind, into a buffer of its size.
    ///
    /// # Errors
    /// `EINVAL` for a kind that does not exist or a buffer that is too small; what KVM says.
    pub(crate) fn get_state(&self, kind: u8, data: &mut [u8]) -> Result<(), Errno> {
        self.visit(|engine| state::get(engine, kind, data))?
    }

    /// `MSHV_SET_VP_STATE` of one kind.
    ///
    /// # Errors
    /// `EINVAL` for a kind that does not exist or data that is no such state; what KVM says.
    pub(crate) fn set_state(&self, kind: u8, data: &[u8]) -> Result<(), Errno> {
        self.visit(|engine| state::set(engine, kind, data))?
    }
}

/// The access a translation is asked for, and for whom.
fn access(paging: &mut Paging, flags: u64) -> Access {
    let has = |flag: u32| flags & u64::from(flag) != 0;
    if has(HV_TRANSLATE_GVA_ENFORCE_SMAP) {
        paging.smap = true;
    }
    if has(HV_TRANSLATE_GVA_OVERRIDE_SMAP) {
        paging.smap = false;
    }
    let exempt = has(HV_TRANSLATE_GVA_PRIVILEGE_EXEMPT);
    Access {
        read: has(HV_TRANSLATE_GVA_VALIDATE_READ) && !exempt,
        write: has(HV_TRANSLATE_GVA_VALIDATE_WRITE),
        execute: has(HV_TRANSLATE_GVA_VALIDATE_EXECUTE),
        user: (paging.user || has(HV_TRANSLATE_GVA_USER_ACCESS))
            && !has(HV_TRANSLATE_GVA_SUPERVISOR_ACCESS)
            && !exempt,
        set_bits: has(HV_TRANSLATE_GVA_SET_PAGE_TABLE_BITS),
    }
}
