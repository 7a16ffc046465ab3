//! The guest's memory as a back end gets it: the file each region is a mapping of, and where it lies on both sides.

use vhost::{VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::Error;
use crate::virtio::VirtQueue;

/// Bytes of a descriptor, and of what a ring has for each entry and besides (virtio 1.3, section 2.7).
const DESCRIPTOR: usize = 16;
const AVAILABLE: (usize, usize) = (2, 6);
const USED: (usize, usize) = (8, 6);

/// The table of all regions.
///
/// # Errors
/// When a region is not a shared mapping of a file.
pub(super) fn table(memory: &GuestMemoryMmap) -> Result<Vec<VhostUserMemoryRegionInfo>, Error> {
    memory
        .iter()
        .map(|region| {
            if region.file_offset().is_none() || region.flags() & libc::MAP_SHARED == 0 {
                return Err(Error::PrivateMemory);
            }
            VhostUserMemoryRegionInfo::from_guest_region(region).map_err(|_| Error::PrivateMemory)
        })
        .collect()
}

/// Where the rings of `queue` are, in this process's addresses, as the protocol wants them.
///
/// # Errors
/// When one does not lie in one region.
pub(super) fn vring(memory: &GuestMemoryMmap, queue: &VirtQueue) -> Result<VringConfigData, Error> {
    let ring = queue.ring();
    let size = usize::from(ring.size());
    let locate = |address: u64, length: usize| {
        memory
            .get_slice(GuestAddress(address), length)
            .map(|slice| slice.ptr_guard().as_ptr() as u64)
            .map_err(|_| Error::Ring(queue.index()))
    };
    Ok(VringConfigData {
        queue_max_size: ring.max_size(),
        queue_size: ring.size(),
        flags: 0,
        desc_table_addr: locate(ring.desc_table(), DESCRIPTOR * size)?,
        avail_ring_addr: locate(ring.avail_ring(), AVAILABLE.0 * size + AVAILABLE.1)?,
        used_ring_addr: locate(ring.used_ring(), USED.0 * size + USED.1)?,
        log_addr: None,
    })
}
