//! The entropy device (virtio 1.3, section 5.4): what the driver makes available is filled with random bytes.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use vmm_sys_util::epoll::EventSet;

use super::{
    Activation, Chain, DeviceError, DeviceKind, Handler, Poll, VirtQueue, VirtioDevice, Worker,
};

const QUEUE_SIZE: u16 = 256;
/// The most bytes that are read for one request; a driver asks again.
const AT_ONCE: usize = 64 << 10;

/// A source of randomness for the guest.
pub struct Rng {
    source: File,
    worker: Option<Worker<Filler>>,
}

impl Rng {
    /// A device that reads `source`.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(source: &Path) -> io::Result<Self> {
        Ok(Self {
            source: File::open(source)?,
            worker: None,
        })
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> DeviceKind {
        DeviceKind {
            id: 4,
            pci_class: 0xff00,
        }
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, mut driver: Activation) -> Result<(), DeviceError> {
        let queue = driver.queue(0)?;
        let source = self
            .source
            .try_clone()
            .map_err(DeviceError::host("cannot use the source of randomness"))?;
        let filler = Filler {
            source,
            chain: queue.chain(),
            bytes: Vec::new(),
            queue,
        };
        let worker = Worker::spawn("rng", filler, driver.notify)
            .map_err(DeviceError::host("cannot start a thread"))?;
        self.worker = Some(worker);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

/// The device's thread.
struct Filler {
    source: File,
    queue: VirtQueue,
    chain: Chain,
    bytes: Vec<u8>,
}

impl Handler for Filler {
    fn start(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        poll.add_bell(self.queue.kick(), 0)
            .map_err(DeviceError::host("cannot wait for the driver"))
    }

    fn ready(&mut self, _token: u64, _events: EventSet, _poll: &Poll) -> Result<(), DeviceError> {
        loop {
            while self.queue.pop(&mut self.chain)? {
                let wanted = self.chain.writable.len().min(AT_ONCE);
                self.bytes.resize(wanted, 0);
                self.source
                    .read_exact(&mut self.bytes)
                    .map_err(DeviceError::host("cannot read the source of randomness"))?;
                let written = self.chain.writable.write_at(0, &self.bytes);
                self.queue.push(self.chain.head(), written as u32)?;
            }
            self.queue.signal()?;
            if !self.queue.enable_kicks()? {
                return Ok(());
            }
        }
    }
}
