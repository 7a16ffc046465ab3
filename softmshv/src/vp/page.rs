//! The three pages a client maps from a VP's descriptor: registers, intercept message, GHCB.
//!
//! The register page is valid while the VP is stopped. The client reads registers from it and writes them back,
//! setting a bit per class it wrote; the next run takes those classes over. XMM registers are in the page only
//! when the intercepted instruction uses one (reading them from KVM would cost every exit a system call), but
//! are taken over whenever their bit is set.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};

use kvm_bindings::{kvm_regs, kvm_segment};
use mshv_bindings::{
    HV_X64_REGISTER_CLASS_FLAGS, HV_X64_REGISTER_CLASS_GENERAL, HV_X64_REGISTER_CLASS_IP,
    HV_X64_REGISTER_CLASS_SEGMENT, HV_X64_REGISTER_CLASS_XMM, hv_message, hv_u128,
    hv_vp_register_page,
};

use super::context::Stopped;
use super::registers::event;
use super::registers::segment::{from_hv, to_hv};
use crate::errno::Errno;

const PAGE: usize = 0x1000;
const COUNT: usize = 3;
const VERSION: u16 = 1;

/// The pages, shared with the client through a memfd that cannot change size.
pub(super) struct Pages {
    memfd: OwnedFd,
    base: NonNull<u8>,
}

// SAFETY: the mapping belongs to the object; all access goes through raw copies, since the client may write at any
// time from any thread anyway.
unsafe impl Send for Pages {}
// SAFETY: see above.
unsafe impl Sync for Pages {}

/// What the client wrote into the register page.
pub(super) struct Dirty {
    /// The page as the client left it.
    pub(super) page: hv_vp_register_page,
    classes: u32,
}

impl Dirty {
    fn has(&self, class: u32) -> bool {
        self.classes & 1 << class != 0
    }

    /// Writes general registers, RIP and RFLAGS of the dirty classes into `regs`; false when none is dirty.
    pub(super) fn apply_regs(&self, regs: &mut kvm_regs) -> bool {
        // SAFETY: the union's variants are all plain integers.
        let (gp, rip, rflags) = unsafe {
            let all = self.page.__bindgen_anon_1.__bindgen_anon_1;
            (all.__bindgen_anon_1.gp_registers, all.rip, all.rflags)
        };
        if self.has(HV_X64_REGISTER_CLASS_GENERAL) {
            set_gp(regs, &gp);
        }
        if self.has(HV_X64_REGISTER_CLASS_IP) {
            regs.rip = rip;
        }
        if self.has(HV_X64_REGISTER_CLASS_FLAGS) {
            regs.rflags = rflags;
        }
        [
            HV_X64_REGISTER_CLASS_GENERAL,
            HV_X64_REGISTER_CLASS_IP,
            HV_X64_REGISTER_CLASS_FLAGS,
        ]
        .into_iter()
        .any(|class| self.has(class))
    }

    /// The segments ES, CS, SS, DS, FS, GS, when their class is dirty.
    pub(super) fn segments(&self) -> Option<[kvm_segment; 6]> {
        // SAFETY: the union's variants are all plain integers.
        let segments = unsafe { self.page.__bindgen_anon_3.segment_registers };
        self.has(HV_X64_REGISTER_CLASS_SEGMENT)
            .then(|| segments.map(|segment| from_hv(&segment)))
    }

    /// XMM0 to XMM5, when their class is dirty.
    pub(super) fn xmm(&self) -> Option<[hv_u128; 6]> {
        // SAFETY: the union's variants are all plain integers.
        let xmm = unsafe { self.page.__bindgen_anon_2.xmm_registers };
        self.has(HV_X64_REGISTER_CLASS_XMM).then_some(xmm)
    }
}

