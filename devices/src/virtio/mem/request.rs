//! What the driver asks for, and what it is answered (virtio 1.3, section 5.15.6.2).

use crate::virtio::Buffers;

/// Bytes of a request: type, address, number of blocks, each padded to eight.
const REQUEST: usize = 24;
/// Bytes of an answer: type, padded to eight, and a state.
pub(super) const ANSWER: usize = 10;

/// Blocks that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Blocks {
    pub(super) address: u64,
    pub(super) count: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Plug(Blocks),
    Unplug(Blocks),
    UnplugAll,
    State(Blocks),
}

/// How blocks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plugged {
    All,
    None,
    Some,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Done,
    State(Plugged),
    /// It is more than was asked of the driver.
    TooMuch,
    /// The host cannot now.
    Busy,
    /// There are no such blocks, or they are not as the request takes them to be.
    Wrong,
}

impl Request {
    /// Reads a request; `None` when it is none that is known.
    pub(super) fn read(buffers: &Buffers) -> Option<Self> {
        let bytes: [u8; REQUEST] = buffers.array_at(0)?;
        let [kind_low, kind_high, _, _, _, _, _, _, rest @ ..] = bytes;
        let (address, rest) = rest.split_first_chunk::<8>()?;
        let (count, _) = rest.split_first_chunk::<2>()?;
        let blocks = Blocks {
            address: u64::from_le_bytes(*address),
            count: u16::from_le_bytes(*count),
        };
        match u16::from_le_bytes([kind_low, kind_high]) {
            0 => Some(Self::Plug(blocks)),
            1 => Some(Self::Unplug(blocks)),
            2 => Some(Self::UnplugAll),
            3 => Some(Self::State(blocks)),
            _ => None,
        }
    }
}

impl Answer {
    pub(super) fn to_bytes(self) -> [u8; ANSWER] {
        let (kind, state) = match self {
            Self::Done => (0, 0),
            Self::TooMuch => (1, 0),
            Self::Busy => (2, 0),
            Self::Wrong => (3, 0),
            Self::State(Plugged::All) => (0, 0),
            Self::State(Plugged::None) => (0, 1),
            Self::State(Plugged::Some) => (0, 2),
        };
        [kind, 0, 0, 0, 0, 0, 0, 0, state, 0]
    }
}
