//! When turns are tried, and whether they stay: they help guests that spin for each other and cost those that block.
//!
//! All gangs on the same CPUs are tried together, at times everybody derives from the clock: one window without turns, one with.
//! Each measures what its guest got done, writes the difference to the ledger, and everybody sums up the same numbers.

use std::time::Duration;

/// Gained less than this, in thousandths, turns are not worth it.
const WORTH_IT_MILLI: i32 = 50;

/// Windows from the start of one trial to the start of the next: the first time; then twice as many, and so on.
const FIRST_GAP: u64 = 20;

/// And never more.
const LONGEST_GAP: u64 = 200;

/// What a guest gets done, as somebody can count it who knows the guest or the hypervisor.
pub trait GangSignal: Send {
    /// Something that grows with useful work: barriers passed, requests served. `None` if nothing of the kind is known.
    fn progress(&mut self) -> Option<u64>;

    /// Something that grows with spinning in vain: long spin waits the guest told the hypervisor of, pause exits.
    fn spins(&mut self) -> Option<u64>;
}

/// Where in its trials a gang is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Measured without turns.
    Without,
    /// Measured with turns.
    With,
    /// As decided.
    Decided,
}

/// The phase at `now`, for gangs that are all there since `since`, and when it ends; in nanoseconds.
pub(crate) fn phase(now_ns: u64, since_ns: u64, window: Duration) -> (Phase, u64) {
    let window = (window.as_nanos() as u64).max(1);
    let current = now_ns.saturating_sub(since_ns) / window;
    let end = |windows: u64| since_ns + windows * window;
    let (mut trial, mut gap) = (0, FIRST_GAP);
    loop {
        let next = trial + gap;
        if current == trial {
            return (Phase::Without, end(trial + 1));
        }
        if current == trial + 1 {
            return (Phase::With, end(trial + 2));
        }
        if current < next {
            return (Phase::Decided, end(next));
        }
        trial = next;
        gap = (gap * 2).min(LONGEST_GAP);
    }
}

/// Is it worth it, by what each gang gained?
pub(crate) fn decide(gains_milli: impl Iterator<Item = i32>) -> bool {
    let gains: Vec<i64> = gains_milli.map(i64::from).collect();
    !gains.is_empty() && gains.iter().sum::<i64>() >= i64::from(WORTH_IT_MILLI) * gains.len() as i64
}

/// Counts over two windows, and compares.
#[derive(Default)]
pub(crate) struct Trial {
    without: Option<Rates>,
    begun: Option<(Phase, u64, Counts)>,
}

/// Two counters.
#[derive(Clone, Copy, Default)]
struct Counts {
    progress: Option<u64>,
    spins: Option<u64>,
}

/// The same, per second.
#[derive(Clone, Copy)]
struct Rates {
    progress: Option<f64>,
    spins: Option<f64>,
}

impl Trial {
    /// To be told when a phase begins, or has settled. What turns gained, in thousandths, if that is known now.
    pub(crate) fn enter(
        &mut self,
        phase: Phase,
        now_ns: u64,
        signal: &mut dyn GangSignal,
    ) -> Option<i32> {
        let counts = Counts {
            progress: signal.progress(),
            spins: signal.spins(),
        };
        let ended = self.begun.replace((phase, now_ns, counts));
        let (was, begun_ns, before) = ended?;
        let rates = rates(before, counts, now_ns.saturating_sub(begun_ns))?;
        match (was, phase) {
            (Phase::Without, Phase::With) => {
                self.without = Some(rates);
                None
            }
            (Phase::With, Phase::Decided) => gain(self.without.take()?, rates),
            _ => None,
        }
    }

    /// The phase goes on, but counts from now: what happened so far belongs to the change.
    pub(crate) fn settle(&mut self, now_ns: u64, signal: &mut dyn GangSignal) {
        if let Some((_, begun_ns, counts)) = &mut self.begun {
            *begun_ns = now_ns;
            *counts = Counts {
                progress: signal.progress(),
                spins: signal.spins(),
            };
        }
    }
}

fn rates(before: Counts, after: Counts, ns: u64) -> Option<Rates> {
    let rate = |before: Option<u64>, after: Option<u64>| {
        let grown = after?.checked_sub(before?)?;
        (ns > 0).then(|| grown as f64 * 1e9 / ns as f64)
    };
    Some(Rates {
        progress: rate(before.progress, after.progress),
        spins: rate(before.spins, after.spins),
    })
}

/// Progress counts if there is any; otherwise less spinning is taken for more progress.
fn gain(without: Rates, with: Rates) -> Option<i32> {
    let (more, less) = match (without, with) {
        (
            Rates {
                progress: Some(without),
                ..
            },
            Rates {
                progress: Some(with),
                ..
            },
        ) => (with, without),
        (
            Rates {
                spins: Some(without),
                ..
            },
            Rates {
                spins: Some(with), ..
            },
        ) => (without, with),
        _ => return None,
    };
    let gain = match (more > 0.0, less > 0.0) {
        (_, true) => more / less - 1.0,
        (true, false) => 1.0,
        (false, false) => 0.0,
    };
    Some((gain * 1000.0).clamp(-1000.0, 10_000.0) as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Duration = Duration::from_secs(3);

    #[test]
    fn trials_become_rare() {
        let second = 1_000_000_000;
        let trials: Vec<u64> = (0..400 * 3)
            .filter(|s| phase(s * second, 0, WINDOW).0 == Phase::With)
            .filter(|s| s % 3 == 0)
            .map(|s| s / 3)
            .collect();
        assert_eq!(trials, [1, 21, 61, 141, 301]);
        assert_eq!(phase(0, 0, WINDOW), (Phase::Without, 3 * second));
        assert_eq!(phase(7 * second, 0, WINDOW), (Phase::Decided, 60 * second));
        // Somebody who has come later, and whose clock is read before that.
        assert_eq!(phase(5, 10, WINDOW).0, Phase::Without);
    }

    struct Counted(u64);
    impl GangSignal for Counted {
        fn progress(&mut self) -> Option<u64> {
            Some(self.0)
        }
        fn spins(&mut self) -> Option<u64> {
            None
        }
    }

    fn trial(without: u64, with: u64) -> Option<i32> {
        let mut trial = Trial::default();
        let mut signal = Counted(0);
        assert_eq!(trial.enter(Phase::Without, 0, &mut signal), None);
        signal.0 += without;
        assert_eq!(trial.enter(Phase::With, 1_000, &mut signal), None);
        signal.0 += with;
        trial.enter(Phase::Decided, 2_000, &mut signal)
    }

    #[test]
    fn a_gain_is_measured_and_a_loss_too() {
        assert_eq!(trial(100, 180), Some(800));
        assert_eq!(trial(100, 97), Some(-30));
        assert_eq!(trial(0, 0), Some(0));
    }

    #[test]
    fn everybody_counts_the_same() {
        assert!(decide([800, 900].into_iter()));
        assert!(!decide([40, 40].into_iter()));
        assert!(!decide([900, -1000].into_iter()));
        assert!(!decide(std::iter::empty()));
    }
}
