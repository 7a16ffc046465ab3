//! The machine a plan is made for: its CPUs and how they hang together, its memory, and what its kernel can do.
//!
//! A [`Host`] is data: read from this machine, from a recorded tree of files, from JSON, or made up for a test. [`crate::plan()`]
//! sees nothing else of the machine.

mod abilities;
mod hierarchies;
mod probe;
mod read;
mod synthetic;

use serde::{Deserialize, Serialize};

pub use abilities::{Abilities, Ability, Cgroup};
pub(crate) use hierarchies::{Hierarchies, may_write};
pub use read::HostError;
pub use synthetic::HostSpec;

use crate::{CpuSet, SchedMode};

/// A machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// Every CPU that is present, by ascending number.
    pub cpus: Vec<Cpu>,
    /// Its memory nodes, by ascending number; never empty.
    pub nodes: Vec<Node>,
    /// CPUs that are online.
    pub online: CpuSet,
    /// CPUs this process may use: its affinity within its cpuset.
    pub allowed: CpuSet,
    /// CPUs the kernel keeps work away from (`isolcpus=`, isolated cpuset partitions).
    pub isolated: CpuSet,
    /// CPUs without a tick while one thread runs there.
    pub nohz_full: CpuSet,
    /// The scheduler's tick, in nanoseconds.
    pub tick_ns: u64,
    /// How the tick is known.
    pub tick_source: String,
    /// Who schedules VPs here; unknown until somebody has looked ([`crate::detect`]).
    #[serde(default = "unknown")]
    pub mode: SchedMode,
    /// What the kernel can do, and what this process may.
    pub abilities: Abilities,
}

fn unknown() -> SchedMode {
    SchedMode::Unknown
}

/// One CPU, and what it shares with which others. Numbers of cores, clusters and caches count over the whole machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    /// Its number.
    pub id: u32,
    /// Its memory node.
    pub node: u32,
    /// Its socket.
    pub socket: u32,
    /// Its cluster: cores that share a mid-level cache.
    pub cluster: u32,
    /// Its last-level cache.
    pub llc: u32,
    /// Its core.
    pub core: u32,
    /// Which hardware thread of its core it is.
    pub thread: u32,
}

/// One memory node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its number.
    pub id: u32,
    /// Memory, in MiB.
    pub total_mib: u64,
    /// Memory free when it was looked at, in MiB.
    pub free_mib: u64,
    /// May this process use it?
    pub allowed: bool,
    /// Distance to each node, in the order of [`Host::nodes`]; 10 is local. Empty where it is not known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub distance: Vec<u32>,
}

impl Host {
    /// The CPUs this process can really use.
    #[must_use]
    pub fn usable(&self) -> CpuSet {
        &self.online & &self.allowed
    }

    /// The CPU with number `id`.
    #[must_use]
    pub fn cpu(&self, id: u32) -> Option<&Cpu> {
        let index = self.cpus.binary_search_by_key(&id, |cpu| cpu.id).ok()?;
        Some(&self.cpus[index])
    }

    /// How long a thread really runs that asks for slices of `slice_us` while others wait: without a high-resolution tick
    /// the kernel looks at ticks only. In microseconds.
    #[must_use]
    pub fn effective_slice_us(&self, slice_us: u32) -> u64 {
        let tick_us = (self.tick_ns / 1000).max(1);
        (u64::from(slice_us) / tick_us + 1) * tick_us
    }
}
