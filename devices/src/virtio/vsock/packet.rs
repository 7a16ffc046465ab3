//! The header of a vsock packet (virtio 1.3, section 5.10.6).

/// Bytes of a header.
pub(super) const HEADER: usize = 44;
/// The host, to its guests.
pub(super) const HOST_CID: u64 = 2;
/// `VIRTIO_VSOCK_TYPE_STREAM`.
pub(super) const STREAM: u16 = 1;
/// In the flags of [`Operation::Shutdown`]: who sends it receives no more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// In the flags of [`Operation::Shutdown`]: who sends it sends no more.
pub(super) const SHUTDOWN_SEND: u32 = 2;

/// What a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
    /// None that is known.
    Unknown,
}

const OPERATIONS: [Operation; 7] = [
    Operation::Request,
    Operation::Response,
    Operation::Reset,
    Operation::Shutdown,
    Operation::Data,
    Operation::CreditUpdate,
    Operation::CreditRequest,
];

impl Operation {
    fn from_code(code: u16) -> Self {
        usize::from(code)
            .checked_sub(1)
            .and_then(|index| OPERATIONS.get(index).copied())
            .unwrap_or(Self::Unknown)
    }

    fn code(self) -> u16 {
        (1..)
            .zip(OPERATIONS)
            .find(|(_, operation)| *operation == self)
            .map_or(0, |(code, _)| code)
    }
}

/// The two ends of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// A header, without what is the same in all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) ports: Ports,
    /// Bytes that follow.
    pub(super) length: u32,
    pub(super) operation: Operation,
    pub(super) flags: u32,
    /// Bytes that the sender has room for, all in all.
    pub(super) allocated: u32,
    /// Bytes that the sender has passed on, modulo 2^32.
    pub(super) forwarded: u32,
}

/// What a packet of the guest's is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Parsed {
    /// A packet of a stream, for the host.
    Packet(Header),
    /// One that the host does not know what to do with, but may refuse.
    Refused(Header),
    /// One that is not for the host, or not from the guest.
    Stray,
}

impl Header {
    /// Reads a packet's header; `cid` is the guest's.
    pub(super) fn parse(bytes: &[u8; HEADER], cid: u64) -> Parsed {
        let mut rest = &bytes[..];
        let source = take::<8>(&mut rest).map(u64::from_le_bytes);
        let destination = take::<8>(&mut rest).map(u64::from_le_bytes);
        if (source, destination) != (Some(cid), Some(HOST_CID)) {
            return Parsed::Stray;
        }
        let mut word = || take::<4>(&mut rest).map_or(0, u32::from_le_bytes);
        let (guest, host, length, kind) = (word(), word(), word(), word());
        let header = Self {
            ports: Ports { host, guest },
            length,
            operation: Operation::from_code((kind >> 16) as u16),
            flags: word(),
            allocated: word(),
            forwarded: word(),
        };
        if kind as u16 == STREAM {
            Parsed::Packet(header)
        } else {
            Parsed::Refused(header)
        }
    }

    /// The header as it goes to the guest `cid`.
    pub(super) fn to_bytes(self, cid: u64) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(&HOST_CID.to_le_bytes());
        bytes[8..16].copy_from_slice(&cid.to_le_bytes());
        let kind = u32::from(self.operation.code()) << 16 | u32::from(STREAM);
        let words = [
            self.ports.host,
            self.ports.guest,
            self.length,
            kind,
            self.flags,
            self.allocated,
            self.forwarded,
        ];
        for (place, word) in bytes[16..].chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (first, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*first)
}
