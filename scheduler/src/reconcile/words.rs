//! What has happened, in words for whoever reads a log.

use std::fmt;

use super::{OnLost, ReconcileEvent};
use crate::ThreadRole;

impl fmt::Display for ThreadRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vcpu(vcpu) => write!(f, "the thread of vCPU {vcpu}"),
            Self::Helper => f.write_str("a helper thread"),
        }
    }
}

impl fmt::Display for ReconcileEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Available { before, now } => {
                write!(f, "this machine may use CPUs {now} now; it was {before}")
            }
            Self::Corrected { role, found, now } if found == now => {
                write!(
                    f,
                    "{role} is on CPUs {found}, where it should not be, and cannot be moved"
                )
            }
            Self::Corrected { role, found, now } => {
                write!(
                    f,
                    "{role} was moved to CPUs {found} by somebody else; it is on {now} again"
                )
            }
            Self::Regrouped => f.write_str(
                "somebody else had given this machine's control groups other CPUs; they have theirs again",
            ),
            Self::Lost {
                vcpu,
                planned,
                now,
                on_lost,
            } => {
                write!(
                    f,
                    "vCPU {vcpu} has lost CPU {planned}, which was its own, and is on {now}"
                )?;
                f.write_str(match on_lost {
                    OnLost::Shared => " among others",
                    OnLost::Pause => "; the machine is to be paused",
                    OnLost::Fail => "; the machine is to be ended",
                })
            }
            Self::Regained { vcpu } => write!(f, "vCPU {vcpu} has its own CPU back"),
            Self::Replanned => f.write_str("this machine's plan is another now: others have planned theirs, or there are more CPUs"),
            Self::Mode(change) => write!(
                f,
                "who schedules may be another now: the {} says \"{}\", and said \"{}\" before",
                change.source, change.now, change.before
            ),
            Self::Truce { length } => write!(
                f,
                "somebody else keeps moving the threads of this machine: they are left where they are for {} s",
                length.as_secs()
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CpuSet;

    #[test]
    fn events_are_sentences() {
        let corrected = ReconcileEvent::Corrected {
            role: ThreadRole::Vcpu(0),
            found: CpuSet::one(3),
            now: CpuSet::one(1),
        };
        assert_eq!(
            corrected.to_string(),
            "the thread of vCPU 0 was moved to CPUs 3 by somebody else; it is on 1 again"
        );
        let stuck = ReconcileEvent::Corrected {
            role: ThreadRole::Helper,
            found: CpuSet::one(3),
            now: CpuSet::one(3),
        };
        assert!(stuck.to_string().ends_with("cannot be moved"), "{stuck}");
        let lost = ReconcileEvent::Lost {
            vcpu: 2,
            planned: CpuSet::one(5),
            now: CpuSet::first(2),
            on_lost: OnLost::Shared,
        };
        assert_eq!(
            lost.to_string(),
            "vCPU 2 has lost CPU 5, which was its own, and is on 0-1 among others"
        );
    }
}
