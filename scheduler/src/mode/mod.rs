//! Who schedules VPs here: evidence, and what it amounts to.
//!
//! | source | costs | says |
//! |---|---|---|
//! | [`declared`] | two hypercalls | what the hypervisor declares to this partition |
//! | [`kernel`] | one file | whether the driver registered its own scheduler |
//! | [`log`] | the kernel's log | which scheduler the driver found, by name |
//! | [`partition`] | CPUID | root partition or L1VH |
//! | [`calibration`] | 100 ms | what really happens to a thread that runs a VP |
//! | [`steal`] | 60 ms | whether somebody else takes time from this partition |
//!
//! The first four are what somebody says; [`calibration`] is what happens. Where they differ the verdict is "disputed".

mod calibration;
mod choice;
mod declared;
mod kernel;
mod log;
mod partition;
mod probe_partition;
mod probe_signal;
mod recheck;
mod steal;
mod thread_time;
mod verdict;

use std::{
    fmt, io,
    os::fd::{AsFd, BorrowedFd},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde::Serialize;

pub use choice::{ModeParseError, NeedsForce};
pub use partition::PartitionKind;
pub use probe_partition::{ProbeError, ProbePartition};
pub use recheck::{ModeChange, ModeCheck};
pub use verdict::Verdict;

/// What looking at behaviour may take at most, with everything else.
pub const BUDGET: Duration = Duration::from_millis(500);

/// Who, in the eyes of one source, schedules VPs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Says {
    /// Linux: a VP is the thread that runs it.
    Linux,
    /// The hypervisor: that thread sleeps.
    Hypervisor,
    /// This source does not tell.
    Nothing,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Evidence {
    /// Where it was looked.
    pub source: &'static str,
    /// What was found there.
    pub value: String,
    /// What that means.
    pub meaning: &'static str,
    /// What that says about who schedules.
    pub says: Says,
    /// When it was found, in milliseconds since 1970.
    pub at_ms: u64,
}

impl Evidence {
    pub(crate) fn new(
        source: &'static str,
        says: Says,
        value: impl Into<String>,
        meaning: &'static str,
    ) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            source,
            value: value.into(),
            meaning,
            says,
            at_ms: now.map_or(0, |time| time.as_millis() as u64),
        }
    }
}

/// What was found out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Detection {
    /// Who schedules.
    pub verdict: Verdict,
    /// Do all sources that say something say the same?
    pub consistent: bool,
    /// What kind of partition this is.
    pub partition: PartitionKind,
    /// What the verdict rests on.
    pub evidence: Vec<Evidence>,
    /// Time this partition loses to others although its CPU had work, in millionths; `None` where nobody has looked.
    pub residual_steal_ppm: Option<u32>,
    /// The first bank of this partition's VMM capabilities, if the hypervisor told them.
    #[serde(skip)]
    pub capabilities: Option<u64>,
    /// Requests made to `/dev/mshv` on the way, for those who count ioctls; those of the calibration are not among them.
    #[serde(skip)]
    pub hypercalls: u64,
}

/// What the hypervisor declares to this partition (through `device`, an open `/dev/mshv`), what the kernel has decided, and
/// what kind of partition this is: everything that costs next to nothing. Never fails: a source that cannot be read is
/// evidence of nothing.
#[must_use]
pub fn detect(device: &impl AsFd) -> Detection {
    examine(Ok(device.as_fd()), Duration::ZERO)
}

/// [`detect`], and with a `budget` also how VPs behave: a partition is made for it, with two VPs that count, and gone when this
/// returns. Takes `budget` at most, of which [`BUDGET`] is plenty; with none, it is `detect`. `device` may be the reason why
/// there is none: that is evidence too.
#[must_use]
pub fn examine(device: Result<BorrowedFd<'_>, &io::Error>, budget: Duration) -> Detection {
    let begun = Instant::now();
    let (kind, partition) = partition::read();
    let declaration = declared::read(device, kind);
    let (decision, kernel) = kernel::read();
    let mut evidence = vec![declaration.evidence, kernel];
    let mut named = log::Named::Nothing;
    if !budget.is_zero() || decision != kernel::Decision::Unknown {
        let (found, log) = log::read(budget.max(Duration::from_millis(20)) / 10);
        named = found;
        evidence.push(log);
    }
    evidence.push(partition);
    let mut residual_steal_ppm = None;
    if !budget.is_zero() {
        if let Ok(device) = device {
            evidence.extend(calibration::measure(device, begun, budget));
        }
        let (ppm, steal) = steal::measure(budget.saturating_sub(begun.elapsed()).min(budget / 12));
        residual_steal_ppm = ppm;
        evidence.push(steal);
    }
    let says: Vec<_> = evidence.iter().map(|evidence| evidence.says).collect();
    let claims = verdict::Claims {
        declared: declaration.declared,
        kind,
        named,
    };
    let verdict = Verdict::of(&says, claims);
    Detection {
        verdict,
        consistent: verdict != Verdict::Disputed,
        partition: kind,
        evidence,
        residual_steal_ppm,
        capabilities: declaration.capabilities,
        hypercalls: declaration.hypercalls,
    }
}

/// The first two words of extended property `code` of this partition, by one hypercall; `None` where the hypervisor does not
/// tell.
#[must_use]
pub fn partition_property(device: &impl AsFd, code: u32) -> Option<[u64; 2]> {
    declared::property(device.as_fd(), code).ok()
}

impl fmt::Display for Detection {
    /// One line: who is in charge, and how that is known. What tells nothing is named only where nothing tells anything.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "scheduler: {} ({})",
            self.verdict,
            self.verdict.meaning()
        )?;
        let mut before = "; known from ";
        let telling = |evidence: &&Evidence| evidence.says != Says::Nothing;
        let nothing = !self.evidence.iter().any(|it| telling(&it));
        for evidence in self.evidence.iter().filter(|it| nothing || telling(it)) {
            write!(f, "{before}{}: {}", evidence.source, evidence.value)?;
            before = ", ";
        }
        Ok(())
    }
}
