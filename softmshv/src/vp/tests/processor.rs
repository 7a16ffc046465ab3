//! MSRs, CPUID, triple faults.

use super::*;

/// mov ecx, 0x12345678; rdmsr; out dx, al
const RDMSR: [u8; 9] = [0x66, 0xb9, 0x78, 0x56, 0x34, 0x12, 0x0f, 0x32, OUT];

#[test]
fn an_unknown_msr_follows_the_property() {
    let Some(guest) = boot(&RDMSR) else { return };
    guest.set(&[(hv::hv_register_name_HV_X64_REGISTER_RAX, 0x55)]);
    guest
        .partition
        .set_property(crate::property::code::UNIMPLEMENTED_MSR_ACTION, 1)
        .unwrap();
    // DX is zero now, and so is the port.
    let port = guest.run().to_ioport_info().unwrap();
    assert_eq!(({ port.header.rip }, { port.rax }), (CODE + 8, 0));
    // By default it is a general protection fault: vector 13 of the table at 0.
    let Some(guest) = boot(&RDMSR) else { return };
    guest
        .partition
        .memory
        .write(13 * 4, &[0x00, 0x20, 0, 0])
        .unwrap();
    guest.partition.memory.write(0x2000, &[OUT]).unwrap();
    ends_with_out(&guest, 0x2000);
}

#[test]
fn an_intercepted_msr_is_the_clients() {
    let Some(guest) = boot(&RDMSR) else { return };
    guest
        .partition
        .intercepts
        .install(ACCESS_READ | ACCESS_WRITE, 1, 0);
    let message = guest.run();
    assert_eq!(kind(&message), hv::hv_message_type_HVMSG_X64_MSR_INTERCEPT);
    let msr = message.to_msr_info().unwrap();
    assert_eq!(
        ({ msr.msr_number }, { msr.header.rip }),
        (0x1234_5678, CODE + 6)
    );
    assert_eq!(
        (header(&message).instruction_length(), guest.rip()),
        (2, CODE + 6)
    );
    guest.set(&[(hv::hv_register_name_HV_X64_REGISTER_RAX, 0x99)]);
    guest.resume_after(2);
    let port = guest.run().to_ioport_info().unwrap();
    assert_eq!({ port.rax }, 0x99);
}

#[test]
fn an_msr_can_be_intercepted_by_index_for_writes_alone() {
    // mov ecx, 0x277; rdmsr; wrmsr; out dx, al
    let code = [0x66, 0xb9, 0x77, 0x02, 0, 0, 0x0f, 0x32, 0x0f, 0x30, OUT];
    let Some(guest) = boot(&code) else { return };
    guest.partition.intercepts.install(ACCESS_WRITE, 12, 0x277);
    let message = guest.run();
    let msr = message.to_msr_info().unwrap();
    assert_eq!(({ msr.msr_number }, { msr.header.rip }), (0x277, CODE + 8));
    assert_eq!(msr.header.intercept_access_type, 1);
    assert_eq!(
        { msr.rax },
        guest.get(hv::hv_register_name_HV_X64_REGISTER_PAT) & 0xffff_ffff
    );
    guest.resume_after(2);
    // DX was overwritten by RDMSR.
    assert_eq!(
        kind(&guest.run()),
        hv::hv_message_type_HVMSG_X64_IO_PORT_INTERCEPT
    );
}

#[test]
fn cpuid_answers_what_the_client_registered() {
    // mov eax, 0x40000005; cpuid; out dx, al
    let code = [0x66, 0xb8, 0x05, 0, 0, 0x40, 0x0f, 0xa2, OUT];
    let Some(guest) = boot(&code) else { return };
    guest.partition.intercepts.register(CpuidResult {
        leaf: 0x4000_0005,
        subleaf: 0,
        vp_index: None,
        any_subleaf: true,
        values: [0x11, 0x22, 0x33, 0x3f8],
        masks: [u32::MAX; 4],
    });
    ends_with_out(&guest, CODE + 8);
    assert_eq!(guest.rax(), 0x11);
    assert_eq!(
        guest.vp.cpuid_values(0x4000_0005, 0, 0, 0),
        [0x11, 0x22, 0x33, 0x3f8]
    );
}

#[test]
fn cpuid_can_be_intercepted_where_instructions_run_singly() {
    let Some(guest) = boot(&[0x66, 0x31, 0xc0, 0x0f, 0xa2, OUT]) else {
        return;
    };
    let installed = guest.partition.intercepts.install(ACCESS_EXECUTE, 2, 0);
    if !can_intercept_cpuid() {
        assert_ne!(installed, HvStatus::SUCCESS);
        return;
    }
    let message = guest.run();
    let cpuid = message.to_cpuid_info().unwrap();
    assert_eq!(({ cpuid.header.rip }, { cpuid.rax }), (CODE + 3, 0));
    let [_, ebx, ..] = guest.vp.cpuid_values(0, 0, 0, 0);
    assert_eq!({ cpuid.default_result_rbx }, u64::from(ebx));
    guest.resume_after(2);
    ends_with_out(&guest, CODE + 5);
}

#[test]
fn a_triple_fault_is_unrecoverable() {
    // cs lidt [0x2000]; ud2, with a table of limit 0
    let Some(guest) = boot(&[0x2e, 0x0f, 0x01, 0x1e, 0x00, 0x20, 0x0f, 0x0b]) else {
        return;
    };
    let message = guest.run();
    if kind(&message) != hv::hv_message_type_HVMSG_UNRECOVERABLE_EXCEPTION {
        // KVM's software real mode ignores the limit of the interrupt table.
        assert!(!precise(), "message {:#x}", kind(&message));
        rota_tests::requires::skip("this KVM has no triple faults in real mode");
    }
}
