//! Interrupts by message: the one table that says which GSI raises which, and who has which GSI.
//!
//! The IOAPIC's pins are the first GSIs, by number. PCI functions get the ones behind them, with an event for each vector,
//! which becomes an irqfd when the guest first uses the vector.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use devices::{
    ioapic::{InterruptRoutes, Msi, PINS},
    pci::msix::Vectors,
};
use mshv_bindings::mshv_user_irq_entry;
use mshv_ioctls::InterruptRequest;
use tracing::warn;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::partition::Partition;

/// In an MSI's address: the destination is a set.
const LOGICAL: u64 = 1 << 2;
/// The destination that is every processor.
const ALL: u8 = 0xff;

/// How many GSIs there are (`MSHV_MAX_GUEST_IRQS` of the driver).
const GSIS: u32 = 4096;

/// Told of the index of a VP that is about to be interrupted.
type Tell = Box<dyn Fn(u32) + Send + Sync>;

/// The partition's table of interrupt routes.
pub(crate) struct Routes {
    partition: Arc<Partition>,
    table: Mutex<Table>,
    told: OnceLock<Tell>,
}

#[derive(Default)]
struct Table {
    routes: BTreeMap<u32, Msi>,
    /// GSIs that belong to a function.
    taken: BTreeSet<u32>,
}

impl Routes {
    pub(crate) fn new(partition: Arc<Partition>) -> Self {
        Self {
            partition,
            table: Mutex::default(),
            told: OnceLock::new(),
        }
    }

    /// Has `told` told of interrupts from now on; the first one stays.
    pub(crate) fn watch(&self, told: Tell) {
        let _ = self.told.set(told);
    }

