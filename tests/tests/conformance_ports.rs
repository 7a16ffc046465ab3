//! Port intercepts (`HVMSG_X64_IO_PORT_INTERCEPT`): the instruction has not run; the client does its work and moves RIP past it.

use rota_tests::guest::{CODE, Guest};
use rota_tests::message::PortIo;
use rota_tests::on_mshv;
use rota_tests::payload::{self, code};
use rota_tests::reg::{self, segment};
use rota_tests::vm::Device;

const PORT: u64 = 0x3F8;

/// A guest about to execute `instruction`, with every register the message carries set to something telling.
fn about_to(device: &Device, instruction: &[u8]) -> Guest {
    let guest = Guest::real_mode(
        device,
        &code(&[instruction, &payload::MARK_1, &payload::DONE]),
    );
    guest.vp.set(&[
        (reg::DS, segment(0x300, 0x3000, 0xFFFF, 0x93)),
        (reg::ES, segment(0x400, 0x4000, 0xFFFF, 0x93)),
    ]);
    guest.vp.set64(&[
        (reg::RAX, 0x8877_6655),
        (reg::RCX, 3),
        (reg::RDX, PORT),
        (reg::RSI, 0x20),
        (reg::RDI, 0x30),
        (reg::RBX, 0x1234),
    ]);
    guest
}

/// What every port message says of the guest before the instruction.
fn assert_before(guest: &Guest, exit: &PortIo, length: usize, size: u8, write: bool) {
    assert_eq!(exit.header.rip, CODE, "RIP is at the instruction");
    assert_eq!(
        usize::from(exit.header.length),
        length,
        "instruction length, which clients add to RIP"
    );
    assert_eq!((exit.header.vp, exit.header.cs_base), (0, 0));
    assert_eq!(
        (exit.header.protected, exit.header.long),
        (false, false),
        "real mode"
    );
    assert_eq!(exit.header.rflags & 2, 2);
    assert_eq!(
        (exit.port, exit.size, exit.header.access),
        (PORT as u16, size, u8::from(write))
    );
    assert_eq!(
        (exit.rax, exit.rcx, exit.rsi, exit.rdi),
        (0x8877_6655, 3, 0x20, 0x30),
        "registers as before"
    );
    let names = [
        reg::RIP,
        reg::RAX,
        reg::RCX,
        reg::RDX,
        reg::RSI,
        reg::RDI,
        reg::RBX,
    ];
    // SAFETY: every bit pattern is a number.
    let values: Vec<u64> = guest
        .vp
        .get(&names)
        .iter()
        .map(|value| unsafe { value.reg64 })
        .collect();
    assert_eq!(
        values,
        [CODE, 0x8877_6655, 3, PORT, 0x20, 0x30, 0x1234],
        "and the hypercall agrees"
    );
}

/// Lets the guest past the instruction and checks that it arrives at its two marks, once each.
fn assert_goes_on(guest: &Guest, rip: u64) {
    guest.resume_at(rip);
    let mark = guest.run_to_port();
    assert_eq!(
        (mark.port, mark.header.rip),
        (0xF1, rip),
        "the very next instruction"
    );
    guest.resume_at(rip + 2);
    let done = guest.run_to_port();
    assert_eq!((done.port, done.header.rip), (payload::DONE_PORT, rip + 2));
}

