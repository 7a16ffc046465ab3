//! The part of a VP's state that instructions with memory operands read and write.
//!
//! Plain data, in the order of the hypervisor's register page (`hv_vp_register_page`), so that filling and writing back is a
//! copy. Questions about the current mode are answered here and nowhere else.

/// CR0.PE: protected mode.
pub const CR0_PE: u64 = 1 << 0;
/// CR0.EM: no x87 or SSE unit.
pub const CR0_EM: u64 = 1 << 2;
/// CR0.TS: the next x87 or SSE instruction raises #NM.
pub const CR0_TS: u64 = 1 << 3;
/// CR0.WP: read-only pages bind the supervisor too.
pub const CR0_WP: u64 = 1 << 16;
/// CR0.PG: paging.
pub const CR0_PG: u64 = 1 << 31;
/// CR4.PSE: 4 MiB pages in 32-bit paging.
pub const CR4_PSE: u64 = 1 << 4;
/// CR4.PAE: 64-bit page table entries.
pub const CR4_PAE: u64 = 1 << 5;
/// CR4.OSFXSR: SSE instructions are enabled.
pub const CR4_OSFXSR: u64 = 1 << 9;
/// CR4.LA57: five levels of page tables.
pub const CR4_LA57: u64 = 1 << 12;
/// CR4.OSXSAVE: XCR0 and AVX instructions are enabled.
pub const CR4_OSXSAVE: u64 = 1 << 18;
/// CR4.SMEP: the supervisor may not execute user pages.
pub const CR4_SMEP: u64 = 1 << 20;
/// CR4.SMAP: the supervisor may not touch user pages unless RFLAGS.AC is set.
pub const CR4_SMAP: u64 = 1 << 21;
/// EFER.LMA: long mode is active.
pub const EFER_LMA: u64 = 1 << 10;
/// EFER.NXE: page table entries carry a no-execute bit.
pub const EFER_NXE: u64 = 1 << 11;
/// XCR0 bits for SSE and AVX state, both needed by AVX instructions.
pub const XCR0_AVX: u64 = 0b110;

/// RFLAGS: carry.
pub const CF: u64 = 1 << 0;
/// RFLAGS: even parity of the low byte.
pub const PF: u64 = 1 << 2;
/// RFLAGS: carry out of bit 3.
pub const AF: u64 = 1 << 4;
/// RFLAGS: zero.
pub const ZF: u64 = 1 << 6;
/// RFLAGS: sign.
pub const SF: u64 = 1 << 7;
/// RFLAGS: strings run downwards.
pub const DF: u64 = 1 << 10;
/// RFLAGS: signed overflow.
pub const OF: u64 = 1 << 11;
/// RFLAGS: instruction breakpoints are off for one instruction.
pub const RF: u64 = 1 << 16;
/// RFLAGS: virtual-8086 mode.
pub const VM: u64 = 1 << 17;
/// RFLAGS: alignment check; with SMAP, access to user pages allowed.
pub const AC: u64 = 1 << 18;
/// The six arithmetic flags.
pub const STATUS_FLAGS: u64 = CF | PF | AF | ZF | SF | OF;

/// Index of RAX in [`Cpu::gpr`].
pub const RAX: usize = 0;
/// Index of RCX in [`Cpu::gpr`].
pub const RCX: usize = 1;
/// Index of RDX in [`Cpu::gpr`].
pub const RDX: usize = 2;
/// Index of RBX in [`Cpu::gpr`].
pub const RBX: usize = 3;
/// Index of RSP in [`Cpu::gpr`].
pub const RSP: usize = 4;
/// Index of RSI in [`Cpu::gpr`].
pub const RSI: usize = 6;
/// Index of RDI in [`Cpu::gpr`].
pub const RDI: usize = 7;

/// Index of ES in [`Cpu::segments`].
pub const ES: usize = 0;
/// Index of CS in [`Cpu::segments`].
pub const CS: usize = 1;
/// Index of SS in [`Cpu::segments`].
pub const SS: usize = 2;
/// Index of DS in [`Cpu::segments`].
pub const DS: usize = 3;
/// Index of FS in [`Cpu::segments`].
pub const FS: usize = 4;
/// Index of GS in [`Cpu::segments`].
pub const GS: usize = 5;

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Linear address of offset 0.
    pub base: u64,
    /// Highest valid offset in bytes (granularity already applied).
    pub limit: u32,
    /// The visible selector.
    pub selector: u16,
    /// Access rights as in `hv_x64_segment_register`: type 0–3, S 4, DPL 5–6, P 7, L 13, D/B 14, G 15.
    pub attributes: u16,
}

