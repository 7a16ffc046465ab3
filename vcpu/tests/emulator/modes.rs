//! Real, virtual-8086, protected and long mode where a Linux program cannot go: segments, limits, wrap-around, faults.

use vcpu::emulate::{Cpu, EmulateError, Fault, Outcome};

use crate::guest::{
    self, CF, CS, DS, ES, FS, GS, Guest, MMIO, RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP, SS, Seen, ZF,
};

fn fault(vector: u8, error_code: Option<u32>) -> Outcome {
    Outcome::Fault(Fault {
        vector,
        error_code,
        cr2: None,
    })
}

/// Emulates and checks that a fault changes nothing.
fn run(guest: &Guest, cpu: &mut Cpu, bytes: &[u8]) -> Outcome {
    let before = cpu.clone();
    let outcome = guest.emulate(cpu, bytes).unwrap();
    if let Outcome::Fault(_) = outcome {
        assert_eq!(*cpu, before);
        assert_eq!(guest.device.seen(), []);
    }
    outcome
}

#[test]
fn real_mode_adds_the_segment_base() {
    let guest = Guest::new();
    let mut cpu = guest::real_mode();
    cpu.segments[ES].base = 0xb_8000;
    cpu.gpr[RDI] = 0xffff_0010; // the upper half is not part of DI
    cpu.gpr[RAX] = 0x0741;
    assert_eq!(run(&guest, &mut cpu, &[0x26, 0x89, 0x05]), Outcome::Retired); // mov es:[di], ax
    assert_eq!(guest.read(0xb_8010), [0x41, 0x07]);
    assert_eq!(cpu.rip, 3);
}

#[test]
fn real_mode_addresses_wrap_at_64_kib() {
    let guest = Guest::new();
    let mut cpu = guest::real_mode();
    guest.write(0x0110, &[0x55]);
    cpu.gpr[RBX] = 0xff00;
    cpu.gpr[RSI] = 0x0200;
    assert_eq!(run(&guest, &mut cpu, &[0x8a, 0x40, 0x10]), Outcome::Retired); // mov al, [bx + si + 0x10]
    assert_eq!(cpu.gpr[RAX], 0x55);
}

#[test]
fn real_mode_limit_faults_carry_no_error_code() {
    let guest = Guest::new();
    let mut cpu = guest::real_mode();
    cpu.gpr[RBX] = 0xffff;
    cpu.gpr[RBP] = 0xffff;
    assert_eq!(run(&guest, &mut cpu, &[0x8b, 0x07]), fault(13, None)); // mov ax, [bx]
    assert_eq!(run(&guest, &mut cpu, &[0x8b, 0x46, 0x00]), fault(12, None)); // mov ax, [bp]
    assert_eq!(run(&guest, &mut cpu, &[0x8a, 0x07]), Outcome::Retired); // mov al, [bx]
    // A 32-bit address beyond the limit.
    cpu.gpr[RBX] = 0x1_0000;
    assert_eq!(run(&guest, &mut cpu, &[0x67, 0x8a, 0x03]), fault(13, None));
}

#[test]
fn unreal_mode_reaches_devices_above_1_mib() {
    let guest = Guest::new();
    let mut cpu = guest::real_mode();
    cpu.segments[DS].limit = 0xffff_ffff;
    cpu.gpr[RBX] = MMIO + 8;
    cpu.gpr[RAX] = 0xdead_beef;
    assert_eq!(
        run(&guest, &mut cpu, &[0x67, 0x66, 0x89, 0x03]),
        Outcome::Retired
    );
    assert_eq!(
        guest.device.seen(),
        [Seen::Write {
            gpa: MMIO + 8,
            data: vec![0xef, 0xbe, 0xad, 0xde]
        }]
    );
}

