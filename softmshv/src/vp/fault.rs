//! What a VP was about to do when KVM refused to go on: which of its accesses leaves the mapped memory.
//!
//! KVM reports an access to a slot without memory as a bare `EFAULT`, with the registers as they were before the
//! instruction. The hypervisor tells its client the guest-virtual and guest-physical address, the kind of access
//! and the instruction's bytes. So the instruction is decoded and its accesses are translated in the order the
//! processor makes them; the first one that memory does not serve is the one.

use iced_x86::{
    CodeSize, Instruction, InstructionInfoFactory, MemorySize, Mnemonic, OpAccess, OpKind,
    Register, UsedMemory,
};
use kvm_bindings::{kvm_regs, kvm_sregs, kvm_vcpu_events};

use super::decode::{Code, FetchFault, code_bits, register_value};
use super::walk::bits::{CR0_PE, EFER_LMA};
use super::walk::{Access, Paging, Physical, WalkError};
use crate::memory::Mapping;

const PAGE: u64 = 0x1000;
const APIC_ENABLED: u64 = 1 << 11;
const APIC_X2: u64 = 1 << 10;

/// The kind of an access, as an intercept message has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A load.
    Read,
    /// A store, or a load and store in one.
    Write,
    /// An instruction fetch.
    Execute,
}

/// An access that guest memory does not serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fault {
    /// What was attempted.
    pub(crate) kind: Kind,
    /// Where, as the guest addressed it.
    pub(crate) gva: Option<u64>,
    /// Where in guest-physical space; a page table's entry when the walk to `gva` ended there.
    pub(crate) gpa: u64,
    /// `gpa` is what `gva` translates to.
    pub(crate) translated: bool,
    /// Memory is mapped there and forbids the access.
    pub(crate) protected: bool,
}

/// A store of a register or constant with `mov`: all a doorbell needs to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Store {
    data: [u8; 8],
    size: usize,
}

impl Store {
    /// The bytes stored, in memory order.
    pub(crate) fn data(&self) -> &[u8] {
        &self.data[..self.size]
    }
}

/// One VP's state, and the guest memory it accesses.
pub(crate) struct Scene<'a, M: Physical + ?Sized> {
    /// General registers before the instruction.
    pub(crate) regs: &'a kvm_regs,
    /// Control and segment registers.
    pub(crate) sregs: &'a kvm_sregs,
    /// Guest-physical memory.
    pub(crate) memory: &'a M,
    paging: Paging,
}

impl<'a, M: Physical + ?Sized> Scene<'a, M> {
    pub(crate) fn new(regs: &'a kvm_regs, sregs: &'a kvm_sregs, memory: &'a M) -> Self {
        Self {
            regs,
            sregs,
            memory,
            paging: Paging::new(sregs, regs.rflags),
        }
    }

    /// The bytes at the instruction pointer.
    ///
    /// # Errors
    /// When they are not in memory.
    pub(crate) fn code(&self) -> Result<Code, FetchFault> {
        self.code_at(self.regs.rip)
    }

    /// The bytes at CS:`rip`.
    ///
    /// # Errors
    /// When they are not in memory.
    pub(crate) fn code_at(&self, rip: u64) -> Result<Code, FetchFault> {
        Code::fetch(self.memory, &self.paging, self.sregs, rip)
    }

    /// The instruction at hand, which may be none a processor knows.
    ///
    /// # Errors
    /// When it is not in memory.
    pub(crate) fn instruction(&self) -> Result<Instruction, FetchFault> {
        self.code()?.decode(self.sregs, self.regs.rip)
    }

    /// Translates a linear address as the VP would.
    ///
    /// # Errors
    /// Why the VP would not get to it.
    pub(crate) fn translate(&self, linear: u64, access: Access) -> Result<u64, WalkError> {
        self.paging.translate(self.memory, linear, access)
    }

    /// The first access of `instruction` that memory does not serve.
    pub(crate) fn fault(
        &self,
        instruction: &Instruction,
        factory: &mut InstructionInfoFactory,
    ) -> Option<Fault> {
        let info = factory.info(instruction);
        let used = info.used_memory();
        if self.repeats_no_more(instruction, used) {
            return None;
        }
        // Loads come before stores; a load-and-store counts as a store.
        for stores in [false, true] {
            for operand in used {
                let Some(store) = is_store(operand.access()) else {
                    continue;
                };
                if store != stores {
                    continue;
                }
                let address = operand.virtual_address(0, |register, _, _| match register {
                    Register::RIP | Register::EIP => Some(0),
                    _ => register_value(register, self.regs, self.sregs),
                });
                let Some(address) = address else { continue };
                let size = operand_size(instruction, operand.memory_size());
                if let Some(fault) = self.probe(address, size, store) {
                    return Some(fault);
                }
            }
        }
        None
    }