impl Segment {
    /// Type bit 3: a code segment.
    pub(crate) fn is_code(&self) -> bool {
        self.attributes & 0x8 != 0
    }

    /// Type bit 1: writable data or readable code.
    pub(crate) fn is_writable_or_readable(&self) -> bool {
        self.attributes & 0x2 != 0
    }

    /// Type bit 2 of a data segment: offsets above the limit are the valid ones.
    pub(crate) fn is_expand_down(&self) -> bool {
        self.attributes & 0xc == 0x4
    }

    /// P: holds a descriptor at all.
    pub(crate) fn is_present(&self) -> bool {
        self.attributes & 0x80 != 0
    }

    /// L: 64-bit code.
    pub(crate) fn is_long(&self) -> bool {
        self.attributes & 0x2000 != 0
    }

    /// D/B: 32-bit code, stack or upper bound.
    pub(crate) fn is_big(&self) -> bool {
        self.attributes & 0x4000 != 0
    }

    /// Descriptor privilege level, 0 to 3.
    pub(crate) fn dpl(&self) -> u8 {
        (self.attributes >> 5 & 3) as u8
    }
}

/// Register state of a VP stopped at an instruction that has not executed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cpu {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 … R15.
    pub gpr: [u64; 16],
    /// Offset of the instruction in CS.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS.
    pub segments: [Segment; 6],
    /// CR0.
    pub cr0: u64,
    /// CR3, the root of the page tables.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// XCR0 (`xfem` in the register page): which vector state the guest has enabled.
    pub xcr0: u64,
}

impl Cpu {
    /// Real mode: no descriptors, exceptions push no error code.
    #[must_use]
    pub fn is_real_mode(&self) -> bool {
        self.cr0 & CR0_PE == 0
    }

    /// Virtual-8086 mode: real-mode segments at privilege level 3.
    #[must_use]
    pub fn is_virtual_8086(&self) -> bool {
        !self.is_real_mode() && !self.is_long_mode() && self.rflags & VM != 0
    }

    /// Long mode, 64-bit code or compatibility.
    #[must_use]
    pub fn is_long_mode(&self) -> bool {
        self.efer & EFER_LMA != 0
    }

    /// How instructions decode: 16, 32 or 64 bits.
    #[must_use]
    pub fn code_bits(&self) -> u32 {
        let code = &self.segments[CS];
        if self.is_long_mode() && code.is_long() {
            64
        } else if code.is_big() && !self.is_virtual_8086() {
            32
        } else {
            16
        }
    }

    /// Current privilege level, 0 to 3.
    #[must_use]
    pub fn privilege_level(&self) -> u8 {
        if self.is_real_mode() {
            0
        } else if self.is_virtual_8086() {
            3
        } else {
            self.segments[SS].dpl()
        }
    }

    /// The bits of RIP that this mode uses.
    pub(crate) fn instruction_pointer_mask(&self) -> u64 {
        match self.code_bits() {
            64 => u64::MAX,
            32 => 0xffff_ffff,
            _ => 0xffff,
        }
    }

    /// The bits of RSP that this mode uses.
    pub(crate) fn stack_pointer_mask(&self) -> u64 {
        if self.code_bits() == 64 {
            u64::MAX
        } else if self.segments[SS].is_big() && !self.is_virtual_8086() {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    /// Replaces the bits of general register `index` that `mask` covers; a 32-bit mask clears the upper half as the
    /// processor does.
    pub(crate) fn set_masked(&mut self, index: usize, mask: u64, value: u64) {
        let register = &mut self.gpr[index];
        *register = match mask {
            u64::MAX | 0xffff_ffff => value & mask,
            _ => *register & !mask | value & mask,
        };
    }

    /// Whether `address` survives sign extension from the highest implemented linear address bit.
    pub(crate) fn is_canonical(&self, address: u64) -> bool {
        let unused = if self.cr4 & CR4_LA57 != 0 { 7 } else { 16 };
        ((address << unused) as i64 >> unused) as u64 == address
    }
}
