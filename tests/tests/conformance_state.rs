//! VP state in bulk: local APIC, XSAVE, SynIC pages, synthetic timers (`mshv_vp_ioctl_get_set_state`).

use mshv_bindings::*;
use rota_tests::guest::Guest;
use rota_tests::payload::{self, code};
use rota_tests::raw::{self, Sys};
use rota_tests::reg::{self};
use rota_tests::vm::{EFAULT, EINVAL, Memory, Vp};
use rota_tests::{on_mshv, require, requires};

/// One `MSHV_GET/SET_VP_STATE` with these fields; also the size the driver left in the arguments.
fn state(vp: &Vp, request: u64, kind: u32, size: u32, address: u64) -> (Sys<()>, u32) {
    let mut args = mshv_get_set_vp_state {
        type_: kind as u8,
        rsvd: [0; 3],
        buf_sz: size,
        buf_ptr: address,
    };
    let result = raw::ioctl(vp.fd(), request, &mut args).map(drop);
    (result, args.buf_sz)
}

fn address(buffer: &Memory) -> u64 {
    buffer.region(0, 0).userspace_addr
}

/// The XSAVE area and its size.
fn xsave(guest: &Guest) -> (Memory, u32) {
    let buffer = Memory::new(0x4000);
    let (result, size) = state(
        &guest.vp,
        raw::GET_VP_STATE,
        MSHV_VP_STATE_XSAVE,
        0x4000,
        address(&buffer),
    );
    assert_eq!(result, Ok(()));
    (buffer, size)
}

fn word(buffer: &Memory, offset: u64) -> u32 {
    u32::from_le_bytes(buffer.read(offset, 4).try_into().unwrap())
}

/// Offset of the spurious vector register in `hv_local_interrupt_controller_state`.
const SPURIOUS: u64 = 16;

