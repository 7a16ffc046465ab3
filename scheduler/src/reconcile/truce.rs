//! Whoever fights us wins for a while: a few corrections, then none for some time, and for twice that the next time.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// Corrections that somebody else may make necessary within [`FIGHT`].
pub(super) const CORRECTIONS: usize = 3;
pub(super) const FIGHT: Duration = Duration::from_secs(10);
/// The longest truce.
const LONGEST: Duration = Duration::from_secs(640);

/// Corrections, and the truce that too many of them lead to.
pub(super) struct Truce {
    /// When others made corrections necessary.
    corrections: VecDeque<Instant>,
    until: Option<Instant>,
    /// Of the next.
    length: Duration,
}

impl Truce {
    /// None yet; `length`: that of the first.
    pub(super) fn new(length: Duration) -> Self {
        Self {
            corrections: VecDeque::new(),
            until: None,
            length,
        }
    }

    /// Counts a correction, tried or made. How long the truce lasts that begins now, if one does.
    pub(super) fn count(&mut self, now: Instant) -> Option<Duration> {
        while self
            .corrections
            .front()
            .is_some_and(|then| now - *then > FIGHT)
        {
            self.corrections.pop_front();
        }
        self.corrections.push_back(now);
        if self.corrections.len() < CORRECTIONS {
            return None;
        }
        self.corrections.clear();
        let length = self.length;
        self.until = Some(now + length);
        self.length = (length * 2).min(LONGEST);
        Some(length)
    }

    /// Is there one?
    pub(super) fn holds(&self) -> bool {
        self.until.is_some()
    }

    /// Ends it if its time is over. Did it?
    pub(super) fn end_at(&mut self, now: Instant) -> bool {
        self.until.take_if(|until| *until <= now).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_third_correction_in_ten_seconds_is_the_last_for_a_while() {
        let mut truce = Truce::new(Duration::from_secs(10));
        let mut now = Instant::now();
        for length in [10, 20, 40] {
            assert_eq!(truce.count(now), None);
            assert_eq!(truce.count(now), None);
            assert_eq!(truce.count(now), Some(Duration::from_secs(length)));
            assert!(truce.holds() && !truce.end_at(now));
            now += Duration::from_secs(length);
            assert!(truce.end_at(now) && !truce.holds());
            assert!(!truce.end_at(now));
        }
        // Far enough from each other.
        for _ in 0..9 {
            now += Duration::from_secs(6);
            assert_eq!(truce.count(now), None);
        }
    }
}
