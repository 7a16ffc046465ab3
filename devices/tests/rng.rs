//! The entropy device, driven by a guest's driver.

use devices::virtio::rng::Rng;
use driver::{Guest, Raw};

fn guest() -> Guest<Rng> {
    let mut guest = Guest::new(Rng::open("/dev/urandom".as_ref()).expect("urandom"));
    guest.activate(0);
    guest
}

#[test]
fn buffers_are_filled() {
    let mut guest = guest();
    let (first, second) = (guest.allocate(4096), guest.allocate(4096));
    let mut ring = guest.ring(0);
    let head = ring.add(&[], &[(first, 100), (second, 28)]);
    ring.kick();
    assert_eq!(ring.wait(), (head, 128));
    let (front, back) = (guest.read(first, 101), guest.read(second, 29));
    assert!(front[..100].iter().any(|byte| *byte != 0));
    assert!(back[..28].iter().any(|byte| *byte != 0));
    assert_eq!((front[100], back[28]), (0, 0), "not a byte too many");
}

#[test]
fn a_device_that_was_reset_starts_again() {
    let mut guest = guest();
    for _ in 0..3 {
        let buffer = guest.allocate(64);
        let mut ring = guest.ring(0);
        let head = ring.add(&[], &[(buffer, 64)]);
        ring.kick();
        assert_eq!(ring.wait(), (head, 64));
        use devices::virtio::VirtioDevice;
        guest.device.reset();
        ring.add(&[], &[(buffer, 64)]);
        ring.kick();
        assert_eq!(ring.used(), None);
        guest.activate(0);
    }
}

#[test]
fn a_chain_that_leads_nowhere_ends_in_a_request_for_a_reset() {
    let mut guest = guest();
    let mut ring = guest.ring(0);
    // A descriptor that follows itself.
    ring.write_descriptor(
        7,
        Raw {
            address: 0x10_0000,
            length: 4,
            flags: 3,
            next: 7,
        },
    );
    ring.publish(7);
    ring.kick();
    guest.wait_for_reset_request();
    assert_eq!(ring.used(), None);
}
