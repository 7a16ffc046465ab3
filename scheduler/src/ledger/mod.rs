//! What the VMs of this host have been given, across the independent processes that run them.
//!
//! One file holds it all. Whoever changes it holds a lock (which the kernel takes back when its holder dies), writes a new file
//! beside it, and renames that over the old one: at any moment the file is whole, and either old or new. Entries of processes that
//! are gone are dropped by the next one that changes it.
//!
//! [`Ledger::claim`] is the way in: it plans and writes down under one lock, so that no two VMs are given the same CPU.

mod claim;
mod fault;
mod file;
mod owner;
mod state;
#[cfg(test)]
mod tests;

pub(crate) use claim::Entry;
#[cfg(test)]
pub(crate) use owner::start_time;

pub use claim::{Claim, ClaimError};
pub use file::{Ledger, LedgerError, Scope};
pub use state::{LedgerEntry, LedgerState, Owner, Rotation};
