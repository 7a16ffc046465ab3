//! The balloon, driven by a guest's driver, on memory whose pages are counted.

use std::{
    fs::File,
    io,
    os::{fd::FromRawFd, unix::fs::MetadataExt},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use devices::virtio::{
    HostMemory, Reclaim, VirtioDevice,
    balloon::{Balloon, BalloonError, BalloonOptions, Statistic},
};
use driver::{Guest, Ring};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap,
    MmapRegion,
};

const STATISTICS: u64 = 1 << 1;
const ON_OOM: u64 = 1 << 2;
const REPORTING: u64 = 1 << 5;
const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;

/// What was taken.
#[derive(Default)]
struct Recorder(Mutex<Vec<(u64, u64)>>);

impl Recorder {
    fn taken(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl Reclaim for Recorder {
    fn reclaim(&self, address: u64, length: u64) -> io::Result<()> {
        self.0.lock().unwrap().push((address, length));
        Err(io::ErrorKind::Unsupported.into())
    }
}

fn recorded(options: BalloonOptions) -> (Guest<Balloon>, Arc<Recorder>) {
    let recorder = Arc::new(Recorder::default());
    let balloon = Balloon::new(options, Arc::clone(&recorder) as _).expect("a balloon");
    (Guest::new(balloon), recorder)
}

fn numbers(pages: &[u32]) -> Vec<u8> {
    pages.iter().flat_map(|page| page.to_le_bytes()).collect()
}

fn inflate(guest: &mut Guest<Balloon>, ring: &mut Ring, pages: &[u32]) {
    let at = guest.place(&numbers(pages));
    let head = ring.add(&[(at, 4 * pages.len() as u32)], &[]);
    ring.kick();
    assert_eq!(ring.wait(), (head, 0));
}

/// How many bytes of the `length` at `address` the host has memory for.
fn resident(address: *mut u8, length: u64) -> u64 {
    let mut pages = vec![0u8; (length / PAGE) as usize];
    // SAFETY: the range is mapped, and there is a byte for each of its pages.
    let result = unsafe { libc::mincore(address.cast(), length as usize, pages.as_mut_ptr()) };
    assert_eq!(result, 0);
    pages.iter().filter(|page| **page & 1 != 0).count() as u64 * PAGE
}

fn on_host_memory(memory: &GuestMemoryMmap) -> Guest<Balloon> {
    let options = BalloonOptions {
        free_page_reporting: true,
        ..BalloonOptions::default()
    };
    let reclaim = Arc::new(HostMemory::new(memory).unwrap());
    let balloon = Balloon::new(options, reclaim).unwrap();
    let mut guest = Guest::with_memory(balloon, memory.clone());
    guest.activate(STATISTICS | REPORTING);
    guest
}

/// Fills memory from 16 MiB on.
fn fill(memory: &GuestMemoryMmap) {
    for page in (16 * MIB..64 * MIB).step_by(PAGE as usize) {
        memory.write_slice(&[7; 8], GuestAddress(page)).unwrap();
    }
}

#[test]
fn private_memory_goes_back_to_the_host() {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap();
    let host = memory.iter().next().unwrap().as_ptr();
    fill(&memory);
    let mut guest = on_host_memory(&memory);
    let (mut ring, mut reports) = (guest.ring(0), guest.ring(3));
    let before = resident(host, 64 * MIB);
    let pages: Vec<u32> = (16 * MIB / PAGE..32 * MIB / PAGE)
        .map(|page| page as u32)
        .collect();
    for piece in pages.chunks(256) {
        inflate(&mut guest, &mut ring, piece);
    }
    let inflated = resident(host, 64 * MIB);
    assert!(
        before - inflated > 15 * MIB,
        "{before} bytes before, {inflated} after"
    );
    assert_eq!(guest.read(16 * MIB, 8), [0; 8]);
    assert_eq!(guest.read(32 * MIB, 8), [7; 8]);

    // The guest tells of free memory; what is less than a page stays.
    let head = reports.add(
        &[],
        &[
            (32 * MIB, 16 << 20),
            (48 * MIB, 4000),
            (48 * MIB + 5000, 4000),
        ],
    );
    reports.kick();
    assert_eq!(reports.wait(), (head, 0));
    let reported = resident(host, 64 * MIB);
    assert!(
        inflated - reported > 15 * MIB,
        "{inflated} bytes before, {reported} after"
    );
    assert_eq!(guest.read(48 * MIB - PAGE, 8), [0; 8]);
    assert_eq!(guest.read(48 * MIB, 8), [7; 8]);
    assert_eq!(guest.read(48 * MIB + PAGE, 8), [7; 8]);
}

#[test]
fn shared_memory_goes_back_to_the_host_too() {
    // SAFETY: the name ends with a zero, and the descriptor is nobody else's.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"memory".as_ptr(), 0)) };
    // The memory does not begin where the file does.
    file.set_len(96 << 20).unwrap();
    let region = MmapRegion::from_file(
        FileOffset::new(file.try_clone().unwrap(), 32 << 20),
        64 << 20,
    )
    .unwrap();
    let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
    let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
    fill(&memory);
    let mut guest = on_host_memory(&memory);
    let mut ring = guest.ring(0);
    let used = || file.metadata().unwrap().blocks() * 512;
    let before = used();
    let pages: Vec<u32> = (16 * MIB / PAGE..32 * MIB / PAGE)
        .map(|page| page as u32)
        .collect();
    for piece in pages.chunks(256) {
        inflate(&mut guest, &mut ring, piece);
    }
    let after = used();
    assert!(
        before - after > 15 * MIB,
        "{before} bytes before, {after} after"
    );
    assert_eq!(guest.read(16 * MIB, 8), [0; 8]);
    assert_eq!(guest.read(32 * MIB, 8), [7; 8]);
    assert_eq!(guest.read(16 * MIB - PAGE, 1).len(), 1);
}

#[test]
fn numbers_outside_memory_take_nothing() {
    let memory = GuestMemoryMmap::from_ranges(&[
        (GuestAddress(0), 64 << 20),
        (GuestAddress(128 << 20), 4 << 20),
    ])
    .unwrap();
    fill(&memory);
    let mut guest = on_host_memory(&memory);
    let mut ring = guest.ring(0);
    inflate(
        &mut guest,
        &mut ring,
        &[u32::MAX, u32::MAX - 1, 64 << 8, 0x7fff_ffff, (64 << 8) - 1],
    );
    assert_eq!(guest.read(64 * MIB - PAGE, 8), [0; 8]);
    assert_eq!(guest.read(63 * MIB, 8), [7; 8]);
    assert_eq!(guest.interrupts().reset_count(), 0);
}

#[test]
fn pages_that_follow_each_other_go_together() {
    let (mut guest, recorder) = recorded(BalloonOptions::default());
    guest.activate(STATISTICS);
    let mut ring = guest.ring(0);
    inflate(&mut guest, &mut ring, &[12, 10, 11, 10, 20, u32::MAX]);
    assert_eq!(
        recorder.taken(),
        [
            (10 * PAGE, 3 * PAGE),
            (20 * PAGE, PAGE),
            (u64::from(u32::MAX) * PAGE, PAGE)
        ]
    );
    // In several buffers, and with a number that is not whole.
    let at = guest.place(&numbers(&(100..900).collect::<Vec<u32>>()));
    ring.add(&[(at, 3), (at + 3, 3000), (at + 3003, 198)], &[]);
    ring.kick();
    ring.wait();
    assert_eq!(recorder.taken(), [(100 * PAGE, 800 * PAGE)]);
    // Getting pages back asks nothing of the host.
    let mut deflate = guest.ring(1);
    inflate(&mut guest, &mut deflate, &[10, 11]);
    assert_eq!(recorder.taken(), []);
}

#[test]
fn the_size_is_set_through_the_handle() {
    let (mut guest, _) = recorded(BalloonOptions {
        size: 8 * MIB + 5,
        ..BalloonOptions::default()
    });
    let handle = guest.device.handle();
    assert_eq!(guest.config(0, 8), [0, 8, 0, 0, 0, 0, 0, 0]);
    assert_eq!(handle.target(), 8 * MIB);
    guest.activate(STATISTICS);
    handle.resize(16 * MIB).unwrap();
    handle.resize(16 * MIB).unwrap();
    assert_eq!(guest.interrupts().config_count(), 1);
    assert_eq!(guest.config(0, 4), [0, 16, 0, 0]);
    guest.device.write_config(4, &[0x34, 0x12, 0, 0]);
    assert_eq!(handle.actual(), 0x1234 * PAGE);
    // Neither the target nor anything behind the end can be written.
    guest.device.write_config(0, &[9; 5]);
    guest.device.write_config(7, &[0; 300]);
    guest.device.write_config(u64::MAX, &[1, 2]);
    assert_eq!(guest.config(0, 8), [0, 16, 0, 0, 9, 0x12, 0, 0]);
    assert!(matches!(
        handle.resize(u64::MAX),
        Err(BalloonError::TooLarge(u64::MAX))
    ));
    guest.device.reset();
    assert_eq!(handle.actual(), 0);
    assert_eq!(handle.target(), 16 * MIB);
}

#[test]
fn features_are_those_asked_for() {
    for (options, features, queues) in [
        (BalloonOptions::default(), STATISTICS, 3),
        (
            BalloonOptions {
                deflate_on_oom: true,
                free_page_reporting: true,
                size: 0,
            },
            STATISTICS | ON_OOM | REPORTING,
            4,
        ),
    ] {
        let (guest, _) = recorded(options);
        assert_eq!(guest.device.features(), features);
        assert_eq!(guest.device.queue_sizes().len(), queues);
    }
}

#[test]
fn a_queue_moves_up_when_the_one_before_it_is_not_wanted() {
    let (mut guest, recorder) = recorded(BalloonOptions {
        free_page_reporting: true,
        ..BalloonOptions::default()
    });
    guest.activate(REPORTING);
    let mut reports = guest.ring(2);
    reports.add(&[], &[(3 * MIB, 8192)]);
    reports.kick();
    reports.wait();
    assert_eq!(recorder.taken(), [(3 * MIB, 8192)]);
}

#[test]
fn statistics_come_when_asked_for() {
    let (mut guest, _) = recorded(BalloonOptions::default());
    guest.activate(STATISTICS);
    let handle = guest.device.handle();
    assert_eq!(handle.latest(), None);
    assert_eq!(handle.statistics(Duration::from_millis(20)), None);
    let mut ring = guest.ring(2);
    let entry = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
    let form = |free: u64| {
        [
            entry(4, free),
            entry(5, 1 << 40),
            entry(3, u64::MAX),
            entry(0xffff, 1),
            vec![0, 0, 1],
        ]
        .concat()
    };
    let at = guest.place(&form(1000));
    let length = form(0).len() as u32;
    // The driver hands its buffer in at once; the device keeps it.
    let head = ring.add(&[(at, length)], &[]);
    ring.kick();
    guest.interrupts().wait_until(
        || handle.latest(),
        |_| "no statistics of the beginning".to_owned(),
    );
    assert_eq!(ring.used(), None);
    let asker = {
        let handle = handle.clone();
        thread::spawn(move || handle.statistics(Duration::from_secs(10)))
    };
    assert_eq!(ring.wait(), (head, 0));
    guest
        .memory()
        .write_slice(&form(2000), GuestAddress(at))
        .unwrap();
    ring.add(&[(at, length)], &[]);
    ring.kick();
    let answer = asker.join().unwrap().expect("an answer");
    let all: Vec<_> = answer.iter().collect();
    assert_eq!(all, [(Statistic::Free, 2000), (Statistic::Total, 1 << 40)]);
    assert_eq!(handle.latest(), Some(answer));
    assert_eq!(answer.get(Statistic::MinorFaults), None);

    // A second buffer, which no driver has, gives the first back; and no reset leaves one behind.
    let second = ring.add(&[(at, length)], &[]);
    ring.kick();
    assert_ne!(ring.wait().0, second);
    guest.device.reset();
    guest.activate(STATISTICS);
    let mut ring = guest.ring(2);
    assert_eq!(handle.statistics(Duration::from_millis(50)), None);
    assert_eq!(ring.used(), None);
}

#[test]
fn requests_that_name_too_many_pages_end_in_a_request_for_a_reset() {
    let (mut guest, recorder) = recorded(BalloonOptions::default());
    guest.activate(STATISTICS);
    let mut ring = guest.ring(0);
    ring.add(&[(0, 300 << 10)], &[]);
    ring.kick();
    guest.wait_for_reset_request();
    assert_eq!(ring.used(), None);
    assert_eq!(recorder.taken(), []);
    guest.device.reset();
    guest.activate(STATISTICS);
    let mut ring = guest.ring(0);
    inflate(&mut guest, &mut ring, &[1]);
}
