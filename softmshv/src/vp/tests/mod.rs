//! A VP over the real `/dev/kvm`: real-mode guests, one for each kind of intercept. They run on every KVM, also one
//! without hardware virtualization, which runs real mode in software.

mod memory;
mod ports;
mod processor;
mod registers;
mod running;

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::Kvm;
use mshv_bindings::{
    self as hv, hv_message, hv_register_assoc, hv_register_value, hv_vp_register_page,
    hv_x64_intercept_message_header, mshv_user_ioeventfd, mshv_user_mem_region,
};
use vmm_sys_util::eventfd::EventFd;

use super::registers::{NOTIFY_INTERRUPT, word};
use super::*;
use crate::intercepts::{ACCESS_EXECUTE, ACCESS_READ, ACCESS_WRITE, CpuidResult, Intercepts};
use crate::interrupts::Interrupts;
use crate::ioeventfd::IoEventFds;
use crate::memory::Memory;
use crate::partition::enable_irqchip;
use crate::property::{Processor, Properties};

/// The last page is for a test that maps and unmaps it.
const MEMORY: usize = 0x2_1000;
const CODE: u64 = 0x1000;
/// Nothing is mapped here.
const MMIO_SEGMENT: u16 = 0x4000;
const MMIO: u64 = 0x4_0000;

/// A partition with one VP in real mode, CS = 0, DS where nothing is mapped, ES = SS = 0.
struct Guest {
    partition: Arc<Partition>,
    vp: Arc<Vp>,
    ram: *mut u8,
}

impl Drop for Guest {
    fn drop(&mut self) {
        // SAFETY: mapped by `boot`; the VP that used it never runs again.
        unsafe { libc::munmap(self.ram.cast(), MEMORY) };
    }
}

/// A guest about to run `code`; `None` (and a line that says so) where there is no KVM.
fn boot(code: &[u8]) -> Option<Guest> {
    let Ok(kvm) = Kvm::new() else {
        rota_tests::requires::skip("no usable /dev/kvm");
        return None;
    };
    let vm = Arc::new(kvm.create_vm().unwrap());
    enable_irqchip(&vm).unwrap();
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
    let processor = Processor::of(&cpuid);
    let partition = Arc::new(Partition {
        id: 7,
        kvm: Arc::new(kvm),
        memory: Memory::new(Arc::clone(&vm), processor.physical_bits, precise()),
        interrupts: Interrupts::new(Arc::clone(&vm)),
        ioeventfds: IoEventFds::default(),
        properties: Properties::new(processor),
        intercepts: Intercepts::default(),
        cpuid,
        vm,
    });
    let (prot, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    );
    // SAFETY: a fresh mapping wherever the kernel likes.
    let ram = unsafe { libc::mmap(ptr::null_mut(), MEMORY, prot, flags, -1, 0) };
    assert_ne!(ram, libc::MAP_FAILED);
    let map = |pfn: u64, offset: usize, size: usize, flags: u8| {
        let region = mshv_user_mem_region {
            size: size as u64,
            guest_pfn: pfn,
            userspace_addr: ram as u64 + offset as u64,
            flags,
            rsvd: [0; 7],
        };
        partition.memory.set(&region, true).unwrap();
    };
    map(0, 0, 0x1_0000, 3);
    // Read-only memory at 0x10000.
    map(0x10, 0x1_0000, 0x1_0000, 2);
    partition.memory.write(CODE, code).unwrap();
    let vp = Arc::new(Vp::new(&partition, 0).unwrap());
    let guest = Guest {
        partition,
        vp,
        ram: ram.cast(),
    };
    guest.set(&[
        (hv::hv_register_name_HV_X64_REGISTER_RIP, CODE),
        (hv::hv_register_name_HV_X64_REGISTER_RSP, 0x8000),
        (hv::hv_register_name_HV_X64_REGISTER_RDX, 0x3f8),
        (hv::hv_register_name_HV_X64_REGISTER_RFLAGS, 2),
    ]);
    for (name, selector) in [
        (hv::hv_register_name_HV_X64_REGISTER_CS, 0),
        (hv::hv_register_name_HV_X64_REGISTER_DS, MMIO_SEGMENT),
        (hv::hv_register_name_HV_X64_REGISTER_ES, 0),
        (hv::hv_register_name_HV_X64_REGISTER_SS, 0),
    ] {
        guest.set_segment(name, selector);
    }
    Some(guest)
}

impl Guest {
    fn set(&self, registers: &[(u32, u64)]) {
        let assocs: Vec<_> = registers
            .iter()
            .map(|(name, value)| hv_register_assoc {
                name: *name,
                value: word(*value),
                ..Default::default()
            })
            .collect();
        assert_eq!(
            self.vp.set_registers(&assocs),
            (HvStatus::SUCCESS, assocs.len())
        );
    }

