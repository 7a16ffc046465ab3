//! Which VP is on which logical processor: the rules, without threads and clocks.
//!
//! Each VP has a virtual time, the time it has run divided by its weight. Whoever has the least runs; after a quantum it
//! gives way if somebody has less. That is round robin between equals. A cap is an allowance that fills at the rate of the
//! cap and is spent by running, at most a quantum ahead: without it a VP waits. A reserve is the same from the other side:
//! what a VP has not got of it puts it in front of everybody else.
//!
//! All times are nanoseconds; the caller says what time it is and how long a VP has run.

use std::collections::BTreeMap;

use super::shares::{MAX_WEIGHT, Shares, WHOLE};

/// A VP, for as long as it exists.
pub(super) type Key = u64;

/// What a VP must be behind with its reserve before it interrupts another.
const RESERVE_GRAIN: i64 = 500_000;

/// Where a VP is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// It does not want to run: no `RUN_VP`.
    Away,
    /// It wants to.
    Waiting,
    /// It does, on this logical processor, since then.
    On { lp: usize, since: u64 },
    /// It is in the guest but halted, and has given its logical processor away.
    Asleep,
}

#[derive(Debug)]
struct Entry {
    shares: Shares,
    place: Place,
    /// It has been asked to give way.
    leaving: bool,
    last_lp: usize,
    virtual_time: u64,
    /// What is left of the cap.
    allowance: i64,
    /// Spent; it waits until there is enough again.
    throttled: bool,
    /// What is missing of the reserve.
    owed: i64,
    /// When `allowance` and `owed` were right.
    at: u64,
}

/// The VPs and the logical processors.
#[derive(Debug)]
pub(super) struct Queue {
    lps: Vec<Option<Key>>,
    vps: BTreeMap<Key, Entry>,
    quantum: u64,
}

/// `part` of [`WHOLE`] of a time.
fn fraction(time: u64, part: u64) -> i64 {
    (u128::from(time) * u128::from(part) / u128::from(WHOLE)) as i64
}

/// How long until `part` of [`WHOLE`] amounts to a time.
fn until(missing: i64, part: u64) -> u64 {
    let missing = u128::from(missing.max(0).unsigned_abs());
    (missing * u128::from(WHOLE) / u128::from(part.max(1))) as u64
}

impl Entry {
    fn is_ready(&self) -> bool {
        self.place == Place::Waiting && !self.throttled
    }

    fn weighted(&self, time: u64) -> u64 {
        time * MAX_WEIGHT / self.shares.weight.max(1)
    }

    /// Who runs first: those behind with their reserve, then by virtual time.
    fn rank(&self) -> (bool, u64) {
        (self.owed < RESERVE_GRAIN, self.virtual_time)
    }

    fn fill(&mut self, now: u64, quantum: u64) {
        let elapsed = now.saturating_sub(self.at);
        self.at = now;
        let most = quantum as i64;
        if self.shares.is_capped() {
            self.allowance = (self.allowance + fraction(elapsed, self.shares.cap)).min(most);
            self.throttled &= self.allowance < most / 2;
        } else {
            (self.allowance, self.throttled) = (most, false);
        }
        if matches!(self.place, Place::Waiting | Place::On { .. }) {
            self.owed = (self.owed + fraction(elapsed, self.shares.reserve)).min(most);
        }
    }
}

impl Queue {
    /// Nothing on `lps` logical processors.
    pub(super) fn new(lps: usize, quantum: u64) -> Self {
        Self {
            lps: vec![None; lps],
            vps: BTreeMap::new(),
            quantum,
        }
    }

    /// A new VP, away.
    pub(super) fn add(&mut self, key: Key, shares: Shares, now: u64) {
        let entry = Entry {
            shares,
            place: Place::Away,
            leaving: false,
            last_lp: key as usize % self.lps.len().max(1),
            virtual_time: 0,
            allowance: self.quantum as i64,
            throttled: false,
            owed: 0,
            at: now,
        };
        self.vps.insert(key, entry);
    }

