//! Interrupts the client raises: asserted vectors, MSI routes, irqfds with resample.
//!
//! The LAPICs are KVM's, the IOAPIC is the client's (KVM calls that a split irqchip). KVM reports the end of a
//! level-triggered interrupt only for vectors that one of its reserved IOAPIC pins routes to. So there is one
//! pin per vector, and the first level-triggered use of a vector routes its pin. Behind the pins follow the GSIs
//! of the client that an irqfd raises: KVM's table is no longer than the client's, so the others stay out of it.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_msi};
use kvm_ioctls::VmFd;
use mshv_bindings::{mshv_user_irq_entry, mshv_user_irqfd};
use vmm_sys_util::eventfd::EventFd;

use crate::errno::{Errno, HvStatus};
use crate::{eventfd, trace};

/// The first vector a LAPIC takes; the ones before are the processor's own.
const FIRST_VECTOR: u8 = 16;

/// Reserved IOAPIC pins of the split irqchip, one for each vector a LAPIC takes. (KVM keeps their number in a byte.)
pub(crate) const PINS: u32 = 256 - FIRST_VECTOR as u32;

/// What the driver allows.
pub(crate) const MAX_GUEST_IRQS: u32 = 4096;

/// What KVM allows, pins and all.
const MAX_KVM_GSIS: u32 = 4096;

const DEASSIGN: u32 = 1 << 0;
const RESAMPLE: u32 = 1 << 1;

/// `hv_interrupt_control`: the upper half holds flags, the lower the type.
const LEVEL_TRIGGERED: u64 = 1 << 32;
const LOGICAL_DESTINATION: u64 = 1 << 33;

/// One interrupt message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Message {
    vector: u8,
    /// Delivery mode as in an MSI: 0 fixed, 1 lowest priority, 2 SMI, 4 NMI, 5 INIT, 6 SIPI, 7 ExtINT.
    mode: u8,
    level: bool,
    logical: bool,
    destination: u32,
}

impl Message {
    /// What the driver takes from an MSI route.
    fn from_route(entry: &mshv_user_irq_entry) -> Self {
        let (address, data) = (entry.address_lo, entry.data);
        Self {
            vector: data as u8,
            mode: (data >> 8 & 7) as u8,
            level: data >> 15 & 1 != 0,
            logical: address >> 2 & 1 != 0,
            destination: address >> 12 & 0xff,
        }
    }

    /// The end of a level-triggered `vector` on any VP.
    fn pin(vector: u8) -> Self {
        Self {
            vector,
            mode: 0,
            level: true,
            logical: false,
            destination: 0xff,
        }
    }

    fn address_lo(self) -> u32 {
        0xfee0_0000 | (self.destination & 0xff) << 12 | u32::from(self.logical) << 2
    }

    /// The rest of a 32-bit APIC id (`KVM_X2APIC_API_USE_32BIT_IDS`).
    fn address_hi(self) -> u32 {
        self.destination & 0xffff_ff00
    }

    fn data(self) -> u32 {
        u32::from(self.vector) | u32::from(self.mode) << 8 | 1 << 14 | u32::from(self.level) << 15
    }

    fn entry(self, gsi: u32) -> kvm_irq_routing_entry {
        let mut entry = kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_MSI,
            ..Default::default()
        };
        entry.u.msi.address_lo = self.address_lo();
        entry.u.msi.address_hi = self.address_hi();
        entry.u.msi.data = self.data();
        entry
    }
}

/// An eventfd that raises an interrupt.
struct Irqfd {
    gsi: u32,
    /// The identity of the eventfd, whatever its number.
    id: u64,
    event: EventFd,
    /// Signalled at the end of the interrupt.
    resample: Option<OwnedFd>,
}

#[derive(Default)]
struct State {
    routes: BTreeMap<u32, Message>,
    /// Vectors in level-triggered use.
    level: BTreeSet<u8>,
    /// The table KVM has.
    installed: Vec<(u32, Message)>,
    irqfds: Vec<Irqfd>,
    /// The GSIs an irqfd has raised so far, as KVM knows them.
    kvm_gsis: BTreeMap<u32, u32>,
}

