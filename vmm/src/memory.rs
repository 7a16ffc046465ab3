//! Guest memory: where it lies, what backs it, how the hypervisor learns of it.

use std::{ffi::CStr, fs::File, io, os::fd::FromRawFd};

use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion, mmap::MmapRegionError,
};

use crate::{
    config::MemoryConfig,
    hole::Hole,
    layout::{MemoryLayout, Range},
};

/// Why guest memory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The huge page pool is too small or absent.
    #[error(
        "memory: no {mib} MiB of huge pages free on this host (hugepages=on takes them from the pool in \
         /proc/sys/vm/nr_hugepages)"
    )]
    HugePages {
        /// MiB asked for.
        mib: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// The backing memfd.
    #[error("memory: cannot create a memfd of {mib} MiB")]
    Memfd {
        /// MiB asked for.
        mib: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// Mapping into this process.
    #[error("memory: cannot map {mib} MiB")]
    Map {
        /// MiB asked for.
        mib: u64,
        /// What `vm-memory` said.
        source: MmapRegionError,
    },
    /// The regions do not fit together.
    #[error("memory: the guest's regions overlap")]
    Regions,
}

/// When the host is to find the memory behind a mapping.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Supply {
    /// It is the guest's from the start.
    Now,
    /// It becomes the guest's by and by.
    Later,
}

/// Maps guest memory as `layout` has it. Nothing is touched: pages are the guest's to fault in.
///
/// # Errors
/// [`MemoryError`], with the host's reason.
pub fn map(config: &MemoryConfig, layout: &MemoryLayout) -> Result<GuestMemoryMmap, MemoryError> {
    let ram = layout.ram.iter().map(|range| (*range, Supply::Now));
    let hotplug = layout.hotplug.map(|range| (range, Supply::Later));
    let ranges: Vec<_> = ram.chain(hotplug).collect();
    let total = ranges.iter().map(|(range, _)| range.length).sum();
    let file = (config.shared)
        .then(|| memfd(config.hugepages, total))
        .transpose()?;
    let mut offset = 0;
    let mut mapped = Vec::with_capacity(ranges.len());
    for (range, supply) in ranges {
        let length = usize::try_from(range.length).map_err(|_| MemoryError::Regions)?;
        let backing = file
            .as_ref()
            .map(|file| file.try_clone().map(|file| FileOffset::new(file, offset)))
            .transpose()
            .map_err(|source| MemoryError::Memfd {
                mib: total >> 20,
                source,
            })?;
        let region = map_region(config.hugepages, supply, backing, length)?;
        let region = GuestRegionMmap::new(region, GuestAddress(range.start));
        mapped.push(region.ok_or(MemoryError::Regions)?);
        offset += range.length;
    }
    let memory = GuestMemoryMmap::from_regions(mapped).map_err(|_| MemoryError::Regions)?;
    if !config.shared && !config.hugepages {
        prefer_large_pages(&memory);
    }
    Ok(memory)
}

fn map_region(
    hugepages: bool,
    supply: Supply,
    backing: Option<FileOffset>,
    length: usize,
) -> Result<MmapRegion, MemoryError> {
    let mib = (length >> 20) as u64;
    let mut flags = libc::MAP_NORESERVE;
    if hugepages && supply == Supply::Now {
        // Reserve, so that a pool that is too small is an error now and not a SIGBUS later.
        flags = 0;
    }
    flags |= match backing {
        Some(_) => libc::MAP_SHARED,
        None if hugepages => {
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB
        }
        None => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    };
    build(backing, length, flags).map_err(|source| match source {
        MmapRegionError::Mmap(source) if hugepages => MemoryError::HugePages { mib, source },
        source => MemoryError::Map { mib, source },
    })
}

/// Maps `length` bytes to read and to write, at an address that large pages can be mapped at.
fn build(
    backing: Option<FileOffset>,
    length: usize,
    flags: i32,
) -> Result<MmapRegion, MmapRegionError> {
    let hole = Hole::new(length);
    let region = MmapRegion::build(backing, length, libc::PROT_READ | libc::PROT_WRITE, flags);
    if let Some(hole) = hole {
        hole.close();
    }
    region
}

