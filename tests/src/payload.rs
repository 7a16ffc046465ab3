//! Guest programs, assembled by hand: bytes with the instruction beside them.
//!
//! A program is a concatenation of pieces ([`code`]). Real-mode pieces are 16-bit code. `DONE` at the end tells the client that
//! the guest got there: `out DONE_PORT, al`.

/// The port of [`DONE`].
pub const DONE_PORT: u16 = 0xF0;
/// `out 0xF0, al`: valid in every mode.
pub const DONE: [u8; 2] = [0xE6, 0xF0];
/// `out 0xF1, al`.
pub const MARK_1: [u8; 2] = [0xE6, 0xF1];
/// `out 0xF2, al`.
pub const MARK_2: [u8; 2] = [0xE6, 0xF2];
/// `jmp $`: spins until somebody outside stops it.
pub const SPIN: [u8; 2] = [0xEB, 0xFE];
/// `hlt`.
pub const HLT: [u8; 1] = [0xF4];
/// `sti; hlt`: the interrupt shadow of `sti` makes the pair atomic.
pub const STI_HLT: [u8; 2] = [0xFB, 0xF4];
/// `sti; nop`.
pub const STI_NOP: [u8; 2] = [0xFB, 0x90];
/// `ud2`.
pub const UD2: [u8; 2] = [0x0F, 0x0B];
/// `rdmsr`.
pub const RDMSR: [u8; 2] = [0x0F, 0x32];
/// `wrmsr`.
pub const WRMSR: [u8; 2] = [0x0F, 0x30];
/// `cpuid`.
pub const CPUID: [u8; 2] = [0x0F, 0xA2];
/// `iret` (16-bit).
pub const IRET: [u8; 1] = [0xCF];

/// `out dx, al`.
pub const OUT_DX_AL: [u8; 1] = [0xEE];
/// `out dx, ax` (16-bit code).
pub const OUT_DX_AX: [u8; 1] = [0xEF];
/// `out dx, eax` (16-bit code: operand-size prefix).
pub const OUT_DX_EAX: [u8; 2] = [0x66, 0xEF];
/// `in al, dx`.
pub const IN_AL_DX: [u8; 1] = [0xEC];
/// `in ax, dx` (16-bit code).
pub const IN_AX_DX: [u8; 1] = [0xED];
/// `in eax, dx` (16-bit code).
pub const IN_EAX_DX: [u8; 2] = [0x66, 0xED];
/// `outsb`.
pub const OUTSB: [u8; 1] = [0x6E];
/// `rep outsb`.
pub const REP_OUTSB: [u8; 2] = [0xF3, 0x6E];
/// `rep outsw` (16-bit code).
pub const REP_OUTSW: [u8; 2] = [0xF3, 0x6F];
/// `insb`.
pub const INSB: [u8; 1] = [0x6C];
/// `rep insb`.
pub const REP_INSB: [u8; 2] = [0xF3, 0x6C];
/// `rep insw` (16-bit code).
pub const REP_INSW: [u8; 2] = [0xF3, 0x6D];
/// `rep insd` (16-bit code: operand-size prefix).
pub const REP_INSD: [u8; 3] = [0xF3, 0x66, 0x6D];

/// `mov [bx], al` through DS.
pub const STORE_AL: [u8; 2] = [0x88, 0x07];
/// `mov [bx], ax` through DS.
pub const STORE_AX: [u8; 2] = [0x89, 0x07];
/// `mov [bx], eax` through DS (16-bit code).
pub const STORE_EAX: [u8; 3] = [0x66, 0x89, 0x07];
/// `mov al, [bx]` through DS.
pub const LOAD_AL: [u8; 2] = [0x8A, 0x07];
/// `mov ax, [bx]` through DS.
pub const LOAD_AX: [u8; 2] = [0x8B, 0x07];
/// `mov eax, [bx]` through DS (16-bit code).
pub const LOAD_EAX: [u8; 3] = [0x66, 0x8B, 0x07];
/// `add [bx], al` through DS: reads, then writes.
pub const ADD_AL: [u8; 2] = [0x00, 0x07];
/// `rep movsb`: DS:SI to ES:DI.
pub const REP_MOVSB: [u8; 2] = [0xF3, 0xA4];
/// `rep stosw`: AX to ES:DI.
pub const REP_STOSW: [u8; 2] = [0xF3, 0xAB];
/// `push ax`.
pub const PUSH_AX: [u8; 1] = [0x50];
/// `inc bx`, for a step between two accesses that shows the guest runs.
pub const INC_BX: [u8; 1] = [0x43];

