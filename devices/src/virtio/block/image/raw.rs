//! Raw images: a file or a block device whose bytes are those of the disk.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    os::{
        fd::{AsRawFd, RawFd},
        unix::fs::{FileTypeExt, MetadataExt},
    },
    sync::Arc,
};

use tracing::debug;
use vmm_sys_util::{ioctl::ioctl_with_ref, ioctl_io_nr};

use super::Cache;
use crate::virtio::block::backend::{
    Access, Action, Backend, Blocking, Geometry, Image, Job, MOST_VECTORS, Pool, Unmap, Uring,
};

// `linux/fs.h`.
ioctl_io_nr!(BLKDISCARD, 0x12, 119);

/// The largest alignment that a page has.
const PAGE: u32 = 4096;
/// Bytes of a sector.
const SECTOR: u32 = 512;

/// Which of the two ways to the data is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// io_uring if the host has it, else threads.
    Best,
    /// Threads with blocking calls.
    Threads,
}

/// A raw image. Keeps the descriptor, and with it the lock.
pub(crate) struct RawImage {
    file: Arc<RawFile>,
    access: Access,
    geometry: Geometry,
    engine: Engine,
    cache: Cache,
}

impl RawImage {
    /// The image in `file`, which was opened for `access` and `cache`.
    pub(super) fn new(
        file: File,
        access: Access,
        cache: Cache,
        engine: Engine,
    ) -> io::Result<Self> {
        let kind = if file.metadata()?.file_type().is_block_device() {
            Kind::Device
        } else {
            Kind::File
        };
        let file = RawFile { file, kind };
        let geometry = match kind {
            Kind::Device => file.device_geometry(access, cache)?,
            Kind::File => file.file_geometry(access, cache)?,
        };
        Ok(Self {
            file: Arc::new(file),
            access,
            geometry,
            engine,
            cache,
        })
    }
}

