//! Persistent memory (virtio 1.3, section 5.19): a file in the guest's address space, and a queue to have it written to disk.
//!
//! The guest reads and writes the file without the device: the VMM maps it into the guest at the addresses that the device's
//! configuration says. What is left for the device is `flush`: when it is answered, all that the guest had written before is on
//! the host's disk. Requests that wait together share one `fdatasync`.

use std::{fs::File, io};

use tracing::warn;
use vmm_sys_util::epoll::EventSet;

use super::{
    Activation, Chain, DeviceError, DeviceKind, Handler, Poll, VirtQueue, VirtioDevice, Worker,
    read_bytes,
};

const QUEUE_SIZE: u16 = 256;
/// The type of the only request.
const FLUSH: [u8; 4] = [0; 4];
const SUCCEEDED: [u8; 4] = [0; 4];
const FAILED: [u8; 4] = [0xff; 4];

/// What size and address of the memory are multiples of: what Linux asks of memory that it hot-plugs as a namespace.
pub const ALIGNMENT: u64 = 2 << 20;

/// Where the guest's writes are after a flush.
pub enum Persistence {
    /// On the disk: the file is mapped shared.
    File(File),
    /// Nowhere: the file is mapped privately, and what the guest writes goes with the machine.
    Discarded,
}

/// Persistent memory.
pub struct Pmem {
    start: u64,
    size: u64,
    persistence: Persistence,
    worker: Option<Worker<Flusher>>,
}

impl Pmem {
    /// Memory that the guest has `size` bytes of at guest physical address `start`.
    ///
    /// # Errors
    /// When one of them is not a multiple of [`ALIGNMENT`], or there is nothing.
    pub fn new(start: u64, size: u64, persistence: Persistence) -> io::Result<Self> {
        let whole = start.is_multiple_of(ALIGNMENT) && size.is_multiple_of(ALIGNMENT);
        if !whole || size == 0 || start.checked_add(size).is_none() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "persistent memory comes in multiples of 2 MiB",
            ));
        }
        Ok(Self {
            start,
            size,
            persistence,
            worker: None,
        })
    }
}

impl VirtioDevice for Pmem {
    fn kind(&self) -> DeviceKind {
        DeviceKind {
            id: 27,
            pci_class: 0xff00,
        }
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 16];
        config[..8].copy_from_slice(&self.start.to_le_bytes());
        config[8..].copy_from_slice(&self.size.to_le_bytes());
        read_bytes(&config, offset, data);
    }

    fn activate(&mut self, mut driver: Activation) -> Result<(), DeviceError> {
        let queue = driver.queue(0)?;
        let file = match &self.persistence {
            Persistence::File(file) => Some(file.try_clone())
                .transpose()
                .map_err(DeviceError::host("cannot use the file"))?,
            Persistence::Discarded => None,
        };
        let flusher = Flusher {
            file,
            chain: queue.chain(),
            queue,
            flushes: Vec::new(),
        };
        let worker = Worker::spawn("pmem", flusher, driver.notify)
            .map_err(DeviceError::host("cannot start a thread"))?;
        self.worker = Some(worker);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

/// The device's thread.
struct Flusher {
    file: Option<File>,
    queue: VirtQueue,
    chain: Chain,
    /// Requests that wait for the file to be written.
    flushes: Vec<Chain>,
}

impl Flusher {
    /// Answers what is in the queue.
    fn serve(&mut self) -> Result<(), DeviceError> {
        while self.flushes.len() < usize::from(QUEUE_SIZE) && self.queue.pop(&mut self.chain)? {
            if self.chain.writable.len() < SUCCEEDED.len() {
                return Err(DeviceError::Malformed(
                    "a request without room for an answer",
                ));
            }
            if self.chain.readable.array_at(0) == Some(FLUSH) {
                let next = self.queue.chain();
                self.flushes.push(std::mem::replace(&mut self.chain, next));
            } else {
                answer(&mut self.queue, &self.chain, FAILED)?;
            }
        }
        if !self.flushes.is_empty() {
            let result = self.flush();
            for chain in self.flushes.drain(..) {
                answer(&mut self.queue, &chain, result)?;
            }
        }
        self.queue.signal()?;
        if self.queue.enable_kicks()? {
            self.queue.come_back();
        }
        Ok(())
    }

    fn flush(&self) -> [u8; 4] {
        match self.file.as_ref().map(File::sync_data) {
            None | Some(Ok(())) => SUCCEEDED,
            Some(Err(error)) => {
                warn!("persistent memory cannot be written to its file: {error}");
                FAILED
            }
        }
    }
}

fn answer(queue: &mut VirtQueue, chain: &Chain, result: [u8; 4]) -> Result<(), DeviceError> {
    let written = chain.writable.write_at(0, &result);
    queue.push(chain.head(), written as u32)
}

impl Handler for Flusher {
    fn start(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        poll.add_bell(self.queue.kick(), 0)
            .map_err(DeviceError::host("cannot wait for the driver"))
    }

    fn ready(&mut self, _token: u64, _events: EventSet, _poll: &Poll) -> Result<(), DeviceError> {
        self.serve()
    }
}
