//! One virtual processor, one thread: the run loop between the hypervisor and the devices.
//!
//! ```text
//! MSHV_RUN_VP ──▶ Intercept ──▶ Bus (ports, MMIO) ──▶ device
//!      ▲                             │
//!      └──── register page ◀─────────┘
//! ```
//!
//! A [`Vp`] runs until the guest does something the hypervisor leaves to the VMM. The message it comes back with is read in
//! place as an [`Intercept`]; the access goes to the [`Machine`]; the result and the new RIP are written to the register page,
//! a page of memory shared with the hypervisor; and the VP runs again. That is one ioctl per exit. Instructions that touch
//! unmapped memory are executed here by [`emulate`].
//!
//! Start reading at [`Vp::run`]; [`Requests`] is how another thread pauses or stops a running VP.

pub mod bus;
mod counters;
pub mod emulate;
mod history;
mod intercept;
mod registers;
mod request;
mod run;
mod vector;
mod vp;

pub use counters::{Counter, Counters, ExitKind};
pub use history::History;
pub use intercept::{Header, Intercept, MemoryAccess, MsrAccess, PortAccess};
pub use request::{KickWatch, Requests, install_kick_handler};
pub use run::{Crash, End, Machine, Watch};
pub use vp::{Register, Vp, VpError};
