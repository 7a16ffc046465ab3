//! What a processor does besides memory and ports: MSRs, CPUID, halting, dying.

use mshv_bindings::*;
use rota_tests::guest::{CODE, Guest};
use rota_tests::message::Exit;
use rota_tests::payload::{self, code, mov_ecx};
use rota_tests::raw::bytes_of;
use rota_tests::reg::{self, table};
use rota_tests::vm::Partition;
use rota_tests::{on_mshv, require, requires};

/// An MSR that no processor and no hypervisor has.
const NO_MSR: u32 = 0x0BAD_F00D;
/// `#GP`.
const GENERAL_PROTECTION: u8 = 13;

/// Makes `cpuid` leaf `leaf` answer `result` on VP 0, all bits of it.
fn override_cpuid(partition: &Partition, leaf: u32, result: [u32; 4]) {
    let [eax, ebx, ecx, edx] = result;
    let mut parameters = hv_register_x64_cpuid_result_parameters::default();
    parameters.input.eax = leaf;
    parameters.input.always_override = 1;
    parameters.result = hv_register_x64_cpuid_result_parameters__bindgen_ty_2 {
        eax,
        eax_mask: u32::MAX,
        ebx,
        ebx_mask: u32::MAX,
        ecx,
        ecx_mask: u32::MAX,
        edx,
        edx_mask: u32::MAX,
    };
    let input = hv_input_register_intercept_result {
        vp_index: 0,
        intercept_type: hv_intercept_type_HV_INTERCEPT_TYPE_X64_CPUID,
        parameters: hv_register_intercept_result_parameters { cpuid: parameters },
        ..Default::default()
    };
    let outcome = rota_tests::raw::hypercall(
        partition.fd(),
        HVCALL_REGISTER_INTERCEPT_RESULT,
        0,
        bytes_of(&input),
        &mut [],
    );
    assert_eq!(
        (outcome.result, outcome.status),
        (Ok(()), 0),
        "HvCallRegisterInterceptResult"
    );
}

fn ignore_unknown_msrs(partition: &Partition) {
    let code = hv_partition_property_code_HV_PARTITION_PROPERTY_UNIMPLEMENTED_MSR_ACTION;
    let action = hv_unimplemented_msr_action_HV_UNIMPLEMENTED_MSR_ACTION_IGNORE_WRITE_READ_ZERO;
    assert_eq!(
        partition.set_property(code, u64::from(action)).result,
        Ok(())
    );
}

/// EAX, EBX, ECX, EDX of the stopped guest.
fn results(guest: &Guest) -> [u32; 4] {
    [reg::RAX, reg::RBX, reg::RCX, reg::RDX].map(|name| guest.vp.get64(name) as u32)
}