/// Who sees what is written to a mapping of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writes {
    /// Everybody: they go to the file.
    Shared,
    /// Nobody else: they end with the mapping.
    Discarded,
}

/// Maps the first bytes of `file`, as many as `range` has, as the guest's memory there.
///
/// # Errors
/// When the host does not map them.
pub fn map_file(file: File, range: Range, writes: Writes) -> Result<GuestRegionMmap, MemoryError> {
    let mib = range.length >> 20;
    let length = usize::try_from(range.length).map_err(|_| MemoryError::Regions)?;
    let flags = match writes {
        Writes::Shared => libc::MAP_SHARED,
        Writes::Discarded => libc::MAP_PRIVATE | libc::MAP_NORESERVE,
    };
    let region = build(Some(FileOffset::new(file, 0)), length, flags)
        .map_err(|source| MemoryError::Map { mib, source })?;
    GuestRegionMmap::new(region, GuestAddress(range.start)).ok_or(MemoryError::Regions)
}

/// Memory that the guest and this process have in common: where each of them has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    gpa: u64,
    host: u64,
    length: u64,
}

impl Piece {
    /// All of `region`.
    #[must_use]
    pub fn whole(region: &GuestRegionMmap) -> Self {
        Self {
            gpa: region.start_addr().0,
            host: region.as_ptr() as u64,
            length: region.len(),
        }
    }

    /// The pieces of `size` bytes that it consists of.
    pub fn split(self, size: u64) -> impl Iterator<Item = Self> {
        let count = self.length / size;
        (0..count).map(move |index| Self {
            gpa: self.gpa + index * size,
            host: self.host + index * size,
            length: size,
        })
    }

    /// `length` bytes of it, `offset` bytes behind its start, if it has so many.
    #[must_use]
    pub fn part(self, offset: u64, length: u64) -> Option<Self> {
        let end = offset.checked_add(length)?;
        (end <= self.length).then_some(Self {
            gpa: self.gpa + offset,
            host: self.host + offset,
            length,
        })
    }

    /// Where the guest has it.
    #[must_use]
    pub fn gpa(self) -> u64 {
        self.gpa
    }

    /// Where this process has it.
    #[must_use]
    pub fn host(self) -> u64 {
        self.host
    }

    /// Its length in bytes.
    #[must_use]
    pub fn length(self) -> u64 {
        self.length
    }
}

/// Has the host find memory for `piece` of `memory` now.
///
/// # Errors
/// When it has none, or the piece is not of this memory.
pub fn populate(memory: &GuestMemoryMmap, piece: Piece) -> io::Result<()> {
    let length = usize::try_from(piece.length).map_err(io::Error::other)?;
    let slice = memory
        .get_slice(GuestAddress(piece.gpa), length)
        .map_err(io::Error::other)?;
    let address = slice.ptr_guard_mut().as_ptr();
    // SAFETY: the range is a mapping of the guest's memory, whose contents the advice does not change.
    match unsafe { libc::madvise(address.cast(), length, libc::MADV_POPULATE_WRITE) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn memfd(hugepages: bool, size: u64) -> Result<File, MemoryError> {
    const NAME: &CStr = c"guest-memory";
    let flags = libc::MFD_CLOEXEC
        | if hugepages {
            libc::MFD_HUGETLB | libc::MFD_HUGE_2MB
        } else {
            0
        };
    let failed = || MemoryError::Memfd {
        mib: size >> 20,
        source: io::Error::last_os_error(),
    };
    // SAFETY: a valid C string and flags; the result is checked.
    let fd = unsafe { libc::memfd_create(NAME.as_ptr(), flags) };
    if fd < 0 {
        return Err(failed());
    }
    // SAFETY: a descriptor that was just created and that nothing else owns.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size).map_err(|_| failed())?;
    Ok(file)
}

/// Asks for transparent huge pages: fewer faults in the nested page tables. A host that refuses runs on small ones.
fn prefer_large_pages(memory: &GuestMemoryMmap) {
    for region in memory.iter() {
        // SAFETY: the range is a mapping this process has just made; the advice does not change its contents.
        unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_HUGEPAGE) };
    }
}

