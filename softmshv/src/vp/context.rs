//! The registers of one KVM virtual CPU, kept in the page it shares with the kernel.
//!
//! With `KVM_CAP_SYNC_REGS` each `KVM_RUN` leaves general, control and segment registers and pending events in that
//! page, and takes back those marked dirty: neither an exit nor its answer costs a further system call.

use std::cell::Cell;

use kvm_bindings::{
    KVM_EXIT_IO_OUT, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_SYNC_X86_EVENTS,
    KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS, KVM_SYNC_X86_VALID_FIELDS, KVM_VCPUEVENT_VALID_SHADOW,
    kvm_guest_debug, kvm_regs, kvm_run, kvm_sregs, kvm_sync_regs, kvm_vcpu_events,
};
use kvm_ioctls::{Cap, KvmRunWrapper, VcpuExit, VcpuFd, VmFd};

use super::registers::control;
use crate::errno::Errno;

/// How many exits a pending completion may take to run dry: an instruction has few memory fragments.
const DRAIN_LIMIT: usize = 64;

/// The registers a message and the register page are made of.
pub(super) struct Stopped<'a> {
    /// The VP.
    pub(super) vp_index: u32,
    /// General registers, RIP, RFLAGS.
    pub(super) regs: &'a kvm_regs,
    /// Control and segment registers.
    pub(super) sregs: &'a kvm_sregs,
    /// Pending and injected events.
    pub(super) events: &'a kvm_vcpu_events,
    /// Debug control.
    pub(super) dr7: u64,
    /// XCR0.
    pub(super) xfem: u64,
}

/// How one `KVM_RUN` ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// An exit, with its `KVM_EXIT_*` reason; the details are in the shared page.
    Exit(u32),
    /// A signal, or `immediate_exit`.
    Interrupted,
    /// The VP was asleep and something woke it; run it again.
    Woken,
    /// The instruction at RIP accesses memory that is not there; it has not run.
    Fault {
        /// Where, when KVM says.
        gpa: Option<u64>,
    },
    /// The registers are not a state a processor can be in.
    Refused,
}

/// A port access, from the shared page.
#[derive(Debug, Clone, Copy)]
pub(super) struct PortAccess {
    /// The guest writes.
    pub(super) out: bool,
    /// 1, 2 or 4 bytes.
    pub(super) size: u8,
    /// The port.
    pub(super) port: u16,
    /// How many values KVM asks for at once.
    pub(super) count: u32,
    data_offset: u64,
}

impl PortAccess {
    /// An access of one value.
    #[cfg(test)]
    pub(super) fn new(out: bool, size: u8, port: u16) -> Self {
        Self {
            out,
            size,
            port,
            count: 1,
            data_offset: 0,
        }
    }
}

/// A memory access KVM could not make, from the shared page.
#[derive(Debug, Clone, Copy)]
pub(super) struct MmioAccess {
    /// Where.
    pub(super) gpa: u64,
    /// The guest writes: RIP is already behind the instruction.
    pub(super) write: bool,
    data: [u8; 8],
    len: usize,
}

impl MmioAccess {
    /// The bytes written.
    pub(super) fn data(&self) -> &[u8] {
        &self.data[..self.len]
    }

    /// A store.
    #[cfg(test)]
    pub(super) fn store(gpa: u64, bytes: &[u8]) -> Self {
        let mut data = [0; 8];
        data[..bytes.len()].copy_from_slice(bytes);
        Self {
            gpa,
            write: true,
            data,
            len: bytes.len(),
        }
    }
}

/// An MSR access, from the shared page.
#[derive(Debug, Clone, Copy)]
pub(super) struct MsrAccess {
    /// The MSR.
    pub(super) index: u32,
    /// Why KVM asks: `KVM_MSR_EXIT_REASON_*`.
    pub(super) reason: u32,
    /// The value being written.
    pub(super) data: u64,
}