    /// Whether a repeated string instruction has come to its end, so that it accesses nothing.
    fn repeats_no_more(&self, instruction: &Instruction, used: &[UsedMemory]) -> bool {
        let repeated = instruction.has_rep_prefix() || instruction.has_repne_prefix();
        let count = match used.first().map(UsedMemory::address_size) {
            Some(CodeSize::Code16) => self.regs.rcx & 0xffff,
            Some(CodeSize::Code32) => self.regs.rcx & 0xffff_ffff,
            _ => self.regs.rcx,
        };
        repeated && instruction.is_string_instruction() && count == 0
    }

    /// The first access to the tables the processor consults by itself that memory does not serve: interrupt and
    /// segment descriptors, task state, the stack of an interruption being delivered.
    pub(crate) fn implicit_fault(&self, events: &kvm_vcpu_events) -> Option<Fault> {
        let vector = if events.interrupt.injected != 0 {
            Some(events.interrupt.nr)
        } else if events.exception.injected != 0 {
            Some(events.exception.nr)
        } else if events.nmi.injected != 0 {
            Some(2)
        } else {
            None
        };
        let sregs = self.sregs;
        if let Some(vector) = vector {
            let size: u64 = if sregs.cr0 & CR0_PE == 0 {
                4
            } else if sregs.efer & EFER_LMA != 0 {
                16
            } else {
                8
            };
            let gate = self.probe(sregs.idt.base + u64::from(vector) * size, size, false);
            let sp = sregs.ss.base.wrapping_add(self.regs.rsp).wrapping_sub(8);
            if let Some(fault) = gate.or_else(|| self.probe(sp, 8, true)) {
                return Some(fault);
            }
        }
        [sregs.gdt.base, sregs.ldt.base, sregs.tr.base]
            .into_iter()
            .find_map(|base| self.probe(base, 8, false))
    }

    /// Whether an access of `size` bytes at a linear address gets to memory, page by page.
    fn probe(&self, address: u64, size: u64, store: bool) -> Option<Fault> {
        let kind = if store { Kind::Write } else { Kind::Read };
        let mut gva = if code_bits(self.sregs) == 64 {
            address
        } else {
            address & 0xffff_ffff
        };
        let mut left = size.max(1);
        loop {
            match self.paging.translate(self.memory, gva, Access::default()) {
                Ok(gpa) => {
                    let protected = match self.memory.mapping(gpa) {
                        Mapping::Unmapped if self.is_apic_page(gpa) => None,
                        Mapping::Unmapped => Some(false),
                        Mapping::Mapped {
                            writable: false, ..
                        } if store => Some(true),
                        Mapping::Mapped { .. } => None,
                    };
                    if let Some(protected) = protected {
                        return Some(Fault {
                            kind,
                            gva: Some(gva),
                            gpa,
                            translated: true,
                            protected,
                        });
                    }
                }
                Err(WalkError::TableUnmapped { gpa }) => {
                    return Some(Fault {
                        kind: Kind::Read,
                        gva: Some(gva),
                        gpa,
                        translated: false,
                        protected: false,
                    });
                }
                // The guest's own page fault comes first.
                Err(_) => return None,
            }
            let here = (PAGE - gva % PAGE).min(left);
            left -= here;
            if left == 0 {
                return None;
            }
            gva = gva.wrapping_add(here);
        }
    }

    /// KVM serves the page of an enabled LAPIC itself.
    fn is_apic_page(&self, gpa: u64) -> bool {
        let base = self.sregs.apic_base;
        base & APIC_ENABLED != 0
            && base & APIC_X2 == 0
            && gpa & !0xfff == base & 0x000f_ffff_ffff_f000
    }

    /// What `instruction` stores, when it is a `mov` of a general register or constant to memory.
    pub(crate) fn store(&self, instruction: &Instruction) -> Option<Store> {
        if instruction.mnemonic() != Mnemonic::Mov || instruction.op0_kind() != OpKind::Memory {
            return None;
        }
        let value = match instruction.op1_kind() {
            OpKind::Register => register_value(instruction.op1_register(), self.regs, self.sregs)
                .filter(|_| !instruction.op1_register().is_segment_register())?,
            _ => instruction.try_immediate(1).ok()?,
        };
        let size = instruction.memory_size().size();
        matches!(size, 1 | 2 | 4 | 8).then_some(Store {
            data: value.to_le_bytes(),
            size,
        })
    }
}

impl From<FetchFault> for Fault {
    fn from(fault: FetchFault) -> Self {
        Self {
            kind: if fault.translated {
                Kind::Execute
            } else {
                Kind::Read
            },
            gva: Some(fault.gva),
            gpa: fault.gpa,
            translated: fault.translated,
            protected: false,
        }
    }
}

