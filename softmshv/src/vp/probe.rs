//! What this KVM does when a guest accesses a slot without memory: stop before the instruction, or emulate it first.
//!
//! With hardware virtualization the access ends `KVM_RUN` with `EFAULT`, the registers as they were before. A KVM that
//! emulates real mode in software reports an MMIO exit instead, for a store after the instruction. There VPs run one
//! instruction at a time, so that the registers before each are known.

use std::ptr;
use std::sync::OnceLock;

use kvm_bindings::{KVM_EXIT_MMIO, kvm_userspace_memory_region};
use kvm_ioctls::Kvm;

use crate::errno::Errno;

const CODE: u64 = 0x1000;
const NOTHING: u64 = 0x2000;
const PAGE: usize = 0x1000;

/// A page of this process for the probe's guest.
struct Page(*mut libc::c_void);

impl Page {
    fn new(protection: i32) -> Result<Self, Errno> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh anonymous page wherever the kernel likes.
        let page = unsafe { libc::mmap(ptr::null_mut(), PAGE, protection, flags, -1, 0) };
        if page == libc::MAP_FAILED {
            Err(Errno::last())
        } else {
            Ok(Self(page))
        }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; the virtual machine that used it is gone or never runs again.
        unsafe { libc::munmap(self.0, PAGE) };
    }
}

/// Whether KVM stops before an instruction whose access it cannot serve. Asked of KVM once.
pub(super) fn stops_before_access() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    // A probe that fails says nothing; the slow way is always right.
    *ANSWER.get_or_init(|| {
        Kvm::new()
            .map_err(Errno::from)
            .and_then(|kvm| probe(&kvm))
            .unwrap_or(false)
    })
}

fn probe(kvm: &Kvm) -> Result<bool, Errno> {
    // mov [0], al in real mode, with DS at the page that is not there.
    const STORE: [u8; 3] = [0xa2, 0, 0];
    let (code, nothing) = (
        Page::new(libc::PROT_READ | libc::PROT_WRITE)?,
        Page::new(libc::PROT_NONE)?,
    );
    // SAFETY: the page is writable and longer than the code.
    unsafe { ptr::copy_nonoverlapping(STORE.as_ptr(), code.0.cast(), STORE.len()) };
    let vm = kvm.create_vm()?;
    for (slot, gpa, page) in [(0, CODE, &code), (1, NOTHING, &nothing)] {
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: gpa,
            memory_size: PAGE as u64,
            userspace_addr: page.0 as u64,
            flags: 0,
        };
        // SAFETY: the pages outlive the virtual machine, which is dropped first.
        unsafe { vm.set_user_memory_region(region) }?;
    }
    let mut vcpu = vm.create_vcpu(0)?;
    let mut sregs = vcpu.get_sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    (sregs.ds.base, sregs.ds.selector) = (NOTHING, (NOTHING >> 4) as u16);
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    regs.rip = CODE;
    vcpu.set_regs(&regs)?;
    let stopped = match vcpu.run() {
        Ok(_) => vcpu.get_kvm_run().exit_reason != KVM_EXIT_MMIO,
        Err(error) => error.errno() == libc::EFAULT,
    };
    Ok(stopped && vcpu.get_regs()?.rip == CODE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_comes_to_an_answer() {
        let Ok(kvm) = Kvm::new() else {
            rota_tests::requires::skip("no usable /dev/kvm");
            return;
        };
        let answer = probe(&kvm).unwrap();
        eprintln!("KVM stops before an access it cannot serve: {answer}");
    }
}