/// A KVM virtual CPU and its registers.
pub(super) struct Context {
    vcpu: VcpuFd,
    shared: KvmRunWrapper,
    vp_index: u32,
    dirty: u32,
    /// DR7 and XCR0, which KVM does not share, while they are known to be right.
    unshared: Cell<Option<(u64, u64)>>,
}

impl Context {
    /// Creates the virtual CPU of VP `vp_index` in its reset state.
    ///
    /// # Errors
    /// What KVM says; `EOPNOTSUPP` when it cannot share registers.
    pub(super) fn new(vm: &VmFd, vp_index: u32) -> Result<Self, Errno> {
        let synced = vm.check_extension_int(Cap::SyncRegs) as u32;
        if synced & KVM_SYNC_X86_VALID_FIELDS != KVM_SYNC_X86_VALID_FIELDS {
            return Err(Errno(libc::EOPNOTSUPP));
        }
        let vcpu = vm.create_vcpu(u64::from(vp_index))?;
        // KVM maps APIC ids when a LAPIC is reset, but a new virtual processor is reset before it counts as one. Setting
        // its LAPIC once, to what it is, puts it on the map: else an INIT sent to it early is lost.
        vcpu.set_lapic(&vcpu.get_lapic()?)?;
        let shared = KvmRunWrapper::mmap_from_fd(&vcpu, vm.run_size())?;
        let mut context = Self {
            vcpu,
            shared,
            vp_index,
            dirty: 0,
            unshared: Cell::new(None),
        };
        context.kvm_run_mut().kvm_valid_regs = u64::from(KVM_SYNC_X86_VALID_FIELDS);
        context.reload()?;
        Ok(context)
    }

    /// Reads all registers from KVM, dropping changes not yet taken over.
    pub(super) fn reload(&mut self) -> Result<(), Errno> {
        let sync = kvm_sync_regs {
            regs: self.vcpu.get_regs()?,
            sregs: self.vcpu.get_sregs()?,
            events: self.vcpu.get_vcpu_events()?,
        };
        *self.sync_mut() = sync;
        self.dirty = 0;
        Ok(())
    }

    /// Reads all registers again, unless the client has changed some that KVM does not know yet.
    pub(super) fn refresh(&mut self) -> Result<(), Errno> {
        if self.dirty == 0 {
            self.reload()
        } else {
            Ok(())
        }
    }

    /// The calls registers are not part of: MSRs, FPU, LAPIC, ….
    pub(super) fn vcpu(&self) -> &VcpuFd {
        &self.vcpu
    }

    /// DR7 or XCR0 may have changed: by the guest, or by a call of [`Self::vcpu`].
    pub(super) fn forget_unshared(&self) {
        self.unshared.set(None);
    }

    /// The VP.
    pub(super) fn vp_index(&self) -> u32 {
        self.vp_index
    }

    fn kvm_run(&self) -> &kvm_run {
        self.shared.as_ref()
    }

    /// The page shared with KVM.
    pub(super) fn kvm_run_mut(&mut self) -> &mut kvm_run {
        self.shared.as_mut_ref()
    }

    fn sync(&self) -> &kvm_sync_regs {
        // SAFETY: on x86 the union holds the synchronised registers.
        unsafe { &self.kvm_run().s.regs }
    }

    fn sync_mut(&mut self) -> &mut kvm_sync_regs {
        // SAFETY: as in `sync`.
        unsafe { &mut self.kvm_run_mut().s.regs }
    }

    /// General registers, RIP, RFLAGS.
    pub(super) fn regs(&self) -> &kvm_regs {
        &self.sync().regs
    }

    /// Control and segment registers.
    pub(super) fn sregs(&self) -> &kvm_sregs {
        &self.sync().sregs
    }

    /// Pending and injected events.
    pub(super) fn events(&self) -> &kvm_vcpu_events {
        &self.sync().events
    }

