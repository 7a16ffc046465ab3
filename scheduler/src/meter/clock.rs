//! A clock that is cheap enough to be read twice an exit: the processor's time stamp counter, converted only when somebody looks.

use std::sync::OnceLock;

use crate::sys::monotonic_ns;

/// Two readings of both clocks give the length of a tick.
struct Start {
    ticks: u64,
    ns: u64,
    /// Does the counter run at one rate, whatever the processor does?
    steady: bool,
}

fn start() -> &'static Start {
    static START: OnceLock<Start> = OnceLock::new();
    START.get_or_init(|| {
        const POWER: u32 = 0x8000_0007;
        let steady = std::arch::x86_64::__cpuid(0x8000_0000).eax >= POWER
            && std::arch::x86_64::__cpuid(POWER).edx & (1 << 8) != 0;
        Start {
            ticks: counter(),
            ns: monotonic_ns(),
            steady,
        }
    })
}

fn counter() -> u64 {
    // SAFETY: every x86-64 processor has it, and Linux lets everybody read it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// Begins to measure the length of a tick.
pub(super) fn begin() {
    start();
}

/// Now, in ticks since some time before [`begin`]; never 0.
pub(super) fn now() -> u64 {
    if start().steady {
        counter().max(1)
    } else {
        monotonic_ns().max(1)
    }
}

/// Nanoseconds in a tick: measured once, at the first call, over 10 ms at least (to one part in 100 000), and the same from then on, so
/// that what was counted never becomes less.
pub(super) fn ns_per_tick() -> f64 {
    static LENGTH: OnceLock<f64> = OnceLock::new();
    *LENGTH.get_or_init(measure)
}

fn measure() -> f64 {
    const ENOUGH_NS: u64 = 10_000_000;
    let start = start();
    if !start.steady {
        return 1.0;
    }
    loop {
        let (ticks, ns) = (counter(), monotonic_ns());
        if ns - start.ns >= ENOUGH_NS {
            return (ns - start.ns) as f64 / (ticks - start.ticks).max(1) as f64;
        }
        std::thread::sleep(std::time::Duration::from_nanos(ENOUGH_NS / 4));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_nanoseconds_after_conversion() {
        begin();
        let (ticks, ns) = (now(), monotonic_ns());
        std::thread::sleep(std::time::Duration::from_millis(20));
        let measured = (now() - ticks) as f64 * ns_per_tick();
        let passed = (monotonic_ns() - ns) as f64;
        assert_eq!(ns_per_tick().to_bits(), ns_per_tick().to_bits(), "once");
        assert!(
            (measured / passed - 1.0).abs() < 0.02,
            "{measured} {passed}"
        );
    }
}