/// The guest's memory and nothing else: bytes by region, for the report on what the VMM itself uses.
#[must_use]
pub fn host_ranges(memory: &GuestMemoryMmap) -> Vec<std::ops::Range<usize>> {
    memory
        .iter()
        .map(|region| {
            let start = region.as_ptr() as usize;
            start..start + usize::try_from(region.len()).unwrap_or(usize::MAX - start)
        })
        .collect()
}

/// Width of a physical address on this host, in bits.
pub(crate) fn address_bits() -> u32 {
    const SIZES: u32 = 0x8000_0008;
    let known = std::arch::x86_64::__cpuid(0x8000_0000).eax >= SIZES;
    if known {
        std::arch::x86_64::__cpuid(SIZES).eax & 0xff
    } else {
        36
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn layout(ram: u64, hotplug: u64) -> MemoryLayout {
        MemoryLayout::new(ram, hotplug, 46).unwrap()
    }

    #[test]
    fn private_and_shared_memory_hold_what_is_written() {
        for shared in [false, true] {
            let config = MemoryConfig {
                shared,
                ..MemoryConfig::default()
            };
            let layout = layout(16 * MIB, 64 * MIB);
            let memory = map(&config, &layout).unwrap();
            let added = layout.hotplug.unwrap().start;
            memory
                .write_obj(0x55aau16, GuestAddress(added + 8))
                .unwrap();
            assert_eq!(
                memory.read_obj::<u16>(GuestAddress(added + 8)).unwrap(),
                0x55aa
            );
            assert_eq!(memory.read_obj::<u16>(GuestAddress(8)).unwrap(), 0);
            assert!(memory.read_obj::<u16>(GuestAddress(16 * MIB)).is_err());
            assert_eq!(memory.iter().all(|r| r.file_offset().is_some()), shared);
        }
    }

    #[test]
    fn the_host_address_is_a_multiple_of_a_large_page() {
        let config = MemoryConfig::default();
        // Other tests map memory too: one of several attempts is left alone by them.
        let aligned = (0..16).any(|_| {
            let memory = map(&config, &layout(64 * MIB, 0)).unwrap();
            host_ranges(&memory)[0].start.is_multiple_of(2 << 20)
        });
        assert!(aligned);
    }

    #[test]
    fn missing_huge_pages_are_named() {
        let config = MemoryConfig {
            hugepages: true,
            ..MemoryConfig::default()
        };
        let error = map(&config, &layout(1 << 40, 0)).unwrap_err();
        assert!(error.to_string().contains("huge pages"), "{error}");
    }

    #[test]
    fn what_is_written_to_a_file_goes_there_or_nowhere() {
        let path = std::env::temp_dir().join(format!("rota-map-file-{}", std::process::id()));
        for (writes, found) in [(Writes::Shared, b'y'), (Writes::Discarded, b'x')] {
            std::fs::write(&path, vec![b'x'; 2 << 20]).unwrap();
            let file = File::options().read(true).write(true).open(&path).unwrap();
            let range = Range {
                start: 8 << 30,
                length: 2 << 20,
            };
            let region = map_file(file, range, writes).unwrap();
            let piece = Piece::whole(&region);
            assert_eq!((piece.gpa(), piece.length()), (8 << 30, 2 << 20));
            let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
            memory.write_obj(b'y', GuestAddress((8 << 30) + 5)).unwrap();
            assert_eq!(std::fs::read(&path).unwrap()[5], found);
        }
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn pieces_are_populated_one_by_one() {
        let layout = layout(16 * MIB, 8 * MIB);
        let memory = map(&MemoryConfig::default(), &layout).unwrap();
        let region = memory.iter().last().unwrap();
        let pieces: Vec<Piece> = Piece::whole(region).split(2 * MIB).collect();
        assert_eq!(pieces.len(), 4);
        assert_eq!(pieces[3].gpa(), layout.hotplug.unwrap().start + 6 * MIB);
        populate(&memory, pieces[3]).unwrap();
        let elsewhere = Piece {
            gpa: 1 << 45,
            ..pieces[3]
        };
        assert!(populate(&memory, elsewhere).is_err());
    }
}
