//! The block device, driven by a guest's driver: what it answers, whatever the driver asks (virtio 1.3, section 5.2).

mod disk;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use devices::virtio::{
    VirtioDevice,
    block::backend::{Access, Action, Geometry, NullImage, Unmap},
    rate_limiter::{Bucket, Limits, RateLimiter},
};
use disk::*;
use driver::Raw;

const SIZE: usize = 1 << 20;
const SECTORS: u64 = SIZE as u64 / 512;

fn disk() -> (Disk, Arc<MemoryImage>) {
    let image = MemoryImage::new(SIZE);
    (Disk::new(Arc::new(Shared(Arc::clone(&image)))), image)
}

fn disk_with(image: &Arc<MemoryImage>, features: u64) -> Disk {
    Disk::with(Arc::new(Shared(Arc::clone(image))), config(), features)
}

#[test]
fn the_configuration_says_what_the_disk_is() {
    let (disk, _) = disk();
    let number = |offset, length| {
        let mut bytes = disk.guest.config(offset, length);
        bytes.resize(8, 0);
        u64::from_le_bytes(bytes.try_into().unwrap())
    };
    assert_eq!(number(0, 8), SECTORS, "capacity");
    assert_eq!(number(12, 4), 126, "seg_max");
    assert_eq!(number(20, 4), 512, "blk_size");
    assert_eq!(number(24, 1), 3, "physical_block_exp");
    assert_eq!(number(26, 2), 8, "min_io_size");
    assert_eq!(number(32, 1), 1, "writeback");
    assert_eq!(number(34, 2), 1, "num_queues");
    assert_eq!(number(36, 4), 1 << 22, "max_discard_sectors");
    assert_eq!(number(40, 4), 32, "max_discard_seg");
    assert_eq!(number(44, 4), 8, "discard_sector_alignment");
    assert_eq!(number(48, 4), 1 << 22, "max_write_zeroes_sectors");
    assert_eq!(number(52, 4), 32, "max_write_zeroes_seg");
    assert_eq!(number(56, 1), 1, "write_zeroes_may_unmap");
    assert_eq!(disk.guest.config(58, 20), vec![0; 20]);
    assert_eq!(disk.guest.config(u64::MAX, 4), vec![0; 4]);
}

#[test]
fn features_are_those_of_the_image() {
    let features = |access, discard: Option<u32>, can_write_zeroes, queues| {
        let geometry = Geometry {
            discard_granularity: discard,
            can_write_zeroes,
            ..Geometry::plain()
        };
        let image = Shared(MemoryImage::with(SIZE, access, geometry));
        let config = devices::virtio::block::BlockConfig { queues, ..config() };
        devices::virtio::block::Block::new(Arc::new(image), config)
            .unwrap()
            .features()
    };
    let optional = F_RO | F_MQ | F_DISCARD | F_WRITE_ZEROES;
    assert_eq!(features(Access::ReadWrite, None, false, 1) & optional, 0);
    assert_eq!(
        features(Access::ReadOnly, None, false, 2) & optional,
        F_RO | F_MQ
    );
    assert_eq!(
        features(Access::ReadWrite, Some(512), true, 1) & optional,
        F_DISCARD | F_WRITE_ZEROES
    );
}

#[test]
fn what_is_written_is_read() {
    let (mut disk, image) = disk();
    let before = image.state().bytes.clone();
    assert_eq!(disk.read(0, 512), before[..512]);
    assert_eq!(disk.read(SECTORS - 1, 512), before[SIZE - 512..]);
    let bytes = pattern(64 << 10, 7);
    disk.write(100, &bytes);
    assert_eq!(disk.read(100, bytes.len()), bytes);
    let mut after = before;
    after[51200..51200 + bytes.len()].copy_from_slice(&bytes);
    assert!(image.state().bytes == after, "not a byte elsewhere");
}

#[test]
fn transfers_go_on_where_the_host_has_stopped() {
    let (mut disk, image) = disk();
    for most in [1, 100, 512, 3333, 4096] {
        image.state().most = most;
        let bytes = pattern(8192, most as u64);
        disk.write(3, &bytes);
        assert_eq!(disk.read(3, 8192), bytes, "{most} bytes at once");
    }
}