impl Pages {
    /// Makes the pages, all zero.
    ///
    /// # Errors
    /// Those of `memfd_create` and `mmap`.
    pub(super) fn new() -> Result<Self, Errno> {
        // SAFETY: a C string and a flag word.
        let fd = unsafe {
            libc::memfd_create(
                c"mshv_vp".as_ptr(),
                libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING,
            )
        };
        if fd < 0 {
            return Err(Errno::last());
        }
        // SAFETY: just made, owned by nobody else.
        let memfd = unsafe { OwnedFd::from_raw_fd(fd) };
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: plain system calls on our own descriptor; the mapping is at an address the kernel chooses.
        let base = unsafe {
            if libc::ftruncate(fd, (COUNT * PAGE) as libc::off_t) < 0
                || libc::fcntl(fd, libc::F_ADD_SEALS, seals) < 0
            {
                return Err(Errno::last());
            }
            libc::mmap(
                ptr::null_mut(),
                COUNT * PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                memfd.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        let base = NonNull::new(base.cast()).ok_or(Errno(libc::ENOMEM))?;
        Ok(Self { memfd, base })
    }

    /// The descriptor behind the pages; page `n` is at offset `n` × 4096.
    pub(super) fn memfd(&self) -> &OwnedFd {
        &self.memfd
    }

    fn registers(&self) -> *mut hv_vp_register_page {
        self.base.as_ptr().cast()
    }

    /// Publishes the registers of a stopped VP.
    pub(super) fn publish(&self, stopped: &Stopped<'_>, xmm: Option<[hv_u128; 6]>) {
        let (regs, sregs) = (stopped.regs, stopped.sregs);
        let mut page = hv_vp_register_page {
            version: VERSION,
            isvalid: 1,
            cr0: sregs.cr0,
            cr3: sregs.cr3,
            cr4: sregs.cr4,
            cr8: sregs.cr8,
            efer: sregs.efer,
            dr7: stopped.dr7,
            xfem: stopped.xfem,
            ..Default::default()
        };
        page.pending_interruption.as_uint64 = event::pending_interruption(stopped.events);
        page.interrupt_state.as_uint64 = event::interrupt_state(stopped.events);
        page.__bindgen_anon_1.registers = gp(regs);
        page.__bindgen_anon_3.segment_registers = segments(stopped).map(|segment| to_hv(&segment));
        if let Some(xmm) = xmm {
            page.__bindgen_anon_2.xmm_registers = xmm;
        }
        // SAFETY: the page is mapped for as long as `self` lives and large enough; a client that reads while its own
        // VP runs sees torn values, as on the hypervisor.
        unsafe { ptr::write_volatile(self.registers(), page) };
    }

    /// Takes what the client wrote. What it writes while the page is not valid is lost, as on the hypervisor.
    pub(super) fn take(&self) -> Option<Dirty> {
        // SAFETY: as in `publish`; every bit pattern is a valid page.
        unsafe {
            let at = self.registers();
            let dirty = ptr::addr_of_mut!((*at).dirty);
            let classes = dirty.read_unaligned();
            if classes == 0 || !self.is_valid() {
                return None;
            }
            dirty.write_unaligned(0);
            Some(Dirty {
                page: ptr::read_volatile(at),
                classes,
            })
        }
    }

    /// Marks the page invalid: the VP is about to run.
    pub(super) fn invalidate(&self) {
        // SAFETY: as in `publish`.
        unsafe {
            let at = self.registers();
            ptr::addr_of_mut!((*at).isvalid).write_volatile(0);
            ptr::addr_of_mut!((*at).dirty).write_unaligned(0);
        }
    }

    /// Whether the page holds the registers of a stopped VP.
    pub(super) fn is_valid(&self) -> bool {
        // SAFETY: as in `publish`.
        unsafe { ptr::addr_of!((*self.registers()).isvalid).read_volatile() != 0 }
    }

    /// Puts a copy of the message in the second page.
    pub(super) fn post(&self, message: &hv_message) {
        // SAFETY: the second page is mapped and larger than a message.
        unsafe { ptr::write_volatile(self.base.as_ptr().add(PAGE).cast(), *message) };
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, and nothing refers to it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), COUNT * PAGE) };
    }
}

/// General registers in the order of the hypervisor, RIP, RFLAGS.
fn gp(regs: &kvm_regs) -> [u64; 18] {
    [
        regs.rax,
        regs.rcx,
        regs.rdx,
        regs.rbx,
        regs.rsp,
        regs.rbp,
        regs.rsi,
        regs.rdi,
        regs.r8,
        regs.r9,
        regs.r10,
        regs.r11,
        regs.r12,
        regs.r13,
        regs.r14,
        regs.r15,
        regs.rip,
        regs.rflags,
    ]
}

fn set_gp(regs: &mut kvm_regs, gp: &[u64; 16]) {
    [
        regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi, regs.r8,
        regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ] = *gp;
}

/// Segments in the order of the hypervisor.
fn segments(stopped: &Stopped<'_>) -> [kvm_segment; 6] {
    let sregs = stopped.sregs;
    [sregs.es, sregs.cs, sregs.ss, sregs.ds, sregs.fs, sregs.gs]
}