/// Whether an operand is stored to; `None` when memory is not accessed at all.
fn is_store(access: OpAccess) -> Option<bool> {
    match access {
        OpAccess::Read | OpAccess::CondRead => Some(false),
        OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite => {
            Some(true)
        }
        OpAccess::None | OpAccess::NoMemAccess => None,
    }
}

fn operand_size(instruction: &Instruction, size: MemorySize) -> u64 {
    let size = match size {
        MemorySize::Unknown => instruction.memory_size(),
        known => known,
    };
    size.size() as u64
}

#[cfg(test)]
mod tests {
    use super::super::walk::bits::*;
    use super::super::walk::tests::{Ram, long_mode};
    use super::*;

    const RAM: u64 = 0x20_0000;

    /// Long mode with 2 MiB of memory at 0, mapped one to one together with the rest of the first 512 GiB.
    fn identity(code: &[u8]) -> (Ram, kvm_sregs, kvm_regs) {
        let ram = Ram::new(RAM as usize);
        ram.put(0x1000, &0x2003u64.to_le_bytes());
        for gib in 0..512u64 {
            ram.put(0x2000 + gib * 8, &(gib << 30 | 0x83).to_le_bytes());
        }
        ram.put(0x8000, code);
        let mut sregs = long_mode();
        sregs.cs.l = 1;
        let regs = kvm_regs {
            rip: 0x8000,
            rsp: 0x7000,
            rflags: 2,
            ..Default::default()
        };
        (ram, sregs, regs)
    }

    fn fault_of(code: &[u8], set: impl FnOnce(&mut kvm_regs, &mut kvm_sregs)) -> Option<Fault> {
        let (ram, mut sregs, mut regs) = identity(code);
        set(&mut regs, &mut sregs);
        let scene = Scene::new(&regs, &sregs, &ram);
        let instruction = scene.code().unwrap().decode(&sregs, regs.rip).unwrap();
        assert_eq!(instruction.len(), code.len(), "{instruction:?}");
        scene.fault(&instruction, &mut InstructionInfoFactory::new())
    }

    fn at(kind: Kind, address: u64) -> Option<Fault> {
        Some(Fault {
            kind,
            gva: Some(address),
            gpa: address,
            translated: true,
            protected: false,
        })
    }

    #[test]
    fn a_load_a_store_and_both() {
        let mmio = |regs: &mut kvm_regs, _: &mut kvm_sregs| regs.rbx = 0xfe00_0000;
        // mov eax, [rbx + 0x10]
        assert_eq!(
            fault_of(&[0x8b, 0x43, 0x10], mmio),
            at(Kind::Read, 0xfe00_0010)
        );
        // mov [rbx], cl
        assert_eq!(fault_of(&[0x88, 0x0b], mmio), at(Kind::Write, 0xfe00_0000));
        // lock or dword [rbx], 1
        assert_eq!(
            fault_of(&[0xf0, 0x83, 0x0b, 0x01], mmio),
            at(Kind::Write, 0xfe00_0000)
        );
        // mov eax, [rip + 0x7fff_0000]
        let rip = 0x8000 + 6 + 0x7fff_0000;
        assert_eq!(
            fault_of(&[0x8b, 0x05, 0, 0, 0xff, 0x7f], |_, _| ()),
            at(Kind::Read, rip)
        );
        // lea does not access memory.
        assert_eq!(fault_of(&[0x48, 0x8d, 0x03], mmio), None);
    }

    #[test]
    fn string_instructions_load_before_they_store() {
        // rep movsb
        let both = |regs: &mut kvm_regs, _: &mut kvm_sregs| {
            regs.rsi = 0xfe00_0000;
            regs.rdi = 0xfd00_0000;
            regs.rcx = 5;
        };
        assert_eq!(fault_of(&[0xf3, 0xa4], both), at(Kind::Read, 0xfe00_0000));
        let store = |regs: &mut kvm_regs, _: &mut kvm_sregs| {
            regs.rsi = 0x100;
            regs.rdi = 0xfd00_0000;
            regs.rcx = 5;
        };
        assert_eq!(fault_of(&[0xf3, 0xa4], store), at(Kind::Write, 0xfd00_0000));
        // stosd, cmpsb
        assert_eq!(fault_of(&[0xab], store), at(Kind::Write, 0xfd00_0000));
        assert_eq!(fault_of(&[0xa6], store), at(Kind::Read, 0xfd00_0000));
        // addr32 rep movsb: ECX counts, and is zero
        let done = |regs: &mut kvm_regs, _: &mut kvm_sregs| {
            (regs.rdi, regs.rcx) = (0xfd00_0000, 1 << 32);
        };
        assert_eq!(fault_of(&[0x67, 0xf3, 0xa4], done), None);
        assert_eq!(fault_of(&[0xf3, 0xa4], done), at(Kind::Write, 0xfd00_0000));
    }

