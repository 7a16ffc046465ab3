//! A machine with some memory and one virtio device.

use std::{
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use devices::virtio::{Activation, DeviceError, Notify, VirtQueue, VirtioDevice};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::{
    eventfd::{EFD_NONBLOCK, EventFd},
    tempfile::TempFile,
};

use crate::Ring;

/// Bytes of memory.
const MEMORY: usize = 64 << 20;
/// Nothing lies below: an address of zero is a mistake.
const FIRST: u64 = 0x1_0000;
/// `VIRTIO_RING_F_EVENT_IDX`.
const EVENT_IDX: u64 = 1 << 29;
/// No device takes as long.
const PATIENCE: Duration = Duration::from_secs(10);

/// The interrupts of a device: counted, and waited for.
#[derive(Debug, Default)]
pub struct Interrupts {
    used: Vec<AtomicU32>,
    config: AtomicU32,
    reset: AtomicU32,
    /// Written by back ends that have an event in place of [`Notify::used`].
    calls: Vec<Option<EventFd>>,
    came: Condvar,
    lock: Mutex<()>,
}

impl Interrupts {
    fn count(&self, counter: &AtomicU32) {
        counter.fetch_add(1, Ordering::SeqCst);
        drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner));
        self.came.notify_all();
    }

    /// How often the driver of queue `index` has been interrupted.
    #[must_use]
    pub fn used_count(&self, index: u16) -> u32 {
        self.used[usize::from(index)].load(Ordering::SeqCst)
    }

    /// How often the configuration has changed.
    #[must_use]
    pub fn config_count(&self) -> u32 {
        self.config.load(Ordering::SeqCst)
    }

    /// How often the device has asked for a reset.
    #[must_use]
    pub fn reset_count(&self) -> u32 {
        self.reset.load(Ordering::SeqCst)
    }

    /// Waits until `look` finds something.
    ///
    /// # Panics
    /// With what `missing` says, when it does not within ten seconds.
    pub fn wait_until<T>(
        &self,
        mut look: impl FnMut() -> Option<T>,
        missing: impl FnOnce(&Self) -> String,
    ) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = look() {
                return found;
            }
            if Instant::now() > deadline {
                panic!("{}", missing(self));
            }
            // Interrupts by event are not told of, so look again soon.
            let guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
            drop(self.came.wait_timeout(guard, Duration::from_millis(1)));
        }
    }
}

impl Notify for Interrupts {
    fn used(&self, index: u16) {
        self.count(&self.used[usize::from(index)]);
    }

    fn call(&self, index: u16) -> Option<EventFd> {
        self.calls[usize::from(index)].as_ref()?.try_clone().ok()
    }

    fn config_changed(&self) {
        self.count(&self.config);
    }

    fn needs_reset(&self) {
        self.count(&self.reset);
    }
}

/// A machine with one device of type `D`.
pub struct Guest<D> {
    /// The device.
    pub device: D,
    memory: GuestMemoryMmap,
    interrupts: Arc<Interrupts>,
    rings: Vec<Option<Ring>>,
    free: u64,
}

