//! Accesses that guest memory does not serve.

use super::*;

#[test]
fn a_store_to_nothing_has_not_happened_yet() {
    // mov [0x10], al; out dx, al
    let Some(guest) = boot(&[0xa2, 0x10, 0x00, OUT]) else {
        return;
    };
    let message = guest.run();
    assert_eq!(kind(&message), hv::hv_message_type_HVMSG_UNMAPPED_GPA);
    let info = message.to_memory_info().unwrap();
    assert_eq!({ info.guest_physical_address }, MMIO + 0x10);
    assert_eq!({ info.guest_virtual_address }, MMIO + 0x10);
    assert_eq!(info.header.intercept_access_type, 1);
    assert_eq!(info.instruction_bytes[..3], [0xa2, 0x10, 0x00]);
    assert_eq!(
        (info.instruction_byte_count, { info.header.rip }),
        (16, CODE)
    );
    assert_eq!(guest.rip(), CODE);
    // Not moved on: the same again.
    assert_eq!(kind(&guest.run()), hv::hv_message_type_HVMSG_UNMAPPED_GPA);
    guest.resume_after(3);
    ends_with_out(&guest, CODE + 3);
}

#[test]
fn a_load_from_nothing_leaves_the_register_to_the_client() {
    // mov al, [0x10]; out dx, al
    let Some(guest) = boot(&[0xa0, 0x10, 0x00, OUT]) else {
        return;
    };
    guest.set(&[(hv::hv_register_name_HV_X64_REGISTER_RAX, 0x1122)]);
    let info = guest.run().to_memory_info().unwrap();
    assert_eq!(
        (info.header.intercept_access_type, {
            info.guest_physical_address
        }),
        (0, MMIO + 0x10)
    );
    assert_eq!((guest.rax(), guest.rip()), (0x1122, CODE));
    guest.set(&[(hv::hv_register_name_HV_X64_REGISTER_RAX, 0x1142)]);
    guest.resume_after(3);
    let port = guest.run().to_ioport_info().unwrap();
    assert_eq!({ port.rax }, 0x1142);
}

#[test]
fn a_read_modify_write_is_a_write_and_happens_once() {
    // or [0x10], al; out dx, al
    let Some(guest) = boot(&[0x08, 0x06, 0x10, 0x00, OUT]) else {
        return;
    };
    let info = guest.run().to_memory_info().unwrap();
    assert_eq!(info.header.intercept_access_type, 1);
    assert_eq!(guest.rip(), CODE);
    guest.resume_after(4);
    ends_with_out(&guest, CODE + 4);
}

#[test]
fn a_string_copy_stops_at_the_element_that_leaves_memory() {
    // rep movsb, from nothing to memory; out dx, al
    let Some(guest) = boot(&[0xf3, 0xa4, OUT]) else {
        return;
    };
    guest.set(&[
        (hv::hv_register_name_HV_X64_REGISTER_RCX, 4),
        (hv::hv_register_name_HV_X64_REGISTER_RSI, 0x20),
        (hv::hv_register_name_HV_X64_REGISTER_RDI, 0x3000),
    ]);
    guest.partition.memory.write(0x3000, &[1, 2, 3, 4]).unwrap();
    let info = guest.run().to_memory_info().unwrap();
    assert_eq!(
        (info.header.intercept_access_type, {
            info.guest_physical_address
        }),
        (0, MMIO + 0x20)
    );
    assert_eq!(guest.get(hv::hv_register_name_HV_X64_REGISTER_RCX), 4);
    assert_eq!(guest.get(hv::hv_register_name_HV_X64_REGISTER_RSI), 0x20);
    guest.resume_after(2);
    ends_with_out(&guest, CODE + 2);
}

#[test]
fn a_string_copy_to_nothing_counts_what_is_left() {
    // rep movsb, from memory to nothing: es points at nothing, ds at memory.
    let Some(guest) = boot(&[0xf3, 0xa4, OUT]) else {
        return;
    };
    guest.set_segment(hv::hv_register_name_HV_X64_REGISTER_DS, 0);
    // The first four bytes go to the end of memory, the rest beyond it.
    guest.set_segment(hv::hv_register_name_HV_X64_REGISTER_ES, 0x1000 - 0x100);
    guest.set(&[
        (hv::hv_register_name_HV_X64_REGISTER_RCX, 8),
        (hv::hv_register_name_HV_X64_REGISTER_RSI, 0x3000),
        (hv::hv_register_name_HV_X64_REGISTER_RDI, 0xffc),
    ]);
    guest
        .partition
        .memory
        .write(0x3000, &[1, 2, 3, 4, 5, 6, 7, 8])
        .unwrap();
    let info = guest.run().to_memory_info().unwrap();
    // What lies beyond is the read-only region.
    assert_eq!(
        (info.header.intercept_access_type, {
            info.guest_physical_address
        }),
        (1, 0x1_0000)
    );
    assert_eq!(guest.get(hv::hv_register_name_HV_X64_REGISTER_RCX), 4);
    assert_eq!(guest.get(hv::hv_register_name_HV_X64_REGISTER_RSI), 0x3004);
    assert_eq!(guest.get(hv::hv_register_name_HV_X64_REGISTER_RDI), 0x1000);
    assert_eq!(guest.rip(), CODE);
}

