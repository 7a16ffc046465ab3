//! Taking turns: gangs whose vCPUs run at the same time, and vCPUs that get a CPU for a quantum each.
//!
//! Nothing is stopped. Who is not on its turn is held back ([`lever`]): it still gets what the others leave idle. Whose turn it is
//! follows from the ledger and the clock ([`turns`]), so independent processes agree without talking. One thread per VM
//! ([`Rotator`]) moves the VM's lever at the boundaries; while there is nobody to take turns with it sleeps.

mod adaptive;
pub(crate) mod lever;
mod rotator;
#[cfg(test)]
mod tests;
mod turns;
mod watch;

pub use adaptive::GangSignal;
pub use rotator::{Rotator, RotatorError, RotatorState};