#[test]
fn nothing_is_read_or_written_outside_of_the_disk() {
    let (mut disk, image) = disk();
    let bytes = vec![1; 1024];
    for sector in [
        SECTORS,
        SECTORS - 1,
        u64::MAX,
        u64::MAX / 512,
        u64::MAX / 512 + 1,
        u64::MAX / 512 - 1,
    ] {
        assert_eq!(disk.request(IN, sector, &[], 1024).0, IOERR, "{sector}");
        assert_eq!(disk.request(OUT, sector, &bytes, 0).0, IOERR, "{sector}");
        assert_eq!(disk.clear(DISCARD, &[(sector, 2, 0)]), IOERR, "{sector}");
        assert_eq!(
            disk.clear(WRITE_ZEROES, &[(sector, 2, 0)]),
            IOERR,
            "{sector}"
        );
    }
    assert_eq!(image.log(), []);
}

#[test]
fn data_is_whole_sectors() {
    let (mut disk, image) = disk();
    for length in [1, 511, 513, 1000] {
        assert_eq!(disk.request(IN, 0, &[], length).0, IOERR);
        assert_eq!(disk.request(OUT, 0, &vec![1; length as usize], 0).0, IOERR);
    }
    assert_eq!(image.log(), []);
    assert_eq!(disk.request(IN, 0, &[], 0), (OK, vec![], 1));
    assert_eq!(disk.request(OUT, 0, &[], 0).0, OK);
}

#[test]
fn a_header_that_is_too_short_is_an_error() {
    let (mut disk, _) = disk();
    let buffer = disk.guest.place(&[0; 16]);
    let status = disk.guest.place(&[0xee]);
    for length in [1, 8, 15] {
        disk.ring.add(&[(buffer, length)], &[(status, 1)]);
        disk.ring.kick();
        assert_eq!(disk.ring.wait().1, 1);
        assert_eq!(disk.guest.read(status, 1), [IOERR]);
    }
    disk.ring.add(&[], &[(status, 1)]);
    disk.ring.kick();
    disk.ring.wait();
    assert_eq!(disk.guest.read(status, 1), [IOERR]);
}

#[test]
fn header_data_and_status_may_share_buffers() {
    let (mut disk, image) = disk();
    let first = image.state().bytes[..512].to_vec();
    let request = disk.guest.place(&header(IN, 0));
    let answer = disk.guest.allocate(513);
    // Header in three pieces; data and status in one.
    let pieces = [(request, 3), (request + 3, 12), (request + 15, 1)];
    disk.ring.add(&pieces, &[(answer, 513)]);
    disk.ring.kick();
    assert_eq!(disk.ring.wait().1, 513);
    let bytes = disk.guest.read(answer, 513);
    assert_eq!((&bytes[..512], bytes[512]), (&first[..], OK));
    let mut request = header(OUT, 1).to_vec();
    request.extend(pattern(512, 3));
    let request = disk.guest.place(&request);
    disk.ring.add(&[(request, 528)], &[(answer, 1)]);
    disk.ring.kick();
    disk.ring.wait();
    assert_eq!(image.state().bytes[512..1024], pattern(512, 3));
}

#[test]
fn a_request_without_a_status_ends_in_a_request_for_a_reset() {
    let (mut disk, _) = disk();
    let request = disk.guest.place(&header(OUT, 0));
    let data = disk.guest.allocate(512);
    disk.ring.add(&[(request, 16), (data, 512)], &[]);
    disk.ring.kick();
    disk.guest.wait_for_reset_request();
    assert_eq!(disk.ring.used(), None);
}