on_mshv! {
    fn arguments_are_checked(device) {
        let guest = Guest::reset(device, &payload::DONE);
        let buffer = Memory::new(0x2000);
        let good = mshv_get_set_vp_state { type_: MSHV_VP_STATE_LAPIC as u8, rsvd: [0; 3], buf_sz: 0x1000, buf_ptr: address(&buffer) };
        for request in [raw::GET_VP_STATE, raw::SET_VP_STATE] {
            for (what, mut args) in [
                ("a type that is none", mshv_get_set_vp_state { type_: MSHV_VP_STATE_COUNT as u8, ..good }),
                ("a reserved byte", mshv_get_set_vp_state { rsvd: [0, 0, 1], ..good }),
                ("no size", mshv_get_set_vp_state { buf_sz: 0, ..good }),
                ("a size not of pages", mshv_get_set_vp_state { buf_sz: 0x400, ..good }),
                ("an address not of a page", mshv_get_set_vp_state { buf_ptr: good.buf_ptr + 8, ..good }),
            ] {
                assert_eq!(raw::ioctl(guest.vp.fd(), request, &mut args), Err(EINVAL), "{what}");
            }
            let mut kernel = mshv_get_set_vp_state { buf_ptr: 0xFFFF_8000_0000_0000, ..good };
            assert_eq!(raw::ioctl(guest.vp.fd(), request, &mut kernel), Err(EFAULT), "a kernel address");
            let mut forbidden = mshv_get_set_vp_state { buf_ptr: raw::forbidden_page(), ..good };
            assert_eq!(raw::ioctl(guest.vp.fd(), request, &mut forbidden), Err(EFAULT), "a page nobody can use");
            assert_eq!(raw::ioctl_value(guest.vp.fd(), request, raw::forbidden_page()), Err(EFAULT), "arguments nobody can read");
        }
    }

    /// The driver writes the needed size before it compares.
    fn the_needed_size_comes_back(device) {
        let guest = Guest::reset(device, &payload::DONE);
        let buffer = Memory::new(0x4000);
        for kind in [MSHV_VP_STATE_LAPIC, MSHV_VP_STATE_SIMP, MSHV_VP_STATE_SIEFP] {
            let (result, size) = state(&guest.vp, raw::GET_VP_STATE, kind, 0x4000, address(&buffer));
            assert_eq!(size, 0x1000, "state {kind}");
            if kind == MSHV_VP_STATE_LAPIC {
                assert_eq!(result, Ok(()));
            }
        }
        let (result, size) = state(&guest.vp, raw::GET_VP_STATE, MSHV_VP_STATE_SYNTHETIC_TIMERS, 0x1000, address(&buffer));
        assert_eq!((result, size as usize), (Ok(()), size_of::<hv_synthetic_timers_state>()));
        let (_, xsave_size) = xsave(&guest);
        let (outcome, maximum) = guest.partition.property(hv_partition_property_code_HV_PARTITION_PROPERTY_MAX_XSAVE_DATA_SIZE);
        assert_eq!((outcome.result, u64::from(xsave_size)), (Ok(()), maximum));
        if xsave_size > 0x1000 {
            let (result, size) = state(&guest.vp, raw::GET_VP_STATE, MSHV_VP_STATE_XSAVE, 0x1000, address(&buffer));
            assert_eq!((result, size), (Err(EINVAL), xsave_size), "too small, and the size that would do");
        }
    }

    fn the_xsave_area_is_compacted_and_holds_the_registers(device) {
        let guest = Guest::reset(device, &payload::DONE);
        let value = hv_u128 { low_part: 0x1122_3344_5566_7788, high_part: 0x99AA_BBCC_DDEE_FF00 };
        guest.vp.set(&[(reg::XMM0, hv_register_value { reg128: value })]);
        let (area, _) = xsave(&guest);
        assert_eq!(area.read(160, 16), raw::bytes_of(&value), "XMM0 in the legacy area");
        assert_eq!(area.read(527, 1)[0] >> 7, 1, "XCOMP_BV bit 63: the compacted form");
        assert_eq!(area.read(512, 1)[0] & 2, 2, "XSTATE_BV: SSE is there");
    }

    fn the_xsave_area_comes_back_as_it_was_set(device) {
        let guest = Guest::reset(device, &payload::DONE);
        let (area, size) = xsave(&guest);
        area.write(160, &[0xA5; 16]);
        area.write(24, &0x1F80u32.to_le_bytes());
        let present = area.read(512, 1)[0] | 3;
        area.write(512, &[present]);
        let pages = size.next_multiple_of(0x1000);
        let (result, _) = state(&guest.vp, raw::SET_VP_STATE, MSHV_VP_STATE_XSAVE, pages, address(&area));
        assert_eq!(result, Ok(()));
        assert_eq!(raw::bytes_of(&guest.vp.get(&[reg::XMM0])[0]), [0xA5; 16], "the register agrees");
        let (back, _) = xsave(&guest);
        assert_eq!(back.read(160, 16), [0xA5; 16]);
        assert_eq!(back.read(24, 4), area.read(24, 4));
    }

    fn the_guests_own_sse_shows_in_xsave(device) {
        require!(requires::sse(device));
        // mov eax, imm32 is B8 in 64-bit code.
        let program = code(&[&[0xB8, 0x0D, 0xF0, 0xFE, 0xCA], &payload::MOVD_XMM0_EAX, &payload::DONE]);
        let guest = Guest::long_mode(device, &program);
        guest.vp.set64(&[(reg::CR4, 0x220)]);
        guest.expect_done();
        assert_eq!(xsave(&guest).0.read(160, 4), 0xCAFE_F00Du32.to_le_bytes());
    }

    fn the_local_apic_comes_back_as_it_was_set(device) {
        let guest = Guest::reset(device, &payload::DONE);
        let lapic = Memory::new(0x1000);
        let get = |buffer: &Memory| state(&guest.vp, raw::GET_VP_STATE, MSHV_VP_STATE_LAPIC, 0x1000, address(buffer)).0;
        assert_eq!(get(&lapic), Ok(()));
        assert_eq!(word(&lapic, SPURIOUS) & 0x100, 0, "disabled by software after reset");
        lapic.write(SPURIOUS, &0x1FFu32.to_le_bytes());
        let (result, _) = state(&guest.vp, raw::SET_VP_STATE, MSHV_VP_STATE_LAPIC, 0x1000, address(&lapic));
        assert_eq!(result, Ok(()));
        let back = Memory::new(0x1000);
        assert_eq!(get(&back), Ok(()));
        assert_eq!(word(&back, SPURIOUS), 0x1FF);
        let size = size_of::<hv_local_interrupt_controller_state>();
        assert_eq!(back.read(0, size), lapic.read(0, size), "all of it");
    }

    fn the_guest_and_the_state_agree_on_the_local_apic(device) {
        let program = code(&[&payload::lapic_enable(), &payload::lapic_write(0x320, 0x1_0040), &payload::lapic_read(0x30), &payload::DONE]);
        let guest = Guest::real_mode(device, &program);
        guest.expect_done();
        let buffer = Memory::new(0x1000);
        assert_eq!(state(&guest.vp, raw::GET_VP_STATE, MSHV_VP_STATE_LAPIC, 0x1000, address(&buffer)).0, Ok(()));
        assert_eq!(word(&buffer, 0), 0, "APIC id");
        assert_eq!(word(&buffer, SPURIOUS), 0x1FF);
        assert_eq!(word(&buffer, 4), guest.vp.get64(reg::RAX) as u32, "version, as the guest read it");
        // The timer's entry is the fourth word after the three 256-bit registers and ESR, ICR high, ICR low.
        assert_eq!(word(&buffer, 20 + 3 * 32 + 12), 0x1_0040, "timer entry: masked, vector 0x40");
    }

    fn the_crates_lapic_and_xsave_go_there_and_back(_device) {
        let vm = mshv_ioctls::Mshv::new().expect("Mshv::new").create_vm().expect("create_vm");
        vm.initialize().expect("initialize");
        let vcpu = vm.create_vcpu(0).expect("create_vcpu");
        let lapic = vcpu.get_lapic().expect("get_lapic");
        vcpu.set_lapic(&lapic).expect("set_lapic");
        assert_eq!(vcpu.get_lapic().expect("get_lapic").regs, lapic.regs);
        let xsave = vcpu.get_xsave().expect("get_xsave");
        vcpu.set_xsave(&xsave).expect("set_xsave");
        assert_eq!(vcpu.get_xsave().expect("get_xsave").buffer, xsave.buffer);
    }

    fn synthetic_timers_come_back_as_they_were_set(device) {
        let guest = Guest::reset(device, &payload::DONE);
        let buffer = Memory::new(0x1000);
        let get = |to: &Memory| state(&guest.vp, raw::GET_VP_STATE, MSHV_VP_STATE_SYNTHETIC_TIMERS, 0x1000, address(to)).0;
        assert_eq!(get(&buffer), Ok(()));
        let size = size_of::<hv_synthetic_timers_state>();
        assert!(buffer.read(0, size).iter().all(|byte| *byte == 0), "no timer is set after reset");
        assert_eq!(state(&guest.vp, raw::SET_VP_STATE, MSHV_VP_STATE_SYNTHETIC_TIMERS, 0x1000, address(&buffer)).0, Ok(()));
        let back = Memory::new(0x1000);
        assert_eq!(get(&back), Ok(()));
        assert_eq!(back.read(0, size), buffer.read(0, size));
    }
}
