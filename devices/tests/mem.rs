//! Memory that comes and goes, driven by a guest's driver.

use std::{
    io,
    os::unix::fs::MetadataExt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use devices::virtio::{
    HostMemory, VirtioDevice,
    mem::{BLOCK, Backing, Mem, MemError},
};
use driver::{Guest, Ring};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

const INACCESSIBLE: u64 = 1 << 1;
const START: u64 = 1 << 32;
const LENGTH: u64 = 32 << 20;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;

/// A host that can be out of memory.
#[derive(Default)]
struct Host {
    refuses: AtomicBool,
}

impl Backing for Host {
    fn plug(&self, _address: u64, _length: u64) -> io::Result<()> {
        if self.refuses.load(Ordering::Relaxed) {
            Err(io::ErrorKind::OutOfMemory.into())
        } else {
            Ok(())
        }
    }

    fn unplug(&self, address: u64, length: u64) -> io::Result<()> {
        self.plug(address, length)
    }
}

fn guest(requested: u64) -> (Guest<Mem>, Ring, Arc<Host>) {
    let host = Arc::new(Host::default());
    let mut guest = Guest::new(Mem::new(START, LENGTH, requested, Arc::clone(&host) as _).unwrap());
    guest.activate(INACCESSIBLE);
    let ring = guest.ring(0);
    (guest, ring, host)
}

/// Asks, and returns type and state of the answer.
fn ask(guest: &mut Guest<Mem>, ring: &mut Ring, kind: u16, address: u64, count: u16) -> (u16, u16) {
    let mut request = [0; 24];
    request[..2].copy_from_slice(&kind.to_le_bytes());
    request[8..16].copy_from_slice(&address.to_le_bytes());
    request[16..18].copy_from_slice(&count.to_le_bytes());
    let (from, to) = (guest.place(&request), guest.place(&[0x55; 10]));
    let head = ring.add(&[(from, 24)], &[(to, 10)]);
    ring.kick();
    assert_eq!(ring.wait(), (head, 10));
    let answer = guest.read(to, 10);
    assert_eq!(answer[2..8], [0; 6]);
    (
        u16::from_le_bytes([answer[0], answer[1]]),
        u16::from_le_bytes([answer[8], answer[9]]),
    )
}

fn config(guest: &Guest<Mem>) -> Vec<u64> {
    let bytes = guest.config(0, 56);
    let (words, _) = bytes.as_chunks::<8>();
    words.iter().map(|word| u64::from_le_bytes(*word)).collect()
}

#[test]
fn blocks_are_plugged_as_far_as_requested() {
    let (mut guest, mut ring, _) = guest(3 * BLOCK);
    let handle = guest.device.handle();
    assert_eq!(
        config(&guest),
        [BLOCK, 0, START, LENGTH, LENGTH, 0, 3 * BLOCK]
    );
    assert_eq!(ask(&mut guest, &mut ring, PLUG, START + BLOCK, 2), (ACK, 0));
    assert_eq!(handle.plugged(), 2 * BLOCK);
    assert_eq!(
        ask(&mut guest, &mut ring, PLUG, START + 8 * BLOCK, 2),
        (NACK, 0)
    );
    assert_eq!(
        ask(&mut guest, &mut ring, PLUG, START + 8 * BLOCK, 1),
        (ACK, 0)
    );
    assert_eq!(config(&guest)[5..], [3 * BLOCK, 3 * BLOCK]);
    handle.resize(LENGTH).unwrap();
    handle.resize(LENGTH).unwrap();
    assert_eq!(guest.interrupts().config_count(), 1);
    assert_eq!(handle.requested(), LENGTH);
    // Some of these are plugged.
    assert_eq!(ask(&mut guest, &mut ring, PLUG, START, 16), (ERROR, 0));
    assert_eq!(ask(&mut guest, &mut ring, UNPLUG, START, 3), (ERROR, 0));
    assert_eq!(handle.plugged(), 3 * BLOCK);

    assert_eq!(ask(&mut guest, &mut ring, STATE, START, 1), (ACK, 1));
    assert_eq!(
        ask(&mut guest, &mut ring, STATE, START + BLOCK, 2),
        (ACK, 0)
    );
    assert_eq!(ask(&mut guest, &mut ring, STATE, START, 16), (ACK, 2));

    assert_eq!(
        ask(&mut guest, &mut ring, UNPLUG, START + BLOCK, 1),
        (ACK, 0)
    );
    assert_eq!(handle.plugged(), 2 * BLOCK);
    assert_eq!(ask(&mut guest, &mut ring, UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!(handle.plugged(), 0);
    assert_eq!(ask(&mut guest, &mut ring, PLUG, START, 16), (ACK, 0));
    assert_eq!(handle.plugged(), LENGTH);
}

#[test]
fn blocks_that_do_not_exist_are_an_error() {
    let (mut guest, mut ring, _) = guest(LENGTH);
    for (address, count) in [
        (0, 1),
        (START - BLOCK, 1),
        (START - BLOCK, 2),
        (START + 4096, 1),
        (START, 0),
        (START, 17),
        (START + LENGTH, 1),
        (START + LENGTH - BLOCK, 2),
        (!(BLOCK - 1), u16::MAX),
        (u64::MAX, 1),
    ] {
        for kind in [PLUG, UNPLUG, STATE] {
            let answer = ask(&mut guest, &mut ring, kind, address, count);
            assert_eq!(answer, (ERROR, 0), "{kind} {address:#x} {count}");
        }
    }
    assert_eq!(ask(&mut guest, &mut ring, 4, START, 1), (ERROR, 0));
    assert_eq!(guest.device.handle().plugged(), 0);
}

#[test]
fn a_host_that_cannot_is_busy_and_nothing_changes() {
    let (mut guest, mut ring, host) = guest(LENGTH);
    ask(&mut guest, &mut ring, PLUG, START, 2);
    host.refuses.store(true, Ordering::Relaxed);
    assert_eq!(
        ask(&mut guest, &mut ring, PLUG, START + 4 * BLOCK, 1),
        (BUSY, 0)
    );
    assert_eq!(ask(&mut guest, &mut ring, UNPLUG, START, 1), (BUSY, 0));
    assert_eq!(ask(&mut guest, &mut ring, UNPLUG_ALL, 0, 0), (BUSY, 0));
    assert_eq!(guest.device.handle().plugged(), 2 * BLOCK);
    assert_eq!(ask(&mut guest, &mut ring, STATE, START, 2), (ACK, 0));
    assert_eq!(
        ask(&mut guest, &mut ring, STATE, START + 4 * BLOCK, 1),
        (ACK, 1)
    );
}

#[test]
fn what_is_plugged_survives_a_reset() {
    let (mut guest, mut ring, _) = guest(LENGTH);
    ask(&mut guest, &mut ring, PLUG, START, 3);
    guest.device.reset();
    guest.device.handle().resize(BLOCK).unwrap();
    assert_eq!(guest.interrupts().config_count(), 0);
    guest.activate(INACCESSIBLE);
    let mut ring = guest.ring(0);
    assert_eq!(config(&guest)[5..], [3 * BLOCK, BLOCK]);
    assert_eq!(
        ask(&mut guest, &mut ring, PLUG, START + 3 * BLOCK, 1),
        (NACK, 0)
    );
    assert_eq!(ask(&mut guest, &mut ring, UNPLUG, START, 2), (ACK, 0));
}

#[test]
fn a_driver_that_would_touch_unplugged_memory_is_refused() {
    let host = Arc::new(Host::default());
    let mut guest = Guest::new(Mem::new(START, LENGTH, 0, host).unwrap());
    assert!(guest.try_activate(0).is_err());
}

#[test]
fn sizes_are_whole_blocks_and_not_more_than_there_is() {
    let new = |start, length, requested| {
        Mem::new(start, length, requested, Arc::new(Host::default())).map(|_| ())
    };
    assert_eq!(
        new(START + 1, LENGTH, 0),
        Err(MemError::Unaligned(START + 1))
    );
    assert_eq!(new(START, 4096, 0), Err(MemError::Unaligned(4096)));
    assert_eq!(new(START, LENGTH, 1), Err(MemError::Unaligned(1)));
    assert!(matches!(
        new(START, LENGTH, LENGTH + BLOCK),
        Err(MemError::TooMuch { .. })
    ));
    assert!(matches!(
        new(!(BLOCK - 1), 2 * BLOCK, 0),
        Err(MemError::TooMuch { .. })
    ));
}

#[test]
fn a_request_without_room_for_an_answer_ends_in_a_request_for_a_reset() {
    let (mut guest, mut ring, _) = guest(LENGTH);
    let at = guest.place(&[0; 24]);
    ring.add(&[(at, 24)], &[(at, 9)]);
    ring.kick();
    guest.wait_for_reset_request();
}

#[test]
fn unplugged_memory_goes_back_to_the_host() {
    // SAFETY: the name ends with a zero, and the descriptor is nobody else's.
    let file = unsafe {
        use std::os::fd::FromRawFd;
        std::fs::File::from_raw_fd(libc::memfd_create(c"memory".as_ptr(), 0))
    };
    file.set_len(LENGTH).unwrap();
    let region = MmapRegion::from_file(
        FileOffset::new(file.try_clone().unwrap(), 0),
        LENGTH as usize,
    )
    .unwrap();
    let low = GuestRegionMmap::from_range(GuestAddress(0), 1 << 20, None).unwrap();
    let high = GuestRegionMmap::new(region, GuestAddress(START)).unwrap();
    let memory = GuestMemoryMmap::from_regions(vec![low, high]).unwrap();
    let backing = Arc::new(HostMemory::new(&memory).unwrap());
    let device = Mem::new(START, LENGTH, LENGTH, backing).unwrap();
    let mut guest = Guest::with_memory(device, memory.clone());
    guest.activate(INACCESSIBLE);
    let mut ring = guest.ring(0);
    assert_eq!(ask(&mut guest, &mut ring, PLUG, START, 16), (ACK, 0));
    for page in (0..LENGTH).step_by(4096) {
        memory
            .write_slice(&[1], GuestAddress(START + page))
            .unwrap();
    }
    let used = || file.metadata().unwrap().blocks() * 512;
    assert_eq!(used(), LENGTH);
    assert_eq!(
        ask(&mut guest, &mut ring, UNPLUG, START + BLOCK, 4),
        (ACK, 0)
    );
    assert_eq!(used(), LENGTH - 4 * BLOCK);
    assert_eq!(guest.read(START + 5 * BLOCK - 1, 2), [0, 1]);
    assert_eq!(ask(&mut guest, &mut ring, UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!(used(), 0);
}
