//! Memory intercepts of real-mode code (`HVMSG_UNMAPPED_GPA`): nothing of the instruction has happened when the message comes.

use rota_tests::guest::{CODE, Guest, UNMAPPED};
use rota_tests::message::MemoryAccess;
use rota_tests::on_mshv;
use rota_tests::payload::{self, code};
use rota_tests::reg::{self, segment};
use rota_tests::vm::{Device, Memory, READ_WRITE_EXECUTE};

/// A guest about to execute `instruction` with DS and ES on the unmapped page, BX 0x10.
fn about_to(device: &Device, instruction: &[u8]) -> Guest {
    let guest = Guest::real_mode(
        device,
        &code(&[instruction, &payload::MARK_1, &payload::DONE]),
    );
    let unmapped = segment(0xD000, UNMAPPED, 0xFFFF, 0x93);
    guest.vp.set(&[(reg::DS, unmapped), (reg::ES, unmapped)]);
    guest.vp.set64(&[
        (reg::RAX, 0x8877_6655),
        (reg::RBX, 0x10),
        (reg::RCX, 4),
        (reg::RSI, 0x20),
        (reg::RDI, 0x30),
    ]);
    guest
}

fn assert_before(guest: &Guest, access: &MemoryAccess, instruction: &[u8], gpa: u64) {
    assert!(access.unmapped, "HVMSG_UNMAPPED_GPA");
    assert_eq!(access.gpa, gpa);
    assert_eq!(access.gva, Some(gpa), "without paging, virtual is physical");
    assert_eq!(access.header.rip, CODE, "RIP is at the instruction");
    assert_eq!(
        (
            access.header.vp,
            access.header.cs_base,
            access.header.protected
        ),
        (0, 0, false)
    );
    assert!(
        access.bytes.len() >= instruction.len(),
        "the message carries the instruction: {:x?}",
        access.bytes
    );
    assert_eq!(&access.bytes[..instruction.len()], instruction);
    assert_eq!(guest.vp.get64(reg::RIP), CODE);
    assert_eq!(guest.vp.get64(reg::RAX), 0x8877_6655, "RAX as before");
}

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
    fn stores_of_every_size(device) {
        for instruction in [payload::STORE_AL.as_slice(), &payload::STORE_AX, &payload::STORE_EAX] {
            let guest = about_to(device, instruction);
            let access = guest.run_to_memory();
            assert_before(&guest, &access, instruction, UNMAPPED + 0x10);
            assert_eq!(access.header.access, 1, "a write");
            assert_goes_on(&guest, CODE + instruction.len() as u64);
        }
    }

    fn loads_of_every_size(device) {
        for instruction in [payload::LOAD_AL.as_slice(), &payload::LOAD_AX, &payload::LOAD_EAX] {
            let guest = about_to(device, instruction);
            let access = guest.run_to_memory();
            assert_before(&guest, &access, instruction, UNMAPPED + 0x10);
            assert_eq!(access.header.access, 0, "a read");
            guest.vp.set64(&[(reg::RAX, 0xA4A3_A2A1)]);
            assert_goes_on(&guest, CODE + instruction.len() as u64);
            assert_eq!(guest.vp.get64(reg::RAX), 0xA4A3_A2A1, "the client's value stays: the load did not run after all");
        }
    }

    fn without_moving_rip_the_same_intercept_comes_again(device) {
        for instruction in [payload::LOAD_AL.as_slice(), &payload::STORE_AX, &payload::ADD_AL] {
            let guest = about_to(device, instruction);
            let first = guest.run_to_memory();
            assert_eq!(first, guest.run_to_memory(), "{instruction:x?}");
        }
    }

    /// A guest that faults may also be given memory: then the instruction runs, once.
    fn mapping_memory_lets_the_instruction_run(device) {
        let guest = about_to(device, &payload::ADD_AL);
        let access = guest.run_to_memory();
        assert_eq!((access.unmapped, access.gpa), (true, UNMAPPED + 0x10));
        let memory = Memory::new(0x1000);
        memory.write(0x10, &[1]);
        guest.partition.map(&memory, UNMAPPED, READ_WRITE_EXECUTE).expect("map");
        let mark = guest.run_to_port();
        assert_eq!((mark.port, mark.header.rip), (0xF1, CODE + 2));
        assert_eq!(memory.read(0x10, 1), [0x56], "1 + 0x55, added once");
    }

    /// A processor reports such an access as a read or as a write; either way nothing has happened, flags included.
    fn read_modify_write(device) {
        let guest = about_to(device, &payload::ADD_AL);
        guest.vp.set64(&[(reg::RFLAGS, 0x8D7)]);
        let access = guest.run_to_memory();
        assert_before(&guest, &access, &payload::ADD_AL, UNMAPPED + 0x10);
        assert!(access.header.access <= 1);
        assert_eq!(access.header.rflags & 0x8D5, 0x8D5, "arithmetic flags as before");
        assert_eq!(guest.vp.get64(reg::RFLAGS) & 0x8D5, 0x8D5);
        guest.vp.set64(&[(reg::RFLAGS, 2)]);
        assert_goes_on(&guest, CODE + 2);
        assert_eq!(guest.vp.get64(reg::RFLAGS) & 0x8D5, 0, "the client's flags stay");
    }

    fn movs_to_unmapped_memory(device) {
        let guest = about_to(device, &payload::REP_MOVSB);
        guest.vp.set(&[(reg::DS, segment(0x300, 0x3000, 0xFFFF, 0x93))]);
        guest.ram.write(0x3020, b"abcd");
        let access = guest.run_to_memory();
        assert_before(&guest, &access, &payload::REP_MOVSB, UNMAPPED + 0x30);
        assert_eq!(access.header.access, 1, "a write");
        let names = [reg::RCX, reg::RSI, reg::RDI];
        assert_eq!(names.map(|name| guest.vp.get64(name)), [4, 0x20, 0x30], "no element is done");
        guest.vp.set64(&[(reg::RCX, 0), (reg::RSI, 0x24), (reg::RDI, 0x34)]);
        assert_goes_on(&guest, CODE + 2);
        assert_eq!(names.map(|name| guest.vp.get64(name)), [0, 0x24, 0x34], "the client's registers stay");
    }

    fn movs_from_unmapped_memory(device) {
        let guest = about_to(device, &payload::REP_MOVSB);
        guest.vp.set(&[(reg::ES, segment(0x400, 0x4000, 0xFFFF, 0x93))]);
        guest.ram.write(0x4030, &[0xEE; 8]);
        let access = guest.run_to_memory();
        assert_before(&guest, &access, &payload::REP_MOVSB, UNMAPPED + 0x20);
        assert_eq!(access.header.access, 0, "a read");
        assert_eq!(guest.ram.read(0x4030, 8), [0xEE; 8], "nothing was stored");
        guest.vp.set64(&[(reg::RCX, 0), (reg::RSI, 0x24), (reg::RDI, 0x34)]);
        assert_goes_on(&guest, CODE + 2);
        assert_eq!(guest.ram.read(0x4030, 8), [0xEE; 8], "nor later");
    }

    /// One element at a time: after the client's element the processor goes on with what is left.
    fn movs_element_by_element(device) {
        let guest = about_to(device, &payload::REP_MOVSB);
        guest.vp.set(&[(reg::DS, segment(0x300, 0x3000, 0xFFFF, 0x93))]);
        for done in 0..4 {
            let access = guest.run_to_memory();
            assert_eq!((access.header.rip, access.gpa), (CODE, UNMAPPED + 0x30 + done));
            guest.vp.set64(&[(reg::RCX, 3 - done), (reg::RSI, 0x21 + done), (reg::RDI, 0x31 + done)]);
        }
        let mark = guest.run_to_port();
        assert_eq!((mark.port, mark.header.rip), (0xF1, CODE + 2));
    }

    /// Two elements fall on memory, the third does not: the message shows the registers after two.
    fn a_rep_that_runs_off_the_end_of_memory_reports_its_progress(device) {
        let guest = about_to(device, &payload::REP_MOVSB);
        guest.vp.set(&[(reg::DS, segment(0x300, 0x3000, 0xFFFF, 0x93)), (reg::ES, segment(0x7FF0, 0x7_FF00, 0xFFFF, 0x93))]);
        guest.vp.set64(&[(reg::RDI, 0xFE)]);
        guest.ram.write(0x3020, b"abcd");
        let access = guest.run_to_memory();
        assert_eq!((access.unmapped, access.gpa, access.header.rip), (true, 0x8_0000, CODE));
        assert_eq!(guest.ram.read(0x7_FFFE, 2), *b"ab");
        let names = [reg::RCX, reg::RSI, reg::RDI];
        assert_eq!(names.map(|name| guest.vp.get64(name)), [2, 0x22, 0x100]);
        guest.vp.set64(&[(reg::RCX, 0), (reg::RSI, 0x24), (reg::RDI, 0x102)]);
        assert_goes_on(&guest, CODE + 2);
    }

    fn stos_to_unmapped_memory(device) {
        let guest = about_to(device, &payload::REP_STOSW);
        let access = guest.run_to_memory();
        assert_before(&guest, &access, &payload::REP_STOSW, UNMAPPED + 0x30);
        assert_eq!(access.header.access, 1);
        assert_eq!((guest.vp.get64(reg::RCX), guest.vp.get64(reg::RDI)), (4, 0x30));
        guest.vp.set64(&[(reg::RCX, 0), (reg::RDI, 0x38)]);
        assert_goes_on(&guest, CODE + 2);
    }

    fn push_to_unmapped_memory(device) {
        let guest = about_to(device, &payload::PUSH_AX);
        guest.vp.set(&[(reg::SS, segment(0xD000, UNMAPPED, 0xFFFF, 0x93))]);
        guest.vp.set64(&[(reg::RSP, 0x100)]);
        let access = guest.run_to_memory();
        assert_before(&guest, &access, &payload::PUSH_AX, UNMAPPED + 0xFE);
        assert_eq!(access.header.access, 1);
        assert_eq!(guest.vp.get64(reg::RSP), 0x100, "the stack pointer as before");
        guest.vp.set64(&[(reg::RSP, 0xFE)]);
        assert_goes_on(&guest, CODE + 1);
        assert_eq!(guest.vp.get64(reg::RSP), 0xFE);
    }

    /// `pop [bx]`-like order matters not here: the load of the pushed word is what faults.
    fn pop_from_unmapped_memory(device) {
        let guest = about_to(device, &[0x58]);
        guest.vp.set(&[(reg::SS, segment(0xD000, UNMAPPED, 0xFFFF, 0x93))]);
        guest.vp.set64(&[(reg::RSP, 0x100)]);
        let access = guest.run_to_memory();
        assert_before(&guest, &access, &[0x58], UNMAPPED + 0x100);
        assert_eq!((access.header.access, guest.vp.get64(reg::RSP)), (0, 0x100));
        guest.vp.set64(&[(reg::RSP, 0x102), (reg::RAX, 0x1234)]);
        assert_goes_on(&guest, CODE + 1);
    }

    fn execution_of_unmapped_memory(device) {
        let guest = Guest::real_mode(device, &payload::jmp_far(0xD000));
        let access = guest.run_to_memory();
        assert!(access.unmapped);
        assert_eq!((access.header.access, access.gpa), (2, UNMAPPED), "an instruction fetch");
        assert_eq!((access.header.cs_base, access.header.rip), (UNMAPPED, 0), "the jump is done, its target is not");
        let memory = Memory::new(0x1000);
        memory.write(0, &payload::DONE);
        guest.partition.map(&memory, UNMAPPED, READ_WRITE_EXECUTE).expect("map");
        guest.expect_done();
    }

    fn interleaved_ports_and_memory_stay_in_order(device) {
        let program = code(&[
            &payload::STORE_AL, &payload::MARK_1, &payload::LOAD_AX, &payload::MARK_2, &payload::STORE_AX, &payload::DONE,
        ]);
        let guest = Guest::real_mode(device, &program);
        guest.vp.set(&[(reg::DS, segment(0xD000, UNMAPPED, 0xFFFF, 0x93))]);
        guest.vp.set64(&[(reg::RBX, 0)]);
        for port in [0xF1, 0xF2, payload::DONE_PORT] {
            let access = guest.run_to_memory();
            guest.resume_at(access.header.rip + 2);
            guest.expect_mark(port);
        }
    }
}
