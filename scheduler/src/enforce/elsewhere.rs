//! What of a plan others have to carry out, or nobody does: it is no less a request for that.

use super::{Effect, Options, Outcome};
use crate::{Host, VmPlan, memory};

/// One effect for each such request.
pub(super) fn effects(host: &Host, plan: &VmPlan, options: &Options<'_>) -> Vec<Effect> {
    let mut effects = Vec::new();
    if memory::matters(host, plan) {
        effects.push(Effect {
            control: "memory".into(),
            requested: memory::requested(plan),
            outcome: options.memory.clone().unwrap_or_else(|| Outcome::Advisory {
                why: "whoever has the guest's memory has not bound it".into(),
            }),
        });
    }
    let threads = plan.request.threads_per_core;
    if threads > 1 {
        effects.push(Effect {
            control: "topology".into(),
            requested: format!("{threads} threads per core"),
            outcome: Outcome::Advisory {
                why: "not shown to the guest, which sees what the hypervisor shows it".into(),
            },
        });
    }
    effects
}
