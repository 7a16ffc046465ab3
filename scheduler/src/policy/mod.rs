//! What somebody wants for a VM: where its vCPUs run, how much time they get, and what must not happen to them.
//!
//! One type, [`VmPolicy`], whatever it was filled by: `--sched key=value,…`, JSON, cloud-hypervisor's `affinity=` list or
//! libvirt's `<cputune>`. It says what is wanted, never how it is done: [`crate::plan()`] decides whether and where.

pub mod affinity;
mod cpus;
pub mod libvirt;
mod preset;
mod syntax;
mod validate;

use serde::{Deserialize, Serialize};

pub use cpus::CpusOption;
pub use syntax::{Count, HELP};
pub(crate) use syntax::{Milli, Time};
pub(crate) use validate::PROMISE_MILLI;
pub use validate::PolicyError;

use crate::CpuSet;

/// What somebody wants for one VM. [`VmPolicy::default`] is what a VM gets that asks for nothing: shared CPUs, no two of its
/// vCPUs on one, the kernel's weights and slices.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "snake_case")]
pub struct VmPolicy {
    /// Which CPUs.
    pub placement: Placement,
    /// Share of contended CPUs of all vCPUs of the VM together, 1 to 10000; 100 is everybody's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
    /// Most CPU time all vCPUs of the VM together may use; its other threads are not counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cap: Option<Cap>,
    /// CPU time kept for all vCPUs of the VM together, in thousandths of a CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reserve_millicpus: Option<u32>,
    /// How long a vCPU runs before another that waits may run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slice: Option<Slice>,
    /// Microseconds after which this VM takes turns with the others on its CPUs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rotate_us: Option<u32>,
    /// Whether its vCPUs run at the same time.
    #[serde(skip_serializing_if = "Gang::is_off")]
    pub gang: Gang,
    /// A guarantee of time within each period, per vCPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Deadline>,
    /// Real-time priority of the vCPUs, 1 to 99.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rt: Option<u8>,
    /// Who may run on the other hardware threads of a core.
    #[serde(skip_serializing_if = "SmtIsolation::is_off")]
    pub smt: SmtIsolation,
    /// CPUs of the threads that are not vCPUs.
    #[serde(skip_serializing_if = "Helpers::is_auto")]
    pub helpers: Helpers,
    /// Fail to start rather than run with a request that has no effect.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub strict: bool,
    /// Most vCPUs per CPU this VM accepts on its CPUs, in thousandths; [`VmPolicy::OVERCOMMIT_MILLI`] if nothing is said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overcommit_milli: Option<u32>,
}

/// Which CPUs a VM gets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Placement {
    /// Those that are nobody's own; no two vCPUs of the VM on one.
    #[default]
    Shared,
    /// One for each vCPU, and nobody else on it.
    Dedicated {
        /// What becomes of the rest of a core.
        cores: Cores,
    },
    /// One for each vCPU, as far apart as possible: for bandwidth, and for quiet.
    Spread,
    /// One for each vCPU, under as few caches as possible: for sharing, and for energy.
    Pack,
    /// Those of one NUMA node.
    NumaLocal {
        /// Refuse rather than use several nodes.
        require: bool,
        /// Which node; any if nothing is said.
        node: Option<u32>,
    },
    /// The CPUs named for each vCPU; a vCPU that is not named is shared.
    Map(Vec<(u32, CpuSet)>),
}

/// What becomes of the other hardware threads of a dedicated VM's cores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cores {
    /// Others may have them.
    #[default]
    Any,
    /// Only this VM has them: its vCPUs fill whole cores.
    Whole,
    /// Nobody has them: each vCPU has a core to itself.
    One,
}

/// The most CPU time the vCPUs of a VM may use: `quota_us` in every `period_us`, all of them together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cap {
    /// CPU time per period, in microseconds; more than the period is more than one CPU.
    pub quota_us: u64,
    /// The period, in microseconds.
    pub period_us: u64,
    /// Time not used earlier that may be used at once, in microseconds.
    #[serde(default)]
    pub burst_us: u64,
}

/// How long a vCPU runs before another that waits may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Slice {
    /// The shortest: wakes soon.
    Latency,
    /// The kernel's.
    Default,
    /// Long: keeps its cache.
    Throughput,
    /// So many microseconds.
    Micros(u32),
}