#[test]
fn a_store_to_read_only_memory_is_a_gpa_intercept() {
    // es mov [0], al; out dx, al
    let Some(guest) = boot(&[0x26, 0xa2, 0x00, 0x00, OUT]) else {
        return;
    };
    guest.set_segment(hv::hv_register_name_HV_X64_REGISTER_ES, 0x1000);
    let message = guest.run();
    assert_eq!(kind(&message), hv::hv_message_type_HVMSG_GPA_INTERCEPT);
    let info = message.to_memory_info().unwrap();
    assert_eq!(
        (info.header.intercept_access_type, {
            info.guest_physical_address
        }),
        (1, 0x1_0000)
    );
    assert_eq!(guest.rip(), CODE);
    guest.resume_after(4);
    ends_with_out(&guest, CODE + 4);
}

#[test]
fn a_jump_to_nothing_is_an_execute_access() {
    // jmp 0x4000:0
    let Some(guest) = boot(&[0xea, 0, 0, 0, 0x40]) else {
        return;
    };
    let message = guest.run();
    if kind(&message) == hv::hv_message_type_HVMSG_UNSUPPORTED_FEATURE {
        rota_tests::requires::skip("this KVM cannot fetch outside memory in software");
        return;
    }
    let info = message.to_memory_info().unwrap();
    assert_eq!(
        (info.header.intercept_access_type, {
            info.guest_physical_address
        }),
        (2, MMIO)
    );
    assert_eq!(
        (
            info.instruction_byte_count,
            { info.header.cs_segment }.selector
        ),
        (0, 0x4000)
    );
}

#[test]
fn a_doorbell_rings_and_the_client_sees_nothing() {
    // mov word [0x10], 7; mov word [0x10], 8; out dx, al
    let code = [0xc7, 0x06, 0x10, 0, 7, 0, 0xc7, 0x06, 0x10, 0, 8, 0, OUT];
    let Some(guest) = boot(&code) else { return };
    let bell = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let args = mshv_user_ioeventfd {
        addr: MMIO + 0x10,
        len: 2,
        datamatch: 7,
        flags: 1,
        fd: std::os::fd::AsRawFd::as_raw_fd(&bell),
        ..Default::default()
    };
    guest.partition.ioeventfds.set(&args).unwrap();
    let info = guest.run().to_memory_info().unwrap();
    assert_eq!(bell.read().unwrap(), 1);
    assert_eq!({ info.header.rip }, CODE + 6);
    guest.resume_after(6);
    ends_with_out(&guest, CODE + 12);
}

#[test]
fn long_mode_accesses_stop_before_the_instruction_wherever_they_go() {
    // mov [rbx], r8d; add r8, [rbx + 8]; out dx, al
    let code = [0x44, 0x89, 0x03, 0x4c, 0x03, 0x43, 0x08, OUT];
    for target in [0xfe00_0000, 0x1_4000_0000, FAR] {
        let Some(guest) = boot_long(&code) else {
            return;
        };
        guest.set(&[
            (hv::hv_register_name_HV_X64_REGISTER_RBX, target),
            (hv::hv_register_name_HV_X64_REGISTER_R8, 5),
        ]);
        let message = guest.run();
        assert_eq!(
            kind(&message),
            hv::hv_message_type_HVMSG_UNMAPPED_GPA,
            "{target:#x}"
        );
        let info = message.to_memory_info().unwrap();
        assert_eq!({ info.guest_physical_address }, target);
        assert_eq!({ info.guest_virtual_address }, target);
        assert_eq!(
            (info.header.intercept_access_type, { info.header.rip }),
            (1, CODE)
        );
        assert_eq!(info.instruction_bytes[..3], code[..3]);
        guest.resume_after(3);
        let info = guest.run().to_memory_info().unwrap();
        assert_eq!({ info.guest_physical_address }, target + 8);
        assert_eq!(
            (info.header.intercept_access_type, { info.header.rip }),
            (0, CODE + 3)
        );
        assert_eq!(guest.get(hv::hv_register_name_HV_X64_REGISTER_R8), 5);
        guest.resume_after(4);
        ends_with_out(&guest, CODE + 7);
    }
}

#[test]
fn a_vector_store_finds_its_register_in_the_page() {
    // movups [rbx], xmm2
    let Some(guest) = boot_long(&[0x0f, 0x11, 0x13]) else {
        return;
    };
    guest.set(&[
        (hv::hv_register_name_HV_X64_REGISTER_RBX, 0xfe00_0000),
        (
            hv::hv_register_name_HV_X64_REGISTER_XMM2,
            0x1122_3344_5566_7788,
        ),
    ]);
    let page = guest.page();
    let info = guest.run().to_memory_info().unwrap();
    assert_eq!(
        (info.header.intercept_access_type, { info.header.rip }),
        (1, CODE)
    );
    // SAFETY: the page stays mapped, and nobody writes while the VP is stopped.
    let xmm = unsafe {
        (&raw const (*page).__bindgen_anon_2)
            .read_unaligned()
            .xmm_registers
    };
    assert_eq!({ xmm[2].low_part }, 0x1122_3344_5566_7788);
}