/// Interrupt state of one partition.
pub(crate) struct Interrupts {
    vm: Arc<VmFd>,
    /// Vectors whose pin is routed.
    pins: [AtomicU64; 4],
    state: Mutex<State>,
}

impl Interrupts {
    /// No routes, no irqfds.
    pub(crate) fn new(vm: Arc<VmFd>) -> Self {
        Self {
            vm,
            pins: Default::default(),
            state: Mutex::default(),
        }
    }

    fn has_pin(&self, vector: u8) -> bool {
        self.pins[usize::from(vector / 64)].load(Ordering::Acquire) >> (vector % 64) & 1 != 0
    }

    /// Gives KVM the pins in use and the routes of the client, unless it has them: a change makes it wait for every VP.
    fn install(&self, state: &mut State) -> Result<(), Errno> {
        let pins = state
            .level
            .iter()
            .map(|vector| (u32::from(vector - FIRST_VECTOR), Message::pin(*vector)));
        let routed = |(gsi, kvm_gsi): (&u32, &u32)| Some((*kvm_gsi, *state.routes.get(gsi)?));
        let table: Vec<(u32, Message)> = pins
            .chain(state.kvm_gsis.iter().filter_map(routed))
            .collect();
        if table == state.installed {
            return Ok(());
        }
        let entries: Vec<_> = table
            .iter()
            .map(|(gsi, message)| message.entry(*gsi))
            .collect();
        let routing = KvmIrqRouting::from_entries(&entries).map_err(|_| Errno(libc::ENOMEM))?;
        self.vm.set_gsi_routing(&routing)?;
        state.installed = table;
        for vector in &state.level {
            self.pins[usize::from(vector / 64)].fetch_or(1 << (vector % 64), Ordering::Release);
        }
        Ok(())
    }

