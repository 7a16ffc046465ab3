//! The answer to each thing that was requested: done, done differently, handed on, noted or refused. Never silence.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What became of one control.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Effect {
    /// Which control: `weight`, `cap`, `vcpu0 cpus` …
    pub control: String,
    /// What was requested.
    pub requested: String,
    /// What became of it.
    pub outcome: Outcome,
}

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "lowercase")]
pub enum Outcome {
    /// It is so: written and read back.
    Enforced,
    /// Something near it is so.
    Approximated {
        /// What was asked.
        requested: String,
        /// What is.
        effective: String,
        /// Why not what was asked.
        why: String,
    },
    /// The hypervisor was told.
    Delegated {
        /// Which property.
        property: String,
        /// What it said when asked afterwards.
        readback: String,
    },
    /// Noted; nothing makes it so.
    Advisory {
        /// Why.
        why: String,
    },
    /// Refused.
    Rejected {
        /// Why.
        why: String,
    },
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Enforced => f.write_str("enforced"),
            Self::Approximated { effective, why, .. } => {
                write!(f, "approximated: {effective} ({why})")
            }
            Self::Delegated { property, readback } => {
                write!(
                    f,
                    "delegated to the hypervisor: {property}, reads back {readback}"
                )
            }
            Self::Advisory { why } => write!(f, "advisory: {why}"),
            Self::Rejected { why } => write!(f, "rejected: {why}"),
        }
    }
}
