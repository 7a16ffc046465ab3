//! The IOAPIC from the driver's side, with the routes recorded.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    Route(u32, Option<Msi>),
    Assert(Msi, bool),
}

#[derive(Default)]
struct Recorder {
    calls: Mutex<Vec<Call>>,
    refuses: AtomicBool,
}

impl InterruptRoutes for Arc<Recorder> {
    fn set_route(&self, pin: u32, route: Option<Msi>) -> io::Result<()> {
        self.calls.lock().unwrap().push(Call::Route(pin, route));
        if self.refuses.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        Ok(())
    }

    fn assert(&self, msi: Msi, level: bool) {
        self.calls.lock().unwrap().push(Call::Assert(msi, level));
    }
}

impl Recorder {
    fn take(&self) -> Vec<Call> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }
}

const MASKED: u32 = 1 << 16;
const LEVEL: u32 = 1 << 15;
const REMOTE_IRR: u32 = 1 << 14;
const LOGICAL: u32 = 1 << 11;
const LOWEST: u32 = 1 << 8;

fn ioapic() -> (Arc<Recorder>, Ioapic<Arc<Recorder>>) {
    let recorder = Arc::new(Recorder::default());
    (recorder.clone(), Ioapic::new(recorder))
}

fn write(ioapic: &Ioapic<Arc<Recorder>>, index: u8, value: u32) {
    ioapic.write(SELECT, &u32::from(index).to_le_bytes());
    ioapic.write(WINDOW, &value.to_le_bytes());
}

fn read(ioapic: &Ioapic<Arc<Recorder>>, index: u8) -> u32 {
    ioapic.write(SELECT, &u32::from(index).to_le_bytes());
    let mut data = [0xaa; 4];
    ioapic.read(WINDOW, &mut data);
    u32::from_le_bytes(data)
}

fn low(pin: u8) -> u8 {
    FIRST_ENTRY + 2 * pin
}

fn high(pin: u8) -> u8 {
    low(pin) + 1
}

fn edge(vector: u32, destination: u64) -> Msi {
    Msi {
        address: 0xfee0_0000 | destination << 12,
        data: vector,
    }
}

fn level(vector: u32, destination: u64) -> Msi {
    Msi {
        data: vector | 0xc000,
        ..edge(vector, destination)
    }
}

#[test]
fn after_reset_all_pins_are_masked() {
    let (recorder, ioapic) = ioapic();
    assert_eq!(read(&ioapic, VERSION), 0x0007_0020);
    assert_eq!(read(&ioapic, ID), 0);
    for pin in 0..PINS as u8 {
        assert_eq!(read(&ioapic, low(pin)), MASKED);
        assert_eq!(read(&ioapic, high(pin)), 0);
    }
    assert_eq!(recorder.take(), []);
}

#[test]
fn set_up_as_linux_does_costs_one_route() {
    let (recorder, ioapic) = ioapic();
    // Masked entries come and go without a route.
    for pin in 0..PINS as u8 {
        write(&ioapic, high(pin), 0);
        write(&ioapic, low(pin), MASKED | 0x20);
        write(&ioapic, low(pin), MASKED);
    }
    write(&ioapic, high(4), 1 << 24);
    write(&ioapic, low(4), MASKED | 0x24);
    assert_eq!(recorder.take(), []);
    write(&ioapic, low(4), 0x24);
    assert_eq!(recorder.take(), [Call::Route(4, Some(edge(0x24, 1)))]);
}

#[test]
fn a_route_is_told_once() {
    let (recorder, ioapic) = ioapic();
    write(&ioapic, low(4), 0x24);
    write(&ioapic, low(4), 0x24);
    write(&ioapic, high(4), 0);
    // Polarity is not visible in the message.
    write(&ioapic, low(4), 0x24 | 1 << 13);
    assert_eq!(recorder.take(), [Call::Route(4, Some(edge(0x24, 0)))]);
    write(&ioapic, low(4), 0x24 | MASKED);
    write(&ioapic, low(4), 0x25 | MASKED);
    assert_eq!(recorder.take(), [Call::Route(4, None)]);
}

#[test]
fn a_refused_route_is_tried_again() {
    let (recorder, ioapic) = ioapic();
    recorder.refuses.store(true, Ordering::Relaxed);
    write(&ioapic, low(4), 0x24);
    recorder.refuses.store(false, Ordering::Relaxed);
    write(&ioapic, low(4), 0x24);
    write(&ioapic, low(4), 0x24);
    assert_eq!(recorder.take(), [Call::Route(4, Some(edge(0x24, 0))); 2]);
}

#[test]
fn destinations_and_modes_are_in_the_message() {
    let (recorder, ioapic) = ioapic();
    write(&ioapic, high(2), 0xff00_0000);
    write(&ioapic, low(2), 0xef | LOGICAL | LOWEST);
    let msi = Msi {
        address: 0xfeef_f00c,
        data: 0x1ef,
    };
    assert_eq!(recorder.take(), [Call::Route(2, Some(msi))]);
    write(&ioapic, low(3), 0x400);
    let nmi = Msi {
        address: 0xfee0_0000,
        data: 0x400,
    };
    assert_eq!(recorder.take(), [Call::Route(3, Some(nmi))]);
}

