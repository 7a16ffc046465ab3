//! A request as the driver lays it out: a header of 16 bytes to be read, the data, and one byte for the status, the last that
//! can be written (virtio 1.3, section 5.2.6).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::{
    Disk,
    backend::{Access, Unmap},
};
use crate::virtio::{Buffers, Chain, DeviceError};

/// Bytes of a sector, which is what the driver counts in.
pub(super) const SECTOR: u64 = 512;
/// Bytes of the header.
const HEADER: usize = 16;
/// Bytes of a segment, which is what discards and zeroes are asked for in.
const SEGMENT: usize = 16;
/// The most segments of a request.
pub(super) const MOST_SEGMENTS: u32 = 32;
/// The most sectors of a segment: 2 GiB.
pub(super) const MOST_SEGMENT_SECTORS: u32 = 1 << 22;

/// How a request ended, as the driver reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    Failed = 1,
    Unsupported = 2,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// From the byte at this offset on.
    Read(u64),
    /// To the byte at this offset on.
    Write(u64),
    Flush,
    Identify,
    Discard,
    WriteZeroes,
    /// Nothing: it is answered at once.
    Answered(Status),
}

/// What a request is checked against.
pub(super) struct Rules {
    /// Bytes of the disk.
    pub(super) capacity: u64,
    pub(super) access: Access,
    /// What the driver has agreed on.
    pub(super) features: u64,
    /// What offsets and lengths of data must be multiples of.
    pub(super) alignment: u64,
    /// Whether space may be given back.
    pub(super) unmap: Unmap,
}

impl Request {
    /// Reads the request in `chain`. The header goes to `header` (unless there is no data behind it) and the status byte to
    /// `status`, so that what is left in `chain` is the data.
    ///
    /// # Errors
    /// When there is no room for a status.
    pub(super) fn take(
        chain: &mut Chain,
        header: &mut Buffers,
        status: &mut Buffers,
        rules: &Rules,
    ) -> Result<Self, DeviceError> {
        if chain.writable.is_empty() {
            return Err(DeviceError::Malformed("a request without a status byte"));
        }
        chain.writable.split_back(1, status);
        let Some(bytes) = chain.readable.array_at::<HEADER>(0) else {
            return Ok(Self::Answered(Status::Failed));
        };
        let [a, b, c, d, _, _, _, _, sector @ ..] = bytes;
        let (kind, sector) = (u32::from_le_bytes([a, b, c, d]), u64::from_le_bytes(sector));
        if kind != VIRTIO_BLK_T_IN {
            chain.readable.split_front(HEADER, header);
        }
        Ok(Self::parse(kind, sector, chain, rules))
    }

    fn parse(kind: u32, sector: u64, chain: &Chain, rules: &Rules) -> Self {
        let has = |bit: u32| rules.features & (1 << bit) != 0;
        match kind {
            VIRTIO_BLK_T_IN => rules
                .data(sector, chain.writable.len())
                .map_or(Self::Answered(Status::Failed), Self::Read),
            VIRTIO_BLK_T_OUT if rules.access == Access::ReadOnly => Self::Answered(Status::Failed),
            VIRTIO_BLK_T_OUT => rules
                .data(sector, chain.readable.len())
                .map_or(Self::Answered(Status::Failed), Self::Write),
            VIRTIO_BLK_T_FLUSH => Self::Flush,
            VIRTIO_BLK_T_GET_ID => Self::Identify,
            VIRTIO_BLK_T_DISCARD if has(VIRTIO_BLK_F_DISCARD) => {
                Self::segmented(Self::Discard, chain, rules)
            }
            VIRTIO_BLK_T_WRITE_ZEROES if has(VIRTIO_BLK_F_WRITE_ZEROES) => {
                Self::segmented(Self::WriteZeroes, chain, rules)
            }
            _ => Self::Answered(Status::Unsupported),
        }
    }

    fn segmented(request: Self, chain: &Chain, rules: &Rules) -> Self {
        let length = chain.readable.len();
        let most = SEGMENT * MOST_SEGMENTS as usize;
        let whole = length > 0 && length <= most && length.is_multiple_of(SEGMENT);
        if whole && rules.access == Access::ReadWrite {
            request
        } else {
            Self::Answered(Status::Failed)
        }
    }
}

impl Rules {
    /// Those for a driver of `disk` that has agreed on `features`.
    pub(super) fn new(disk: &Disk, unmap: Unmap, features: u64) -> Self {
        let alignment = match disk.geometry.memory_alignment {
            1 => 1,
            _ => disk.geometry.block_size,
        };
        Self {
            capacity: 0,
            access: disk.image.access(),
            features,
            alignment: alignment.into(),
            unmap,
        }
    }

    /// The offset of `length` bytes of data at `sector`, if they are on the disk.
    fn data(&self, sector: u64, length: usize) -> Option<u64> {
        let length = u64::try_from(length).ok()?;
        let offset = self.range(sector, length)?;
        let aligned = (offset | length).is_multiple_of(self.alignment);
        (aligned && length.is_multiple_of(SECTOR)).then_some(offset)
    }

    fn range(&self, sector: u64, length: u64) -> Option<u64> {
        let offset = sector.checked_mul(SECTOR)?;
        (offset.checked_add(length)? <= self.capacity).then_some(offset)
    }
}

/// A piece of the disk to discard, or to fill with zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// In bytes.
    pub(super) offset: u64,
    /// In bytes.
    pub(super) length: u64,
    pub(super) unmap: Unmap,
}

impl Segment {
    /// Segment `index` of a `request` with this `data`; `None` behind the last.
    ///
    /// # Errors
    /// How the request ends when the segment is not a good one.
    pub(super) fn read(
        request: Request,
        data: &Buffers,
        index: u32,
        rules: &Rules,
    ) -> Result<Option<Self>, Status> {
        let Some(bytes) = data.array_at::<SEGMENT>(SEGMENT * index as usize) else {
            return Ok(None);
        };
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let sector = u64::from(word(4)) << 32 | u64::from(word(0));
        let (sectors, flags) = (word(8), word(12));
        let known = match request {
            Request::WriteZeroes => VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
            _ => 0,
        };
        if flags & !known != 0 {
            return Err(Status::Unsupported);
        }
        let length = u64::from(sectors) * SECTOR;
        let offset = rules.range(sector, length).ok_or(Status::Failed)?;
        if sectors > MOST_SEGMENT_SECTORS {
            return Err(Status::Failed);
        }
        Ok(Some(Self {
            offset,
            length,
            unmap: match flags {
                0 => Unmap::Forbidden,
                _ => rules.unmap,
            },
        }))
    }
}
