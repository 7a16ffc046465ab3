//! The memory balloon (virtio 1.3, section 5.5): the guest gives memory back to the host, and gets it again.
//!
//! A [`BalloonHandle`] sets how large the balloon is to be. The guest's driver allocates pages and tells their numbers; the host
//! takes their memory. To get a page back, the guest just uses it. With `deflate_on_oom` it may do so whenever it would have to
//! kill a process otherwise; without, pages stay with the host until the balloon is to be smaller. With `free_page_reporting`
//! the guest also tells, all by itself, of pages that it has no use for.
//!
//! Memory goes back in whole pages of the host: numbers that follow each other go together, and a part of a huge page stays.

mod statistics;
mod worker;

use std::{
    io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::worker::{Collector, Queues};
use super::{
    Activation, Announcer, DeviceError, DeviceKind, Reclaim, VirtioDevice, Worker, read_bytes,
};

pub use statistics::{Statistic, Statistics};

const QUEUE_SIZE: u16 = 256;
/// Bytes of the pages that the guest counts in, whatever the size of its own or the host's.
const PAGE: u64 = 4096;

/// `VIRTIO_BALLOON_F_STATS_VQ`.
const F_STATISTICS: u64 = 1 << 1;
/// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM`.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// `VIRTIO_BALLOON_F_REPORTING`.
const F_REPORTING: u64 = 1 << 5;

/// Offset of the number of pages that the guest says to have given.
const ACTUAL: u64 = 4;

/// What a balloon does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonOptions {
    /// How large it is to be at first, in bytes.
    pub size: u64,
    /// Whether the guest takes pages back when it would have to kill a process otherwise.
    pub deflate_on_oom: bool,
    /// Whether the guest tells of pages that it does not use.
    pub free_page_reporting: bool,
}

/// Why a balloon cannot be.
#[derive(Debug, Error)]
pub enum BalloonError {
    /// It is to be larger than the guest could say.
    #[error("a balloon of {0} bytes is larger than any can be")]
    TooLarge(u64),
    /// The host has no more descriptors.
    #[error("cannot make an event")]
    Event(#[source] io::Error),
}

/// A balloon.
pub struct Balloon {
    features: u64,
    reclaim: Arc<dyn Reclaim>,
    shared: Arc<Shared>,
    worker: Option<Worker<Collector>>,
}

impl Balloon {
    /// A balloon whose memory goes where `reclaim` takes it.
    ///
    /// # Errors
    /// When it is too large, or the host has no more descriptors.
    pub fn new(options: BalloonOptions, reclaim: Arc<dyn Reclaim>) -> Result<Self, BalloonError> {
        let mut features = F_STATISTICS;
        if options.deflate_on_oom {
            features |= F_DEFLATE_ON_OOM;
        }
        if options.free_page_reporting {
            features |= F_REPORTING;
        }
        let shared = Arc::new(Shared {
            target: AtomicU32::new(0),
            actual: AtomicU32::new(0),
            announcer: Announcer::default(),
            ask: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(BalloonError::Event)?,
            answers: Mutex::default(),
            answered: Condvar::new(),
        });
        let balloon = Self {
            features,
            reclaim,
            shared,
            worker: None,
        };
        balloon.handle().resize(options.size)?;
        Ok(balloon)
    }

    /// A handle to change the balloon with.
    #[must_use]
    pub fn handle(&self) -> BalloonHandle {
        BalloonHandle(Arc::clone(&self.shared))
    }
}

/// The VMM's side of a balloon.
#[derive(Clone)]
pub struct BalloonHandle(Arc<Shared>);

impl BalloonHandle {
    /// The balloon is to hold `bytes`, rounded down to pages of 4 KiB. The guest gets there in its own time, or not at all.
    ///
    /// # Errors
    /// When that is more than the guest could say.
    pub fn resize(&self, bytes: u64) -> Result<(), BalloonError> {
        let pages = u32::try_from(bytes / PAGE).map_err(|_| BalloonError::TooLarge(bytes))?;
        if self.0.target.swap(pages, Ordering::Relaxed) != pages {
            self.0.announcer.announce();
        }
        Ok(())
    }

