//! The PCI transport (virtio 1.3, section 4.1): a virtio device as a function with one BAR and MSI-X.
//!
//! | BAR 0 | |
//! |---|---|
//! | 0x0000 | common configuration |
//! | 0x1000 | ISR status |
//! | 0x2000 | the device's configuration |
//! | 0x3000 | doorbells, four bytes a queue |
//! | 0x4000 | MSI-X table |
//! | 0x5000 | MSI-X pending bits |
//!
//! The data path takes no exit: while the device is active its doorbells are ioeventfds, and its interrupts are events that
//! the hypervisor takes. There are no interrupts by pin and no legacy registers: guests since 2016 need neither.

mod access;
mod common;
mod notify;

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tracing::warn;
use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::{
    access::{Access, CFG_CAPABILITY_LENGTH},
    common::{Common, Step},
    notify::PciNotify,
};
use super::{Activation, VirtQueue, VirtioDevice};
use crate::pci::{
    ConfigSpace, Identity, PciFunction, Range,
    msix::{MOST_VECTORS, Msix, Vectors},
};

/// Virtio over PCI: vendor, and the first device number (virtio 1.3, section 4.1.2).
const VENDOR: u16 = 0x1af4;
const FIRST_DEVICE: u16 = 0x1040;

/// Bytes of the BAR.
pub const BAR_LENGTH: u32 = 0x8000;
const PAGE: u64 = 0x1000;

const COMMON: u64 = 0;
const ISR: u64 = 1;
const DEVICE: u64 = 2;
const DOORBELLS: u64 = 3;
const TABLE: u64 = 4;
const PENDING: u64 = 5;

/// Bytes between two doorbells.
const DOORBELL: u32 = 4;

/// The capability for MSI-X, and the one with a function's own reset (Advanced Features).
const MSIX_CAPABILITY: u8 = 0x11;
const AF_CAPABILITY: u8 = 0x13;
/// Advanced Features: there are transaction-pending and function-level reset, and the bit that starts the latter.
const AF_OFFERED: u8 = 0b11;
const AF_RESET: u8 = 1;

/// Events that the machine delivers when the guest writes to an address.
pub trait Doorbells: Send + Sync {
    /// From now on a write of any length to `address` is an event.
    ///
    /// # Errors
    /// When the hypervisor refuses.
    fn connect(&self, address: u64, event: &EventFd) -> io::Result<()>;

    /// Takes that back.
    fn disconnect(&self, address: u64, event: &EventFd);
}

/// What a function gets from the machine that it is plugged into.
pub struct Environment {
    /// The guest's memory.
    pub memory: GuestMemoryMmap,
    /// Its interrupts; as many as [`VirtioPci::vectors`] says.
    pub vectors: Box<dyn Vectors>,
    /// Its doorbells.
    pub doorbells: Arc<dyn Doorbells>,
    /// Where BARs may decode memory.
    pub window: Range,
    /// Where its BAR is at first.
    pub address: u32,
}

/// A virtio device on the PCI bus.
pub struct VirtioPci {
    /// For messages.
    name: String,
    memory: GuestMemoryMmap,
    doorbells: Arc<dyn Doorbells>,
    window: Range,
    msix: Arc<Msix>,
    notify: Arc<PciNotify>,
    kicks: Vec<EventFd>,
    config: Mutex<Config>,
    state: Mutex<State>,
}

/// The configuration space, and where its special registers are.
struct Config {
    space: ConfigSpace,
    msix_control: usize,
    af_control: usize,
    /// The body of the capability that leads to the BAR by way of the configuration space.
    cfg_access: usize,
}

struct State {
    device: Box<dyn VirtioDevice>,
    common: Common,
    active: bool,
    /// The BAR's address that the doorbells are connected for.
    connected: Option<u64>,
}

impl VirtioPci {
    /// How many vectors a device needs: one for each queue, and one for its configuration.
    #[must_use]
    pub fn vectors(device: &dyn VirtioDevice) -> u16 {
        let queues = u16::try_from(device.queue_sizes().len()).unwrap_or(MOST_VECTORS);
        queues.saturating_add(1).min(MOST_VECTORS)
    }

