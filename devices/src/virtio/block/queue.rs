//! One queue of a disk: takes requests from the driver, hands them to the back end, and answers them.
//!
//! Each request has a slot for as long as it is in flight, and a slot has at most one job at the back end. Slots are made
//! once, so a request costs no allocation. They keep the buffers that the kernel works on: the handler does not go before
//! the last job is done.

use std::{
    io, mem,
    os::fd::AsRawFd,
    sync::{Arc, atomic::Ordering},
};

use tracing::{error, warn};
use virtio_queue::QueueT;
use vmm_sys_util::epoll::EventSet;

use super::{
    Disk,
    backend::{Access, Action, Backend, Completion, Job, Unmap},
    bounce::{self, Bounce},
    counts::{Counts, READ_BYTES, READ_OPS, WRITE_BYTES, WRITE_OPS},
    request::{Request, Rules, Segment, Status},
};
use crate::virtio::{Buffers, Chain, DeviceError, Handler, Poll, VirtQueue, rate_limiter::Gate};

/// The driver has kicked.
const KICK: u64 = 0;
/// The back end has something done.
const DONE: u64 = 1;
/// The rate allows more.
const TIMER: u64 = 2;

/// The thread of a queue.
pub(super) struct QueueHandler {
    name: String,
    queue: VirtQueue,
    backend: Box<dyn Backend>,
    slots: Vec<Slot>,
    free: Vec<u16>,
    /// Jobs at the back end.
    in_flight: usize,
    gate: Gate,
    /// The request that the gate has stopped.
    stopped: Option<u16>,
    disk: Arc<Disk>,
    rules: Rules,
    counts: Arc<Counts>,
    /// The last error of the host that was logged: a guest does not fill the log by asking again.
    logged: Option<io::ErrorKind>,
}

/// A request in flight.
struct Slot {
    chain: Chain,
    /// The header, and afterwards what is done of the data.
    front: Buffers,
    status: Buffers,
    request: Request,
    /// What it costs, in bytes.
    bytes: u64,
    /// What the answer says to be written.
    written: u32,
    stage: Stage,
    bounce: Bounce,
}

/// Which job of a request is at the back end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The data from this offset on, straight from its buffers or by the detour.
    Data { offset: u64, way: Way },
    /// The segment with this number.
    Segment { index: u32, unmap: Unmap },
    /// A flush, after which the request is done.
    Flush,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Straight,
    Bounced,
}

/// Why no more requests are taken out of the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// There are none.
    Empty,
    /// A job must be done first, or the rate does not allow it.
    Later,
    /// The thread must look for other events.
    Turn,
}

impl QueueHandler {
    pub(super) fn new(
        name: String,
        queue: VirtQueue,
        backend: Box<dyn Backend>,
        gate: Gate,
        disk: Arc<Disk>,
        rules: Rules,
        counts: Arc<Counts>,
    ) -> Self {
        let size = queue.ring().size();
        let slots = (0..size).map(|_| Slot::new(&queue)).collect();
        Self {
            name,
            queue,
            backend,
            slots,
            free: (0..size).rev().collect(),
            in_flight: 0,
            gate,
            stopped: None,
            disk,
            rules,
            counts,
            logged: None,
        }
    }

    /// Takes what is in the queue, starts it, and answers what is done.
    fn run(&mut self) -> Result<(), DeviceError> {
        self.queue.disable_kicks()?;
        let mut turn = 2 * self.slots.len();
        loop {
            let stop = self.take(&mut turn)?;
            let done = self.answer()?;
            self.queue.signal()?;
            match stop {
                Stop::Empty if self.queue.enable_kicks()? => self.queue.disable_kicks()?,
                Stop::Empty => return Ok(()),
                Stop::Later if done > 0 && !self.gate.is_closed() => {}
                Stop::Later => return Ok(()),
                Stop::Turn => {
                    self.queue.come_back();
                    return Ok(());
                }
            }
        }
    }