#[test]
fn chains_that_break_the_rules_end_in_a_request_for_a_reset() {
    let break_one = |break_it: fn(&mut Disk)| {
        let (mut disk, image) = disk();
        break_it(&mut disk);
        disk.ring.kick();
        disk.guest.wait_for_reset_request();
        assert_eq!(image.log(), []);
        disk.guest.device.reset();
        disk.guest.activate(ALL);
        disk.ring = disk.guest.ring(0);
        assert_eq!(disk.read(0, 512), image.state().bytes[..512], "as new");
    };
    // A chain that follows itself.
    break_one(|disk| {
        disk.ring.write_descriptor(
            5,
            Raw {
                address: 0x10_0000,
                length: 16,
                flags: 1,
                next: 5,
            },
        );
        disk.ring.publish(5);
    });
    // A head that is not there.
    break_one(|disk| disk.ring.publish(999));
    // An index that jumps.
    break_one(|disk| disk.ring.set_available(5000));
    // Buffers that are not memory.
    break_one(|disk| {
        disk.ring.add(&[(u64::MAX - 5, 16)], &[(0x1_0000, 1)]);
    });
    // A buffer to be read behind one to be written.
    break_one(|disk| {
        let raw = |length, flags, next| Raw {
            address: 0x10_0000,
            length,
            flags,
            next,
        };
        disk.ring.write_descriptor(0, raw(16, 1, 1));
        disk.ring.write_descriptor(1, raw(1, 3, 2));
        disk.ring.write_descriptor(2, raw(512, 0, 0));
        disk.ring.publish(0);
    });
    // An indirect table in an indirect table.
    break_one(|disk| {
        let table = disk.guest.allocate(4096);
        let raw = Raw {
            address: table,
            length: 16,
            flags: 4,
            next: 0,
        };
        disk.ring.write_table(table, &[raw]);
        disk.ring.write_descriptor(3, raw);
        disk.ring.publish(3);
    });
}

#[test]
fn a_disk_that_is_read_only_is_not_changed() {
    let image = MemoryImage::with(SIZE, Access::ReadOnly, Geometry::plain());
    let mut disk = disk_with(&image, ALL);
    let before = image.state().bytes.clone();
    assert_eq!(disk.read(8, 512), before[4096..4608]);
    assert_eq!(disk.request(OUT, 0, &[1; 512], 0).0, IOERR);
    assert_eq!(disk.clear(DISCARD, &[(0, 1, 0)]), IOERR);
    assert_eq!(disk.clear(WRITE_ZEROES, &[(0, 1, 0)]), IOERR);
    disk.flush();
    assert!(image.state().bytes == before);
    assert_eq!(image.log(), [Action::Read]);
}

#[test]
fn a_driver_without_flush_gets_its_writes_answered_when_they_are_there() {
    let image = MemoryImage::new(SIZE);
    let mut disk = disk_with(&image, ALL & !F_FLUSH & !F_CONFIG_WCE);
    assert_eq!(disk.guest.config(32, 1), [0], "writeback");
    disk.write(0, &[1; 512]);
    assert_eq!(image.log(), [Action::Write, Action::Flush]);
    disk.read(0, 512);
    assert_eq!(disk.clear(DISCARD, &[(0, 8, 0), (8, 8, 0)]), OK);
    assert_eq!(
        image.log()[2..],
        [
            Action::Read,
            Action::Discard,
            Action::Discard,
            Action::Flush
        ]
    );
}

#[test]
fn the_write_cache_is_switched_by_the_driver() {
    let (mut disk, image) = disk();
    disk.write(0, &[1; 512]);
    disk.guest.device.write_config(32, &[0]);
    assert_eq!(disk.guest.config(32, 1), [0]);
    disk.write(0, &[2; 512]);
    // Neither of these is a switch.
    disk.guest.device.write_config(32, &[7]);
    disk.guest.device.write_config(32, &[1, 0]);
    disk.guest.device.write_config(0, &[1]);
    disk.guest.device.write_config(u64::MAX, &[1]);
    disk.write(0, &[3; 512]);
    disk.guest.device.write_config(32, &[1]);
    disk.write(0, &[4; 512]);
    let flushed = [Action::Write, Action::Flush];
    assert_eq!(
        image.log(),
        [&[Action::Write][..], &flushed, &flushed, &[Action::Write]].concat()
    );
    disk.guest.device.write_config(32, &[0]);
    disk.guest.device.reset();
    assert_eq!(disk.guest.config(32, 1), [1]);
}

