//! Who schedules the virtual processors of this machine's guests, and how that is known.
//!
//! On the Microsoft Hypervisor the answer decides what a VMM can do. Where Linux schedules them (a root partition with the
//! root scheduler, an L1VH with the integrated one), a VP is the thread that runs it, and every control Linux has over a
//! thread is a control over the VP. Where the hypervisor schedules them (core or classic scheduler), that thread only
//! sleeps, and its affinity, priority and cgroup say nothing about the VP.
//!
//! [`detect`] gathers evidence from independent sources and [`Detection::verdict`] says what it amounts to; sources that
//! contradict each other give [`Verdict::Disputed`], never a guess. [`examine`] also looks at how VPs behave.
//!
//! ```no_run
//! let device = std::fs::File::open("/dev/mshv")?;
//! println!("{}", scheduler::detect(&device));
//! # Ok::<(), std::io::Error>(())
//! ```

mod cpuset;
mod enforce;
mod gang;
mod host;
mod ledger;
mod memory;
mod meter;
mod mode;
mod plan;
pub mod policy;
mod reconcile;
mod rehearsal;
mod sys;

pub use cpuset::{CpuSet, CpuSetError};
pub use enforce::{
    AdoptError, Effect, Enforcer, Options as EnforceOptions, Outcome, PartitionProperties, Refused,
    ThreadRole,
};
pub use gang::{GangSignal, Rotator, RotatorError, RotatorState};
pub use host::{Abilities, Ability, Cgroup, Cpu, Host, HostError, HostSpec, Node};
pub use ledger::{
    Claim, ClaimError, Ledger, LedgerEntry, LedgerError, LedgerState, Owner, Rotation, Scope,
};
pub use memory::bind_memory;
pub use meter::{
    ExitMeter, Histogram, Latency, Meter, MeterOptions, Metered, RunTimes, VcpuMeter, VmMeter,
    VpMeter,
};
pub use mode::{
    BUDGET, Detection, Evidence, ModeChange, ModeCheck, ModeParseError, NeedsForce, PartitionKind,
    ProbeError, ProbePartition, Says, Verdict, Verdict as SchedMode, detect, examine,
    partition_property,
};
pub use plan::{
    Binding, Constraint, Nearest, Plan, Rejection, Request, VcpuPlan, VmId, VmPlan, plan,
};
pub use policy::{
    Cap, Cores, Deadline, Gang, Helpers, Placement, PolicyError, Slice, SmtIsolation, VmPolicy,
};
pub use reconcile::{OnLost, ReconcileEvent, ReconcileOptions, Reconciler};
pub use rehearsal::rehearse;
pub use sys::Tid;
