//! Where VPs run, as only softmshv can be watched: with the core scheduler its own threads carry them, and they are looked at.

use std::{
    collections::BTreeMap,
    fs, io,
    time::{Duration, Instant},
};

use super::own_threads;

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
    pub(super) fn look_for(&self, time: Duration) -> Seen {
        let read = |threads: &[i32]| -> Vec<u64> {
            threads
                .iter()
                .map(|tid| crate::clock::run_ns(*tid))
                .collect()
        };
        let begun = Instant::now();
        let (first, callers) = (read(&self.carriers), read(&self.callers));
        let mut last = first.clone();
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
