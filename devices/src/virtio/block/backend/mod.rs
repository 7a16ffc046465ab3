//! What the host does for a disk: an [`Image`] with the data, and for each queue a [`Backend`] that works on it.
//!
//! A back end takes jobs, each with a tag, and gives them back done in any order. It may do less of a read or write than it
//! was asked for; whoever asked goes on from there. Back ends never look at a job's buffers but to hand them to the kernel.

mod null;
mod pool;
mod uring;

use std::{io, os::fd::RawFd};

pub use null::NullImage;
pub(super) use pool::{Blocking, Pool};
pub(super) use uring::Uring;

/// The most buffers the kernel takes in one call (`IOV_MAX`).
pub const MOST_VECTORS: usize = 1024;

/// Whether a disk can be written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It cannot.
    ReadOnly,
    /// It can.
    ReadWrite,
}

/// Whether zeroes may be written by giving space back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmap {
    /// The space may be given back.
    Allowed,
    /// The space must stay.
    Forbidden,
}

/// Something to be done with an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Fill the buffers from the image.
    Read,
    /// Write the buffers to the image.
    Write,
    /// Bring everything that was written before to the disk.
    Flush,
    /// The data is not needed any more.
    Discard,
    /// Make it read as zeroes.
    WriteZeroes(Unmap),
}

/// An [`Action`] with all it needs.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    /// Names the job when it is done; below the depth the back end was made for.
    pub tag: u16,
    /// What to do.
    pub action: Action,
    /// Where in the image, in bytes.
    pub offset: u64,
    /// How many bytes; for reads and writes, those of `vectors`.
    pub length: u64,
    /// The buffers of a read or write.
    pub vectors: &'a [libc::iovec],
}

/// A job that is done.
#[derive(Debug)]
pub struct Completion {
    /// The tag of the job.
    pub tag: u16,
    /// How many bytes were read or written; of no meaning for other actions.
    pub result: io::Result<usize>,
}

/// Works on an image for one queue.
pub trait Backend: Send {
    /// Takes a job. It may wait for [`Backend::start`].
    ///
    /// # Errors
    /// Why it cannot be taken: it will not be among those done.
    ///
    /// # Safety
    /// The buffers that `job.vectors` point to, and the vectors themselves, stay valid until the job is among those done.
    unsafe fn submit(&mut self, job: Job<'_>) -> io::Result<()>;

    /// Starts the jobs that were taken.
    ///
    /// # Errors
    /// When the host cannot.
    fn start(&mut self) -> io::Result<()>;

    /// The next job that is done, if there is one.
    fn completed(&mut self) -> Option<Completion>;

    /// Waits until a job is done. Call it only while there are any.
    ///
    /// # Errors
    /// When the host cannot.
    fn wait(&mut self) -> io::Result<()>;

    /// Readable while there are jobs that are done. `None` if all are done with [`Backend::start`].
    fn descriptor(&self) -> Option<RawFd>;
}

/// The shape of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of a logical block: what the driver should address.
    pub block_size: u32,
    /// Bytes that the host writes at once.
    pub physical_block_size: u32,
    /// Bytes that are best written at once; zero if that makes no difference.
    pub optimal_size: u32,
    /// What addresses and lengths of buffers must be multiples of. With anything but 1, requests must be whole logical
    /// blocks, too.
    pub memory_alignment: u32,
    /// Bytes that can be discarded at once, if any can.
    pub discard_granularity: Option<u32>,
    /// Whether zeroes can be written without a buffer of zeroes.
    pub can_write_zeroes: bool,
}

impl Geometry {
    /// A disk of 512-byte sectors and 4096-byte pages, with all that can be had.
    #[must_use]
    pub const fn plain() -> Self {
        Self {
            block_size: 512,
            physical_block_size: 4096,
            optimal_size: 0,
            memory_alignment: 1,
            discard_granularity: Some(4096),
            can_write_zeroes: true,
        }
    }
}

/// The data of a disk. All its queues share it.
pub trait Image: Send + Sync {
    /// Whether it can be written to.
    fn access(&self) -> Access;

    /// Its shape.
    fn geometry(&self) -> Geometry;

    /// How many bytes there are, looked up now.
    ///
    /// # Errors
    /// When the host cannot say.
    fn size(&self) -> io::Result<u64>;

    /// Makes the image `size` bytes long.
    ///
    /// # Errors
    /// When the image has a size of its own, or the host has no room.
    fn resize(&self, size: u64) -> io::Result<()>;

    /// A back end for a queue with at most `depth` jobs at a time. `name` is what its threads are called.
    ///
    /// # Errors
    /// What the host does not have.
    fn backend(&self, name: &str, depth: u16) -> io::Result<Box<dyn Backend>>;
}
