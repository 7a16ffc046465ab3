//! Frames for the guest: from a port into the buffers that the driver has made available.
//!
//! Buffers are taken out of the queue ahead of the frame, since nobody says how long the next one will be, and the kernel
//! writes straight into as many of them as it takes. Those that are left wait for the next frame.

use std::{collections::VecDeque, io, sync::Arc};

use arc_swap::ArcSwap;
use tracing::debug;
use virtio_queue::QueueT;

use super::{
    super::{Buffers, Chain, DeviceError, VirtQueue, rate_limiter::Gate},
    backend::{HEADER, NUM_BUFFERS, Port, Received, Trouble},
    counts::{Counts, RX_BYTES, RX_FRAMES},
    filter::Filter,
};

/// How many frames are taken before other things get their turn.
const AT_ONCE: usize = 256;
/// From this many buffers on, no more are taken ahead. The longest frame takes fewer, if each has room for a header.
const MOST_VECTORS: usize = 8192;

/// How many chains of buffers a frame may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chains {
    /// One, in which it fits or is lost.
    One,
    /// As many as it needs (`VIRTIO_NET_F_MRG_RXBUF`).
    Any,
}

/// Why no more frames are received for now.
#[derive(Debug)]
pub enum Pause {
    /// There are none.
    NoFrames,
    /// The driver has not made enough buffers available; it will kick.
    NoBuffers,
    /// The rate limiter's timer runs.
    Rate,
    /// There may be more, but others are to have their turn.
    Turn,
    /// Nothing comes any more.
    Gone(io::Error),
}

/// A chain in the room that a frame may be received into.
struct Held {
    head: u16,
    length: usize,
}

/// The receive queue of a pair.
pub struct Receiver {
    queue: VirtQueue,
    chain: Chain,
    room: Buffers,
    held: VecDeque<Held>,
    answers: Vec<(u16, u32)>,
    chains: Chains,
    /// Bytes of room that are gathered for a frame whose length is not known.
    usual: usize,
    gate: Gate,
    /// A packet of so many bytes is in the room, but not yet let through by the gate.
    waiting: Option<usize>,
    filter: Arc<ArcSwap<Filter>>,
    counts: Arc<Counts>,
}

impl Receiver {
    /// Receives what passes `filter` into `queue`, at the rate that `gate` admits. Packets usually take no more than `usual`
    /// bytes.
    #[must_use]
    pub fn new(
        queue: VirtQueue,
        chains: Chains,
        usual: usize,
        gate: Gate,
        filter: Arc<ArcSwap<Filter>>,
        counts: Arc<Counts>,
    ) -> Self {
        Self {
            chain: queue.chain(),
            room: queue.chain().writable,
            queue,
            held: VecDeque::new(),
            answers: Vec::new(),
            chains,
            usual,
            gate,
            waiting: None,
            filter,
            counts,
        }
    }

    pub(super) fn queue(&self) -> &VirtQueue {
        &self.queue
    }

    pub(super) fn gate(&mut self) -> &mut Gate {
        &mut self.gate
    }

    /// Receives what `port` has. The driver hears of it.
    ///
    /// # Errors
    /// When the driver has broken a rule, or the host cannot go on.
    pub fn run(&mut self, port: &mut dyn Port) -> Result<Pause, DeviceError> {
        if self.gate.is_closed() {
            return Ok(Pause::Rate);
        }
        self.queue.disable_kicks()?;
        let pause = self.receive(port)?;
        self.queue.signal()?;
        Ok(pause)
    }

    fn receive(&mut self, port: &mut dyn Port) -> Result<Pause, DeviceError> {
        let filters = Arc::clone(&self.filter);
        let filter = filters.load();
        let mut needed = 0;
        for _ in 0..AT_ONCE {
            if let Some(length) = self.waiting.take()
                && !self.deliver(length)?
            {
                return Ok(Pause::Rate);
            }
            self.gather(self.usual.max(needed))?;
            if self.room.is_empty() || self.room.len() < needed {
                if self.room.is_empty() || self.can_hold_more() {
                    if self.queue.enable_kicks()? {
                        continue;
                    }
                    return Ok(Pause::NoBuffers);
                }
                debug!("a packet of {needed} bytes is longer than what the guest can take");
                port.discard();
            }
            needed = 0;
            match port.receive(&self.room) {
                Ok(Received::Packet(length)) if length <= self.room.len() => {
                    if self.is_wanted(&filter) && !self.deliver(length)? {
                        return Ok(Pause::Rate);
                    }
                }
                Ok(Received::Packet(length) | Received::Larger(length)) => needed = length,
                Err(Trouble::Later) => return Ok(Pause::NoFrames),
                Err(Trouble::Frame(error)) => debug!("a frame is lost: {error}"),
                Err(Trouble::Gone(error)) => return Ok(Pause::Gone(error)),
            }
        }
        Ok(Pause::Turn)
    }

    /// Takes buffers out of the queue until there are `wanted` bytes, or no more to be had.
    fn gather(&mut self, wanted: usize) -> Result<(), DeviceError> {
        while self.room.len() < wanted && self.can_hold_more() && self.queue.pop(&mut self.chain)? {
            let length = self.chain.writable.len();
            if length < HEADER {
                return Err(DeviceError::Malformed(
                    "a receive buffer without room for the header",
                ));
            }
            self.held.push_back(Held {
                head: self.chain.head(),
                length,
            });
            self.room.append(&mut self.chain.writable);
        }
        Ok(())
    }

    fn can_hold_more(&self) -> bool {
        match self.chains {
            Chains::One => self.held.is_empty(),
            Chains::Any => {
                self.held.len() < usize::from(self.queue.ring().size())
                    && self.room.vectors().len() < MOST_VECTORS
            }
        }
    }

    fn is_wanted(&self, filter: &Filter) -> bool {
        if filter.is_open() {
            return true;
        }
        let mut start = [0; 16];
        self.room.read_at(HEADER, &mut start);
        filter.passes(&start)
    }

    /// Gives the packet in the first `length` bytes of the room to the driver. Returns whether the gate has let it through.
    fn deliver(&mut self, length: usize) -> Result<bool, DeviceError> {
        let frame = length.saturating_sub(HEADER) as u64;
        let admitted = self
            .gate
            .admit(1, frame)
            .map_err(DeviceError::host("cannot wait for the rate limiter"))?;
        if !admitted {
            self.waiting = Some(length);
            return Ok(false);
        }
        self.answers.clear();
        let (mut left, mut taken) = (length, 0);
        while left > 0
            && let Some(held) = self.held.pop_front()
        {
            let written = held.length.min(left);
            self.answers.push((held.head, written as u32));
            left -= written;
            taken += held.length;
        }
        let count = self.answers.len() as u16;
        self.room.write_at(NUM_BUFFERS, &count.to_le_bytes());
        self.room.skip_front(taken);
        self.counts.add(RX_FRAMES, 1);
        self.counts.add(RX_BYTES, frame);
        self.queue.push_together(&self.answers)?;
        Ok(true)
    }
}
