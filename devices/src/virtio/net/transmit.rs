//! Frames of the guest: from the buffers that the driver has made available into a port.

use std::{io, sync::Arc};

use tracing::debug;

use super::{
    super::{Chain, DeviceError, VirtQueue, rate_limiter::Gate},
    backend::{FRAME, HEADER, Port, Trouble},
    counts::{Counts, TX_BYTES, TX_FRAMES},
};

/// How many frames are sent before other things get their turn.
const AT_ONCE: usize = 256;

/// Why no more frames are sent for now.
#[derive(Debug)]
pub enum Pause {
    /// There are none; the driver will kick.
    NoFrames,
    /// The port has no room.
    NoRoom,
    /// The rate limiter's timer runs.
    Rate,
    /// There may be more, but others are to have their turn.
    Turn,
    /// The port takes none any more; what the driver sends is lost.
    Gone(io::Error),
}

/// Where the frame that was taken out of the queue last has got to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Current {
    Sent,
    WaitsForRate,
    WaitsForRoom,
}

/// The transmit queue of a pair.
pub struct Transmitter {
    queue: VirtQueue,
    chain: Chain,
    current: Current,
    gate: Gate,
    counts: Arc<Counts>,
}

impl Transmitter {
    /// Sends what is in `queue`, at the rate that `gate` admits.
    #[must_use]
    pub fn new(queue: VirtQueue, gate: Gate, counts: Arc<Counts>) -> Self {
        Self {
            chain: queue.chain(),
            queue,
            current: Current::Sent,
            gate,
            counts,
        }
    }

    pub(super) fn queue(&self) -> &VirtQueue {
        &self.queue
    }

    pub(super) fn gate(&mut self) -> &mut Gate {
        &mut self.gate
    }

    /// Sends what the driver has made available. The driver hears of it.
    ///
    /// # Errors
    /// When the driver has broken a rule, or the host cannot go on.
    pub fn run(&mut self, port: &mut dyn Port) -> Result<Pause, DeviceError> {
        if self.gate.is_closed() {
            return Ok(Pause::Rate);
        }
        self.queue.disable_kicks()?;
        let pause = self.transmit(port)?;
        self.queue.signal()?;
        Ok(pause)
    }

    fn transmit(&mut self, port: &mut dyn Port) -> Result<Pause, DeviceError> {
        for _ in 0..AT_ONCE {
            if self.current == Current::Sent && !self.take()? {
                if self.queue.enable_kicks()? {
                    continue;
                }
                return Ok(Pause::NoFrames);
            }
            let frame = self.chain.readable.len().saturating_sub(HEADER);
            if FRAME.contains(&frame) {
                if self.current == Current::WaitsForRate && !self.admit(frame)? {
                    return Ok(Pause::Rate);
                }
                self.current = Current::WaitsForRoom;
                match port.send(&self.chain.readable) {
                    Ok(()) => {
                        self.counts.add(TX_FRAMES, 1);
                        self.counts.add(TX_BYTES, frame as u64);
                    }
                    Err(Trouble::Later) => return Ok(Pause::NoRoom),
                    Err(Trouble::Frame(error)) => debug!("a frame is not sent: {error}"),
                    Err(Trouble::Gone(error)) => {
                        self.answer()?;
                        return Ok(Pause::Gone(error));
                    }
                }
            } else {
                debug!("a frame of {frame} bytes is not sent");
            }
            self.answer()?;
        }
        Ok(Pause::Turn)
    }

    /// Takes frames out of the queue, and does nothing with them.
    pub(super) fn lose(&mut self) -> Result<Pause, DeviceError> {
        self.queue.disable_kicks()?;
        let pause = self.drain()?;
        self.queue.signal()?;
        Ok(pause)
    }

    fn drain(&mut self) -> Result<Pause, DeviceError> {
        for _ in 0..AT_ONCE {
            if self.current == Current::Sent && !self.take()? {
                if self.queue.enable_kicks()? {
                    continue;
                }
                return Ok(Pause::NoFrames);
            }
            self.answer()?;
        }
        Ok(Pause::Turn)
    }

    /// Takes the next frame out of the queue, if there is one.
    fn take(&mut self) -> Result<bool, DeviceError> {
        if !self.queue.pop(&mut self.chain)? {
            return Ok(false);
        }
        if self.chain.readable.len() < HEADER {
            return Err(DeviceError::Malformed("a frame without a header"));
        }
        self.current = Current::WaitsForRate;
        Ok(true)
    }

    fn admit(&mut self, frame: usize) -> Result<bool, DeviceError> {
        self.gate
            .admit(1, frame as u64)
            .map_err(DeviceError::host("cannot wait for the rate limiter"))
    }

    fn answer(&mut self) -> Result<(), DeviceError> {
        self.current = Current::Sent;
        self.queue.push(self.chain.head(), 0)
    }
}
