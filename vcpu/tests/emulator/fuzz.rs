//! Random bytes as instructions, in every mode, with registers that often hit memory: the emulator never panics, always ends, and
//! changes nothing when it faults or gives up.

use iced_x86::{Decoder, DecoderOptions};
use vcpu::emulate::{Cpu, Exit, Outcome, emulate};

use crate::guest::{self, CS, Guest, MMIO, Vectors};

#[cfg(not(miri))]
const ROUNDS: u32 = 100_000;
#[cfg(miri)]
const ROUNDS: u32 = 200;

/// A generator of random numbers that is the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 32) % limit
    }
}

/// Where 16-bit addresses do not reach, nor strings that run down from the data.
const ROOT: u64 = 0xe_0000;
const PAGES: u64 = 8;
const DATA: u64 = 0x2_0000;

/// A few pages of memory, a few of the device, one read-only, one absent.
fn map(guest: &Guest) {
    guest.write(ROOT, &[0; 0x4000]);
    for page in 0..PAGES {
        let linear = DATA + page * 0x1000;
        let (gpa, flags) = match page {
            0..3 => (linear, 7),
            3..6 => (MMIO + page * 0x1000, 7),
            6 => (linear, 5),
            _ => (0, 0),
        };
        guest.map(ROOT, linear, gpa, flags);
    }
}

fn registers(random: &mut Random) -> Cpu {
    let mut cpu = match random.below(5) {
        0 => guest::real_mode(),
        1 => guest::protected_mode(),
        2 => {
            let mut cpu = guest::protected_mode();
            cpu.segments[CS].attributes &= !0x4000;
            cpu
        }
        3 => {
            let mut cpu = guest::long_mode(ROOT);
            cpu.segments[CS].attributes |= 0x60;
            cpu.segments[guest::SS].attributes |= 0x60;
            cpu
        }
        _ => guest::long_mode(ROOT),
    };
    for register in &mut cpu.gpr {
        *register = match random.below(4) {
            0 => random.next(),
            1 => random.below(64),
            _ => DATA + random.below(PAGES * 0x1000),
        };
    }
    if random.below(8) == 0 {
        for segment in &mut cpu.segments {
            segment.base = random.next();
            segment.limit = random.next() as u32;
            segment.attributes = segment.attributes & 0xe060 | random.next() as u16 & 0x1f9f;
        }
    }
    cpu.rip = random.next();
    cpu.rflags = 2 | random.next() & 0xcd5;
    cpu
}

fn instruction(random: &mut Random) -> Vec<u8> {
    let prefixes = [0x66, 0x67, 0xf2, 0xf3, 0xf0, 0x2e, 0x65, 0x48, 0x4f];
    let mut bytes = Vec::new();
    for _ in 0..random.below(3) {
        bytes.push(prefixes[random.below(prefixes.len() as u64) as usize]);
    }
    if random.below(2) == 0 {
        bytes.push(0x0f);
    }
    while bytes.len() < 15 {
        bytes.push(random.next() as u8);
    }
    if random.below(4) == 0 {
        bytes.truncate(random.below(15) as usize);
    }
    bytes
}

#[test]
fn random_bytes() {
    let guest = Guest::new();
    guest.device.forget();
    map(&guest);
    let root = guest.read_u64(ROOT);
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut retired = 0;
    for _ in 0..ROUNDS {
        let before = registers(&mut random);
        let mut cpu = before.clone();
        let bytes = instruction(&mut random);
        let mut vectors = Vectors([[0; 32]; 16]);
        let exit = Exit::new(&bytes).with_vectors(&mut vectors);
        let result = emulate(&mut cpu, &guest.memory, &guest.device, exit);
        // What the intercept did not bring was fetched from memory, and may be a string instruction.
        let mut decoder = Decoder::new(cpu.code_bits(), &bytes, DecoderOptions::NONE);
        let may_progress = bytes.len() < 15 || decoder.decode().is_string_instruction();
        match result {
            Ok(Outcome::Retired) => retired += 1,
            Ok(Outcome::Continue) => assert_eq!(cpu.rip, before.rip),
            Ok(Outcome::Fault(_)) if may_progress => assert_eq!(cpu.rip, before.rip),
            Ok(Outcome::Fault(_)) | Err(_) => assert_eq!(cpu, before, "{bytes:02x?}"),
        }
        // A random address may have hit the page tables.
        if guest.read_u64(ROOT) & !0x20 != root {
            map(&guest);
        }
    }
    assert!(
        retired > ROUNDS / 20,
        "only {retired} of {ROUNDS} random instructions did something"
    );
}