#[test]
fn a_flush_is_answered_when_the_host_has_done_it() {
    let (mut disk, image) = disk();
    image.state().held = true;
    let request = disk.guest.place(&header(FLUSH, 0));
    let status = disk.guest.place(&[0xee]);
    disk.ring.add(&[(request, 16)], &[(status, 1)]);
    disk.ring.kick();
    while image.log() != [Action::Flush] {
        thread::yield_now();
    }
    assert_eq!(disk.ring.used(), None);
    image.release();
    assert_eq!(disk.ring.wait().1, 1);
    assert_eq!(disk.guest.read(status, 1), [OK]);
}

#[test]
fn the_serial_names_the_disk() {
    let (mut disk, _) = disk();
    let mut serial = b"rota-disk".to_vec();
    serial.resize(20, 0);
    assert_eq!(disk.request(GET_ID, 0, &[], 20), (OK, serial.clone(), 21));
    // Somebody asks for less, somebody for more.
    assert_eq!(disk.request(GET_ID, 0, &[], 4).1, b"rota");
    serial.resize(32, 0);
    assert_eq!(disk.request(GET_ID, 0, &[], 32).1, serial);
}

#[test]
fn segments_are_discarded_and_zeroed() {
    let (mut disk, image) = disk();
    let before = image.state().bytes.clone();
    assert_eq!(
        disk.clear(DISCARD, &[(8, 8, 0), (0, 0, 0), (32, 16, 0)]),
        OK
    );
    assert_eq!(disk.clear(WRITE_ZEROES, &[(64, 1, 0), (66, 2, 1)]), OK);
    assert_eq!(
        image.state().log,
        [
            (Action::Discard, 8 * 512, 8 * 512),
            (Action::Discard, 32 * 512, 16 * 512),
            (Action::WriteZeroes(Unmap::Forbidden), 64 * 512, 512),
            (Action::WriteZeroes(Unmap::Allowed), 66 * 512, 1024),
        ]
    );
    assert_eq!(disk.read(65, 512), before[65 * 512..66 * 512]);
    assert_eq!(disk.read(66, 1024), [0; 1024]);
}

#[test]
fn segments_that_break_the_rules_are_refused() {
    let (mut disk, image) = disk();
    assert_eq!(disk.clear(DISCARD, &[]), IOERR);
    assert_eq!(disk.request(DISCARD, 0, &[0; 15], 0).0, IOERR);
    assert_eq!(disk.request(DISCARD, 0, &[0; 17], 0).0, IOERR);
    assert_eq!(disk.clear(DISCARD, &[(0, 1, 0); 33]), IOERR);
    assert_eq!(disk.clear(DISCARD, &[(0, 1, 1)]), UNSUPP, "unmap");
    assert_eq!(disk.clear(WRITE_ZEROES, &[(0, 1, 2)]), UNSUPP);
    assert_eq!(disk.clear(WRITE_ZEROES, &[(0, u32::MAX, 0)]), IOERR);
    assert_eq!(image.log(), []);
}

#[test]
fn more_than_the_announced_sectors_are_not_zeroed_at_once() {
    let mut disk = Disk::new(Arc::new(NullImage(1 << 40)));
    assert_eq!(disk.clear(WRITE_ZEROES, &[(0, 1 << 22, 0)]), OK);
    assert_eq!(disk.clear(WRITE_ZEROES, &[(0, (1 << 22) + 1, 0)]), IOERR);
}

#[test]
fn zeroes_stay_in_place_where_space_cannot_be_given_back() {
    let (mut disk, image) = disk();
    image.state().fail = Some((
        |action| action == Action::WriteZeroes(Unmap::Allowed),
        libc::EOPNOTSUPP,
    ));
    assert_eq!(disk.clear(WRITE_ZEROES, &[(0, 8, 1)]), OK);
    assert_eq!(
        image.log(),
        [
            Action::WriteZeroes(Unmap::Allowed),
            Action::WriteZeroes(Unmap::Forbidden)
        ]
    );
    assert_eq!(disk.read(0, 4096), [0; 4096]);
}