    /// A VP ends.
    pub(super) fn remove(&mut self, key: Key) {
        self.leave(key);
        self.vps.remove(&key);
    }

    /// Whether there is no VP.
    pub(super) fn is_empty(&self) -> bool {
        self.vps.is_empty()
    }

    /// Where a VP is.
    pub(super) fn place(&self, key: Key) -> Place {
        self.vps.get(&key).map_or(Place::Away, |entry| entry.place)
    }

    /// Whether a VP has been asked to give way.
    pub(super) fn is_leaving(&self, key: Key) -> bool {
        self.vps.get(&key).is_some_and(|entry| entry.leaving)
    }

    /// Whether somebody could run if there were a logical processor.
    pub(super) fn is_contended(&self) -> bool {
        self.vps.values().any(Entry::is_ready)
    }

    /// A VP has run for `ran` since the last time; its shares may have changed.
    pub(super) fn charge(&mut self, key: Key, ran: u64, shares: Shares, now: u64) {
        let quantum = self.quantum;
        let Some(entry) = self.vps.get_mut(&key) else {
            return;
        };
        entry.fill(now, quantum);
        entry.shares = shares;
        entry.virtual_time += entry.weighted(ran);
        entry.owed = (entry.owed - ran as i64).max(-(quantum as i64));
        if shares.is_capped() {
            entry.allowance -= ran as i64;
            entry.throttled |= entry.allowance <= 0;
        }
    }

    /// A VP wants to run. Who was away does not save up: it is as good as the others, and a quantum better.
    pub(super) fn enter(&mut self, key: Key, now: u64) {
        let quantum = self.quantum;
        let floor = self
            .vps
            .values()
            .filter(|entry| matches!(entry.place, Place::Waiting | Place::On { .. }))
            .map(|entry| entry.virtual_time)
            .min();
        let Some(entry) = self.vps.get_mut(&key) else {
            return;
        };
        entry.fill(now, quantum);
        if let Some(floor) = floor {
            let bonus = entry.weighted(quantum);
            entry.virtual_time = entry.virtual_time.max(floor.saturating_sub(bonus));
        }
        (entry.place, entry.leaving) = (Place::Waiting, false);
    }

    fn set_place(&mut self, key: Key, place: Place) {
        if let Some(entry) = self.vps.get_mut(&key) {
            if let Place::On { lp, .. } = entry.place {
                self.lps[lp] = None;
            }
            (entry.place, entry.leaving) = (place, false);
        }
    }

    /// A VP stops wanting to run.
    pub(super) fn leave(&mut self, key: Key) {
        self.set_place(key, Place::Away);
    }

    /// A VP gives way, and goes on wanting to run.
    pub(super) fn give_way(&mut self, key: Key) {
        self.set_place(key, Place::Waiting);
    }

    /// A VP halted.
    pub(super) fn sleep(&mut self, key: Key) {
        self.set_place(key, Place::Asleep);
    }

    /// Puts who may run on free logical processors; returns who got one.
    pub(super) fn assign(&mut self, now: u64) -> Vec<Key> {
        let mut granted = Vec::new();
        for entry in self.vps.values_mut() {
            entry.fill(now, self.quantum);
        }
        while let Some(free) = self.lps.iter().position(Option::is_none) {
            let first = self
                .vps
                .iter_mut()
                .filter(|(_, entry)| entry.is_ready())
                .min_by_key(|(_, entry)| entry.rank());
            let Some((key, entry)) = first else { break };
            let lp = if self.lps.get(entry.last_lp) == Some(&None) {
                entry.last_lp
            } else {
                free
            };
            (entry.last_lp, entry.leaving) = (lp, false);
            entry.place = Place::On { lp, since: now };
            self.lps[lp] = Some(*key);
            granted.push(*key);
        }
        granted
    }

