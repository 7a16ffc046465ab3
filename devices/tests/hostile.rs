//! Every device under drivers that do anything. The fuzzers in `fuzz` go on from here.

use devices::virtio::VirtioDevice;
use driver::{drive, specimen};

/// How many drivers a device meets.
const DRIVERS: u64 = 500;
const STEPS: usize = 300;

/// Has devices meet drivers of no plan, but always the same ones.
fn survive<D: VirtioDevice>(mut device: impl FnMut() -> D) {
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
    survive(specimen::rng);
}

#[test]
fn the_disk_survives() {
    survive(specimen::block);
}

#[test]
fn the_console_survives() {
    survive(specimen::console);
}

#[test]
fn the_virtio_socket_survives() {
    survive(specimen::vsock);
}

#[test]
fn the_balloon_survives() {
    survive(specimen::balloon);
}

#[test]
fn the_persistent_memory_survives() {
    survive(specimen::pmem);
}

#[test]
fn the_memory_survives() {
    survive(specimen::mem);
}

#[test]
fn the_watchdog_survives() {
    survive(specimen::watchdog);
}

#[test]
fn the_network_card_survives() {
    // The other end of the cable is held for as long as the card is driven.
    let mut end = None;
    survive(|| {
        let (card, peer) = specimen::net();
        end = Some(peer);
        card
    });
    drop(end);
}
