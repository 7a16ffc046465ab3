//! Who keeps whom alive: descriptors closed in every order, duplicated, used after their end.

use std::os::fd::AsRawFd;

use mshv_bindings::*;
use rota_tests::guest::{Guest, UNMAPPED};
use rota_tests::message::Exit;
use rota_tests::on_mshv;
use rota_tests::payload::{self, code};
use rota_tests::raw::{self, eventfd, signal, take};
use rota_tests::reg::{self, segment};
use rota_tests::vm::{Device, EBADF, msi};

/// Descriptors of this process that point to something of mshv, in a child process of its own: this binary, one test.
fn open_descriptors() -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir("/proc/self/fd")
        .expect("/proc/self/fd")
        .filter_map(|entry| std::fs::read_link(entry.expect("an entry").path()).ok())
        .map(|path| path.display().to_string())
        .collect();
    names.sort();
    names
}

on_mshv! {
    /// `vp->vp_partition` is a reference: the partition stays until its last VP is closed.
    fn a_vp_outlives_its_partitions_descriptor(device) {
        let guest = Guest::real_mode(device, &code(&[&payload::MARK_1, &payload::DONE]));
        let Guest { vp, partition, ram } = guest;
        let fd = raw::high_duplicate(partition.fd());
        drop(partition);
        raw::close(fd);
        let exit = vp.run().expect("MSHV_RUN_VP after the partition's descriptor is closed");
        assert!(matches!(&exit, Exit::Port(port) if port.port == 0xF1), "{exit:x?}");
        vp.set64(&[(reg::RIP, 0x1002)]);
        let exit = vp.run().expect("and again");
        assert!(matches!(&exit, Exit::Port(port) if port.port == payload::DONE_PORT), "{exit:x?}");
        drop(ram);
    }

    /// `mshv_eventfd_release` runs when the partition's descriptor is closed, whatever else is open.
    fn eventfds_end_with_the_partitions_descriptor(device) {
        let guest = Guest::real_mode(device, &code(&[&payload::STORE_AX, &payload::DONE]));
        guest.vp.set(&[(reg::DS, segment(0xD000, UNMAPPED, 0xFFFF, 0x93))]);
        guest.vp.set64(&[(reg::RBX, 0)]);
        let (doorbell, interrupt) = (eventfd(), eventfd());
        let args = mshv_user_ioeventfd { addr: UNMAPPED, len: 2, fd: doorbell.as_raw_fd(), ..Default::default() };
        guest.partition.ioeventfd(args).expect("ioeventfd");
        guest.partition.route(&[msi(5, 0x40)]).expect("route");
        guest.partition.irqfd(interrupt.as_raw_fd(), 0, 5, 0).expect("irqfd");
        let Guest { vp, partition, ram } = guest;
        drop(partition);
        let exit = vp.run().expect("MSHV_RUN_VP");
        assert!(matches!(&exit, Exit::Memory(access) if access.gpa == UNMAPPED), "the write reaches the client: {exit:x?}");
        assert_eq!(take(&doorbell), 0);
        signal(&interrupt);
        std::thread::yield_now();
        assert_eq!(take(&interrupt), 1, "nobody takes the event any more");
        drop(ram);
    }

    fn the_device_may_be_closed_first(_device) {
        let device = Device::open().expect("open");
        let guest = Guest::real_mode(&device, &payload::DONE);
        drop(device);
        guest.expect_done();
    }

    fn a_duplicate_of_a_partition_is_the_partition(device) {
        let guest = Guest::real_mode(device, &payload::DONE);
        let duplicate = raw::high_duplicate(guest.partition.fd());
        let Guest { vp, partition, ram } = guest;
        drop(partition);
        let mut args = mshv_create_vp { vp_index: 1 };
        raw::close(raw::ioctl(duplicate, raw::CREATE_VP, &mut args).expect("CREATE_VP through the duplicate"));
        raw::close(duplicate);
        args.vp_index = 2;
        assert_eq!(raw::ioctl(duplicate, raw::CREATE_VP, &mut args), Err(EBADF));
        vp.run().expect("and the VP lives on");
        drop(ram);
    }

    fn a_duplicate_of_a_vp_is_the_vp(device) {
        let guest = Guest::real_mode(device, &code(&[&payload::MARK_1, &payload::DONE]));
        let duplicate = raw::high_duplicate(guest.vp.fd());
        guest.expect_mark(0xF1);
        let mut message = hv_message::default();
        raw::ioctl(duplicate, raw::RUN_VP, &mut message).expect("MSHV_RUN_VP through the duplicate");
        assert_eq!({ message.header.message_type }, hv_message_type_HVMSG_X64_IO_PORT_INTERCEPT);
        raw::close(duplicate);
        assert_eq!(raw::ioctl(duplicate, raw::RUN_VP, &mut message), Err(EBADF));
        assert_eq!(guest.vp.get64(reg::RIP), 0x1002);
    }

    /// `dup2` onto an mshv descriptor closes it: the number then means something else.
    fn a_number_taken_over_is_no_partition_any_more(device) {
        let number = raw::high_duplicate(device.partition().fd());
        let event = eventfd();
        // SAFETY: no pointer is involved; the number is this test's own.
        raw::checked(unsafe { libc::dup2(event.as_raw_fd(), number) }).expect("dup2");
        let answer = raw::ioctl_value(number, raw::INITIALIZE_PARTITION, 0);
        assert_eq!(answer, Err(raw::Errno(libc::ENOTTY)), "an eventfd knows no such ioctl");
        signal(&event);
        assert_eq!(take(&event), 1);
        raw::close(number);
    }

    fn a_number_closed_and_given_to_another_file_is_that_file(device) {
        let number = raw::high_duplicate(device.partition().fd());
        raw::close(number);
        let null = std::fs::File::open("/dev/null").expect("/dev/null");
        // SAFETY: no pointer is involved; the number is free.
        let again = raw::checked(unsafe { libc::fcntl(null.as_raw_fd(), libc::F_DUPFD_CLOEXEC, number) }).expect("F_DUPFD");
        assert_eq!(again, number);
        assert_eq!(raw::ioctl_value(number, raw::INITIALIZE_PARTITION, 0), Err(raw::Errno(libc::ENOTTY)));
        raw::close(number);
    }

    /// Memory stays the client's: it can be looked at after everything else is gone.
    fn memory_outlives_its_partition(device) {
        let guest = Guest::real_mode(device, &code(&[&payload::STORE_AX, &payload::DONE]));
        guest.vp.set64(&[(reg::RAX, 0xBEEF), (reg::RBX, 0x3000)]);
        guest.expect_done();
        let Guest { vp, partition, ram } = guest;
        drop((vp, partition));
        assert_eq!(ram.read(0x3000, 2), [0xEF, 0xBE]);
        let next = device.partition();
        next.map(&ram, 0, rota_tests::vm::READ_WRITE_EXECUTE).expect("and be another partition's");
    }

    fn a_partition_that_was_never_initialised_closes(device) {
        for _ in 0..16 {
            drop(device.create_partition().expect("create"));
        }
    }

    /// Forty guests one after the other: nothing of them remains in the process.
    fn guests_come_and_go_without_a_trace(device) {
        let count = |names: &[String]| names.iter().filter(|n| n.contains("mshv") || n.contains("kvm") || n.contains("memfd")).count();
        let cycle = || {
            let guest = Guest::real_mode(device, &payload::DONE);
            let event = eventfd();
            guest.partition.route(&[msi(5, 0x40)]).expect("route");
            guest.partition.irqfd(event.as_raw_fd(), 0, 5, 0).expect("irqfd");
            guest.expect_done();
        };
        // The other tests of this process open and close their own: several tries to see a quiet moment, one is enough.
        let mut seen = Vec::new();
        for _ in 0..5 {
            let before = count(&open_descriptors());
            for _ in 0..8 {
                cycle();
            }
            let after = count(&open_descriptors());
            seen.push((before, after));
            if after <= before {
                return;
            }
        }
        panic!("descriptors before and after eight guests: {seen:?}");
    }
}
