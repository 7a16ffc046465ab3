//! A virtqueue in use: requests out of it, answers into it, and as few interrupts as the driver asks for.

use std::sync::{Arc, atomic::Ordering};

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
    /// There are answers the driver was not told of.
    untold: bool,
}

impl VirtQueue {
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
            ring,
            memory,
            kick,
            notify,
            untold: false,
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
        self.untold = true;
        self.ring
            .add_used(&self.memory, head, written)
            .map_err(|_| DeviceError::Malformed("a used ring outside the guest's memory"))
    }

    /// Tells the driver of the answers since the last time, if there are any and it wants to hear of them.
    ///
    /// # Errors
    /// When the rings are not where they were.
    pub fn signal(&mut self) -> Result<(), DeviceError> {
        if !std::mem::take(&mut self.untold) {
            return Ok(());
        }
        let wanted = self
            .ring
            .needs_notification(&self.memory)
            .map_err(|_| DeviceError::Malformed("rings outside the guest's memory"))?;
        if wanted && (self.ring.event_idx_enabled() || !self.interrupts_are_off()?) {
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

    fn interrupts_are_off(&self) -> Result<bool, DeviceError> {
        self.memory
            .load::<u16>(GuestAddress(self.ring.avail_ring()), Ordering::Relaxed)
            .map(|flags| u16::from_le(flags) & NO_INTERRUPT != 0)
            .map_err(|_| DeviceError::Malformed("rings outside the guest's memory"))
    }
}
