//! String instructions beyond what the real CPU can be asked: ports, shares, faults half-way, address wrap.

use vcpu::emulate::{Cpu, Fault, Outcome};

use crate::guest::{self, DF, DS, ES, Guest, MMIO, RAX, RCX, RDI, RDX, RSI, Seen, ZF};

/// Resume flag, set while an instruction waits to go on.
const RF: u64 = 1 << 16;

/// Flat protected mode with a string from `source` to `target`.
fn strings(source: u64, target: u64, count: u64) -> (Guest, Cpu) {
    let mut cpu = guest::protected_mode();
    cpu.gpr[RSI] = source;
    cpu.gpr[RDI] = target;
    cpu.gpr[RCX] = count;
    (Guest::new(), cpu)
}

#[test]
fn rep_outs_writes_memory_to_a_port() {
    let (guest, mut cpu) = strings(0x1000, 0, 3);
    guest.write(0x1000, b"hey");
    cpu.gpr[RDX] = 0xabcd_03f8;
    assert_eq!(
        guest.emulate(&mut cpu, &[0xf3, 0x6e]).unwrap(),
        Outcome::Retired
    );
    let out = |byte| Seen::Out {
        port: 0x3f8,
        data: vec![byte],
    };
    assert_eq!(guest.device.seen(), [out(b'h'), out(b'e'), out(b'y')]);
    assert_eq!((cpu.gpr[RSI], cpu.gpr[RCX], cpu.rip), (0x1003, 0, 2));
}

#[test]
fn rep_ins_reads_a_port_to_memory() {
    let (guest, mut cpu) = strings(0, 0x1004, 2);
    cpu.gpr[RDX] = 0x1f0;
    cpu.rflags |= DF;
    assert_eq!(
        guest.emulate(&mut cpu, &[0xf3, 0x6d]).unwrap(),
        Outcome::Retired
    ); // rep insd, downwards
    assert_eq!(guest.read(0x1000), [5, 6, 7, 8, 1, 2, 3, 4]);
    assert_eq!((cpu.gpr[RDI], cpu.gpr[RCX]), (0xffc, 0));
    let (guest, mut cpu) = strings(0, 0x1000, 2);
    assert_eq!(
        guest.emulate(&mut cpu, &[0x66, 0x6d]).unwrap(),
        Outcome::Retired
    ); // insw, once
    assert_eq!((guest.read(0x1000), cpu.gpr[RCX]), ([1, 2], 2));
}

#[test]
fn ins_checks_its_target_before_the_port() {
    let (guest, mut cpu) = strings(0, 0x1000, 1);
    cpu.segments[ES].limit = 0xfff;
    let before = cpu.clone();
    let fault = Fault {
        vector: 13,
        error_code: Some(0),
        cr2: None,
    };
    assert_eq!(
        guest.emulate(&mut cpu, &[0x6c]).unwrap(),
        Outcome::Fault(fault)
    );
    assert_eq!(cpu, before);
    assert_eq!(guest.device.seen(), []);
}

#[test]
fn outs_takes_a_segment_prefix_and_ins_does_not() {
    let (guest, mut cpu) = strings(0x10, 0x10, 1);
    cpu.segments[guest::FS].base = 0x2000;
    guest.write(0x2010, &[0x66]);
    assert_eq!(
        guest.emulate(&mut cpu, &[0x64, 0x6e]).unwrap(),
        Outcome::Retired
    );
    assert_eq!(
        guest.device.seen(),
        [Seen::Out {
            port: 0,
            data: vec![0x66]
        }]
    );
    assert_eq!(
        guest.emulate(&mut cpu, &[0x64, 0x6c]).unwrap(),
        Outcome::Retired
    );
    assert_eq!(guest.read(0x10), [1]);
}

#[test]
fn long_repetitions_come_in_shares() {
    let (guest, mut cpu) = strings(0, MMIO, 10_000);
    cpu.gpr[RAX] = 0x77;
    let rep_stosb = [0xf3, 0xaa];
    assert_eq!(
        guest.emulate(&mut cpu, &rep_stosb).unwrap(),
        Outcome::Continue
    );
    assert_eq!(
        (cpu.rip, cpu.gpr[RCX], cpu.gpr[RDI]),
        (0, 10_000 - 4096, MMIO + 4096)
    );
    assert_eq!(cpu.rflags, 2 | RF);
    assert_eq!(
        guest.emulate(&mut cpu, &rep_stosb).unwrap(),
        Outcome::Continue
    );
    assert_eq!(
        guest.emulate(&mut cpu, &rep_stosb).unwrap(),
        Outcome::Retired
    );
    assert_eq!(
        (cpu.rip, cpu.gpr[RCX], cpu.gpr[RDI], cpu.rflags),
        (2, 0, MMIO + 10_000, 2)
    );
    assert_eq!(guest.device.seen().len(), 10_000);
    // Exactly one share is no reason to come back.
    cpu.gpr[RCX] = 4096;
    assert_eq!(
        guest.emulate(&mut cpu, &rep_stosb).unwrap(),
        Outcome::Retired
    );
}

