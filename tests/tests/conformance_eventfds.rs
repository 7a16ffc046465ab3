//! irqfds, routes and ioeventfds (`mshv_eventfd.c`, `mshv_irq.c`): events that cross between guest and host without the client.

use std::os::fd::AsRawFd;

use mshv_bindings::*;
use rota_tests::guest::{Guest, UNMAPPED};
use rota_tests::message::Exit;
use rota_tests::on_mshv;
use rota_tests::payload::{self, code};
use rota_tests::raw::{self, Errno, eventfd, signal, take, wait};
use rota_tests::reg::{self, segment};
use rota_tests::vm::{Device, EBADF, EINVAL, msi};

const VECTOR: u8 = 0x40;
const DEASSIGN: u32 = 1 << MSHV_IRQFD_BIT_DEASSIGN;
const RESAMPLE: u32 = 1 << MSHV_IRQFD_BIT_RESAMPLE;
const IO_DATAMATCH: u32 = 1 << MSHV_IOEVENTFD_BIT_DATAMATCH;
const IO_PIO: u32 = 1 << MSHV_IOEVENTFD_BIT_PIO;
const IO_DEASSIGN: u32 = 1 << MSHV_IOEVENTFD_BIT_DEASSIGN;

/// A guest with its APIC on and a handler at `VECTOR`, stopped before `rest`.
fn ready(device: &Device, rest: &[u8]) -> Guest {
    let guest = Guest::real_mode(
        device,
        &code(&[
            &payload::lapic_enable(),
            &payload::MARK_2,
            rest,
            &payload::DONE,
        ]),
    );
    guest.handler(VECTOR, &payload::handler());
    guest.expect_mark(0xF2);
    guest
}

/// A guest about to execute `program` with DS on the unmapped page, BX 0 and AX `value`.
fn doorbell(device: &Device, program: &[u8], value: u64) -> Guest {
    let guest = Guest::real_mode(device, &code(&[program, &payload::DONE]));
    guest
        .vp
        .set(&[(reg::DS, segment(0xD000, UNMAPPED, 0xFFFF, 0x93))]);
    guest.vp.set64(&[(reg::RBX, 0), (reg::RAX, value)]);
    guest
}

fn ioeventfd(fd: &impl AsRawFd, len: u32, flags: u32, datamatch: u64) -> mshv_user_ioeventfd {
    mshv_user_ioeventfd {
        datamatch,
        addr: UNMAPPED,
        len,
        fd: fd.as_raw_fd(),
        flags,
        rsvd: [0; 4],
    }
}

