//! From evidence to verdict: pure, so that every combination can be tested.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Says, declared::Declared, log::Named, partition::PartitionKind};

/// Who schedules the VPs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Linux, in the root partition.
    Root,
    /// Linux, in an L1VH.
    Integrated,
    /// The hypervisor's core scheduler.
    Core,
    /// The hypervisor's classic scheduler.
    Classic,
    /// The sources contradict each other.
    Disputed,
    /// The sources do not say.
    Unknown,
}

/// What tells the two kinds of each world apart.
#[derive(Clone, Copy, Debug)]
pub(super) struct Claims {
    /// Of the hypervisor.
    pub(super) declared: Declared,
    /// Of CPUID.
    pub(super) kind: PartitionKind,
    /// Of the driver.
    pub(super) named: Named,
}

impl Verdict {
    /// Weighs what the sources say about who schedules. None outweighs another: they agree, or the matter is disputed.
    pub(super) fn of(sources: &[Says], claims: Claims) -> Self {
        let linux = sources.contains(&Says::Linux);
        let hypervisor = sources.contains(&Says::Hypervisor);
        match (linux, hypervisor) {
            (true, true) => Self::Disputed,
            (false, false) => Self::Unknown,
            (true, false) => match (claims.kind, claims.declared) {
                (PartitionKind::Root, _) => Self::Root,
                (PartitionKind::L1vh, _) | (_, Declared::Integrated) => Self::Integrated,
                _ => Self::Root,
            },
            (false, true) if claims.named == Named::Classic => Self::Classic,
            // Where only the log could tell core from classic and it does not, core is what hosts have had since 2019; what
            // can be done about VPs is the same.
            (false, true) => Self::Core,
        }
    }

    /// The verdict in a few words.
    #[must_use]
    pub fn meaning(self) -> &'static str {
        match self {
            Self::Root => "Linux schedules the VPs, in the root partition",
            Self::Integrated => "Linux schedules the VPs, in this L1VH",
            Self::Core | Self::Classic => "the hypervisor schedules the VPs",
            Self::Disputed => "the sources contradict each other",
            Self::Unknown => "nothing here says who schedules the VPs",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Root => "root",
            Self::Integrated => "integrated",
            Self::Core => "core",
            Self::Classic => "classic",
            Self::Disputed => "disputed",
            Self::Unknown => "unknown",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(sources: &[Says], declared: Declared, kind: PartitionKind) -> Verdict {
        let named = Named::Nothing;
        let claims = Claims {
            declared,
            kind,
            named,
        };
        Verdict::of(sources, claims)
    }

    #[test]
    fn agreement_disagreement_and_silence() {
        use Says::{Hypervisor, Linux, Nothing};
        let unknown =
            |sources: &[Says]| verdict(sources, Declared::Unknown, PartitionKind::Elsewhere);
        assert_eq!(unknown(&[]), Verdict::Unknown);
        assert_eq!(unknown(&[Nothing, Nothing]), Verdict::Unknown);
        assert_eq!(unknown(&[Hypervisor, Nothing]), Verdict::Core);
        assert_eq!(unknown(&[Nothing, Linux]), Verdict::Root);
        assert_eq!(unknown(&[Linux, Nothing, Hypervisor]), Verdict::Disputed);
    }

    #[test]
    fn where_linux_schedules_the_partition_tells_root_from_integrated() {
        let linux = |declared, kind| verdict(&[Says::Linux], declared, kind);
        let integrated = Declared::Integrated;
        assert_eq!(
            linux(integrated, PartitionKind::Elsewhere),
            Verdict::Integrated
        );
        assert_eq!(
            linux(Declared::Unknown, PartitionKind::L1vh),
            Verdict::Integrated
        );
        assert_eq!(
            linux(Declared::Absent, PartitionKind::Elsewhere),
            Verdict::Root
        );
        assert_eq!(linux(integrated, PartitionKind::Root), Verdict::Root);
    }

    #[test]
    fn the_log_tells_classic_from_core() {
        let named = |named| {
            let claims = Claims {
                declared: Declared::Unknown,
                kind: PartitionKind::Root,
                named,
            };
            Verdict::of(&[Says::Hypervisor], claims)
        };
        assert_eq!(named(Named::Classic), Verdict::Classic);
        assert_eq!(named(Named::Core), Verdict::Core);
        assert_eq!(named(Named::Nothing), Verdict::Core);
    }
}
