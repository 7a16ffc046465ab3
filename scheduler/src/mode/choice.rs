//! The mode a policy is carried out in: what was found, unless somebody insists on another.

use std::str::FromStr;

use super::{Detection, Says, Verdict, calibration};

/// Not a mode one can ask for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is none of root, integrated, core, classic")]
pub struct ModeParseError(String);

/// The wish contradicts what was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "--sched-mode={wanted}: but the threads that run VPs sleep here ({found}), so nothing asked of Linux would have an effect \
     on them; --sched-mode-force does it all the same"
)]
pub struct NeedsForce {
    /// What was asked for.
    pub wanted: Verdict,
    /// What was found.
    pub found: Verdict,
}

impl FromStr for Verdict {
    type Err = ModeParseError;

    /// A mode somebody can insist on.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "root" => Ok(Self::Root),
            "integrated" => Ok(Self::Integrated),
            "core" => Ok(Self::Core),
            "classic" => Ok(Self::Classic),
            other => Err(ModeParseError(other.to_owned())),
        }
    }
}

impl Verdict {
    /// Whether Linux schedules VPs, so that what it does to a thread it does to a VP.
    #[must_use]
    pub fn linux_schedules(self) -> bool {
        matches!(self, Self::Root | Self::Integrated)
    }

    /// Whether the hypervisor schedules VPs.
    #[must_use]
    pub fn hypervisor_schedules(self) -> bool {
        matches!(self, Self::Core | Self::Classic)
    }
}

impl Detection {
    /// The mode to carry policies out in: the verdict, or `wanted` instead of it. The evidence stays what it is.
    ///
    /// # Errors
    /// When Linux is to schedule although the VPs of this machine were seen to run elsewhere, and nobody forces it.
    pub fn mode(&self, wanted: Option<Verdict>, force: bool) -> Result<Verdict, NeedsForce> {
        let Some(wanted) = wanted else {
            return Ok(self.verdict);
        };
        if wanted.linux_schedules() && !force && self.seen() == Says::Hypervisor {
            return Err(NeedsForce {
                wanted,
                found: self.verdict,
            });
        }
        Ok(wanted)
    }

    /// Why nothing that is done in `mode` may have an effect: it was insisted on against what was found. `None` where nothing
    /// contradicts it.
    #[must_use]
    pub fn contradiction(&self, mode: Verdict) -> Option<String> {
        let found = match self.seen() {
            Says::Hypervisor if mode.linux_schedules() => "the threads that run VPs sleep here",
            Says::Linux if mode.hypervisor_schedules() => "VPs run on their threads here",
            _ => return None,
        };
        Some(format!(
            "{found} ({}), whatever --sched-mode={mode} says",
            self.verdict
        ))
    }

    /// The mode to meter VPs by that are scheduled as in `mode`: what was insisted on changes nothing about which numbers mean
    /// something.
    #[must_use]
    pub fn metered_as(&self, mode: Verdict) -> Verdict {
        match self.contradiction(mode) {
            Some(_) => self.verdict,
            None => mode,
        }
    }

    /// What happens, where somebody has looked; else what is said, if nobody disagrees.
    fn seen(&self) -> Says {
        let behaviour = self.evidence.iter().find(|evidence| {
            evidence.source == calibration::ONE_VP && evidence.says != Says::Nothing
        });
        match behaviour {
            Some(evidence) => evidence.says,
            None if self.verdict.hypervisor_schedules() => Says::Hypervisor,
            None if self.verdict.linux_schedules() => Says::Linux,
            None => Says::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mode::{Evidence, PartitionKind};

    fn detection(verdict: Verdict, behaviour: Says) -> Detection {
        Detection {
            verdict,
            consistent: verdict != Verdict::Disputed,
            partition: PartitionKind::L1vh,
            evidence: vec![Evidence::new(calibration::ONE_VP, behaviour, "", "")],
            residual_steal_ppm: None,
            capabilities: None,
            hypercalls: 0,
        }
    }

    #[test]
    fn the_verdict_counts_unless_somebody_insists() {
        let found = detection(Verdict::Disputed, Says::Linux);
        assert_eq!(found.mode(None, false), Ok(Verdict::Disputed));
        assert_eq!(found.mode(Some(Verdict::Root), false), Ok(Verdict::Root));
        assert_eq!(found.mode(Some(Verdict::Core), false), Ok(Verdict::Core));
    }

    #[test]
    fn what_was_seen_is_only_denied_by_force() {
        for verdict in [Verdict::Core, Verdict::Disputed] {
            let found = detection(verdict, Says::Hypervisor);
            let refused = found.mode(Some(Verdict::Root), false).unwrap_err();
            assert!(refused.to_string().contains("--sched-mode-force"));
            assert_eq!(found.mode(Some(Verdict::Root), true), Ok(Verdict::Root));
            assert_eq!(found.verdict, verdict, "the evidence stays");
        }
        let said = detection(Verdict::Core, Says::Nothing);
        assert!(said.mode(Some(Verdict::Integrated), false).is_err());
    }

    #[test]
    fn what_is_forced_changes_no_meter() {
        use Verdict::{Core, Disputed, Integrated, Root, Unknown};
        let metered = |found, seen, mode| detection(found, seen).metered_as(mode);
        assert_eq!(metered(Core, Says::Hypervisor, Root), Core);
        assert_eq!(metered(Core, Says::Nothing, Root), Core);
        assert_eq!(metered(Disputed, Says::Hypervisor, Root), Disputed);
        assert_eq!(metered(Integrated, Says::Linux, Core), Integrated);
        // Nothing contradicts these.
        assert_eq!(metered(Disputed, Says::Linux, Root), Root);
        assert_eq!(metered(Unknown, Says::Nothing, Root), Root);
        assert_eq!(metered(Root, Says::Linux, Root), Root);
        assert_eq!(metered(Disputed, Says::Linux, Disputed), Disputed);
        let why = detection(Core, Says::Hypervisor)
            .contradiction(Root)
            .unwrap();
        assert!(
            why.contains("sleep") && why.contains("--sched-mode=root"),
            "{why}"
        );
    }

    #[test]
    fn modes_are_read() {
        assert_eq!("core".parse(), Ok(Verdict::Core));
        for none in ["", "disputed", "unknown", "Root"] {
            assert!(none.parse::<Verdict>().is_err(), "{none:?}");
        }
    }
}
