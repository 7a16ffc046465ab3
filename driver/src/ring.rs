//! A split virtqueue from the driver's side (virtio 1.3, section 2.7).

use std::{
    os::fd::AsRawFd,
    sync::{Arc, atomic::Ordering},
};

use virtio_bindings::bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::EventFd,
};

use crate::Interrupts;

/// A descriptor as it lies in memory, right or wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Raw {
    /// Guest physical address of the buffer.
    pub address: u64,
    /// Its length in bytes.
    pub length: u32,
    /// `VRING_DESC_F_*`.
    pub flags: u16,
    /// The descriptor behind it, with `VRING_DESC_F_NEXT`.
    pub next: u16,
}

/// Bytes of a descriptor.
const DESCRIPTOR: u64 = 16;

/// A queue of a device, with the rings at the addresses given.
pub struct Ring {
    index: u16,
    size: u16,
    memory: GuestMemoryMmap,
    descriptors: u64,
    available: u64,
    used: u64,
    kick: EventFd,
    interrupts: Arc<Interrupts>,
    free: Vec<u16>,
    /// How many descriptors each chain in flight has, by head.
    chains: Vec<Vec<u16>>,
    next_available: u16,
    next_used: u16,
}

impl Ring {
    /// Bytes of guest memory that rings of `size` entries take.
    #[must_use]
    pub fn footprint(size: u16) -> u64 {
        let size = u64::from(size);
        (DESCRIPTOR * size + (6 + 2 * size) + 4 + (6 + 8 * size) + 16).next_multiple_of(4096)
    }

