//! The real CPU as a reference: one instruction, run on this machine with chosen registers, flags and memory.
//!
//! The arena is a mapping below 2 GiB, so that 32-bit addresses reach it too:
//!
//! ```text
//! base + 0x0000  code   load all registers, the instruction under test, store all registers
//! base + 0x1000  state  the registers before and after
//! base + 0x2000  data   four pages that the instruction may access
//! ```

use std::arch::is_x86_feature_detected;

/// Bytes of data the instruction under test may access.
pub(crate) const DATA_LEN: usize = 4 * 4096;
const DATA: u64 = 0x2000;
const STATE: u64 = 0x1000;
/// Where indirect branches under test lead, in the code page.
const LANDING: usize = 0x800;
const ARENA_LEN: usize = 0x10000;

/// Registers before or after the instruction, as the generated code loads and stores them.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) gpr: [u64; 16],
    pub(crate) rflags: u64,
    /// 1 after a branch to [`Places::landing`].
    pub(crate) landed: u64,
    host_rsp: u64,
    /// Padding: `pushfq` writes below its end, and the vectors come next.
    reserved: u64,
    pub(crate) vectors: [[u8; 32]; 16],
}

impl State {
    pub(crate) fn new(gpr: [u64; 16], rflags: u64, vectors: [[u8; 32]; 16]) -> Self {
        Self {
            gpr,
            rflags,
            landed: 0,
            host_rsp: 0,
            reserved: 0,
            vectors,
        }
    }
}

const GPR: u64 = 0;
const RFLAGS: u64 = 128;
const LANDED: u64 = 136;
const HOST_RSP: u64 = 144;
const VECTORS: u64 = 160;

/// Addresses in an arena.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Places {
    /// The data pages.
    pub(crate) data: u64,
    /// The instruction under test.
    pub(crate) instruction: u64,
    /// The target that branches under test must take.
    pub(crate) landing: u64,
}

/// Code, state and data of native runs; one per thread that runs them.
pub(crate) struct Arena {
    mapping: *mut libc::c_void,
    base: u64,
    avx: bool,
    gs_base: u64,
}