    #[test]
    fn the_stack_is_an_operand() {
        let stack = |regs: &mut kvm_regs, _: &mut kvm_sregs| regs.rsp = 0xfe00_0008;
        assert_eq!(fault_of(&[0x50], stack), at(Kind::Write, 0xfe00_0000));
        assert_eq!(fault_of(&[0x58], stack), at(Kind::Read, 0xfe00_0008));
        assert_eq!(fault_of(&[0xc3], stack), at(Kind::Read, 0xfe00_0008));
        assert_eq!(
            fault_of(&[0xe8, 0, 0, 0, 0], stack),
            at(Kind::Write, 0xfe00_0000)
        );
        // push qword [rbx]: the operand is read first.
        let both = |regs: &mut kvm_regs, _: &mut kvm_sregs| {
            regs.rsp = 0xfe00_0008;
            regs.rbx = 0xfd00_0000;
        };
        assert_eq!(fault_of(&[0xff, 0x33], both), at(Kind::Read, 0xfd00_0000));
    }

    #[test]
    fn an_operand_that_crosses_into_unmapped_space() {
        let edge = |regs: &mut kvm_regs, _: &mut kvm_sregs| regs.rbx = RAM - 2;
        assert_eq!(fault_of(&[0x8b, 0x03], edge), at(Kind::Read, RAM));
    }

    #[test]
    fn the_lapic_page_is_no_fault_while_the_lapic_is_on() {
        let apic = |regs: &mut kvm_regs, sregs: &mut kvm_sregs| {
            regs.rbx = 0xfee0_0020;
            sregs.apic_base = 0xfee0_0000 | APIC_ENABLED;
        };
        assert_eq!(fault_of(&[0x8b, 0x03], apic), None);
    }

    #[test]
    fn real_mode_segments_count() {
        let ram = Ram::new(0x1_0000);
        // es mov al, [si]
        ram.put(0x1000, &[0x26, 0x8a, 0x04]);
        let mut sregs = kvm_sregs::default();
        sregs.es.base = 0xa_0000;
        let regs = kvm_regs {
            rip: 0x1000,
            rsi: 0x1_0004,
            ..Default::default()
        };
        let scene = Scene::new(&regs, &sregs, &ram);
        let instruction = scene.code().unwrap().decode(&sregs, regs.rip).unwrap();
        let fault = scene.fault(&instruction, &mut InstructionInfoFactory::new());
        assert_eq!(fault, at(Kind::Read, 0xa_0004));
    }

    #[test]
    fn page_tables_outside_memory_are_reported_as_such() {
        let (ram, mut sregs, regs) = identity(&[0x90]);
        sregs.cr3 = 0x4000_0000;
        let scene = Scene::new(&regs, &sregs, &ram);
        let fault = Fault::from(scene.code().unwrap_err());
        assert_eq!(fault.gpa, 0x4000_0000);
        assert!(!fault.translated);
    }

    #[test]
    fn only_a_plain_store_is_a_doorbell() {
        let (ram, sregs, mut regs) = identity(&[]);
        regs.rbx = 0xfe00_0000;
        regs.rcx = 0x1122_3344;
        let scene = Scene::new(&regs, &sregs, &ram);
        let store = |code: &[u8]| {
            ram.put(0x8000, code);
            let instruction = scene.code().unwrap().decode(&sregs, regs.rip).unwrap();
            scene.store(&instruction)
        };
        assert_eq!(store(&[0x66, 0x89, 0x0b]).unwrap().data(), [0x44, 0x33]);
        assert_eq!(
            store(&[0xc7, 0x03, 1, 2, 3, 4]).unwrap().data(),
            [1, 2, 3, 4]
        );
        assert_eq!(store(&[0x88, 0x2b]).unwrap().data(), [0x33]);
        assert!(store(&[0x8b, 0x0b]).is_none());
        assert!(store(&[0x87, 0x0b]).is_none());
        assert!(store(&[0x8e, 0x03]).is_none());
    }

    #[test]
    fn delivery_of_an_interruption_needs_its_gate() {
        let (ram, mut sregs, regs) = identity(&[0x90]);
        sregs.idt.base = 0xfe00_0000;
        let mut events = kvm_vcpu_events::default();
        let scene = Scene::new(&regs, &sregs, &ram);
        assert_eq!(scene.implicit_fault(&events), None);
        events.interrupt.injected = 1;
        events.interrupt.nr = 0x20;
        assert_eq!(scene.implicit_fault(&events), at(Kind::Read, 0xfe00_0200));
        assert_eq!(CR4_PAE, sregs.cr4);
    }
}
