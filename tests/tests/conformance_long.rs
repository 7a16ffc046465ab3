//! Memory intercepts and faults of paged code: the virtual address is not the physical one.

use rota_tests::guest::{Guest, UNMAPPED};
use rota_tests::payload::{self, code};
use rota_tests::reg::{self};
use rota_tests::{on_mshv, require, requires};

const RIP: u64 = 0x40_0000;
const MMIO: u64 = 0x60_0000;

on_mshv! {
    fn loads_and_stores_in_long_mode(device) {
        require!(requires::long_mode(device));
        for (instruction, write) in [(payload::LOAD_RAX_64, 0), (payload::STORE_RAX_64, 1)] {
            let guest = Guest::long_mode(device, &code(&[&instruction, &payload::MARK_1, &payload::DONE]));
            guest.vp.set64(&[(reg::RBX, MMIO + 0x128), (reg::RAX, 0x1122_3344_5566_7788)]);
            let access = guest.run_to_memory();
            assert!(access.unmapped && access.gva_gpa_valid, "{access:x?}");
            assert_eq!((access.gva, access.gpa), (Some(MMIO + 0x128), UNMAPPED + 0x128));
            assert_eq!((access.header.access, access.header.rip, access.header.long), (write, RIP, true));
            assert_eq!(access.bytes.get(..3), Some(instruction.as_slice()));
            assert_eq!(guest.vp.get64(reg::RAX), 0x1122_3344_5566_7788);
            guest.vp.set64(&[(reg::RAX, 0xFFEE_DDCC_BBAA_9988), (reg::RIP, RIP + 3)]);
            guest.expect_mark(0xF1);
            assert_eq!(guest.vp.get64(reg::RAX), 0xFFEE_DDCC_BBAA_9988);
            guest.expect_done();
        }
    }

    fn read_modify_write_in_long_mode(device) {
        require!(requires::long_mode(device));
        let guest = Guest::long_mode(device, &code(&[&payload::ADD_RAX_64, &payload::DONE]));
        guest.vp.set64(&[(reg::RBX, MMIO), (reg::RAX, 1), (reg::RFLAGS, 0x8D7)]);
        let access = guest.run_to_memory();
        assert_eq!((access.gva, access.gpa, access.header.rip), (Some(MMIO), UNMAPPED, RIP));
        assert_eq!(access.header.rflags & 0x8D5, 0x8D5);
        guest.resume_at(RIP + 3);
        guest.expect_done();
    }

    fn a_store_across_a_page_boundary(device) {
        require!(requires::long_mode(device));
        let guest = Guest::long_mode(device, &code(&[&payload::STORE_RAX_64, &payload::DONE]));
        guest.vp.set64(&[(reg::RBX, MMIO + 0xFFC)]);
        let access = guest.run_to_memory();
        assert!(access.gpa == UNMAPPED + 0xFFC || access.gpa == UNMAPPED + 0x1000, "either half: {access:x?}");
        assert_eq!(access.header.rip, RIP);
        guest.resume_at(RIP + 3);
        guest.expect_done();
    }

    fn push_in_long_mode(device) {
        require!(requires::long_mode(device));
        let guest = Guest::long_mode(device, &code(&[&payload::PUSH_RAX_64, &payload::DONE]));
        guest.vp.set64(&[(reg::RSP, MMIO + 0x800)]);
        let access = guest.run_to_memory();
        assert_eq!((access.gva, access.gpa, access.header.access), (Some(MMIO + 0x7F8), UNMAPPED + 0x7F8, 1));
        assert_eq!(guest.vp.get64(reg::RSP), MMIO + 0x800);
        guest.vp.set64(&[(reg::RSP, MMIO + 0x7F8), (reg::RIP, RIP + 1)]);
        guest.expect_done();
    }

    fn movs_between_memory_and_nothing_in_long_mode(device) {
        require!(requires::long_mode(device));
        let guest = Guest::long_mode(device, &code(&[&payload::REP_MOVSQ_64, &payload::DONE]));
        guest.vp.set64(&[(reg::RSI, 0x50_0000), (reg::RDI, MMIO + 0x40), (reg::RCX, 2)]);
        let access = guest.run_to_memory();
        assert_eq!((access.gva, access.gpa, access.header.access), (Some(MMIO + 0x40), UNMAPPED + 0x40, 1));
        assert_eq!((guest.vp.get64(reg::RCX), guest.vp.get64(reg::RSI)), (2, 0x50_0000));
        guest.vp.set64(&[(reg::RCX, 0), (reg::RSI, 0x50_0010), (reg::RDI, MMIO + 0x50), (reg::RIP, RIP + 3)]);
        guest.expect_done();
    }

    /// A page that is not present is the guest's own business: without an IDT it ends in a triple fault, never in a memory message.
    fn a_page_fault_is_not_a_memory_intercept(device) {
        require!(requires::long_mode(device));
        let guest = Guest::long_mode(device, &code(&[&payload::LOAD_RAX_64, &payload::DONE]));
        guest.vp.set(&[(reg::IDTR, rota_tests::reg::table(0, 0))]);
        guest.vp.set64(&[(reg::RBX, 0x70_0000)]);
        let exit = guest.run();
        assert!(matches!(exit, rota_tests::message::Exit::Unrecoverable(_)), "{exit:x?}");
    }

    fn loads_and_stores_in_protected_mode(device) {
        require!(requires::protected_mode(device));
        for (instruction, write) in [(payload::LOAD_EAX_32, 0), (payload::STORE_EAX_32, 1)] {
            let guest = Guest::protected_mode(device, &code(&[&instruction, &payload::DONE]));
            guest.vp.set64(&[(reg::RBX, MMIO + 0x124), (reg::RAX, 0x5566_7788)]);
            let access = guest.run_to_memory();
            assert!(access.unmapped, "{access:x?}");
            assert_eq!((access.gva, access.gpa), (Some(MMIO + 0x124), UNMAPPED + 0x124));
            assert_eq!((access.header.access, access.header.rip), (write, RIP));
            assert_eq!((access.header.protected, access.header.long), (true, false));
            guest.vp.set64(&[(reg::RAX, 0xBBAA_9988), (reg::RIP, RIP + 2)]);
            guest.expect_done();
            assert_eq!(guest.vp.get64(reg::RAX) & 0xFFFF_FFFF, 0xBBAA_9988);
        }
    }
}
