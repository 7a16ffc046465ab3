//! Which scheduler the mshv driver says it found, in the kernel's log: the only place that tells classic from core. Reading
//! it needs rights on most machines.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    time::{Duration, Instant},
};

use super::{Evidence, Says};

const KMSG: &str = "/dev/kmsg";
/// What the driver writes before the name.
const ANNOUNCEMENT: &str = "hypervisor using ";
/// `syslog(2)`: read everything.
const READ_ALL: libc::c_int = 3;

/// The scheduler the driver named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Named {
    Root,
    Core,
    Classic,
    Nothing,
}

/// Looks, for as long as `limit`.
pub(super) fn read(limit: Duration) -> (Named, Evidence) {
    let found = match kmsg(limit) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => syslog(),
        found => found,
    };
    let (named, says, value) = match found {
        Ok(Some(line)) => {
            let named = name(&line);
            let says = match named {
                Named::Root => Says::Linux,
                Named::Core | Named::Classic => Says::Hypervisor,
                Named::Nothing => Says::Nothing,
            };
            (named, says, line)
        }
        Ok(None) => (
            Named::Nothing,
            Says::Nothing,
            "no line of the mshv driver about its scheduler".to_owned(),
        ),
        Err(error) => (Named::Nothing, Says::Nothing, error.to_string()),
    };
    let meaning = match named {
        Named::Root => "the driver schedules VPs itself",
        Named::Core => "the driver found the core scheduler",
        Named::Classic => "the driver found the classic scheduler",
        Named::Nothing => "the log does not tell",
    };
    (named, Evidence::new("kernel's log", says, value, meaning))
}

/// The last announcement in the kernel's own records.
fn kmsg(limit: Duration) -> io::Result<Option<String>> {
    let mut file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(KMSG)?;
    let deadline = Instant::now() + limit;
    let (mut found, mut record) = (None, vec![0; 8192]);
    while Instant::now() < deadline {
        match file.read(&mut record) {
            Ok(0) => break,
            Ok(length) => {
                let text = String::from_utf8_lossy(&record[..length]);
                found = of_kernel(&text).and_then(announcement).or(found);
            }
            // Records were overwritten while we read, or one is larger than we care for.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EPIPE | libc::EINVAL)) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// The text of a record "priority,sequence,time,flags;text", if the kernel itself wrote it: what processes write into the log
/// has another facility.
fn of_kernel(record: &str) -> Option<&str> {
    let (head, text) = record.split_once(';')?;
    let priority: u32 = head.split(',').next()?.parse().ok()?;
    (priority >> 3 == 0).then(|| text.lines().next().unwrap_or_default())
}

fn syslog() -> io::Result<Option<String>> {
    let mut buffer = vec![0u8; 1 << 20];
    let size = libc::c_int::try_from(buffer.len()).unwrap_or(libc::c_int::MAX);
    // SAFETY: the kernel writes into the buffer, whose size it is told.
    let length = unsafe { libc::klogctl(READ_ALL, buffer.as_mut_ptr().cast(), size) };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    let text = String::from_utf8_lossy(&buffer[..length]);
    // "<6>[    1.2] text"
    let kernels = text.lines().filter_map(|line| {
        let (priority, text) = line.strip_prefix('<')?.split_once('>')?;
        (priority.parse::<u32>().ok()? >> 3 == 0).then_some(text)
    });
    Ok(kernels.filter_map(announcement).next_back())
}

/// A line from the announcement on.
fn announcement(line: &str) -> Option<String> {
    // Older drivers begin with a small letter.
    let at = line.to_ascii_lowercase().find(ANNOUNCEMENT)?;
    Some(line[at..].trim().to_owned())
}

fn name(announcement: &str) -> Named {
    let Some(name) = announcement.get(ANNOUNCEMENT.len()..) else {
        return Named::Nothing;
    };
    match name.split(' ').next() {
        Some("root") => Named::Root,
        Some("core") => Named::Core,
        Some("classic") => Named::Classic,
        _ => Named::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_drivers_words_are_understood() {
        let of = |record| {
            of_kernel(record)
                .and_then(announcement)
                .map(|line| name(&line))
        };
        let record =
            "6,512,1200000,-;misc mshv: Hypervisor using root scheduler\n SUBSYSTEM=misc\n";
        assert_eq!(of(record), Some(Named::Root));
        let record = "6,1,1,-;mshv: hypervisor using core scheduler";
        assert_eq!(of(record), Some(Named::Core));
        let record = "6,1,1,-;misc mshv: Hypervisor using classic scheduler without SMT";
        assert_eq!(of(record), Some(Named::Classic));
        let record = "6,1,1,-;misc mshv: Hypervisor using unknown scheduler";
        assert_eq!(of(record), Some(Named::Nothing));
        assert_eq!(of("6,1,1,-;usb 1-1: new device"), None);
    }

    #[test]
    fn what_a_process_writes_into_the_log_counts_for_nothing() {
        let record = "12,512,1200000,-;misc mshv: Hypervisor using root scheduler";
        assert_eq!(of_kernel(record), None);
        assert_eq!(of_kernel("rubbish"), None);
    }
}