    /// `MSHV_SET_MSI_ROUTING`: replaces the table.
    ///
    /// # Errors
    /// As the driver: `EINVAL` for a GSI out of range or twice, or an upper address half.
    pub(crate) fn set_routes(&self, entries: &[mshv_user_irq_entry]) -> Result<(), Errno> {
        let mut routes = BTreeMap::new();
        for entry in entries {
            if entry.gsi >= MAX_GUEST_IRQS || entry.address_hi != 0 {
                return Err(Errno(libc::EINVAL));
            }
            if routes
                .insert(entry.gsi, Message::from_route(entry))
                .is_some()
            {
                return Err(Errno(libc::EINVAL));
            }
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let level = routes
            .values()
            .filter(|message| message.level && message.vector >= FIRST_VECTOR);
        state.level.extend(level.map(|message| message.vector));
        state.routes = routes;
        self.install(&mut state)
    }

    /// `MSHV_IRQFD`.
    ///
    /// # Errors
    /// As the driver: `EINVAL` for unknown flags or a resampled GSI that is not level-triggered, `EBADF`/`EINVAL`
    /// for what is not an eventfd, `EBUSY` for an eventfd that raises an interrupt already.
    pub(crate) fn set_irqfd(&self, args: &mshv_user_irqfd) -> Result<(), Errno> {
        if args.flags & !(DEASSIGN | RESAMPLE) != 0 {
            return Err(Errno(libc::EINVAL));
        }
        let id = eventfd::id(args.fd)?;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if args.flags & DEASSIGN != 0 {
            let matches = |irqfd: &mut Irqfd| irqfd.gsi == args.gsi && irqfd.id == id;
            let removed: Vec<Irqfd> = state.irqfds.extract_if(.., matches).collect();
            return self.detach(&state, &removed);
        }
        let resample = if args.flags & RESAMPLE != 0 {
            eventfd::id(args.resamplefd)?;
            Some(eventfd::duplicate(args.resamplefd)?)
        } else {
            None
        };
        if state.irqfds.iter().any(|irqfd| irqfd.id == id) {
            return Err(Errno(libc::EBUSY));
        }
        let level = state
            .routes
            .get(&args.gsi)
            .is_some_and(|message| message.level);
        if resample.is_some() && !level {
            return Err(Errno(libc::EINVAL));
        }
        let kvm_gsi = self.kvm_gsi(&mut state, args.gsi)?;
        let copy = eventfd::duplicate(args.fd)?;
        // SAFETY: an eventfd, owned by nobody else.
        let event = unsafe { EventFd::from_raw_fd(copy.into_raw_fd()) };
        // KVM would raise the interrupt for what is in the eventfd already, but some time later.
        let already = eventfd::take(args.fd);
        self.vm.register_irqfd(&event, kvm_gsi)?;
        if let Some(message) = state.routes.get(&args.gsi).filter(|_| already) {
            self.send(*message);
        }
        let gsi = args.gsi;
        state.irqfds.push(Irqfd {
            gsi,
            id,
            event,
            resample,
        });
        Ok(())
    }

    /// Sends a message to the LAPICs. One that none of them takes is lost, as on a bus.
    fn send(&self, message: Message) {
        let msi = kvm_msi {
            address_lo: message.address_lo(),
            address_hi: message.address_hi(),
            data: message.data(),
            ..Default::default()
        };
        let _ = self.vm.signal_msi(msi);
    }

    /// The number of the client's `gsi` in KVM; the first time its route is installed.
    fn kvm_gsi(&self, state: &mut State, gsi: u32) -> Result<u32, Errno> {
        if let Some(known) = state.kvm_gsis.get(&gsi) {
            return Ok(*known);
        }
        let next = PINS + state.kvm_gsis.len() as u32;
        if next >= MAX_KVM_GSIS {
            trace::unimplemented("irqfds for more than 3856 GSIs");
            return Err(Errno(libc::ENOMEM));
        }
        state.kvm_gsis.insert(gsi, next);
        self.install(state)?;
        Ok(next)
    }

    /// Takes irqfds that have left the list away from KVM.
    fn detach(&self, state: &State, irqfds: &[Irqfd]) -> Result<(), Errno> {
        for irqfd in irqfds {
            self.vm
                .unregister_irqfd(&irqfd.event, state.kvm_gsis[&irqfd.gsi])?;
        }
        Ok(())
    }

    /// The partition's descriptor is closed: irqfds end, whatever else lives on.
    pub(crate) fn release(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let irqfds = std::mem::take(&mut state.irqfds);
        // KVM refuses only what it does not know.
        let _ = self.detach(&state, &irqfds);
    }

    /// A VP ended level-triggered interrupt `vector` (`KVM_EXIT_IOAPIC_EOI`): signals the resamplefds that wait
    /// for it. True when there was one, and then no `APIC_EOI` message is due, as in the driver.
    ///
    /// The driver looks for the resampler of a GSI that *equals* the vector, and so does this.
    pub(crate) fn eoi(&self, vector: u8) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut any = false;
        let of_vector = |irqfd: &&Irqfd| irqfd.gsi == u32::from(vector);
        for resample in state
            .irqfds
            .iter()
            .filter(of_vector)
            .filter_map(|irqfd| irqfd.resample.as_ref())
        {
            eventfd::signal(resample.as_raw_fd());
            any = true;
        }
        any
    }