    /// Makes `device` a PCI function.
    ///
    /// # Errors
    /// When the host has no more descriptors.
    ///
    /// # Panics
    /// When a queue size is not a power of two, or there are more than 1024 queues: a device knows what it has.
    pub fn new(
        name: impl Into<String>,
        device: Box<dyn VirtioDevice>,
        environment: Environment,
    ) -> io::Result<Self> {
        let count = Self::vectors(device.as_ref());
        let msix = Arc::new(Msix::new(environment.vectors, count));
        let sizes = device.queue_sizes();
        assert!(
            sizes.len() as u64 * u64::from(DOORBELL) <= PAGE,
            "too many queues"
        );
        let kicks = sizes
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC))
            .collect::<io::Result<_>>()?;
        let notify = Arc::new(PciNotify::new(Arc::clone(&msix), sizes.len()));
        let features = device.features() | device.ring_features();
        let common = Common::new(features, &sizes);
        Ok(Self {
            name: name.into(),
            memory: environment.memory,
            doorbells: environment.doorbells,
            window: environment.window,
            config: Mutex::new(Config::new(device.as_ref(), count, environment.address)),
            msix,
            notify,
            kicks,
            state: Mutex::new(State {
                device,
                common,
                active: false,
                connected: None,
            }),
        })
    }

    fn config(&self) -> MutexGuard<'_, Config> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As after power-on, but for the configuration space.
    fn reset(&self, state: &mut State) {
        state.device.reset();
        state.active = false;
        self.reconnect(state, None);
        state.common.reset();
        self.notify.reset();
    }

    /// The driver is ready: hands the queues to the device.
    fn activate(&self, state: &mut State) {
        let queues = state.common.take_queues();
        let mut handed = Vec::with_capacity(queues.len());
        for (index, (ring, kick)) in (0..).zip(queues.into_iter().zip(&self.kicks)) {
            let Some(ring) = ring else {
                handed.push(None);
                continue;
            };
            let kick = match kick.try_clone() {
                Ok(kick) if ring.is_valid(&self.memory) => kick,
                Ok(_) => {
                    return self.fail(&format!("queue {index} lies outside the guest's memory"));
                }
                Err(error) => return self.fail(&format!("no event for queue {index}: {error}")),
            };
            // Kicks from before are not for this driver.
            let _ = kick.read();
            let (memory, notify) = (self.memory.clone(), Arc::clone(&self.notify) as _);
            handed.push(Some(VirtQueue::new(index, ring, memory, kick, notify)));
        }
        let driver = Activation {
            features: state.common.features(),
            memory: self.memory.clone(),
            queues: handed,
            notify: Arc::clone(&self.notify) as _,
        };
        if let Err(error) = state.device.activate(driver) {
            return self.fail(&error.to_string());
        }
        state.active = true;
        let mapped = self.config().space.mapped();
        self.reconnect(state, mapped);
        // What a driver makes available before it is told that it may, it kicks for in vain.
        for kick in &self.kicks {
            let _ = kick.write(1);
        }
    }

    fn fail(&self, why: &str) {
        warn!("{}: {why}", self.name);
        super::Notify::needs_reset(self.notify.as_ref());
    }

    /// Moves the doorbells to where the BAR is `mapped`.
    fn reconnect(&self, state: &mut State, mapped: Option<Range>) {
        let wanted = mapped
            .filter(|range| state.active && self.window.holds(range))
            .map(|range| range.start);
        if state.connected == wanted {
            return;
        }
        if let Some(base) = state.connected.take() {
            for (address, kick) in doorbells(base).zip(&self.kicks) {
                self.doorbells.disconnect(address, kick);
            }
        }
        let Some(base) = wanted else { return };
        for (index, (address, kick)) in doorbells(base).zip(&self.kicks).enumerate() {
            if let Err(error) = self.doorbells.connect(address, kick) {
                // Then each kick is an exit that ends in `bar_write`.
                warn!("{}: queue {index} has no doorbell: {error}", self.name);
                for (address, kick) in doorbells(base).zip(&self.kicks).take(index) {
                    self.doorbells.disconnect(address, kick);
                }
                return;
            }
        }
        state.connected = Some(base);
    }

    /// The BAR as the configuration space's own way to it shows it, if that points into it.
    fn cfg_access(&self) -> Option<Access> {
        let config = self.config();
        Access::read(&config.space, config.cfg_access)
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.reset(&mut state);
        self.msix.reset();
    }
}

/// The addresses of the doorbells of a BAR at `base`.
fn doorbells(base: u64) -> impl Iterator<Item = u64> {
    (0..).map(move |index| base + DOORBELLS * PAGE + index * u64::from(DOORBELL))
}

