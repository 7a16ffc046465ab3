//! From a plan to the kernel, and what became of each request.
//!
//! ```text
//! VmPlan ──▶ Enforcer::prepare ──▶ groups, rehearsed controls, effects      (nothing runs yet)
//!                  adopt(role, tid) ──▶ one thread at a time, also later
//!                  resize(plan) ──▶ more vCPUs, or fewer
//!                  drop ──▶ everything as it was
//! ```
//!
//! Every control is read back, and ends up as an [`Effect`]: enforced, approximated, delegated, advisory or rejected. What is
//! rejected fails the preparation, and so does what is merely advisory if the policy is strict; then nothing stays behind.

mod cgroup;
mod cgroup1;
mod cgroup2;
mod delegated;
mod elsewhere;
mod enforcer;
mod linux;
mod outcome;
mod places;
#[cfg(test)]
mod process_tests;
mod rehearse;
mod resize;
mod smt;
#[cfg(test)]
pub(crate) mod tests;
mod threads;
mod words;

pub(crate) use cgroup::{clear as clear_groups, name as group_name};
pub(crate) use enforcer::Shared;

pub use delegated::PartitionProperties;
pub use enforcer::{AdoptError, Enforcer, Options, Refused, ThreadRole};
pub use outcome::{Effect, Outcome};