    /// General registers, to be changed.
    pub(super) fn regs_mut(&mut self) -> &mut kvm_regs {
        self.dirty |= KVM_SYNC_X86_REGS;
        &mut self.sync_mut().regs
    }

    /// Control and segment registers, to be changed.
    pub(super) fn sregs_mut(&mut self) -> &mut kvm_sregs {
        self.dirty |= KVM_SYNC_X86_SREGS;
        &mut self.sync_mut().sregs
    }

    /// Events, to be changed. What others may change meanwhile (a pending NMI, SMM) is left to KVM unless the
    /// caller sets its `VALID` flag.
    pub(super) fn events_mut(&mut self) -> &mut kvm_vcpu_events {
        if self.dirty & KVM_SYNC_X86_EVENTS == 0 {
            self.dirty |= KVM_SYNC_X86_EVENTS;
            self.sync_mut().events.flags = KVM_VCPUEVENT_VALID_SHADOW;
        }
        &mut self.sync_mut().events
    }

    /// A copy of all registers, to go back to with [`Self::restore`].
    pub(super) fn snapshot(&self) -> kvm_sync_regs {
        *self.sync()
    }

    /// Goes back to general, control and segment registers taken earlier. Events stay as they are: KVM's.
    pub(super) fn restore(&mut self, snapshot: &kvm_sync_regs) {
        *self.regs_mut() = snapshot.regs;
        let bitmap = self.sregs().interrupt_bitmap;
        let sregs = self.sregs_mut();
        *sregs = snapshot.sregs;
        sregs.interrupt_bitmap = bitmap;
    }