/// `mov rax, [rbx]` (64-bit code).
pub const LOAD_RAX_64: [u8; 3] = [0x48, 0x8B, 0x03];
/// `mov [rbx], rax` (64-bit code).
pub const STORE_RAX_64: [u8; 3] = [0x48, 0x89, 0x03];
/// `add [rbx], rax` (64-bit code).
pub const ADD_RAX_64: [u8; 3] = [0x48, 0x01, 0x03];
/// `push rax` (64-bit code).
pub const PUSH_RAX_64: [u8; 1] = [0x50];
/// `rep movsq` (64-bit code).
pub const REP_MOVSQ_64: [u8; 3] = [0xF3, 0x48, 0xA5];
/// `mov [ebx], eax` (32-bit code).
pub const STORE_EAX_32: [u8; 2] = [0x89, 0x03];
/// `mov eax, [ebx]` (32-bit code).
pub const LOAD_EAX_32: [u8; 2] = [0x8B, 0x03];

/// `movd xmm0, eax` (any mode; wants CR4.OSFXSR).
pub const MOVD_XMM0_EAX: [u8; 4] = [0x66, 0x0F, 0x6E, 0xC0];
/// `movd eax, xmm0`.
pub const MOVD_EAX_XMM0: [u8; 4] = [0x66, 0x0F, 0x7E, 0xC0];

/// Base of the local APIC's registers.
pub const LAPIC: u32 = 0xFEE0_0000;

/// Pieces, one after the other.
#[must_use]
pub fn code(pieces: &[&[u8]]) -> Vec<u8> {
    pieces.concat()
}

/// `mov eax, imm32` (16-bit code).
#[must_use]
pub fn mov_eax(value: u32) -> Vec<u8> {
    [&[0x66, 0xB8], value.to_le_bytes().as_slice()].concat()
}

/// `mov ecx, imm32` (16-bit code).
#[must_use]
pub fn mov_ecx(value: u32) -> Vec<u8> {
    [&[0x66, 0xB9], value.to_le_bytes().as_slice()].concat()
}

/// `mov edx, imm32` (16-bit code).
#[must_use]
pub fn mov_edx(value: u32) -> Vec<u8> {
    [&[0x66, 0xBA], value.to_le_bytes().as_slice()].concat()
}

/// `mov dword gs:[LAPIC + offset], value` (16-bit code; the client gives GS a 4 GiB limit): operand and address size prefixes,
/// GS prefix, `C7 /0` with a 32-bit displacement.
#[must_use]
pub fn lapic_write(offset: u32, value: u32) -> Vec<u8> {
    [
        &[0x66, 0x67, 0x65, 0xC7, 0x05],
        (LAPIC + offset).to_le_bytes().as_slice(),
        value.to_le_bytes().as_slice(),
    ]
    .concat()
}

/// `mov eax, gs:[LAPIC + offset]` (16-bit code; GS as in [`lapic_write`]).
#[must_use]
pub fn lapic_read(offset: u32) -> Vec<u8> {
    [
        &[0x66, 0x67, 0x65, 0x8B, 0x05],
        (LAPIC + offset).to_le_bytes().as_slice(),
    ]
    .concat()
}

/// Enables the local APIC: spurious vector register, software enable, vector 0xFF.
#[must_use]
pub fn lapic_enable() -> Vec<u8> {
    lapic_write(0xF0, 0x1FF)
}

/// An interrupt handler: `out MARK_1`, end of interrupt, `iret`.
#[must_use]
pub fn handler() -> Vec<u8> {
    code(&[&MARK_1, &lapic_write(0xB0, 0), &IRET])
}

/// `jmp far segment:0` (16-bit code).
#[must_use]
pub fn jmp_far(segment: u16) -> Vec<u8> {
    [&[0xEA, 0x00, 0x00], segment.to_le_bytes().as_slice()].concat()
}
