//! The generic hypercall (`mshv_ioctl_passthru_hvcall`): its checks, its allow list, its statuses; address translation.

use mshv_bindings::*;
use rota_tests::guest::{Guest, UNMAPPED};
use rota_tests::on_mshv;
use rota_tests::payload;
use rota_tests::raw::{self, Outcome, bytes_of, bytes_of_mut};
use rota_tests::reg::{self};
use rota_tests::vm::{Device, EFAULT, EINVAL};

/// A good call, to be spoilt: `HvCallGetPartitionProperty`.
fn good(input: &hv_input_get_partition_property, output: &mut u64) -> mshv_root_hvcall {
    mshv_root_hvcall {
        code: HVCALL_GET_PARTITION_PROPERTY as u16,
        in_sz: size_of::<hv_input_get_partition_property>() as u16,
        out_sz: 8,
        in_ptr: std::ptr::from_ref(input) as u64,
        out_ptr: std::ptr::from_mut(output) as u64,
        ..Default::default()
    }
}

fn translate(guest: &Guest, gva: u64, flags: u32) -> (u32, u64) {
    let input = hv_input_translate_virtual_address {
        vp_index: 0,
        control_flags: u64::from(flags),
        gva_page: gva >> 12,
        ..Default::default()
    };
    let mut output = hv_output_translate_virtual_address::default();
    let outcome = raw::hypercall(
        guest.vp.fd(),
        HVCALL_TRANSLATE_VIRTUAL_ADDRESS,
        0,
        bytes_of(&input),
        bytes_of_mut(&mut output),
    );
    assert_eq!(
        (outcome.result, outcome.status),
        (Ok(()), 0),
        "HvCallTranslateVirtualAddress of {gva:#x}"
    );
    // SAFETY: every bit pattern of the union is valid as a number; the result code is its low half.
    let result = unsafe { output.translation_result.as_uint64 };
    (result as u32, output.gpa_page << 12)
}

/// Page tables of `Guest::long_mode` without any code to run.
fn paged(device: &Device) -> Guest {
    Guest::long_mode(device, &payload::DONE)
}

const PAGE_NOT_PRESENT: u32 = 1;
const PRIVILEGE_VIOLATION: u32 = 2;
const GPA_UNMAPPED: u32 = 4;

