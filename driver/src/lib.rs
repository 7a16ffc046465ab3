//! The guest's side of virtio, on shared memory and without a guest: what drives Rota's devices in tests, benchmarks and
//! fuzzers.
//!
//! [`Guest`] is a machine with some memory and one device in it. It lays out rings, activates the device and takes its
//! interrupts; a [`Ring`] is one of its queues, filled as an ordinary driver would fill it, or as none ever should. [`drive()`] is a
//! driver that bytes lead, for fuzzing, and a [`specimen`] what it does it to.
//!
//! ```
//! use devices::virtio::rng::Rng;
//! use driver::Guest;
//!
//! let mut guest = Guest::new(Rng::open("/dev/urandom".as_ref()).unwrap());
//! guest.activate(0);
//! let buffer = guest.allocate(64);
//! let mut ring = guest.ring(0);
//! let head = ring.add(&[], &[(buffer, 64)]);
//! ring.kick();
//! assert_eq!(ring.wait(), (head, 64));
//! ```

mod drive;
mod guest;
mod ring;
pub mod specimen;

pub use drive::drive;
pub use guest::{Guest, Interrupts};
pub use ring::{Raw, Ring};
