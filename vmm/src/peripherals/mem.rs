//! Memory that comes and goes: a block is the guest's from when its driver has plugged it until it unplugs it.
//!
//! Each block is given to the hypervisor by itself, so that one whose driver pins guest memory takes no more of the host's than is
//! plugged, and lets go of what is unplugged before that goes back to the host. In this process all of the region is mapped from
//! the start, without memory behind it. A guest that breaks the rules can have devices, and the emulator of its instructions,
//! touch blocks that it has not plugged, and so get at most what it could have been given.

use std::{
    collections::BTreeSet,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use devices::{
    pci::Slot,
    virtio::{
        HostMemory, Reclaim,
        mem::{BLOCK, Backing, Mem},
    },
};
use tracing::warn;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::{Handle, PeripheralError, Plug};
use crate::{
    config::MemoryConfig,
    layout::Range,
    memory::{self, Piece},
    partition::Partition,
};

/// What the device is called.
pub(crate) const NAME: &str = "mem";

/// Plugs in the device for the region `range`.
pub(super) fn plug(
    plug: &Plug,
    config: &MemoryConfig,
    range: Range,
) -> Result<Slot, PeripheralError> {
    let failed = |source| PeripheralError::Host {
        device: NAME.into(),
        source,
    };
    let supply = if config.hugepages {
        Supply::AtOnce
    } else {
        Supply::WhenTouched
    };
    let partition = Arc::clone(&plug.partition);
    let blocks = Blocks::new(partition, &plug.memory, range, supply).map_err(failed)?;
    let device = Mem::new(
        range.start,
        range.length,
        config.hotplugged(),
        Arc::new(blocks),
    )
    .map_err(|error| failed(io::Error::other(error)))?;
    let handle = Handle::Memory(device.handle());
    plug.virtio_with(NAME, Box::new(device), handle)
}

/// When the host is to find the memory of a block.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Supply {
    /// When the block is plugged: a pool that is empty then would be found out too late otherwise.
    AtOnce,
    /// When the guest touches it.
    WhenTouched,
}

/// The region, and which blocks of it the guest has.
struct Blocks {
    partition: Arc<Partition>,
    memory: GuestMemoryMmap,
    host: HostMemory,
    region: Piece,
    supply: Supply,
    /// Guest physical addresses of the blocks that the hypervisor has.
    mapped: Mutex<BTreeSet<u64>>,
}

impl Blocks {
    fn new(
        partition: Arc<Partition>,
        memory: &GuestMemoryMmap,
        range: Range,
        supply: Supply,
    ) -> io::Result<Self> {
        let region = memory.find_region(GuestAddress(range.start));
        let region = region.ok_or(io::ErrorKind::NotFound)?;
        Ok(Self {
            partition,
            host: HostMemory::new(memory)?,
            region: Piece::whole(region),
            memory: memory.clone(),
            supply,
            mapped: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The blocks in `length` bytes from `address` on.
    fn blocks(&self, address: u64, length: u64) -> impl Iterator<Item = Piece> + use<> {
        let end = address.saturating_add(length);
        self.region
            .split(BLOCK)
            .filter(move |block| (address..end).contains(&block.gpa()))
    }

    fn map(&self, block: Piece, mapped: &mut BTreeSet<u64>) -> io::Result<()> {
        if self.supply == Supply::AtOnce {
            memory::populate(&self.memory, block)?;
        }
        self.partition.map_memory(block).map_err(io::Error::other)?;
        mapped.insert(block.gpa());
        Ok(())
    }

    fn unmap(&self, block: Piece, mapped: &mut BTreeSet<u64>) -> io::Result<()> {
        self.partition
            .unmap_memory(block)
            .map_err(io::Error::other)?;
        mapped.remove(&block.gpa());
        Ok(())
    }
}

impl Backing for Blocks {
    fn plug(&self, address: u64, length: u64) -> io::Result<()> {
        let mut mapped = self.lock();
        let mut done = Vec::new();
        for block in self.blocks(address, length) {
            if let Err(error) = self.map(block, &mut mapped) {
                for block in done {
                    self.unmap(block, &mut mapped)
                        .unwrap_or_else(|error| warn!("{NAME}: {error}"));
                }
                return Err(error);
            }
            done.push(block);
        }
        Ok(())
    }

    fn unplug(&self, address: u64, length: u64) -> io::Result<()> {
        let mut mapped = self.lock();
        let blocks: Vec<Piece> = self
            .blocks(address, length)
            .filter(|block| mapped.contains(&block.gpa()))
            .collect();
        let mut result = blocks
            .iter()
            .try_for_each(|block| self.unmap(*block, &mut mapped));
        if result.is_ok() {
            result = self.host.reclaim(address, length);
        }
        if result.is_err() {
            // The guest is told that it has them still.
            for block in blocks {
                if !mapped.contains(&block.gpa()) {
                    self.map(block, &mut mapped)
                        .unwrap_or_else(|error| warn!("{NAME}: {error}"));
                }
            }
        }
        result
    }
}
