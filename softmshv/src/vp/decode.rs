//! The instruction at a VP's instruction pointer: fetched from guest memory and decoded.

use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction, Register};
use kvm_bindings::{kvm_regs, kvm_sregs};

use super::walk::bits::{CR0_PE, EFER_LMA};
use super::walk::{Access, Paging, Physical, WalkError};
use crate::memory::Mapping;

/// The longest instruction the architecture allows.
const MAX_INSTRUCTION: usize = 15;
const PAGE: u64 = 0x1000;

/// An instruction fetch reached a guest-physical address without memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FetchFault {
    /// The guest-virtual address fetched from.
    pub(crate) gva: u64,
    /// The guest-physical address behind it, or that of the page table on the way.
    pub(crate) gpa: u64,
    /// The fault is on `gva` itself, not on a page table.
    pub(crate) translated: bool,
}

/// Bytes at an instruction pointer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Code {
    bytes: [u8; 16],
    count: usize,
    /// Where the fetch of further bytes would fault.
    beyond: Option<FetchFault>,
}

impl Code {
    /// The bytes that could be read, at most 16.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.count]
    }

    /// Reads the bytes at CS:RIP.
    ///
    /// # Errors
    /// When already the first byte is not in memory.
    pub(crate) fn fetch<M: Physical + ?Sized>(
        memory: &M,
        paging: &Paging,
        sregs: &kvm_sregs,
        rip: u64,
    ) -> Result<Self, FetchFault> {
        let start = linear_rip(sregs, rip);
        let mut code = Self::default();
        let first = ((PAGE - start % PAGE) as usize).min(code.bytes.len());
        match page_bytes(memory, paging, start, &mut code.bytes[..first]) {
            Ok(count) => code.count = count,
            Err(fault) => return Err(fault),
        }
        if code.count == first && first < code.bytes.len() {
            let next = start.wrapping_add(first as u64);
            match page_bytes(memory, paging, next, &mut code.bytes[first..]) {
                Ok(count) => code.count += count,
                Err(fault) => code.beyond = Some(fault),
            }
        }
        Ok(code)
    }

    /// Decodes the first instruction.
    ///
    /// # Errors
    /// When the instruction continues on a page that is not in memory.
    pub(crate) fn decode(&self, sregs: &kvm_sregs, rip: u64) -> Result<Instruction, FetchFault> {
        let bytes = &self.bytes()[..self.count.min(MAX_INSTRUCTION)];
        let mut decoder = Decoder::with_ip(code_bits(sregs), bytes, rip, DecoderOptions::NONE);
        let instruction = decoder.decode();
        match self.beyond {
            Some(fault) if decoder.last_error() == DecoderError::NoMoreBytes => Err(fault),
            _ => Ok(instruction),
        }
    }
}

/// Reads what is readable at `gva` within its page: everything, or nothing when the guest itself could not
/// translate the address (then the processor raises a page fault, which is none of our business).
fn page_bytes<M: Physical + ?Sized>(
    memory: &M,
    paging: &Paging,
    gva: u64,
    bytes: &mut [u8],
) -> Result<usize, FetchFault> {
    match paging.translate(memory, gva, Access::default()) {
        Ok(gpa) => {
            let fetchable = !matches!(
                memory.mapping(gpa),
                Mapping::Unmapped
                    | Mapping::Mapped {
                        executable: false,
                        ..
                    }
            );
            if fetchable && memory.read(gpa, bytes).is_ok() {
                return Ok(bytes.len());
            }
            Err(FetchFault {
                gva,
                gpa,
                translated: true,
            })
        }
        Err(WalkError::TableUnmapped { gpa }) => Err(FetchFault {
            gva,
            gpa,
            translated: false,
        }),
        Err(_) => Ok(0),
    }
}

/// The width of code: 16, 32 or 64 bits.
pub(crate) fn code_bits(sregs: &kvm_sregs) -> u32 {
    if sregs.efer & EFER_LMA != 0 && sregs.cs.l != 0 {
        64
    } else if sregs.cr0 & CR0_PE != 0 && sregs.cs.db != 0 {
        32
    } else {
        16
    }
}

/// The linear address of an instruction pointer.
pub(crate) fn linear_rip(sregs: &kvm_sregs, rip: u64) -> u64 {
    if code_bits(sregs) == 64 {
        rip
    } else {
        sregs.cs.base.wrapping_add(rip & 0xffff_ffff) & 0xffff_ffff
    }
}

/// The value of a general-purpose register, or the base of a segment, for address computation.
pub(crate) fn register_value(
    register: Register,
    regs: &kvm_regs,
    sregs: &kvm_sregs,
) -> Option<u64> {
    let long = code_bits(sregs) == 64;
    if register.is_segment_register() {
        let base = match register {
            Register::FS => sregs.fs.base,
            Register::GS => sregs.gs.base,
            _ if long => 0,
            Register::ES => sregs.es.base,
            Register::CS => sregs.cs.base,
            Register::SS => sregs.ss.base,
            _ => sregs.ds.base,
        };
        return Some(base);
    }
    let value = match register.full_register() {
        Register::RAX => regs.rax,
        Register::RCX => regs.rcx,
        Register::RDX => regs.rdx,
        Register::RBX => regs.rbx,
        Register::RSP => regs.rsp,
        Register::RBP => regs.rbp,
        Register::RSI => regs.rsi,
        Register::RDI => regs.rdi,
        Register::R8 => regs.r8,
        Register::R9 => regs.r9,
        Register::R10 => regs.r10,
        Register::R11 => regs.r11,
        Register::R12 => regs.r12,
        Register::R13 => regs.r13,
        Register::R14 => regs.r14,
        Register::R15 => regs.r15,
        _ => return None,
    };
    Some(match register.size() {
        1 if matches!(
            register,
            Register::AH | Register::BH | Register::CH | Register::DH
        ) =>
        {
            (value >> 8) & 0xff
        }
        1 => value & 0xff,
        2 => value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    })
}

#[cfg(test)]
mod tests {
    use super::super::walk::tests::Ram;
    use super::*;

    fn real_mode(cs: u64) -> kvm_sregs {
        let mut sregs = kvm_sregs::default();
        sregs.cs.base = cs;
        sregs
    }

    #[test]
    fn an_instruction_may_cross_a_page() {
        let ram = Ram::new(0x3000);
        ram.put(0x1ffe, &[0xb8, 0x34, 0x12]);
        let sregs = real_mode(0x1000);
        let paging = Paging::new(&sregs, 2);
        let code = Code::fetch(&ram, &paging, &sregs, 0xffe).unwrap();
        assert_eq!(code.bytes().len(), 16);
        assert_eq!(code.decode(&sregs, 0xffe).unwrap().len(), 3);
    }

    #[test]
    fn a_fetch_outside_memory_is_a_fault_where_it_leaves() {
        let ram = Ram::new(0x2000);
        ram.put(0x1ffd, &[0x90, 0xb8, 0x34]);
        let sregs = real_mode(0x1000);
        let paging = Paging::new(&sregs, 2);
        let fault = FetchFault {
            gva: 0x2000,
            gpa: 0x2000,
            translated: true,
        };
        assert_eq!(Code::fetch(&ram, &paging, &sregs, 0x1000), Err(fault));
        let code = Code::fetch(&ram, &paging, &sregs, 0xffd).unwrap();
        assert_eq!(code.decode(&sregs, 0xffd).unwrap().len(), 1);
        let code = Code::fetch(&ram, &paging, &sregs, 0xffe).unwrap();
        assert_eq!(code.decode(&sregs, 0xffe), Err(fault));
    }
}
