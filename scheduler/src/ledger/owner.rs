//! Who owns what is written down: a process that may be gone, and whose number may be another's by now.

use std::{fs, io};

use super::Owner;

impl Owner {
    /// This process, as the owner of the VM with this uuid.
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub fn current(uuid: impl Into<String>) -> io::Result<Self> {
        let pid = std::process::id();
        let start_time = start_time(pid)
            .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat cannot be read")))?;
        Ok(Self {
            pid,
            start_time,
            uuid: uuid.into(),
        })
    }

    /// Does the process still run? One that has ended and that its parent has not looked at yet does not.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        start_time(self.pid) == Some(self.start_time)
    }
}

/// When process `pid` started, in clock ticks since boot; `None` if it is not there, or has ended.
pub(crate) fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    parse(&stat)
}

/// State and start time are fields 3 and 22; field 2 is the program's name in parentheses, with anything in it.
fn parse(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_and_spaces_is_no_trap() {
        let stat = "12 (a) b (c)) S 1 12 12 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 777 0 0";
        assert_eq!(parse(stat), Some(777));
        assert_eq!(parse(&stat.replace(" S ", " Z ")), None);
        assert_eq!(parse("12 (cut"), None);
    }

    #[test]
    fn this_process_is_alive_and_its_namesake_is_not() {
        let mut owner = Owner::current("u").unwrap();
        assert!(owner.is_alive());
        owner.start_time += 1;
        assert!(!owner.is_alive());
    }

    #[test]
    fn a_child_is_dead_before_it_is_waited_for() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let owner = Owner {
            pid: child.id(),
            start_time: start_time(child.id()).unwrap(),
            uuid: String::new(),
        };
        assert!(owner.is_alive());
        child.kill().unwrap();
        let begun = std::time::Instant::now();
        while owner.is_alive() {
            assert!(begun.elapsed().as_secs() < 5);
        }
        child.wait().unwrap();
    }
}
