//! A 16550 serial port for the guest's console.
//!
//! The registers are `vm-superio`'s. Output goes through a queue whose thread does the host's writes, so that printing a
//! character costs the processor that does it no system call. Input waits in the port's receive buffer, and whoever
//! feeds it is told when there is room again.

mod output;

#[cfg(test)]
mod tests;

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use output::{Output, Sender};
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial as Uart, Trigger};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::BusDevice;

/// Interrupt identification: nothing pending; transmitter empty; the bits that name the cause.
const IIR: u8 = 2;
const IIR_NONE: u8 = 0b0001;
const IIR_THR_EMPTY: u8 = 0b0010;
const IIR_CAUSE: u8 = 0b1111;
/// Interrupt enable: transmitter empty.
const IER_THR_EMPTY: u8 = 0b0010;

/// A 16550 with a console behind it: eight registers, one byte each.
pub struct Serial {
    uart: Mutex<Uart<Line, InputRoom, Sender>>,
    output: Output,
    room: Arc<Room>,
}

/// Makes one edge on the interrupt line.
type Edge = Box<dyn Fn() -> io::Result<()> + Send>;

/// The interrupt line: one edge for each trigger.
struct Line(Edge);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        (self.0)()
    }
}

/// Whether somebody has input that did not fit, and how to tell them that it does now.
struct Room {
    wanted: AtomicBool,
    event: EventFd,
}

struct InputRoom(Arc<Room>);

impl SerialEvents for InputRoom {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        if self.0.wanted.swap(false, Ordering::Relaxed) {
            // The counter cannot overflow from one write per refusal, and there is nobody to tell if it did.
            let _ = self.0.event.write(1);
        }
    }
}

impl Serial {
    /// A port that interrupts by `interrupt`, called once for each edge on its line, and prints to `sink`.
    ///
    /// # Errors
    /// When the host has no thread or event descriptor left.
    pub fn new(
        interrupt: impl Fn() -> io::Result<()> + Send + 'static,
        sink: Box<dyn Write + Send>,
    ) -> io::Result<Self> {
        let output = Output::start(sink)?;
        let room = Arc::new(Room {
            wanted: AtomicBool::new(false),
            event: EventFd::new(EFD_NONBLOCK)?,
        });
        let events = InputRoom(Arc::clone(&room));
        let line = Line(Box::new(interrupt));
        let uart = Mutex::new(Uart::with_events(line, events, output.sender()));
        Ok(Self { uart, output, room })
    }

    /// Hands `bytes` to the guest and returns how many of them the receive buffer took. When it did not take all,
    /// [`Serial::input_room`] becomes readable once the guest has emptied it.
    pub fn input(&self, bytes: &[u8]) -> usize {
        let mut uart = self.lock();
        // In loop-back mode the receiver is disconnected from the line: what arrives then is nobody's.
        let taken = uart.fifo_capacity().min(bytes.len());
        // An interrupt that could not be raised does not make the bytes come back.
        let _ = uart.enqueue_raw_bytes(&bytes[..taken]);
        if taken < bytes.len() {
            self.room.wanted.store(true, Ordering::Relaxed);
        }
        taken
    }

    /// Becomes readable when there is room for input that was refused before.
    pub fn input_room(&self) -> &EventFd {
        &self.room.event
    }

    /// Waits until everything printed so far is written; false when that takes longer than `timeout`.
    pub fn flush(&self, timeout: Duration) -> bool {
        self.output.flush(timeout)
    }

    /// Prepares the end: a sink that takes nothing no longer holds up the processors. To be called before they are
    /// waited for.
    pub fn close(&self) {
        self.output.close();
    }

    /// Characters printed by the guest that the sink did not take.
    pub fn lost_output(&self) -> u64 {
        self.output.lost()
    }

    fn lock(&self) -> MutexGuard<'_, Uart<Line, InputRoom, Sender>> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut uart = self.lock();
        for (register, byte) in (offset..).zip(data) {
            *byte = match u8::try_from(register) {
                Ok(IIR) => {
                    let enabled = uart.state().interrupt_enable;
                    visible_cause(uart.read(IIR), enabled)
                }
                Ok(register) => uart.read(register),
                Err(_) => 0xff,
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut uart = self.lock();
        for (register, &value) in (offset..).zip(data) {
            if let Ok(register) = u8::try_from(register) {
                // Nothing the guest could be told: it has no wire on which a failed interrupt shows.
                let _ = uart.write(register, value);
            }
        }
    }
}

/// The interrupt identification `iir` without a cause that the guest has disabled since it arose: a driver that stops
/// transmitting does so within its interrupt handler, and would go round once more for nothing.
fn visible_cause(iir: u8, enabled: u8) -> u8 {
    if enabled & IER_THR_EMPTY != 0 || iir & IIR_THR_EMPTY == 0 {
        return iir;
    }
    let rest = iir & !IIR_THR_EMPTY;
    if rest & IIR_CAUSE == 0 {
        rest | IIR_NONE
    } else {
        rest
    }
}