    /// How many bytes it is to hold.
    #[must_use]
    pub fn target(&self) -> u64 {
        u64::from(self.0.target.load(Ordering::Relaxed)) * PAGE
    }

    /// How many bytes it holds, as the guest says.
    #[must_use]
    pub fn actual(&self) -> u64 {
        u64::from(self.0.actual.load(Ordering::Relaxed)) * PAGE
    }

    /// What the guest has last said of its memory.
    #[must_use]
    pub fn latest(&self) -> Option<Statistics> {
        self.0.answers().latest
    }

    /// Asks the guest for its statistics. `None` when it has not answered within `patience`.
    #[must_use]
    pub fn statistics(&self, patience: Duration) -> Option<Statistics> {
        let answers = self.0.answers();
        let before = answers.count;
        // An eventfd that is full is readable, too.
        let _ = self.0.ask.write(1);
        let (answers, _) = self
            .0
            .answered
            .wait_timeout_while(answers, patience, |answers| answers.count == before)
            .unwrap_or_else(PoisonError::into_inner);
        (answers.count != before)
            .then_some(answers.latest)
            .flatten()
    }
}

/// What device, thread and handles have in common.
struct Shared {
    /// Pages that the balloon is to hold.
    target: AtomicU32,
    /// Pages that it holds, as the guest says.
    actual: AtomicU32,
    announcer: Announcer,
    /// Somebody wants statistics.
    ask: EventFd,
    answers: Mutex<Answers>,
    answered: Condvar,
}

#[derive(Default)]
struct Answers {
    count: u64,
    latest: Option<Statistics>,
}

impl Shared {
    fn answers(&self) -> MutexGuard<'_, Answers> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer(&self, statistics: Statistics) {
        let mut answers = self.answers();
        answers.count += 1;
        answers.latest = Some(statistics);
        drop(answers);
        self.answered.notify_all();
    }

    fn config(&self) -> [u8; 8] {
        let words = [&self.target, &self.actual].map(|word| word.load(Ordering::Relaxed));
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&words[0].to_le_bytes());
        bytes[4..].copy_from_slice(&words[1].to_le_bytes());
        bytes
    }
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> DeviceKind {
        DeviceKind {
            id: 5,
            pci_class: 0xff00,
        }
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let count = if self.features & F_REPORTING == 0 {
            3
        } else {
            4
        };
        vec![QUEUE_SIZE; count]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.shared.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut config = self.shared.config();
        for (index, byte) in (0..).zip(data) {
            if let Some(position) = offset.checked_add(index)
                && position >= ACTUAL
                && let Some(place) = config.get_mut(position as usize)
            {
                *place = *byte;
            }
        }
        let [.., a, b, c, d] = config;
        let actual = u32::from_le_bytes([a, b, c, d]);
        self.shared.actual.store(actual, Ordering::Relaxed);
    }

    fn activate(&mut self, mut driver: Activation) -> Result<(), DeviceError> {
        // A queue of a feature that was not agreed on does not count: those behind it move up.
        let mut next = 2;
        let mut queue_of = |feature, driver: &mut Activation| {
            if driver.features & feature == 0 {
                return Ok(None);
            }
            next += 1;
            driver.queue(next - 1).map(Some)
        };
        let queues = Queues {
            inflate: driver.queue(0)?,
            deflate: driver.queue(1)?,
            statistics: queue_of(F_STATISTICS, &mut driver)?,
            reports: queue_of(F_REPORTING, &mut driver)?,
        };
        let collector = Collector::new(
            queues,
            driver.memory,
            Arc::clone(&self.reclaim),
            Arc::clone(&self.shared),
        );
        let worker = Worker::spawn("balloon", collector, Arc::clone(&driver.notify))
            .map_err(DeviceError::host("cannot start a thread"))?;
        self.worker = Some(worker);
        self.shared.announcer.set(Some(driver.notify));
        Ok(())
    }

    fn reset(&mut self) {
        self.shared.announcer.set(None);
        self.worker = None;
        // A driver that starts again has nothing in the balloon.
        self.shared.actual.store(0, Ordering::Relaxed);
    }
}
