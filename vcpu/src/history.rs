//! The last exits of a VP, for the report when a guest dies.

use std::fmt;

use crate::{counters::ExitKind, intercept::Intercept};

const LENGTH: usize = 16;

#[derive(Clone, Copy)]
struct Entry {
    kind: ExitKind,
    rip: u64,
    detail: u64,
}

/// A ring of the last 16 exits. Recording one is three stores.
#[derive(Default)]
pub struct History {
    entries: [Option<Entry>; LENGTH],
    next: usize,
}

impl History {
    pub(crate) fn record(&mut self, kind: ExitKind, intercept: Intercept<'_>) {
        let (rip, detail) = match intercept {
            Intercept::Port(access) => (access.header().rip(), access.port().into()),
            Intercept::Memory(access) => (access.header().rip(), access.gpa()),
            Intercept::Msr(access) => (access.header().rip(), access.number().into()),
            Intercept::Cpuid(message) => (message.header.rip, message.rax),
            Intercept::Exception(message) => (message.header.rip, message.exception_vector.into()),
            Intercept::Eoi { vector } => (0, vector.into()),
            Intercept::Halt(header) | Intercept::Unrecoverable(header) => (header.rip(), 0),
            Intercept::Unknown(kind) => (0, kind.into()),
            Intercept::InvalidRegister
            | Intercept::UnsupportedFeature
            | Intercept::Notification => (0, 0),
        };
        self.entries[self.next] = Some(Entry { kind, rip, detail });
        self.next = (self.next + 1) % LENGTH;
    }
}

impl fmt::Display for History {
    /// One line per exit, oldest first: kind, RIP, port or address.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (newer, older) = self.entries.split_at(self.next);
        for entry in older.iter().chain(newer).flatten() {
            writeln!(
                f,
                "  {:<24} rip {:#018x}  {:#x}",
                entry.kind.name(),
                entry.rip,
                entry.detail
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_newest_in_order() {
        let mut history = History::default();
        for vector in 0..20 {
            history.record(ExitKind::Eoi, Intercept::Eoi { vector });
        }
        let text = history.to_string();
        assert_eq!(text.lines().count(), LENGTH);
        assert!(text.lines().next().unwrap().ends_with("0x4"), "{text}");
        assert!(text.lines().last().unwrap().ends_with("0x13"), "{text}");
    }
}