on_mshv! {
    fn an_unknown_msr_is_general_protection(device) {
        for instruction in [payload::RDMSR, payload::WRMSR] {
            let guest = Guest::real_mode(device, &code(&[&mov_ecx(NO_MSR), &instruction, &payload::DONE]));
            guest.handler(GENERAL_PROTECTION, &payload::MARK_2);
            let exit = guest.run_to_port();
            assert_eq!(exit.port, 0xF2, "the handler of #GP: {exit:x?}");
            let stack = guest.ram.read(guest.vp.get64(reg::RSP), 2);
            assert_eq!(u16::from_le_bytes([stack[0], stack[1]]), CODE as u16 + 6, "which returns to the instruction itself");
        }
    }

    fn an_ignored_msr_reads_as_zero(device) {
        let program = code(&[&mov_ecx(NO_MSR), &payload::WRMSR, &payload::MARK_1, &payload::RDMSR, &payload::DONE]);
        let guest = Guest::real_mode(device, &program);
        ignore_unknown_msrs(&guest.partition);
        guest.vp.set64(&[(reg::RAX, 0x1111), (reg::RDX, 0x2222)]);
        guest.expect_mark(0xF1);
        guest.expect_done();
        assert_eq!((guest.vp.get64(reg::RAX), guest.vp.get64(reg::RDX)), (0, 0), "the write went nowhere");
    }

    /// An MSR the hypervisor keeps itself never reaches the client, and keeps its value.
    fn a_known_msr_is_the_hypervisors(device) {
        // IA32_SYSENTER_ESP
        let program = code(&[&mov_ecx(0x175), &payload::WRMSR, &payload::MARK_1, &payload::RDMSR, &payload::DONE]);
        let guest = Guest::real_mode(device, &program);
        guest.vp.set64(&[(reg::RAX, 0x1234_5678), (reg::RDX, 0)]);
        guest.expect_mark(0xF1);
        guest.vp.set64(&[(reg::RAX, 0)]);
        guest.expect_done();
        assert_eq!(guest.vp.get64(reg::RAX), 0x1234_5678);
    }

    fn an_installed_msr_intercept_is_a_message(device) {
        for (instruction, access) in [(payload::RDMSR, 0), (payload::WRMSR, 1)] {
            let guest = Guest::real_mode(device, &code(&[&mov_ecx(NO_MSR), &instruction, &payload::DONE]));
            let outcome = guest.partition.install_intercept(3, hv_intercept_type_HV_INTERCEPT_TYPE_X64_MSR, 0);
            assert_eq!((outcome.result, outcome.status), (Ok(()), 0), "HvCallInstallIntercept");
            guest.vp.set64(&[(reg::RAX, 0x1111), (reg::RDX, 0x2222)]);
            let exit = guest.run();
            let Exit::Msr(header, msr, rax, rdx) = exit else { panic!("expected an MSR message, got {exit:x?}") };
            assert_eq!((msr, header.access, header.rip, header.length), (NO_MSR, access, CODE + 6, 2));
            assert_eq!((rax, rdx), (0x1111, 0x2222), "registers as before");
            guest.vp.set64(&[(reg::RAX, 0xAAAA), (reg::RDX, 0xBBBB), (reg::RIP, CODE + 8)]);
            guest.expect_done();
            assert_eq!((guest.vp.get64(reg::RAX), guest.vp.get64(reg::RDX)), (0xAAAA, 0xBBBB), "the client's values");
        }
    }

    /// The vendor leaf of the specification: a guest of this hypervisor knows where it is.
    fn the_guest_sees_microsoft_hv(device) {
        let program = code(&[&payload::mov_eax(0x4000_0000), &payload::CPUID, &payload::DONE]);
        let guest = Guest::real_mode(device, &program);
        guest.expect_done();
        let [max, ebx, ecx, edx] = results(&guest);
        let vendor = [ebx, ecx, edx].map(u32::to_le_bytes).concat();
        assert_eq!(String::from_utf8_lossy(&vendor), "Microsoft Hv");
        assert!(max >= 0x4000_0005, "highest leaf {max:#x}");
    }

    fn the_hypervisor_bit_is_set(device) {
        let guest = Guest::real_mode(device, &code(&[&payload::mov_eax(1), &payload::CPUID, &payload::DONE]));
        guest.expect_done();
        assert_eq!(results(&guest)[2] >> 31, 1, "leaf 1, ECX bit 31");
    }

    fn a_cpuid_override_is_what_the_guest_reads(device) {
        let guest = Guest::real_mode(device, &code(&[&payload::mov_eax(2), &payload::CPUID, &payload::DONE]));
        let wanted = [0x0102_0304, 0x1112_1314, 0x2122_2324, 0x3132_3334];
        override_cpuid(&guest.partition, 2, wanted);
        guest.vp.set64(&[(reg::RCX, 0)]);
        guest.expect_done();
        assert_eq!(results(&guest), wanted);
    }

    fn a_cpuid_override_is_what_the_hypercall_reads(_device) {
        let vm = mshv_ioctls::Mshv::new().expect("Mshv::new").create_vm().expect("create_vm");
        vm.initialize().expect("initialize");
        let vcpu = vm.create_vcpu(0).expect("create_vcpu");
        let entry = hv_cpuid_entry { function: 2, eax: 0xF0, ebx: 0xF1, ecx: 0xF2, edx: 0xF3, ..Default::default() };
        vcpu.register_intercept_result_cpuid_entry(&entry, Some(1), None).expect("override");
        let values = vcpu.get_cpuid_values(2, 0, 0, 0).expect("HvCallGetVpCpuidValues");
        let bits = [0xF0, 0xF1, 0xF2, 0xF3];
        assert_eq!([0, 1, 2, 3].map(|i| values[i] & bits[i]), bits, "the crate's masks are the values themselves");
    }

    fn an_installed_cpuid_intercept_is_a_message(device) {
        let guest = Guest::real_mode(device, &code(&[&payload::mov_eax(1), &payload::CPUID, &payload::DONE]));
        let kind = hv_intercept_type_HV_INTERCEPT_TYPE_X64_CPUID;
        let outcome = guest.partition.install_intercept(HV_INTERCEPT_ACCESS_MASK_EXECUTE, kind, 1);
        if u32::from(outcome.status) == HV_STATUS_INVALID_PARAMETER && requires::amd_kvm() {
            return requires::skip("KVM cannot intercept CPUID");
        }
        assert_eq!((outcome.result, outcome.status), (Ok(()), 0), "HvCallInstallIntercept");
        guest.vp.set64(&[(reg::RCX, 0)]);
        let exit = guest.run();
        let Exit::Cpuid(header, rax, rcx, default) = exit else { panic!("expected a CPUID message, got {exit:x?}") };
        assert_eq!((header.rip, header.length, rax, rcx), (CODE + 6, 2, 1, 0));
        assert_ne!(default[3], 0, "the hypervisor's own answer comes with it: no processor is without features");
        guest.vp.set64(&[(reg::RAX, 0x77), (reg::RIP, CODE + 8)]);
        guest.expect_done();
        assert_eq!(guest.vp.get64(reg::RAX), 0x77);
    }

    /// `#UD` without an interrupt table: `#GP`, double fault, the end.
    fn a_triple_fault_is_an_unrecoverable_exception(device) {
        require!(requires::long_mode(device));
        let guest = Guest::long_mode(device, &payload::UD2);
        guest.vp.set(&[(reg::IDTR, table(0, 0))]);
        let exit = guest.run();
        assert!(matches!(exit, Exit::Unrecoverable(_)), "{exit:x?}");
    }

    fn an_unrecoverable_exception_tells_who_and_where(device) {
        require!(requires::long_mode(device));
        let guest = Guest::long_mode(device, &code(&[&payload::MARK_1, &payload::UD2]));
        guest.expect_mark(0xF1);
        guest.vp.set(&[(reg::IDTR, table(0, 0))]);
        guest.vp.set64(&[(reg::RBX, 0x1234)]);
        let exit = guest.run();
        let Exit::Unrecoverable(header) = exit else { panic!("{exit:x?}") };
        if header.rip == 0xFFF0 && requires::amd_kvm() {
            return requires::skip("on AMD processors KVM resets a VP that shuts down");
        }
        assert_eq!((header.vp, header.rip, header.long), (0, 0x40_0002, true));
        assert_eq!((guest.vp.get64(reg::RIP), guest.vp.get64(reg::RBX)), (0x40_0002, 0x1234), "the VP can be looked at");
    }

    /// A VP starts where a processor does after reset.
    fn a_new_vp_is_in_reset_state(device) {
        let guest = Guest::reset(device, &payload::DONE);
        // SAFETY: the register is a segment.
        let cs = unsafe { guest.vp.get(&[reg::CS])[0].segment };
        assert_eq!(({ cs.selector }, { cs.base }), (0xF000, 0xFFFF_0000));
        assert_eq!(guest.vp.get64(reg::RIP), 0xFFF0);
        assert_eq!(guest.vp.get64(reg::RFLAGS), 2);
        assert_eq!(guest.vp.get64(reg::CR0) & 0x8000_0001, 0, "real mode, no paging");
        let access = guest.run_to_memory();
        assert_eq!((access.gpa, access.header.access), (0xFFFF_FFF0, 2), "and fetches from the reset vector");
    }
}