#[test]
fn a_disk_that_is_not_sparse_keeps_its_space() {
    let image = MemoryImage::new(SIZE);
    let config = devices::virtio::block::BlockConfig {
        unmap: Unmap::Forbidden,
        ..config()
    };
    let mut disk = Disk::with(Arc::new(Shared(Arc::clone(&image))), config, ALL);
    assert_eq!(disk.guest.device.features() & F_DISCARD, 0);
    assert_eq!(disk.guest.config(36, 12), [0; 12]);
    assert_eq!(disk.guest.config(56, 1), [0], "write_zeroes_may_unmap");
    assert_eq!(disk.clear(DISCARD, &[(0, 8, 0)]), UNSUPP);
    assert_eq!(disk.clear(WRITE_ZEROES, &[(0, 8, 1)]), OK);
    assert_eq!(image.log(), [Action::WriteZeroes(Unmap::Forbidden)]);
}

#[test]
fn what_was_not_agreed_on_or_is_not_known_is_not_supported() {
    let image = MemoryImage::new(SIZE);
    let mut disk = disk_with(&image, ALL & !F_DISCARD & !F_WRITE_ZEROES);
    for kind in [2, 3, 5, 10, DISCARD, WRITE_ZEROES, 14, 15, u32::MAX] {
        let bytes = segment(0, 1, 0);
        assert_eq!(disk.request(kind, 0, &bytes, 0).0, UNSUPP, "{kind}");
    }
    assert_eq!(image.log(), []);
}

#[test]
fn errors_of_the_host_reach_the_driver() {
    let (mut disk, image) = disk();
    let fail = |errno| image.state().fail = Some((|_| true, errno));
    fail(libc::EIO);
    assert_eq!(disk.request(IN, 0, &[], 512).0, IOERR);
    assert_eq!(disk.request(OUT, 0, &[1; 512], 0).0, IOERR);
    assert_eq!(disk.request(FLUSH, 0, &[], 0).0, IOERR);
    assert_eq!(disk.clear(DISCARD, &[(0, 1, 0)]), IOERR);
    fail(libc::EAGAIN);
    assert_eq!(disk.request(IN, 0, &[], 512).0, IOERR);
    fail(libc::EOPNOTSUPP);
    assert_eq!(disk.clear(DISCARD, &[(0, 1, 0)]), UNSUPP);
    assert_eq!(disk.clear(WRITE_ZEROES, &[(0, 1, 1)]), UNSUPP);
    assert_eq!(disk.request(IN, 0, &[], 512).0, IOERR);
    image.state().fail = None;
    disk.write(0, &[1; 512]);
}

#[test]
fn an_image_that_was_cut_off_gives_errors() {
    let folder = Folder::new();
    let path = folder.file("image", &vec![1; 64 << 10]);
    let mut disk = Disk::open(&devices::virtio::block::image::ImageOptions::new(&path));
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(32 << 10).unwrap();
    assert_eq!(disk.read(63, 512), [1; 512]);
    assert_eq!(disk.request(IN, 64, &[], 512).0, IOERR);
    assert_eq!(disk.request(IN, 63, &[], 1024).0, IOERR);
}

#[test]
fn requests_in_indirect_tables_are_done() {
    let (mut disk, image) = disk();
    let first = image.state().bytes[..4096].to_vec();
    let request = disk.guest.place(&header(IN, 0));
    let status = disk.guest.place(&[0xee]);
    let data = disk.guest.allocate(4096);
    let table = disk.guest.allocate(4096);
    let pieces: Vec<(u64, u32)> = (0..32).map(|at| (data + at * 128, 128)).collect();
    let writable = [&pieces[..], &[(status, 1)]].concat();
    let head = disk.ring.add_indirect(table, &[(request, 16)], &writable);
    disk.ring.kick();
    assert_eq!(disk.ring.wait(), (head, 4097));
    assert_eq!(disk.guest.read(data, 4096), first);
}