impl Config {
    fn new(device: &dyn VirtioDevice, vectors: u16, address: u32) -> Self {
        let kind = device.kind();
        let id = FIRST_DEVICE + kind.id;
        let identity = Identity {
            id: (VENDOR, id),
            subsystem: (VENDOR, id),
            class: kind.pci_class,
            revision: 1,
        };
        let mut space = ConfigSpace::new(&identity, BAR_LENGTH, address);
        access::add_capabilities(
            &mut space,
            &[
                (access::COMMON, COMMON * PAGE, PAGE),
                (access::ISR, ISR * PAGE, PAGE),
                (access::DEVICE, DEVICE * PAGE, PAGE),
            ],
        );
        access::add_notify_capability(&mut space, DOORBELLS * PAGE, PAGE, DOORBELL);
        let cfg_access = access::add_cfg_capability(&mut space);
        let mut msix = [0; 10];
        msix[..2].copy_from_slice(&(vectors - 1).to_le_bytes());
        msix[2..6].copy_from_slice(&((TABLE * PAGE) as u32).to_le_bytes());
        msix[6..].copy_from_slice(&((PENDING * PAGE) as u32).to_le_bytes());
        // Enable and function mask are in the upper byte of the message control.
        let msix_control = space.add_capability(MSIX_CAPABILITY, &msix, &[0, 0xc0]);
        // Length, capabilities, control, status. The bit that resets reads as zero.
        let af = space.add_capability(AF_CAPABILITY, &[6, AF_OFFERED, 0, 0], &[]);
        Self {
            space,
            msix_control,
            af_control: af + 2,
            cfg_access,
        }
    }

    /// The byte that a write of `data` at `offset` leaves at `at`, if it gets there.
    fn written(offset: u16, data: &[u8], at: usize) -> Option<u8> {
        data.get(at.checked_sub(offset.into())?).copied()
    }
}

impl PciFunction for VirtioPci {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        // Bytes of the window to the BAR come from there.
        let window = self.config().cfg_access + CFG_CAPABILITY_LENGTH;
        if usize::from(offset) == window
            && let Some(access) = self.cfg_access()
        {
            let length = access.length.min(data.len());
            self.bar_read(access.offset, &mut data[..length]);
            return;
        }
        self.config().space.read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let (window, mapped, control, reset) = {
            let mut config = self.config();
            config.space.write(offset, data);
            let control = config.space.word(config.msix_control);
            let reset = Config::written(offset, data, config.af_control);
            (
                config.cfg_access + CFG_CAPABILITY_LENGTH,
                config.space.mapped(),
                control,
                reset.is_some_and(|byte| byte & AF_RESET != 0),
            )
        };
        if reset {
            let mut state = self.state();
            self.reset(&mut state);
            self.msix.reset();
            let mut config = self.config();
            config.space.reset();
            let at = config.msix_control;
            config.space.set_word(at, self.msix.count() - 1);
            return;
        }
        if usize::from(offset) == window
            && let Some(access) = self.cfg_access()
        {
            self.bar_write(access.offset, &data[..access.length.min(data.len())]);
            return;
        }
        let control = control & (crate::pci::msix::ENABLE | crate::pci::msix::FUNCTION_MASK);
        if control != self.msix.control() {
            self.msix.set_control(control);
        }
        self.reconnect(&mut self.state(), mapped);
    }

    fn mapped(&self) -> Option<Range> {
        self.config().space.mapped()
    }

    fn bar_read(&self, offset: u64, data: &mut [u8]) {
        let at = offset % PAGE;
        match offset / PAGE {
            COMMON => {
                let state = self.state();
                state.common.read(at, data, &self.notify);
            }
            ISR => {
                data.fill(0);
                if let (0, Some(first)) = (at, data.first_mut()) {
                    *first = self.notify.take_isr();
                }
            }
            DEVICE => self.state().device.read_config(at, data),
            TABLE => self.msix.read_table(at, data),
            PENDING => self.msix.read_pending(at, data),
            _ => data.fill(0),
        }
    }

    fn bar_write(&self, offset: u64, data: &[u8]) {
        let at = offset % PAGE;
        match offset / PAGE {
            COMMON => {
                let mut state = self.state();
                match state.common.write(at, data, &self.notify) {
                    Step::Nothing => {}
                    Step::Reset => self.reset(&mut state),
                    Step::Activate => self.activate(&mut state),
                }
            }
            DEVICE => self.state().device.write_config(at, data),
            DOORBELLS => {
                // Without a doorbell, or before the device is active.
                let queue = usize::try_from(at / u64::from(DOORBELL)).unwrap_or(usize::MAX);
                if let Some(kick) = self.kicks.get(queue) {
                    let _ = kick.write(1);
                }
            }
            TABLE => self.msix.write_table(at, data),
            _ => {}
        }
    }
}
