//! The part of the guest's address space that memory BARs lie in.

use std::sync::Arc;

use super::PciBus;
use crate::BusDevice;

/// A window to the BARs of a bus.
pub struct Window {
    bus: Arc<PciBus>,
    start: u64,
}

impl Window {
    /// The window from guest physical address `start` on.
    pub fn new(bus: Arc<PciBus>, start: u64) -> Self {
        Self { bus, start }
    }

    /// Shows `visit` the BAR at `offset` of the window, with the offset in it and how many bytes of it follow.
    fn find(&self, offset: u64, visit: impl FnOnce(&super::Function, u64, u64)) {
        let address = self.start.saturating_add(offset);
        let mappings = self.bus.mappings.load();
        let index = mappings.partition_point(|mapping| mapping.last < address);
        if let Some(mapping) = mappings
            .get(index)
            .filter(|mapping| mapping.first <= address)
        {
            let rest = mapping.last - address + 1;
            visit(&mapping.function, address - mapping.first, rest);
        }
    }
}

impl BusDevice for Window {
    /// Bytes that no BAR answers are all ones; so is what an access has behind the BAR that it starts in.
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        self.find(offset, |function, at, rest| {
            let length = usize::try_from(rest).map_or(data.len(), |rest| rest.min(data.len()));
            function.bar_read(at, &mut data[..length]);
        });
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.find(offset, |function, at, rest| {
            let length = usize::try_from(rest).map_or(data.len(), |rest| rest.min(data.len()));
            function.bar_write(at, &data[..length]);
        });
    }
}
