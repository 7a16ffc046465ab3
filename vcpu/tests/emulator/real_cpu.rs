//! Thousands of generated instructions, each run on this machine's CPU on plain memory and by the emulator on RAM, on MMIO and
//! on both at once: registers, flags, memory and the way of branches must agree.
//!
//! The generator starts from the same seed each time. A failing case is shrunk and printed.

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, RflagsBits};
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};
use vcpu::emulate::{Cpu, Exit, Outcome, emulate};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::case::cases;
use crate::draft::{Built, Draft, GS_BASE};
use crate::encoding::{self, Template};
use crate::guest::{self, Device, GS, Vectors};
use crate::native::{Arena, DATA_LEN, State};

/// What backs the four data pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Backing {
    Ram,
    Mmio,
    /// Every other page, so that an access across a border has a half in each.
    Mixed,
}

impl Backing {
    fn is_ram(self, page: usize) -> bool {
        match self {
            Self::Ram => true,
            Self::Mmio => false,
            Self::Mixed => page.is_multiple_of(2),
        }
    }

    /// Root of the page tables that map the data pages so.
    fn root(self) -> u64 {
        0x1_0000 * (self as u64 + 1)
    }
}

/// The machine of [`guest`] with the data pages at the same linear addresses as in the arena.
struct Twin {
    guest: guest::Guest,
    /// Memory with RAM at the arena's addresses, for modes without paging.
    flat: GuestMemoryMmap<()>,
    /// Without any memory, but a device at the arena's addresses.
    bare: GuestMemoryMmap<()>,
    flat_device: Device,
    data: u64,
}

const RAM: u64 = 0x8_0000;

impl Twin {
    fn new(arena: &Arena) -> Self {
        let guest = guest::Guest::new();
        let data = arena.places().data;
        for backing in [Backing::Ram, Backing::Mmio, Backing::Mixed] {
            for page in 0..DATA_LEN / 4096 {
                let offset = page as u64 * 4096;
                let gpa = if backing.is_ram(page) {
                    RAM
                } else {
                    guest::MMIO
                } + offset;
                guest.map(backing.root(), data + offset, gpa, 7);
            }
        }
        guest.device.forget();
        let flat_device = Device::new(data, DATA_LEN);
        flat_device.forget();
        let flat = GuestMemoryMmap::from_ranges(&[(GuestAddress(data), DATA_LEN)]).unwrap();
        let bare = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
        Self {
            guest,
            flat,
            bare,
            flat_device,
            data,
        }
    }

    /// Runs `built` from `cpu` in 64-bit mode over `backing`.
    fn run_long(&self, built: &Built, mut cpu: Cpu, backing: Backing) -> Result<After, String> {
        for (page, content) in built.data.chunks(4096).enumerate() {
            self.guest.write(RAM + page as u64 * 4096, content);
            self.guest.device.fill(page * 4096, content);
        }
        cpu.cr3 = backing.root();
        let vectors = retire(
            &mut cpu,
            &self.guest.memory,
            &self.guest.device,
            &built.bytes,
            built,
        )?;
        let mut data = Box::new([0; DATA_LEN]);
        for (page, content) in data.chunks_mut(4096).enumerate() {
            if backing.is_ram(page) {
                let gpa = GuestAddress(RAM + page as u64 * 4096);
                self.guest.memory.read_slice(content, gpa).unwrap();
            } else {
                self.guest.device.read(page * 4096, content);
            }
        }
        Ok(After::of(&cpu, vectors, data))
    }

    /// Runs `bytes` from `cpu`, which is in a mode without paging, over memory or a device.
    fn run_flat(
        &self,
        built: &Built,
        bytes: &[u8],
        mut cpu: Cpu,
        ram: bool,
    ) -> Result<After, String> {
        self.flat
            .write_slice(&built.data[..], GuestAddress(self.data))
            .unwrap();
        self.flat_device.fill(0, &built.data[..]);
        let memory = if ram { &self.flat } else { &self.bare };
        let vectors = retire(&mut cpu, memory, &self.flat_device, bytes, built)?;
        let mut data = Box::new([0; DATA_LEN]);
        if ram {
            self.flat
                .read_slice(&mut data[..], GuestAddress(self.data))
                .unwrap();
        } else {
            self.flat_device.read(0, &mut data[..]);
        }
        Ok(After::of(&cpu, vectors, data))
    }
}

/// Emulates one instruction, which must retire, and returns the vector registers.
fn retire(
    cpu: &mut Cpu,
    memory: &GuestMemoryMmap<()>,
    device: &Device,
    bytes: &[u8],
    built: &Built,
) -> Result<[[u8; 32]; 16], String> {
    let mut vectors = Vectors(built.vectors);
    match emulate(
        cpu,
        memory,
        device,
        Exit::new(bytes).with_vectors(&mut vectors),
    ) {
        Ok(Outcome::Retired) => Ok(vectors.0),
        Ok(outcome) => Err(format!("{outcome:?}")),
        Err(error) => Err(error.to_string()),
    }
}

