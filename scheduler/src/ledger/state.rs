//! The ledger as data: what is written in the file and what [`crate::plan()`] reads.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{VmId, VmPlan};

/// Everything the VMs of this host have been given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedgerState {
    /// Version of the format.
    pub version: u32,
    /// One for each VM.
    pub entries: Vec<LedgerEntry>,
}

/// One VM: what it asked for and what it was given (both in the plan), and who runs it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedgerEntry {
    /// Who runs it.
    pub owner: Owner,
    /// What it asked for and what it was given.
    pub plan: VmPlan,
    /// How it takes turns with the VMs on its CPUs, if it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotation: Option<Rotation>,
    /// Directories of its control groups, written down before they are made: whoever drops the entry of a process that is gone removes
    /// them, wherever they are.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<PathBuf>,
}

/// How a VM takes turns: what the others need to know in order to find out whose turn it is without asking.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rotation {
    /// Since when, in nanoseconds of `CLOCK_MONOTONIC`.
    pub since_ns: u64,
    /// Only while it is measured to help.
    pub adaptive: bool,
    /// Where its threads compete: turns are between those that have the same here.
    pub arena: String,
    /// What its progress gained from taking turns when it was last measured, in thousandths; nothing before that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gain_milli: Option<i32>,
}

/// The process that runs a VM. A number that was given to another process since has another start time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// Process id.
    pub pid: u32,
    /// When it started, in clock ticks since boot (field 22 of `/proc/<pid>/stat`).
    pub start_time: u64,
    /// Distinguishes VMs of one name over time.
    pub uuid: String,
}

impl LedgerState {
    /// The format this code writes, and the newest it reads.
    pub const VERSION: u32 = 1;

    /// The entry of VM `vm`.
    #[must_use]
    pub fn entry(&self, vm: &VmId) -> Option<&LedgerEntry> {
        self.entries
            .iter()
            .find(|entry| entry.plan.request.vm == *vm)
    }
}
