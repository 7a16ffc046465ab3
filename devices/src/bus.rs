//! The port and MMIO buses: which device answers an address.
//!
//! A bus is filled while the machine is built and only read afterwards, so a look-up is a binary search without a lock;
//! devices lock inside themselves, for as long as they need.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use thiserror::Error;

/// A device that answers a range of addresses.
///
/// Offsets count from the start of the range the device was inserted at, and an access never leaves that range: the bus
/// cuts accesses that straddle a device's end. Any length can arrive, 0 included.
pub trait BusDevice: Send + Sync {
    /// Fills `data` with what the guest reads at `offset`.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes what the guest writes at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a device cannot have a range of addresses.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BusError {
    /// Another device has some of it.
    #[error(
        "{bus} bus: {name} at {base:#x}+{length:#x} overlaps {other} at {other_base:#x}+{other_length:#x}"
    )]
    Overlap {
        /// The bus.
        bus: &'static str,
        /// The device to be inserted.
        name: String,
        /// Its first address.
        base: u64,
        /// Its length in bytes.
        length: u64,
        /// The device that is there.
        other: String,
        /// First address of the other.
        other_base: u64,
        /// Length of the other in bytes.
        other_length: u64,
    },
    /// The range is empty or goes beyond the last address.
    #[error("{bus} bus: {name} cannot have the range {base:#x}+{length:#x}")]
    Range {
        /// The bus.
        bus: &'static str,
        /// The device to be inserted.
        name: String,
        /// Its first address.
        base: u64,
        /// Its length in bytes.
        length: u64,
    },
}

struct Slot {
    base: u64,
    /// Last address, inclusive, so that a range can reach the end of the address space.
    last: u64,
    name: String,
    device: Arc<dyn BusDevice>,
}

/// Devices by address, without overlap.
pub struct Bus {
    name: &'static str,
    /// Sorted by `base`.
    slots: Vec<Slot>,
    unclaimed: AtomicU64,
}

impl Bus {
    /// A bus without devices; `name` appears in errors.
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            slots: Vec::new(),
            unclaimed: AtomicU64::new(0),
        }
    }

    /// Gives `device` the `length` addresses from `base`.
    ///
    /// # Errors
    /// When the range is empty, does not end within the address space, or overlaps another device's.
    pub fn insert(
        &mut self,
        base: u64,
        length: u64,
        name: impl Into<String>,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), BusError> {
        let (bus, name) = (self.name, name.into());
        let Some(last) = length
            .checked_sub(1)
            .and_then(|span| base.checked_add(span))
        else {
            return Err(BusError::Range {
                bus,
                name,
                base,
                length,
            });
        };
        // The first slot that does not end before the new one is the only place where it fits, or what it hits.
        let index = self.slots.partition_point(|slot| slot.last < base);
        if let Some(slot) = self.slots.get(index).filter(|slot| slot.base <= last) {
            return Err(BusError::Overlap {
                bus,
                name,
                base,
                length,
                other: slot.name.clone(),
                other_base: slot.base,
                other_length: (slot.last - slot.base).saturating_add(1),
            });
        }
        self.slots.insert(
            index,
            Slot {
                base,
                last,
                name,
                device,
            },
        );
        Ok(())
    }

    /// Reads at `address`; bytes that no device answers are all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        if let Some((slot, offset)) = self.whole(address, data.len()) {
            return slot.device.read(offset, data);
        }
        let mut done = 0;
        let mut missed = data.is_empty();
        while done < data.len() {
            let piece = self.piece(address, done, data.len());
            let bytes = &mut data[done..done + piece.length];
            match piece.target {
                Some((slot, offset)) => slot.device.read(offset, bytes),
                None => {
                    bytes.fill(0xff);
                    missed = true;
                }
            }
            done += piece.length;
        }
        self.count(missed);
    }

    /// Writes at `address`; bytes that no device answers are ignored.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((slot, offset)) = self.whole(address, data.len()) {
            return slot.device.write(offset, data);
        }
        let mut done = 0;
        let mut missed = data.is_empty();
        while done < data.len() {
            let piece = self.piece(address, done, data.len());
            match piece.target {
                Some((slot, offset)) => slot.device.write(offset, &data[done..done + piece.length]),
                None => missed = true,
            }
            done += piece.length;
        }
        self.count(missed);
    }

    /// Accesses so far of which at least one byte met no device.
    pub fn unclaimed(&self) -> u64 {
        self.unclaimed.load(Ordering::Relaxed)
    }

    fn count(&self, missed: bool) {
        if missed {
            self.unclaimed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The first slot that ends at or behind `address`.
    fn slot_from(&self, address: u64) -> Option<&Slot> {
        self.slots
            .get(self.slots.partition_point(|slot| slot.last < address))
    }

    /// The slot that answers the whole access, which is nearly every access.
    fn whole(&self, address: u64, length: usize) -> Option<(&Slot, u64)> {
        let last = address.checked_add((length as u64).saturating_sub(1))?;
        let slot = self.slot_from(address)?;
        (slot.base <= address && last <= slot.last).then(|| (slot, address - slot.base))
    }

    /// What answers an access of `length` bytes from its byte `done` on, and for how many bytes.
    fn piece(&self, address: u64, done: usize, length: usize) -> Piece<'_> {
        let rest = length - done;
        let within = |span: u64| usize::try_from(span).map_or(rest, |span| span.min(rest));
        // Bytes beyond the last address of all belong to nobody.
        let Some(start) = address.checked_add(done as u64) else {
            return Piece {
                target: None,
                length: rest,
            };
        };
        match self.slot_from(start) {
            Some(slot) if slot.base <= start => Piece {
                target: Some((slot, start - slot.base)),
                length: within((slot.last - start).saturating_add(1)),
            },
            Some(slot) => Piece {
                target: None,
                length: within(slot.base - start),
            },
            None => Piece {
                target: None,
                length: rest,
            },
        }
    }
}