    /// Who must give way now, including those that were told before and have not yet. Call [`Self::assign`] before.
    pub(super) fn overdue(&mut self, now: u64) -> Vec<Key> {
        for entry in self.vps.values_mut() {
            if matches!(entry.place, Place::On { .. }) {
                entry.leaving |= entry.throttled;
            }
        }
        let leaving = self.vps.values().filter(|entry| entry.leaving).count();
        let mut ready: Vec<_> = self
            .vps
            .values()
            .filter(|entry| entry.is_ready())
            .map(Entry::rank)
            .collect();
        ready.sort_unstable();
        for waiter in ready.into_iter().skip(leaving) {
            let quantum = self.quantum;
            let victim = self
                .vps
                .values_mut()
                .filter(|entry| !entry.leaving && gives_way(entry, waiter, now, quantum))
                .max_by_key(|entry| entry.rank());
            match victim {
                Some(entry) => entry.leaving = true,
                None => break,
            }
        }
        self.vps
            .iter()
            .filter(|(_, entry)| entry.leaving)
            .map(|(key, _)| *key)
            .collect()
    }

    /// When something may have to change although nobody comes or goes.
    pub(super) fn next_event(&self, now: u64) -> Option<u64> {
        let most = self.quantum as i64;
        let contended = self.is_contended();
        let mut next = None;
        let mut at = |time: u64| next = Some(next.map_or(time, |earlier: u64| earlier.min(time)));
        for entry in self.vps.values() {
            match entry.place {
                Place::Waiting if entry.throttled => {
                    at(now + until(most / 2 - entry.allowance, entry.shares.cap));
                }
                Place::Waiting if entry.shares.reserve > 0 && entry.owed < RESERVE_GRAIN => {
                    at(now + until(RESERVE_GRAIN - entry.owed, entry.shares.reserve));
                }
                Place::On { since, .. } if !entry.leaving => {
                    if contended {
                        at(since + self.quantum);
                        at(now + self.quantum / 2);
                    }
                    if entry.shares.is_capped() {
                        at(now + entry.allowance.max(0).unsigned_abs());
                    }
                }
                _ => {}
            }
        }
        next
    }
}

/// Whether a VP gives way to one of that rank.
fn gives_way(entry: &Entry, waiter: (bool, u64), now: u64, quantum: u64) -> bool {
    let Place::On { since, .. } = entry.place else {
        return false;
    };
    let (reserve_met, virtual_time) = waiter;
    let behind = entry.rank();
    if reserve_met != behind.0 {
        return !reserve_met;
    }
    let ahead = entry.virtual_time.saturating_sub(virtual_time);
    ahead > entry.weighted(quantum) / 2 || ahead > 0 && now.saturating_sub(since) >= quantum
}

#[cfg(test)]
mod tests {
    use super::super::shares::DEFAULT_WEIGHT;
    use super::*;

    const MS: u64 = 1_000_000;
    const QUANTUM: u64 = 10 * MS;
    const PLAIN: Shares = Shares {
        weight: DEFAULT_WEIGHT,
        cap: WHOLE,
        reserve: 0,
    };

    /// Runs VPs that never stop for `time`; returns how long each has run.
    fn simulate(lps: usize, all: &[Shares], time: u64) -> Vec<u64> {
        const STEP: u64 = MS / 4;
        let mut queue = Queue::new(lps, QUANTUM);
        let mut ran = vec![0; all.len()];
        for (key, shares) in (0..).zip(all) {
            queue.add(key, *shares, 0);
            queue.enter(key, 0);
        }
        queue.assign(0);
        for now in (STEP..=time).step_by(STEP as usize) {
            for (key, shares) in (0..).zip(all) {
                if let Place::On { .. } = queue.place(key) {
                    queue.charge(key, STEP, *shares, now);
                    ran[key as usize] += STEP;
                }
            }
            queue.assign(now);
            for key in queue.overdue(now) {
                queue.give_way(key);
            }
            queue.assign(now);
            let on =
                (0..all.len() as u64).filter(|key| matches!(queue.place(*key), Place::On { .. }));
            assert!(on.count() <= lps);
        }
        ran
    }

    fn percent(part: u64, whole: u64) -> u64 {
        (part * 1000 / whole).div_ceil(10)
    }

