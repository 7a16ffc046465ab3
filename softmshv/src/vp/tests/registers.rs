//! What a client reads and writes of a stopped VP.

use super::*;

#[test]
fn the_register_page_carries_a_whole_exit() {
    let Some(guest) = boot(&[0xec, 0x88, 0xc3, OUT]) else {
        return;
    };
    let page = guest.page();
    guest.run();
    // SAFETY: the page stays mapped, and nobody else writes while the VP is stopped.
    unsafe {
        assert_eq!(((*page).version, (*page).isvalid), (1, 1));
        let registers = &raw mut (*page).__bindgen_anon_1;
        let mut all = registers.read_unaligned();
        assert_eq!(all.registers[16], CODE);
        all.registers[0] = 0x42;
        all.registers[16] += 1;
        registers.write_unaligned(all);
        (*page).dirty = 1 << hv::HV_X64_REGISTER_CLASS_GENERAL | 1 << hv::HV_X64_REGISTER_CLASS_IP;
        // A hypercall sees what the page says.
        assert_eq!(guest.rip(), CODE + 1);
        assert_eq!({ (*page).dirty }, 0);
        ends_with_out(&guest, CODE + 3);
        assert_eq!(
            guest.get(hv::hv_register_name_HV_X64_REGISTER_RBX) & 0xff,
            0x42
        );
        // And the page sees what a hypercall says.
        guest.set(&[(hv::hv_register_name_HV_X64_REGISTER_RBX, 0x4711)]);
        assert_eq!(registers.read_unaligned().registers[3], 0x4711);
    }
}

#[test]
fn registers_survive_both_ways() {
    let Some(guest) = boot(&[OUT]) else { return };
    for (name, value) in [
        (
            hv::hv_register_name_HV_X64_REGISTER_R15,
            0x1234_5678_9abc_def0,
        ),
        (hv::hv_register_name_HV_X64_REGISTER_CR2, 0xdead_b000),
        (hv::hv_register_name_HV_X64_REGISTER_CR8, 3),
        (hv::hv_register_name_HV_X64_REGISTER_DR0, 0x1000),
        (
            hv::hv_register_name_HV_X64_REGISTER_PAT,
            0x0007_0406_0007_0406,
        ),
        (hv::hv_register_name_HV_X64_REGISTER_SYSENTER_EIP, 0x4444),
        (hv::hv_register_name_HV_X64_REGISTER_LSTAR, 0x5555),
        (hv::hv_register_name_HV_X64_REGISTER_KERNEL_GS_BASE, 0x6666),
        (
            hv::hv_register_name_HV_X64_REGISTER_MSR_MTRR_DEF_TYPE,
            0xc06,
        ),
        (hv::hv_register_name_HV_X64_REGISTER_XMM3, 0x7777),
        (
            hv::hv_register_name_HV_REGISTER_PENDING_INTERRUPTION,
            1 | 0x30 << 16,
        ),
        (hv::hv_register_name_HV_REGISTER_INTERRUPT_STATE, 1),
        (hv::hv_register_name_HV_REGISTER_EXPLICIT_SUSPEND, 1),
        (hv::hv_register_name_HV_REGISTER_INTERNAL_ACTIVITY_STATE, 0),
        (hv::hv_register_name_HV_X64_REGISTER_BNDCFGS, 0),
    ] {
        guest.set(&[(name, value)]);
        assert_eq!(guest.get(name), value, "register {name:#x}");
    }
}

#[test]
fn bad_names_and_values_say_how_far_it_got() {
    let Some(guest) = boot(&[OUT]) else { return };
    let rax = hv::hv_register_name_HV_X64_REGISTER_RAX;
    let mut values = [hv_register_value::default(); 3];
    let got = guest
        .vp
        .get_registers(&[rax, 0xdead_beef, rax], &mut values);
    assert_eq!(got, (HvStatus::INVALID_PARAMETER, 1));
    let assoc = |name: u32, value: u64| hv_register_assoc {
        name,
        value: word(value),
        ..Default::default()
    };
    let cr0 = hv::hv_register_name_HV_X64_REGISTER_CR0;
    let set = guest
        .vp
        .set_registers(&[assoc(rax, 1), assoc(rax, 2), assoc(cr0, 1 << 40)]);
    assert_eq!(set, (HvStatus::INVALID_REGISTER_VALUE, 2));
    assert_eq!(guest.rax(), 2);
}

