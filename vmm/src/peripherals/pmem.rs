//! Persistent memory: from its configuration to a file that the guest has in its address space, and the device that tells of it.

use std::{
    fs::{File, OpenOptions},
    io::{self, Seek, SeekFrom},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use devices::{
    pci::Slot,
    virtio::{
        block::{
            backend::Access,
            image::{self, Cache, ImageError},
        },
        pmem::{ALIGNMENT, Persistence, Pmem},
    },
};

use super::{Handle, PeripheralError, Plug};
use crate::{
    config::{PmemConfig, name},
    memory::{self, MemoryError, Writes},
    partition::PartitionError,
};

/// Why there is no persistent memory.
#[derive(Debug, thiserror::Error)]
pub enum PmemError {
    /// The file.
    #[error(transparent)]
    File(#[from] ImageError),
    /// The host does not do what it was asked for.
    #[error("cannot {what} {}", path.display())]
    Host {
        /// What was asked for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// A folder, and no size for the file in it.
    #[error("{} is a folder: say how large the file in it is to be (size=SIZE)", .0.display())]
    Folder(PathBuf),
    /// The guest cannot have all of the file.
    #[error(
        "the {length} bytes of {} are not a multiple of 2 MiB: grow the file (truncate --size %2M), or say how much of it the guest \
         is to have (size=SIZE)",
        path.display()
    )]
    Length {
        /// The file.
        path: PathBuf,
        /// Its bytes.
        length: u64,
    },
    /// There is less.
    #[error("{} has {length} bytes, which is less than size={size}", path.display())]
    Short {
        /// The file.
        path: PathBuf,
        /// Its bytes.
        length: u64,
        /// Bytes asked for.
        size: u64,
    },
    /// The guest's address space is full.
    #[error("no room for {0} bytes in the guest's address space")]
    NoRoom(u64),
    /// It does not get into this process.
    #[error(transparent)]
    Map(#[from] MemoryError),
    /// It does not get into the guest.
    #[error(
        "the hypervisor's driver does not take the file as guest memory (one that pins memory takes files of tmpfs and hugetlbfs \
         only, and any with discard_writes=on)"
    )]
    Partition(#[from] PartitionError),
}

/// Plugs the file in.
pub(super) fn plug(plug: &Plug, config: &PmemConfig) -> Result<Slot, PeripheralError> {
    let name = name(&config.id);
    let no_pmem = |source| PeripheralError::Pmem {
        device: name.to_owned(),
        source,
    };
    let (file, size) = open(config).map_err(no_pmem)?;
    let host = |source| PeripheralError::Host {
        device: name.to_owned(),
        source,
    };
    let (persistence, writes) = if config.discard_writes {
        (Persistence::Discarded, Writes::Discarded)
    } else {
        let file = file.try_clone().map_err(host)?;
        (Persistence::File(file), Writes::Shared)
    };
    let addresses = plug.device_memory.reserve(size, ALIGNMENT);
    let addresses = addresses.ok_or_else(|| no_pmem(PmemError::NoRoom(size)))?;
    let range = addresses.range();
    let lent = memory::map_file(file, range, writes)
        .map_err(PmemError::from)
        .and_then(|region| Ok(addresses.lend(region)?))
        .map_err(no_pmem)?;
    let device = Pmem::new(range.start, range.length, persistence).map_err(host)?;
    let handle = Handle::Lent(Arc::new(lent));
    plug.virtio_with(name, Box::new(device), handle)
}

/// The file, and how many bytes of it the guest is to have.
fn open(config: &PmemConfig) -> Result<(File, u64), PmemError> {
    let path = &config.file;
    if path.is_dir() {
        let size = config.size.ok_or_else(|| PmemError::Folder(path.clone()))?;
        let file = unnamed(path, size).map_err(|source| PmemError::Host {
            what: "make a file in",
            path: path.clone(),
            source,
        })?;
        return Ok((file, size));
    }
    let access = if config.discard_writes {
        Access::ReadOnly
    } else {
        Access::ReadWrite
    };
    let mut file = image::open_file(path, access, Cache::Buffered)?;
    // Block devices have no length but this.
    let length = file
        .seek(SeekFrom::End(0))
        .map_err(|source| PmemError::Host {
            what: "find out the size of",
            path: path.clone(),
            source,
        })?;
    let size = config.size.unwrap_or(length);
    let path = path.clone();
    if length < size {
        return Err(PmemError::Short { path, length, size });
    }
    if size == 0 || !size.is_multiple_of(ALIGNMENT) {
        return Err(PmemError::Length { path, length });
    }
    Ok((file, size))
}

/// A file of `size` bytes in `folder` that ends with its last descriptor.
fn unnamed(folder: &Path, size: u64) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .open(folder)?;
    file.set_len(size)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn refusal(text: &str) -> String {
        let config = text.parse().unwrap();
        open(&config).map(|_| ()).unwrap_err().to_string()
    }

    #[test]
    fn files_of_other_sizes_are_refused() {
        let path = std::env::temp_dir().join(format!("rota-pmem-open-{}", std::process::id()));
        let file = File::create(&path).unwrap();
        let text = format!("file={}", path.display());
        for length in [0, 4096, 3 * MIB] {
            file.set_len(length).unwrap();
            assert!(refusal(&text).contains(&format!("the {length} bytes of ")));
        }
        let short = refusal(&format!("{text},size=4M"));
        assert!(short.contains("has 3145728 bytes"), "{short}");
        let part = format!("{text},size=2M").parse().unwrap();
        assert_eq!(open(&part).unwrap().1, 2 * MIB);
        file.set_len(4 * MIB).unwrap();
        let (first, size) = open(&text.parse().unwrap()).unwrap();
        assert_eq!(size, 4 * MIB);
        // Who writes it has it alone.
        assert!(refusal(&text).contains("in use elsewhere"));
        drop(first);
        let readers = format!("{text},discard_writes=on").parse().unwrap();
        let _both = (open(&readers).unwrap(), open(&readers).unwrap());
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_folder_gets_a_file_without_a_name() {
        let folder = std::env::temp_dir();
        let text = format!("file={}", folder.display());
        assert!(refusal(&text).contains("is a folder"));
        let (file, size) = open(&format!("{text},size=2M").parse().unwrap()).unwrap();
        assert_eq!((file.metadata().unwrap().len(), size), (2 * MIB, 2 * MIB));
        assert!(refusal("file=/dev/null").contains("neither a file"));
    }
}
