//! MSI-X: a function's interrupts by message (PCI Local Bus 3.0, section 6.8.2).
//!
//! A vector that is not masked is an event that goes to the hypervisor by itself. A route is published when the guest unmasks
//! a vector whose message has changed; masking alone costs nothing, because [`Msix::trigger`] looks at the mask first and
//! remembers what came meanwhile.

use std::{
    io,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use tracing::warn;
use vmm_sys_util::eventfd::EventFd;

use crate::ioapic::Msi;

/// The interrupts that a function gets from the machine.
pub trait Vectors: Send + Sync {
    /// From now on the event of `vector` raises `route`; without one it raises nothing.
    ///
    /// # Errors
    /// When the hypervisor refuses the route.
    fn set_route(&self, vector: u16, route: Option<Msi>) -> io::Result<()>;

    /// The event of `vector`.
    fn event(&self, vector: u16) -> &EventFd;
}

/// The most vectors a function can have here: what fits into the page that its table gets.
pub const MOST_VECTORS: u16 = 256;
/// A queue or a configuration without an interrupt has this vector (virtio 1.3, section 4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;

/// Bytes of an entry of the table.
const ENTRY: usize = 16;
const CONTROL: usize = 12;
const MASK: u32 = 1;

/// In the message control register: MSI-X is on.
pub(crate) const ENABLE: u16 = 1 << 15;
/// In the message control register: all vectors are masked.
pub(crate) const FUNCTION_MASK: u16 = 1 << 14;

#[derive(Clone)]
struct Entry {
    bytes: [u8; ENTRY],
    /// What the machine was told last.
    published: Option<Msi>,
    /// Somebody else has the event, and writes to it without looking at the mask.
    handed_out: bool,
}

impl Entry {
    const RESET: [u8; ENTRY] = {
        let mut bytes = [0; ENTRY];
        bytes[CONTROL] = MASK as u8;
        bytes
    };

    fn dword(&self, at: usize) -> u32 {
        let bytes = &self.bytes[at..at + 4];
        u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }

    fn msi(&self) -> Msi {
        Msi {
            address: u64::from(self.dword(0)) | u64::from(self.dword(4)) << 32,
            data: self.dword(8),
        }
    }

    fn is_masked(&self) -> bool {
        self.dword(CONTROL) & MASK != 0
    }
}

struct State {
    control: u16,
    entries: Vec<Entry>,
}

/// The vectors of a function, their table and their pending bits.
pub struct Msix {
    vectors: Box<dyn Vectors>,
    state: Mutex<State>,
    /// By vector: whether an interrupt goes out at once. What the guest has written, in one word for [`Msix::trigger`].
    open: Vec<AtomicBool>,
    pending: Vec<AtomicBool>,
}

impl Msix {
    /// `count` vectors (at least one, at most [`MOST_VECTORS`]), all masked, and MSI-X off.
    #[must_use]
    pub fn new(vectors: Box<dyn Vectors>, count: u16) -> Self {
        let flags = || (0..count).map(|_| AtomicBool::new(false)).collect();
        let entry = Entry {
            bytes: Entry::RESET,
            published: None,
            handed_out: false,
        };
        Self {
            vectors,
            state: Mutex::new(State {
                control: 0,
                entries: vec![entry; count.into()],
            }),
            open: flags(),
            pending: flags(),
        }
    }

    /// How many vectors there are.
    #[must_use]
    pub fn count(&self) -> u16 {
        self.open.len() as u16
    }

    /// Raises `vector`, or remembers that it is to be raised. Vectors that do not exist are ignored.
    pub fn trigger(&self, vector: u16) {
        let Some(open) = self.open.get(usize::from(vector)) else {
            return;
        };
        if open.load(Ordering::SeqCst) {
            // Full is an event that the hypervisor has not taken yet, and will.
            let _ = self.vectors.event(vector).write(1);
            return;
        }
        self.pending[usize::from(vector)].store(true, Ordering::SeqCst);
        // Unmasked between the two: then nobody else may have seen it.
        if open.load(Ordering::SeqCst) {
            self.flush(vector);
        }
    }

    /// The event of `vector`, for somebody who writes to it by themselves. While the vector is masked, what is written there
    /// raises nothing, and one interrupt comes when the mask is taken away.
    #[must_use]
    pub fn hand_out(&self, vector: u16) -> Option<EventFd> {
        let mut state = self.lock();
        let entry = state.entries.get_mut(usize::from(vector))?;
        let event = self.vectors.event(vector).try_clone().ok()?;
        entry.handed_out = true;
        self.update(&mut state, vector);
        Some(event)
    }

    /// The message control register, without the size of the table.
    #[must_use]
    pub fn control(&self) -> u16 {
        self.lock().control
    }

    /// Takes a write to the message control register.
    pub fn set_control(&self, value: u16) {
        let mut state = self.lock();
        state.control = value & (ENABLE | FUNCTION_MASK);
        for vector in 0..self.count() {
            self.update(&mut state, vector);
        }
    }

    /// Fills `data` from the table at `offset`; behind it there are zeros.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        for (at, byte) in (offset..).zip(data) {
            let (vector, at) = place(at);
            *byte = state.entries.get(vector).map_or(0, |entry| entry.bytes[at]);
        }
    }

    /// Takes a write to the table at `offset`; behind it nothing happens.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        let mut touched = None;
        for (at, byte) in (offset..).zip(data) {
            let (vector, at) = place(at);
            let Some(entry) = state.entries.get_mut(vector) else {
                break;
            };
            // Of the control dword only the mask can be written.
            entry.bytes[at] = match at {
                CONTROL => byte & MASK as u8,
                at if at > CONTROL => 0,
                _ => *byte,
            };
            if touched.is_some_and(|touched| touched != vector) {
                self.update(&mut state, (vector - 1) as u16);
            }
            touched = Some(vector);
        }
        if let Some(vector) = touched {
            self.update(&mut state, vector as u16);
        }
    }

    /// Fills `data` from the pending bits at `offset`; behind them there are zeros.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = (0..8).fold(0, |bits, bit| {
                let vector = usize::try_from(at)
                    .ok()
                    .and_then(|at| at.checked_mul(8))
                    .and_then(|first| self.pending.get(first + bit));
                let pending = vector.is_some_and(|pending| pending.load(Ordering::SeqCst));
                bits | u8::from(pending) << bit
            });
        }
    }

    /// As after the function's reset: everything masked, nothing pending, no routes.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.control = 0;
        for vector in 0..self.count() {
            let entry = &mut state.entries[usize::from(vector)];
            entry.bytes = Entry::RESET;
            entry.handed_out = false;
            self.pending[usize::from(vector)].store(false, Ordering::SeqCst);
            self.update(&mut state, vector);
            self.publish(&mut state.entries[usize::from(vector)], vector, None);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes true what the registers say of `vector`.
    fn update(&self, state: &mut State, vector: u16) {
        let on = state.control & (ENABLE | FUNCTION_MASK) == ENABLE;
        let index = usize::from(vector);
        let entry = &mut state.entries[index];
        if !on || entry.is_masked() {
            let was_open = self.open[index].swap(false, Ordering::SeqCst);
            if entry.handed_out {
                // What is written to the event now is lost, so the mask's end has to stand for it.
                self.publish(entry, vector, None);
                if was_open || on {
                    self.pending[index].store(true, Ordering::SeqCst);
                }
            }
            return;
        }
        let route = entry.msi();
        self.publish(entry, vector, Some(route));
        self.open[index].store(true, Ordering::SeqCst);
        self.flush(vector);
    }

    fn publish(&self, entry: &mut Entry, vector: u16, route: Option<Msi>) {
        if entry.published == route {
            return;
        }
        match self.vectors.set_route(vector, route) {
            Ok(()) => entry.published = route,
            Err(error) => {
                warn!("interrupt vector {vector}: the hypervisor refuses the route: {error}");
            }
        }
    }

    fn flush(&self, vector: u16) {
        if self.pending[usize::from(vector)].swap(false, Ordering::SeqCst) {
            let _ = self.vectors.event(vector).write(1);
        }
    }
}

/// The entry that a byte of the table belongs to, and which of its bytes it is.
fn place(offset: u64) -> (usize, usize) {
    let offset = usize::try_from(offset).unwrap_or(usize::MAX);
    (offset / ENTRY, offset % ENTRY)
}