#[test]
fn each_queue_does_its_own_requests() {
    let image = MemoryImage::new(SIZE);
    let config = devices::virtio::block::BlockConfig {
        queues: 4,
        ..config()
    };
    let mut disk = Disk::with(Arc::new(Shared(Arc::clone(&image))), config, ALL);
    assert_eq!(disk.guest.config(34, 2), [4, 0]);
    let mut rings: Vec<_> = (1..4).map(|index| disk.guest.ring(index)).collect();
    for round in 0..50u64 {
        for (index, ring) in (1u64..).zip(&mut rings) {
            let sector = 100 * index + round;
            let request = disk.guest.place(&header(OUT, sector));
            let data = disk.guest.place(&[(index + round) as u8; 512]);
            let status = disk.guest.place(&[0xee]);
            ring.add(&[(request, 16), (data, 512)], &[(status, 1)]);
            ring.kick();
        }
        disk.write(round, &[round as u8; 512]);
        for ring in &mut rings {
            ring.wait();
        }
    }
    for round in 0..50 {
        assert_eq!(disk.read(round, 512), [round as u8; 512]);
        for index in 1..4 {
            let expected = [(index + round) as u8; 512];
            assert_eq!(disk.read(100 * index + round, 512), expected);
        }
    }
}

#[test]
fn a_full_queue_of_requests_is_answered_with_few_interrupts() {
    for features in [ALL, ALL | EVENT_IDX] {
        let image = MemoryImage::new(SIZE);
        let mut disk = disk_with(&image, features);
        image.state().held = true;
        let mut statuses = Vec::new();
        for sector in 0..42 {
            let request = disk.guest.place(&header(IN, sector));
            let data = disk.guest.allocate(512);
            let status = disk.guest.place(&[0xee]);
            disk.ring.add(&[(request, 16)], &[(data, 512), (status, 1)]);
            statuses.push((status, data));
        }
        disk.ring.set_used_event(41);
        disk.ring.kick();
        while image.log().len() < 42 {
            thread::yield_now();
        }
        image.release();
        for _ in 0..42 {
            disk.ring.wait();
        }
        for (sector, (status, data)) in statuses.iter().enumerate() {
            assert_eq!(disk.guest.read(*status, 1), [OK]);
            let bytes = image.state().bytes[sector * 512..][..512].to_vec();
            assert_eq!(disk.guest.read(*data, 512), bytes);
        }
        let count = disk.guest.interrupts().wait_until(
            || Some(disk.guest.interrupts().used_count(0)).filter(|count| *count > 0),
            |_| "no interrupt".to_owned(),
        );
        assert_eq!(count, 1);
    }
}

#[test]
fn a_driver_that_wants_no_interrupts_gets_none() {
    let (mut disk, _) = disk();
    disk.ring.set_no_interrupt(true);
    disk.read(0, 512);
    assert_eq!(disk.guest.interrupts().used_count(0), 0);
    disk.ring.set_no_interrupt(false);
    disk.read(0, 512);
    disk.guest.interrupts().wait_until(
        || (disk.guest.interrupts().used_count(0) == 1).then_some(()),
        |_| "no interrupt".to_owned(),
    );
}

#[test]
fn a_chain_that_is_made_available_again_and_again_does_no_harm() {
    let (mut disk, image) = disk();
    let request = disk.guest.place(&header(IN, 0));
    let data = disk.guest.allocate(512);
    let status = disk.guest.allocate(1);
    image.state().held = true;
    let head = disk.ring.add(&[(request, 16)], &[(data, 512), (status, 1)]);
    for _ in 1..disk.ring.size() {
        disk.ring.publish(head);
    }
    disk.ring.kick();
    while image.log().len() < usize::from(disk.ring.size()) {
        thread::yield_now();
    }
    // There is no slot left for these.
    for _ in 0..50 {
        disk.ring.publish(head);
    }
    disk.ring.kick();
    thread::sleep(Duration::from_millis(10));
    assert_eq!(image.log().len(), usize::from(disk.ring.size()));
    image.release();
    disk.guest.interrupts().wait_until(
        || (disk.ring.used_index() == disk.ring.size() + 50).then_some(()),
        |_| "not all are answered".to_owned(),
    );
    assert_eq!(disk.guest.interrupts().reset_count(), 0);
}

