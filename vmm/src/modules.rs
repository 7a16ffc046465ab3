//! Memory that comes as modules and stays: each is given to the hypervisor when it comes, out of an area above RAM that is mapped
//! in this process from the start, without memory behind it.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

use devices::modules::{Modules, NoSlot};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::{
    config::MemoryConfig,
    layout::Range,
    memory::{self, Piece},
    partition::{Partition, PartitionError},
};

/// What the length of a module is a multiple of: Linux takes no smaller blocks of memory (128 MiB).
pub(crate) const UNIT: u64 = 128 << 20;

/// Why a module does not come.
#[derive(Debug, thiserror::Error)]
pub enum ModuleError {
    /// Too many have come one by one.
    #[error("{0}; more at a time takes fewer of them")]
    Full(#[from] NoSlot),
    /// The area is used up.
    #[error("{asked} bytes more than the {left} that can still come")]
    Used {
        /// Bytes asked for.
        asked: u64,
        /// Bytes of the area that are left.
        left: u64,
    },
    /// The host has no memory for it.
    #[error("the host has no {mib} MiB of memory for it")]
    Host {
        /// MiB asked for.
        mib: u64,
        /// What the host said.
        source: io::Error,
    },
    /// The hypervisor does not take it.
    #[error(transparent)]
    Partition(#[from] PartitionError),
}

/// The area, and what of it the guest has.
pub(crate) struct ModuleArea {
    partition: Arc<Partition>,
    memory: GuestMemoryMmap,
    area: Piece,
    hugepages: bool,
    registers: Arc<Modules>,
    /// Bytes from the area's start on.
    used: Mutex<u64>,
}

impl ModuleArea {
    /// The area `range` of `memory`, with what the configuration has the guest begin with.
    pub(crate) fn new(
        partition: &Arc<Partition>,
        config: &MemoryConfig,
        memory: &GuestMemoryMmap,
        range: Range,
        registers: Arc<Modules>,
    ) -> Result<Self, ModuleError> {
        let region = memory.find_region(GuestAddress(range.start));
        let region = region.ok_or_else(|| ModuleError::Host {
            mib: range.length >> 20,
            source: io::ErrorKind::NotFound.into(),
        })?;
        let area = Self {
            partition: Arc::clone(partition),
            area: Piece::whole(region),
            memory: memory.clone(),
            hugepages: config.hugepages,
            registers,
            used: Mutex::new(0),
        };
        if config.hotplugged() > 0 {
            area.add(config.hotplugged())?;
        }
        Ok(area)
    }

    /// Bytes that have come.
    pub(crate) fn used(&self) -> u64 {
        *self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a module of `bytes`, a multiple of [`UNIT`], come.
    pub(crate) fn add(&self, bytes: u64) -> Result<(), ModuleError> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        if self.registers.is_full() {
            return Err(NoSlot.into());
        }
        let module = self.area.part(*used, bytes);
        let module = module.ok_or(ModuleError::Used {
            asked: bytes,
            left: self.area.length() - *used,
        })?;
        if self.hugepages {
            // An empty pool would be found out too late otherwise.
            let mib = bytes >> 20;
            memory::populate(&self.memory, module)
                .map_err(|source| ModuleError::Host { mib, source })?;
        }
        self.partition.map_memory(module)?;
        *used += bytes;
        self.registers.insert(module.gpa(), bytes)?;
        Ok(())
    }
}