/// Everything an instruction can have changed.
struct After {
    gpr: [u64; 16],
    rflags: u64,
    rip: u64,
    vectors: [[u8; 32]; 16],
    data: Box<[u8; DATA_LEN]>,
}

impl After {
    fn of(cpu: &Cpu, vectors: [[u8; 32]; 16], data: Box<[u8; DATA_LEN]>) -> Self {
        Self {
            gpr: cpu.gpr,
            rflags: cpu.rflags,
            rip: cpu.rip,
            vectors,
            data,
        }
    }

    /// Compares the emulated `self` with what the CPU did, in the flags `defined` and `vector_len` bytes of each vector.
    fn agree(&self, native: &Self, defined: u64, vector_len: usize) -> Result<(), String> {
        if let Some(index) = (0..16).find(|&index| self.gpr[index] != native.gpr[index]) {
            let (emulated, native) = (self.gpr[index], native.gpr[index]);
            return Err(format!(
                "register {index}: native {native:#x}, emulated {emulated:#x}"
            ));
        }
        if (self.rflags ^ native.rflags) & defined != 0 {
            return Err(format!(
                "flags: native {:#x}, emulated {:#x}",
                native.rflags, self.rflags
            ));
        }
        if self.rip != native.rip {
            return Err(format!(
                "rip: native {:#x}, emulated {:#x}",
                native.rip, self.rip
            ));
        }
        for (native, emulated) in native.vectors.iter().zip(&self.vectors) {
            same_bytes("vector", &native[..vector_len], &emulated[..vector_len])?;
        }
        same_bytes("memory", &native.data[..], &self.data[..])
    }
}

/// The flags that the architecture defines after `instruction`, and DF.
fn defined_flags(instruction: &Instruction, built: &Built) -> u64 {
    let all = 0x8d5 | guest::DF;
    let shifts = matches!(
        instruction.mnemonic(),
        Mnemonic::Shl
            | Mnemonic::Sal
            | Mnemonic::Shr
            | Mnemonic::Sar
            | Mnemonic::Shld
            | Mnemonic::Shrd
    );
    let rotates = matches!(
        instruction.mnemonic(),
        Mnemonic::Rol | Mnemonic::Ror | Mnemonic::Rcl | Mnemonic::Rcr
    );
    if shifts || rotates {
        let bits = instruction.memory_size().size() as u64 * 8;
        let operand = instruction.op_count() - 1;
        let count = instruction
            .try_immediate(operand)
            .unwrap_or(built.gpr[guest::RCX])
            & if bits == 64 { 0x3f } else { 0x1f };
        // No count, no change.
        return match count {
            0 => all,
            1 if rotates => all,
            1 => all & !0x10,
            _ if rotates => all & !0x800,
            _ if count >= bits => all & !0x811,
            _ => all & !0x810,
        };
    }
    let undefined = instruction.rflags_undefined();
    let pairs = [
        (RflagsBits::OF, 0x800u64),
        (RflagsBits::SF, 0x80),
        (RflagsBits::ZF, 0x40),
        (RflagsBits::AF, 0x10),
        (RflagsBits::CF, 0x1),
        (RflagsBits::PF, 0x4),
    ];
    pairs
        .iter()
        .filter(|(bit, _)| undefined & bit != 0)
        .fold(all, |mask, (_, flag)| mask & !flag)
}

fn same_bytes(what: &str, native: &[u8], emulated: &[u8]) -> Result<(), String> {
    if native == emulated {
        return Ok(());
    }
    let at = native
        .iter()
        .zip(emulated)
        .position(|(left, right)| left != right)
        .unwrap_or(0);
    let end = (at + 16).min(native.len());
    let (native, emulated) = (&native[at..end], &emulated[at..end]);
    Err(format!(
        "{what} from {at:#x}: native {native:02x?}, emulated {emulated:02x?}"
    ))
}

/// One family of instructions, and where they run.
struct Comparison {
    arena: Arena,
    twin: Twin,
    templates: Vec<Template>,
}

