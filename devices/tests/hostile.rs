//! Every device under drivers that do anything. The fuzzers in `fuzz` go on from here.

use devices::virtio::{VirtioDevice, rng::Rng};
use driver::drive;

/// How many drivers a device meets.
const DRIVERS: u64 = 500;
const STEPS: usize = 300;

/// Has devices meet drivers of no plan, but always the same ones.
fn survive<D: VirtioDevice>(device: impl Fn() -> D) {
    for seed in 1..=DRIVERS {
        // Marsaglia's xorshift.
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let program: Vec<u8> = std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        })
        .take(STEPS)
        .collect();
        drive(device(), &program);
    }
}

#[test]
fn the_entropy_device_survives() {
    survive(|| Rng::open("/dev/zero".as_ref()).expect("/dev/zero"));
}
