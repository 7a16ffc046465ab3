//! A VM as far as the host's scheduler sees it: a process with a thread for each vCPU, under somebody's control plane.
//!
//! Each VM is a process of its own ([`inside`]), as it would be with every VMM, and told over a pipe when to measure. Its standard
//! input is its life line: when the process that started it goes, it cleans up and goes too.

mod barrier;
mod body;
mod control;
mod groups;
mod parent;
mod throttle;

use std::{
    io::{self, BufRead, Write},
    os::fd::AsRawFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use serde::{Deserialize, Serialize};

use crate::{Result, clock, stats::quantile};

pub(crate) use body::{Body, Work};
pub(crate) use control::{Control, confine};
pub(crate) use groups::{Group, Groups, Limits, Shares};
pub(crate) use parent::run;
use throttle::Throttled;

/// One VM of an experiment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct VmSpec {
    /// Its name in the ledger.
    pub(crate) name: String,
    /// What each vCPU does.
    pub(crate) vcpus: Vec<Body>,
    /// Who places it, and how.
    pub(crate) control: Control,
}

/// What it came to, while it was measured.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct VmResult {
    /// What each vCPU got done: barriers, units of work.
    pub(crate) progress: Vec<u64>,
    /// Time on a CPU, per vCPU.
    pub(crate) run_ns: Vec<u64>,
    /// Time of the whole process on CPUs.
    pub(crate) process_ns: u64,
    /// Time of the thread that keeps Rota's plan true, if there is one.
    pub(crate) reconcile_ns: u64,
    /// Latencies or durations in microseconds, at [`QUANTILES`]; empty if nothing of the kind was measured.
    pub(crate) curve: Vec<f64>,
    /// The same of those samples that were longer than half a millisecond.
    pub(crate) blackouts: Vec<f64>,
    /// What a quota held back, where the kernel counts that.
    pub(crate) throttled: Option<Throttled>,
    /// Whether turns were being taken in the end.
    pub(crate) turns: bool,
    /// What the control plane said about what was asked, if it says anything.
    pub(crate) effects: Vec<String>,
}

/// Where curves are sampled.
pub(crate) const QUANTILES: [f64; 13] = [
    0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9995, 0.9999, 1.0,
];

/// The value of a curve at one of [`QUANTILES`].
pub(crate) fn at(curve: &[f64], part: f64) -> Option<f64> {
    let index = QUANTILES.iter().position(|quantile| *quantile == part)?;
    curve.get(index).copied()
}

const BLACKOUT_US: f64 = 500.0;

/// The process of one VM: starts it, says so, measures when told to, and goes.
pub(crate) fn inside(spec: &str) -> Result<()> {
    let spec: VmSpec = serde_json::from_str(spec)?;
    let threads = body::start(&spec.vcpus)?;
    let held = match control::apply(&spec, &threads) {
        Ok(held) => held,
        Err(error) => {
            println!("refused: {error}");
            threads.end();
            return Ok(());
        }
    };
    println!("ready");
    io::stdout().flush()?;
    let mut line = String::new();
    if io::stdin().lock().read_line(&mut line)? > 0 {
        let mut times = line.split_whitespace().map(str::parse::<u64>);
        if let (Some(Ok(begin)), Some(Ok(end))) = (times.next(), times.next())
            && sleep_until(begin)
        {
            let before = Reading::take(&threads);
            threads.record(true);
            if sleep_until(end) {
                let after = Reading::take(&threads);
                threads.record(false);
                let (turns, effects) = (held.turns(), held.effects());
                // Nobody is to be kept waiting by threads that are held back.
                drop(held);
                let mut result = after.since(&before);
                result.turns = turns;
                result.effects = effects;
                let mut samples: Vec<f64> = threads.end().into_iter().map(f64::from).collect();
                samples.sort_by(f64::total_cmp);
                let curve = |samples: &[f64]| -> Vec<f64> {
                    let values = QUANTILES.iter().map(|part| quantile(samples, *part));
                    values.collect::<Option<_>>().unwrap_or_default()
                };
                result.curve = curve(&samples);
                let first = samples.partition_point(|sample| *sample < BLACKOUT_US);
                result.blackouts = curve(&samples[first..]);
                println!("{}", serde_json::to_string(&result)?);
                return Ok(());
            }
        }
    }
    drop(held);
    threads.end();
    Ok(())
}

/// `false` if nobody waits for us any more.
fn sleep_until(ns: u64) -> bool {
    let stdin = io::stdin().as_raw_fd();
    loop {
        let left = ns.saturating_sub(clock::now_ns());
        if left == 0 {
            return true;
        }
        let mut poll = libc::pollfd {
            fd: stdin,
            events: libc::POLLIN,
            revents: 0,
        };
        let timeout = libc::timespec {
            tv_sec: (left / 1_000_000_000) as libc::time_t,
            tv_nsec: (left % 1_000_000_000) as libc::c_long,
        };
        // SAFETY: one descriptor and a time, both on the stack.
        let ready = unsafe { libc::ppoll(&raw mut poll, 1, &raw const timeout, std::ptr::null()) };
        if ready > 0 {
            return false;
        }
    }
}

/// What has been counted so far.
struct Reading {
    progress: Vec<u64>,
    run_ns: Vec<u64>,
    process_ns: u64,
    reconcile_ns: u64,
    throttled: Option<Throttled>,
}

impl Reading {
    fn take(threads: &body::Threads) -> Self {
        Self {
            progress: threads.progress(),
            run_ns: threads
                .tids()
                .iter()
                .map(|tid| clock::run_ns(tid.0))
                .collect(),
            process_ns: clock::process_ns(),
            reconcile_ns: clock::run_ns_named("reconcile"),
            throttled: Throttled::read(threads.tids()),
        }
    }

    fn since(&self, before: &Self) -> VmResult {
        let grown = |now: &[u64], then: &[u64]| {
            now.iter()
                .zip(then)
                .map(|(now, then)| now.saturating_sub(*then))
                .collect()
        };
        VmResult {
            progress: grown(&self.progress, &before.progress),
            run_ns: grown(&self.run_ns, &before.run_ns),
            process_ns: self.process_ns - before.process_ns,
            reconcile_ns: self.reconcile_ns.saturating_sub(before.reconcile_ns),
            throttled: self
                .throttled
                .zip(before.throttled)
                .map(|(now, then)| now.since(then)),
            ..VmResult::default()
        }
    }
}

/// A flag that threads look at.
#[derive(Clone, Default)]
struct Flag(Arc<AtomicBool>);

impl Flag {
    fn set(&self, value: bool) {
        self.0.store(value, Relaxed);
    }

    fn is_set(&self) -> bool {
        self.0.load(Relaxed)
    }
}