on_mshv! {
    fn out_of_every_size(device) {
        let cases: [(&[u8], u8); 3] = [(&payload::OUT_DX_AL, 1), (&payload::OUT_DX_AX, 2), (&payload::OUT_DX_EAX, 4)];
        for (instruction, size) in cases {
            let guest = about_to(device, instruction);
            let exit = guest.run_to_port();
            assert_before(&guest, &exit, instruction.len(), size, true);
            assert!(!exit.string && !exit.rep);
            assert_goes_on(&guest, CODE + instruction.len() as u64);
        }
    }

    fn in_of_every_size(device) {
        let cases: [(&[u8], u8, u64); 3] = [
            (&payload::IN_AL_DX, 1, 0x8877_66A1),
            (&payload::IN_AX_DX, 2, 0x8877_A2A1),
            (&payload::IN_EAX_DX, 4, 0xA4A3_A2A1),
        ];
        for (instruction, size, result) in cases {
            let guest = about_to(device, instruction);
            let exit = guest.run_to_port();
            assert_before(&guest, &exit, instruction.len(), size, false);
            assert!(!exit.string && !exit.rep);
            guest.vp.set64(&[(reg::RAX, result)]);
            assert_goes_on(&guest, CODE + instruction.len() as u64);
            assert_eq!(guest.vp.get64(reg::RAX), result, "the client's value stays: the instruction did not run after all");
        }
    }

    fn the_immediate_forms_carry_their_port(device) {
        for port in [0u8, 0x80, 0xFF] {
            let guest = Guest::real_mode(device, &[0xE4, port, 0xE6, port]);
            let exit = guest.run_to_port();
            assert_eq!((exit.port, exit.size, exit.header.access, exit.header.length), (u16::from(port), 1, 0, 2));
            guest.resume_at(CODE + 2);
            let exit = guest.run_to_port();
            assert_eq!((exit.port, exit.size, exit.header.access, exit.header.length), (u16::from(port), 1, 1, 2));
        }
    }

    fn the_highest_port_is_a_port(device) {
        let guest = about_to(device, &payload::OUT_DX_AL);
        guest.vp.set64(&[(reg::RDX, 0xFFFF)]);
        assert_eq!(guest.run_to_port().port, 0xFFFF);
    }

    /// A second `MSHV_RUN_VP` without moving RIP finds the same instruction again: nothing happened in between.
    fn without_moving_rip_the_same_intercept_comes_again(device) {
        let guest = about_to(device, &payload::IN_AL_DX);
        let first = guest.run_to_port();
        let second = guest.run_to_port();
        assert_eq!(first, second);
    }

    fn single_string_forms(device) {
        let guest = about_to(device, &payload::OUTSB);
        guest.ram.write(0x3020, b"x");
        let exit = guest.run_to_port();
        assert_before(&guest, &exit, 1, 1, true);
        assert!(exit.string && !exit.rep);
        assert_eq!((exit.ds_base, exit.es_base), (0x3000, 0x4000));
        guest.vp.set64(&[(reg::RSI, 0x21)]);
        assert_goes_on(&guest, CODE + 1);
        assert_eq!(guest.vp.get64(reg::RSI), 0x21);

        let guest = about_to(device, &payload::INSB);
        let exit = guest.run_to_port();
        assert_before(&guest, &exit, 1, 1, false);
        assert!(exit.string && !exit.rep);
        guest.ram.write(0x4030, b"y");
        guest.vp.set64(&[(reg::RDI, 0x31)]);
        assert_goes_on(&guest, CODE + 1);
        assert_eq!(guest.ram.read(0x4030, 2), [b'y', 0], "one byte, the client's");
    }

    /// The client does all three elements at once and moves RIP: the guest must not do any of them again.
    fn rep_outs_is_the_clients_to_complete(device) {
        let cases: [(&[u8], u8); 2] = [(&payload::REP_OUTSB, 1), (&payload::REP_OUTSW, 2)];
        for (instruction, size) in cases {
            let guest = about_to(device, instruction);
            let exit = guest.run_to_port();
            assert_before(&guest, &exit, 2, size, true);
            assert!(exit.string && exit.rep);
            assert_eq!(exit.ds_base + exit.rsi, 0x3020, "where the first element is");
            guest.vp.set64(&[(reg::RCX, 0), (reg::RSI, 0x20 + 3 * u64::from(size))]);
            assert_goes_on(&guest, CODE + 2);
            assert_eq!((guest.vp.get64(reg::RCX), guest.vp.get64(reg::RSI)), (0, 0x20 + 3 * u64::from(size)));
        }
    }

    fn rep_ins_is_the_clients_to_complete(device) {
        let cases: [(&[u8], u8); 3] = [(&payload::REP_INSB, 1), (&payload::REP_INSW, 2), (&payload::REP_INSD, 4)];
        for (instruction, size) in cases {
            let guest = about_to(device, instruction);
            guest.ram.write(0x4030, &[0xEE; 16]);
            let exit = guest.run_to_port();
            assert_before(&guest, &exit, instruction.len(), size, false);
            assert!(exit.string && exit.rep);
            assert_eq!(guest.ram.read(0x4030, 16), [0xEE; 16], "nothing was stored before the client did");
            let count = 3 * usize::from(size);
            let data: Vec<u8> = (1..=count as u8).collect();
            guest.ram.write(0x4030, &data);
            guest.vp.set64(&[(reg::RCX, 0), (reg::RDI, 0x30 + count as u64)]);
            assert_goes_on(&guest, CODE + instruction.len() as u64);
            assert_eq!(guest.ram.read(0x4030, count), data);
            assert_eq!(guest.ram.read(0x4030 + count as u64, 2), [0xEE; 2], "nothing was stored after the client was done");
        }
    }

    /// A client may also do one element and leave RIP: the instruction is intercepted again with what remains.
    fn rep_outs_can_be_done_element_by_element(device) {
        let guest = about_to(device, &payload::REP_OUTSB);
        for left in (1..=3).rev() {
            let exit = guest.run_to_port();
            assert_eq!((exit.header.rip, exit.rcx, exit.rsi), (CODE, left, 0x23 - left));
            guest.vp.set64(&[(reg::RCX, left - 1), (reg::RSI, 0x24 - left)]);
        }
        let mark = guest.run_to_port();
        assert_eq!((mark.port, mark.header.rip), (0xF1, CODE + 2), "with RCX 0 the rest is the guest's, without an access");
    }

    fn rep_outs_of_nothing_is_no_access(device) {
        let guest = about_to(device, &payload::REP_OUTSB);
        guest.vp.set64(&[(reg::RCX, 0)]);
        assert_eq!(guest.run_to_port().port, 0xF1);
    }

    fn a_thousand_in_a_row_are_a_thousand(device) {
        // in al, dx; jmp $-1
        let guest = Guest::real_mode(device, &[0xEC, 0xEB, 0xFD]);
        guest.vp.set64(&[(reg::RDX, 0x60), (reg::RAX, 0)]);
        for i in 0..1000u64 {
            let exit = guest.run_to_port();
            assert_eq!((exit.port, exit.rax), (0x60, i & 0xFF), "at {i}");
            guest.vp.set64(&[(reg::RAX, (i + 1) & 0xFF), (reg::RIP, CODE + 1)]);
        }
    }
}
