//! How memory that the guest does not use goes back to the host.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
};

use vm_memory::{
    FileOffset, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

/// Takes memory from the guest. What the guest finds there when it comes back is zeroes, or what was there.
///
/// The VMM says how, because it knows what else holds the memory: a hypervisor that has pinned its pages has to let go of them
/// first, or the guest and the host see different memory from then on.
pub trait Reclaim: Send + Sync {
    /// Gives `length` bytes at guest physical `address` back to the host, as far as they are whole pages of memory.
    ///
    /// # Errors
    /// What the host says.
    fn reclaim(&self, address: u64, length: u64) -> io::Result<()>;
}

/// Memory that is mapped here, and that nothing but this process and the kernel's page tables refers to.
pub struct HostMemory {
    /// Keeps the memory that `regions` points into.
    _memory: GuestMemoryMmap,
    regions: Vec<Region>,
}

struct Region {
    start: u64,
    length: u64,
    host: usize,
    page: u64,
    backing: Backing,
}

enum Backing {
    /// Pages of this process.
    Private,
    /// Pages of a file, which others may have mapped, too.
    Shared(FileOffset),
}

impl HostMemory {
    /// The memory of a guest.
    ///
    /// # Errors
    /// When the host does not say how large its pages are.
    pub fn new(memory: &GuestMemoryMmap) -> io::Result<Self> {
        let regions: io::Result<_> = memory.iter().map(Region::new).collect();
        Ok(Self {
            _memory: memory.clone(),
            regions: regions?,
        })
    }
}

impl Region {
    fn new(region: &GuestRegionMmap) -> io::Result<Self> {
        let shared = region.flags() & libc::MAP_SHARED != 0;
        let file = region.file_offset();
        let page = match file {
            Some(file) => page_of(file.file().as_raw_fd())?,
            None => page_of_flags(region.flags()),
        };
        Ok(Self {
            start: region.start_addr().0,
            length: region.len(),
            host: region.as_ptr() as usize,
            page,
            backing: match file {
                Some(file) if shared => Backing::Shared(file.clone()),
                _ => Backing::Private,
            },
        })
    }

    /// Gives back the whole pages in `start..end`, which count from the region's beginning.
    fn reclaim(&self, start: u64, end: u64) -> io::Result<()> {
        let Some((start, length)) = whole_pages(start, end, self.page) else {
            return Ok(());
        };
        let done = match &self.backing {
            // SAFETY: the range is within a mapping of the guest's memory, to which there are no references.
            Backing::Private => unsafe {
                libc::madvise(
                    (self.host + start as usize) as *mut libc::c_void,
                    length as usize,
                    libc::MADV_DONTNEED,
                )
            },
            // SAFETY: this changes the content of a file, mapped as the guest's memory, to which there are no references.
            Backing::Shared(file) => unsafe {
                libc::fallocate(
                    file.file().as_raw_fd(),
                    libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                    (file.start() + start) as libc::off_t,
                    length as libc::off_t,
                )
            },
        };
        match done {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Reclaim for HostMemory {
    fn reclaim(&self, address: u64, length: u64) -> io::Result<()> {
        let end = address.saturating_add(length);
        for region in &self.regions {
            let from = address.max(region.start);
            let to = end.min(region.start + region.length);
            if from < to {
                region.reclaim(from - region.start, to - region.start)?;
            }
        }
        Ok(())
    }
}

/// Start and length of the whole pages in `start..end`, if there are any. A mapping begins on a page of its own size.
fn whole_pages(start: u64, end: u64, page: u64) -> Option<(u64, u64)> {
    let start = start.checked_next_multiple_of(page)?;
    let length = end.checked_sub(start)? / page * page;
    (length > 0).then_some((start, length))
}

/// Bytes of a page of anonymous memory that was mapped with `flags`.
fn page_of_flags(flags: i32) -> u64 {
    let shift = flags as u32 >> libc::MAP_HUGE_SHIFT & libc::MAP_HUGE_MASK as u32;
    match (flags & libc::MAP_HUGETLB, shift) {
        (0, _) => page(),
        // The size that the system has set, which is one of these; no page of it is larger.
        (_, 0) => 1 << 30,
        (_, shift) => 1 << shift,
    }
}

/// Bytes of a page of the file `fd`.
fn page_of(fd: RawFd) -> io::Result<u64> {
    // SAFETY: the structure is one of integers, which the call fills.
    let (done, found) = unsafe {
        let mut found: libc::statfs = std::mem::zeroed();
        (libc::fstatfs(fd, &raw mut found), found)
    };
    match done {
        0 if found.f_type == libc::HUGETLBFS_MAGIC => Ok(found.f_bsize as u64),
        0 => Ok(page()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn page() -> u64 {
    // SAFETY: this asks for a number.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_pages_go() {
        assert_eq!(whole_pages(0, 0x3000, 0x1000), Some((0, 0x3000)));
        assert_eq!(whole_pages(1, 0x3fff, 0x1000), Some((0x1000, 0x2000)));
        assert_eq!(whole_pages(1, 0x1fff, 0x1000), None);
        assert_eq!(whole_pages(0x1000, 0x1000, 0x1000), None);
        let huge = 2 << 20;
        assert_eq!(whole_pages(0x1000, huge, huge), None);
        assert_eq!(whole_pages(0x1000, 2 * huge + 5, huge), Some((huge, huge)));
        assert_eq!(whole_pages(u64::MAX - 1, u64::MAX, 0x1000), None);
    }

    #[test]
    fn the_size_of_huge_pages_is_known_from_how_they_were_mapped() {
        assert_eq!(page_of_flags(libc::MAP_ANONYMOUS), page());
        assert_eq!(
            page_of_flags(libc::MAP_HUGETLB | libc::MAP_HUGE_2MB),
            2 << 20
        );
        assert_eq!(
            page_of_flags(libc::MAP_HUGETLB | libc::MAP_HUGE_1GB),
            1 << 30
        );
        assert_eq!(page_of_flags(libc::MAP_HUGETLB), 1 << 30);
    }

    #[test]
    fn the_size_of_a_files_pages_is_known() {
        // SAFETY: the name ends with a zero, and the descriptor is closed by nobody else.
        for (flags, size) in [
            (0, page()),
            (libc::MFD_HUGETLB | libc::MFD_HUGE_2MB, 2 << 20),
        ] {
            // SAFETY: the name ends with a zero.
            let fd = unsafe { libc::memfd_create(c"pages".as_ptr(), flags) };
            if fd >= 0 {
                assert_eq!(page_of(fd).unwrap(), size);
                // SAFETY: the descriptor is this test's own.
                unsafe { libc::close(fd) };
            } else {
                assert_ne!(flags, 0, "no memfd");
            }
        }
        assert!(page_of(-1).is_err());
    }
}