#[test]
fn a_reset_waits_for_what_is_in_flight() {
    let (mut disk, image) = disk();
    image.state().held = true;
    let request = disk.guest.place(&header(IN, 0));
    let data = disk.guest.allocate(512);
    let status = disk.guest.place(&[0xee]);
    disk.ring.add(&[(request, 16)], &[(data, 512), (status, 1)]);
    disk.ring.kick();
    while image.log().is_empty() {
        thread::yield_now();
    }
    let released = Arc::new(AtomicBool::new(false));
    let releaser = thread::spawn({
        let (image, released) = (Arc::clone(&image), Arc::clone(&released));
        move || {
            thread::sleep(Duration::from_millis(50));
            released.store(true, Ordering::SeqCst);
            image.release();
        }
    });
    disk.guest.device.reset();
    assert!(released.load(Ordering::SeqCst), "the job was not done yet");
    releaser.join().unwrap();
    assert_eq!(disk.ring.used(), None, "nobody is told");
    assert_eq!(disk.guest.read(status, 1), [0xee]);
    disk.guest.activate(ALL);
    disk.ring = disk.guest.ring(0);
    disk.read(0, 512);
}

#[test]
fn a_disk_can_be_reset_while_its_driver_never_stops_asking() {
    let mut disk = Disk::new(Arc::new(NullImage(1 << 30)));
    let request = disk.guest.place(&header(IN, 0));
    let data = disk.guest.allocate(512);
    let status = disk.guest.allocate(1);
    let head = disk.ring.add(&[(request, 16)], &[(data, 512), (status, 1)]);
    disk.ring.kick();
    let stop = Arc::new(AtomicBool::new(false));
    let mut ring = disk.ring;
    let driver = thread::spawn({
        let stop = Arc::clone(&stop);
        move || {
            let mut published = 1u16;
            while !stop.load(Ordering::Relaxed) {
                if published.wrapping_sub(ring.used_index()) < ring.size() {
                    ring.publish(head);
                    published = published.wrapping_add(1);
                    ring.kick();
                }
            }
        }
    });
    thread::sleep(Duration::from_millis(50));
    disk.guest.device.reset();
    stop.store(true, Ordering::Relaxed);
    driver.join().unwrap();
}

#[test]
fn the_size_changes_while_the_disk_is_used() {
    let (mut disk, image) = disk();
    let resizer = disk.guest.device.resizer();
    assert_eq!(disk.request(IN, SECTORS, &[], 512).0, IOERR);
    assert_eq!(resizer.resize(2 * SIZE as u64).unwrap(), 2 * SIZE as u64);
    assert_eq!(disk.guest.interrupts().config_count(), 1);
    assert_eq!(disk.guest.config(0, 8), (2 * SECTORS).to_le_bytes());
    assert_eq!(disk.read(SECTORS, 512), [0; 512]);
    // Nothing has changed, so nobody is told.
    resizer.refresh().unwrap();
    assert_eq!(disk.guest.interrupts().config_count(), 1);
    image.state().bytes.truncate(SIZE / 2 + 100);
    assert_eq!(resizer.refresh().unwrap(), SIZE as u64 / 2);
    assert_eq!(disk.guest.interrupts().config_count(), 2);
    assert_eq!(disk.request(IN, SECTORS / 2, &[], 512).0, IOERR);
    disk.guest.device.reset();
    assert_eq!(resizer.resize(SIZE as u64).unwrap(), SIZE as u64);
    assert_eq!(disk.guest.interrupts().config_count(), 2);
}

