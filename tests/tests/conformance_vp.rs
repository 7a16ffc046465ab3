//! VPs: creation, their ioctls, their pages (`mshv_partition_ioctl_create_vp`, `mshv_vp_ioctl`, `mshv_vp_mmap`).

use mshv_bindings::*;
use rota_tests::guest::Guest;
use rota_tests::message::Exit;
use rota_tests::on_mshv;
use rota_tests::payload;
use rota_tests::raw::{self, Errno};
use rota_tests::reg::{self};
use rota_tests::vm::{EFAULT, EINVAL, ENOTTY, Memory, Vp};

on_mshv! {
    fn indices_need_not_come_in_order(device) {
        let partition = device.partition();
        for index in [0, 3, 1] {
            partition.create_vp(index).unwrap_or_else(|e| panic!("VP {index}: {e:?}"));
        }
    }

    fn an_index_twice_is_eexist(device) {
        let partition = device.partition();
        let vp = partition.create_vp(0).expect("first");
        assert_eq!(partition.create_vp(0).map(drop), Err(Errno(libc::EEXIST)));
        drop(vp);
        // The VP is the partition's, not the descriptor's: `pt_vp_array` keeps it until the partition ends.
        assert_eq!(partition.create_vp(0).map(drop), Err(Errno(libc::EEXIST)), "also when its descriptor is closed");
    }

    /// `MSHV_MAX_VPS` is 256.
    fn an_index_beyond_the_last_is_einval(device) {
        let partition = device.partition();
        for index in [256, 257, u32::MAX] {
            assert_eq!(partition.create_vp(index).map(drop), Err(EINVAL), "VP {index}");
        }
    }

    fn many_vps_in_one_partition(device) {
        let partition = device.partition();
        let vps: Vec<Vp> = (0..16).map(|index| partition.create_vp(index).expect("VP")).collect();
        for vp in &vps {
            assert_eq!(vp.get64(reg::RFLAGS), 2, "VP {}", vp.index);
            vp.set64(&[(reg::RBX, 0x1000 + u64::from(vp.index))]);
        }
        for vp in &vps {
            assert_eq!(vp.get64(reg::RBX), 0x1000 + u64::from(vp.index), "each has its own registers");
        }
    }

    fn a_vp_descriptor_closes_on_exec(device) {
        let guest = Guest::reset(device, &payload::DONE);
        // SAFETY: no pointer is involved.
        assert_eq!(unsafe { libc::fcntl(guest.vp.fd(), libc::F_GETFD) }, libc::FD_CLOEXEC);
    }

    fn unknown_ioctls_are_enotty(device) {
        let guest = Guest::reset(device, &payload::DONE);
        let mut buffer = [0u8; 256];
        // 0xF2 is not among them: newer out-of-tree drivers translate addresses there.
        for number in [0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xF6, 0x42] {
            assert_eq!(raw::ioctl(guest.vp.fd(), raw::request(3, number, 16), &mut buffer), Err(ENOTTY), "number {number:#x}");
        }
        for (what, request) in [
            ("a partition's CREATE_VP", raw::CREATE_VP),
            ("RUN_VP with half a message", raw::request(2, 0, 128)),
            ("KVM_RUN", 0xAE80),
        ] {
            assert_eq!(raw::ioctl(guest.vp.fd(), request, &mut buffer), Err(ENOTTY), "{what}");
        }
    }

    /// `copy_to_user` of the message fails after the VP has run.
    fn a_bad_message_buffer_is_efault(device) {
        let guest = Guest::real_mode(device, &payload::DONE);
        assert_eq!(raw::ioctl_value(guest.vp.fd(), raw::RUN_VP, raw::forbidden_page()), Err(EFAULT));
        let exit = guest.run();
        assert!(matches!(&exit, Exit::Port(port) if port.port == payload::DONE_PORT), "the guest is unharmed: {exit:x?}");
    }

    /// The same buffer is good for one run and gone at the next: each call is judged by itself.
    fn a_message_buffer_that_went_away_is_efault(device) {
        let guest = Guest::real_mode(device, &payload::DONE);
        let buffer = Memory::new(0x1000);
        let address = buffer.region(0, 0).userspace_addr;
        raw::ioctl_value(guest.vp.fd(), raw::RUN_VP, address).expect("MSHV_RUN_VP");
        buffer.forbid();
        assert_eq!(raw::ioctl_value(guest.vp.fd(), raw::RUN_VP, address), Err(EFAULT));
    }

    fn the_message_names_its_vp_and_has_a_plausible_size(device) {
        let guest = Guest::real_mode(device, &payload::DONE);
        let mut message = hv_message::default();
        raw::ioctl(guest.vp.fd(), raw::RUN_VP, &mut message).expect("MSHV_RUN_VP");
        assert_eq!({ message.header.message_type }, hv_message_type_HVMSG_X64_IO_PORT_INTERCEPT);
        let size = usize::from(message.header.payload_size);
        assert!(size >= size_of::<hv_x64_io_port_intercept_message>() && size <= 240, "payload of {size} bytes");
        assert_eq!(message.header.reserved, [0, 0]);
    }

    fn the_intercept_page_shows_the_same_message(device) {
        let guest = Guest::real_mode(device, &payload::DONE);
        let page = guest.vp.map_page(i64::from(MSHV_VP_MMAP_OFFSET_INTERCEPT_MESSAGE)).expect("mmap of the message page");
        let mut message = hv_message::default();
        raw::ioctl(guest.vp.fd(), raw::RUN_VP, &mut message).expect("MSHV_RUN_VP");
        // SAFETY: a page mapped by the call above, larger than a message; the VP is stopped.
        let mapped: hv_message = unsafe { page.0.cast::<hv_message>().read_volatile() };
        assert_eq!(raw::bytes_of(&mapped), raw::bytes_of(&message));
    }

    fn pages_that_are_none(device) {
        let guest = Guest::reset(device, &payload::DONE);
        assert_eq!(guest.vp.map_page(2).map(drop), Err(Errno(libc::ENODEV)), "no GHCB without encryption");
        for index in [3, 4, 1000] {
            assert_eq!(guest.vp.map_page(index).map(drop), Err(EINVAL), "page {index}");
        }
    }

    fn the_crates_client_runs_too(_device) {
        let vm = mshv_ioctls::Mshv::new().expect("Mshv::new").create_vm().expect("create_vm");
        vm.initialize().expect("initialize");
        let memory = Memory::new(0x1000);
        memory.write(0, &payload::DONE);
        vm.map_user_memory(memory.region(0x1000, rota_tests::vm::READ_WRITE_EXECUTE)).expect("map_user_memory");
        let vcpu = vm.create_vcpu(0).expect("create_vcpu");
        let mut sregs = vcpu.get_sregs().expect("get_sregs");
        sregs.cs.base = 0;
        sregs.cs.selector = 0;
        vcpu.set_sregs(&sregs).expect("set_sregs");
        let mut regs = vcpu.get_regs().expect("get_regs");
        regs.rip = 0x1000;
        regs.rflags = 2;
        vcpu.set_regs(&regs).expect("set_regs");
        let message = vcpu.run().expect("run");
        let port = message.to_ioport_info().expect("a port message");
        assert_eq!({ port.port_number }, payload::DONE_PORT);
        assert_eq!(vcpu.get_regs().expect("get_regs").rip, 0x1000);
    }
}