    /// Takes requests out of the queue and begins them.
    fn take(&mut self, turn: &mut usize) -> Result<Stop, DeviceError> {
        loop {
            if self.gate.is_closed() {
                return Ok(Stop::Later);
            }
            let Some(tag) = self.free.last().copied() else {
                return Ok(Stop::Later);
            };
            if *turn == 0 {
                return Ok(Stop::Turn);
            }
            let slot = &mut self.slots[usize::from(tag)];
            if !self.queue.pop(&mut slot.chain)? {
                return Ok(Stop::Empty);
            }
            *turn -= 1;
            self.free.pop();
            // It may change at any time.
            self.rules.capacity = self.disk.capacity.load(Ordering::Acquire);
            slot.take(&self.rules)?;
            self.admit(tag)?;
        }
    }

    /// Begins a request, or has it wait for the rate to allow it.
    fn admit(&mut self, tag: u16) -> Result<(), DeviceError> {
        let bytes = self.slots[usize::from(tag)].bytes;
        let admitted = self
            .gate
            .admit(1, bytes)
            .map_err(DeviceError::host("cannot set a timer"))?;
        if admitted {
            self.begin(tag)
        } else {
            self.stopped = Some(tag);
            Ok(())
        }
    }

    fn begin(&mut self, tag: u16) -> Result<(), DeviceError> {
        match self.slots[usize::from(tag)].request {
            Request::Read(offset) | Request::Write(offset) => self.transfer(tag, offset),
            Request::Flush if self.rules.access == Access::ReadOnly => self.finish(tag, Status::Ok),
            Request::Flush => self.flush(tag),
            Request::Discard | Request::WriteZeroes => self.segment(tag, 0),
            Request::Identify => {
                let slot = &mut self.slots[usize::from(tag)];
                slot.chain.writable.write_at(0, &self.disk.serial);
                self.finish(tag, Status::Ok)
            }
            Request::Answered(status) => self.finish(tag, status),
        }
    }

    /// Reads or writes what is left of the data, from `offset` on.
    fn transfer(&mut self, tag: u16, offset: u64) -> Result<(), DeviceError> {
        let slot = &mut self.slots[usize::from(tag)];
        let (action, data) = match slot.request {
            Request::Write(_) => (Action::Write, &slot.chain.readable),
            _ => (Action::Read, &slot.chain.writable),
        };
        if data.is_empty() {
            return self.end_of_data(tag);
        }
        let (way, length, vectors) = if bounce::is_needed(data, &self.disk.geometry) {
            let length = slot.bounce.prepare(data.len());
            if action == Action::Write {
                slot.bounce.fill(data, length);
            }
            (Way::Bounced, length, slot.bounce.vectors())
        } else {
            (Way::Straight, data.len(), data.vectors())
        };
        slot.stage = Stage::Data { offset, way };
        let job = Job {
            tag,
            action,
            offset,
            length: length as u64,
            vectors,
        };
        // SAFETY: the vectors belong to the slot, which is not touched before the job is done, and the buffers to the guest's
        // memory, which the slot's chain keeps, or to the slot's own.
        let submitted = unsafe { self.backend.submit(job) };
        self.submitted(tag, submitted)
    }

    /// All data of a request is read or written.
    fn end_of_data(&mut self, tag: u16) -> Result<(), DeviceError> {
        let read = matches!(self.slots[usize::from(tag)].request, Request::Read(_));
        let writeback = self.disk.writeback.load(Ordering::Relaxed);
        if read || writeback {
            self.finish(tag, Status::Ok)
        } else {
            self.flush(tag)
        }
    }

    /// Begins the segment with number `index`, if there is one.
    fn segment(&mut self, tag: u16, index: u32) -> Result<(), DeviceError> {
        let slot = &self.slots[usize::from(tag)];
        match Segment::read(slot.request, &slot.chain.readable, index, &self.rules) {
            Ok(Some(segment)) if segment.length == 0 => self.segment(tag, index + 1),
            Ok(Some(segment)) => self.clear(tag, index, segment),
            Ok(None) => self.end_of_data(tag),
            Err(status) => self.finish(tag, status),
        }
    }

