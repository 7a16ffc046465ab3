//! What a network device counts: frames that went through, and their bytes without the header of virtio.

use super::super::{Counters, Lane};

pub(super) const RX_BYTES: usize = 0;
pub(super) const RX_FRAMES: usize = 1;
pub(super) const TX_BYTES: usize = 2;
pub(super) const TX_FRAMES: usize = 3;

const NAMES: [&str; 4] = ["rx_bytes", "rx_frames", "tx_bytes", "tx_frames"];

/// The counts of one pair of queues.
pub type Counts = Lane<4>;

/// The counts of so many pairs.
#[must_use]
pub fn counters(pairs: usize) -> Counters<4> {
    Counters::new(NAMES, pairs)
}
