//! The lab's free memory, overwritten between two measurements so that the second owes nothing to the first.

use std::fs;

use crate::error::{Context, Error, Result};

/// KiB left alone: the machine needs some to go on.
const MARGIN_KIB: usize = 256 << 10;

/// Makes the kernel overwrite nearly all memory that is free.
pub(crate) fn overwrite() -> Result<()> {
    let text = fs::read_to_string("/proc/meminfo").context(|| "cannot read /proc/meminfo")?;
    let free_kib: usize = text
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemFree:")?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .ok_or_else(|| Error::new("/proc/meminfo has no MemFree"))?;
    let length = free_kib.saturating_sub(MARGIN_KIB) << 10;
    if length == 0 {
        return Ok(());
    }
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_POPULATE;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a fresh mapping wherever the kernel likes; populating it zeroes its pages. Nothing refers to it when it goes.
    let result = unsafe {
        let start = libc::mmap(std::ptr::null_mut(), length, access, flags, -1, 0);
        if start == libc::MAP_FAILED {
            -1
        } else {
            libc::munmap(start, length)
        }
    };
    if result != 0 {
        return Err(std::io::Error::last_os_error()).context(|| "cannot overwrite free memory");
    }
    Ok(())
}