#[test]
fn the_rate_is_limited_by_requests_and_by_bytes() {
    let hour = Duration::from_secs(3600);
    let bucket = |size| {
        Some(Bucket {
            size,
            one_time_burst: 0,
            refill_time: hour,
        })
    };
    for (limits, expected) in [
        (
            Limits {
                operations: bucket(5),
                bytes: None,
            },
            5,
        ),
        (
            Limits {
                operations: None,
                bytes: bucket(3 * 512),
            },
            3,
        ),
    ] {
        let image = MemoryImage::new(SIZE);
        let config = devices::virtio::block::BlockConfig {
            limits: RateLimiter::new(&limits),
            ..config()
        };
        let mut disk = Disk::with(Arc::new(Shared(Arc::clone(&image))), config, ALL);
        let request = disk.guest.place(&header(IN, 0));
        let data = disk.guest.allocate(512);
        let status = disk.guest.allocate(1);
        for _ in 0..20 {
            disk.ring.add(&[(request, 16)], &[(data, 512), (status, 1)]);
            disk.ring.kick();
        }
        for _ in 0..expected {
            disk.ring.wait();
        }
        thread::sleep(Duration::from_millis(20));
        assert_eq!(disk.ring.used(), None);
        assert_eq!(image.log().len(), expected);
        // A request that waits for its time is not in the way.
        disk.guest.device.reset();
    }
}

#[test]
fn what_the_rate_has_stopped_goes_on() {
    let image = MemoryImage::new(SIZE);
    let config = devices::virtio::block::BlockConfig {
        limits: RateLimiter::new(&Limits {
            operations: Some(Bucket {
                size: 1,
                one_time_burst: 0,
                refill_time: Duration::from_millis(1),
            }),
            bytes: None,
        }),
        ..config()
    };
    let mut disk = Disk::with(Arc::new(Shared(Arc::clone(&image))), config, ALL);
    let request = disk.guest.place(&header(IN, 0));
    let data = disk.guest.allocate(512);
    let status = disk.guest.allocate(1);
    for _ in 0..20 {
        disk.ring.add(&[(request, 16)], &[(data, 512), (status, 1)]);
    }
    disk.ring.kick();
    for _ in 0..20 {
        disk.ring.wait();
    }
}

#[test]
fn direct_io_takes_whole_blocks_and_any_buffer() {
    let geometry = Geometry {
        block_size: 4096,
        memory_alignment: 512,
        ..Geometry::plain()
    };
    let image = MemoryImage::with(SIZE, Access::ReadWrite, geometry);
    let mut disk = disk_with(&image, ALL);
    // Half blocks and half offsets.
    assert_eq!(disk.request(IN, 0, &[], 512).0, IOERR);
    assert_eq!(disk.request(IN, 1, &[], 4096).0, IOERR);
    // The buffers of these are odd, and there is more than the detour takes at once.
    let bytes = pattern(1 << 19, 9);
    let pieces = 1 << 16;
    for (index, piece) in bytes.chunks(pieces).enumerate() {
        disk.write((index * pieces / 512) as u64, piece);
    }
    assert!(disk.read(0, 1 << 19) == bytes);
    assert!(image.state().bytes[..1 << 19] == bytes);
    assert!(image.state().log.iter().all(|entry| entry.2 <= 256 << 10));
}

#[test]
fn a_disk_ends_with_a_whole_block() {
    let image = MemoryImage::new(SIZE);
    image.state().bytes.truncate(1000);
    let disk = disk_with(&image, ALL);
    assert_eq!(disk.guest.config(0, 8), 1u64.to_le_bytes());
}

#[test]
fn what_was_read_and_written_is_counted() {
    let (mut disk, _image) = disk();
    let counted = |disk: &Disk| {
        let counters = disk.guest.device.counters().expect("counters");
        counters.counts()
    };
    assert_eq!(counted(&disk).len(), 4);
    disk.write(0, &[1; 1024]);
    disk.read(0, 512);
    disk.read(1, 4096);
    disk.flush();
    let expected = [
        ("read_bytes", 512 + 4096),
        ("read_ops", 2),
        ("write_bytes", 1024),
        ("write_ops", 1),
    ];
    assert_eq!(counted(&disk), expected);
    // What fails is not done.
    let (status, ..) = disk.request(0, SECTORS, &[], 512);
    assert_eq!(status, 1);
    assert_eq!(counted(&disk), expected);
    // A new driver is no new device.
    disk.guest.device.reset();
    assert_eq!(counted(&disk), expected);
}