    /// `HVCALL_ASSERT_VIRTUAL_INTERRUPT` for interrupt types a LAPIC takes by message.
    pub(crate) fn assert(&self, control: u64, dest: u64, vector: u32) -> HvStatus {
        let mode = match control as u32 {
            mode @ (0 | 1 | 2 | 4 | 5 | 6) => mode as u8,
            other @ (7..=9) => {
                trace::unimplemented(&format!("HVCALL_ASSERT_VIRTUAL_INTERRUPT type {other}"));
                return HvStatus::INVALID_PARAMETER;
            }
            _ => return HvStatus::INVALID_PARAMETER,
        };
        let (Ok(vector), Ok(destination)) = (u8::try_from(vector), u32::try_from(dest)) else {
            return HvStatus::INVALID_PARAMETER;
        };
        if matches!(mode, 0 | 1) && vector < FIRST_VECTOR {
            return HvStatus::INVALID_PARAMETER;
        }
        let level = control & LEVEL_TRIGGERED != 0;
        let logical = control & LOGICAL_DESTINATION != 0;
        if level && vector >= FIRST_VECTOR && !self.has_pin(vector) {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.level.insert(vector);
            if self.install(&mut state).is_err() {
                return HvStatus::INVALID_PARTITION_STATE;
            }
        }
        let message = Message {
            vector,
            mode,
            level,
            logical,
            destination,
        };
        self.send(message);
        HvStatus::SUCCESS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_means_what_the_driver_reads_from_it() {
        let entry = mshv_user_irq_entry {
            gsi: 5,
            address_lo: 0xfee0_3004,
            address_hi: 0,
            data: 0x8161,
        };
        let message = Message::from_route(&entry);
        assert_eq!(
            message,
            Message {
                vector: 0x61,
                mode: 1,
                level: true,
                logical: true,
                destination: 3
            }
        );
        assert_eq!(message.address_lo(), 0xfee0_3004);
        assert_eq!(message.data(), 0xc161);
    }

    #[test]
    fn a_wide_apic_id_is_split_over_both_halves() {
        let message = Message {
            destination: 0x1_02,
            ..Message::pin(0x30)
        };
        assert_eq!(message.address_lo(), 0xfee0_2000);
        assert_eq!(message.address_hi(), 0x100);
    }

    fn interrupts() -> Option<Interrupts> {
        let Ok(kvm) = kvm_ioctls::Kvm::new() else {
            rota_tests::requires::skip("no usable /dev/kvm");
            return None;
        };
        let vm = kvm.create_vm().unwrap();
        crate::partition::enable_irqchip(&vm).unwrap();
        Some(Interrupts::new(Arc::new(vm)))
    }

    fn route(gsi: u32, data: u32) -> mshv_user_irq_entry {
        mshv_user_irq_entry {
            gsi,
            address_lo: 0xfee0_0000,
            address_hi: 0,
            data,
        }
    }

    #[test]
    fn bad_routes_are_refused_as_by_the_driver() {
        let Some(interrupts) = interrupts() else {
            return;
        };
        let code = |entries: &[mshv_user_irq_entry]| interrupts.set_routes(entries).unwrap_err().0;
        assert_eq!(code(&[route(4096, 0x30)]), libc::EINVAL);
        assert_eq!(code(&[route(1, 0x30), route(1, 0x31)]), libc::EINVAL);
        assert_eq!(
            code(&[mshv_user_irq_entry {
                address_hi: 1,
                ..route(1, 0x30)
            }]),
            libc::EINVAL
        );
        interrupts
            .set_routes(&[route(0, 0x30), route(4095, 0x31)])
            .unwrap();
        interrupts.set_routes(&[]).unwrap();
    }

    #[test]
    fn resampling_needs_a_level_triggered_route_and_rings_at_its_end() {
        let Some(interrupts) = interrupts() else {
            return;
        };
        let (event, resample) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
        let mut args = mshv_user_irqfd {
            fd: event.as_raw_fd(),
            resamplefd: resample.as_raw_fd(),
            gsi: 0x30,
            flags: RESAMPLE,
        };
        assert_eq!(interrupts.set_irqfd(&args), Err(Errno(libc::EINVAL)));
        interrupts.set_routes(&[route(0x30, 0x8030)]).unwrap();
        interrupts.set_irqfd(&args).unwrap();
        assert_eq!(interrupts.set_irqfd(&args), Err(Errno(libc::EBUSY)));
        assert!(!interrupts.eoi(0x31));
        assert!(interrupts.eoi(0x30));
        assert_eq!(resample.read().unwrap(), 1);
        args.flags = DEASSIGN;
        interrupts.set_irqfd(&args).unwrap();
        assert!(!interrupts.eoi(0x30));
        args.flags = 4;
        assert_eq!(interrupts.set_irqfd(&args), Err(Errno(libc::EINVAL)));
    }
}