#[test]
fn the_reset_vector_runs_from_the_top_of_4_gib() {
    let guest = Guest::new();
    let mut cpu = guest::real_mode();
    cpu.segments[CS].base = 0xffff_0000;
    cpu.rip = 0xfff0;
    guest.write(0x1234, &[0x5a]);
    assert_eq!(run(&guest, &mut cpu, &[0xa0, 0x34, 0x12]), Outcome::Retired); // mov al, [0x1234]
    assert_eq!((cpu.gpr[RAX], cpu.rip), (0x5a, 0xfff3));
    // The instruction pointer has 16 bits.
    cpu.rip = 0xfffd;
    assert_eq!(run(&guest, &mut cpu, &[0xa0, 0x34, 0x12]), Outcome::Retired);
    assert_eq!(cpu.rip, 0);
}

#[test]
fn virtual_8086_mode_is_real_mode_with_error_codes() {
    let guest = Guest::new();
    let mut cpu = guest::real_mode();
    cpu.cr0 |= 1;
    cpu.rflags |= 1 << 17;
    for segment in &mut cpu.segments {
        segment.attributes = 0xf3;
    }
    cpu.gpr[RBX] = 0xffff;
    assert_eq!(run(&guest, &mut cpu, &[0x8b, 0x07]), fault(13, Some(0)));
    guest.write(0xffff, &[7]);
    assert_eq!(run(&guest, &mut cpu, &[0x2e, 0x8a, 0x07]), Outcome::Retired); // mov al, cs:[bx]
    assert_eq!(cpu.gpr[RAX], 7);
}

#[test]
fn protected_mode_checks_type_limit_and_presence() {
    let guest = Guest::new();
    let fresh = || {
        let mut cpu = guest::protected_mode();
        cpu.gpr[RBX] = 0x1000;
        cpu
    };
    let (read, write): (&[u8], &[u8]) = (&[0x8b, 0x03], &[0x89, 0x03]);
    let mut cpu = fresh();
    cpu.segments[DS].attributes = 0xc091; // read-only data
    assert_eq!(run(&guest, &mut cpu, write), fault(13, Some(0)));
    assert_eq!(run(&guest, &mut cpu, read), Outcome::Retired);
    cpu.segments[DS].attributes = 0xc099; // execute-only code
    assert_eq!(run(&guest, &mut cpu, read), fault(13, Some(0)));
    cpu.segments[DS].attributes = 0xc09b; // readable code
    assert_eq!(run(&guest, &mut cpu, write), fault(13, Some(0)));
    assert_eq!(run(&guest, &mut cpu, read), Outcome::Retired);
    cpu.segments[DS].attributes = 0; // null selector
    assert_eq!(run(&guest, &mut cpu, read), fault(13, Some(0)));

    let mut cpu = fresh();
    cpu.segments[DS].limit = 0x1003;
    assert_eq!(run(&guest, &mut cpu, read), Outcome::Retired);
    cpu.segments[DS].limit = 0x1002;
    assert_eq!(run(&guest, &mut cpu, read), fault(13, Some(0)));
    cpu.segments[DS].attributes = 0xc097; // expand-down: above the limit is inside
    assert_eq!(run(&guest, &mut cpu, read), fault(13, Some(0)));
    cpu.segments[DS].limit = 0xfff;
    assert_eq!(run(&guest, &mut cpu, read), Outcome::Retired);
    cpu.segments[DS].attributes = 0x8097; // with a 64 KiB upper bound
    cpu.gpr[RBX] = 0xfffd;
    assert_eq!(run(&guest, &mut cpu, read), fault(13, Some(0)));

    let mut cpu = fresh();
    cpu.segments[SS].limit = 0xfff;
    cpu.gpr[RBP] = 0x1000;
    assert_eq!(
        run(&guest, &mut cpu, &[0x8b, 0x45, 0x00]),
        fault(12, Some(0))
    ); // mov eax, [ebp]
    assert_eq!(
        run(&guest, &mut cpu, &[0x3e, 0x8b, 0x45, 0x00]),
        Outcome::Retired
    ); // the same in ds
}

#[test]
fn protected_mode_addresses_wrap_at_4_gib() {
    let guest = Guest::new();
    let mut cpu = guest::protected_mode();
    cpu.segments[FS].base = 0xffff_f000;
    cpu.gpr[RBX] = 0x2345;
    guest.write(0x1345, &[9]);
    assert_eq!(run(&guest, &mut cpu, &[0x64, 0x8a, 0x03]), Outcome::Retired); // mov al, fs:[ebx]
    assert_eq!(cpu.gpr[RAX], 9);
}

