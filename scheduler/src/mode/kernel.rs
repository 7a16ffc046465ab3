//! What this kernel's mshv driver has decided: it registers a CPU hotplug state only where it schedules VPs itself.

use std::fs;

use super::{Evidence, Says};

const STATES: &str = "/sys/devices/system/cpu/hotplug/states";

/// What the driver does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// It dispatches VPs on its own CPUs.
    LinuxSchedules,
    /// It leaves scheduling to the hypervisor.
    HypervisorSchedules,
    /// There is no such driver here, or it cannot be seen.
    Unknown,
}

pub(super) fn read() -> (Decision, Evidence) {
    match fs::read_to_string(STATES) {
        Ok(states) => judge(&states),
        Err(error) => evidence(Decision::Unknown, error.to_string()),
    }
}

fn judge(states: &str) -> (Decision, Evidence) {
    // One state a line: "164: mshv_root_sched".
    let has = |name| {
        states
            .lines()
            .any(|line| line.rsplit(": ").next().map(str::trim) == Some(name))
    };
    if has("mshv_root_sched:online") || has("mshv_root_sched") {
        evidence(
            Decision::LinuxSchedules,
            "mshv_root_sched is registered".to_owned(),
        )
    } else if has("mshv_synic") {
        evidence(
            Decision::HypervisorSchedules,
            "mshv_synic without mshv_root_sched".to_owned(),
        )
    } else {
        evidence(
            Decision::Unknown,
            "no mshv driver in the hotplug states".to_owned(),
        )
    }
}

fn evidence(decision: Decision, value: String) -> (Decision, Evidence) {
    let (says, meaning) = match decision {
        Decision::LinuxSchedules => (Says::Linux, "this kernel dispatches VPs on its own CPUs"),
        Decision::HypervisorSchedules => (
            Says::Hypervisor,
            "this kernel leaves VPs to the hypervisor's scheduler",
        ),
        Decision::Unknown => (Says::Nothing, "the kernel's decision is not visible"),
    };
    (
        decision,
        Evidence::new("kernel's decision", says, value, meaning),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hotplug_states_give_the_decision() {
        let decide = |states| judge(states).0;
        assert_eq!(
            decide("  0: offline\n190: mshv_synic\n191: mshv_root_sched\n"),
            Decision::LinuxSchedules
        );
        assert_eq!(
            decide("  0: offline\n190: mshv_synic\n"),
            Decision::HypervisorSchedules
        );
        assert_eq!(
            decide("  0: offline\n190: mshv_root_sched_not\n"),
            Decision::Unknown
        );
        assert_eq!(decide(""), Decision::Unknown);
    }
}
