//! The I/O APIC (82093AA, but with 8 pins; version 0x20 with an EOI register).
//!
//! The hypervisor owns the local APICs, and interrupts travel as MSIs; this device holds the redirection table, and turns
//! its entries into [`Msi`] routes. An edge on a pin with a route goes from an irqfd to the hypervisor without passing
//! here. A route is published only when it differs from the one published before, and never for a masked pin, so
//! a guest that sets up all pins masked, as Linux does, costs nothing until it unmasks one.

mod entry;

#[cfg(test)]
mod tests;

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use entry::Entry;

use crate::BusDevice;

/// Number of interrupt pins. Linux visits every pin several times while it boots and again when it ends, each register by
/// two exits: pins that nothing is connected to are left out.
pub const PINS: u32 = 8;

/// A message-signalled interrupt: what is written, and where, to interrupt a processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Msi {
    /// Guest physical address in the local APICs' window: destination, destination mode, redirection hint.
    pub address: u64,
    /// Vector, delivery mode, level and trigger mode.
    pub data: u32,
}

/// Where the IOAPIC's interrupts go.
pub trait InterruptRoutes: Send + Sync {
    /// From now on the irqfd of `pin` raises `route`; without one it raises nothing.
    ///
    /// # Errors
    /// When the hypervisor refuses the route. The IOAPIC tries again with the guest's next write to the pin's entry.
    fn set_route(&self, pin: u32, route: Option<Msi>) -> io::Result<()>;

    /// Raises `msi` (`level` true), or withdraws a level-triggered one that may still be pending (`level` false).
    fn assert(&self, msi: Msi, level: bool);
}

/// Offsets of the directly addressed registers.
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const EOI: u64 = 0x40;

/// Indices of the registers behind the window.
const ID: u8 = 0x00;
const VERSION: u8 = 0x01;
const ARBITRATION: u8 = 0x02;
const FIRST_ENTRY: u8 = 0x10;
const LAST_ENTRY: u8 = FIRST_ENTRY + 2 * PINS as u8 - 1;

/// Version 0x20 has the EOI register; bits 16 to 23 hold the number of the last pin.
const VERSION_VALUE: u32 = 0x20 | (PINS - 1) << 16;
/// Bits 24 to 27 of the ID register can be written.
const ID_MASK: u32 = 0x0f00_0000;

#[derive(Clone, Copy, Default)]
struct Pin {
    entry: Entry,
    /// What the routes were told last.
    published: Option<Msi>,
    /// State of the line, for level-triggered pins.
    line: bool,
}

#[derive(Default)]
struct State {
    select: u8,
    id: u32,
    pins: [Pin; PINS as usize],
}

/// The I/O APIC's registers and lines.
pub struct Ioapic<R> {
    routes: R,
    state: Mutex<State>,
}

impl<R: InterruptRoutes> Ioapic<R> {
    /// An IOAPIC after reset: all pins masked, no route published.
    pub fn new(routes: R) -> Self {
        Self {
            routes,
            state: Mutex::new(State::default()),
        }
    }

    /// Drives the line of `pin`. A rising edge interrupts an edge-triggered pin once; a level-triggered pin interrupts
    /// for as long as the line is high, again after each end of interrupt. Pins beyond the last are ignored.
    pub fn set_line(&self, pin: u32, high: bool) {
        let mut state = self.lock();
        let Some(pin) = state.pins.get_mut(pin as usize) else {
            return;
        };
        let rises = high && !pin.line;
        pin.line = high;
        if pin.entry.is_level() {
            self.deliver_level(pin);
        } else if rises && !pin.entry.is_masked() {
            self.routes.assert(pin.entry.msi(), true);
        }
    }

    /// Takes the end of a level-triggered interrupt with `vector` from a local APIC.
    pub fn end_of_interrupt(&self, vector: u8) {
        let mut state = self.lock();
        for pin in &mut state.pins {
            if pin.entry.is_level() && pin.entry.vector() == vector && pin.entry.remote_irr() {
                pin.entry.set_remote_irr(false);
                self.deliver_level(pin);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn deliver_level(&self, pin: &mut Pin) {
        if pin.line && !pin.entry.is_masked() && !pin.entry.remote_irr() {
            pin.entry.set_remote_irr(true);
            self.routes.assert(pin.entry.msi(), true);
        }
    }

    /// Tells the routes about `pin`, if there is something new to tell.
    fn publish(&self, number: u32, pin: &mut Pin) {
        let route = (!pin.entry.is_masked()).then(|| pin.entry.msi());
        if route != pin.published && self.routes.set_route(number, route).is_ok() {
            pin.published = route;
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        let state = self.lock();
        match offset {
            SELECT => u32::from(state.select),
            WINDOW => match state.select {
                ID | ARBITRATION => state.id,
                VERSION => VERSION_VALUE,
                index @ FIRST_ENTRY..=LAST_ENTRY => {
                    let (pin, high) = entry_of(index);
                    state.pins[pin].entry.dword(high)
                }
                _ => 0,
            },
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        match offset {
            SELECT => self.lock().select = value as u8,
            WINDOW => self.write_window(value),
            EOI => self.end_of_interrupt(value as u8),
            _ => {}
        }
    }

    fn write_window(&self, value: u32) {
        let mut state = self.lock();
        match state.select {
            ID => state.id = value & ID_MASK,
            index @ FIRST_ENTRY..=LAST_ENTRY => {
                let (number, high) = entry_of(index);
                let pin = &mut state.pins[number];
                pin.entry.set_dword(high, value);
                self.publish(number as u32, pin);
                if pin.entry.is_level() {
                    self.deliver_level(pin);
                }
            }
            _ => {}
        }
    }
}

/// The pin a window index belongs to, and whether it is the high half of its entry.
fn entry_of(index: u8) -> (usize, bool) {
    (usize::from(index - FIRST_ENTRY) / 2, index & 1 != 0)
}

impl<R: InterruptRoutes> BusDevice for Ioapic<R> {
    /// The registers are 32 bits wide. A narrower read gets the low bytes, a wider one zeros behind them; between the
    /// registers there are zeros.
    fn read(&self, offset: u64, data: &mut [u8]) {
        let value = self.read_register(offset).to_le_bytes();
        data.fill(0);
        let width = data.len().min(value.len());
        data[..width].copy_from_slice(&value[..width]);
    }

    /// A narrower write is extended with zeros, of a wider one the first four bytes count; an empty one is nothing.
    fn write(&self, offset: u64, data: &[u8]) {
        if data.is_empty() {
            return;
        }
        let mut value = [0; 4];
        let width = data.len().min(value.len());
        value[..width].copy_from_slice(&data[..width]);
        self.write_register(offset, u32::from_le_bytes(value));
    }
}