    /// Queue `index` of `size` entries, laid out from guest physical address `base` on, in [`Ring::footprint`] bytes.
    #[must_use]
    pub fn new(
        index: u16,
        size: u16,
        base: u64,
        memory: &GuestMemoryMmap,
        kick: EventFd,
        interrupts: Arc<Interrupts>,
    ) -> Self {
        let available = base + DESCRIPTOR * u64::from(size);
        let used = (available + 6 + 2 * u64::from(size)).next_multiple_of(4);
        Self {
            index,
            size,
            memory: memory.clone(),
            descriptors: base,
            available,
            used,
            kick,
            interrupts,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); size.into()],
            next_available: 0,
            next_used: 0,
        }
    }

    /// The device's view of the queue, as the transport sets it up.
    pub(crate) fn device_side(&self, event_idx: bool) -> Queue {
        let mut queue = Queue::new(self.size).expect("a power of two");
        let halves = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
        let (low, high) = halves(self.descriptors);
        queue.set_desc_table_address(low, high);
        let (low, high) = halves(self.available);
        queue.set_avail_ring_address(low, high);
        let (low, high) = halves(self.used);
        queue.set_used_ring_address(low, high);
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        queue
    }

    /// Entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Guest physical addresses of the descriptor table, the available ring and the used ring.
    #[must_use]
    pub fn addresses(&self) -> [u64; 3] {
        [self.descriptors, self.available, self.used]
    }

    /// Writes descriptor `index`, whatever is in it.
    pub fn write_descriptor(&self, index: u16, raw: Raw) {
        self.write_raw(self.descriptors + DESCRIPTOR * u64::from(index), raw);
    }

    /// Writes `table` at `address`, for a descriptor with `VRING_DESC_F_INDIRECT`.
    pub fn write_table(&self, address: u64, table: &[Raw]) {
        for (index, raw) in (0u64..).zip(table) {
            self.write_raw(address + DESCRIPTOR * index, *raw);
        }
    }

    fn write_raw(&self, at: u64, raw: Raw) {
        let mut bytes = [0; DESCRIPTOR as usize];
        bytes[..8].copy_from_slice(&raw.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&raw.length.to_le_bytes());
        bytes[12..14].copy_from_slice(&raw.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&raw.next.to_le_bytes());
        self.memory
            .write_slice(&bytes, GuestAddress(at))
            .expect("guest memory");
    }

    /// Makes a chain available: buffers to be read, then buffers to be written, as address and length. The device is not told.
    /// Returns its head.
    ///
    /// # Panics
    /// When there are not enough descriptors.
    pub fn add(&mut self, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> u16 {
        let table = chain(readable, writable);
        let indices: Vec<u16> = (0..table.len())
            .map(|_| self.free.pop().expect("a free descriptor"))
            .collect();
        for (position, raw) in table.iter().enumerate() {
            let next = indices.get(position + 1).copied().unwrap_or(0);
            self.write_descriptor(indices[position], Raw { next, ..*raw });
        }
        let head = indices[0];
        self.chains[usize::from(head)] = indices;
        self.publish(head);
        head
    }

    /// As [`Ring::add`], with the chain in an indirect table at `at`, which has room for it.
    ///
    /// # Panics
    /// When there is no descriptor.
    pub fn add_indirect(
        &mut self,
        at: u64,
        readable: &[(u64, u32)],
        writable: &[(u64, u32)],
    ) -> u16 {
        let mut table = chain(readable, writable);
        for (position, raw) in (1u16..).zip(table.iter_mut()) {
            raw.next = position;
        }
        self.write_table(at, &table);
        let head = self.free.pop().expect("a free descriptor");
        self.write_descriptor(
            head,
            Raw {
                address: at,
                length: DESCRIPTOR as u32 * table.len() as u32,
                flags: VRING_DESC_F_INDIRECT as u16,
                next: 0,
            },
        );
        self.chains[usize::from(head)] = vec![head];
        self.publish(head);
        head
    }

    /// Puts `head` into the available ring, whatever it is.
    pub fn publish(&mut self, head: u16) {
        let slot = self.next_available % self.size;
        self.store16(self.available + 4 + 2 * u64::from(slot), head);
        self.next_available = self.next_available.wrapping_add(1);
        self.set_available(self.next_available);
    }

    /// Sets the index of the available ring, right or wrong.
    pub fn set_available(&self, index: u16) {
        self.memory
            .store(
                index.to_le(),
                GuestAddress(self.available + 2),
                Ordering::Release,
            )
            .expect("guest memory");
    }

    /// Whether the driver wants no interrupts (without `VIRTIO_F_EVENT_IDX`).
    pub fn set_no_interrupt(&self, off: bool) {
        self.store16(self.available, off.into());
    }

    /// After how many used chains the driver wants an interrupt (with `VIRTIO_F_EVENT_IDX`).
    pub fn set_used_event(&self, index: u16) {
        self.store16(self.available + 4 + 2 * u64::from(self.size), index);
    }

    /// The device's `avail_event` (with `VIRTIO_F_EVENT_IDX`).
    #[must_use]
    pub fn avail_event(&self) -> u16 {
        self.load16(self.used + 4 + 8 * u64::from(self.size))
    }

    /// The index of the used ring.
    #[must_use]
    pub fn used_index(&self) -> u16 {
        u16::from_le(
            self.memory
                .load(GuestAddress(self.used + 2), Ordering::Acquire)
                .expect("guest memory"),
        )
    }

    /// Tells the device that there is something in the queue.
    pub fn kick(&self) {
        self.kick.write(1).expect("an eventfd");
    }

    /// Adds the kicks that the device has not seen yet to what `poll` waits for.
    pub(crate) fn watch_kicks(&self, poll: &Epoll) {
        let event = EpollEvent::new(EventSet::IN, self.index.into());
        poll.ctl(ControlOperation::Add, self.kick.as_raw_fd(), event)
            .expect("an eventfd");
    }

    /// The next used chain, if there is one: its head, and how many bytes the device says to have written.
    ///
    /// # Panics
    /// When the device has used what was not available: the ring says so itself.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        if self.used_index() == self.next_used {
            return None;
        }
        let slot = u64::from(self.next_used % self.size);
        let entry = GuestAddress(self.used + 4 + 8 * slot);
        let [head, length]: [u32; 2] = [
            u32::from_le(self.memory.read_obj(entry).expect("guest memory")),
            u32::from_le(
                self.memory
                    .read_obj(GuestAddress(entry.0 + 4))
                    .expect("guest memory"),
            ),
        ];
        self.next_used = self.next_used.wrapping_add(1);
        let head = u16::try_from(head).expect("the head of a chain");
        let chain = std::mem::take(&mut self.chains[usize::from(head)]);
        self.free.extend(chain);
        Some((head, length))
    }

    /// Waits for the next used chain.
    ///
    /// # Panics
    /// When it does not come within ten seconds.
    pub fn wait(&mut self) -> (u16, u32) {
        let (interrupts, index) = (Arc::clone(&self.interrupts), self.index);
        interrupts.wait_until(
            || self.used(),
            |interrupts| format!("nothing used in queue {index} ({interrupts:?})"),
        )
    }

    fn store16(&self, at: u64, value: u16) {
        self.memory
            .write_obj(value.to_le(), GuestAddress(at))
            .expect("guest memory");
    }

    fn load16(&self, at: u64) -> u16 {
        u16::from_le(
            self.memory
                .read_obj(GuestAddress(at))
                .expect("guest memory"),
        )
    }
}

/// A chain of these buffers, still without `next`.
fn chain(readable: &[(u64, u32)], writable: &[(u64, u32)]) -> Vec<Raw> {
    let raw = |(address, length): &(u64, u32), flags| Raw {
        address: *address,
        length: *length,
        flags,
        next: 0,
    };
    let reads = readable.iter().map(|buffer| raw(buffer, 0));
    let writes = writable
        .iter()
        .map(|buffer| raw(buffer, VRING_DESC_F_WRITE as u16));
    let mut table: Vec<Raw> = reads.chain(writes).collect();
    let last = table.len().saturating_sub(1);
    for raw in &mut table[..last] {
        raw.flags |= VRING_DESC_F_NEXT as u16;
    }
    table
}