#[test]
fn no_count_no_access() {
    let (guest, mut cpu) = strings(MMIO, MMIO, 0);
    cpu.rflags |= ZF;
    for opcode in [0x6c, 0x6e, 0xa4, 0xa6, 0xaa, 0xac, 0xae] {
        assert_eq!(
            guest.emulate(&mut cpu, &[0xf3, opcode]).unwrap(),
            Outcome::Retired
        );
    }
    assert_eq!(guest.device.seen(), []);
    assert_eq!(
        (cpu.gpr[RSI], cpu.gpr[RDI], cpu.rflags),
        (MMIO, MMIO, 2 | ZF)
    );
}

#[test]
fn a_fault_keeps_the_finished_iterations() {
    let (guest, mut cpu) = strings(0xffe, 0x2000, 5);
    cpu.segments[DS].limit = 0xfff;
    guest.write(0xffe, &[1, 2, 3]);
    let fault = Fault {
        vector: 13,
        error_code: Some(0),
        cr2: None,
    };
    assert_eq!(
        guest.emulate(&mut cpu, &[0xf3, 0xa4]).unwrap(),
        Outcome::Fault(fault)
    );
    assert_eq!(
        (cpu.gpr[RSI], cpu.gpr[RDI], cpu.gpr[RCX], cpu.rip),
        (0x1000, 0x2002, 3, 0)
    );
    assert_eq!(guest.read(0x2000), [1, 2, 0]);
}

#[test]
fn a_fault_while_comparing_keeps_the_flags() {
    let (guest, mut cpu) = strings(0, 0xffe, 5);
    cpu.segments[ES].limit = 0xfff;
    cpu.gpr[RAX] = 0; // equal to what is there: ZF would be set
    let fault = Fault {
        vector: 13,
        error_code: Some(0),
        cr2: None,
    };
    assert_eq!(
        guest.emulate(&mut cpu, &[0xf3, 0xae]).unwrap(),
        Outcome::Fault(fault)
    );
    assert_eq!((cpu.gpr[RDI], cpu.gpr[RCX], cpu.rflags), (0x1000, 3, 2));
}

#[test]
fn sixteen_bit_registers_wrap() {
    let guest = Guest::new();
    let mut cpu = guest::real_mode();
    guest.write(0xffff, &[0x11]);
    guest.write(0, &[0x22]);
    cpu.gpr[RSI] = 0xaaaa_ffff;
    cpu.gpr[RDI] = 0xbbbb_1000;
    cpu.gpr[RCX] = 0xcccc_0002;
    assert_eq!(
        guest.emulate(&mut cpu, &[0xf3, 0xa4]).unwrap(),
        Outcome::Retired
    );
    assert_eq!(guest.read(0x1000), [0x11, 0x22]);
    assert_eq!(
        (cpu.gpr[RSI], cpu.gpr[RDI], cpu.gpr[RCX]),
        (0xaaaa_0001, 0xbbbb_1002, 0xcccc_0000)
    );
}

#[test]
fn memory_to_device_and_back() {
    let (guest, mut cpu) = strings(0x1000, MMIO + 0x100, 4);
    guest.write(0x1000, b"0123456789abcdef");
    assert_eq!(
        guest.emulate(&mut cpu, &[0xf3, 0xa5]).unwrap(),
        Outcome::Retired
    );
    assert_eq!(
        guest.device.seen()[3],
        Seen::Write {
            gpa: MMIO + 0x10c,
            data: b"cdef".to_vec()
        }
    );
    (cpu.gpr[RSI], cpu.gpr[RDI], cpu.gpr[RCX]) = (MMIO + 0x100, 0x2000, 8);
    assert_eq!(
        guest.emulate(&mut cpu, &[0xf3, 0x66, 0xa5]).unwrap(),
        Outcome::Retired
    );
    assert_eq!(&guest.read::<16>(0x2000), b"0123456789abcdef");
}
