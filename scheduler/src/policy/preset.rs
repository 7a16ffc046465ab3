//! Policies that have a name, for those who know what they want and not how it is called.

use super::{Cores, Gang, Placement, Slice, SmtIsolation, VmPolicy};

impl VmPolicy {
    /// The names [`Self::preset`] knows.
    pub const PRESETS: [&str; 5] = ["fair", "latency", "throughput", "realtime", "gang"];

    /// The policy named `name`.
    ///
    /// `fair`: shared CPUs, equal weight; what everybody gets. `latency`: wakes soon among others that compute.
    /// `throughput`: long slices, for guests that live from their caches. `realtime`: CPUs and cores of its own, all of it or no
    /// start. `gang`: vCPUs run together while that helps, for guests that spin.
    #[must_use]
    pub fn preset(name: &str) -> Option<Self> {
        let policy = Self::default();
        match name {
            "fair" => Some(policy),
            "latency" => Some(Self {
                slice: Some(Slice::Latency),
                ..policy
            }),
            "throughput" => Some(Self {
                slice: Some(Slice::Throughput),
                ..policy
            }),
            "realtime" => Some(Self {
                placement: Placement::Dedicated { cores: Cores::One },
                smt: SmtIsolation::Vm,
                strict: true,
                ..policy
            }),
            "gang" => Some(Self {
                gang: Gang::Adaptive { quantum_us: 20_000 },
                ..policy
            }),
            _ => None,
        }
    }
}