on_mshv! {
    fn an_irqfd_interrupts_the_guest(device) {
        let guest = ready(device, &payload::STI_NOP);
        let event = eventfd();
        guest.partition.route(&[msi(5, u32::from(VECTOR))]).expect("route");
        guest.partition.irqfd(event.as_raw_fd(), 0, 5, 0).expect("irqfd");
        signal(&event);
        guest.expect_mark(0xF1);
        guest.expect_done();
        assert_eq!(take(&event), 0, "the device took the event");
    }

    fn an_irqfd_wakes_a_halted_guest(device) {
        let guest = ready(device, &payload::STI_HLT);
        let event = eventfd();
        guest.partition.route(&[msi(5, u32::from(VECTOR))]).expect("route");
        guest.partition.irqfd(event.as_raw_fd(), 0, 5, 0).expect("irqfd");
        std::thread::scope(|scope| {
            let run = scope.spawn(|| guest.run_to_port());
            // Whether the guest halts already makes no difference to what must come; this makes it likely.
            std::thread::sleep(std::time::Duration::from_millis(50));
            signal(&event);
            assert_eq!(run.join().expect("the VP's thread").port, 0xF1);
        });
    }

    /// "Check if there was an event already pending … and trigger it as if we didn't miss it."
    fn an_event_from_before_the_assignment_counts(device) {
        let guest = ready(device, &payload::STI_NOP);
        let event = eventfd();
        signal(&event);
        guest.partition.route(&[msi(5, u32::from(VECTOR))]).expect("route");
        guest.partition.irqfd(event.as_raw_fd(), 0, 5, 0).expect("irqfd");
        guest.expect_mark(0xF1);
        guest.expect_done();
    }

    fn a_route_set_after_the_irqfd_is_used(device) {
        let guest = ready(device, &payload::STI_NOP);
        let event = eventfd();
        guest.partition.irqfd(event.as_raw_fd(), 0, 5, 0).expect("irqfd without a route");
        guest.partition.route(&[msi(5, u32::from(VECTOR))]).expect("route");
        signal(&event);
        guest.expect_mark(0xF1);
        guest.expect_done();
    }

    fn a_changed_route_is_used(device) {
        let guest = ready(device, &payload::STI_NOP);
        guest.handler(0x60, &code(&[&payload::MARK_2, &payload::lapic_write(0xB0, 0), &payload::IRET]));
        let event = eventfd();
        guest.partition.route(&[msi(5, u32::from(VECTOR))]).expect("route");
        guest.partition.irqfd(event.as_raw_fd(), 0, 5, 0).expect("irqfd");
        guest.partition.route(&[msi(5, 0x60)]).expect("another route");
        signal(&event);
        guest.expect_mark(0xF2);
        guest.expect_done();
    }

    fn an_event_without_a_route_is_taken_and_lost(device) {
        let guest = ready(device, &payload::STI_NOP);
        let event = eventfd();
        guest.partition.route(&[msi(5, u32::from(VECTOR))]).expect("route");
        guest.partition.irqfd(event.as_raw_fd(), 0, 5, 0).expect("irqfd");
        guest.partition.route(&[]).expect("an empty table");
        signal(&event);
        guest.expect_done();
    }

    /// After `DEASSIGN` nobody takes the event any more; a second `DEASSIGN` matches nothing and is no error.
    fn a_deassigned_irqfd_is_an_eventfd_again(device) {
        let guest = ready(device, &payload::STI_NOP);
        let event = eventfd();
        guest.partition.route(&[msi(5, u32::from(VECTOR))]).expect("route");
        guest.partition.irqfd(event.as_raw_fd(), 0, 5, 0).expect("assign");
        guest.partition.irqfd(event.as_raw_fd(), 0, 5, DEASSIGN).expect("deassign");
        signal(&event);
        guest.expect_done();
        assert_eq!(take(&event), 1);
        guest.partition.irqfd(event.as_raw_fd(), 0, 5, DEASSIGN).expect("a second time");
        guest.partition.irqfd(event.as_raw_fd(), 0, 5, 0).expect("and assign again");
    }

    fn irqfd_arguments_are_checked(device) {
        let guest = ready(device, &[]);
        let (partition, event, other) = (&guest.partition, eventfd(), eventfd());
        partition.route(&[msi(5, u32::from(VECTOR)), msi(6, 0x41)]).expect("route");
        let fd = event.as_raw_fd();
        let closed = raw::high_duplicate(fd);
        raw::close(closed);
        assert_eq!(partition.irqfd(fd, 0, 5, 4), Err(EINVAL), "an unknown flag");
        assert_eq!(partition.irqfd(closed, 0, 5, 0), Err(EBADF), "a closed descriptor");
        assert_eq!(partition.irqfd(-1, 0, 5, 0), Err(EBADF), "no descriptor");
        assert_eq!(partition.irqfd(partition.fd(), 0, 5, 0), Err(EINVAL), "a descriptor that is no eventfd");
        assert_eq!(partition.irqfd(closed, 0, 5, DEASSIGN), Err(EBADF), "a closed descriptor, deassigned");
        assert_eq!(partition.irqfd(fd, closed, 5, RESAMPLE), Err(EBADF), "a closed resample descriptor");
        assert_eq!(partition.irqfd(fd, other.as_raw_fd(), 5, RESAMPLE), Err(EINVAL), "resample of an edge");
        partition.irqfd(fd, 0, 5, 0).expect("after all those the eventfd is free");
        assert_eq!(partition.irqfd(fd, 0, 6, 0), Err(Errno(libc::EBUSY)), "one eventfd, one interrupt");
        partition.irqfd(other.as_raw_fd(), 0, 5, 0).expect("one interrupt, two eventfds");
    }

    /// The driver looks for the acknowledged GSI by the vector of the EOI message, so both are one number here.
    fn a_resampled_irqfd_reports_the_end_to_its_eventfd(device) {
        let guest = ready(device, &payload::STI_NOP);
        let (event, resample) = (eventfd(), eventfd());
        let mut route = msi(u32::from(VECTOR), u32::from(VECTOR));
        route.data |= 1 << 15;
        guest.partition.route(&[route]).expect("a level route");
        guest.partition.irqfd(event.as_raw_fd(), resample.as_raw_fd(), u32::from(VECTOR), RESAMPLE).expect("irqfd");
        signal(&event);
        guest.expect_mark(0xF1);
        assert_eq!(take(&resample), 0, "not before the guest says so");
        guest.expect_done();
        assert!(wait(&resample, 5000), "the end of interrupt is told");
        assert_eq!(take(&resample), 1, "once");
    }

    /// Level triggered without a resampler: the client is told as it is of its own level interrupts.
    fn a_level_irqfd_without_resampler_ends_in_a_message(device) {
        let guest = ready(device, &payload::STI_NOP);
        let event = eventfd();
        let mut route = msi(5, u32::from(VECTOR));
        route.data |= 1 << 15;
        guest.partition.route(&[route]).expect("a level route");
        guest.partition.irqfd(event.as_raw_fd(), 0, 5, 0).expect("irqfd");
        signal(&event);
        guest.expect_mark(0xF1);
        assert_eq!(guest.run(), Exit::ApicEoi(0, u32::from(VECTOR)));
        guest.expect_done();
    }

    /// `mshv_update_routing_table`: `MSHV_MAX_GUEST_IRQS` is 4096.
    fn routes_are_checked(device) {
        let partition = device.partition();
        partition.route(&[]).expect("none");
        partition.route(&[msi(0, 0x30), msi(4095, 0x31)]).expect("the first and the last");
        assert_eq!(partition.route(&[msi(4096, 0x30)]), Err(EINVAL), "a GSI beyond the last");
        assert_eq!(partition.route(&[msi(1, 0x30), msi(1, 0x31)]), Err(EINVAL), "a GSI twice");
        let high = mshv_user_irq_entry { address_hi: 1, ..msi(1, 0x30) };
        assert_eq!(partition.route(&[high]), Err(EINVAL), "an address above 4 GiB");
        let many: Vec<_> = (0..4097).map(|gsi| msi(gsi % 4096, 0x30)).collect();
        assert_eq!(partition.route(&many), Err(EINVAL), "more entries than GSIs");
        partition.route(&many[..4096]).expect("as many as GSIs");
        let mut reserved = [0u32, 1];
        assert_eq!(raw::ioctl(partition.fd(), raw::SET_MSI_ROUTING, &mut reserved), Err(EINVAL), "a reserved word");
    }

    fn an_ioeventfd_takes_the_write_from_the_client(device) {
        for (instruction, len) in [(payload::STORE_AL.as_slice(), 1), (&payload::STORE_AX, 2), (&payload::STORE_EAX, 4)] {
            let guest = doorbell(device, instruction, 0x1234_5678);
            let event = eventfd();
            guest.partition.ioeventfd(ioeventfd(&event, len, 0, 0)).expect("ioeventfd");
            guest.expect_done();
            assert!(wait(&event, 5000), "length {len}");
            assert_eq!(take(&event), 1);
        }
    }

    fn an_ioeventfd_of_no_length_takes_every_length(device) {
        let guest = doorbell(device, &code(&[&payload::STORE_AL, &payload::STORE_AX, &payload::STORE_EAX]), 1);
        let event = eventfd();
        guest.partition.ioeventfd(ioeventfd(&event, 0, 0, 0)).expect("ioeventfd");
        guest.expect_done();
        let mut count = 0;
        while count < 3 && wait(&event, 5000) {
            count += take(&event);
        }
        assert_eq!(count, 3);
    }

    fn another_length_or_a_read_is_not_its_business(device) {
        for instruction in [payload::STORE_AL.as_slice(), &payload::STORE_EAX, &payload::LOAD_AX] {
            let guest = doorbell(device, instruction, 1);
            let event = eventfd();
            guest.partition.ioeventfd(ioeventfd(&event, 2, 0, 0)).expect("ioeventfd");
            let access = guest.run_to_memory();
            assert_eq!((access.gpa, take(&event)), (UNMAPPED, 0), "{instruction:x?}");
        }
    }

    fn the_next_address_is_not_its_business(device) {
        let guest = doorbell(device, &payload::STORE_AX, 1);
        guest.vp.set64(&[(reg::RBX, 2)]);
        let event = eventfd();
        guest.partition.ioeventfd(ioeventfd(&event, 2, 0, 0)).expect("ioeventfd");
        assert_eq!((guest.run_to_memory().gpa, take(&event)), (UNMAPPED + 2, 0));
    }

    fn data_must_match_where_it_is_asked_to(device) {
        for (value, matches) in [(0x21, true), (0x22, false)] {
            let guest = doorbell(device, &payload::STORE_AX, value);
            let event = eventfd();
            guest.partition.ioeventfd(ioeventfd(&event, 2, IO_DATAMATCH, 0x21)).expect("ioeventfd");
            if matches {
                guest.expect_done();
                assert!(wait(&event, 5000));
            } else {
                assert_eq!(guest.run_to_memory().gpa, UNMAPPED);
                assert_eq!(take(&event), 0);
            }
        }
    }

    fn each_value_may_have_its_own(device) {
        let guest = doorbell(device, &code(&[&payload::STORE_AX, &payload::DONE, &payload::STORE_AX]), 2);
        let (one, two) = (eventfd(), eventfd());
        guest.partition.ioeventfd(ioeventfd(&one, 2, IO_DATAMATCH, 1)).expect("for 1");
        guest.partition.ioeventfd(ioeventfd(&two, 2, IO_DATAMATCH, 2)).expect("for 2");
        guest.expect_done();
        assert!(wait(&two, 5000));
        assert_eq!(take(&one), 0);
        guest.vp.set64(&[(reg::RAX, 1)]);
        guest.expect_done();
        assert!(wait(&one, 5000));
    }

    fn a_deassigned_ioeventfd_lets_the_write_through(device) {
        let guest = doorbell(device, &payload::STORE_AX, 1);
        let event = eventfd();
        guest.partition.ioeventfd(ioeventfd(&event, 2, 0, 0)).expect("assign");
        guest.partition.ioeventfd(ioeventfd(&event, 2, IO_DEASSIGN, 0)).expect("deassign");
        assert_eq!(guest.run_to_memory().gpa, UNMAPPED);
    }

    fn ioeventfd_arguments_are_checked(device) {
        let partition = device.partition();
        let (event, other) = (eventfd(), eventfd());
        let good = ioeventfd(&event, 2, 0, 0);
        let closed = raw::high_duplicate(event.as_raw_fd());
        raw::close(closed);
        for (what, args, error) in [
            ("an unknown flag", mshv_user_ioeventfd { flags: 8, ..good }, EINVAL),
            ("a reserved byte", mshv_user_ioeventfd { rsvd: [0, 0, 0, 1], ..good }, EINVAL),
            ("a length of three", mshv_user_ioeventfd { len: 3, ..good }, EINVAL),
            ("a length of sixteen", mshv_user_ioeventfd { len: 16, ..good }, EINVAL),
            ("an address at the end of the world", mshv_user_ioeventfd { addr: u64::MAX, ..good }, EINVAL),
            ("a port: \"PIO not yet implemented\"", mshv_user_ioeventfd { flags: IO_PIO, ..good }, Errno(libc::EOPNOTSUPP)),
            ("a closed descriptor", mshv_user_ioeventfd { fd: closed, ..good }, EBADF),
            ("a descriptor that is no eventfd", mshv_user_ioeventfd { fd: partition.fd(), ..good }, EINVAL),
            ("the removal of nothing", mshv_user_ioeventfd { flags: IO_DEASSIGN, ..good }, Errno(libc::ENOENT)),
        ] {
            assert_eq!(partition.ioeventfd(args), Err(error), "{what}");
        }
        partition.ioeventfd(good).expect("assign");
        let exists = Errno(libc::EEXIST);
        assert_eq!(partition.ioeventfd(ioeventfd(&other, 2, 0, 0)), Err(exists), "the same place");
        assert_eq!(partition.ioeventfd(ioeventfd(&other, 2, IO_DATAMATCH, 7)), Err(exists), "a value beside any value");
        partition.ioeventfd(ioeventfd(&other, 4, 0, 0)).expect("another length");
        for (what, args) in [
            ("another eventfd", ioeventfd(&other, 2, IO_DEASSIGN, 0)),
            ("another length", ioeventfd(&event, 1, IO_DEASSIGN, 0)),
            ("a value that was none", ioeventfd(&event, 2, IO_DEASSIGN | IO_DATAMATCH, 0)),
        ] {
            assert_eq!(partition.ioeventfd(args), Err(Errno(libc::ENOENT)), "removal by {what}");
        }
        partition.ioeventfd(ioeventfd(&event, 2, IO_DEASSIGN, 0)).expect("deassign");
    }
}
