//! Keeping a plan true while the world changes: cpusets that shrink and grow, CPUs that go and come back, others who move our
//! threads, and plans of others that change ours.
//!
//! What notifies is waited for: writes to cpuset files, CPU hot-plug events, the ledger. A foreign `sched_setaffinity` notifies
//! nobody, so the affinity of each thread is looked at every 20 ms: one system call a thread, about 0.01 % of a CPU for each vCPU (64 of
//! them in a build without optimization: 8 ms a second; a machine of 8: 0.1 %). With every 40 ms, what was to be right within 50 ms
//! took 51 on a busy machine: the thread that looks has to get a CPU as well, for which it asks for the shortest slice there is.
//!
//! Who schedules at all is looked at every minute ([`ModeCheck`](crate::ModeCheck)): a plan for one world means nothing in the other.
//!
//! A VM that shares CPUs gets more of them when others leave them: its plan in the ledger grows with what there is to share. One with CPUs of
//! its own keeps those.
//!
//! Whoever fights us wins for a while: after three corrections in ten seconds there are none for ten seconds, then for twenty, and
//! so on, and the effect says that the placement is advisory.

pub(crate) mod events;
mod remap;
#[cfg(test)]
mod tests;
mod truce;
mod watcher;
mod words;

pub use watcher::{OnLost, ReconcileEvent, ReconcileOptions, Reconciler};
