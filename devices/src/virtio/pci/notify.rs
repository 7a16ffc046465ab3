//! From the device to its driver: interrupts, the ISR, and the status that the device itself sets.

use std::sync::{
    Arc,
    atomic::{AtomicU8, AtomicU16, Ordering},
};

use vmm_sys_util::eventfd::EventFd;

use crate::{
    pci::msix::{Msix, NO_VECTOR},
    virtio::Notify,
};

/// In the ISR: a queue has used buffers; the configuration has changed.
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;
/// In the device status: the device needs a reset.
pub(super) const NEEDS_RESET: u8 = 64;

/// The registers that both the device's threads and the driver's accesses touch.
pub(super) struct PciNotify {
    msix: Arc<Msix>,
    queue_vectors: Vec<AtomicU16>,
    config_vector: AtomicU16,
    isr: AtomicU8,
    /// [`NEEDS_RESET`] or nothing.
    trouble: AtomicU8,
    generation: AtomicU8,
}

impl PciNotify {
    pub(super) fn new(msix: Arc<Msix>, queues: usize) -> Self {
        Self {
            msix,
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            config_vector: AtomicU16::new(NO_VECTOR),
            isr: AtomicU8::new(0),
            trouble: AtomicU8::new(0),
            generation: AtomicU8::new(0),
        }
    }

    /// The vector of a queue, or of the configuration.
    fn vector(&self, queue: Option<u16>) -> Option<&AtomicU16> {
        match queue {
            Some(queue) => self.queue_vectors.get(usize::from(queue)),
            None => Some(&self.config_vector),
        }
    }

    pub(super) fn read_vector(&self, queue: Option<u16>) -> u16 {
        self.vector(queue)
            .map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire))
    }

    /// Takes the driver's choice; one that there is not becomes none, which the driver then reads.
    pub(super) fn write_vector(&self, queue: Option<u16>, chosen: u16) {
        let chosen = if chosen < self.msix.count() {
            chosen
        } else {
            NO_VECTOR
        };
        if let Some(vector) = self.vector(queue) {
            vector.store(chosen, Ordering::Release);
        }
    }

    /// The ISR; reading clears it.
    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    /// What the device adds to the status.
    pub(super) fn trouble(&self) -> u8 {
        self.trouble.load(Ordering::Acquire)
    }

    pub(super) fn reset(&self) {
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        self.isr.store(0, Ordering::Release);
        self.trouble.store(0, Ordering::Release);
    }
}

impl Notify for PciNotify {
    fn used(&self, index: u16) {
        let vector = self.read_vector(Some(index));
        if vector == NO_VECTOR {
            // Only a driver without interrupts looks at the ISR.
            self.isr.fetch_or(ISR_QUEUE, Ordering::AcqRel);
        } else {
            self.msix.trigger(vector);
        }
    }

    fn call(&self, index: u16) -> Option<EventFd> {
        match self.read_vector(Some(index)) {
            NO_VECTOR => None,
            vector => self.msix.hand_out(vector),
        }
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
        self.msix
            .trigger(self.config_vector.load(Ordering::Acquire));
    }

    fn needs_reset(&self) {
        self.trouble.store(NEEDS_RESET, Ordering::Release);
        self.config_changed();
    }
}
