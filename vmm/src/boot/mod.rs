//! Getting a guest started: the kernel, what it is told, and the state its first VP starts in.
//!
//! Two ways lead into a kernel. A bzImage is entered at its 64-bit entry point: long mode, identity-mapped first 4 GiB, the
//! zero page in RSI ([`linux`]). An ELF image is entered at its PVH entry point: 32-bit protected mode without paging,
//! `hvm_start_info` in RBX ([`pvh`]). [`load`] looks at the file, puts everything in place and says how to start;
//! [`Start::registers`] is that state as one batch of registers for one hypercall.
//!
//! Where each structure lies is in [`crate::layout`].

mod linux;
mod pvh;
mod registers;
mod reset_vector;
mod unpack;

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::{
    config::PayloadConfig,
    layout::{CMDLINE, PAGE_SIZE, Range, Usage},
};

pub use registers::{Register, Start, memory_types};

/// The longest command line any kernel takes, without its NUL; older ones say in their header that they take less.
const CMDLINE_MAX: usize = 2047;

/// What the guest is told about the machine besides the kernel's own arguments.
#[derive(Clone, Debug)]
pub struct Machine {
    /// The memory map, in order of address.
    pub memory_map: Vec<(Range, Usage)>,
    /// Guest-physical address of the ACPI root pointer.
    pub rsdp: u64,
    /// End of RAM below 4 GiB: kernel and initramfs lie below it.
    pub low_ram_end: u64,
}

/// The numbers that e820 and PVH memory maps have for a usage.
fn usage_number(usage: Usage) -> u32 {
    match usage {
        Usage::Ram => 1,
        Usage::Reserved => 2,
    }
}

/// Why a guest cannot be started. Each message is one line and names the file.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The file cannot be opened or read.
    #[error("{what} {path}: cannot be read")]
    Read {
        /// "kernel" or "initramfs".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The file is no kernel, or not a whole one.
    #[error("kernel {path}: {reason}")]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The loader's own complaint.
    #[error("kernel {path}: corrupt or truncated")]
    Loader {
        /// The file.
        path: PathBuf,
        /// What `linux-loader` said.
        source: linux_loader::loader::Error,
    },
    /// The kernel needs more RAM than there is.
    #[error(
        "kernel {path}: needs RAM up to {needed:#x}, the guest's ends at {available:#x}; give it more memory"
    )]
    KernelTooLarge {
        /// The file.
        path: PathBuf,
        /// Where the kernel would end.
        needed: u64,
        /// Where RAM ends.
        available: u64,
    },
    /// The initramfs does not fit.
    #[error("initramfs {path}: {size} bytes do not fit the {free} bytes of guest RAM free for it")]
    InitramfsTooLarge {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// Bytes between the kernel and the highest address allowed.
        free: u64,
    },
    /// The command line is longer than the kernel takes.
    #[error("cmdline: {length} bytes, the kernel takes at most {limit}")]
    CmdlineTooLong {
        /// Its length in bytes.
        length: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// The command line holds a NUL.
    #[error("cmdline: contains a NUL byte")]
    CmdlineNul,
    /// The memory map has more entries than the boot protocol carries.
    #[error("the memory map has too many entries")]
    MemoryMap,
    /// Guest memory is too small even for the tables below 1 MiB.
    #[error("the guest has too little memory to boot")]
    Memory(#[from] GuestMemoryError),
}

/// Loads kernel, initramfs and command line, writes what the boot protocol asks for, and says how the first VP starts.
///
/// # Errors
/// [`BootError`]: one line that names the file and the cause.
pub fn load(
    memory: &GuestMemoryMmap,
    payload: &PayloadConfig,
    machine: &Machine,
) -> Result<Start, BootError> {
    reset_vector::write(memory)?;
    let path = payload.kernel.as_path();
    let mut file = open("kernel", path)?;
    let mut magic = [0; 4];
    let read = file
        .read(&mut magic)
        .map_err(|source| unreadable("kernel", path, source))?;
    if read == magic.len() && magic == *b"\x7fELF" {
        pvh::load(memory, &mut file, payload, machine)
    } else {
        linux::load(memory, &mut file, payload, machine)
    }
}

/// Where an initramfs has been put.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Initramfs {
    start: u64,
    size: u64,
}

/// Puts the initramfs as high as `limit` (exclusive) allows, above `floor`.
fn load_initramfs(
    memory: &GuestMemoryMmap,
    path: Option<&Path>,
    floor: u64,
    limit: u64,
) -> Result<Initramfs, BootError> {
    let Some(path) = path else {
        return Ok(Initramfs::default());
    };
    let mut file = open("initramfs", path)?;
    let size = length(&mut file).map_err(|source| unreadable("initramfs", path, source))?;
    let free = limit.saturating_sub(floor);
    let start = limit
        .checked_sub(size)
        .map(|start| start & !(PAGE_SIZE - 1));
    let Some(start) = start.filter(|start| *start >= floor) else {
        return Err(BootError::InitramfsTooLarge {
            path: path.to_owned(),
            size,
            free,
        });
    };
    let count = usize::try_from(size).unwrap_or(usize::MAX);
    memory.read_exact_volatile_from(GuestAddress(start), &mut file, count)?;
    Ok(Initramfs { start, size })
}

/// Writes the command line, NUL-terminated, at [`CMDLINE`].
fn write_cmdline(memory: &GuestMemoryMmap, cmdline: &str, limit: usize) -> Result<(), BootError> {
    let length = cmdline.len();
    if length > limit {
        return Err(BootError::CmdlineTooLong { length, limit });
    }
    if cmdline.contains('\0') {
        return Err(BootError::CmdlineNul);
    }
    memory.write_slice(cmdline.as_bytes(), GuestAddress(CMDLINE))?;
    memory.write_obj(0u8, GuestAddress(CMDLINE + length as u64))?;
    Ok(())
}

fn open(what: &'static str, path: &Path) -> Result<File, BootError> {
    let file = File::open(path).map_err(|source| unreadable(what, path, source))?;
    let metadata = file
        .metadata()
        .map_err(|source| unreadable(what, path, source))?;
    if metadata.is_dir() {
        return Err(unreadable(
            what,
            path,
            io::Error::from_raw_os_error(libc::EISDIR),
        ));
    }
    Ok(file)
}

fn unreadable(what: &'static str, path: &Path, source: io::Error) -> BootError {
    BootError::Read {
        what,
        path: path.to_owned(),
        source,
    }
}

/// Length of the file in bytes; the file is at its start afterwards.
fn length(file: &mut File) -> io::Result<u64> {
    let length = file.seek(SeekFrom::End(0))?;
    file.rewind()?;
    Ok(length)
}

#[cfg(test)]
mod tests;
