//! The watchdog, driven by a guest's driver.

use std::{
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use devices::{
    power::{PowerRequest, PowerSwitch},
    virtio::{VirtioDevice, watchdog::Watchdog},
};
use driver::{Guest, Ring};

const TIMEOUT: Duration = Duration::from_millis(300);

#[derive(Default)]
struct Switch(Mutex<Vec<PowerRequest>>);

impl PowerSwitch for Switch {
    fn request(&self, request: PowerRequest) {
        self.0.lock().unwrap().push(request);
    }
}

impl Switch {
    fn requests(&self) -> Vec<PowerRequest> {
        self.0.lock().unwrap().clone()
    }
}

fn guest() -> (Guest<Watchdog>, Arc<Switch>) {
    let switch = Arc::new(Switch::default());
    let mut guest = Guest::new(Watchdog::new(TIMEOUT, Arc::clone(&switch) as _));
    guest.activate(0);
    (guest, switch)
}

fn give_a_sign(guest: &mut Guest<Watchdog>, ring: &mut Ring) {
    let buffer = guest.allocate(1);
    let head = ring.add(&[], &[(buffer, 1)]);
    ring.kick();
    assert_eq!(ring.wait(), (head, 1));
    assert_eq!(guest.read(buffer, 1), [1]);
}

#[test]
fn a_guest_that_stops_giving_signs_of_life_is_reset_once() {
    let (mut guest, switch) = guest();
    let mut ring = guest.ring(0);
    for _ in 0..5 {
        give_a_sign(&mut guest, &mut ring);
        thread::sleep(TIMEOUT / 3);
        assert_eq!(switch.requests(), [], "it lives");
    }
    let deadline = Instant::now() + 20 * TIMEOUT;
    while switch.requests().is_empty() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(5));
    }
    thread::sleep(2 * TIMEOUT);
    assert_eq!(switch.requests(), [PowerRequest::Reset]);
}

#[test]
fn a_guest_that_never_begins_or_has_ended_is_left_alone() {
    let (mut guest, switch) = guest();
    thread::sleep(2 * TIMEOUT);
    let mut ring = guest.ring(0);
    give_a_sign(&mut guest, &mut ring);
    guest.device.reset();
    guest.activate(0);
    thread::sleep(2 * TIMEOUT);
    assert_eq!(switch.requests(), []);
}

#[test]
fn a_sign_of_life_without_a_buffer_ends_in_a_request_for_a_reset() {
    let (mut guest, switch) = guest();
    let mut ring = guest.ring(0);
    let buffer = guest.allocate(1);
    ring.add(&[(buffer, 1)], &[]);
    ring.kick();
    guest.wait_for_reset_request();
    assert_eq!(switch.requests(), []);
}
