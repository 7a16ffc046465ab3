//! Interrupts the client asserts, halting and waking, end of interrupt (`HvCallAssertVirtualInterrupt`, `HVMSG_X64_APIC_EOI`).

use std::sync::mpsc;
use std::time::Duration;

use mshv_bindings::*;
use rota_tests::guest::{CODE, Guest};
use rota_tests::message::Exit;
use rota_tests::on_mshv;
use rota_tests::payload::{self, code};
use rota_tests::reg::{self};
use rota_tests::vm::Device;

const FIXED: u32 = hv_interrupt_type_HV_X64_INTERRUPT_TYPE_FIXED;
const VECTOR: u8 = 0x40;

/// A guest with its APIC on and a handler at `VECTOR`, stopped at its first mark and about to run `rest`.
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

fn assert_vector(guest: &Guest, vector: u8, level: bool) {
    let outcome = guest
        .partition
        .assert_interrupt(FIXED, 0, u32::from(vector), level);
    assert_eq!(
        (outcome.result, outcome.status),
        (Ok(()), 0),
        "HvCallAssertVirtualInterrupt"
    );
}

on_mshv! {
    fn an_interrupt_waits_until_the_guest_takes_it(device) {
        let guest = ready(device, &code(&[&payload::MARK_2, &payload::STI_NOP]));
        assert_vector(&guest, VECTOR, false);
        guest.expect_mark(0xF2);
        guest.expect_mark(0xF1);
        guest.expect_done();
    }

    fn each_edge_is_taken_once(device) {
        let guest = ready(device, &code(&[&payload::STI_NOP, &payload::MARK_2, &payload::MARK_2]));
        assert_vector(&guest, VECTOR, false);
        guest.expect_mark(0xF1);
        guest.expect_mark(0xF2);
        assert_vector(&guest, VECTOR, false);
        guest.expect_mark(0xF1);
        guest.expect_mark(0xF2);
        guest.expect_done();
    }

    fn the_higher_vector_comes_first(device) {
        let guest = ready(device, &payload::STI_NOP);
        guest.handler(0x80, &code(&[&payload::MARK_2, &payload::lapic_write(0xB0, 0), &payload::IRET]));
        assert_vector(&guest, VECTOR, false);
        assert_vector(&guest, 0x80, false);
        guest.expect_mark(0xF2);
        guest.expect_mark(0xF1);
        guest.expect_done();
    }

    fn a_halted_guest_with_a_pending_interrupt_does_not_halt(device) {
        let guest = ready(device, &payload::STI_HLT);
        assert_vector(&guest, VECTOR, false);
        guest.expect_mark(0xF1);
        guest.expect_done();
    }

    /// With a local APIC the hypervisor keeps a halted VP to itself: `MSHV_RUN_VP` sleeps until an interrupt wakes the guest.
    fn an_interrupt_wakes_a_halted_guest(device) {
        let guest = ready(device, &payload::STI_HLT);
        let (sender, receiver) = mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| sender.send(guest.try_run()).unwrap());
            // The guest has nothing to say while it halts: nothing may come.
            let early = receiver.recv_timeout(Duration::from_millis(100));
            assert_eq!(early, Err(mpsc::RecvTimeoutError::Timeout), "a halted guest says nothing");
            assert_vector(&guest, VECTOR, false);
            let exit = receiver.recv_timeout(Duration::from_secs(10)).expect("the guest wakes").expect("MSHV_RUN_VP");
            assert!(matches!(&exit, Exit::Port(port) if port.port == 0xF1), "its handler runs: {exit:x?}");
        });
        guest.resume_at(payload_rip(&guest));
        guest.expect_done();
    }

    /// A level interrupt's end reaches the client, after the write that ended it.
    fn the_end_of_a_level_interrupt_is_a_message(device) {
        let guest = ready(device, &payload::STI_NOP);
        assert_vector(&guest, VECTOR, true);
        guest.expect_mark(0xF1);
        let exit = guest.run();
        assert_eq!(exit, Exit::ApicEoi(0, u32::from(VECTOR)));
        guest.expect_done();
    }

    fn the_end_of_an_edge_interrupt_is_not(device) {
        let guest = ready(device, &payload::STI_NOP);
        assert_vector(&guest, VECTOR, false);
        guest.expect_mark(0xF1);
        guest.expect_done();
    }

    fn a_level_interrupt_comes_again_when_asserted_again(device) {
        let guest = ready(device, &code(&[&payload::STI_NOP, &payload::MARK_2]));
        for _ in 0..3 {
            assert_vector(&guest, VECTOR, true);
            guest.expect_mark(0xF1);
            assert_eq!(guest.run(), Exit::ApicEoi(0, u32::from(VECTOR)));
        }
        guest.expect_mark(0xF2);
        guest.expect_done();
    }

    fn nmi_needs_no_flag(device) {
        let guest = ready(device, &payload::MARK_2);
        guest.handler(2, &code(&[&payload::MARK_1, &payload::IRET]));
        let outcome = guest.partition.assert_interrupt(hv_interrupt_type_HV_X64_INTERRUPT_TYPE_NMI, 0, 0, false);
        assert_eq!(outcome.result, Ok(()));
        guest.expect_mark(0xF1);
        guest.expect_mark(0xF2);
        guest.expect_done();
    }

    /// The APIC timer is the hypervisor's: the guest programs it and is interrupted, and the client hears nothing of either.
    fn the_apic_timer_ticks_without_the_client(device) {
        let timer = code(&[
            &payload::lapic_write(0x3E0, 0xB),               // divide by one
            &payload::lapic_write(0x320, u32::from(VECTOR)), // one shot
            &payload::lapic_write(0x380, 1000),              // initial count
            &payload::STI_HLT,
        ]);
        let guest = ready(device, &timer);
        guest.expect_mark(0xF1);
        guest.expect_done();
    }

    /// The boot processor starts another one with INIT and SIPI through its local APIC; the client sees neither.
    fn a_guest_starts_its_second_processor(device) {
        let start = code(&[
            &payload::lapic_write(0x310, 0x0100_0000), // to APIC id 1
            &payload::lapic_write(0x300, 0x0000_4500), // INIT
            &payload::lapic_write(0x300, 0x0000_4603), // SIPI, page 3
        ]);
        let guest = ready(device, &start);
        guest.ram.write(0x3000, &code(&[&payload::MARK_1, &payload::HLT]));
        let second = guest.partition.create_vp(1).expect("VP 1");
        std::thread::scope(|scope| {
            let other = scope.spawn(|| second.run().expect("MSHV_RUN_VP on VP 1"));
            guest.expect_done();
            let exit = other.join().unwrap();
            let Exit::Port(port) = exit else { panic!("VP 1 says {exit:x?}") };
            assert_eq!((port.port, port.header.vp, port.header.cs_base, port.header.rip), (0xF1, 1, 0x3000, 0));
        });
    }

    fn vectors_that_are_none_are_refused(device) {
        let guest = ready(device, &[]);
        let outcome = guest.partition.assert_interrupt(FIXED, 0, 0x100, false);
        assert!(outcome.result.is_err() && outcome.status != 0, "vector 256: {outcome:?}");
        let outcome = guest.partition.assert_interrupt(hv_interrupt_type_HV_X64_INTERRUPT_TYPE_MAXIMUM, 0, 0x40, false);
        assert!(outcome.result.is_err() && outcome.status != 0, "an interrupt type that is none: {outcome:?}");
    }
}

/// Behind the two-byte `out` at which the guest is stopped.
fn payload_rip(guest: &Guest) -> u64 {
    let rip = guest.vp.get64(reg::RIP);
    assert!(rip > CODE);
    rip + 2
}
