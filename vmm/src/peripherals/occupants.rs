//! Which device is in which slot of the PCI bus, and what belongs to it while the guest uses it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use devices::{
    pci::Slot,
    virtio::{Counted, balloon::BalloonHandle, block::Resizer, mem::MemHandle},
};
use vm_allocator::RangeInclusive;

use super::device_memory::Lent;

/// What belongs to a device.
#[derive(Default)]
pub(super) struct Belongings {
    pub(super) handle: Handle,
    /// What it counts, if it does.
    pub(super) counters: Option<Arc<dyn Counted>>,
}

/// What can be changed about it, or what goes with it.
#[derive(Clone, Default)]
pub(crate) enum Handle {
    /// Nothing.
    #[default]
    Fixed,
    /// How large it is.
    Disk(Resizer),
    /// How much it takes.
    Balloon(BalloonHandle),
    /// How much of it the guest is to have.
    Memory(MemHandle),
    /// The guest has memory of it.
    #[expect(dead_code, reason = "it is kept")]
    Lent(Arc<Lent>),
}

/// A device in its slot.
pub(super) struct Occupant {
    pub(super) slot: Slot,
    /// What the allocator gave for its BAR.
    pub(super) addresses: RangeInclusive,
    pub(super) belongings: Belongings,
}

/// The devices by name.
#[derive(Default)]
pub(super) struct Occupants(Mutex<BTreeMap<String, Occupant>>);

impl Occupants {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Occupant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn insert(&self, name: &str, occupant: Occupant) {
        self.lock().insert(name.to_owned(), occupant);
    }

    /// Takes out who is in `slot`.
    pub(super) fn remove(&self, slot: Slot) -> Option<Occupant> {
        let mut occupants = self.lock();
        let name = name_in(&occupants, slot)?;
        occupants.remove(&name)
    }

    pub(super) fn name(&self, slot: Slot) -> Option<String> {
        name_in(&self.lock(), slot)
    }

    pub(super) fn slot(&self, name: &str) -> Option<Slot> {
        self.lock().get(name).map(|occupant| occupant.slot)
    }

    pub(super) fn handle(&self, name: &str) -> Option<Handle> {
        self.lock()
            .get(name)
            .map(|occupant| occupant.belongings.handle.clone())
    }

    /// What each device that counts has counted.
    pub(super) fn counts(&self) -> BTreeMap<String, BTreeMap<&'static str, u64>> {
        let occupants = self.lock();
        let counting = occupants
            .iter()
            .filter_map(|(name, occupant)| Some((name, occupant.belongings.counters.as_ref()?)));
        counting
            .map(|(name, counters)| (name.clone(), counters.counts().into_iter().collect()))
            .collect()
    }

    /// All names and slots.
    pub(super) fn list(&self) -> Vec<(String, Slot)> {
        self.lock()
            .iter()
            .map(|(name, occupant)| (name.clone(), occupant.slot))
            .collect()
    }
}

fn name_in(occupants: &BTreeMap<String, Occupant>, slot: Slot) -> Option<String> {
    occupants
        .iter()
        .find(|(_, occupant)| occupant.slot == slot)
        .map(|(name, _)| name.clone())
}
