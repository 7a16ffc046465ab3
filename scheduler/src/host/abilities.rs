//! What the kernel can do and what this process may, each with how that is known.

use serde::{Deserialize, Serialize};

/// A yes or no with its reason.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ability {
    /// Is it there?
    pub yes: bool,
    /// How that is known.
    pub why: String,
}

impl Ability {
    /// It is there.
    pub fn yes(why: impl Into<String>) -> Self {
        Self {
            yes: true,
            why: why.into(),
        }
    }

    /// It is not.
    pub fn no(why: impl Into<String>) -> Self {
        Self {
            yes: false,
            why: why.into(),
        }
    }
}

/// What can be used to make a plan so.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Abilities {
    /// A thread can ask for its own slice length (Linux 6.12).
    pub custom_slice: Ability,
    /// Core scheduling: `PR_SCHED_CORE`.
    pub core_scheduling: Ability,
    /// SCHED_FIFO for own threads.
    pub realtime: Ability,
    /// SCHED_DEADLINE for own threads.
    pub deadline: Ability,
    /// Negative nice values, and leaving SCHED_IDLE.
    pub nice: Ability,
    /// A BPF scheduler is in charge (`/sys/kernel/sched_ext`): slices and weights are hints to it.
    pub sched_ext_active: Ability,
    /// Exclusive CPU partitions can be made: a root domain of its own.
    pub partitions: Ability,
    /// Control groups.
    pub cgroup: Cgroup,
}

/// Which control groups there are and what this process may do with them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cgroup {
    /// 1, 2, or 0 for none. A hybrid without controllers in the unified hierarchy counts as 1.
    pub version: u8,
    /// Where groups for VMs can be made: the unified directory (v2) or that of the `cpu` controller (v1).
    pub cpu_path: Option<String>,
    /// The same for the `cpuset` controller; with v2 the same directory.
    pub cpuset_path: Option<String>,
    /// `cpu` can be used there.
    pub cpu: Ability,
    /// `cpuset` can be used there.
    pub cpuset: Ability,
    /// `cpu.idle` is there.
    pub idle: Ability,
    /// `cpu.max.burst` or `cpu.cfs_burst_us` is there.
    pub burst: Ability,
}
