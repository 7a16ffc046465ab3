//! A virtqueue over memory in which there is anything at all.
//!
//! The first bytes say where the rings are, the next ones what is done with the queue, and the rest is what lies in memory.

#![no_main]

use std::sync::Arc;

use devices::virtio::{Buffers, Chain, Notify, VirtQueue};
use libfuzzer_sys::fuzz_target;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Two regions that touch, a hole, and one more.
const REGIONS: [(u64, usize); 3] = [(0, 0x2000), (0x2000, 0x2000), (0x8000, 0x1000)];
const STEPS: usize = 16;

struct Nobody;

impl Notify for Nobody {
    fn used(&self, _index: u16) {}

    fn call(&self, _index: u16) -> Option<EventFd> {
        None
    }

    fn config_changed(&self) {}

    fn needs_reset(&self) {}
}

fuzz_target!(|input: &[u8]| {
    let Some((layout, input)) = input.split_first_chunk::<8>() else {
        return;
    };
    let Some((steps, content)) = input.split_first_chunk::<STEPS>() else {
        return;
    };
    let ranges = REGIONS.map(|(start, length)| (GuestAddress(start), length));
    let memory = GuestMemoryMmap::from_ranges(&ranges).expect("memory");
    let mut content = content;
    for (start, length) in REGIONS {
        let (here, rest) = content.split_at(content.len().min(length));
        memory
            .write_slice(here, GuestAddress(start))
            .expect("guest memory");
        content = rest;
    }

    let ring = ring(*layout);
    if !ring.is_valid(&memory) {
        return;
    }
    let kick = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    let mut queue = VirtQueue::new(0, ring, memory, kick, Arc::new(Nobody));
    let mut chain = queue.chain();
    let mut piece = queue.chain();
    for step in steps {
        // After an error a device does nothing any more.
        if act(&mut queue, &mut chain, &mut piece.readable, *step).is_err() {
            return;
        }
    }
});

fn ring(layout: [u8; 8]) -> Queue {
    let [size, options, places @ ..] = layout;
    let mut ring = Queue::new(256).expect("a power of two");
    ring.set_size(1 << (size % 9));
    let [descriptors, available, used] = [0, 2, 4]
        .map(|at| u32::from(u16::from_le_bytes([places[at], places[at + 1]])));
    ring.set_desc_table_address(Some(descriptors & !15), Some(0));
    ring.set_avail_ring_address(Some(available & !1), Some(0));
    ring.set_used_ring_address(Some(used & !3), Some(0));
    ring.set_event_idx(options & 1 != 0);
    ring.set_ready(true);
    ring
}

fn act(
    queue: &mut VirtQueue,
    chain: &mut Chain,
    piece: &mut Buffers,
    step: u8,
) -> Result<(), devices::virtio::DeviceError> {
    let amount = usize::from(step >> 3);
    match step & 7 {
        0 | 1 => {
            if queue.pop(chain)? {
                look(chain, amount);
                queue.push(chain.head(), chain.writable.len() as u32)?;
            }
        }
        2 => {
            if queue.pop(chain)? {
                queue.unpop();
            }
        }
        3 => {
            let length = chain.readable.len();
            chain.readable.split_front(amount, piece);
            assert_eq!(piece.len() + chain.readable.len(), length);
            assert_eq!(piece.len(), amount.min(length));
        }
        4 => {
            let length = chain.writable.len();
            chain.writable.split_back(amount, piece);
            assert_eq!(piece.len() + chain.writable.len(), length);
            assert_eq!(piece.len(), amount.min(length));
        }
        5 => queue.signal()?,
        6 => {
            queue.enable_kicks()?;
        }
        _ => queue.disable_kicks()?,
    }
    Ok(())
}

/// What the buffers say of themselves is so.
fn look(chain: &Chain, offset: usize) {
    let mut bytes = [0; 64];
    for buffers in [&chain.readable, &chain.writable] {
        let sum: usize = buffers.vectors().iter().map(|vector| vector.iov_len).sum();
        assert_eq!(sum, buffers.len());
        assert_eq!(buffers.is_empty(), sum == 0);
        let there = buffers.len().saturating_sub(offset).min(bytes.len());
        assert_eq!(buffers.read_at(offset, &mut bytes), there);
    }
    let room = chain.writable.len().saturating_sub(offset).min(bytes.len());
    assert_eq!(chain.writable.write_at(offset, &bytes), room);
}
