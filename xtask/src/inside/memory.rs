//! How much memory a VMM uses beside its guest's.

use std::fs;

/// KiB of process `pid` in RAM, without the mappings that are guest memory; `None` if the process is gone.
///
/// A mapping of at least an eighth of the guest's memory is taken to be guest memory: nothing else in a VMM is of
/// that size, and guest memory has few holes.
pub(crate) fn beside_guest_kib(pid: u32, guest_kib: u64) -> Option<u64> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?;
    Some(resident_kib(&smaps, guest_kib / 8))
}

/// The sum of `Rss` over all mappings smaller than `limit_kib`.
fn resident_kib(smaps: &str, limit_kib: u64) -> u64 {
    let mut size = 0;
    let mut total = 0;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (key, value) = (
            words.next().unwrap_or_default(),
            words.next().unwrap_or_default(),
        );
        match key {
            "Size:" => size = value.parse().unwrap_or(0),
            "Rss:" if size < limit_kib => total += value.parse::<u64>().unwrap_or(0),
            _ => {}
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_does_not_count() {
        let smaps = "1000-2000 rw-p 00000000 00:00 0 [heap]\nSize: 40 kB\nRss: 12 kB\n\
                     8000-9000 rw-s 00000000 00:00 0\nSize: 524288 kB\nRss: 100000 kB\n\
                     a000-b000 r-xp 00000000 00:00 0 /bin/x\nSize: 64 kB\nRss: 30 kB\n";
        assert_eq!(resident_kib(smaps, 65536), 42);
    }
}