    #[test]
    fn equals_take_turns_of_a_quantum() {
        let ran = simulate(2, &[PLAIN; 3], 3000 * MS);
        for time in ran {
            assert!((63..=70).contains(&percent(time, 3000 * MS)), "{time}");
        }
    }

    #[test]
    fn a_vp_with_an_lp_for_itself_is_never_interrupted() {
        assert_eq!(simulate(2, &[PLAIN; 2], 100 * MS), [100 * MS, 100 * MS]);
    }

    #[test]
    fn weights_divide_what_is_contended() {
        let heavy = Shares {
            weight: 300,
            ..PLAIN
        };
        let ran = simulate(1, &[heavy, PLAIN], 4000 * MS);
        assert!((73..=77).contains(&percent(ran[0], 4000 * MS)), "{ran:?}");
    }

    #[test]
    fn a_cap_holds_on_an_idle_machine() {
        for (cap, expected) in [(WHOLE / 10, 10), (WHOLE / 2, 50), (WHOLE * 9 / 10, 90)] {
            let capped = Shares { cap, ..PLAIN };
            let ran = simulate(2, &[capped], 4000 * MS);
            let got = percent(ran[0], 4000 * MS);
            assert!(got.abs_diff(expected) <= 1, "{cap:#x}: {got} %");
        }
    }

    #[test]
    fn a_reserve_comes_before_weight() {
        let reserved = Shares {
            weight: 1,
            reserve: WHOLE * 6 / 10,
            ..PLAIN
        };
        let heavy = Shares {
            weight: 10_000,
            ..PLAIN
        };
        let ran = simulate(1, &[reserved, heavy], 2000 * MS);
        assert!((58..=64).contains(&percent(ran[0], 2000 * MS)), "{ran:?}");
    }

    #[test]
    fn who_was_away_does_not_save_up() {
        let mut queue = Queue::new(1, QUANTUM);
        for key in 0..2 {
            queue.add(key, PLAIN, 0);
        }
        queue.enter(0, 0);
        queue.assign(0);
        let now = 1000 * MS;
        queue.charge(0, now, PLAIN, now);
        queue.enter(1, now);
        assert_eq!(queue.overdue(now), [0], "it comes first");
        queue.give_way(0);
        assert_eq!(queue.assign(now), [1]);
        let now = now + 16 * MS;
        queue.charge(1, 16 * MS, PLAIN, now);
        assert_eq!(queue.overdue(now), [1], "but not for long");
    }

    #[test]
    fn a_halted_vp_makes_room() {
        let mut queue = Queue::new(1, QUANTUM);
        for key in 0..2 {
            queue.add(key, PLAIN, 0);
            queue.enter(key, 0);
        }
        assert_eq!(queue.assign(0), [0]);
        queue.sleep(0);
        assert_eq!(queue.assign(0), [1]);
        assert!(!queue.is_contended());
        queue.give_way(0);
        assert!(queue.is_contended());
        queue.remove(1);
        assert_eq!(queue.assign(0), [0]);
    }

    #[test]
    fn the_next_event_is_when_something_changes() {
        let mut queue = Queue::new(1, QUANTUM);
        queue.add(0, PLAIN, 0);
        queue.enter(0, 0);
        queue.assign(0);
        assert_eq!(queue.next_event(0), None, "alone, it runs for ever");
        let capped = Shares {
            cap: WHOLE / 2,
            ..PLAIN
        };
        queue.charge(0, 0, capped, 0);
        assert_eq!(queue.next_event(0), Some(QUANTUM));
        queue.charge(0, QUANTUM, capped, QUANTUM);
        assert_eq!(queue.overdue(QUANTUM), [0]);
        queue.give_way(0);
        assert!(queue.assign(QUANTUM).is_empty());
        let next = queue.next_event(QUANTUM).unwrap();
        assert!(next > QUANTUM && next <= 3 * QUANTUM, "{next}");
        assert_eq!(queue.assign(next), [0]);
    }
}