    fn clear(&mut self, tag: u16, index: u32, segment: Segment) -> Result<(), DeviceError> {
        let slot = &mut self.slots[usize::from(tag)];
        slot.stage = Stage::Segment {
            index,
            unmap: segment.unmap,
        };
        let action = match slot.request {
            Request::Discard => Action::Discard,
            _ => Action::WriteZeroes(segment.unmap),
        };
        self.submit_plain(tag, action, segment.offset, segment.length)
    }

    fn flush(&mut self, tag: u16) -> Result<(), DeviceError> {
        self.slots[usize::from(tag)].stage = Stage::Flush;
        self.submit_plain(tag, Action::Flush, 0, 0)
    }

    /// Hands a job without buffers to the back end.
    fn submit_plain(
        &mut self,
        tag: u16,
        action: Action,
        offset: u64,
        length: u64,
    ) -> Result<(), DeviceError> {
        let job = Job {
            tag,
            action,
            offset,
            length,
            vectors: &[],
        };
        // SAFETY: there are no buffers.
        let submitted = unsafe { self.backend.submit(job) };
        self.submitted(tag, submitted)
    }

    fn submitted(&mut self, tag: u16, submitted: io::Result<()>) -> Result<(), DeviceError> {
        match submitted {
            Ok(()) => {
                self.in_flight += 1;
                Ok(())
            }
            Err(error) => self.fail(tag, &error),
        }
    }

    /// Starts what the back end has taken, and answers what is done. Returns how many jobs that were.
    fn answer(&mut self) -> Result<usize, DeviceError> {
        let mut done = 0;
        loop {
            self.backend
                .start()
                .map_err(DeviceError::host("cannot work on the disk image"))?;
            let before = done;
            while let Some(completion) = self.backend.completed() {
                done += 1;
                self.in_flight -= 1;
                self.completed(completion)?;
            }
            if done == before {
                return Ok(done);
            }
        }
    }

    fn completed(&mut self, completion: Completion) -> Result<(), DeviceError> {
        let tag = completion.tag;
        let stage = self.slots[usize::from(tag)].stage;
        match (stage, completion.result) {
            (Stage::Data { offset, way }, Ok(count)) => self.moved(tag, offset, way, count),
            (Stage::Segment { index, .. }, Ok(_)) => self.segment(tag, index + 1),
            (Stage::Flush, Ok(_)) => self.finish(tag, Status::Ok),
            (Stage::Data { offset, .. }, Err(error))
                if error.kind() == io::ErrorKind::Interrupted =>
            {
                self.transfer(tag, offset)
            }
            (
                Stage::Segment {
                    index,
                    unmap: Unmap::Allowed,
                },
                Err(error),
            ) if is_unsupported(&error) => self.keep(tag, index),
            (_, Err(error)) => self.fail(tag, &error),
        }
    }

    /// `count` bytes of the data at `offset` are read or written: goes on behind them.
    fn moved(&mut self, tag: u16, offset: u64, way: Way, count: usize) -> Result<(), DeviceError> {
        if count == 0 {
            // The image ends before the disk does: somebody has cut it off.
            return self.fail(tag, &io::ErrorKind::UnexpectedEof.into());
        }
        let slot = &mut self.slots[usize::from(tag)];
        let data = match slot.request {
            Request::Write(_) => &mut slot.chain.readable,
            _ => &mut slot.chain.writable,
        };
        if way == Way::Bounced && matches!(slot.request, Request::Read(_)) {
            slot.bounce.empty(data, count);
        }
        if count >= data.len() {
            return self.end_of_data(tag);
        }
        data.split_front(count, &mut slot.front);
        self.transfer(tag, offset.saturating_add(count as u64))
    }

