//! A virtqueue in use: requests out of it, answers into it, and as few interrupts as the driver asks for.

use std::sync::{
    Arc,
    atomic::{Ordering, fence},
};

use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::{Chain, DeviceError, Notify};

/// In the flags of the available ring: the driver wants no interrupts (virtio 1.3, section 2.7.6).
const NO_INTERRUPT: u16 = 1;

/// A queue the driver has set up, with the memory it lies in, the driver's kick and the way to answer it.
pub struct VirtQueue {
    index: u16,
    ring: Queue,
    memory: GuestMemoryMmap,
    kick: EventFd,
    notify: Arc<dyn Notify>,
    /// The index of the used ring when the driver was last told of it, or spared that.
    signalled: u16,
}

impl VirtQueue {
    /// What the rings can do: `VIRTIO_F_EVENT_IDX` and `VIRTIO_F_INDIRECT_DESC`.
    pub const FEATURES: u64 = 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

    /// Queue `index` of a device. `ring` is ready and valid.
    #[must_use]
    pub fn new(
        index: u16,
        ring: Queue,
        memory: GuestMemoryMmap,
        kick: EventFd,
        notify: Arc<dyn Notify>,
    ) -> Self {
        Self {
            index,
            signalled: ring.next_used(),
            ring,
            memory,
            kick,
            notify,
        }
    }

    /// Its number.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// The memory its buffers lie in.
    #[must_use]
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Readable when the driver has made buffers available and wants the device to know.
    #[must_use]
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// As if the driver had kicked again: for a device that leaves requests in the queue to look at other events first, its
    /// own end among them.
    pub fn come_back(&self) {
        // An eventfd that is full is readable, too.
        let _ = self.kick.write(1);
    }

    /// The rings themselves, for back ends that walk them on their own (vhost).
    #[must_use]
    pub fn ring(&self) -> &Queue {
        &self.ring
    }

    /// The way to the driver.
    #[must_use]
    pub fn notify(&self) -> &Arc<dyn Notify> {
        &self.notify
    }

    /// An empty chain for [`VirtQueue::pop`] to fill.
    #[must_use]
    pub fn chain(&self) -> Chain {
        Chain::new(&self.memory)
    }

    /// Takes the next request out of the queue, into `chain`. Returns whether there was one.
    ///
    /// # Errors
    /// When the ring or the chain breaks the rules.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, DeviceError> {
        let next = self
            .ring
            .iter(&self.memory)
            .map_err(|_| DeviceError::Malformed("an available ring that jumps"))?
            .next();
        match next {
            Some(descriptors) => chain.fill(descriptors).map(|()| true),
            None => Ok(false),
        }
    }

    /// Puts the request that was popped last back, to be popped again.
    pub fn unpop(&mut self) {
        self.ring.go_to_previous_position();
    }

    /// Answers the request with this `head`: `written` bytes of its writable buffers have been filled. The driver hears of it
    /// with [`VirtQueue::signal`].
    ///
    /// # Errors
    /// When the used ring is not where it was.
    pub fn push(&mut self, head: u16, written: u32) -> Result<(), DeviceError> {
        self.ring
            .add_used(&self.memory, head, written)
            .map_err(|_| DeviceError::Malformed("a used ring outside the guest's memory"))
    }

    /// Answers several requests as one: the driver sees all the answers, each as in [`VirtQueue::push`], or none.
    ///
    /// # Errors
    /// When the used ring is not where it was.
    pub fn push_together(&mut self, answers: &[(u16, u32)]) -> Result<(), DeviceError> {
        let Some((last, others)) = answers.split_last() else {
            return Ok(());
        };
        // All entries are there before the index says so, which the last one's `push` lets it.
        let mut next = self.ring.next_used();
        for (head, written) in others {
            let slot = u64::from(next % self.ring.size());
            let entry = self.ring.used_ring().wrapping_add(4 + 8 * slot);
            self.memory
                .write_obj(
                    [u32::from(*head).to_le(), written.to_le()],
                    GuestAddress(entry),
                )
                .map_err(|_| DeviceError::Malformed("a used ring outside the guest's memory"))?;
            next = next.wrapping_add(1);
        }
        self.ring.set_next_used(next);
        self.push(last.0, last.1)
    }

    /// Tells the driver of the answers since the last time, if there are any and it wants to hear of them.
    ///
    /// # Errors
    /// When the rings are not where they were.
    pub fn signal(&mut self) -> Result<(), DeviceError> {
        let used = self.ring.next_used();
        let before = std::mem::replace(&mut self.signalled, used);
        if used == before {
            return Ok(());
        }
        // What the driver says it wants is read after it can see the answers.
        fence(Ordering::SeqCst);
        let wanted = if self.ring.event_idx_enabled() {
            let event = self.load16(4 + 2 * u64::from(self.ring.size()))?;
            used.wrapping_sub(event).wrapping_sub(1) < used.wrapping_sub(before)
        } else {
            self.load16(0)? & NO_INTERRUPT == 0
        };
        if wanted {
            self.notify.used(self.index);
        }
        Ok(())
    }

    /// Asks the driver to kick (again). Returns whether it has made buffers available meanwhile, which it may not kick for.
    ///
    /// # Errors
    /// When the rings are not where they were.
    pub fn enable_kicks(&mut self) -> Result<bool, DeviceError> {
        self.ring
            .enable_notification(&self.memory)
            .map_err(|_| DeviceError::Malformed("rings outside the guest's memory"))
    }

    /// Spares the driver its kicks, for as long as the device looks by itself.
    ///
    /// # Errors
    /// When the rings are not where they were.
    pub fn disable_kicks(&mut self) -> Result<(), DeviceError> {
        self.ring
            .disable_notification(&self.memory)
            .map_err(|_| DeviceError::Malformed("rings outside the guest's memory"))
    }

    /// Reads `offset` bytes into the available ring.
    fn load16(&self, offset: u64) -> Result<u16, DeviceError> {
        let at = GuestAddress(self.ring.avail_ring().wrapping_add(offset));
        self.memory
            .load(at, Ordering::Relaxed)
            .map(u16::from_le)
            .map_err(|_| DeviceError::Malformed("rings outside the guest's memory"))
    }
}
