//! Frames moved by the host's kernel (`/dev/vhost-net`): it takes them out of the guest's queues and puts them there, hears
//! the guest's kicks and interrupts the guest. No thread of ours is in the way.

use std::{
    io,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData, net::VhostNet,
    vhost_kern::net::Net as Kernel,
};
use virtio_bindings::bindings::{
    virtio_config::VIRTIO_F_VERSION_1, virtio_net::VIRTIO_NET_F_MRG_RXBUF,
};
use virtio_queue::QueueT;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{
    super::{DeviceError, VirtQueue},
    Datapath, Running, Start,
    backend::Backend,
    control::Pairs,
    features,
    tap::Tap,
};

/// The way to the kernel's side.
const DEVICE: &str = "/dev/vhost-net";
/// The queues of a pair, as the kernel counts them.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// Whether this process can have the kernel work on queues.
///
/// # Errors
/// Why not.
pub fn is_available() -> io::Result<()> {
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(Path::new(DEVICE))
        .map(drop)
}

/// The kernel's side of a device at a tap interface.
pub struct Vhost {
    tap: Arc<Tap>,
    running: Option<Arc<Queues>>,
}

impl Vhost {
    /// Frames go to and come from `tap`.
    #[must_use]
    pub fn new(tap: Tap) -> Self {
        Self {
            tap: Arc::new(tap),
            running: None,
        }
    }
}

impl Datapath for Vhost {
    fn features(&self) -> u64 {
        self.tap.features()
    }

    fn pairs(&self) -> usize {
        self.tap.queues().len()
    }

    fn start(&mut self, start: Start<'_>) -> Result<Running, DeviceError> {
        let failed = DeviceError::host("cannot hand the queues to vhost-net");
        let open: Result<Vec<_>, _> = start
            .pairs
            .iter()
            .map(|pair| Open::new(&start, pair))
            .collect();
        let open = open.map_err(|fault| failed(fault.into()))?;
        let faults: Result<Vec<_>, _> = open.iter().map(|pair| pair.fault.try_clone()).collect();
        let faults = faults.map_err(DeviceError::host("cannot watch vhost-net"))?;
        let queues = Arc::new(Queues {
            tap: Arc::clone(&self.tap),
            pairs: Mutex::new(open),
            usable: start.pairs.len(),
        });
        self.running = Some(Arc::clone(&queues));
        queues
            .set_offloads(start.agreed & features::GUEST_OFFLOADS)
            .map_err(DeviceError::host("cannot set the offloads"))?;
        queues
            .use_first(1)
            .map_err(DeviceError::host("cannot start vhost-net"))?;
        Ok(Running {
            pairs: queues,
            faults,
        })
    }

    fn stop(&mut self) {
        let Some(queues) = self.running.take() else {
            return;
        };
        // The kernel has let go of a queue when its file is closed.
        queues.lock().clear();
    }
}

/// A pair of queues that the kernel knows.
struct Open {
    kernel: Kernel<Arc<GuestMemoryMmap>>,
    fault: EventFd,
}

impl Open {
    /// Makes the pair known to the kernel, which does not work on it yet.
    fn new(start: &Start<'_>, pair: &(VirtQueue, VirtQueue)) -> Result<Self, Fault> {
        let (rx, tx) = pair;
        let kernel = Kernel::new(Arc::new(rx.memory().clone()))?;
        kernel.set_owner()?;
        let merged = 1 << VIRTIO_NET_F_MRG_RXBUF | 1 << VIRTIO_F_VERSION_1;
        let of_ring = !((1 << 24) - 1) & ((1 << 41) - 1);
        let wanted = (start.agreed & (of_ring | merged)) | 1 << VIRTIO_F_VERSION_1;
        kernel.set_features(wanted & kernel.get_features()?)?;
        kernel.set_mem_table(&regions(rx.memory()))?;
        let fault = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Fault::Host)?;
        for (index, queue) in [(RECEIVE, rx), (TRANSMIT, tx)] {
            let ring = queue.ring();
            kernel.set_vring_num(index, ring.size())?;
            kernel.set_vring_addr(
                index,
                &VringConfigData {
                    queue_max_size: ring.max_size(),
                    queue_size: ring.size(),
                    flags: 0,
                    desc_table_addr: ring.desc_table(),
                    used_ring_addr: ring.used_ring(),
                    avail_ring_addr: ring.avail_ring(),
                    log_addr: None,
                },
            )?;
            kernel.set_vring_base(index, ring.next_avail())?;
            if let Some(call) = start.notify.call(queue.index()) {
                kernel.set_vring_call(index, &call)?;
            }
            kernel.set_vring_err(index, &fault)?;
            kernel.set_vring_kick(index, queue.kick())?;
        }
        Ok(Self { kernel, fault })
    }
}

/// All of them.
struct Queues {
    tap: Arc<Tap>,
    pairs: Mutex<Vec<Open>>,
    usable: usize,
}

impl Queues {
    fn lock(&self) -> MutexGuard<'_, Vec<Open>> {
        self.pairs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pairs for Queues {
    fn count(&self) -> usize {
        self.usable
    }

    fn use_first(&self, count: usize) -> io::Result<()> {
        let pairs = self.lock();
        for (index, queue) in self.tap.queues().iter().enumerate() {
            let pair = pairs.get(index);
            let file = (index < count).then_some(&queue.file);
            if file.is_some() {
                self.tap.attach(index)?;
            }
            if let Some(Open { kernel, .. }) = pair {
                for ring in [RECEIVE, TRANSMIT] {
                    kernel.set_backend(ring, file).map_err(Fault::Vhost)?;
                }
            }
            if file.is_none() {
                self.tap.detach(index)?;
            }
        }
        Ok(())
    }

    fn set_offloads(&self, features: u64) -> io::Result<()> {
        self.tap.set_offloads(features)
    }
}

/// The guest's memory, as the kernel wants to hear of it.
fn regions(memory: &GuestMemoryMmap) -> Vec<VhostUserMemoryRegionInfo> {
    memory
        .iter()
        .map(|region| VhostUserMemoryRegionInfo {
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            mmap_offset: 0,
            mmap_handle: -1,
        })
        .collect()
}

/// What went wrong with vhost-net.
enum Fault {
    Vhost(vhost::Error),
    Host(io::Error),
}

impl From<vhost::Error> for Fault {
    fn from(error: vhost::Error) -> Self {
        Self::Vhost(error)
    }
}

impl From<Fault> for io::Error {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Host(error)
            | Fault::Vhost(vhost::Error::IoctlError(error) | vhost::Error::VhostOpen(error)) => {
                error
            }
            Fault::Vhost(error) => io::Error::other(error.to_string()),
        }
    }
}
