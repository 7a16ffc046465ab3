//! Whether what was said about who schedules is still said: the two sources that cost next to nothing, read again.
//!
//! The driver decides when it is loaded and the hypervisor may decide anew, for instance when this machine is moved to another host.
//! Who schedules is a matter of the whole plan, so a change is told, not guessed around.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    time::Duration,
};

use super::{Detection, Evidence, Says, declared, kernel};
use crate::sys::boottime_ns;

/// How often to look.
const EVERY: Duration = Duration::from_secs(60);

/// A source says something else than before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModeChange {
    /// Which.
    pub source: &'static str,
    /// What it said.
    pub before: String,
    /// What it says.
    pub now: String,
    /// Who schedules, in its eyes.
    pub says: Says,
}

/// Looks every minute, and after this machine has slept through one.
pub struct ModeCheck {
    read: Box<dyn FnMut() -> Vec<Evidence> + Send>,
    said: Vec<Evidence>,
    every: Duration,
    /// On `CLOCK_BOOTTIME`, which goes on while this machine sleeps.
    due_ns: u64,
}

impl ModeCheck {
    /// Compares with what `detection` found. `device` is an open `/dev/mshv`.
    ///
    /// # Errors
    /// There are no more descriptors.
    pub fn new(device: BorrowedFd<'_>, detection: &Detection) -> io::Result<Self> {
        let device = device.try_clone_to_owned()?;
        let kind = detection.partition;
        let read = move || {
            vec![
                declared::read(Ok(device.as_fd()), kind).evidence,
                kernel::read().1,
            ]
        };
        Ok(Self::of(read, detection.evidence.clone(), EVERY))
    }

    pub(crate) fn of(
        read: impl FnMut() -> Vec<Evidence> + Send + 'static,
        said: Vec<Evidence>,
        every: Duration,
    ) -> Self {
        Self {
            read: Box::new(read),
            said,
            every,
            due_ns: boottime_ns() + every.as_nanos() as u64,
        }
    }

    /// How long until it is time to look.
    pub(crate) fn due_in(&self) -> Duration {
        Duration::from_nanos(self.due_ns.saturating_sub(boottime_ns()))
    }

    /// Looks if it is time. A source that says nothing any more has not changed its mind.
    pub(crate) fn look(&mut self) -> Option<ModeChange> {
        if !self.due_in().is_zero() {
            return None;
        }
        self.due_ns = boottime_ns() + self.every.as_nanos() as u64;
        let mut changed = None;
        for now in (self.read)() {
            let before = self
                .said
                .iter_mut()
                .find(|before| before.source == now.source && before.says != now.says);
            if let Some(before) = before.filter(|_| now.says != Says::Nothing) {
                changed = Some(ModeChange {
                    source: now.source,
                    before: before.value.clone(),
                    now: now.value.clone(),
                    says: now.says,
                });
                *before = now;
            }
        }
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evidence(says: Says, value: &str) -> Evidence {
        Evidence::new("kernel's decision", says, value, "")
    }

    fn check(mut answers: Vec<Evidence>) -> ModeCheck {
        let said = vec![evidence(Says::Linux, "registered")];
        ModeCheck::of(move || vec![answers.remove(0)], said, Duration::ZERO)
    }

    #[test]
    fn only_another_answer_is_a_change() {
        let mut check = check(vec![
            evidence(Says::Linux, "registered"),
            evidence(Says::Nothing, "cannot be read"),
            evidence(Says::Hypervisor, "not registered"),
            evidence(Says::Hypervisor, "not registered"),
        ]);
        assert_eq!(check.look(), None);
        assert_eq!(check.look(), None);
        let change = check.look().unwrap();
        assert_eq!(
            (change.before.as_str(), change.now.as_str(), change.says),
            ("registered", "not registered", Says::Hypervisor)
        );
        assert_eq!(check.look(), None, "it is told once");
    }

    #[test]
    fn nobody_looks_before_it_is_time() {
        let read = || unreachable!("not yet");
        let mut check = ModeCheck::of(read, Vec::new(), Duration::from_secs(60));
        assert_eq!(check.look(), None);
        assert!(check.due_in() > Duration::from_secs(50));
    }
}
