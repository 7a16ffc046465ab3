//! Where VPs run, as only softmshv can be watched: with the core scheduler its own threads carry them, and they are looked at.

use std::{
    collections::BTreeMap,
    fs, io,
    time::{Duration, Instant},
};

use super::{machine::Running, own_threads};

/// What softmshv calls the threads that run VPs with the core scheduler.
const CARRIERS: &str = "softmshv-vp";
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// Threads to be watched.
pub(super) struct Watch {
    callers: Vec<i32>,
    /// Those that really run VPs, in the order of the callers.
    carriers: Vec<i32>,
}

/// What was seen.
pub(super) struct Seen {
    pub(super) run: Vec<f64>,
    pub(super) thread_run: Vec<f64>,
    /// Parts of all run time, by CPU.
    pub(super) cpus: BTreeMap<u32, f64>,
    /// The longest time for which the count of each VP was seen to stand still: its gaps were no shorter.
    pub(super) still: Vec<Duration>,
}

/// How long a count stands still, as far as can be seen by looking now and then.
struct Still {
    count: u32,
    /// When the count was first seen to be that.
    since: Instant,
    longest: Duration,
}

impl Still {
    fn new(count: u32, now: Instant) -> Self {
        Self {
            count,
            since: now,
            longest: Duration::ZERO,
        }
    }

    fn look(&mut self, count: u32, now: Instant) {
        if count == self.count {
            self.longest = self.longest.max(now - self.since);
        } else {
            (self.count, self.since) = (count, now);
        }
    }
}

impl Watch {
    /// Finds the threads that run the VPs of `callers`.
    pub(super) fn start(callers: &[i32]) -> io::Result<Self> {
        let mut carriers: Vec<i32> = own_threads()?
            .into_iter()
            .filter(|tid| {
                fs::read_to_string(format!("/proc/self/task/{tid}/comm"))
                    .is_ok_and(|name| name.starts_with(CARRIERS))
            })
            .collect();
        carriers.sort_unstable();
        if carriers.is_empty() {
            carriers = callers.to_vec();
        }
        Ok(Self {
            callers: callers.to_vec(),
            carriers,
        })
    }

    /// Looks every millisecond: what a thread has run since the last look, it has run where it is.
    pub(super) fn look_for(&self, time: Duration, vms: &[Running]) -> Seen {
        let read = |threads: &[i32]| -> Vec<u64> {
            threads
                .iter()
                .map(|tid| crate::clock::run_ns(*tid))
                .collect()
        };
        let begun = Instant::now();
        let (first, callers) = (read(&self.carriers), read(&self.callers));
        let mut last = first.clone();
        let mut still: Vec<Still> = vms.iter().map(|vm| Still::new(vm.count(), begun)).collect();
        let mut cpus: BTreeMap<u32, u64> = BTreeMap::new();
        while begun.elapsed() < time {
            std::thread::sleep(LOOK_EVERY);
            let now = read(&self.carriers);
            for ((tid, before), now) in self.carriers.iter().zip(&last).zip(&now) {
                if let Some(cpu) = cpu_of(*tid) {
                    *cpus.entry(cpu).or_default() += now.saturating_sub(*before);
                }
            }
            last = now;
            for (vm, still) in vms.iter().zip(&mut still) {
                still.look(vm.count(), Instant::now());
            }
        }
        let wall = begun.elapsed().as_nanos() as f64;
        let parts = |now: &[u64], before: &[u64]| -> Vec<f64> {
            now.iter()
                .zip(before)
                .map(|(now, before)| now.saturating_sub(*before) as f64 / wall)
                .collect()
        };
        let all = cpus.values().sum::<u64>().max(1) as f64;
        Seen {
            run: parts(&last, &first),
            thread_run: parts(&read(&self.callers), &callers),
            cpus: cpus
                .into_iter()
                .map(|(cpu, ns)| (cpu, ns as f64 / all))
                .collect(),
            still: still.into_iter().map(|still| still.longest).collect(),
        }
    }
}

/// The CPU a thread is on, or was on last.
fn cpu_of(tid: i32) -> Option<u32> {
    let text = fs::read_to_string(format!("/proc/self/task/{tid}/stat")).ok()?;
    // Behind the name, from the third field on; the CPU is the 39th.
    text.rsplit_once(')')?
        .1
        .split_whitespace()
        .nth(36)?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_seen_to_stand_still_counts() {
        let begun = Instant::now();
        let at = |ms| begun + Duration::from_millis(ms);
        let mut still = Still::new(1, begun);
        still.look(1, at(2));
        still.look(5, at(30));
        assert_eq!(
            still.longest,
            Duration::from_millis(2),
            "nobody looked meanwhile"
        );
        still.look(5, at(31));
        still.look(5, at(39));
        still.look(6, at(40));
        assert_eq!(still.longest, Duration::from_millis(9));
    }
}