    /// The event of `gsi` is about to be written to.
    pub(crate) fn about_to_raise(&self, gsi: u32) {
        if let Some(told) = self.told.get()
            && let Some(vp) = self.lock().routes.get(&gsi).copied().and_then(target)
        {
            told(vp);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes `gsi` raise `route`, or nothing.
    fn set(&self, gsi: u32, route: Option<Msi>) -> io::Result<()> {
        let mut table = self.lock();
        let before = match route {
            Some(msi) => table.routes.insert(gsi, msi),
            None => table.routes.remove(&gsi),
        };
        if before == route {
            return Ok(());
        }
        let entries: Vec<_> = table
            .routes
            .iter()
            .map(|(gsi, msi)| routing_entry(*gsi, *msi))
            .collect();
        let result = self.partition.set_msi_routing(&entries);
        if result.is_err() {
            match before {
                Some(msi) => table.routes.insert(gsi, msi),
                None => table.routes.remove(&gsi),
            };
        }
        result
    }

    /// Interrupts for a function with `count` vectors.
    ///
    /// # Errors
    /// When there are not so many GSIs left, or the host has no more descriptors.
    pub(crate) fn vectors(self: &Arc<Self>, count: u16) -> io::Result<FunctionVectors> {
        let mut vectors = Vec::with_capacity(count.into());
        for _ in 0..count {
            vectors.push(Vector {
                gsi: PINS,
                event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
                registered: AtomicBool::new(false),
            });
        }
        let mut table = self.lock();
        let free: Vec<u32> = (PINS..GSIS)
            .filter(|gsi| !table.taken.contains(gsi))
            .take(count.into())
            .collect();
        if free.len() < count.into() {
            return Err(io::Error::other(format!("all {GSIS} interrupts are taken")));
        }
        for (vector, gsi) in vectors.iter_mut().zip(free) {
            vector.gsi = gsi;
            table.taken.insert(gsi);
        }
        drop(table);
        Ok(FunctionVectors {
            routes: Arc::clone(self),
            vectors,
        })
    }
}

struct Vector {
    gsi: u32,
    event: EventFd,
    /// Whether the hypervisor knows the event.
    registered: AtomicBool,
}

/// The interrupts of one function, given back when it is dropped.
pub(crate) struct FunctionVectors {
    routes: Arc<Routes>,
    vectors: Vec<Vector>,
}

impl Vectors for FunctionVectors {
    fn set_route(&self, vector: u16, route: Option<Msi>) -> io::Result<()> {
        let Some(vector) = self.vectors.get(usize::from(vector)) else {
            return Err(io::Error::from(io::ErrorKind::NotFound));
        };
        self.routes.set(vector.gsi, route)?;
        if route.is_some() && !vector.registered.swap(true, Ordering::AcqRel) {
            let registered = self
                .routes
                .partition
                .register_irqfd(&vector.event, vector.gsi);
            if let Err(error) = registered {
                vector.registered.store(false, Ordering::Release);
                return Err(io::Error::other(error));
            }
        }
        Ok(())
    }

    fn event(&self, vector: u16) -> &EventFd {
        &self.vectors[usize::from(vector)].event
    }
}

impl Drop for FunctionVectors {
    fn drop(&mut self) {
        for vector in &self.vectors {
            if vector.registered.load(Ordering::Acquire) {
                self.routes
                    .partition
                    .unregister_irqfd(&vector.event, vector.gsi);
            }
            if let Err(error) = self.routes.set(vector.gsi, None) {
                warn!("interrupt {}: {error}", vector.gsi);
            }
            self.routes.lock().taken.remove(&vector.gsi);
        }
    }
}

/// The IOAPIC's interrupts on their way to the hypervisor: pins with an irqfd through the routing table, others by hypercall.
pub(crate) struct PinRoutes(pub(crate) Arc<Routes>);

impl InterruptRoutes for PinRoutes {
    fn set_route(&self, pin: u32, route: Option<Msi>) -> io::Result<()> {
        let result = self.0.set(pin, route);
        if let Err(error) = &result {
            warn!("interrupt pin {pin}: the hypervisor refuses the route: {error}");
        }
        result
    }

    fn assert(&self, msi: Msi, level: bool) {
        if let (Some(told), Some(vp), true) = (self.0.told.get(), target(msi), level) {
            told(vp);
        }
        if let Err(error) = self.0.partition.interrupt(&request(msi, level)) {
            warn!(
                "interrupt with vector {:#x} refused: {error}",
                msi.data & 0xff
            );
        }
    }
}

fn routing_entry(gsi: u32, msi: Msi) -> mshv_user_irq_entry {
    mshv_user_irq_entry {
        gsi,
        // The two halves of the address.
        #[expect(clippy::cast_possible_truncation)]
        address_lo: msi.address as u32,
        address_hi: (msi.address >> 32) as u32,
        data: msi.data,
    }
}

/// The VP that `msi` interrupts, by its index, which is its APIC id: `None` where it may be any of several.
fn target(msi: Msi) -> Option<u32> {
    let destination = (msi.address >> 12 & 0xff) as u8;
    match msi.address & LOGICAL {
        0 => (destination != ALL).then_some(destination.into()),
        // The flat model: a bit for each of the first eight.
        _ => (destination.count_ones() == 1).then_some(destination.trailing_zeros()),
    }
}

/// An MSI as the hypervisor's request: vector, delivery mode and destination stand in the same places on all processors.
fn request(msi: Msi, level: bool) -> InterruptRequest {
    const LEVEL_TRIGGERED: u32 = 1 << 15;
    InterruptRequest {
        interrupt_type: msi.data >> 8 & 7,
        apic_id: msi.address >> 12 & 0xff,
        vector: msi.data & 0xff,
        level_triggered: level && msi.data & LEVEL_TRIGGERED != 0,
        logical_destination_mode: msi.address & LOGICAL != 0,
        long_mode: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_target_of_an_msi_is_known_if_it_is_one_vp() {
        let of = |address| {
            target(Msi {
                address,
                data: 0x24,
            })
        };
        assert_eq!(of(0xfee0_3000), Some(3));
        assert_eq!(of(0xfeef_f000), None, "everybody");
        assert_eq!(of(0xfee0_2004), Some(1), "a set of one");
        assert_eq!(of(0xfee0_3004), None, "one of two");
    }

    #[test]
    fn an_msi_becomes_the_hypervisors_request() {
        // Level-triggered, lowest priority, vector 0x31, logical destination 3.
        let request = request(
            Msi {
                address: 0xfee0_300c,
                data: 0xc131,
            },
            true,
        );
        assert_eq!(
            (request.interrupt_type, request.apic_id, request.vector),
            (1, 3, 0x31)
        );
        assert!(request.level_triggered && request.logical_destination_mode);
        let entry = routing_entry(
            4,
            Msi {
                address: 0xfee0_1000,
                data: 0x24,
            },
        );
        assert_eq!(
            (entry.gsi, entry.address_lo, entry.address_hi, entry.data),
            (4, 0xfee0_1000, 0, 0x24)
        );
    }
}
