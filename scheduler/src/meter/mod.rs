//! What each vCPU got, and what it waited for.
//!
//! ```text
//! VP thread ──▶ VpMeter (atomics, a few ns an exit) ─┐
//! /proc/self/task/<tid>/{schedstat,status,sched}  ───┼──▶ Meter::sample ──▶ VmMeter ──▶ JSON, Prometheus
//! register VP_RUNTIME, by RunTimes  ─────────────────┤
//! debugfs mshv/partition/<id>/vp/<n>/stats  ─────────┘
//! ```
//!
//! Who schedules decides who can tell. Where Linux does, the thread *is* the VP, and its run time and waiting are the VP's. Where
//! the hypervisor does, the thread sleeps while the VP runs, so its times say nothing and are not shown: how long a VP has run
//! says the hypervisor's register, and its counters say the rest where they can be read. What nobody can tell is [`Metered::Unmetered`], with the reason, and never 0.

mod clock;
mod export;
mod histogram;
mod hypervisor;
mod sample;
mod spins;
#[cfg(test)]
mod tests;
mod threads;
mod vp;

/// Will adaptive gangs be judged here, by what guests tell the hypervisor?
pub(crate) fn guests_tell() -> bool {
    spins::are_counted(std::path::Path::new(hypervisor::DEBUGFS))
}

pub use histogram::{Histogram, Latency};
pub use hypervisor::RunTimes;
pub use sample::{ExitMeter, Meter, MeterOptions, Metered, VcpuMeter, VmMeter};
pub use vp::VpMeter;
