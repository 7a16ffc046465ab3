//! What the driver can read about the disk (virtio 1.3, section 5.2.4).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};

use super::{
    backend::{Access, Geometry, Unmap},
    request::{MOST_SEGMENT_SECTORS, MOST_SEGMENTS, SECTOR},
};

/// Where the driver says whether it wants a write cache.
pub(super) const WRITEBACK: u64 = 32;
/// Bytes of the configuration.
const LENGTH: usize = 60;

/// The features of a disk.
pub(super) fn features(geometry: &Geometry, access: Access, queues: u16) -> u64 {
    let always = [
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_CONFIG_WCE,
    ];
    let sometimes = [
        (access == Access::ReadOnly, VIRTIO_BLK_F_RO),
        (queues > 1, VIRTIO_BLK_F_MQ),
        (geometry.discard_granularity.is_some(), VIRTIO_BLK_F_DISCARD),
        (geometry.can_write_zeroes, VIRTIO_BLK_F_WRITE_ZEROES),
    ];
    let sometimes = sometimes
        .into_iter()
        .filter_map(|(offered, bit)| offered.then_some(bit));
    always
        .into_iter()
        .chain(sometimes)
        .fold(0, |features, bit| features | 1 << bit)
}

/// The configuration of a disk as it lies in memory.
pub(super) struct Space {
    pub(super) geometry: Geometry,
    pub(super) unmap: Unmap,
    /// Bytes of the disk.
    pub(super) capacity: u64,
    pub(super) queues: u16,
    pub(super) queue_size: u16,
    /// Whether the disk may keep writes until the driver flushes them.
    pub(super) writeback: bool,
}

impl Space {
    pub(super) fn bytes(&self) -> [u8; LENGTH] {
        let geometry = &self.geometry;
        let block = geometry.block_size.max(1);
        let blocks = |size: u32| size / block;
        let mut bytes = [0; LENGTH];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &(self.capacity / SECTOR).to_le_bytes());
        put(12, &u32::from(seg_max(self.queue_size)).to_le_bytes());
        put(20, &block.to_le_bytes());
        let exponent = blocks(geometry.physical_block_size).max(1).ilog2();
        put(24, &[exponent as u8]);
        let least = u16::try_from(blocks(geometry.physical_block_size)).unwrap_or(u16::MAX);
        put(26, &least.to_le_bytes());
        put(28, &blocks(geometry.optimal_size).to_le_bytes());
        put(WRITEBACK as usize, &[self.writeback.into()]);
        put(34, &self.queues.to_le_bytes());
        if let Some(granularity) = geometry.discard_granularity {
            put(36, &MOST_SEGMENT_SECTORS.to_le_bytes());
            put(40, &MOST_SEGMENTS.to_le_bytes());
            put(44, &(granularity / SECTOR as u32).max(1).to_le_bytes());
        }
        if geometry.can_write_zeroes {
            put(48, &MOST_SEGMENT_SECTORS.to_le_bytes());
            put(52, &MOST_SEGMENTS.to_le_bytes());
            put(56, &[(self.unmap == Unmap::Allowed).into()]);
        }
        bytes
    }
}

/// The most buffers of data that a request has room for, beside its header and its status.
fn seg_max(queue_size: u16) -> u16 {
    queue_size.saturating_sub(2).max(1)
}
