//! Keeping a plan true while the world changes: cpusets that shrink and grow, CPUs that go and come back, others who move our
//! threads, and plans of others that change ours.
//!
//! What notifies is waited for: writes to cpuset files, CPU hot-plug events, the ledger. A foreign `sched_setaffinity` notifies
//! nobody, so the affinity of each thread is looked at every 40 ms: one system call a thread.
//!
//! Whoever fights us wins for a while: after three corrections in ten seconds there are none for ten seconds, then for twenty, and
//! so on, and the effect says that the placement is advisory.

pub(crate) mod events;
mod remap;
#[cfg(test)]
mod tests;
mod watcher;

pub use watcher::{OnLost, ReconcileEvent, ReconcileOptions, Reconciler};
