//! Memory of devices that the guest reaches without them: where in its address space there is room, and what lies there.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tracing::warn;
use vm_allocator::{AddressAllocator, AllocPolicy, RangeInclusive};
use vm_memory::GuestRegionMmap;

use crate::{
    layout::Range,
    memory::Piece,
    partition::{Partition, PartitionError},
};

/// The area of the guest's address space that is for memory of devices.
pub(super) struct DeviceMemory {
    partition: Arc<Partition>,
    /// None where the host's addresses end before it.
    addresses: Mutex<Option<AddressAllocator>>,
}

impl DeviceMemory {
    pub(super) fn new(partition: Arc<Partition>, area: Range) -> Self {
        let addresses = AddressAllocator::new(area.start, area.length).ok();
        Self {
            partition,
            addresses: Mutex::new(addresses),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<AddressAllocator>> {
        self.addresses
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Addresses for `length` bytes, from a multiple of `alignment` on; none where there are not so many.
    pub(super) fn reserve(self: &Arc<Self>, length: u64, alignment: u64) -> Option<Reserved> {
        let addresses = self
            .lock()
            .as_mut()?
            .allocate(length, alignment, AllocPolicy::FirstMatch)
            .ok()?;
        Some(Reserved {
            area: Arc::clone(self),
            addresses,
        })
    }
}

/// Addresses that nothing else gets.
pub(super) struct Reserved {
    area: Arc<DeviceMemory>,
    addresses: RangeInclusive,
}

impl Reserved {
    pub(super) fn range(&self) -> Range {
        Range {
            start: self.addresses.start(),
            length: self.addresses.len(),
        }
    }

    /// Lets the guest have `region`, which was mapped for these addresses.
    ///
    /// # Errors
    /// What the hypervisor refuses.
    pub(super) fn lend(self, region: GuestRegionMmap) -> Result<Lent, PartitionError> {
        let piece = Piece::whole(&region);
        self.area.partition.map_memory(piece)?;
        Ok(Lent {
            piece,
            region: Some(region),
            addresses: Some(self),
        })
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if let Some(allocator) = self.area.lock().as_mut()
            && let Err(error) = allocator.free(&self.addresses)
        {
            warn!("addresses of a device's memory do not get free: {error}");
        }
    }
}

/// Memory that the guest has until this is dropped.
pub(crate) struct Lent {
    piece: Piece,
    region: Option<GuestRegionMmap>,
    addresses: Option<Reserved>,
}

impl Drop for Lent {
    fn drop(&mut self) {
        let Some(addresses) = self.addresses.take() else {
            return;
        };
        if let Err(error) = addresses.area.partition.unmap_memory(self.piece) {
            warn!("a device's memory stays the guest's: {error}");
            // Nothing else may come to where the guest still reads and writes.
            std::mem::forget((addresses, self.region.take()));
        }
    }
}
