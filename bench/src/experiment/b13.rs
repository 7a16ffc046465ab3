//! B13: what metering costs: a sample of 64 vCPUs a second, and a VP's exits; and what it costs to keep them where they should be.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
        mpsc,
    },
    thread,
    time::Duration,
};

use scheduler::{Meter, MeterOptions, SchedMode, VmMeter};

use super::{
    Criterion, Experiment, Metric, Outcome, Plot, Settings, Variant, rota, undisturbed, vms,
};
use crate::{
    Result, clock,
    protocol::Results,
    vm::{Body, VmSpec, Work},
};

const VCPUS: u32 = 64;
const KINDS: &[&str] = &["port_write"];
/// More often than the once a second that is judged, so that there are many samples.
const PAUSE: Duration = Duration::from_millis(50);
const EXITS: u32 = 100_000;
const LIMIT_PERCENT: f64 = 0.5;
const PROMETHEUS: &str = "64 vCPUs, for Prometheus";
const JSON: &str = "64 vCPUs, as JSON";
const IN_PLACE: &str = "64 vCPUs, kept in place";
/// Of the vCPUs.
const WAKE_US: u32 = 20_000;

pub(super) fn experiment(_settings: &Settings) -> Experiment {
    let metric = |key, label, unit| Metric { key, label, unit };
    let prometheus = |sample: &VmMeter| Ok(sample.to_prometheus());
    let json = |sample: &VmMeter| Ok(sample.to_json()?);
    Experiment {
        id: "B13",
        title: "what metering and looking after vCPUs cost",
        timed: true,
        setting: format!(
            "{VCPUS} threads that wake 50 times a second, metered as vCPUs; CPU time of the thread that takes samples and writes them as \
             text, once a second; of an exit that is metered; and of the thread that keeps them where they should be"
        ),
        metrics: vec![
            metric("cost", "at one sample a second", "% of a CPU"),
            metric("sample", "a sample with its text", "µs"),
            metric("exit", "an exit", "ns"),
            metric("place", "keeping them in place", "% of a CPU"),
        ],
        variants: vec![
            variant(PROMETHEUS, "Meter::sample and to_prometheus", prometheus),
            variant(JSON, "Meter::sample and to_json", json),
            in_place(),
        ],
        criteria,
        plot: Plot::Bars("cost"),
    }
}

fn variant(name: &str, how: &str, text: fn(&VmMeter) -> Result<String>) -> Variant {
    Variant {
        name: name.into(),
        how: how.into(),
        run: Box::new(move |settings| undisturbed(|| once(settings.time, text))),
    }
}

fn in_place() -> Variant {
    let waker = Body::Waker {
        period_us: WAKE_US,
        work: Work { steps: 1 },
    };
    let vm = VmSpec {
        name: "looked-after".into(),
        vcpus: vec![waker; VCPUS as usize],
        control: rota(format!("placement=shared,overcommit={VCPUS}")),
    };
    vms(
        IN_PLACE,
        "the reconcile loop",
        PAUSE,
        vec![vm],
        |vms, seconds| {
            let ns: u64 = vms.iter().map(|vm| vm.reconcile_ns).sum();
            BTreeMap::from([("place", ns as f64 / 1e9 / seconds * 100.0)])
        },
    )
}

fn once(time: Duration, text: fn(&VmMeter) -> Result<String>) -> Result<Outcome> {
    let options = MeterOptions::new("metered", SchedMode::Root, VCPUS, KINDS);
    let meter = Meter::new(options);
    let vcpus = Vcpus::start(&meter)?;
    // The first one opens files.
    text(&meter.sample())?;
    let end = clock::now_ns() + time.as_nanos() as u64;
    let (begun, mut samples) = (clock::thread_ns(), 0u32);
    while samples == 0 || clock::now_ns() < end {
        thread::sleep(PAUSE);
        std::hint::black_box(text(&meter.sample())?);
        samples += 1;
    }
    let sample_ns = (clock::thread_ns() - begun) as f64 / f64::from(samples);
    drop(vcpus);
    let vp = meter.vp(0).ok_or("no vCPU")?;
    let begun = clock::thread_ns();
    for _ in 0..EXITS {
        vp.entering();
        vp.exited(0);
    }
    let exit_ns = (clock::thread_ns() - begun) as f64 / f64::from(EXITS);
    Ok(Outcome {
        metrics: BTreeMap::from([
            ("cost", sample_ns / 1e9 * 100.0),
            ("sample", sample_ns / 1e3),
            ("exit", exit_ns),
        ]),
        ..Outcome::default()
    })
}

/// Threads that are metered as vCPUs until this is dropped.
struct Vcpus {
    end: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Vcpus {
    fn start(meter: &Meter) -> Result<Self> {
        let mut vcpus = Self {
            end: Arc::default(),
            threads: Vec::new(),
        };
        let (tell, told) = mpsc::channel();
        for vcpu in 0..VCPUS {
            let vp = meter.vp(vcpu).ok_or("no vCPU")?;
            let (end, tell) = (Arc::clone(&vcpus.end), tell.clone());
            vcpus.threads.push(thread::Builder::new().spawn(move || {
                vp.attach();
                let _ = tell.send(());
                while !end.load(Relaxed) {
                    thread::sleep(Duration::from_micros(WAKE_US.into()));
                }
            })?);
        }
        told.iter().take(VCPUS as usize).for_each(drop);
        Ok(vcpus)
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.end.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn criteria(results: &Results) -> Vec<Criterion> {
    [(PROMETHEUS, "cost"), (JSON, "cost"), (IN_PLACE, "place")]
        .map(|(name, metric)| {
            Criterion::number(
                format!("{name}: < {LIMIT_PERCENT} % of a CPU"),
                results.value(name, metric),
                |percent| percent < LIMIT_PERCENT,
            )
        })
        .into()
}
