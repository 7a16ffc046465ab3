//! What a disk counts: reads and writes that were done, and their bytes.

use crate::virtio::{Counters, Lane};

pub(super) const READ_BYTES: usize = 0;
pub(super) const READ_OPS: usize = 1;
pub(super) const WRITE_BYTES: usize = 2;
pub(super) const WRITE_OPS: usize = 3;

const NAMES: [&str; 4] = ["read_bytes", "read_ops", "write_bytes", "write_ops"];

/// The counts of one queue.
pub(super) type Counts = Lane<4>;

/// The counts of so many queues.
pub(super) fn counters(queues: usize) -> Counters<4> {
    Counters::new(NAMES, queues)
}
