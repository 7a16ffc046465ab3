//! Persistent memory, driven by a guest's driver.

use std::{
    fs::{File, OpenOptions},
    path::PathBuf,
};

use devices::virtio::pmem::{Persistence, Pmem};
use driver::{Guest, Ring};

const START: u64 = 1 << 40;
const SIZE: u64 = 4 << 20;

fn guest(persistence: Persistence) -> Guest<Pmem> {
    let mut guest = Guest::new(Pmem::new(START, SIZE, persistence).expect("a device"));
    guest.activate(0);
    guest
}

/// Makes a request available that is not kicked for; returns where the answer goes.
fn request(guest: &mut Guest<Pmem>, ring: &mut Ring, what: &[u8]) -> u64 {
    let (readable, writable) = (guest.place(what), guest.place(&[0x55; 8]));
    ring.add(&[(readable, what.len() as u32)], &[(writable, 4)]);
    writable
}

fn file(name: &str) -> (File, PathBuf) {
    let path = std::env::temp_dir().join(format!("rota-pmem-{name}-{}", std::process::id()));
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)
        .unwrap();
    (file, path)
}

#[test]
fn the_guest_finds_its_memory() {
    let guest = guest(Persistence::Discarded);
    assert_eq!(
        guest.config(0, 17),
        [&START.to_le_bytes()[..], &SIZE.to_le_bytes(), &[0]].concat()
    );
    for (start, size) in [
        (START, 0),
        (START, SIZE + 4096),
        (START + 4096, SIZE),
        (!(SIZE - 1), SIZE),
    ] {
        assert!(Pmem::new(start, size, Persistence::Discarded).is_err());
    }
}

#[test]
fn flushes_are_answered() {
    let (file, path) = file("flush");
    for persistence in [Persistence::File(file), Persistence::Discarded] {
        let mut guest = guest(persistence);
        let mut ring = guest.ring(0);
        let answers: Vec<u64> = (0..20)
            .map(|_| request(&mut guest, &mut ring, &[0; 4]))
            .collect();
        ring.kick();
        for answer in answers {
            assert_eq!(ring.wait().1, 4);
            assert_eq!(guest.read(answer, 5), [0, 0, 0, 0, 0x55]);
        }
    }
    std::fs::remove_file(path).unwrap();
}

#[test]
fn a_flush_that_fails_is_said_to_fail() {
    // A pipe cannot be written to disk.
    let mut ends = [0; 2];
    // SAFETY: there is room for two descriptors, which are nobody else's.
    let end = unsafe {
        assert_eq!(libc::pipe(ends.as_mut_ptr()), 0);
        use std::os::fd::FromRawFd;
        libc::close(ends[1]);
        File::from_raw_fd(ends[0])
    };
    let mut guest = guest(Persistence::File(end));
    let mut ring = guest.ring(0);
    let answer = request(&mut guest, &mut ring, &[0; 4]);
    ring.kick();
    ring.wait();
    assert_eq!(guest.read(answer, 4), [0xff; 4]);
}

#[test]
fn other_requests_are_refused_and_short_ones_too() {
    let mut guest = guest(Persistence::Discarded);
    let mut ring = guest.ring(0);
    for what in [&[1, 0, 0, 0][..], &[0, 0, 0]] {
        let answer = request(&mut guest, &mut ring, what);
        ring.kick();
        ring.wait();
        assert_eq!(guest.read(answer, 4), [0xff; 4]);
    }
    assert_eq!(guest.interrupts().reset_count(), 0);
    let at = guest.place(&[0; 8]);
    ring.add(&[(at, 4)], &[(at, 3)]);
    ring.kick();
    guest.wait_for_reset_request();
}