/// Whether the vCPUs of a VM run at the same time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Gang {
    /// As it comes.
    #[default]
    Off,
    /// VMs on the same CPUs take turns; a CPU the VM whose turn it is leaves idle is used by others.
    Soft {
        /// Length of a turn, in microseconds.
        quantum_us: u32,
    },
    /// The same, while it is measured to help.
    Adaptive {
        /// Length of a turn, in microseconds.
        quantum_us: u32,
    },
}

/// A guarantee per vCPU: `runtime_us` within `deadline_us` of the start of each `period_us`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Deadline {
    /// CPU time, in microseconds.
    pub runtime_us: u64,
    /// Until when, in microseconds.
    pub deadline_us: u64,
    /// How often, in microseconds.
    pub period_us: u64,
}

/// Who may run on the other hardware threads of a core while a vCPU runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SmtIsolation {
    /// Anybody.
    #[default]
    Off,
    /// Only vCPUs of this VM.
    Vm,
    /// Nobody.
    Vcpu,
}

/// Where the threads of a VM that are not vCPUs run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Helpers {
    /// On the CPUs that are nobody's own.
    #[default]
    Auto,
    /// On these.
    Set(CpuSet),
}

impl VmPolicy {
    /// Most vCPUs per CPU where nothing is said, in thousandths.
    pub const OVERCOMMIT_MILLI: u32 = 4000;
    /// The weight of a VM that asks for none.
    pub const WEIGHT: u32 = 100;
}

impl VmPolicy {
    /// The keys that only Linux can carry out, and so only where it is Linux that schedules VPs, with their values.
    pub(crate) fn for_linux(&self) -> Vec<(&'static str, String)> {
        let mut keys = Vec::new();
        if self.placement != Placement::Shared {
            let placement = self.placement.to_string();
            let value = placement.trim_start_matches("placement=");
            keys.push(("placement", value.to_owned()));
        }
        if let Some(slice) = self.slice.filter(|slice| *slice != Slice::Default) {
            keys.push(("slice", slice.to_string()));
        }
        if let Some(us) = self.rotate_us {
            keys.push(("rotate", Time(us.into()).to_string()));
        }
        if !self.gang.is_off() {
            keys.push(("gang", self.gang.to_string()));
        }
        if let Some(deadline) = self.deadline {
            keys.push(("deadline", deadline.to_string()));
        }
        if let Some(priority) = self.rt {
            keys.push(("rt", priority.to_string()));
        }
        keys
    }

    /// The same without what only Linux can carry out.
    pub(crate) fn without_linux(&self) -> Self {
        Self {
            placement: Placement::Shared,
            slice: None,
            rotate_us: None,
            gang: Gang::Off,
            deadline: None,
            rt: None,
            ..self.clone()
        }
    }

    /// What is wanted while there are `vcpus` vCPUs: a map can name more, which are still to come.
    #[must_use]
    pub fn for_vcpus(&self, vcpus: u32) -> Self {
        let mut policy = self.clone();
        if let Placement::Map(map) = &mut policy.placement {
            map.retain(|(vcpu, _)| *vcpu < vcpus);
            if map.is_empty() {
                policy.placement = Placement::Shared;
            }
        }
        policy
    }
}

impl Placement {
    /// Does a map name CPUs for `vcpu`?
    #[must_use]
    pub fn names(&self, vcpu: u32) -> bool {
        matches!(self, Self::Map(map) if map.iter().any(|(named, _)| *named == vcpu))
    }
}

impl Gang {
    /// Is there no gang?
    #[must_use]
    pub fn is_off(&self) -> bool {
        *self == Self::Off
    }
}

impl SmtIsolation {
    /// May anybody run there?
    #[must_use]
    pub fn is_off(&self) -> bool {
        *self == Self::Off
    }
}

impl Helpers {
    /// Is nothing said?
    #[must_use]
    pub fn is_auto(&self) -> bool {
        *self == Self::Auto
    }
}

impl Slice {
    /// Microseconds to ask the kernel for; `None` for the kernel's own.
    #[must_use]
    pub fn micros(self) -> Option<u32> {
        match self {
            Self::Latency => Some(100),
            Self::Default => None,
            Self::Throughput => Some(20_000),
            Self::Micros(micros) => Some(micros),
        }
    }
}
