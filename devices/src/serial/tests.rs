//! The port from the driver's and from the console's side.

use std::sync::mpsc::{Receiver, Sender as Channel, channel};
use std::time::Instant;

use super::*;

const DATA: u64 = 0;
const IER: u64 = 1;
const IIR: u64 = 2;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;

const LONG: Duration = Duration::from_secs(10);

/// A sink that hands over each write as it comes.
struct Writes(Channel<Vec<u8>>);

impl Write for Writes {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0
            .send(bytes.to_vec())
            .map_err(|_| io::ErrorKind::BrokenPipe)?;
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn serial() -> (Serial, EventFd, Receiver<Vec<u8>>) {
    let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
    let (writes, received) = channel();
    let line = interrupt.try_clone().unwrap();
    let serial = Serial::new(move || line.write(1), Box::new(Writes(writes))).unwrap();
    (serial, interrupt, received)
}

fn read(serial: &Serial, register: u64) -> u8 {
    let mut data = [0];
    serial.read(register, &mut data);
    data[0]
}

#[test]
fn a_prompt_appears_without_a_newline() {
    let (serial, _, writes) = serial();
    for byte in b"login: " {
        serial.write(DATA, &[*byte]);
    }
    let mut shown = Vec::new();
    while shown != b"login: " {
        shown.extend(writes.recv_timeout(LONG).unwrap());
    }
}

#[test]
fn a_burst_is_gathered() {
    let (serial, _, writes) = serial();
    let line = [b'x'; 1000];
    for byte in line {
        serial.write(DATA, &[byte]);
    }
    assert!(serial.flush(LONG));
    let writes: Vec<_> = writes.try_iter().collect();
    assert_eq!(writes.concat(), line);
    assert!(
        writes.len() < 100,
        "{} writes for 1000 characters",
        writes.len()
    );
}

#[test]
fn nothing_is_lost_at_the_end() {
    let (serial, _, writes) = serial();
    serial.write(DATA, b"a");
    serial.close();
    serial.write(DATA, b"b");
    assert_eq!(serial.lost_output(), 0);
    drop(serial);
    assert_eq!(writes.iter().collect::<Vec<_>>().concat(), b"ab");
}

/// A sink that never takes anything, until it is dropped or opened.
struct Stuck;

impl Write for Stuck {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_stuck_console_holds_up_the_guest_until_the_port_closes() {
    let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
    let serial = Serial::new(move || interrupt.write(1), Box::new(Stuck)).unwrap();
    std::thread::scope(|scope| {
        let guest = scope.spawn(|| {
            for _ in 0..300 << 10 {
                serial.write(DATA, b"x");
            }
        });
        std::thread::sleep(Duration::from_millis(200));
        assert!(!guest.is_finished());
        assert!(!serial.flush(Duration::ZERO));
        serial.close();
        guest.join().unwrap();
    });
    assert!(serial.lost_output() > 0);
    let start = Instant::now();
    drop(serial);
    assert!(start.elapsed() < LONG);
}

#[test]
fn a_broken_console_costs_its_output_and_no_more() {
    let (serial, _, writes) = serial();
    drop(writes);
    serial.write(DATA, b"x");
    assert!(serial.flush(LONG));
    assert_eq!(serial.lost_output(), 1);
}

#[test]
fn input_interrupts_once_and_is_read_in_order() {
    let (serial, interrupt, _writes) = serial();
    serial.write(IER, &[1]);
    assert_eq!(serial.input(b"ab"), 2);
    assert_eq!(interrupt.read().unwrap(), 1);
    assert_eq!(read(&serial, IIR) & 0xf, 4);
    assert_eq!(read(&serial, LSR) & 1, 1);
    assert_eq!([read(&serial, DATA), read(&serial, DATA)], *b"ab");
    assert_eq!(read(&serial, LSR) & 1, 0);
    assert!(interrupt.read().is_err());
}

#[test]
fn input_beyond_the_buffer_waits_for_room() {
    let (serial, _, _writes) = serial();
    let typed = [b'y'; 100];
    let taken = serial.input(&typed);
    assert!((1..100).contains(&taken));
    assert_eq!(serial.input(&typed), 0);
    assert!(serial.input_room().read().is_err());
    for _ in 0..taken {
        read(&serial, DATA);
    }
    assert_eq!(serial.input_room().read().unwrap(), 1);
    assert_eq!(serial.input(&typed[taken..]), 100 - taken);
    read(&serial, DATA);
    assert!(serial.input_room().read().is_err());
}

#[test]
fn an_empty_transmitter_interrupts() {
    let (serial, interrupt, _writes) = serial();
    serial.write(IER, &[2]);
    assert_eq!(interrupt.read().unwrap(), 1);
    assert_eq!(read(&serial, IIR) & 0xf, 2);
    assert_eq!(read(&serial, IIR) & 0xf, 1);
    serial.write(DATA, b"z");
    assert_eq!(interrupt.read().unwrap(), 1);
    assert_eq!(read(&serial, LSR) & 0x60, 0x60);
}

#[test]
fn a_disabled_interrupt_is_no_longer_a_cause() {
    let (serial, _, _writes) = serial();
    serial.write(IER, &[3]);
    serial.write(DATA, b"z");
    serial.write(IER, &[1]);
    assert_eq!(read(&serial, IIR) & 0xf, 1);
    serial.write(IER, &[3]);
    serial.input(b"a");
    serial.write(IER, &[1]);
    assert_eq!(read(&serial, IIR) & 0xf, 4);
}

#[test]
fn the_divisor_hides_behind_its_latch() {
    let (serial, _, writes) = serial();
    serial.write(LCR, &[0x83]);
    serial.write(DATA, &[0x34, 0x12]);
    assert_eq!([read(&serial, DATA), read(&serial, IER)], [0x34, 0x12]);
    serial.write(LCR, &[0x03]);
    assert_eq!(read(&serial, IER), 0);
    assert!(serial.flush(LONG));
    assert_eq!(writes.try_iter().count(), 0);
}

#[test]
fn loop_back_stays_inside() {
    let (serial, _, writes) = serial();
    serial.write(MCR, &[0x10]);
    serial.write(DATA, b"l");
    assert_eq!(read(&serial, DATA), b'l');
    assert!(serial.flush(LONG));
    assert_eq!(writes.try_iter().count(), 0);
}

#[test]
fn odd_widths_are_registers_side_by_side() {
    let (serial, _, writes) = serial();
    serial.write(6, &[0; 2]);
    serial.write(7, &[0x5a]);
    let mut data = [0; 8];
    serial.read(0, &mut data);
    assert_eq!(data[7], 0x5a);
    serial.read(3, &mut []);
    serial.write(3, &[]);
    for width in 0..=16 {
        for offset in [0, 5, 7, 8, 255, 256] {
            serial.read(offset, &mut vec![0; width]);
            serial.write(offset, &vec![0; width]);
        }
    }
    drop(serial);
    assert!(writes.iter().flatten().all(|byte| byte == 0));
}