impl<D: VirtioDevice> Guest<D> {
    /// A machine whose driver has not looked at the device yet.
    ///
    /// # Panics
    /// When the host has not what a machine needs.
    #[must_use]
    pub fn new(device: D) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
        Self::with_memory(device, memory)
    }

    /// A machine whose memory another process can be given, in two regions.
    ///
    /// # Panics
    /// When the host has not what a machine needs.
    #[must_use]
    pub fn shared(device: D) -> Self {
        let file = TempFile::new().expect("a temporary file").into_file();
        file.set_len(MEMORY as u64).expect("a sparse file");
        let low = MEMORY / 2;
        let regions = [(0, low), (low, MEMORY - low)].map(|(start, length)| {
            let file = file.try_clone().expect("a file");
            let offset = FileOffset::new(file, start as u64);
            (GuestAddress(start as u64), length, Some(offset))
        });
        let memory = GuestMemoryMmap::from_ranges_with_files(regions).expect("memory");
        Self::with_memory(device, memory)
    }

    /// A machine with this memory, of which everything from 64 KiB on is free.
    ///
    /// # Panics
    /// When the host has not what a machine needs.
    #[must_use]
    pub fn with_memory(device: D, memory: GuestMemoryMmap) -> Self {
        let queues = device.queue_sizes().len();
        let interrupts = Arc::new(Interrupts {
            used: (0..queues).map(|_| AtomicU32::new(0)).collect(),
            calls: (0..queues)
                .map(|_| EventFd::new(EFD_NONBLOCK).ok())
                .collect(),
            ..Interrupts::default()
        });
        Self {
            device,
            memory,
            interrupts,
            rings: Vec::new(),
            free: FIRST,
        }
    }

    /// Sets all queues up at their full size, agrees on those of `features` that the device offers, and activates it.
    ///
    /// # Panics
    /// When the device does not want to.
    pub fn activate(&mut self, features: u64) {
        self.try_activate(features).expect("an active device");
    }

    /// As [`Guest::activate`].
    ///
    /// # Errors
    /// What the device says.
    pub fn try_activate(&mut self, features: u64) -> Result<(), DeviceError> {
        let sizes = self.device.queue_sizes();
        self.rings.clear();
        let mut queues = Vec::new();
        for (index, size) in (0..).zip(sizes) {
            let base = self.allocate(Ring::footprint(size));
            let event = || EventFd::new(EFD_NONBLOCK).expect("an eventfd");
            let kick = event();
            let ring = Ring::new(
                index,
                size,
                base,
                &self.memory,
                kick.try_clone().expect("an eventfd"),
                Arc::clone(&self.interrupts),
            );
            queues.push(Some(VirtQueue::new(
                index,
                ring.device_side(features & self.device.ring_features() & EVENT_IDX != 0),
                self.memory.clone(),
                kick,
                Arc::clone(&self.interrupts) as _,
            )));
            self.rings.push(Some(ring));
        }
        let notify = Arc::clone(&self.interrupts) as _;
        self.device.activate(Activation {
            features: features & (self.device.features() | self.device.ring_features()),
            memory: self.memory.clone(),
            queues,
            notify,
        })
    }

    /// Takes the driver's side of queue `index`.
    ///
    /// # Panics
    /// When it was taken before, or the device is not active.
    pub fn ring(&mut self, index: u16) -> Ring {
        self.rings[usize::from(index)].take().expect("a ring")
    }

    /// The guest's memory.
    #[must_use]
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// The device's interrupts.
    #[must_use]
    pub fn interrupts(&self) -> &Arc<Interrupts> {
        &self.interrupts
    }

    /// Memory for `length` bytes; its guest physical address, on a page of its own.
    pub fn allocate(&mut self, length: u64) -> u64 {
        let address = self.free;
        self.free = (address + length).next_multiple_of(4096);
        address
    }

    /// Memory with `bytes` in it.
    ///
    /// # Panics
    /// When there is not so much.
    pub fn place(&mut self, bytes: &[u8]) -> u64 {
        let address = self.allocate(bytes.len() as u64);
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .expect("guest memory");
        address
    }

    /// What lies at `address`.
    ///
    /// # Panics
    /// When there is no memory.
    #[must_use]
    pub fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .expect("guest memory");
        bytes
    }

    /// Waits until the device asks for a reset.
    ///
    /// # Panics
    /// When it does not.
    pub fn wait_for_reset_request(&self) {
        let asked = || (self.interrupts.reset_count() > 0).then_some(());
        self.interrupts
            .wait_until(asked, |_| "the device does not ask for a reset".to_owned());
    }

    /// `length` bytes of the device's configuration at `offset`.
    #[must_use]
    pub fn config(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.device.read_config(offset, &mut bytes);
        bytes
    }
}