#[test]
fn an_impossible_state_is_refused_when_it_is_to_run() {
    let Some(guest) = boot(&[OUT]) else { return };
    // Paging without protection.
    guest.set(&[(hv::hv_register_name_HV_X64_REGISTER_CR0, 0x8000_0010)]);
    assert_eq!(
        kind(&guest.run()),
        hv::hv_message_type_HVMSG_INVALID_VP_REGISTER_VALUE
    );
    // The client can still see and mend what it did.
    assert_eq!(
        guest.get(hv::hv_register_name_HV_X64_REGISTER_CR0),
        0x8000_0010
    );
    guest.set(&[(hv::hv_register_name_HV_X64_REGISTER_CR0, 0x10)]);
    ends_with_out(&guest, CODE);
}

#[test]
fn states_survive_both_ways() {
    let Some(guest) = boot(&[OUT]) else { return };
    for kind in 0..5 {
        let size = guest.vp.state_size(kind).unwrap();
        let mut state = vec![0; size];
        guest.vp.get_state(kind, &mut state).unwrap();
        guest.vp.set_state(kind, &state).unwrap();
        let mut again = vec![0; size];
        guest.vp.get_state(kind, &mut again).unwrap();
        assert_eq!(state, again, "state {kind}");
        assert_eq!(
            guest.vp.get_state(kind, &mut state[..100]),
            Err(Errno(libc::EINVAL))
        );
    }
    assert_eq!(guest.vp.state_size(5), Err(Errno(libc::EINVAL)));
}

#[test]
fn translation_without_paging() {
    let Some(guest) = boot(&[OUT]) else { return };
    assert_eq!(guest.vp.translate(0, 0xfe00_0123), (0, 0xfe00_0123));
}

#[test]
fn a_synic_page_is_the_guests_memory_while_it_is_on() {
    let Some(guest) = boot(&[OUT]) else { return };
    let simp = hv::hv_register_name_HV_REGISTER_SIMP;
    let synic = 1 << 0 | 1 << 1 | 1 << 4;
    let code = crate::property::code::SYNTHETIC_PROC_FEATURES;
    guest.partition.set_property(code, synic).unwrap();
    let vp = Vp::new(&guest.partition, 1).unwrap();
    let assoc = hv_register_assoc {
        name: simp,
        value: word(0x5001),
        ..Default::default()
    };
    if vp.set_registers(&[assoc]).0 != HvStatus::SUCCESS {
        rota_tests::requires::skip("this KVM is built without Hyper-V");
        return;
    }
    guest.partition.memory.write(0x5000, b"message").unwrap();
    let mut page = vec![0; 0x1000];
    vp.get_state(2, &mut page).unwrap();
    assert_eq!(&page[..7], b"message");
    page[0] = b'M';
    vp.set_state(2, &page).unwrap();
    let mut memory = [0; 7];
    guest.partition.memory.read(0x5000, &mut memory).unwrap();
    assert_eq!(&memory, b"Message");
    let [_, b, c, d] = vp.cpuid_values(0x4000_0000, 0, 0, 0);
    let name: Vec<u8> = [b, c, d].into_iter().flat_map(u32::to_le_bytes).collect();
    assert_eq!(name, b"Microsoft Hv");
}

#[test]
fn translation_follows_the_page_tables() {
    let Some(guest) = boot_long(&[OUT]) else {
        return;
    };
    assert_eq!(guest.vp.translate(1, 0x1_2345_6789), (0, 0x1_2345_6789));
    // Beyond the one entry of the top table, and through a table that is not in memory.
    assert_eq!(guest.vp.translate(1, 1 << 40), (1, 0));
    let entry = (FAR | 3).to_le_bytes();
    guest.partition.memory.write(0x4008, &entry).unwrap();
    assert_eq!(guest.vp.translate(1, 1 << 39), (4, FAR));
}
