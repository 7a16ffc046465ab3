//! Residual steal: time this partition's own CPUs lose to others.
//!
//! Linux on the Microsoft Hypervisor has no steal clock. A thread that does nothing but read the clock sees each
//! interruption as a gap; what of a gap the kernel does not account for as waiting for a CPU went to somebody outside (or to
//! a long interrupt).

use std::{
    thread,
    time::{Duration, Instant},
};

use super::{Evidence, Says, probe_signal::Blocked, thread_time::Stopwatch};

/// Shorter gaps are ticks and interrupts.
const GAP: Duration = Duration::from_micros(100);
/// Less tells nothing.
const SHORTEST: Duration = Duration::from_millis(5);

/// Looks for `time`; returns millionths of it.
pub(super) fn measure(time: Duration) -> (Option<u32>, Evidence) {
    const SOURCE: &str = "residual steal";
    let unknown = |why: String| {
        let evidence = Evidence::new(SOURCE, Says::Nothing, why, "steal is not known");
        (None, evidence)
    };
    if time < SHORTEST {
        return unknown("no time was left to look".to_owned());
    }
    let probe = {
        let _blocked = Blocked::all();
        thread::Builder::new()
            .name("rota-steal".to_owned())
            .spawn(move || gaps(time))
    };
    match probe.map(thread::JoinHandle::join) {
        Ok(Ok((stolen, gaps, wall))) => {
            let ppm = stolen.as_nanos() * 1_000_000 / wall.as_nanos().max(1);
            let ppm = u32::try_from(ppm).unwrap_or(u32::MAX);
            let value = format!("{ppm} ppm ({gaps} gaps in {} ms)", wall.as_millis());
            let meaning = match ppm {
                0..1_000 => "nobody takes time from this partition's CPUs",
                1_000..20_000 => "others take a little time from this partition's CPUs",
                _ => "others take time from this partition's CPUs",
            };
            (
                Some(ppm),
                Evidence::new(SOURCE, Says::Nothing, value, meaning),
            )
        }
        Ok(Err(_)) => unknown("the probe has failed".to_owned()),
        Err(error) => unknown(error.to_string()),
    }
}

/// Time lost, in how many gaps, and the time looked at.
fn gaps(time: Duration) -> (Duration, u32, Duration) {
    let watch = Stopwatch::start();
    let begun = Instant::now();
    let (mut stolen, mut count) = (Duration::ZERO, 0);
    let (mut before, mut waited) = (begun, watch.wait());
    while before - begun < time {
        let now = Instant::now();
        let gap = now - before;
        if gap > GAP {
            let waits = watch.wait();
            let unexplained = gap.saturating_sub(waits.saturating_sub(waited));
            waited = waits;
            if unexplained > GAP {
                stolen += unexplained;
                count += 1;
            }
            before = Instant::now();
        } else {
            before = now;
        }
    }
    (stolen, count, before - begun)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steal_is_measured_or_said_to_be_unknown() {
        let (ppm, evidence) = measure(Duration::from_millis(20));
        assert!(ppm.is_some_and(|ppm| ppm < 1_000_000), "{evidence:?}");
        let (ppm, evidence) = measure(Duration::ZERO);
        assert_eq!(ppm, None, "{evidence:?}");
    }
}
