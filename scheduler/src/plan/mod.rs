//! From what is wanted to what will be: which CPUs each vCPU gets, or why it cannot have what it asks for.
//!
//! [`plan()`] is pure: the same host, ledger and requests give the same plan, and nothing is touched. Who has something keeps
//! it as long as it is still good, so that planning again changes as little as possible, and nothing if nothing has changed.
//!
//! What it promises, whatever the host and the requests (`admission.rs` and `place.rs` say how):
//!
//! - a CPU is one VM's own or everybody's, never two VMs' own;
//! - every set is within the CPUs that are online and allowed;
//! - no two vCPUs of a VM share a CPU while its set has as many CPUs as it has vCPUs, unless a map says so or a deadline needs
//!   the whole set;
//! - nobody's overcommit limit is exceeded, no CPU has more time reserved than may be promised of it (95 %);
//! - a VM that goes leaves plans behind that are still good;
//! - the nearest request in a [`Rejection`] is accepted when it is made.

mod admission;
mod dedicated;
mod helpers;
mod layout;
mod nearest;
mod notes;
mod numa;
mod pinned;
mod place;
mod refusal;
mod shared;
mod show;
mod space;
mod types;

pub use types::{Binding, Constraint, Nearest, Plan, Rejection, Request, VcpuPlan, VmId, VmPlan};

use crate::{Host, LedgerState};

/// Plans `requests` beside what is in `ledger`. A request for a VM that is in the ledger plans that VM again.
///
/// # Errors
///
/// What cannot be had, what binds it, and the nearest request that can be had.
pub fn plan(host: &Host, ledger: &LedgerState, requests: &[Request]) -> Result<Plan, Rejection> {
    admission::admit(host, ledger, requests).map_err(|refused| {
        let nearest = nearest::search(host, ledger, requests, &refused);
        Rejection {
            reasons: refused,
            nearest: nearest.map(Box::new),
        }
    })
}
