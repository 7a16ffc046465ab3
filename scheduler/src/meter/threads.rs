//! What Linux counts for a thread, from files that are opened once and read again and again.

use std::{fs::File, io, ops::Add, os::unix::fs::FileExt};

use crate::Tid;

/// Open files of one thread.
pub(super) struct ThreadFiles {
    schedstat: File,
    status: File,
    /// Not in every kernel.
    sched: Option<File>,
}

/// What Linux has counted for one thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ThreadCounts {
    pub(super) run_ns: u64,
    pub(super) wait_ns: u64,
    /// Times it was given a CPU.
    pub(super) slices: u64,
    pub(super) voluntary: u64,
    pub(super) involuntary: u64,
    pub(super) migrations: Option<u64>,
}

impl ThreadCounts {
    /// How long the thread has neither run nor wanted to, from `since_ns` until `now_ns`, when it was counted.
    pub(super) fn halted_ns(&self, since_ns: u64, now_ns: u64) -> u64 {
        now_ns
            .saturating_sub(since_ns)
            .saturating_sub(self.run_ns + self.wait_ns)
    }
}

impl Add for ThreadCounts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            run_ns: self.run_ns + other.run_ns,
            wait_ns: self.wait_ns + other.wait_ns,
            slices: self.slices + other.slices,
            voluntary: self.voluntary + other.voluntary,
            involuntary: self.involuntary + other.involuntary,
            migrations: match (self.migrations, other.migrations) {
                (Some(one), Some(another)) => Some(one + another),
                (one, another) => one.or(another),
            },
        }
    }
}

impl ThreadFiles {
    pub(super) fn open(tid: Tid) -> io::Result<Self> {
        let open = |name: &str| File::open(format!("/proc/self/task/{}/{name}", tid.0));
        Ok(Self {
            schedstat: open("schedstat")?,
            status: open("status")?,
            sched: open("sched").ok(),
        })
    }

    /// `None` once the thread has ended.
    pub(super) fn read(&self, buffer: &mut Vec<u8>) -> Option<ThreadCounts> {
        let text = read(&self.schedstat, buffer)?;
        let mut fields = text.split_ascii_whitespace().map(str::parse::<u64>);
        let mut next = || fields.next()?.ok();
        let (run_ns, wait_ns, slices) = (next()?, next()?, next()?);
        let text = read(&self.status, buffer)?;
        // They are the last two lines.
        let (voluntary, involuntary) = (
            field(text, "\nvoluntary_ctxt_switches:")?,
            field(text, "\nnonvoluntary_ctxt_switches:")?,
        );
        let migrations = self
            .sched
            .as_ref()
            .and_then(|sched| field(read(sched, buffer)?, "\nse.nr_migrations"));
        Some(ThreadCounts {
            run_ns,
            wait_ns,
            slices,
            voluntary,
            involuntary,
            migrations,
        })
    }
}

/// Room for any of them.
pub(super) const ROOM: usize = 8192;

fn read<'a>(file: &File, buffer: &'a mut Vec<u8>) -> Option<&'a str> {
    buffer.resize(ROOM, 0);
    let length = file.read_at(buffer, 0).ok()?;
    std::str::from_utf8(&buffer[..length]).ok()
}

/// The number after `name`, spaces and a colon.
fn field(text: &str, name: &str) -> Option<u64> {
    let after = &text[text.rfind(name)? + name.len()..];
    let after = after.trim_start_matches([' ', '\t', ':']);
    let end = after
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(after.len());
    after[..end].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_works_is_seen_to() {
        let files = ThreadFiles::open(Tid::current()).unwrap();
        let mut buffer = Vec::new();
        let before = files.read(&mut buffer).unwrap();
        let begun = std::time::Instant::now();
        while begun.elapsed().as_millis() < 20 {
            std::hint::spin_loop();
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
        let after = files.read(&mut buffer).unwrap();
        assert!(after.run_ns > before.run_ns);
        assert!(after.voluntary > before.voluntary);
        assert!(after.slices >= before.slices);
    }

    #[test]
    fn fields_are_found_by_name() {
        let text = "x\nvoluntary_ctxt_switches:\t17\nnonvoluntary_ctxt_switches:\t4\n";
        assert_eq!(field(text, "\nvoluntary_ctxt_switches:"), Some(17));
        assert_eq!(field(text, "\nnonvoluntary_ctxt_switches:"), Some(4));
        let text = "---\nse.nr_migrations                             :                    9\nx";
        assert_eq!(field(text, "\nse.nr_migrations"), Some(9));
        assert_eq!(field(text, "\nnothing"), None);
    }
}
