//! Jobs on a raw image by io_uring: one system call starts all that a driver has made available, and what the page cache
//! has is done when it returns.
//!
//! Writes into the page cache are the exception. On most file systems the kernel hands each of those to a thread of its own,
//! which takes longer than the write; so they are done [at once](at_once), for as long as the host does not make them wait.

mod at_once;

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsRawFd, RawFd},
    sync::Arc,
};

use io_uring::{IoUring, Probe, opcode, squeue::Entry, types};

use super::{Action, Backend, Blocking, Completion, Job, MOST_VECTORS};
use crate::virtio::block::image::{Cache, RawFile};
use at_once::AtOnce;

/// What must be there; all of it is since Linux 5.6.
const NEEDED: [u8; 4] = [
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
];
/// How often a kernel short of memory is asked again.
const ATTEMPTS: u32 = 1000;

/// A back end with a ring of its own.
pub(in super::super) struct Uring {
    ring: IoUring,
    file: Arc<RawFile>,
    /// Discards in flight by tag, as offset and length.
    discards: Vec<Option<(u64, u64)>>,
    at_once: AtOnce,
    /// What was done at once.
    done: VecDeque<Completion>,
}

impl Uring {
    /// A ring for at most `depth` jobs at a time on `file`, which was opened for `cache`.
    ///
    /// # Errors
    /// When the kernel has no io_uring, forbids it, or has too old a one.
    pub(in super::super) fn new(file: &Arc<RawFile>, cache: Cache, depth: u16) -> io::Result<Self> {
        let ring = IoUring::new(depth.into())?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if !NEEDED.iter().all(|code| probe.is_supported(*code)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Self {
            ring,
            file: Arc::clone(file),
            discards: vec![None; depth.into()],
            at_once: AtOnce::new(cache),
            done: VecDeque::with_capacity(depth.into()),
        })
    }
}

impl Backend for Uring {
    unsafe fn submit(&mut self, job: Job<'_>) -> io::Result<()> {
        if self.at_once.takes(&job) {
            let file = &self.file;
            // SAFETY: the caller vouches for the vectors and buffers.
            let result = self.at_once.time(|| unsafe { file.run(&job) });
            self.done.push_back(Completion {
                tag: job.tag,
                result,
            });
            return Ok(());
        }
        let file = types::Fd(self.file.as_raw_fd());
        let (vectors, count) = (
            job.vectors.as_ptr(),
            job.vectors.len().min(MOST_VECTORS) as u32,
        );
        let allocate = |mode| -> Entry {
            opcode::Fallocate::new(file, job.length)
                .offset(job.offset)
                .mode(mode)
                .build()
        };
        let entry = match job.action {
            Action::Read => opcode::Readv::new(file, vectors, count)
                .offset(job.offset)
                .build(),
            Action::Write => opcode::Writev::new(file, vectors, count)
                .offset(job.offset)
                .build(),
            Action::Flush => opcode::Fsync::new(file)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            Action::Discard => {
                if let Some(discard) = self.discards.get_mut(usize::from(job.tag)) {
                    *discard = Some((job.offset, job.length));
                }
                allocate(RawFile::DISCARD)
            }
            Action::WriteZeroes(unmap) => allocate(RawFile::zero_mode(unmap)),
        };
        let entry = entry.user_data(job.tag.into());
        // SAFETY: the caller keeps vectors and buffers until the job is done, and `self.file` keeps the descriptor open.
        unsafe { self.ring.submission().push(&entry) }
            .map_err(|_| io::Error::from(io::ErrorKind::QuotaExceeded))
    }

    fn start(&mut self) -> io::Result<()> {
        let mut attempts = 0;
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error)
                    if attempts < ATTEMPTS
                        && matches!(
                            error.raw_os_error(),
                            Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM)
                        ) =>
                {
                    attempts += 1;
                    std::thread::yield_now();
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn completed(&mut self) -> Option<Completion> {
        if let Some(done) = self.done.pop_front() {
            return Some(done);
        }
        let entry = self.ring.completion().next()?;
        let tag = entry.user_data() as u16;
        let mut result = usize::try_from(entry.result())
            .map_err(|_| io::Error::from_raw_os_error(-entry.result()));
        let discard = self
            .discards
            .get_mut(usize::from(tag))
            .and_then(Option::take);
        if let (Some((offset, length)), Err(error)) = (discard, &result)
            && error.raw_os_error() == Some(libc::EOPNOTSUPP)
        {
            // Some block devices forget data, but do not promise that it reads as zeroes: for those there is no request in
            // the ring, and only a call that blocks.
            result = self.file.forget(offset, length).map(|()| 0);
        }
        Some(Completion { tag, result })
    }

    fn wait(&mut self) -> io::Result<()> {
        if !self.done.is_empty() {
            return Ok(());
        }
        loop {
            match self.ring.submit_and_wait(1) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result.map(drop),
            }
        }
    }

    fn descriptor(&self) -> Option<RawFd> {
        Some(self.ring.as_raw_fd())
    }
}