    fn set_segment(&self, name: u32, selector: u16) {
        let mut values = [hv_register_value::default()];
        self.vp.get_registers(&[name], &mut values);
        // SAFETY: the register is a segment.
        let segment = unsafe { &mut values[0].segment };
        segment.selector = selector;
        segment.base = u64::from(selector) << 4;
        let assoc = hv_register_assoc {
            name,
            value: values[0],
            ..Default::default()
        };
        assert_eq!(self.vp.set_registers(&[assoc]), (HvStatus::SUCCESS, 1));
    }

    fn get(&self, name: u32) -> u64 {
        let mut values = [hv_register_value::default()];
        assert_eq!(
            self.vp.get_registers(&[name], &mut values),
            (HvStatus::SUCCESS, 1)
        );
        // SAFETY: a plain integer.
        unsafe { values[0].reg64 }
    }

    fn rip(&self) -> u64 {
        self.get(hv::hv_register_name_HV_X64_REGISTER_RIP)
    }

    fn rax(&self) -> u64 {
        self.get(hv::hv_register_name_HV_X64_REGISTER_RAX)
    }

    fn run(&self) -> hv_message {
        // SAFETY: a packed structure of integers, of this size.
        unsafe { std::mem::transmute(self.vp.run().unwrap()) }
    }

    /// Finishes the instruction of an intercept by moving RIP behind it, as a client would.
    fn resume_after(&self, length: u64) {
        self.set(&[(
            hv::hv_register_name_HV_X64_REGISTER_RIP,
            self.rip() + length,
        )]);
    }

    /// The register page, as the client has it mapped.
    fn page(&self) -> *mut hv_vp_register_page {
        use std::os::fd::AsRawFd;
        // SAFETY: maps a page of the VP's descriptor, which stays mapped until the process ends.
        let page = unsafe {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(
                ptr::null_mut(),
                0x1000,
                prot,
                libc::MAP_SHARED,
                self.vp.memfd().as_raw_fd(),
                0,
            )
        };
        assert_ne!(page, libc::MAP_FAILED);
        page.cast()
    }
}

fn kind(message: &hv_message) -> u32 {
    message.header.message_type
}

fn header(message: &hv_message) -> hv_x64_intercept_message_header {
    // SAFETY: every message used with this begins with such a header.
    unsafe { ptr::read_unaligned((&raw const message.u.payload).cast()) }
}

/// OUT 0x3f8, AL as the end of a guest: proof that it got there.
const OUT: u8 = 0xee;

#[track_caller]
fn ends_with_out(guest: &Guest, rip: u64) {
    let message = guest.run();
    let port = message.to_ioport_info().unwrap();
    assert_eq!(({ port.port_number }, { port.header.rip }), (0x3f8, rip));
}

/// A guest in long mode, all of the first 512 GiB mapped one to one. `None` where KVM runs real mode only.
fn boot_long(code: &[u8]) -> Option<Guest> {
    if !precise() {
        rota_tests::requires::skip("without hardware virtualization KVM runs real mode only");
        return None;
    }
    let guest = boot(code)?;
    let memory = &guest.partition.memory;
    memory.write(0x4000, &0x5003u64.to_le_bytes()).unwrap();
    for gib in 0..512u64 {
        let entry = gib << 30 | 0x83;
        memory
            .write(0x5000 + gib * 8, &entry.to_le_bytes())
            .unwrap();
    }
    guest.set(&[
        (hv::hv_register_name_HV_X64_REGISTER_CR3, 0x4000),
        (hv::hv_register_name_HV_X64_REGISTER_CR4, 0x620),
        (hv::hv_register_name_HV_X64_REGISTER_EFER, 0x100),
        (hv::hv_register_name_HV_X64_REGISTER_CR0, 0x8000_0011),
    ]);
    for (name, attributes) in [
        (hv::hv_register_name_HV_X64_REGISTER_CS, 0xa09b),
        (hv::hv_register_name_HV_X64_REGISTER_DS, 0xc093),
        (hv::hv_register_name_HV_X64_REGISTER_SS, 0xc093),
    ] {
        let mut value = word(0);
        value.segment = hv::hv_x64_segment_register {
            selector: 8,
            limit: u32::MAX,
            __bindgen_anon_1: hv::hv_x64_segment_register__bindgen_ty_1 { attributes },
            ..Default::default()
        };
        let assoc = hv_register_assoc {
            name,
            value,
            ..Default::default()
        };
        assert_eq!(guest.vp.set_registers(&[assoc]), (HvStatus::SUCCESS, 1));
    }
    Some(guest)
}

/// An address no slot of KVM covers, not even a background one: KVM emulates the access before it tells.
const FAR: u64 = 40 << 30;