struct Piece<'a> {
    /// The device and the offset in it.
    target: Option<(&'a Slot, u64)>,
    length: usize,
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Answers reads with the low byte of each offset and remembers writes.
    #[derive(Default)]
    struct Echo(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            for (index, byte) in data.iter_mut().enumerate() {
                *byte = (offset + index as u64) as u8;
            }
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    impl Echo {
        fn writes(&self) -> Vec<(u64, Vec<u8>)> {
            self.0.lock().unwrap().clone()
        }
    }

    #[test]
    fn an_access_reaches_the_device_at_its_offset() {
        let device = Arc::new(Echo::default());
        let mut bus = Bus::new("port");
        bus.insert(0x3f8, 8, "com1", device.clone()).unwrap();
        let mut byte = [0];
        bus.read(0x3ff, &mut byte);
        assert_eq!(byte, [7]);
        bus.write(0x3f8, b"ab");
        assert_eq!(device.writes(), [(0, b"ab".to_vec())]);
        assert_eq!(bus.unclaimed(), 0);
    }

    #[test]
    fn nothing_reads_all_ones_and_is_counted_once_per_access() {
        let mut bus = Bus::new("port");
        bus.insert(0x10, 4, "echo", Arc::new(Echo::default()))
            .unwrap();
        for (address, length) in [
            (0, 1),
            (0xf, 1),
            (0x14, 4),
            (u64::MAX, 1),
            (u64::MAX, 8),
            (0x1000, 3),
        ] {
            let mut data = vec![0; length];
            bus.read(address, &mut data);
            assert_eq!(data, vec![0xff; length]);
        }
        bus.write(0x14, &[1, 2]);
        assert_eq!(bus.unclaimed(), 7);
        assert_eq!(Bus::new("empty").slots.len(), 0);
        Bus::new("empty").read(0, &mut [0]);
    }

    #[test]
    fn an_access_that_straddles_devices_is_cut() {
        let (low, high) = (Arc::new(Echo::default()), Arc::new(Echo::default()));
        let mut bus = Bus::new("port");
        bus.insert(0x10, 4, "low", low.clone()).unwrap();
        bus.insert(0x16, 2, "high", high.clone()).unwrap();
        let mut data = [0; 8];
        bus.read(0x12, &mut data);
        assert_eq!(data, [2, 3, 0xff, 0xff, 0, 1, 0xff, 0xff]);
        bus.write(0x12, &[1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(low.writes(), [(2, vec![1, 2])]);
        assert_eq!(high.writes(), [(0, vec![5, 6])]);
        assert_eq!(bus.unclaimed(), 2);
    }

    #[test]
    fn the_end_of_the_address_space_is_an_end() {
        let device = Arc::new(Echo::default());
        let mut bus = Bus::new("mmio");
        bus.insert(u64::MAX - 1, 2, "last", device.clone()).unwrap();
        let mut data = [0; 4];
        bus.read(u64::MAX - 1, &mut data);
        assert_eq!(data, [0, 1, 0xff, 0xff]);
        bus.write(u64::MAX, &[9, 9]);
        assert_eq!(device.writes(), [(1, vec![9])]);

        let mut all = Bus::new("mmio");
        all.insert(0, u64::MAX, "all but one", Arc::new(Echo::default()))
            .unwrap();
        all.insert(u64::MAX, 1, "one", Arc::new(Echo::default()))
            .unwrap();
        assert!(all.insert(5, 1, "none", Arc::new(Echo::default())).is_err());
    }

    #[test]
    fn an_access_of_no_bytes_does_no_harm() {
        let mut bus = Bus::new("port");
        bus.insert(0, 1, "echo", Arc::new(Echo::default())).unwrap();
        bus.read(0, &mut []);
        bus.write(5, &[]);
        bus.read(u64::MAX, &mut []);
    }

    #[test]
    fn overlap_is_refused_and_names_both() {
        let mut bus = Bus::new("port");
        bus.insert(0x20, 0x10, "first", Arc::new(Echo::default()))
            .unwrap();
        for (base, length) in [
            (0x20, 1),
            (0x2f, 1),
            (0x1f, 2),
            (0x10, 0x100),
            (0x24, 4),
            (0, u64::MAX),
        ] {
            let error = bus
                .insert(base, length, "second", Arc::new(Echo::default()))
                .unwrap_err();
            assert!(
                matches!(&error, BusError::Overlap { name, other, .. } if name == "second" && other == "first")
            );
            assert!(
                error.to_string().contains("second at")
                    && error.to_string().contains("first at 0x20+0x10")
            );
        }
        bus.insert(0x1f, 1, "before", Arc::new(Echo::default()))
            .unwrap();
        bus.insert(0x30, 1, "behind", Arc::new(Echo::default()))
            .unwrap();
    }

    #[test]
    fn impossible_ranges_are_refused() {
        let mut bus = Bus::new("port");
        for (base, length) in [(0, 0), (u64::MAX, 2), (2, u64::MAX)] {
            let error = bus
                .insert(base, length, "odd", Arc::new(Echo::default()))
                .unwrap_err();
            assert!(matches!(error, BusError::Range { .. }));
        }
    }
}
