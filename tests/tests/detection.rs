//! Who schedules: found out right every time, in time, also where a device lies or cannot be asked.
//!
//! `ROTA_DETECTIONS=1000 cargo test --test detection -- --ignored --nocapture` is the experiment; the ordinary test is a few runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rota_tests::{child, require};
use serde_json::Value;

/// Options of softmshv, and the right verdict.
const DEVICES: [(&str, &[&str], &str); 7] = [
    ("root", &["--scheduler", "root"], "root"),
    ("integrated", &["--scheduler", "integrated"], "integrated"),
    ("core", &["--scheduler", "core"], "core"),
    (
        "declares integrated, behaves core",
        &["--scheduler", "integrated", "--lie"],
        "disputed",
    ),
    (
        "declares core, behaves integrated",
        &["--scheduler", "core", "--lie"],
        "disputed",
    ),
    // What only the declaration tells, root or integrated, cannot be told without it.
    (
        "integrated, cannot be asked",
        &["--scheduler", "integrated", "--no-passthrough"],
        "root",
    ),
    (
        "core, cannot be asked",
        &["--scheduler", "core", "--no-passthrough"],
        "core",
    ),
];
/// What finding out may take, in milliseconds.
const LIMIT_MS: f64 = 500.0;
/// A CPU that gives an idle thread no time for so long belongs to somebody else: what was measured meanwhile says nothing.
const STANDSTILL: Duration = Duration::from_millis(60);
const LOOK: Duration = Duration::from_millis(5);

/// Watches every CPU for standstills.
struct Watch(Arc<AtomicU64>);

impl Watch {
    fn start() -> Watch {
        let longest = Arc::new(AtomicU64::new(0));
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        for cpu in 0..cpus {
            let longest = Arc::downgrade(&longest);
            std::thread::spawn(move || {
                // SAFETY: a set on the stack; without that CPU the thread stays where it is.
                unsafe {
                    let mut set: libc::cpu_set_t = std::mem::zeroed();
                    libc::CPU_SET(cpu, &mut set);
                    libc::sched_setaffinity(0, size_of_val(&set), &raw const set);
                }
                let mut before = Instant::now();
                while let Some(longest) = longest.upgrade() {
                    std::thread::sleep(LOOK);
                    let gap = before.elapsed().as_micros() as u64;
                    longest.fetch_max(gap, Ordering::Relaxed);
                    before = Instant::now();
                }
            });
        }
        Watch(longest)
    }

    /// Whether a CPU has stood still since the last question.
    fn stood_still(&self) -> bool {
        std::thread::sleep(LOOK * 2);
        Duration::from_micros(self.0.swap(0, Ordering::Relaxed)) > STANDSTILL
    }
}

/// Every detection's time in milliseconds, and how many were repeated because the machine stood still.
struct Measured {
    times: Vec<f64>,
    repeated: usize,
}

/// Runs the detection in `rota doctor` so often on each device. A wrong verdict is never excused; that there was nothing to be
/// seen, or that it took long, is only where the machine stood still meanwhile, and then it is done again.
fn detect(runs: usize) -> Measured {
    let watch = Watch::start();
    let mut measured = Measured {
        times: Vec::new(),
        repeated: 0,
    };
    // One device after the other and again, so that what else the machine does meets all of them.
    for run in 0..runs {
        for (device, options, expected) in DEVICES {
            let took = loop {
                watch.stood_still();
                let scheduler = detect_once(device, options);
                let took = scheduler["took_ms"].as_f64().expect("a time");
                let unseen = scheduler["verdict"] == "unknown"
                    || expected == "disputed" && !seen(&scheduler);
                if (unseen || took > LIMIT_MS) && watch.stood_still() {
                    measured.repeated += 1;
                    assert!(
                        measured.repeated < 100 + runs,
                        "this machine does nothing but stand still"
                    );
                    continue;
                }
                assert_eq!(scheduler["verdict"], expected, "{device}: {scheduler:#}");
                assert_eq!(scheduler["consistent"], expected != "disputed", "{device}");
                if took > LIMIT_MS {
                    eprintln!(
                        "{device}, run {run}: {took:.0} ms: {}",
                        scheduler["evidence"]
                    );
                }
                break took;
            };
            measured.times.push(took);
        }
    }
    measured
}

fn detect_once(device: &str, options: &[&str]) -> Value {
    let output = child::under_softmshv(options, child::rota_program())
        .args(["doctor", "--json"])
        .output()
        .expect("rota");
    let mut report: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{device}: {error}: {output:?}"));
    report["scheduler"].take()
}

/// Whether the behaviour of VPs could be seen.
fn seen(scheduler: &Value) -> bool {
    let evidence = scheduler["evidence"].as_array().expect("evidence");
    let behaviour = |evidence: &&Value| evidence["source"] == "behaviour of one VP";
    evidence
        .iter()
        .find(behaviour)
        .is_some_and(|behaviour| behaviour["says"] != "nothing")
}

/// Prints the distribution, and returns it sorted.
fn print(measured: Measured) -> Vec<f64> {
    let Measured {
        mut times,
        repeated,
    } = measured;
    times.sort_by(f64::total_cmp);
    let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize];
    println!(
        "{} detections on {} devices, all right; ms: min {:.0}, median {:.0}, p90 {:.0}, p99 {:.0}, max {:.0}; {repeated} repeated \
         because the machine stood still",
        times.len(),
        DEVICES.len(),
        at(0.0),
        at(0.5),
        at(0.9),
        at(0.99),
        at(1.0),
    );
    times
}

#[test]
fn every_device_is_recognized() {
    require!(child::programs());
    require!(child::softmshv());
    let times = print(detect(5));
    // Among other tests one or the other may be kept waiting.
    let median = times[times.len() / 2];
    let emulated = std::env::var_os("ROTA_LAB").is_some();
    assert!(median < LIMIT_MS || emulated, "{median} ms");
}

/// The experiment.
#[test]
#[ignore = "takes half an hour; ROTA_DETECTIONS=N runs on each device"]
fn every_device_is_recognized_every_time() {
    require!(child::programs());
    require!(child::softmshv());
    let runs = std::env::var("ROTA_DETECTIONS")
        .ok()
        .and_then(|text| text.parse().ok());
    let times = print(detect(runs.unwrap_or(1000)));
    let late = times.iter().filter(|time| **time > LIMIT_MS).count();
    assert_eq!(late, 0, "took longer than {LIMIT_MS} ms");
}

/// A process that is confined to one CPU can find out too.
#[test]
fn one_cpu_is_enough() {
    require!(child::programs());
    require!(child::softmshv());
    for (options, expected) in [(&["--scheduler", "core"][..], "core"), (&[], "integrated")] {
        let mut command = child::under_softmshv(options, child::rota_program());
        command.args(["doctor", "--json"]);
        // SAFETY: a system call that is safe between fork and exec, with a set on the stack.
        unsafe {
            std::os::unix::process::CommandExt::pre_exec(&mut command, || {
                let mut set: libc::cpu_set_t = std::mem::zeroed();
                libc::CPU_SET(0, &mut set);
                libc::sched_setaffinity(0, size_of_val(&set), &raw const set);
                Ok(())
            });
        }
        let output = command.output().expect("rota");
        let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(
            report["scheduler"]["verdict"], expected,
            "{}",
            report["scheduler"]
        );
    }
}
