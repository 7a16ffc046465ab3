//! Tests that would catch a lie.
//!
//! Two families live in `tests/`:
//!
//! * `conformance_*.rs` speak the `/dev/mshv` ABI themselves, with a client of a few hundred lines ([`vm`]) that shares no code
//!   with Rota. They judge *any* `/dev/mshv`: softmshv on a machine without the hypervisor, the kernel's driver on a machine with it.
//!   What they expect comes from the driver (`drivers/hv/mshv_*.c`) and the hypervisor's specification; each test says which.
//! * `boot.rs` runs the product: `rota run` with real kernels.
//!
//! A test says what it needs ([`requires`]) and finds out at run time. What it cannot judge it does not pass silently: it prints
//! `SKIP <test>: <reason>` on standard error. With `ROTA_REQUIRE=all` (or a list of requirement names) a missing requirement is a failure.
//!
//! ```text
//! softmshv -- target/debug/deps/conformance_memory-…     # softmshv over /dev/kvm
//! target/debug/deps/conformance_memory-…                 # the device of this machine, if it has one
//! ```

pub mod api;
pub mod child;
pub mod guest;
pub mod image;
pub mod message;
pub mod payload;
pub mod raw;
pub mod reg;
pub mod requires;
pub mod vm;