impl Comparison {
    /// Runs `built` natively and in every way the emulator can, and compares.
    fn check(&mut self, built: &Built) -> Result<(), String> {
        let rip = self.arena.places().instruction;
        let mut decoder = Decoder::with_ip(64, &built.bytes, rip, DecoderOptions::NONE);
        let instruction = decoder.decode();
        let complain = |way: &str, bytes: &[u8], message: String| {
            format!("{:?} [{bytes:02x?}] {way}: {message}", instruction.code())
        };
        if instruction.len() != built.bytes.len() {
            return Err(complain(
                "natively",
                &built.bytes,
                "is not one instruction".into(),
            ));
        }
        let mut native = self.run_native(built);
        let defined = defined_flags(&instruction, built);
        let vector_len = if self.arena.avx() { 32 } else { 16 };

        for backing in [Backing::Ram, Backing::Mmio, Backing::Mixed] {
            let cpu = start(guest::long_mode(0), built, rip);
            let after = self.twin.run_long(built, cpu, backing);
            after
                .and_then(|after| after.agree(&native, defined, vector_len))
                .map_err(|message| {
                    complain(
                        &format!("in 64-bit mode on {backing:?}"),
                        &built.bytes,
                        message,
                    )
                })?;
        }

        let Some([dword, word]) = &built.legacy else {
            return Ok(());
        };
        native.gpr = native.gpr.map(|value| value & 0xffff_ffff);
        for (mode, cpu, bytes) in [
            ("32", guest::protected_mode(), dword),
            ("16", guest::real_mode(), word),
        ] {
            let mut cpu = start(cpu, built, 0x1000);
            cpu.gpr = built.gpr.map(|value| value & 0xffff_ffff);
            cpu.cr4 = 0x200;
            for segment in &mut cpu.segments {
                segment.limit = 0xffff_ffff;
            }
            native.rip = cpu.rip + bytes.len() as u64;
            for ram in [true, false] {
                let after = self.twin.run_flat(built, bytes, cpu.clone(), ram);
                after
                    .and_then(|after| after.agree(&native, defined, vector_len))
                    .map_err(|message| {
                        complain(&format!("in {mode}-bit mode, RAM: {ram}"), bytes, message)
                    })?;
            }
        }
        Ok(())
    }

    fn run_native(&mut self, built: &Built) -> After {
        let places = self.arena.places();
        let mut state = State::new(built.gpr, built.rflags, built.vectors);
        let mut data = built.data.clone();
        self.arena.set_gs_base(if built.gs { GS_BASE } else { 0 });
        self.arena.run(&built.bytes, &mut state, &mut data);
        let rip = match state.landed {
            0 => places.instruction + built.bytes.len() as u64,
            _ => places.landing,
        };
        After {
            gpr: state.gpr,
            rflags: state.rflags,
            rip,
            vectors: state.vectors,
            data,
        }
    }
}

/// `cpu` with the registers of `built`, at `rip`.
fn start(mut cpu: Cpu, built: &Built, rip: u64) -> Cpu {
    cpu.rip = rip;
    cpu.gpr = built.gpr;
    cpu.rflags = built.rflags;
    cpu.segments[GS].base = GS_BASE;
    for (segment, selector) in cpu.segments.iter_mut().zip(selectors()) {
        segment.selector = selector;
    }
    cpu
}

/// ES, CS, SS, DS, FS, GS of this process.
fn selectors() -> [u16; 6] {
    let mut selectors = [0u16; 6];
    // SAFETY: reads segment registers, nothing else.
    unsafe {
        std::arch::asm!(
            "mov {0:x}, es", "mov {1:x}, cs", "mov {2:x}, ss", "mov {3:x}, ds", "mov {4:x}, fs", "mov {5:x}, gs",
            out(reg) selectors[0], out(reg) selectors[1], out(reg) selectors[2],
            out(reg) selectors[3], out(reg) selectors[4], out(reg) selectors[5],
            options(nomem, nostack, preserves_flags),
        );
    }
    selectors
}

/// Compares `per_template` cases for each of `templates`, on average.
fn compare(templates: Vec<Template>, per_template: u32) {
    let arena = Arena::new();
    let twin = Twin::new(&arena);
    let count = templates.len();
    let mut comparison = Comparison {
        arena,
        twin,
        templates,
    };
    let config = Config {
        cases: count as u32 * per_template,
        failure_persistence: None,
        max_global_rejects: 1 << 20,
        ..Config::default()
    };
    let mut runner =
        TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::XorShift));
    let comparison = std::cell::RefCell::new(&mut comparison);
    let result = runner.run(&cases(count), |case| {
        let mut comparison = comparison.borrow_mut();
        let template = &comparison.templates[case.template];
        let draft = Draft::new(&case, template, comparison.arena.places());
        let built = draft
            .build()
            .ok_or_else(|| TestCaseError::reject("contradiction"))?;
        comparison.check(&built).map_err(TestCaseError::fail)
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

#[test]
fn moves() {
    compare(encoding::moves(), 100);
}

#[test]
fn conditions() {
    compare(encoding::conditions(), 50);
}

#[test]
fn arithmetic() {
    compare(encoding::arithmetic(), 60);
}

#[test]
fn products() {
    compare(encoding::products(), 150);
}

#[test]
fn shifts() {
    compare(encoding::shifts(), 80);
}

#[test]
fn bits() {
    compare(encoding::bits(), 100);
}

#[test]
fn exchanges() {
    compare(encoding::exchanges(), 200);
}

#[test]
fn stack() {
    compare(encoding::stack(), 200);
}

#[test]
fn strings() {
    compare(encoding::strings(), 80);
}

#[test]
fn vectors() {
    compare(
        encoding::vectors(std::arch::is_x86_feature_detected!("avx")),
        60,
    );
}
