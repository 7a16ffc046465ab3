//! The 64-bit Linux boot protocol: a bzImage, the zero page and identity page tables.

use std::fs::File;

use linux_loader::{
    bootparam::{boot_params, setup_header},
    loader::{BzImage, KernelLoader},
};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

use super::{
    BootError, CMDLINE_MAX, Machine, Start, length, load_initramfs,
    registers::write_gdt,
    unpack::{Reason, unpack},
    unreadable, usage_number, write_cmdline,
};
use crate::{
    config::PayloadConfig,
    layout::{BOOT_PAGE_TABLES, CMDLINE, HIGH_RAM_START, ZERO_PAGE},
};

const HEADER_OFFSET: u64 = 0x1f1;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
const BOOT_FLAG: u16 = 0xaa55;
/// Protocol 2.12, Linux 3.8: `xloadflags` and with it the 64-bit entry point.
const OLDEST_PROTOCOL: u16 = 0x020c;
const LOADED_HIGH: u8 = 1;
/// Tells the kernel that its addresses are random, so that it randomizes its other areas, too.
const KASLR_DONE: u8 = 1 << 1;
const XLF_KERNEL_64: u16 = 1;
/// Bytes from the start of the protected-mode kernel to its 64-bit entry point.
const ENTRY_64: u64 = 0x200;
/// "A loader without an assigned number".
const LOADER_UNKNOWN: u8 = 0xff;

pub(super) fn load(
    memory: &GuestMemoryMmap,
    file: &mut File,
    payload: &PayloadConfig,
    machine: &Machine,
) -> Result<Start, BootError> {
    let path = payload.kernel.as_path();
    let refuse = |reason: String| BootError::Kernel {
        path: path.to_owned(),
        reason,
    };
    let size = length(file).map_err(|source| unreadable("kernel", path, source))?;
    let header = read_header(file, size).map_err(refuse)?;

    let start = header.pref_address.max(HIGH_RAM_START);
    let end = start.saturating_add(header.init_size.into());
    if end > machine.low_ram_end {
        let (needed, available) = (end, machine.low_ram_end);
        return Err(BootError::KernelTooLarge {
            path: path.to_owned(),
            needed,
            available,
        });
    }
    let cmdline = payload.cmdline.as_deref().unwrap_or_default();
    write_cmdline(
        memory,
        cmdline,
        CMDLINE_MAX.min(header.cmdline_size as usize),
    )?;

    let unpacked = unpack(
        memory,
        file,
        &header,
        setup_size(&header),
        randomness(cmdline),
    );
    let (entry, kernel_end, randomized) = match unpacked {
        Ok(kernel) => (kernel.entry, end, kernel.randomized),
        Err(Reason::Unfamiliar) => {
            let loaded =
                BzImage::load(memory, Some(GuestAddress(start)), file, None).map_err(|source| {
                    BootError::Loader {
                        path: path.to_owned(),
                        source,
                    }
                })?;
            (start + ENTRY_64, end.max(loaded.kernel_end), false)
        }
        Err(Reason::Corrupt(what)) => return Err(refuse(what.to_owned())),
        Err(Reason::Read(source)) => return Err(unreadable("kernel", path, source)),
    };
    let limit = machine
        .low_ram_end
        .min(u64::from(header.initrd_addr_max) + 1);
    let initramfs = load_initramfs(memory, payload.initramfs.as_deref(), kernel_end, limit)?;

    let mut params = boot_params {
        hdr: header,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNKNOWN;
    if randomized {
        params.hdr.loadflags |= KASLR_DONE;
    }
    // Below 4 GiB all of them: `low_ram_end` is.
    params.hdr.cmd_line_ptr = low(CMDLINE);
    params.hdr.code32_start = low(start);
    params.hdr.ramdisk_image = low(initramfs.start);
    params.hdr.ramdisk_size = low(initramfs.size);
    params.acpi_rsdp_addr = machine.rsdp;
    if machine.memory_map.len() > params.e820_table.len() {
        return Err(BootError::MemoryMap);
    }
    for (index, (range, usage)) in machine.memory_map.iter().enumerate() {
        params.e820_table[index].addr = range.start;
        params.e820_table[index].size = range.length;
        params.e820_table[index].r#type = usage_number(*usage);
        params.e820_entries += 1;
    }
    memory.write_obj(params, GuestAddress(ZERO_PAGE))?;
    write_gdt(memory)?;
    write_page_tables(memory)?;
    Ok(Start::Linux64 {
        entry,
        zero_page: ZERO_PAGE,
        page_tables: BOOT_PAGE_TABLES,
    })
}

/// Reads the setup header and checks that this is a whole 64-bit kernel.
fn read_header(file: &File, size: u64) -> Result<setup_header, String> {
    let mut header = setup_header::default();
    let read =
        std::os::unix::fs::FileExt::read_exact_at(file, header.as_mut_slice(), HEADER_OFFSET);
    let (flag, magic, version) = (header.boot_flag, header.header, header.version);
    if read.is_err() || flag != BOOT_FLAG || magic != HEADER_MAGIC {
        return Err("neither a bzImage nor an ELF image".to_owned());
    }
    if version < OLDEST_PROTOCOL || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(format!(
            "boot protocol {version:#06x} without a 64-bit entry point"
        ));
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err("a zImage, not a bzImage".to_owned());
    }
    let setup_sectors = if header.setup_sects == 0 {
        4
    } else {
        u64::from(header.setup_sects)
    };
    let needed = (setup_sectors + 1) * 512 + u64::from(header.syssize) * 16;
    if size < needed {
        return Err(format!(
            "truncated: {size} bytes, its header speaks of {needed}"
        ));
    }
    Ok(header)
}

/// Bytes before the protected-mode kernel: the boot sector and the real-mode code.
fn setup_size(header: &setup_header) -> u64 {
    let sectors = if header.setup_sects == 0 {
        4
    } else {
        u64::from(header.setup_sects)
    };
    (sectors + 1) * 512
}

/// A number to choose the kernel's address by, unless the command line forbids it or the host has none.
fn randomness(cmdline: &str) -> Option<u64> {
    if cmdline
        .split_ascii_whitespace()
        .any(|word| word == "nokaslr")
    {
        return None;
    }
    let mut bytes = [0; 8];
    // SAFETY: a valid buffer and its length.
    let filled = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    (filled == 8).then(|| u64::from_le_bytes(bytes))
}

/// Maps the first 4 GiB one to one with 2 MiB pages.
fn write_page_tables(memory: &GuestMemoryMmap) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 0x3;
    const LARGE: u64 = 0x80;
    let pdpt = BOOT_PAGE_TABLES + 0x1000;
    memory.write_obj(pdpt | PRESENT_WRITABLE, GuestAddress(BOOT_PAGE_TABLES))?;
    for gib in 0..4u64 {
        let directory = pdpt + 0x1000 * (gib + 1);
        memory.write_obj(directory | PRESENT_WRITABLE, GuestAddress(pdpt + gib * 8))?;
        let mut entries = [0; 4096];
        for (index, entry) in entries.chunks_exact_mut(8).enumerate() {
            let page = (gib << 30) | ((index as u64) << 21);
            entry.copy_from_slice(&(page | LARGE | PRESENT_WRITABLE).to_le_bytes());
        }
        memory.write_slice(&entries, GuestAddress(directory))?;
    }
    Ok(())
}

/// The 32-bit fields of the zero page hold addresses and sizes below 4 GiB only.
fn low(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