#[test]
fn long_mode_uses_the_bases_of_fs_and_gs_alone() {
    let guest = Guest::new();
    guest.map(0x1000, 0x7000, MMIO, 3);
    let mut cpu = guest::long_mode(0x1000);
    cpu.segments[GS].base = 0x7000;
    cpu.segments[DS].base = 0x10_0000;
    cpu.segments[DS].limit = 0;
    cpu.gpr[RBX] = 0x20;
    assert_eq!(run(&guest, &mut cpu, &[0x65, 0x8b, 0x03]), Outcome::Retired); // mov eax, gs:[rbx]
    cpu.gpr[RBX] = 0x7024;
    assert_eq!(run(&guest, &mut cpu, &[0x3e, 0x8b, 0x03]), Outcome::Retired); // mov eax, ds:[rbx]
    let expected = [
        Seen::Read {
            gpa: MMIO + 0x20,
            len: 4,
        },
        Seen::Read {
            gpa: MMIO + 0x24,
            len: 4,
        },
    ];
    assert_eq!(guest.device.seen(), expected);
}

#[test]
fn long_mode_addresses_must_be_canonical() {
    let guest = Guest::new();
    let mut cpu = guest::long_mode(0x1000);
    for address in [1 << 47, 0x7fff_ffff_fffd, 0xffff_7fff_ffff_ffff] {
        cpu.gpr[RBX] = address;
        cpu.gpr[RBP] = address;
        assert_eq!(run(&guest, &mut cpu, &[0x8b, 0x03]), fault(13, Some(0)));
        assert_eq!(
            run(&guest, &mut cpu, &[0x8b, 0x45, 0x00]),
            fault(12, Some(0))
        );
    }
    // At the upper end of the lower half, the access fits: it gets as far as the page tables.
    cpu.gpr[RBX] = 0x7fff_ffff_fffc;
    let page = Fault {
        vector: 14,
        error_code: Some(0),
        cr2: Some(0x7fff_ffff_fffc),
    };
    assert_eq!(run(&guest, &mut cpu, &[0x8b, 0x03]), Outcome::Fault(page));
}

#[test]
fn compatibility_mode_has_32_bit_addresses_and_long_mode_tables() {
    let guest = Guest::new();
    guest.map(0x1000, 0x9000_0000, MMIO, 7);
    let mut cpu = guest::long_mode(0x1000);
    cpu.segments[CS].attributes = 0xc0fb;
    cpu.segments[SS].attributes = 0xc0f3;
    cpu.gpr[RBX] = 0xffff_ffff_9000_0004;
    assert_eq!(run(&guest, &mut cpu, &[0x8b, 0x03]), Outcome::Retired);
    assert_eq!(
        guest.device.seen(),
        [Seen::Read {
            gpa: MMIO + 4,
            len: 4
        }]
    );
}

#[test]
fn stack_width_follows_ss() {
    let guest = Guest::new();
    let mut cpu = guest::protected_mode();
    cpu.segments[SS].attributes = 0x93; // 16-bit stack
    cpu.gpr[RSP] = 0x1234_0000;
    cpu.gpr[RBX] = MMIO;
    guest.device.fill(0, &[1, 2, 3, 4]);
    cpu.segments[SS].limit = 0xffff;
    assert_eq!(run(&guest, &mut cpu, &[0xff, 0x33]), Outcome::Retired); // push dword [ebx]
    assert_eq!(cpu.gpr[RSP], 0x1234_fffc);
    assert_eq!(guest.read(0xfffc), [1, 2, 3, 4]);
    assert_eq!(run(&guest, &mut cpu, &[0x8f, 0x43, 0x08]), Outcome::Retired); // pop dword [ebx + 8]
    assert_eq!(cpu.gpr[RSP], 0x1234_0000);
    let seen = guest.device.seen();
    assert_eq!(
        seen[1],
        Seen::Write {
            gpa: MMIO + 8,
            data: vec![1, 2, 3, 4]
        }
    );
    // push with the stack outside of its limit, pop to a segment outside of its.
    cpu.segments[SS].limit = 0xff;
    assert_eq!(
        guest.emulate(&mut cpu, &[0xff, 0x33]).unwrap(),
        fault(12, Some(0))
    );
    cpu.gpr[RSP] = 0x10;
    cpu.segments[DS].limit = 0xff;
    assert_eq!(
        guest.emulate(&mut cpu, &[0x8f, 0x03]).unwrap(),
        fault(13, Some(0))
    );
    assert_eq!(cpu.gpr[RSP], 0x10);
}

