//! What vCPUs do: threads that work, wait for each other, or wake and look at the clock.

use std::{
    hint::black_box,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc,
    },
    thread::{self, JoinHandle},
};

use scheduler::Tid;
use serde::{Deserialize, Serialize};

use super::{Flag, barrier::Barrier};
use crate::clock;

/// What one vCPU does.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Body {
    /// Works for a while, then waits for the other vCPUs of the VM, over and over: spinning, or, after some time of that, asleep.
    Barrier {
        work: Work,
        block_after_us: Option<u32>,
    },
    /// One unit of work after the other; how long each takes is what is measured.
    Units { work: Work },
    /// Wakes at every period, and measures how late that is.
    Waker { period_us: u32, work: Work },
    /// Walks through so many KiB of memory, over and over.
    Cache { kib: u32 },
}

/// So many steps of work.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Work {
    pub(crate) steps: u64,
}

/// The threads of a VM.
pub(super) struct Threads {
    tids: Vec<Tid>,
    counts: Vec<Arc<AtomicU64>>,
    barrier: Arc<Barrier>,
    recording: Flag,
    end: Flag,
    threads: Vec<JoinHandle<Vec<f32>>>,
}

/// Samples kept by one thread: what does not fit is not taken.
const SAMPLES: usize = 1 << 20;

pub(super) fn start(bodies: &[Body]) -> io::Result<Threads> {
    let barrier = Arc::new(Barrier::new(bodies.len() as u32));
    let (recording, end) = (Flag::default(), Flag::default());
    let (tell, told) = mpsc::channel();
    let (mut counts, mut threads) = (Vec::new(), Vec::new());
    for (vcpu, body) in bodies.iter().copied().enumerate() {
        let count = Arc::new(AtomicU64::new(0));
        counts.push(Arc::clone(&count));
        let tell = tell.clone();
        let mut vcpu_thread = VcpuThread {
            barrier: Arc::clone(&barrier),
            recording: recording.clone(),
            end: end.clone(),
            count,
            samples: Vec::with_capacity(SAMPLES),
        };
        threads.push(
            thread::Builder::new()
                .name(format!("vcpu{vcpu}"))
                .spawn(move || {
                    let _ = tell.send((vcpu, Tid::current()));
                    // The timers of a VP have no slack.
                    // SAFETY: takes a number.
                    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
                    vcpu_thread.run(body);
                    vcpu_thread.samples
                })?,
        );
    }
    drop(tell);
    let mut tids: Vec<_> = told.iter().take(bodies.len()).collect();
    tids.sort_unstable();
    Ok(Threads {
        tids: tids.into_iter().map(|(_, tid)| tid).collect(),
        counts,
        barrier,
        recording,
        end,
        threads,
    })
}

impl Threads {
    pub(super) fn tids(&self) -> &[Tid] {
        &self.tids
    }

    pub(super) fn progress(&self) -> Vec<u64> {
        self.counts
            .iter()
            .map(|count| count.load(Relaxed))
            .collect()
    }

    /// What the first vCPU gets done, for who wants to watch it.
    pub(super) fn first_count(&self) -> Option<Arc<AtomicU64>> {
        self.counts.first().cloned()
    }

    pub(super) fn record(&self, on: bool) {
        self.recording.set(on);
    }

    /// Ends the threads; what they have sampled, in microseconds.
    pub(super) fn end(self) -> Vec<f32> {
        self.end.set(true);
        self.barrier.end();
        let samples = self.threads.into_iter().map(JoinHandle::join);
        samples.filter_map(Result::ok).flatten().collect()
    }
}

struct VcpuThread {
    barrier: Arc<Barrier>,
    recording: Flag,
    end: Flag,
    count: Arc<AtomicU64>,
    samples: Vec<f32>,
}

impl VcpuThread {
    fn run(&mut self, body: Body) {
        match body {
            Body::Barrier {
                work,
                block_after_us,
            } => {
                while !self.end.is_set() {
                    clock::work(work.steps);
                    self.barrier.wait(block_after_us);
                    self.count.fetch_add(1, Relaxed);
                }
            }
            Body::Units { work } => {
                let mut before = clock::now_ns();
                while !self.end.is_set() {
                    clock::work(work.steps);
                    let now = clock::now_ns();
                    self.sample(now - before);
                    before = now;
                    self.count.fetch_add(1, Relaxed);
                }
            }
            Body::Waker { period_us, work } => {
                let period = u64::from(period_us) * 1000;
                let mut next = clock::now_ns() + period;
                while !self.end.is_set() {
                    clock::sleep_until(next);
                    let now = clock::now_ns();
                    self.sample(now - next);
                    clock::work(work.steps);
                    self.count.fetch_add(1, Relaxed);
                    // Periods that were missed altogether have been counted with the wake-up that came.
                    next += period * (1 + (clock::now_ns().saturating_sub(next)) / period);
                }
            }
            Body::Cache { kib } => self.walk(kib as usize * 1024 / size_of::<u64>()),
        }
    }

    fn walk(&mut self, words: usize) {
        /// Words in a cache line.
        const LINE: usize = 8;
        let mut memory = vec![1u64; words];
        let mut before = clock::now_ns();
        while !self.end.is_set() {
            // A permutation of the lines, so that no prefetcher helps.
            let lines = words / LINE;
            let mut line = 0;
            for _ in 0..lines {
                line = (line * 13 + 12_347) % lines;
                let word = &mut memory[line * LINE];
                *word = black_box(*word).wrapping_add(1);
            }
            let now = clock::now_ns();
            self.sample(now - before);
            before = now;
            self.count.fetch_add(lines as u64, Relaxed);
        }
    }

    fn sample(&mut self, ns: u64) {
        if self.recording.is_set() && self.samples.len() < SAMPLES {
            self.samples.push(ns as f32 / 1e3);
        }
    }
}