#[test]
fn an_edge_interrupts_once_and_not_while_masked() {
    let (recorder, ioapic) = ioapic();
    ioapic.set_line(4, true);
    ioapic.set_line(4, false);
    write(&ioapic, low(4), 0x24);
    recorder.take();
    ioapic.set_line(4, true);
    ioapic.set_line(4, true);
    ioapic.set_line(4, false);
    ioapic.set_line(4, true);
    assert_eq!(recorder.take(), [Call::Assert(edge(0x24, 0), true); 2]);
    ioapic.end_of_interrupt(0x24);
    assert_eq!(recorder.take(), []);
}

#[test]
fn a_level_interrupts_until_the_line_falls() {
    let (recorder, ioapic) = ioapic();
    ioapic.set_line(6, true);
    write(&ioapic, low(6), 0x29 | LEVEL);
    let sent = Call::Assert(level(0x29, 0), true);
    assert_eq!(
        recorder.take(),
        [Call::Route(6, Some(level(0x29, 0))), sent]
    );
    assert_eq!(read(&ioapic, low(6)), 0x29 | LEVEL | REMOTE_IRR);
    // Pending: neither the line nor another vector's end sends it again.
    ioapic.set_line(6, true);
    ioapic.end_of_interrupt(0x28);
    assert_eq!(recorder.take(), []);
    ioapic.end_of_interrupt(0x29);
    assert_eq!(recorder.take(), [sent]);
    ioapic.set_line(6, false);
    ioapic.write(EOI, &0x29u32.to_le_bytes());
    assert_eq!(recorder.take(), []);
    assert_eq!(read(&ioapic, low(6)), 0x29 | LEVEL);
}

#[test]
fn unmasking_delivers_a_level_that_waits() {
    let (recorder, ioapic) = ioapic();
    write(&ioapic, low(6), 0x29 | LEVEL | MASKED);
    ioapic.set_line(6, true);
    assert_eq!(recorder.take(), []);
    write(&ioapic, low(6), 0x29 | LEVEL);
    assert_eq!(recorder.take().len(), 2);
    // Masked, the interrupt in service still ends, but does not start again.
    write(&ioapic, low(6), 0x29 | LEVEL | MASKED);
    ioapic.end_of_interrupt(0x29);
    assert_eq!(recorder.take(), [Call::Route(6, None)]);
}

#[test]
fn read_only_bits_stay_and_going_to_edge_clears_remote_irr() {
    let (_recorder, ioapic) = ioapic();
    write(&ioapic, low(1), u32::MAX);
    write(&ioapic, high(1), u32::MAX);
    assert_eq!(read(&ioapic, low(1)), 0x0001_afff);
    assert_eq!(read(&ioapic, high(1)), 0xff00_0000);
    write(&ioapic, low(1), 0x31 | LEVEL);
    ioapic.set_line(1, true);
    write(&ioapic, low(1), 0x31 | LEVEL | MASKED);
    assert_eq!(read(&ioapic, low(1)), 0x31 | LEVEL | MASKED | REMOTE_IRR);
    write(&ioapic, low(1), 0x31 | MASKED);
    assert_eq!(read(&ioapic, low(1)), 0x31 | MASKED);
}

#[test]
fn every_index_answers() {
    let (recorder, ioapic) = ioapic();
    write(&ioapic, VERSION, 0);
    write(&ioapic, ID, u32::MAX);
    assert_eq!(read(&ioapic, ID), 0x0f00_0000);
    assert_eq!(read(&ioapic, ARBITRATION), 0x0f00_0000);
    for index in (3..FIRST_ENTRY).chain(LAST_ENTRY + 1..=0xff) {
        write(&ioapic, index, u32::MAX);
        assert_eq!(read(&ioapic, index), 0);
    }
    assert_eq!(read(&ioapic, VERSION), 0x0007_0020);
    assert_eq!(recorder.take(), []);
}

#[test]
fn odd_widths_and_offsets_do_no_harm() {
    let (_recorder, ioapic) = ioapic();
    for width in 0..=16 {
        for offset in [0, 1, 4, 0xf, 0x10, 0x11, 0x13, 0x40, 0xfff, u64::MAX] {
            let mut data = vec![0xaa; width];
            ioapic.read(offset, &mut data);
            ioapic.write(offset, &vec![0xff; width]);
        }
    }
    ioapic.write(SELECT, &[VERSION]);
    let mut data = [0xaa; 8];
    ioapic.read(WINDOW, &mut data);
    assert_eq!(data, [0x20, 0, 0x07, 0, 0, 0, 0, 0]);
    let mut byte = [0];
    ioapic.read(WINDOW, &mut byte);
    assert_eq!(byte, [0x20]);
    ioapic.set_line(PINS, true);
    ioapic.set_line(u32::MAX, true);
}