#[test]
fn branches_check_their_target() {
    let guest = Guest::new();
    let mut cpu = guest::protected_mode();
    cpu.segments[CS].limit = 0xffff;
    cpu.gpr[RBX] = 0x2000;
    cpu.gpr[RSP] = 0x3000;
    guest.write(0x2000, &0x1_0000u32.to_le_bytes());
    assert_eq!(run(&guest, &mut cpu, &[0xff, 0x23]), fault(13, Some(0))); // jmp [ebx]
    assert_eq!(run(&guest, &mut cpu, &[0xff, 0x13]), fault(13, Some(0))); // call [ebx]
    guest.write(0x2000, &0x8000u32.to_le_bytes());
    cpu.rip = 0x100;
    assert_eq!(run(&guest, &mut cpu, &[0xff, 0x13]), Outcome::Retired);
    assert_eq!((cpu.rip, cpu.gpr[RSP]), (0x8000, 0x2ffc));
    assert_eq!(guest.read(0x2ffc), 0x102u32.to_le_bytes());

    guest.map(0x4000, 0x2000, 0x2000, 3);
    guest.write_u64(0x2000, 1 << 63);
    let mut cpu = guest::long_mode(0x4000);
    cpu.gpr[RBX] = 0x2000;
    assert_eq!(run(&guest, &mut cpu, &[0xff, 0x23]), fault(13, Some(0)));
}

#[test]
fn invalid_and_overlong_encodings() {
    let guest = Guest::new();
    let mut cpu = guest::protected_mode();
    cpu.gpr[RBX] = 0x1000;
    assert_eq!(run(&guest, &mut cpu, &[0x0f, 0x04]), fault(6, None));
    assert_eq!(run(&guest, &mut cpu, &[0xf0, 0x8b, 0x03]), fault(6, None)); // lock mov
    assert_eq!(run(&guest, &mut cpu, &[0xf0, 0x39, 0x03]), fault(6, None)); // lock cmp
    assert_eq!(run(&guest, &mut cpu, &[0x66; 15]), fault(13, Some(0)));
}

#[test]
fn divide_errors() {
    let guest = Guest::new();
    let mut cpu = guest::protected_mode();
    cpu.gpr[RBX] = 0x1000;
    assert_eq!(run(&guest, &mut cpu, &[0xf7, 0x33]), fault(0, None)); // div dword [ebx] = 0
    guest.write(0x1000, &1u32.to_le_bytes());
    cpu.gpr[RDX] = 1;
    assert_eq!(run(&guest, &mut cpu, &[0xf7, 0x33]), fault(0, None)); // the quotient has 33 bits
    guest.write(0x1000, &u32::MAX.to_le_bytes());
    cpu.gpr[RDX] = 0xffff_ffff;
    cpu.gpr[RAX] = 0x8000_0000;
    assert_eq!(run(&guest, &mut cpu, &[0xf7, 0x3b]), fault(0, None)); // -2^31 / -1
    let mut cpu = guest::long_mode(0x4000);
    guest.map(0x4000, 0x1000, 0x1000, 3);
    guest.write_u64(0x1000, u64::MAX);
    cpu.gpr[RBX] = 0x1000;
    cpu.gpr[RDX] = 1 << 63;
    assert_eq!(run(&guest, &mut cpu, &[0x48, 0xf7, 0x3b]), fault(0, None)); // -2^127 / -1
}

