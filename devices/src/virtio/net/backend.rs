//! What a network device needs of the host: a [`Cable`] with a [`Port`] for each pair of queues.

use std::{io, os::fd::RawFd, sync::Arc};

use super::super::Buffers;

/// Bytes of the header in front of each frame (`struct virtio_net_hdr_v1`, virtio 1.3, section 5.1.6).
pub const HEADER: usize = 12;
/// Where the header counts the buffers that a frame takes.
pub(super) const NUM_BUFFERS: usize = 10;
/// The least and the most bytes of a frame: an Ethernet header; with a VLAN tag and the longest IP packet.
pub(super) const FRAME: std::ops::RangeInclusive<usize> = 14..=18 + 65535;

/// The host's end of a device.
pub struct Cable {
    /// What concerns all of it.
    pub backend: Arc<dyn Backend>,
    /// One for each pair of queues; not empty.
    pub ports: Vec<Box<dyn Port>>,
}

/// What all ports of a device have in common.
pub trait Backend: Send + Sync {
    /// Those of the device's features that it takes the back end to carry out: checksums and segmentation.
    fn features(&self) -> u64;

    /// The driver takes frames with these of [`Backend::features`] from now on.
    ///
    /// # Errors
    /// What the host says.
    fn set_offloads(&self, features: u64) -> io::Result<()>;

    /// Lets frames come through port `pair`. All ports are attached in the beginning.
    ///
    /// # Errors
    /// What the host says.
    fn attach(&self, pair: usize) -> io::Result<()>;

    /// Lets no frames come through port `pair` any more: those behind the others take them.
    ///
    /// # Errors
    /// What the host says.
    fn detach(&self, pair: usize) -> io::Result<()>;
}

/// Where the frames of a pair of queues come from and go to. Nothing here waits.
pub trait Port: Send {
    /// Readable when there are frames, writable when there is room for them.
    fn descriptor(&self) -> RawFd;

    /// Sends what is in `packet`: the header and a frame of 14 to 65553 bytes.
    ///
    /// # Errors
    /// When it was not sent.
    fn send(&mut self, packet: &Buffers) -> Result<(), Trouble>;

    /// Puts the next header and frame into `room`. The header's count of buffers is not its business.
    ///
    /// # Errors
    /// When there is none.
    fn receive(&mut self, room: &Buffers) -> Result<Received, Trouble>;

    /// Forgets the frame that there was not enough room for.
    fn discard(&mut self);

    /// Whether a part of a frame is still to be sent.
    fn has_unsent(&self) -> bool {
        false
    }

    /// Sends what is still to be sent.
    ///
    /// # Errors
    /// When some of it is still there.
    fn flush(&mut self) -> Result<(), Trouble> {
        Ok(())
    }
}

/// What has become of a frame for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// Header and frame of so many bytes are in the room.
    Packet(usize),
    /// They need so many bytes of room, and are kept until there is enough, or they are discarded.
    Larger(usize),
}

/// Why a frame does not get through.
#[derive(Debug)]
pub enum Trouble {
    /// The other side is not ready.
    Later,
    /// It is something about this frame.
    Frame(io::Error),
    /// The other side is not there any more.
    Gone(io::Error),
}