    /// The state for messages and the register page.
    ///
    /// # Errors
    /// What KVM says when asked for registers it does not share.
    pub(super) fn stopped(&self) -> Result<Stopped<'_>, Errno> {
        let (dr7, xfem) = match self.unshared.get() {
            Some(known) => known,
            None => (self.vcpu.get_debug_regs()?.dr7, control::xcr0(&self.vcpu)?),
        };
        self.unshared.set(Some((dr7, xfem)));
        Ok(Stopped {
            vp_index: self.vp_index,
            regs: self.regs(),
            sregs: self.sregs(),
            events: self.events(),
            dr7,
            xfem,
        })
    }

    /// Makes each `KVM_RUN` end after one instruction.
    pub(super) fn single_step(&self) -> Result<(), Errno> {
        let debug = kvm_guest_debug {
            control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP,
            ..Default::default()
        };
        Ok(self.vcpu.set_guest_debug(&debug)?)
    }

    /// Lets the guest run until something happens.
    ///
    /// # Errors
    /// An error number that means neither a fault nor an interruption.
    pub(super) fn run(&mut self) -> Result<Outcome, Errno> {
        let changed = (self.dirty & KVM_SYNC_X86_SREGS != 0).then(|| self.snapshot());
        if self.dirty & KVM_SYNC_X86_SREGS != 0 {
            control::complete_efer(&mut self.sync_mut().sregs);
        }
        self.forget_unshared();
        self.kvm_run_mut().kvm_dirty_regs = u64::from(self.dirty);
        let ended = match self.vcpu.run() {
            Ok(VcpuExit::MemoryFault { gpa, .. }) => Ok(Outcome::Fault { gpa: Some(gpa) }),
            Ok(_) => Ok(Outcome::Exit(0)),
            Err(error) => match error.errno() {
                libc::EINTR => Ok(Outcome::Interrupted),
                libc::EAGAIN => Ok(Outcome::Woken),
                libc::EFAULT => Ok(Outcome::Fault { gpa: None }),
                libc::EINVAL if changed.is_some() => Ok(Outcome::Refused),
                errno => Err(Errno(errno)),
            },
        };
        match (ended, changed) {
            (Ok(Outcome::Refused), Some(changed)) => {
                *self.sync_mut() = changed;
                Ok(Outcome::Refused)
            }
            (Ok(outcome), _) => {
                self.dirty = 0;
                Ok(match outcome {
                    Outcome::Exit(_) => Outcome::Exit(self.kvm_run().exit_reason),
                    other => other,
                })
            }
            (Err(errno), _) => Err(errno),
        }
    }

    /// Gets rid of what KVM has pending for an instruction it believes userspace to have completed: lets it complete
    /// and nothing more, and takes the registers back to `to` (which holds the changes of the client, if there are
    /// any). Returns the RIP KVM had come to.
    ///
    /// # Errors
    /// `EIO` when KVM does not come to an end.
    pub(super) fn rewind(&mut self, to: &kvm_sync_regs) -> Result<u64, Errno> {
        let events = self.dirty & KVM_SYNC_X86_EVENTS;
        self.dirty = 0;
        self.drain()?;
        let rip = self.regs().rip;
        self.restore(to);
        if events != 0 {
            self.sync_mut().events = to.events;
            self.dirty |= events;
        }
        Ok(rip)
    }

    fn drain(&mut self) -> Result<(), Errno> {
        for _ in 0..DRAIN_LIMIT {
            self.kvm_run_mut().immediate_exit = 1;
            let outcome = self.run();
            self.kvm_run_mut().immediate_exit = 0;
            match outcome? {
                Outcome::Exit(kvm_bindings::KVM_EXIT_MMIO | kvm_bindings::KVM_EXIT_IO) => {}
                _ => return Ok(()),
            }
        }
        Err(Errno(libc::EIO))
    }

    /// The port access of an exit for `KVM_EXIT_IO`.
    pub(super) fn port_access(&self) -> PortAccess {
        // SAFETY: plain integers, whatever the exit was.
        let io = unsafe { self.kvm_run().__bindgen_anon_1.io };
        PortAccess {
            out: u32::from(io.direction) == KVM_EXIT_IO_OUT,
            size: io.size,
            port: io.port,
            count: io.count,
            data_offset: io.data_offset,
        }
    }

    /// The values of a port access: what the guest writes, or what it is to read.
    pub(super) fn port_data(&mut self, access: &PortAccess) -> &mut [u8] {
        let len = access.count as usize * usize::from(access.size);
        let page = std::ptr::from_mut(self.kvm_run_mut()).cast::<u8>();
        // SAFETY: KVM places the data at this offset within the mapping the wrapper made, of this length.
        unsafe { std::slice::from_raw_parts_mut(page.add(access.data_offset as usize), len) }
    }

    /// The access of an exit for `KVM_EXIT_MMIO`.
    pub(super) fn mmio_access(&self) -> MmioAccess {
        // SAFETY: plain integers, whatever the exit was.
        let mmio = unsafe { self.kvm_run().__bindgen_anon_1.mmio };
        MmioAccess {
            gpa: mmio.phys_addr,
            write: mmio.is_write != 0,
            data: mmio.data,
            len: (mmio.len as usize).min(mmio.data.len()),
        }
    }

    /// The access of an exit for `KVM_EXIT_X86_RDMSR` or `…_WRMSR`.
    pub(super) fn msr_access(&self) -> MsrAccess {
        // SAFETY: plain integers, whatever the exit was.
        let msr = unsafe { self.kvm_run().__bindgen_anon_1.msr };
        MsrAccess {
            index: msr.index,
            reason: msr.reason,
            data: msr.data,
        }
    }

    /// Answers an MSR exit: the value read, or the general protection fault the guest gets.
    pub(super) fn complete_msr(&mut self, answer: Option<u64>) {
        // SAFETY: the exit was for an MSR; the fields are plain integers.
        let msr = unsafe { &mut self.kvm_run_mut().__bindgen_anon_1.msr };
        msr.error = u8::from(answer.is_none());
        if let Some(data) = answer {
            msr.data = data;
        }
    }
}