#[test]
fn vector_instructions_respect_the_control_registers() {
    let guest = Guest::new();
    let movups: &[u8] = &[0x0f, 0x10, 0x03];
    let mut cpu = guest::protected_mode();
    cpu.gpr[RBX] = 0x1008;
    let error = guest.emulate(&mut cpu, movups).unwrap_err();
    assert!(matches!(error, EmulateError::NoVectorRegisters { rip: 0 }));
    assert_eq!(
        run(&guest, &mut cpu, &[0x0f, 0x28, 0x03]),
        fault(13, Some(0))
    ); // movaps, not aligned
    assert_eq!(
        run(&guest, &mut cpu, &[0xc5, 0xf8, 0x10, 0x03]),
        fault(6, None)
    ); // AVX is not enabled
    cpu.cr0 |= 1 << 3;
    assert_eq!(run(&guest, &mut cpu, movups), fault(7, None));
    cpu.cr0 |= 1 << 2;
    assert_eq!(run(&guest, &mut cpu, movups), fault(6, None));
    cpu.cr0 = 0x11;
    cpu.cr4 = 0;
    assert_eq!(run(&guest, &mut cpu, movups), fault(6, None));
}

#[test]
fn unknown_instructions_are_named() {
    let guest = Guest::new();
    let mut cpu = guest::protected_mode();
    cpu.gpr[RBX] = 0x1000;
    let before = cpu.clone();
    let error = guest.emulate(&mut cpu, &[0xd9, 0x03, 0x90]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "instruction Fld (d9 03) at rip 0x0 is not emulated"
    );
    assert_eq!(cpu, before);
}

#[test]
fn sixteen_byte_exchange_needs_alignment() {
    let guest = Guest::new();
    guest.map(0x4000, 0x1000, 0x1000, 3);
    let mut cpu = guest::long_mode(0x4000);
    cpu.gpr[RBX] = 0x1008;
    assert_eq!(
        run(&guest, &mut cpu, &[0x48, 0x0f, 0xc7, 0x0b]),
        fault(13, Some(0))
    );
    // On a device, one read and one write of the whole.
    guest.map(0x4000, 0x1000, MMIO, 3);
    cpu.gpr[RBX] = 0x1000;
    cpu.gpr[RCX] = 2;
    assert_eq!(
        run(&guest, &mut cpu, &[0x48, 0x0f, 0xc7, 0x0b]),
        Outcome::Retired
    );
    assert_eq!(cpu.rflags & (ZF | CF), ZF);
    let mut written = vec![0; 16];
    written[..2].copy_from_slice(&[0x00, 0x10]);
    written[8] = 2;
    assert_eq!(
        guest.device.seen(),
        [
            Seen::Read { gpa: MMIO, len: 16 },
            Seen::Write {
                gpa: MMIO,
                data: written
            }
        ]
    );
}

#[test]
fn bit_offsets_reach_backwards() {
    let guest = Guest::new();
    let mut cpu = guest::real_mode();
    cpu.gpr[RBX] = 0x10;
    cpu.gpr[RAX] = 0xff7f; // -129: nine words back, bit 15
    assert_eq!(run(&guest, &mut cpu, &[0x0f, 0xab, 0x07]), Outcome::Retired); // bts [bx], ax: wraps below zero
    assert_eq!(guest.read(0xfffe), [0, 0x80]);
    assert_eq!(cpu.rflags & CF, 0);
    assert_eq!(run(&guest, &mut cpu, &[0x0f, 0xa3, 0x07]), Outcome::Retired); // bt
    assert_eq!(cpu.rflags & CF, CF);
}

#[test]
fn retiring_clears_the_resume_flag() {
    let guest = Guest::new();
    let mut cpu = guest::protected_mode();
    cpu.rflags |= 1 << 16;
    cpu.gpr[RBX] = 0x1000;
    assert_eq!(run(&guest, &mut cpu, &[0x8b, 0x03]), Outcome::Retired);
    assert_eq!(cpu.rflags, 2);
}
