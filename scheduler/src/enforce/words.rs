//! Requests in words, for the table of effects.

use crate::{Cap, Cores, CpuSet, Gang, Placement, Slice, SmtIsolation, VmPlan};

/// `40 ms per 100 ms`.
pub(super) fn cap(cap: &Cap) -> String {
    let cpus = cap.quota_us as f64 / cap.period_us.max(1) as f64;
    let mut words = format!(
        "{} per {} ({cpus:.2} CPUs)",
        micros(cap.quota_us),
        micros(cap.period_us)
    );
    if cap.burst_us > 0 {
        words += &format!(", burst {}", micros(cap.burst_us));
    }
    words
}

/// How long a VM stands still at most that uses its cap up at once with all its vCPUs, in microseconds.
pub(super) fn blackout_us(cap: &Cap, vcpus: u32) -> u64 {
    let used_up_in = cap.quota_us / u64::from(vcpus.max(1));
    cap.period_us.saturating_sub(used_up_in)
}

/// `1.5 CPUs`.
pub(super) fn millicpus(millicpus: u32) -> String {
    format!("{} CPUs", f64::from(millicpus) / 1000.0)
}

/// `100 us`, `4 ms`, `1.4 ms`.
pub(super) fn micros(us: u64) -> String {
    match us {
        0..1000 => format!("{us} us"),
        1000..1_000_000 => format!("{} ms", us as f64 / 1e3),
        _ => format!("{} s", us as f64 / 1e6),
    }
}

/// A slice.
pub(super) fn slice(slice: Slice) -> String {
    match (slice, slice.micros()) {
        (Slice::Latency, Some(us)) => format!("latency ({})", micros(us.into())),
        (Slice::Throughput, Some(us)) => format!("throughput ({})", micros(us.into())),
        (_, Some(us)) => micros(us.into()),
        (_, None) => "the kernel's".into(),
    }
}

/// A gang.
pub(super) fn gang(gang: Gang) -> Option<String> {
    match gang {
        Gang::Off => None,
        Gang::Soft { quantum_us } => Some(format!("soft, turns of {}", micros(quantum_us.into()))),
        Gang::Adaptive { quantum_us } => {
            Some(format!("adaptive, turns of {}", micros(quantum_us.into())))
        }
    }
}

/// SMT isolation.
pub(super) fn smt(smt: SmtIsolation) -> Option<String> {
    match smt {
        SmtIsolation::Off => None,
        SmtIsolation::Vm => Some("a core's threads for one VM at a time".into()),
        SmtIsolation::Vcpu => Some("a core's threads for one vCPU at a time".into()),
    }
}

impl VmPlan {
    /// Placement, and where each vCPU goes by it.
    pub(crate) fn placement_in_words(&self) -> String {
        placement(self)
    }
}

/// Placement, and where each vCPU goes by it.
pub(super) fn placement(plan: &VmPlan) -> String {
    let name = match &plan.request.policy.placement {
        Placement::Shared => "shared",
        Placement::Dedicated { cores: Cores::Any } => "dedicated",
        Placement::Dedicated {
            cores: Cores::Whole,
        } => "dedicated, whole cores",
        Placement::Dedicated { cores: Cores::One } => "dedicated, one core each",
        Placement::Spread => "spread",
        Placement::Pack => "pack",
        Placement::NumaLocal { .. } => "numa-local",
        Placement::Map(_) => "map",
    };
    match places(plan) {
        places if places.is_empty() => name.into(),
        places => format!("{name}: {places}"),
    }
}

/// `vCPUs 0-3 on 0-7`, or each for itself.
fn places(plan: &VmPlan) -> String {
    let mut groups: Vec<(CpuSet, &CpuSet)> = Vec::new();
    for vcpu in &plan.vcpus {
        match groups.iter_mut().find(|(_, cpus)| **cpus == vcpu.cpus) {
            Some((vcpus, _)) => {
                vcpus.insert(vcpu.vcpu);
            }
            None => groups.push((CpuSet::one(vcpu.vcpu), &vcpu.cpus)),
        }
    }
    let words: Vec<String> = groups
        .iter()
        .map(|(vcpus, cpus)| format!("vCPU {vcpus} on {cpus}"))
        .collect();
    words.join(", ")
}

/// A deadline.
pub(super) fn deadline(deadline: &crate::Deadline) -> String {
    format!(
        "{} within {} every {}",
        micros(deadline.runtime_us),
        micros(deadline.deadline_us),
        micros(deadline.period_us)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cap_says_how_long_the_vm_stands_still() {
        let wanted = Cap {
            quota_us: 40_000,
            period_us: 100_000,
            burst_us: 0,
        };
        assert_eq!(cap(&wanted), "40 ms per 100 ms (0.40 CPUs)");
        assert_eq!(blackout_us(&wanted, 1), 60_000);
        assert_eq!(blackout_us(&wanted, 2), 80_000);
        let wide = Cap {
            quota_us: 400_000,
            ..wanted
        };
        assert_eq!(blackout_us(&wide, 2), 0);
    }
}