on_mshv! {
    fn arguments_are_checked(device) {
        let guest = Guest::reset(device, &payload::DONE);
        let code = hv_partition_property_code_HV_PARTITION_PROPERTY_PHYSICAL_ADDRESS_WIDTH;
        let input = hv_input_get_partition_property { property_code: code, ..Default::default() };
        let mut width = 0u64;
        let good = good(&input, &mut width);
        for fd in [guest.partition.fd(), guest.vp.fd()] {
            for (what, mut args) in [
                ("a status", mshv_root_hvcall { status: 1, ..good }),
                ("no input", mshv_root_hvcall { in_ptr: 0, ..good }),
                ("an input too short for a partition id", mshv_root_hvcall { in_sz: 7, ..good }),
                ("an input longer than a page", mshv_root_hvcall { in_sz: 4097, ..good }),
                ("a reserved byte", mshv_root_hvcall { rsvd: [0, 0, 0, 0, 0, 1], ..good }),
                ("an output of no size", mshv_root_hvcall { out_sz: 0, ..good }),
                ("an output longer than a page", mshv_root_hvcall { out_sz: 4097, ..good }),
            ] {
                assert_eq!(raw::ioctl(fd, raw::ROOT_HVCALL, &mut args), Err(EINVAL), "{what}");
            }
            for (what, mut args) in [
                ("an input nobody can read", mshv_root_hvcall { in_ptr: raw::forbidden_page(), ..good }),
                ("an output nobody can write", mshv_root_hvcall { out_ptr: raw::forbidden_page(), ..good }),
            ] {
                assert_eq!(raw::ioctl(fd, raw::ROOT_HVCALL, &mut args), Err(EFAULT), "{what}");
            }
            assert_eq!(raw::ioctl_value(fd, raw::ROOT_HVCALL, raw::forbidden_page()), Err(EFAULT), "arguments nobody can read");
            let mut args = good;
            raw::ioctl(fd, raw::ROOT_HVCALL, &mut args).expect("the good one");
        }
        assert!((32..=52).contains(&width), "and its output: {width}");
    }

    /// `mshv_passthru_hvcalls` and nothing else: creating, deleting and depositing are the kernel's.
    fn calls_off_the_allow_list_are_einval(device) {
        let guest = Guest::reset(device, &payload::DONE);
        for fd in [guest.partition.fd(), guest.vp.fd()] {
            for code in [0, 1, 0x40, 0x41, 0x42, 0x43, 0x48, 0x4B, 0x4C, 0x4E, 0x4F, 0x5C, 0x5D, 0xC2, 0x3FFF, 0xFFFF] {
                let outcome = raw::hypercall(fd, code, 0, &[0; 32], &mut []);
                assert_eq!(outcome, Outcome { result: Err(EINVAL), status: 0, reps: 0 }, "hypercall {code:#x}");
            }
        }
    }

    /// Asynchronous calls need the partition's lock, which the VP's descriptor does not hold.
    fn properties_are_not_set_through_a_vp(device) {
        let guest = Guest::reset(device, &payload::DONE);
        let code = hv_partition_property_code_HV_PARTITION_PROPERTY_UNIMPLEMENTED_MSR_ACTION;
        let input = hv_input_set_partition_property { property_code: code, property_value: 1, ..Default::default() };
        let outcome = raw::hypercall(guest.vp.fd(), HVCALL_SET_PARTITION_PROPERTY, 0, bytes_of(&input), &mut []);
        assert_eq!(outcome.result, Err(EINVAL));
        assert_eq!(guest.partition.set_property(code, 1).result, Ok(()), "but through the partition");
    }

    /// "Partition id field is populated by kernel": whatever the client writes there, it is its own partition.
    fn the_partition_id_is_not_the_clients_to_choose(device) {
        let guest = Guest::reset(device, &payload::DONE);
        guest.vp.set64(&[(reg::RBX, 0x1234)]);
        let names = reg::RBX.to_le_bytes();
        let input = [[0xFF; 8].as_slice(), &[0; 8], &names].concat();
        let mut output = [0u8; 16];
        let outcome = raw::hypercall(guest.vp.fd(), HVCALL_GET_VP_REGISTERS, 1, &input, &mut output);
        assert_eq!(outcome, Outcome { result: Ok(()), status: 0, reps: 1 });
        assert_eq!(u64::from_le_bytes(output[..8].try_into().unwrap()), 0x1234);
        assert_eq!(input[..8], [0xFF; 8], "and the client's input stays as it is");
    }

    fn a_vp_that_is_none_says_so(device) {
        let guest = Guest::reset(device, &payload::DONE);
        let input = [[0; 8].as_slice(), &7u32.to_le_bytes(), &[0; 4], &reg::RAX.to_le_bytes()].concat();
        let outcome = raw::hypercall(guest.partition.fd(), HVCALL_GET_VP_REGISTERS, 1, &input, &mut [0; 16]);
        assert_eq!((outcome.result, u32::from(outcome.status)), (Err(EINVAL), HV_STATUS_INVALID_VP_INDEX));
        assert_eq!(outcome.reps, 0);
    }

    /// A VP's descriptor gives the kernel the partition only: the index in the input may be another VP's.
    fn one_vps_descriptor_reads_another_vps_registers(device) {
        let guest = Guest::reset(device, &payload::DONE);
        let second = guest.partition.create_vp(1).expect("VP 1");
        second.set64(&[(reg::RBX, 0x4242)]);
        let (outcome, values) = second.get_on(guest.vp.fd(), &[reg::RBX]);
        assert_eq!(outcome.result, Ok(()));
        // SAFETY: every bit pattern is a number.
        assert_eq!(unsafe { values[0].reg64 }, 0x4242);
    }

    /// Without paging every address is its own.
    fn translation_without_paging(device) {
        let guest = Guest::real_mode(device, &payload::DONE);
        for gva in [0, 0x5000, 0x7_F000] {
            assert_eq!(translate(&guest, gva, HV_TRANSLATE_GVA_VALIDATE_READ), (0, gva));
        }
    }

    fn translation_with_paging(device) {
        let guest = paged(device);
        let read = HV_TRANSLATE_GVA_VALIDATE_READ;
        assert_eq!(translate(&guest, 0x40_0000, read), (0, 0x1000));
        assert_eq!(translate(&guest, 0x50_0000, read | HV_TRANSLATE_GVA_VALIDATE_WRITE), (0, 0x5000));
        let (result, gpa) = translate(&guest, 0x60_0000, read);
        assert!(result == 0 || result == GPA_UNMAPPED, "device memory: result {result}");
        assert_eq!(gpa, UNMAPPED);
    }

    fn translation_of_what_is_not_there(device) {
        let guest = paged(device);
        for gva in [0x40_1000, 0x70_0000, 0x4000_0000, 0x7F00_0000_0000] {
            assert_eq!(translate(&guest, gva, HV_TRANSLATE_GVA_VALIDATE_READ).0, PAGE_NOT_PRESENT, "{gva:#x}");
        }
    }

    /// The page at 0x603000 may be read and not written (`cr0.wp` is set).
    fn translation_validates_what_it_is_asked_to(device) {
        let guest = paged(device);
        assert_eq!(translate(&guest, 0x60_3000, HV_TRANSLATE_GVA_VALIDATE_READ), (0, 0x5000));
        assert_eq!(translate(&guest, 0x60_3000, HV_TRANSLATE_GVA_VALIDATE_WRITE).0, PRIVILEGE_VIOLATION);
    }

    fn the_crates_translation_falls_back_to_the_hypercall(_device) {
        let vm = mshv_ioctls::Mshv::new().expect("Mshv::new").create_vm().expect("create_vm");
        vm.initialize().expect("initialize");
        let memory = rota_tests::vm::Memory::new(0x8000);
        vm.map_user_memory(memory.region(0, rota_tests::vm::READ_WRITE_EXECUTE)).expect("map_user_memory");
        let vcpu = vm.create_vcpu(0).expect("create_vcpu");
        let (gpa, result) = vcpu.translate_gva(0x5123, u64::from(HV_TRANSLATE_GVA_VALIDATE_READ)).expect("translate_gva");
        // SAFETY: every bit pattern of the union is valid as a number.
        assert_eq!((gpa, unsafe { result.as_uint64 } as u32), (0x5123, 0));
    }
}
