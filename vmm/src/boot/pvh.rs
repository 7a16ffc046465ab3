//! The PVH boot protocol: an ELF image, `hvm_start_info`, and a memory map.

use std::{fs::File, os::unix::fs::FileExt};

use linux_loader::{
    elf::{Elf64_Ehdr, Elf64_Phdr, PT_LOAD},
    loader::{Elf, KernelLoader, PvhBootCapability},
    start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info},
};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

use super::{
    BootError, CMDLINE_MAX, Machine, Start, load_initramfs, registers::write_gdt, usage_number,
    write_cmdline,
};
use crate::{
    config::PayloadConfig,
    layout::{CMDLINE, PAGE_SIZE, PVH_MEMORY_MAP, PVH_MODULES, PVH_START_INFO},
};

const MAGIC: u32 = 0x336e_c578;

/// Wrappers, because `ByteValued` cannot be implemented here for structs defined elsewhere.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct StartInfo(hvm_start_info);
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct Module(hvm_modlist_entry);
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct MapEntry(hvm_memmap_table_entry);

// SAFETY: plain integers without padding (their sizes are asserted where they are defined).
unsafe impl ByteValued for StartInfo {}
// SAFETY: as above.
unsafe impl ByteValued for Module {}
// SAFETY: as above.
unsafe impl ByteValued for MapEntry {}

pub(super) fn load(
    memory: &GuestMemoryMmap,
    file: &mut File,
    payload: &PayloadConfig,
    machine: &Machine,
) -> Result<Start, BootError> {
    let path = payload.kernel.as_path();
    // Before anything is loaded: the loader cannot tell an image that does not fit from one that is damaged.
    let kernel_end = end_of_segments(file);
    if kernel_end > machine.low_ram_end {
        let (needed, available) = (kernel_end, machine.low_ram_end);
        return Err(BootError::KernelTooLarge {
            path: path.to_owned(),
            needed,
            available,
        });
    }
    let loaded = Elf::load(memory, None, file, None).map_err(|source| BootError::Loader {
        path: path.to_owned(),
        source,
    })?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        let reason = "an ELF image without a PVH entry point (CONFIG_PVH)".to_owned();
        return Err(BootError::Kernel {
            path: path.to_owned(),
            reason,
        });
    };
    write_cmdline(
        memory,
        payload.cmdline.as_deref().unwrap_or_default(),
        CMDLINE_MAX,
    )?;
    let floor = kernel_end.next_multiple_of(PAGE_SIZE);
    let initramfs = load_initramfs(
        memory,
        payload.initramfs.as_deref(),
        floor,
        machine.low_ram_end,
    )?;

    let mut address = PVH_MEMORY_MAP;
    for (range, usage) in &machine.memory_map {
        let entry = hvm_memmap_table_entry {
            addr: range.start,
            size: range.length,
            type_: usage_number(*usage),
            reserved: 0,
        };
        if address + size_of_val(&entry) as u64 > PVH_MEMORY_MAP + PAGE_SIZE {
            return Err(BootError::MemoryMap);
        }
        memory.write_obj(MapEntry(entry), GuestAddress(address))?;
        address += size_of_val(&entry) as u64;
    }
    let mut info = hvm_start_info {
        magic: MAGIC,
        version: 1,
        cmdline_paddr: CMDLINE,
        rsdp_paddr: machine.rsdp,
        memmap_paddr: PVH_MEMORY_MAP,
        // At most 170 of them fit the page.
        memmap_entries: u32::try_from(machine.memory_map.len()).unwrap_or(0),
        ..Default::default()
    };
    if initramfs.size > 0 {
        let module = hvm_modlist_entry {
            paddr: initramfs.start,
            size: initramfs.size,
            ..Default::default()
        };
        memory.write_obj(Module(module), GuestAddress(PVH_MODULES))?;
        info.nr_modules = 1;
        info.modlist_paddr = PVH_MODULES;
    }
    memory.write_obj(StartInfo(info), GuestAddress(PVH_START_INFO))?;
    write_gdt(memory)?;
    Ok(Start::Pvh {
        entry: entry.0,
        start_info: PVH_START_INFO,
    })
}

/// First address behind all of the image's segments in memory, also those without a byte in the file. An image that ends
/// before its headers do is the loader's to refuse.
fn end_of_segments(file: &File) -> u64 {
    let mut header = Elf64_Ehdr::default();
    if file.read_exact_at(header.as_mut_slice(), 0).is_err() {
        return 0;
    }
    let mut end = 0;
    for index in 0..u64::from(header.e_phnum) {
        let mut segment = Elf64_Phdr::default();
        let at = header
            .e_phoff
            .saturating_add(index * size_of::<Elf64_Phdr>() as u64);
        if file.read_exact_at(segment.as_mut_slice(), at).is_err() {
            return end;
        }
        if segment.p_type == PT_LOAD {
            end = end.max(segment.p_paddr.saturating_add(segment.p_memsz));
        }
    }
    end
}