    /// Zeroes that cannot be written by giving the space back are written in it.
    fn keep(&mut self, tag: u16, index: u32) -> Result<(), DeviceError> {
        let slot = &self.slots[usize::from(tag)];
        match Segment::read(slot.request, &slot.chain.readable, index, &self.rules) {
            Ok(Some(segment)) => self.clear(
                tag,
                index,
                Segment {
                    unmap: Unmap::Forbidden,
                    ..segment
                },
            ),
            // The driver has changed it meanwhile.
            Ok(None) | Err(_) => self.finish(tag, Status::Failed),
        }
    }

    fn fail(&mut self, tag: u16, error: &io::Error) -> Result<(), DeviceError> {
        let request = self.slots[usize::from(tag)].request;
        if self.logged.replace(error.kind()) != Some(error.kind()) {
            warn!("{}: {request:?} has failed: {error}", self.name);
        }
        let segmented = matches!(request, Request::Discard | Request::WriteZeroes);
        let status = if segmented && is_unsupported(error) {
            Status::Unsupported
        } else {
            Status::Failed
        };
        self.finish(tag, status)
    }

    fn finish(&mut self, tag: u16, status: Status) -> Result<(), DeviceError> {
        let slot = &mut self.slots[usize::from(tag)];
        slot.status.write_at(0, &[status as u8]);
        let counted = match slot.request {
            Request::Read(_) => Some((READ_OPS, READ_BYTES)),
            Request::Write(_) => Some((WRITE_OPS, WRITE_BYTES)),
            _ => None,
        };
        if let (Status::Ok, Some((ops, bytes))) = (status, counted) {
            self.counts.add(ops, 1);
            self.counts.add(bytes, slot.bytes);
        }
        let (head, written) = (slot.chain.head(), slot.written);
        self.free.push(tag);
        self.queue.push(head, written)
    }
}

impl Handler for QueueHandler {
    fn start(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        let add = |fd, token| {
            poll.add(fd, token, EventSet::IN)
                .map_err(DeviceError::host("cannot wait for events"))
        };
        poll.add_bell(self.queue.kick(), KICK)
            .map_err(DeviceError::host("cannot wait for the driver"))?;
        add(self.gate.as_raw_fd(), TIMER)?;
        self.backend
            .descriptor()
            .map_or(Ok(()), |descriptor| add(descriptor, DONE))
    }

    fn ready(&mut self, token: u64, _events: EventSet, _poll: &Poll) -> Result<(), DeviceError> {
        if token == TIMER {
            self.gate
                .reopen()
                .map_err(DeviceError::host("cannot read a timer"))?;
            if let Some(tag) = self.stopped.take() {
                self.admit(tag)?;
            }
        }
        self.run()
    }
}

impl Drop for QueueHandler {
    fn drop(&mut self) {
        while self.in_flight > 0 {
            let Err(error) = self.backend.wait() else {
                while self.backend.completed().is_some() {
                    self.in_flight -= 1;
                }
                continue;
            };
            // The kernel may still write to the buffers, so they stay. Nothing is known to end here.
            error!("{}: cannot wait for the disk image: {error}", self.name);
            mem::forget(mem::take(&mut self.slots));
            return;
        }
    }
}

impl Slot {
    fn new(queue: &VirtQueue) -> Self {
        Self {
            chain: queue.chain(),
            front: Buffers::default(),
            status: Buffers::default(),
            request: Request::Answered(Status::Failed),
            bytes: 0,
            written: 0,
            stage: Stage::Flush,
            bounce: Bounce::default(),
        }
    }

    fn take(&mut self, rules: &Rules) -> Result<(), DeviceError> {
        // A chain has less than 2^32 bytes.
        self.written = u32::try_from(self.chain.writable.len()).unwrap_or(u32::MAX);
        self.request = Request::take(&mut self.chain, &mut self.front, &mut self.status, rules)?;
        self.bytes = match self.request {
            Request::Read(_) => self.chain.writable.len() as u64,
            Request::Write(_) => self.chain.readable.len() as u64,
            _ => 0,
        };
        Ok(())
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Unsupported
}