impl Arena {
    pub(crate) fn new() -> Self {
        // SAFETY: an anonymous mapping at an address of the kernel's choice touches no existing memory.
        let mapping = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                2 * ARENA_LEN,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT,
                -1,
                0,
            )
        };
        assert_ne!(
            mapping,
            libc::MAP_FAILED,
            "{}",
            std::io::Error::last_os_error()
        );
        // Within 64 KiB, so that one page table covers it.
        let base = (mapping as u64).next_multiple_of(ARENA_LEN as u64);
        Self {
            mapping,
            base,
            avx: is_x86_feature_detected!("avx"),
            gs_base: 0,
        }
    }

    /// Where everything is.
    pub(crate) fn places(&self) -> Places {
        Places {
            data: self.base + DATA,
            instruction: self.base + self.prologue().len() as u64,
            landing: self.base + LANDING as u64,
        }
    }

    /// Whether AVX instructions can be tested.
    pub(crate) fn avx(&self) -> bool {
        self.avx
    }

    /// Sets the GS base of this thread, which nothing in a 64-bit Linux program uses.
    pub(crate) fn set_gs_base(&mut self, base: u64) {
        const ARCH_SET_GS: libc::c_int = 0x1001;
        if base != self.gs_base {
            // SAFETY: no code of this thread addresses through GS but the instructions under test.
            let result = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, base) };
            assert_eq!(result, 0);
            self.gs_base = base;
        }
    }

    /// Runs `instruction` with the registers of `state` and `data` in the data pages; both hold the result afterwards.
    ///
    /// The caller answers for the instruction: it must not fault, must access memory only within the data pages, and must go on
    /// to the next instruction or to [`Places::landing`].
    pub(crate) fn run(&self, instruction: &[u8], state: &mut State, data: &mut [u8; DATA_LEN]) {
        let code = self.code(instruction);
        // SAFETY: the arena is mapped, writable here, and only this thread knows it; the code page becomes executable only after
        // it was written. The generated code keeps the callee-saved registers and the stack pointer of the System V ABI,
        // clears DF, and accesses the state page alone; for the instruction under test see above.
        unsafe {
            let base = self.base as *mut u8;
            protect(base, libc::PROT_READ | libc::PROT_WRITE);
            base.copy_from_nonoverlapping(code.as_ptr(), code.len());
            protect(base, libc::PROT_READ | libc::PROT_EXEC);
            let native_state = (self.base + STATE) as *mut State;
            let native_data = (self.base + DATA) as *mut [u8; DATA_LEN];
            native_state.write(*state);
            native_data.copy_from_nonoverlapping(data, 1);
            let enter: extern "sysv64" fn() = std::mem::transmute(base);
            enter();
            *state = native_state.read();
            native_data.copy_to_nonoverlapping(data, 1);
        }
    }

    /// Everything up to the instruction under test.
    fn prologue(&self) -> Code {
        let mut code = Code::new(self.base);
        code.bytes(&[0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57]); // push rbx, rbp, r12 to r15
        code.relative(&[0x48, 0x89, 0x25], HOST_RSP); // mov [host_rsp], rsp
        code.relative(&[0x48, 0x8d, 0x25], RFLAGS); // lea rsp, [rflags]
        code.bytes(&[0x9d]); // popfq
        for index in 0..16 {
            self.vector(&mut code, index, 0x6f); // vmovdqu ymm, [vectors]
        }
        for index in 0..16u8 {
            code.relative(&rex_w(0x8b, index), GPR + 8 * u64::from(index)); // mov reg, [gpr]
        }
        code
    }

    fn code(&self, instruction: &[u8]) -> Code {
        let mut code = self.prologue();
        code.bytes(instruction);
        let epilogue = code.len();
        for index in 0..16u8 {
            code.relative(&rex_w(0x89, index), GPR + 8 * u64::from(index)); // mov [gpr], reg
        }
        for index in 0..16 {
            self.vector(&mut code, index, 0x7f); // vmovdqu [vectors], ymm
        }
        code.relative(&[0x48, 0x8d, 0x25], RFLAGS + 8); // lea rsp, [rflags + 8]
        code.bytes(&[0x9c]); // pushfq
        code.relative(&[0x48, 0x8b, 0x25], HOST_RSP); // mov rsp, [host_rsp]
        code.bytes(&[0xfc]); // cld
        code.bytes(&[
            0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3,
        ]); // pop r15 to r12, rbp, rbx; ret
        assert!(code.len() <= LANDING);
        code.bytes(&vec![0xcc; LANDING - code.len()]);
        // mov qword [landed], 1: the displacement counts from behind the immediate.
        code.relative(&[0x48, 0xc7, 0x05], LANDED - 4);
        code.bytes(&[1, 0, 0, 0]);
        let back = epilogue as i32 - (code.len() as i32 + 5);
        code.bytes(&[0xe9]);
        code.bytes(&back.to_le_bytes());
        code
    }

    /// A move of vector register `index` from (0x6f) or to (0x7f) the state page.
    fn vector(&self, code: &mut Code, index: u8, opcode: u8) {
        let offset = VECTORS + 32 * u64::from(index);
        let modrm = 0x05 | (index & 7) << 3;
        if self.avx {
            let vex = if index < 8 { 0xfe } else { 0x7e };
            code.relative(&[0xc5, vex, opcode, modrm], offset);
        } else {
            let rex = 0x40 | index >> 3 << 2;
            code.relative(&[0xf3, rex, 0x0f, opcode, modrm], offset);
        }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        self.set_gs_base(0);
        // SAFETY: this mapping was made by `new`, and no reference into it outlives a run.
        unsafe { libc::munmap(self.mapping, 2 * ARENA_LEN) };
    }
}

/// Changes the protection of the code page.
///
/// # Safety
///
/// `page` is the first page of an arena, and no other thread executes in it.
unsafe fn protect(page: *mut u8, protection: libc::c_int) {
    // SAFETY: the caller owns the page.
    let result = unsafe { libc::mprotect(page.cast(), 4096, protection) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// REX.W, `opcode`, and a ModRM byte for register `index` and a RIP-relative operand.
fn rex_w(opcode: u8, index: u8) -> [u8; 3] {
    [0x48 | index >> 3 << 2, opcode, 0x05 | (index & 7) << 3]
}

/// Code under construction for the start of an arena.
struct Code {
    base: u64,
    bytes: Vec<u8>,
}

impl Code {
    fn new(base: u64) -> Self {
        Self {
            base,
            bytes: Vec::new(),
        }
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// `instruction` followed by a RIP-relative displacement to `offset` in the state page.
    fn relative(&mut self, instruction: &[u8], offset: u64) {
        self.bytes(instruction);
        let next = self.base + self.bytes.len() as u64 + 4;
        let displacement = (self.base + STATE + offset).wrapping_sub(next) as i32;
        self.bytes(&displacement.to_le_bytes());
    }
}

impl std::ops::Deref for Code {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}
