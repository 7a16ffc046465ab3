//! Console output on its way to the host: a bounded queue, and the thread that empties it.
//!
//! Characters arrive one by one and are gathered for [`LINGER`] before they are written, so that a burst costs one system
//! call and a prompt without a newline still appears at once. When the host does not take them, the queue fills and
//! then holds up the guest, as flow control would. What can be lost is the last [`LINGER`] before the process is killed.

use std::io::{self, ErrorKind, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// How long characters are gathered before they are written.
const LINGER: Duration = Duration::from_millis(2);
/// Characters that are worth a write without waiting longer.
const BATCH: usize = 4096;
/// Characters that wait before the guest has to.
const CAPACITY: usize = 256 << 10;
/// How often a sink that would block is tried again.
const RETRY: Duration = Duration::from_millis(5);
/// How long the end of the port waits for the host to take what is left.
const LAST_FLUSH: Duration = Duration::from_secs(1);

/// How far the port is from its end.
#[derive(Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    /// A full queue holds up the guest.
    #[default]
    Open,
    /// Nobody is held up any more: what does not fit is lost.
    Closing,
    /// The thread ends when nothing is left.
    Ended,
}

#[derive(Default)]
struct Queue {
    pending: Vec<u8>,
    /// The thread is writing what it took from `pending`.
    writing: bool,
    /// The thread waits for the first character.
    idle: bool,
    /// Somebody waits for the queue to be empty: no lingering.
    urgent: bool,
    phase: Phase,
    lost: u64,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    /// For the thread: there is something to do.
    work: Condvar,
    /// For those who wait for room or for an empty queue.
    progress: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The queue and its thread. Dropping it writes what is left, for at most a second, and ends the thread.
pub(super) struct Output {
    shared: Arc<Shared>,
}

/// The end of the queue that the port writes to.
pub(super) struct Sender {
    shared: Arc<Shared>,
}

impl Output {
    /// Starts a thread that writes to `sink`.
    pub(super) fn start(sink: Box<dyn Write + Send>) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        thread::Builder::new()
            .name("serial-out".into())
            .spawn(move || drain(&theirs, sink))?;
        Ok(Self { shared })
    }

    pub(super) fn sender(&self) -> Sender {
        Sender {
            shared: Arc::clone(&self.shared),
        }
    }

    /// Waits until all that was printed is written; false when that takes longer than `timeout`.
    pub(super) fn flush(&self, timeout: Duration) -> bool {
        let mut queue = self.shared.lock();
        queue.urgent = true;
        self.shared.work.notify_one();
        let busy = |queue: &mut Queue| queue.writing || !queue.pending.is_empty();
        let (mut queue, result) = self
            .shared
            .progress
            .wait_timeout_while(queue, timeout, busy)
            .unwrap_or_else(PoisonError::into_inner);
        queue.urgent = false;
        !result.timed_out()
    }

    /// From now on the guest is never held up: characters beyond the capacity are lost.
    pub(super) fn close(&self) {
        self.advance(Phase::Closing);
    }

    fn advance(&self, phase: Phase) {
        let mut queue = self.shared.lock();
        queue.phase = queue.phase.max(phase);
        self.shared.work.notify_one();
        self.shared.progress.notify_all();
    }

    /// Characters that could not be written.
    pub(super) fn lost(&self) -> u64 {
        self.shared.lock().lost
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        self.close();
        self.flush(LAST_FLUSH);
        self.advance(Phase::Ended);
    }
}

impl Write for Sender {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut queue = self
            .shared
            .progress
            .wait_while(self.shared.lock(), |queue| {
                queue.pending.len() >= CAPACITY && queue.phase == Phase::Open
            })
            .unwrap_or_else(PoisonError::into_inner);
        if queue.pending.len() >= CAPACITY {
            queue.lost += bytes.len() as u64;
            return Ok(bytes.len());
        }
        queue.pending.extend_from_slice(bytes);
        // A thread that lingers needs no wake-up, which would be a system call, until a batch is complete.
        let wake = std::mem::take(&mut queue.idle) || queue.pending.len() == BATCH;
        drop(queue);
        if wake {
            self.shared.work.notify_one();
        }
        Ok(bytes.len())
    }

    /// Nothing: gathering is the point.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The thread: takes what is pending and writes it, until the port has ended and nothing is left.
fn drain(shared: &Shared, mut sink: Box<dyn Write + Send>) {
    let mut batch = Vec::with_capacity(BATCH);
    let mut queue = shared.lock();
    loop {
        while queue.pending.is_empty() {
            if queue.phase == Phase::Ended {
                return;
            }
            queue.idle = true;
            queue = shared
                .work
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
        queue.idle = false;
        let gathers = |queue: &mut Queue| {
            queue.pending.len() < BATCH && !queue.urgent && queue.phase == Phase::Open
        };
        queue = shared
            .work
            .wait_timeout_while(queue, LINGER, gathers)
            .unwrap_or_else(PoisonError::into_inner)
            .0;
        std::mem::swap(&mut queue.pending, &mut batch);
        queue.writing = true;
        drop(queue);
        let lost = write_out(shared, sink.as_mut(), &batch);
        batch.clear();
        queue = shared.lock();
        queue.writing = false;
        queue.lost += lost;
        shared.progress.notify_all();
    }
}

/// Writes `bytes` and returns how many of them were lost.
fn write_out(shared: &Shared, sink: &mut dyn Write, mut bytes: &[u8]) -> u64 {
    while !bytes.is_empty() {
        match sink.write(bytes) {
            Ok(0) => break,
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error)
                if error.kind() == ErrorKind::WouldBlock && shared.lock().phase != Phase::Ended =>
            {
                thread::sleep(RETRY);
            }
            Err(_) => break,
        }
    }
    // A sink that cannot flush has taken the bytes all the same.
    let _ = sink.flush();
    bytes.len() as u64
}
