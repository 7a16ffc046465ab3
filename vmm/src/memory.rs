//! Guest memory: where it lies, what backs it, how the hypervisor learns of it.

use std::{ffi::CStr, fs::File, io, os::fd::FromRawFd};

use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion, mmap::MmapRegionError,
};

use crate::{config::MemoryConfig, hole::Hole};

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

/// Maps guest memory over `regions` (guest-physical start and length in bytes). Nothing is touched: pages are the
/// guest's to fault in.
///
/// # Errors
/// [`MemoryError`], with the host's reason.
pub fn map(
    config: &MemoryConfig,
    regions: &[(GuestAddress, u64)],
) -> Result<GuestMemoryMmap, MemoryError> {
    let mib = config.size >> 20;
    let file = (config.shared).then(|| memfd(config)).transpose()?;
    let mut offset = 0;
    let mut mapped = Vec::with_capacity(regions.len());
    for (start, length) in regions {
        let length_here = usize::try_from(*length).map_err(|_| MemoryError::Regions)?;
        let backing = file
            .as_ref()
            .map(|file| file.try_clone().map(|file| FileOffset::new(file, offset)))
            .transpose()
            .map_err(|source| MemoryError::Memfd { mib, source })?;
        let region = map_region(config, backing, length_here)?;
        mapped.push(GuestRegionMmap::new(region, *start).ok_or(MemoryError::Regions)?);
        offset += length;
    }
    let memory = GuestMemoryMmap::from_regions(mapped).map_err(|_| MemoryError::Regions)?;
    if !config.shared && !config.hugepages {
        prefer_large_pages(&memory);
    }
    Ok(memory)
}

fn map_region(
    config: &MemoryConfig,
    backing: Option<FileOffset>,
    length: usize,
) -> Result<MmapRegion, MemoryError> {
    let mib = (length >> 20) as u64;
    let mut flags = libc::MAP_NORESERVE;
    if config.hugepages {
        // Reserve, so that a pool that is too small is an error now and not a SIGBUS later.
        flags = 0;
    }
    flags |= match backing {
        Some(_) => libc::MAP_SHARED,
        None if config.hugepages => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB,
        None => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    };
    let hole = Hole::new(length);
    let region = MmapRegion::build(backing, length, libc::PROT_READ | libc::PROT_WRITE, flags);
    if let Some(hole) = hole {
        hole.close();
    }
    region.map_err(|source| match source {
        MmapRegionError::Mmap(source) if config.hugepages => MemoryError::HugePages { mib, source },
        source => MemoryError::Map { mib, source },
    })
}

fn memfd(config: &MemoryConfig) -> Result<File, MemoryError> {
    const NAME: &CStr = c"guest-memory";
    let flags = libc::MFD_CLOEXEC
        | if config.hugepages {
            libc::MFD_HUGETLB
        } else {
            0
        };
    let failed = || MemoryError::Memfd {
        mib: config.size >> 20,
        source: io::Error::last_os_error(),
    };
    // SAFETY: a valid C string and flags; the result is checked.
    let fd = unsafe { libc::memfd_create(NAME.as_ptr(), flags) };
    if fd < 0 {
        return Err(failed());
    }
    // SAFETY: a descriptor that was just created and that nothing else owns.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(config.size).map_err(|_| failed())?;
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

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    const REGIONS: [(GuestAddress, u64); 2] =
        [(GuestAddress(0), 1 << 20), (GuestAddress(1 << 32), 1 << 20)];

    #[test]
    fn private_and_shared_memory_hold_what_is_written() {
        for shared in [false, true] {
            let config = MemoryConfig {
                size: 2 << 20,
                shared,
                hugepages: false,
            };
            let memory = map(&config, &REGIONS).unwrap();
            memory
                .write_obj(0x55aau16, GuestAddress((1 << 32) + 8))
                .unwrap();
            assert_eq!(
                memory.read_obj::<u16>(GuestAddress((1 << 32) + 8)).unwrap(),
                0x55aa
            );
            assert_eq!(memory.read_obj::<u16>(GuestAddress(8)).unwrap(), 0);
            assert!(memory.read_obj::<u16>(GuestAddress(1 << 20)).is_err());
            assert_eq!(memory.iter().all(|r| r.file_offset().is_some()), shared);
        }
    }

    #[test]
    fn the_host_address_is_a_multiple_of_a_large_page() {
        let config = MemoryConfig {
            size: 64 << 20,
            shared: false,
            hugepages: false,
        };
        // Other tests map memory too: one of several attempts is left alone by them.
        let aligned = (0..16).any(|_| {
            let memory = map(&config, &[(GuestAddress(0), 64 << 20)]).unwrap();
            host_ranges(&memory)[0].start.is_multiple_of(2 << 20)
        });
        assert!(aligned);
    }

    #[test]
    fn missing_huge_pages_are_named() {
        let config = MemoryConfig {
            size: 1 << 40,
            shared: false,
            hugepages: true,
        };
        let error = map(&config, &[(GuestAddress(0), 1 << 40)]).unwrap_err();
        assert!(error.to_string().contains("huge pages"), "{error}");
    }
}
