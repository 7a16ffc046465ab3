//! Port input and output.

use super::*;

#[test]
fn out_and_in_wait_for_the_client() {
    // out dx, al; in al, 0x60; out dx, al
    let Some(guest) = boot(&[OUT, 0xe4, 0x60, OUT]) else {
        return;
    };
    guest.set(&[(hv::hv_register_name_HV_X64_REGISTER_RAX, 0x55)]);
    let message = guest.run();
    let port = message.to_ioport_info().unwrap();
    assert_eq!({ port.rax } & 0xff, 0x55);
    assert_eq!(
        (
            header(&message).instruction_length(),
            header(&message).intercept_access_type
        ),
        (1, 1)
    );
    assert_eq!(guest.rip(), CODE);
    guest.resume_after(1);
    let message = guest.run();
    let port = message.to_ioport_info().unwrap();
    assert_eq!(
        ({ port.port_number }, header(&message).instruction_length()),
        (0x60, 2)
    );
    assert_eq!(
        (header(&message).intercept_access_type, guest.rip()),
        (0, CODE + 1)
    );
    // SAFETY: a plain integer.
    let access = unsafe { port.access_info.as_uint8 };
    assert_eq!(access, 1);
    guest.set(&[(hv::hv_register_name_HV_X64_REGISTER_RAX, 0x77)]);
    guest.resume_after(2);
    let port = guest.run().to_ioport_info().unwrap();
    assert_eq!({ port.rax }, 0x77);
}

#[test]
fn a_port_access_the_client_does_not_finish_comes_again() {
    let Some(guest) = boot(&[0xec, OUT]) else {
        return;
    };
    guest.set(&[(hv::hv_register_name_HV_X64_REGISTER_RAX, 0x1234)]);
    for _ in 0..3 {
        let port = guest.run().to_ioport_info().unwrap();
        assert_eq!(({ port.header.rip }, { port.rax }), (CODE, 0x1234));
    }
    guest.resume_after(1);
    ends_with_out(&guest, CODE + 1);
    let port = guest.run().to_ioport_info().unwrap();
    assert_eq!(({ port.header.rip }, { port.rax }), (CODE + 1, 0x1234));
}

#[test]
fn string_output_is_shown_before_its_first_value() {
    // es rep outsb; es outsw; out dx, al
    let Some(guest) = boot(&[0x26, 0xf3, 0x6e, 0x26, 0x6f, OUT]) else {
        return;
    };
    guest.set(&[
        (hv::hv_register_name_HV_X64_REGISTER_RCX, 3),
        (hv::hv_register_name_HV_X64_REGISTER_RSI, 0x3000),
    ]);
    let message = guest.run();
    let port = message.to_ioport_info().unwrap();
    // SAFETY: a union of integers.
    let access = unsafe { port.access_info.__bindgen_anon_1 };
    assert_eq!(
        (
            access.access_size(),
            access.string_op(),
            access.rep_prefix()
        ),
        (1, 1, 1)
    );
    assert_eq!(
        ({ port.rcx }, { port.rsi }, { port.header.rip }),
        (3, 0x3000, CODE)
    );
    assert_eq!(header(&message).instruction_length(), 3);
    guest.set(&[
        (hv::hv_register_name_HV_X64_REGISTER_RCX, 0),
        (hv::hv_register_name_HV_X64_REGISTER_RSI, 0x3003),
    ]);
    guest.resume_after(3);
    let port = guest.run().to_ioport_info().unwrap();
    // SAFETY: a union of integers.
    let access = unsafe { port.access_info.__bindgen_anon_1 };
    assert_eq!(
        (
            access.access_size(),
            access.string_op(),
            access.rep_prefix()
        ),
        (2, 1, 0)
    );
    assert_eq!(({ port.rsi }, { port.header.rip }), (0x3003, CODE + 3));
    assert_eq!(guest.rip(), CODE + 3);
    guest.resume_after(2);
    ends_with_out(&guest, CODE + 5);
}

#[test]
fn string_input_touches_neither_registers_nor_memory() {
    // rep insb; out dx, al
    let Some(guest) = boot(&[0xf3, 0x6c, OUT]) else {
        return;
    };
    guest.partition.memory.write(0x3000, b"keep").unwrap();
    guest.set(&[
        (hv::hv_register_name_HV_X64_REGISTER_RCX, 4),
        (hv::hv_register_name_HV_X64_REGISTER_RDI, 0x3000),
    ]);
    let port = guest.run().to_ioport_info().unwrap();
    assert_eq!(
        ({ port.rcx }, { port.rdi }, { port.header.rip }),
        (4, 0x3000, CODE)
    );
    // The client does the whole of it.
    guest.partition.memory.write(0x3000, b"done").unwrap();
    guest.set(&[
        (hv::hv_register_name_HV_X64_REGISTER_RCX, 0),
        (hv::hv_register_name_HV_X64_REGISTER_RDI, 0x3004),
    ]);
    guest.resume_after(2);
    ends_with_out(&guest, CODE + 2);
    let mut memory = [0; 4];
    guest.partition.memory.read(0x3000, &mut memory).unwrap();
    assert_eq!(&memory, b"done");
}