impl Image for RawImage {
    fn access(&self) -> Access {
        self.access
    }

    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    fn resize(&self, size: u64) -> io::Result<()> {
        match (self.file.kind, self.access) {
            (Kind::File, Access::ReadWrite) => self.file.file.set_len(size),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn backend(&self, name: &str, depth: u16) -> io::Result<Box<dyn Backend>> {
        if self.engine == Engine::Best {
            match Uring::new(&self.file, self.cache, depth) {
                Ok(ring) => return Ok(Box::new(ring)),
                Err(error) => debug!("{name}: no io_uring ({error}): threads in its place"),
            }
        }
        Ok(Box::new(Pool::new(&self.file, name, depth)?))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    File,
    Device,
}

/// The open file or block device.
pub(crate) struct RawFile {
    file: File,
    kind: Kind,
}

impl RawFile {
    /// The mode of `fallocate` that gives space back.
    pub(crate) const DISCARD: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;

    /// The mode of `fallocate` that makes space read as zeroes.
    pub(crate) fn zero_mode(unmap: Unmap) -> i32 {
        match unmap {
            Unmap::Allowed => Self::DISCARD,
            Unmap::Forbidden => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
        }
    }

    fn size(&self) -> io::Result<u64> {
        // Metadata knows nothing of block devices. No one else uses the file's position.
        (&self.file).seek(SeekFrom::End(0))
    }

    fn allocate(&self, mode: i32, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: plain numbers, on a descriptor that is open.
        check(unsafe {
            libc::fallocate(
                self.file.as_raw_fd(),
                mode,
                offset as libc::off_t,
                length as libc::off_t,
            ) as isize
        })
        .map(drop)
    }

    /// Discards on a block device without a promise of zeroes. Files know no such thing.
    pub(crate) fn forget(&self, offset: u64, length: u64) -> io::Result<()> {
        if self.kind == Kind::File {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        let range = [offset, length];
        // SAFETY: BLKDISCARD reads two 64-bit numbers.
        check(unsafe { ioctl_with_ref(&self.file, BLKDISCARD(), &range) } as isize).map(drop)
    }

    fn file_geometry(&self, access: Access, cache: Cache) -> io::Result<Geometry> {
        let metadata = self.file.metadata()?;
        let (block_size, memory_alignment) = match cache {
            Cache::Buffered => (SECTOR, 1),
            Cache::Direct => self.direct_alignment(),
        };
        let page = u32::try_from(metadata.blksize())
            .unwrap_or(PAGE)
            .clamp(block_size, 1 << 20);
        // Nothing lies behind the end, so this asks without doing.
        let behind = metadata.len().next_multiple_of(page.into());
        let can =
            |mode| access == Access::ReadWrite && self.allocate(mode, behind, page.into()).is_ok();
        let (can_discard, can_zero) = (can(Self::DISCARD), can(Self::zero_mode(Unmap::Forbidden)));
        Ok(Geometry {
            block_size,
            physical_block_size: page,
            optimal_size: 0,
            memory_alignment,
            discard_granularity: can_discard.then_some(page),
            can_write_zeroes: can_discard && can_zero,
        })
    }

    /// What direct I/O on a file wants offsets and buffers to be multiples of.
    fn direct_alignment(&self) -> (u32, u32) {
        // SAFETY: all zeroes is a valid `statx`.
        let mut status: libc::statx = unsafe { std::mem::zeroed() };
        // SAFETY: an empty path with AT_EMPTY_PATH is the descriptor itself, and `status` has room for the answer.
        let result = unsafe {
            libc::statx(
                self.file.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_EMPTY_PATH,
                libc::STATX_DIOALIGN,
                &raw mut status,
            )
        };
        let known = result == 0
            && status.stx_mask & libc::STATX_DIOALIGN != 0
            && status.stx_dio_offset_align != 0;
        if known {
            (
                status.stx_dio_offset_align.clamp(SECTOR, PAGE),
                status.stx_dio_mem_align.clamp(SECTOR, PAGE),
            )
        } else {
            // Before Linux 6.1 nobody says; a page does everywhere.
            (PAGE, PAGE)
        }
    }

    fn device_geometry(&self, access: Access, cache: Cache) -> io::Result<Geometry> {
        let block_size = self.device_number(libc::BLKSSZGET)?.clamp(SECTOR, PAGE);
        let physical_block_size = self
            .device_number(libc::BLKPBSZGET)?
            .clamp(block_size, 1 << 20);
        let metadata = self.file.metadata()?;
        let (major, minor) = (libc::major(metadata.rdev()), libc::minor(metadata.rdev()));
        let limit = |name: &str| {
            // A partition has the limits of its disk.
            [format!("{major}:{minor}"), format!("{major}:{minor}/..")]
                .iter()
                .find_map(|device| {
                    std::fs::read_to_string(format!("/sys/dev/block/{device}/queue/{name}")).ok()
                })
                .and_then(|text| text.trim().parse::<u64>().ok())
                .unwrap_or(0)
        };
        let can_discard = access == Access::ReadWrite && limit("discard_max_bytes") > 0;
        let granularity = u32::try_from(limit("discard_granularity"))
            .unwrap_or(0)
            .clamp(block_size, 1 << 30);
        Ok(Geometry {
            block_size,
            physical_block_size,
            optimal_size: self.device_number(libc::BLKIOOPT)?,
            memory_alignment: match cache {
                Cache::Buffered => 1,
                Cache::Direct => block_size,
            },
            discard_granularity: can_discard.then_some(granularity),
            // What the device cannot, the kernel does by writing.
            can_write_zeroes: access == Access::ReadWrite,
        })
    }

    /// One of the numbers of a block device.
    fn device_number(&self, request: libc::Ioctl) -> io::Result<u32> {
        let mut number: libc::c_uint = 0;
        // SAFETY: these requests write one `unsigned int`.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), request, &raw mut number) };
        check(result as isize).map(|_| number)
    }
}

impl AsRawFd for RawFile {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl Blocking for RawFile {
    unsafe fn run(&self, job: &Job<'_>) -> io::Result<usize> {
        let (vectors, count) = (
            job.vectors.as_ptr(),
            job.vectors.len().min(MOST_VECTORS) as libc::c_int,
        );
        let (file, offset) = (self.file.as_raw_fd(), job.offset as libc::off_t);
        loop {
            // SAFETY: the caller vouches for the vectors, `self` for the descriptor.
            let result = unsafe {
                match job.action {
                    Action::Read => check(libc::preadv(file, vectors, count, offset)),
                    Action::Write => check(libc::pwritev(file, vectors, count, offset)),
                    Action::Flush => check(libc::fdatasync(file) as isize),
                    Action::Discard => self
                        .allocate(Self::DISCARD, job.offset, job.length)
                        .or_else(|error| match error.raw_os_error() {
                            Some(libc::EOPNOTSUPP) => self.forget(job.offset, job.length),
                            _ => Err(error),
                        })
                        .map(|()| 0),
                    Action::WriteZeroes(unmap) => self
                        .allocate(Self::zero_mode(unmap), job.offset, job.length)
                        .map(|()| 0),
                }
            };
            match result {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }
}

/// What a system call has returned.
fn check(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
