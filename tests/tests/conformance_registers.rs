//! Registers by hypercall: every class comes back as it was set, in any order, all or as far as it went.

use mshv_bindings::*;
use rota_tests::guest::Guest;
use rota_tests::payload::{self, code};
use rota_tests::raw::bytes_of;
use rota_tests::reg::{self, segment, table, value64};
use rota_tests::vm::EINVAL;
use rota_tests::{on_mshv, require, requires};

/// Sets a register, reads it back, compares all of its bits.
fn round_trip(guest: &Guest, name: u32, value: hv_register_value) {
    guest.vp.set(&[(name, value)]);
    let back = guest.vp.get(&[name])[0];
    assert_eq!(bytes_of(&back), bytes_of(&value), "register {name:#x}");
}

on_mshv! {
    fn general_registers(device) {
        let guest = Guest::reset(device, &payload::DONE);
        let all: Vec<u32> = (reg::RAX..=reg::R15).collect();
        let values: Vec<(u32, u64)> = all.iter().map(|name| (*name, 0x0123_4567_0000_0000 + u64::from(*name))).collect();
        guest.vp.set64(&values);
        for (name, value) in &values {
            assert_eq!(guest.vp.get64(*name), *value, "register {name:#x} by itself");
        }
        let mut order = all;
        order.reverse();
        // SAFETY: every bit pattern is a number.
        let back: Vec<(u32, u64)> = order.iter().copied().zip(guest.vp.get(&order).iter().map(|v| unsafe { v.reg64 })).collect();
        assert_eq!(back, values.into_iter().rev().collect::<Vec<_>>(), "all at once, backwards");
        round_trip(&guest, reg::RIP, value64(0x1234_5678));
        round_trip(&guest, reg::RFLAGS, value64(0x246));
    }

    fn segment_registers(device) {
        let guest = Guest::reset(device, &payload::DONE);
        for (i, name) in [reg::DS, reg::ES, reg::FS, reg::GS, reg::SS].into_iter().enumerate() {
            round_trip(&guest, name, segment(0x100 * i as u16, 0x1000 * i as u64, 0xFFFF, 0x93));
        }
        round_trip(&guest, reg::CS, segment(0x8, 0, 0xFFFF_FFFF, 0xC09B));
        round_trip(&guest, reg::TR, segment(0x18, 0x9000, 0x67, 0x8B));
        round_trip(&guest, reg::LDTR, segment(0x20, 0xA000, 0xFF, 0x82));
        round_trip(&guest, reg::GDTR, table(0x1_2000, 0x7F));
        round_trip(&guest, reg::IDTR, table(0x1_3000, 0xFFF));
    }

    fn control_registers(device) {
        let guest = Guest::reset(device, &payload::DONE);
        guest.vp.set64(&[(reg::EFER, 0x500), (reg::CR4, 0x20), (reg::CR3, 0x1_0000), (reg::CR0, 0x8001_0031)]);
        for (name, value) in [(reg::EFER, 0x500), (reg::CR4, 0x20), (reg::CR3, 0x1_0000), (reg::CR0, 0x8001_0031)] {
            assert_eq!(guest.vp.get64(name), value, "register {name:#x}");
        }
        round_trip(&guest, reg::CR2, value64(0xDEAD_B000));
        round_trip(&guest, reg::CR8, value64(5));
    }

    fn floating_point_registers(device) {
        let guest = Guest::reset(device, &payload::DONE);
        for name in reg::XMM0..=reg::XMM15 {
            let value = hv_register_value { reg128: hv_u128 { low_part: u64::from(name), high_part: !u64::from(name) } };
            round_trip(&guest, name, value);
        }
        let mut control = guest.vp.get(&[hv_register_name_HV_X64_REGISTER_XMM_CONTROL_STATUS])[0];
        control.xmm_control_status.__bindgen_anon_1.xmm_status_control = 0x1FA0;
        guest.vp.set(&[(hv_register_name_HV_X64_REGISTER_XMM_CONTROL_STATUS, control)]);
        let back = guest.vp.get(&[hv_register_name_HV_X64_REGISTER_XMM_CONTROL_STATUS])[0];
        // SAFETY: the register is of this kind.
        let mxcsr = unsafe { back.xmm_control_status.__bindgen_anon_1.xmm_status_control };
        assert_eq!(mxcsr, 0x1FA0);
        round_trip(&guest, hv_register_name_HV_X64_REGISTER_FP_MMX0, hv_register_value {
            reg128: hv_u128 { low_part: 0x8000_0000_0000_0000, high_part: 0x3FFF },
        });
    }

    /// What is set by hypercall is what the guest's own instructions find, and the other way round.
    fn the_guest_and_the_hypercall_agree_on_sse(device) {
        require!(requires::sse(device));
        // movd eax, xmm0; out; mov eax, imm32 (B8); movd xmm0, eax; out
        let program = code(&[
            &payload::MOVD_EAX_XMM0, &payload::MARK_1, &[0xB8, 0x78, 0x56, 0x34, 0x12], &payload::MOVD_XMM0_EAX, &payload::DONE,
        ]);
        let guest = Guest::long_mode(device, &program);
        let value = hv_register_value { reg128: hv_u128 { low_part: 0xFEED_F00D, high_part: 7 } };
        guest.vp.set(&[(reg::CR4, value64(0x220)), (reg::XMM0, value)]);
        guest.expect_mark(0xF1);
        assert_eq!(guest.vp.get64(reg::RAX), 0xFEED_F00D);
        guest.expect_done();
        // SAFETY: every bit pattern is a number.
        let found = unsafe { guest.vp.get(&[reg::XMM0])[0].reg128 };
        assert_eq!(({ found.low_part }, { found.high_part }), (0x1234_5678, 0));
    }

    fn debug_registers(device) {
        let guest = Guest::reset(device, &payload::DONE);
        for name in reg::DR0..reg::DR0 + 4 {
            round_trip(&guest, name, value64(0x1000 + u64::from(name & 3)));
        }
        round_trip(&guest, reg::DR7, value64(0x400));
    }

    fn model_specific_registers(device) {
        let guest = Guest::reset(device, &payload::DONE);
        for (name, value) in [
            (reg::KERNEL_GS_BASE, 0xFFFF_8000_1234_0000),
            (reg::STAR, 0x0023_0010_0000_0000),
            (reg::LSTAR, 0xFFFF_FFFF_8000_0000),
            (reg::SYSENTER_CS, 0x10),
            (reg::PAT, 0x0007_0406_0007_0406),
        ] {
            round_trip(&guest, name, value64(value));
        }
        let base = guest.vp.get64(reg::APIC_BASE);
        assert_eq!(base & 0xFFFF_F000, 0xFEE0_0000, "APIC base {base:#x}");
        assert_eq!(base >> 8 & 1, 1, "VP 0 is the boot processor");
        assert_eq!(guest.vp.get64(reg::VP_INDEX), 0);
    }

    fn pending_events(device) {
        let guest = Guest::reset(device, &payload::DONE);
        assert_eq!(guest.vp.get64(reg::PENDING_INTERRUPTION) & 1, 0, "nothing is pending after reset");
        assert_eq!(guest.vp.get64(reg::INTERRUPT_STATE) & 3, 0, "no shadow, no NMI mask");
    }

    /// An event the client makes pending is taken before the first instruction.
    fn an_injected_exception_is_delivered(device) {
        let guest = Guest::real_mode(device, &payload::DONE);
        guest.handler(6, &payload::MARK_2);
        // pending; type 3, an exception; vector 6, #UD.
        guest.vp.set64(&[(reg::PENDING_INTERRUPTION, 1 | (3 << 1) | (6 << 16))]);
        let exit = guest.run_to_port();
        assert_eq!(exit.port, 0xF2, "the handler of #UD runs first: {exit:x?}");
        let stack = guest.ram.read(guest.vp.get64(reg::RSP), 2);
        assert_eq!(u16::from_le_bytes([stack[0], stack[1]]), 0x1000, "and returns to the first instruction");
    }

    /// Repetitions are done in order; the count tells how far.
    fn an_unknown_name_stops_a_rep_there(device) {
        let guest = Guest::reset(device, &payload::DONE);
        let (outcome, _) = guest.vp.get_on(guest.vp.fd(), &[reg::RAX, reg::RIP, 0x7FFF_FFFF, reg::RBX]);
        assert_eq!((outcome.result, u32::from(outcome.status), outcome.reps), (Err(EINVAL), HV_STATUS_INVALID_PARAMETER, 2));

        let outcome = guest.vp.try_set(&[(reg::RBX, value64(0x11)), (0x7FFF_FFFF, value64(0)), (reg::RCX, value64(0x22))]);
        assert_eq!((outcome.result, u32::from(outcome.status), outcome.reps), (Err(EINVAL), HV_STATUS_INVALID_PARAMETER, 1));
        assert_eq!(guest.vp.get64(reg::RBX), 0x11, "what came before is done");
        assert_ne!(guest.vp.get64(reg::RCX), 0x22, "what came after is not");
    }

    fn what_is_set_is_what_the_guest_has(device) {
        // mov [bx], ax; then a mark.
        let guest = Guest::real_mode(device, &code(&[&payload::STORE_AX, &payload::DONE]));
        guest.vp.set64(&[(reg::RAX, 0xABCD), (reg::RBX, 0x3000)]);
        guest.expect_done();
        assert_eq!(guest.ram.read(0x3000, 2), [0xCD, 0xAB]);
    }

    fn what_the_guest_does_is_what_is_read(device) {
        // mov eax, imm; mov ecx, imm; mov edx, imm; inc bx.
        let program = code(&[
            &payload::mov_eax(0x1111_1111), &payload::mov_ecx(0x2222_2222), &payload::mov_edx(0x3333_3333), &payload::INC_BX,
            &payload::DONE,
        ]);
        let guest = Guest::real_mode(device, &program);
        guest.vp.set64(&[(reg::RAX, 0), (reg::RCX, 0), (reg::RDX, 0), (reg::RBX, 0xFFFF)]);
        let exit = guest.run_to_port();
        let values = [reg::RAX, reg::RCX, reg::RDX, reg::RBX].map(|name| guest.vp.get64(name));
        assert_eq!(values, [0x1111_1111, 0x2222_2222, 0x3333_3333, 0]);
        assert_eq!(exit.header.rflags & 0x40, 0x40, "inc to zero sets ZF");
    }
}
