//! The device's thread: takes the memory of the pages that the guest names.

use std::{os::fd::AsRawFd, sync::Arc};

use tracing::warn;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::epoll::EventSet;

use super::{PAGE, Shared, Statistics};
use crate::virtio::{Chain, DeviceError, Handler, Poll, Reclaim, VirtQueue};

const INFLATE: u64 = 0;
const DEFLATE: u64 = 1;
const STATISTICS: u64 = 2;
const REPORTS: u64 = 3;
const ASKED: u64 = 4;

/// How many requests are answered before other events get their turn.
const TURN: u32 = 64;
/// The most page numbers in one request. Linux has 256.
const MOST_PAGES: usize = 64 << 10;

/// The queues that were agreed on.
pub(super) struct Queues {
    pub(super) inflate: VirtQueue,
    pub(super) deflate: VirtQueue,
    pub(super) statistics: Option<VirtQueue>,
    pub(super) reports: Option<VirtQueue>,
}

pub(super) struct Collector {
    queues: Queues,
    chain: Chain,
    /// Numbers of pages in the request at hand.
    pages: Vec<u32>,
    memory: GuestMemoryMmap,
    reclaim: Arc<dyn Reclaim>,
    complained: bool,
    shared: Arc<Shared>,
    /// The buffer that the guest wants back when it is to fill in its statistics.
    form: Option<u16>,
}

/// What a queue is for.
#[derive(Clone, Copy)]
enum Purpose {
    Inflate,
    Deflate,
    Report,
}

impl Collector {
    pub(super) fn new(
        queues: Queues,
        memory: GuestMemoryMmap,
        reclaim: Arc<dyn Reclaim>,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            chain: queues.inflate.chain(),
            queues,
            pages: Vec::new(),
            memory,
            reclaim,
            complained: false,
            shared,
            form: None,
        }
    }

    fn queue(&mut self, purpose: Purpose) -> Option<&mut VirtQueue> {
        match purpose {
            Purpose::Inflate => Some(&mut self.queues.inflate),
            Purpose::Deflate => Some(&mut self.queues.deflate),
            Purpose::Report => self.queues.reports.as_mut(),
        }
    }

    fn serve(&mut self, purpose: Purpose) -> Result<(), DeviceError> {
        let mut chain = std::mem::take(&mut self.chain);
        let done = self.serve_with(purpose, &mut chain);
        self.chain = chain;
        done
    }

    fn serve_with(&mut self, purpose: Purpose, chain: &mut Chain) -> Result<(), DeviceError> {
        for _ in 0..TURN {
            let Some(queue) = self.queue(purpose) else {
                return Ok(());
            };
            if !queue.pop(chain)? {
                queue.signal()?;
                if queue.enable_kicks()? {
                    continue;
                }
                return Ok(());
            }
            match purpose {
                Purpose::Inflate => self.take_pages(chain)?,
                // The guest gets its pages back by using them.
                Purpose::Deflate => {}
                Purpose::Report => self.take_reported(chain),
            }
            if let Some(queue) = self.queue(purpose) {
                queue.push(chain.head(), 0)?;
            }
        }
        let Some(queue) = self.queue(purpose) else {
            return Ok(());
        };
        queue.come_back();
        queue.signal()
    }

    /// Takes the pages whose numbers are in the request.
    fn take_pages(&mut self, chain: &Chain) -> Result<(), DeviceError> {
        let count = chain.readable.len() / size_of::<u32>();
        if count > MOST_PAGES {
            return Err(DeviceError::Malformed("too many pages in one request"));
        }
        self.pages.clear();
        let mut bytes = [0; 1024];
        let (mut offset, end) = (0, count * size_of::<u32>());
        while offset < end {
            let length = chain.readable.read_at(offset, &mut bytes);
            let (numbers, _) = bytes[..length.min(end - offset)].as_chunks::<4>();
            self.pages
                .extend(numbers.iter().map(|number| u32::from_le_bytes(*number)));
            offset += bytes.len();
        }
        self.pages.sort_unstable();
        self.pages.dedup();
        for run in self
            .pages
            .chunk_by(|page, next| page.checked_add(1) == Some(*next))
        {
            let (address, length) = (u64::from(run[0]) * PAGE, run.len() as u64 * PAGE);
            let done = self.reclaim.reclaim(address, length);
            complain(&mut self.complained, done);
        }
        Ok(())
    }

    /// Takes the memory that the request's buffers are.
    fn take_reported(&mut self, chain: &Chain) {
        for vector in chain.writable.vectors() {
            let pointer = vector.iov_base as usize;
            let address = self.memory.iter().find_map(|region| {
                let offset = pointer.checked_sub(region.as_ptr() as usize)? as u64;
                (offset < region.len()).then(|| region.start_addr().0 + offset)
            });
            if let Some(address) = address {
                let done = self.reclaim.reclaim(address, vector.iov_len as u64);
                complain(&mut self.complained, done);
            }
        }
    }

    /// Reads the statistics that the guest has filled in.
    fn read_statistics(&mut self) -> Result<(), DeviceError> {
        let Some(queue) = &mut self.queues.statistics else {
            return Ok(());
        };
        // There is one buffer, which goes to and fro; when there are more, the guest gets those before back.
        for _ in 0..TURN {
            if !queue.pop(&mut self.chain)? {
                queue.signal()?;
                if queue.enable_kicks()? {
                    continue;
                }
                return Ok(());
            }
            self.shared.answer(Statistics::read(&self.chain.readable));
            if let Some(form) = self.form.replace(self.chain.head()) {
                queue.push(form, 0)?;
            }
        }
        queue.come_back();
        queue.signal()
    }

    /// Asks the guest for new statistics: it gets its buffer back.
    fn ask(&mut self) -> Result<(), DeviceError> {
        if let Some(queue) = &mut self.queues.statistics
            && let Some(form) = self.form.take()
        {
            queue.push(form, 0)?;
            queue.signal()?;
        }
        Ok(())
    }
}

/// Says once that memory does not go back.
fn complain(complained: &mut bool, done: std::io::Result<()>) {
    if let Err(error) = done
        && !std::mem::replace(complained, true)
    {
        warn!("memory in the balloon stays with the guest: {error}");
    }
}

impl Handler for Collector {
    fn start(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        let queues = [
            (Some(&self.queues.inflate), INFLATE),
            (Some(&self.queues.deflate), DEFLATE),
            (self.queues.statistics.as_ref(), STATISTICS),
            (self.queues.reports.as_ref(), REPORTS),
        ];
        let kicks = queues
            .into_iter()
            .filter_map(|(queue, token)| Some((queue?.kick(), token)));
        for (kick, token) in kicks {
            poll.add_bell(kick, token)
                .map_err(DeviceError::host("cannot wait for the driver"))?;
        }
        poll.add(self.shared.ask.as_raw_fd(), ASKED, EventSet::IN)
            .map_err(DeviceError::host("cannot wait for questions"))
    }

    fn ready(&mut self, token: u64, _events: EventSet, _poll: &Poll) -> Result<(), DeviceError> {
        match token {
            INFLATE => self.serve(Purpose::Inflate),
            DEFLATE => self.serve(Purpose::Deflate),
            STATISTICS => self.read_statistics(),
            REPORTS => self.serve(Purpose::Report),
            _ => {
                let _ = self.shared.ask.read();
                self.ask()
            }
        }
    }
}
