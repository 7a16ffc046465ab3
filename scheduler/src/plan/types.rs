//! What goes into a plan and what comes out of it.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{CpuSet, SchedMode, VmPolicy};

/// The name of a VM in the ledger; unique on a host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VmId(pub String);

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for VmId {
    fn from(name: &str) -> Self {
        Self(name.to_owned())
    }
}

/// One VM that wants to run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Its name. A name that is in the ledger already is a VM that is planned again.
    pub vm: VmId,
    /// Virtual processors.
    pub vcpus: u32,
    /// Hardware threads per core the guest would like to be shown.
    #[serde(default = "one")]
    pub threads_per_core: u32,
    /// Guest memory, in MiB.
    pub memory_mib: u64,
    /// What is wanted.
    #[serde(default)]
    pub policy: VmPolicy,
}

fn one() -> u32 {
    1
}

/// What will be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The requested VMs, in the order of the requests.
    pub vms: Vec<VmPlan>,
    /// VMs of the ledger whose CPUs change because of the above, as they must be from now on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adjusted: Vec<VmPlan>,
}

/// What will be of one VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmPlan {
    /// What was asked for: enforcement reads weight, cap, slices and the rest of the policy from here.
    pub request: Request,
    /// Who schedules its VPs: on whose word all of this has an effect.
    pub mode: SchedMode,
    /// Where each vCPU runs, by vCPU number.
    pub vcpus: Vec<VcpuPlan>,
    /// CPUs nobody else may use: those of the vCPUs and, for whole cores, their idle siblings.
    #[serde(default, skip_serializing_if = "CpuSet::is_empty")]
    pub exclusive: CpuSet,
    /// CPUs of the threads that are not vCPUs.
    pub helpers: CpuSet,
    /// Why those.
    pub helpers_why: String,
    /// NUMA nodes the guest's memory should come from; empty if it does not matter.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub memory_nodes: Vec<u32>,
    /// Hardware threads per core the guest could be shown: where it is more than one, they are siblings on the host too.
    pub threads_per_core: u32,
    /// CPUs that were nobody's own when this was planned; how a later plan sees that there are more or fewer now.
    #[serde(default, skip_serializing_if = "CpuSet::is_empty")]
    pub pool: CpuSet,
    /// What somebody should know who reads this plan.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// Where one vCPU runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuPlan {
    /// Its number.
    pub vcpu: u32,
    /// The CPUs it may run on.
    pub cpus: CpuSet,
    /// Does nobody else run there?
    pub exclusive: bool,
    /// Why those.
    pub why: String,
}

/// Why there is no plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rejection {
    /// What cannot be had; never empty.
    pub reasons: Vec<Binding>,
    /// The nearest request that can be had now, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nearest: Option<Box<Nearest>>,
}

/// One request against one limit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Binding {
    /// Whose request.
    pub vm: VmId,
    /// The limit.
    pub constraint: Constraint,
    /// What was asked, what there is, and what can be done, in a sentence.
    pub detail: String,
}

/// The limits a request can meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Constraint {
    /// A value no host takes: out of range, or in contradiction with another.
    Policy,
    /// A CPU that does not exist, is offline or outside the cpuset.
    Cpus,
    /// CPUs that belong to another VM alone.
    Exclusive,
    /// No CPU is left that is nobody's own.
    Pool,
    /// Not enough free CPUs or cores to dedicate.
    Dedicated,
    /// A NUMA node that does not exist or is too small.
    Numa,
    /// More vCPUs per CPU than a VM accepts.
    Overcommit,
    /// More CPU time reserved than there is.
    Reserve,
    /// More deadline utilisation than there is, or CPUs deadlines cannot have.
    Deadline,
    /// A gang wider than its CPUs.
    Gang,
    /// No CPU for the threads that are not vCPUs.
    Helpers,
    /// The hypervisor places VPs: there is no such control here.
    Mode,
    /// A VM that is already there, or twice among the requests.
    Name,
}

/// The nearest request that can be had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nearest {
    /// The request.
    pub request: Request,
    /// The same, as one would type it.
    pub sched: String,
    /// What is different about it.
    pub changes: Vec<String>,
}
