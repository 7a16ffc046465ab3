//! The network device over a stream socket: the queues as a driver and the wire as a peer see them. No privileges needed.

mod net_common;

use std::{
    io::{Read, Write},
    net::Ipv4Addr,
    os::unix::net::UnixStream,
    thread,
    time::{Duration, Instant},
};

use devices::virtio::{
    VirtioDevice,
    net::{
        Net, Settings,
        backend::HEADER,
        stream::passt,
        tap::{Tap, TapSettings},
    },
    rate_limiter::{Bucket, Limits},
};
use driver::Raw;
use net_common::*;
use proptest::prelude::*;

fn station(wanted: u64) -> (Station, UnixStream) {
    station_with(settings(), wanted)
}

fn station_with(settings: Settings, wanted: u64) -> (Station, UnixStream) {
    let (cable, peer) = socket_cable();
    (Station::new(Net::new(settings, cable), wanted), peer)
}

fn named(name: &str) -> Settings {
    Settings {
        name: name.to_owned(),
        ..settings()
    }
}

fn on_wire(frame: &[u8]) -> Vec<u8> {
    let mut bytes = (frame.len() as u32).to_be_bytes().to_vec();
    bytes.extend(frame);
    bytes
}

fn from_wire(peer: &mut UnixStream) -> Vec<u8> {
    let mut length = [0; 4];
    peer.read_exact(&mut length).expect("a length");
    let mut frame = vec![0; u32::from_be_bytes(length) as usize];
    peer.read_exact(&mut frame).expect("a frame");
    frame
}

#[test]
fn frames_go_both_ways() {
    for wanted in [0, MRG_RXBUF, EVENT_IDX, MRG_RXBUF | EVENT_IDX] {
        let (mut station, mut peer) = station(wanted);
        station.post_many(4, 1526);
        for (seed, length) in [(1, 14), (2, 60), (3, 1514)] {
            let sent = frame(HOST, length, seed);
            station.send([0; HEADER], &sent);
            assert_eq!(from_wire(&mut peer), sent);
            let sent = frame(GUEST, length, seed);
            peer.write_all(&on_wire(&sent)).expect("a peer");
            let received = station.receive();
            assert_eq!(received.frame, sent);
            assert_eq!(received.header, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        }
        assert_eq!(station.guest.interrupts().reset_count(), 0);
    }
}

#[test]
fn a_socket_offers_no_offloads() {
    let (station, _peer) = station(u64::MAX);
    use devices::virtio::VirtioDevice;
    let offered = station.guest.device.features();
    let offloads = 0b1111 << 7 | 0b1111 << 11 | 0b111 | 0b111 << 54;
    assert_eq!(offered & offloads, 0);
}

#[test]
fn a_frame_may_be_cut_anywhere_by_the_driver() {
    let (mut station, mut peer) = station(0);
    let sent = frame(HOST, 200, 9);
    for cuts in [vec![5], vec![12], vec![12, 26], vec![1, 2, 3, 11, 13, 211]] {
        station.queue([0; HEADER], &sent, &cuts);
        station.tx.kick();
        station.tx.wait();
        assert_eq!(from_wire(&mut peer), sent, "{cuts:?}");
    }
}

#[test]
fn a_frame_takes_as_many_buffers_as_it_needs() {
    let (mut station, mut peer) = station(MRG_RXBUF);
    station.post_many(200, 13);
    let sent = frame(GUEST, 14 + 1500, 1);
    peer.write_all(&on_wire(&sent)).expect("a peer");
    let received = station.receive();
    assert_eq!(received.frame, sent);
    assert_eq!(received.chains, (HEADER + 1514usize).div_ceil(13));
    // What is left is used for the next one.
    station.post_many(100, 100);
    let sent = frame(GUEST, 900, 2);
    peer.write_all(&on_wire(&sent)).expect("a peer");
    let received = station.receive();
    assert_eq!(received.frame, sent);
    assert!(received.chains > 10, "{}", received.chains);
}

#[test]
fn buffers_of_many_parts_are_filled() {
    let (mut station, mut peer) = station(0);
    for parts in [vec![12, 1514], vec![1, 5, 6, 7, 1000, 1000], vec![100; 20]] {
        station.post(&parts);
        station.rx.kick();
        let sent = frame(GUEST, 1514, parts.len() as u8);
        peer.write_all(&on_wire(&sent)).expect("a peer");
        assert_eq!(station.receive().frame, sent);
    }
}

#[test]
fn a_frame_that_no_buffer_is_large_enough_for_is_lost() {
    let (mut station, mut peer) = station(0);
    station.post_many(2, 200);
    let (long, short) = (frame(GUEST, 189, 1), frame(GUEST, 188, 2));
    peer.write_all(&on_wire(&long)).expect("a peer");
    peer.write_all(&on_wire(&short)).expect("a peer");
    assert_eq!(station.receive().frame, short);
}

#[test]
fn a_frame_that_the_whole_queue_is_too_small_for_is_lost() {
    let small = Settings {
        queue_size: 4,
        ..settings()
    };
    let (mut station, mut peer) = station_with(small, MRG_RXBUF);
    station.post_many(4, 100);
    let (long, short) = (frame(GUEST, 389, 1), frame(GUEST, 388, 2));
    peer.write_all(&on_wire(&long)).expect("a peer");
    peer.write_all(&on_wire(&short)).expect("a peer");
    let received = station.receive();
    assert_eq!((received.frame, received.chains), (short, 4));
}

#[test]
fn without_buffers_frames_wait_and_the_thread_rests() {
    for wanted in [MRG_RXBUF, MRG_RXBUF | EVENT_IDX] {
        let (mut station, mut peer) = station_with(named("starve"), wanted);
        let frames: Vec<_> = (0..20).map(|seed| frame(GUEST, 1000, seed)).collect();
        for frame in &frames {
            peer.write_all(&on_wire(frame)).expect("a peer");
        }
        thread::sleep(Duration::from_millis(20));
        assert_rests("starve-q0");
        // Half a frame's room is not enough either.
        station.post_many(1, 500);
        thread::sleep(Duration::from_millis(20));
        assert_rests("starve-q0");
        assert_eq!(station.try_receive(), None);
        for frame in &frames {
            station.post_many(3, 500);
            assert_eq!(station.receive().frame, *frame);
        }
        drop(station);
    }
}

#[test]
fn the_peer_may_cut_frames_anywhere() {
    let (mut station, mut peer) = station(MRG_RXBUF);
    station.post_many(64, 1526);
    let frames: Vec<_> = (0..5)
        .map(|seed| frame(GUEST, 20 + 13 * usize::from(seed), seed))
        .collect();
    let bytes: Vec<u8> = frames.iter().flat_map(|frame| on_wire(frame)).collect();
    for piece in bytes.chunks(3) {
        peer.write_all(piece).expect("a peer");
        thread::yield_now();
    }
    for frame in &frames {
        assert_eq!(station.receive().frame, *frame);
    }
}

#[test]
fn a_peer_that_reads_slowly_gets_everything() {
    let (mut station, mut peer) = station_with(named("slow"), EVENT_IDX);
    let frames: Vec<_> = (0..200).map(|seed| frame(HOST, 9000, seed)).collect();
    for frame in &frames {
        station.queue([0; HEADER], frame, &[]);
    }
    station.tx.kick();
    thread::sleep(Duration::from_millis(50));
    assert_rests("slow-q0");
    assert!(
        station.tx.used_index() < 200,
        "a socket with so much room tests nothing"
    );
    for frame in &frames {
        assert_eq!(from_wire(&mut peer), *frame);
    }
    for _ in &frames {
        station.tx.wait();
    }
}

#[test]
fn when_the_peer_is_gone_so_is_the_link() {
    let (mut station, peer) = station_with(named("gone"), STATUS);
    assert_eq!(station.guest.config(6, 2), [1, 0]);
    station.post_many(4, 1526);
    drop(peer);
    let interrupts = station.guest.interrupts().clone();
    eventually("no word of the link", || {
        (interrupts.config_count() == 1).then_some(())
    });
    assert_eq!(station.guest.config(6, 2), [0, 0]);
    // What is sent is lost, but does not wait.
    for seed in 0..3 {
        station.send([0; HEADER], &frame(HOST, 100, seed));
    }
    assert_rests("gone-q0");
    assert_eq!(interrupts.config_count(), 1);
    assert_eq!(interrupts.reset_count(), 0);
}

#[test]
fn a_peer_that_leaves_frames_and_a_starving_guest_behind() {
    let (mut station, mut peer) = station_with(named("left"), MRG_RXBUF);
    let sent = frame(GUEST, 500, 1);
    peer.write_all(&on_wire(&sent)).expect("a peer");
    drop(peer);
    thread::sleep(Duration::from_millis(20));
    assert_rests("left-q0");
    station.post_many(4, 1526);
    assert_eq!(station.receive().frame, sent);
    eventually("no word of the link", || {
        (station.guest.config(6, 2) == [0, 0]).then_some(())
    });
}

#[test]
fn a_peer_that_speaks_something_else_is_gone() {
    let (mut station, mut peer) = station(0);
    station.post_many(4, 1526);
    peer.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("a peer");
    eventually("the link stays", || {
        (station.guest.config(6, 2) == [0, 0]).then_some(())
    });
}

#[test]
fn a_frame_that_is_none_is_skipped() {
    let (mut station, mut peer) = station(0);
    station.post_many(4, 1526);
    for length in [0, 1, 13] {
        peer.write_all(&on_wire(&vec![0; length])).expect("a peer");
    }
    let sent = frame(GUEST, 14, 1);
    peer.write_all(&on_wire(&sent)).expect("a peer");
    assert_eq!(station.receive().frame, sent);
}

#[test]
fn frames_too_short_or_too_long_are_not_sent() {
    let (mut station, mut peer) = station(0);
    for length in [0, 13, 65_554, 100_000] {
        station.send([0; HEADER], &vec![0; length]);
    }
    let longest = frame(HOST, 65_553, 1);
    let head = station.queue([0; HEADER], &longest, &[30_000]);
    station.tx.kick();
    assert_eq!(from_wire(&mut peer), longest);
    assert_eq!(station.tx.wait(), (head, 0));
    assert_eq!(station.guest.interrupts().reset_count(), 0);
}

#[test]
fn a_frame_of_thousands_of_parts_is_sent() {
    let large = Settings {
        queue_size: 4096,
        ..settings()
    };
    let (mut station, mut peer) = station_with(large, 0);
    let sent = frame(HOST, 3000, 1);
    let mut bytes = vec![0; HEADER];
    bytes.extend(&sent);
    let address = station.guest.place(&bytes);
    let parts: Vec<_> = (0..bytes.len() as u64)
        .map(|at| (address + at, 1))
        .collect();
    let head = station.tx.add(&parts, &[]);
    station.tx.kick();
    assert_eq!(station.tx.wait(), (head, 0));
    assert_eq!(from_wire(&mut peer), sent);
}

#[test]
fn a_header_too_short_ends_in_a_request_for_a_reset() {
    let (mut station, _peer) = station(0);
    let address = station.guest.place(&[0; 11]);
    station.tx.add(&[(address, 11)], &[]);
    station.tx.kick();
    station.guest.wait_for_reset_request();
}

#[test]
fn a_receive_buffer_too_short_ends_in_a_request_for_a_reset() {
    for wanted in [0, MRG_RXBUF] {
        let (mut station, mut peer) = station(wanted);
        station.post_many(1, 11);
        // The device need not look before there is a frame.
        let _ = peer.write_all(&on_wire(&frame(GUEST, 60, 1)));
        station.guest.wait_for_reset_request();
    }
}

#[test]
fn rings_that_jump_end_in_a_request_for_a_reset() {
    for receive in [true, false] {
        let (station, mut peer) = station(0);
        let ring = if receive { &station.rx } else { &station.tx };
        ring.set_available(0x7000);
        ring.kick();
        let _ = peer.write_all(&on_wire(&frame(GUEST, 60, 1)));
        station.guest.wait_for_reset_request();
    }
}

#[test]
fn chains_that_lead_nowhere_end_in_a_request_for_a_reset() {
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    let raw = |address, length, flags, next| Raw {
        address,
        length,
        flags,
        next,
    };
    for chain in [
        raw(0x10_0000, 100, NEXT, 7),
        raw(0x10_0000, 100, NEXT, 9999),
        raw(u64::MAX, 100, 0, 0),
        raw(0x10_0000, u32::MAX, 0, 0),
    ] {
        for receive in [true, false] {
            let (mut station, mut peer) = station(MRG_RXBUF);
            let ring = if receive {
                &mut station.rx
            } else {
                &mut station.tx
            };
            let write = if receive { WRITE } else { 0 };
            ring.write_descriptor(
                7,
                Raw {
                    flags: chain.flags | write,
                    ..chain
                },
            );
            ring.publish(7);
            ring.kick();
            let _ = peer.write_all(&on_wire(&frame(GUEST, 60, 1)));
            station.guest.wait_for_reset_request();
        }
    }
}

#[test]
fn a_device_that_was_reset_starts_again() {
    let (mut station, mut peer) = station(MRG_RXBUF);
    for seed in 0..5 {
        station.post_many(8, 1526);
        station.send([0; HEADER], &frame(HOST, 100, seed));
        assert_eq!(from_wire(&mut peer), frame(HOST, 100, seed));
        peer.write_all(&on_wire(&frame(GUEST, 100, seed)))
            .expect("a peer");
        assert_eq!(station.receive().frame, frame(GUEST, 100, seed));
        station = station.restart(MRG_RXBUF);
    }
}

#[test]
fn no_frame_is_cut_by_a_reset() {
    // A frame that is half sent when the device is reset has to be sent to its end: the peer counts bytes.
    let (mut station, mut peer) = station(0);
    let frames: Vec<_> = (0..100).map(|seed| frame(HOST, 9000, seed)).collect();
    for frame in &frames {
        station.queue([0; HEADER], frame, &[]);
    }
    station.tx.kick();
    thread::sleep(Duration::from_millis(50));
    let mut station = station.restart(0);
    let last = frame(HOST, 77, 77);
    station.queue([0; HEADER], &last, &[]);
    station.tx.kick();
    let mut count = 0;
    loop {
        let received = from_wire(&mut peer);
        if received == last {
            break;
        }
        assert_eq!(received, frames[count]);
        count += 1;
    }
    assert!(count < 100, "a socket with so much room tests nothing");
}

#[test]
fn rates_are_limited_both_ways() {
    let bucket = Bucket {
        size: 10,
        one_time_burst: 0,
        refill_time: Duration::from_millis(100),
    };
    let limited = Settings {
        limits: Limits {
            operations: Some(bucket),
            bytes: None,
        },
        ..named("rate")
    };
    let (mut station, mut peer) = station_with(limited, MRG_RXBUF);
    // Ten at once, and one more each ten milliseconds.
    let start = Instant::now();
    for seed in 0..30 {
        station.send([0; HEADER], &frame(HOST, 100, seed));
        assert_eq!(from_wire(&mut peer), frame(HOST, 100, seed));
    }
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(190), "{took:?}");
    let start = Instant::now();
    station.post_many(40, 1526);
    for seed in 0..30 {
        peer.write_all(&on_wire(&frame(GUEST, 100, seed)))
            .expect("a peer");
    }
    for seed in 0..30 {
        assert_eq!(station.receive().frame, frame(GUEST, 100, seed));
    }
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(190), "{took:?}");
    assert_rests("rate-q0");
}

#[test]
fn interrupts_come_as_the_driver_asks() {
    let (mut station, mut peer) = station(EVENT_IDX | MRG_RXBUF);
    station.post_many(64, 256);
    // It wants to hear of the sixth chain, and a frame takes two.
    station.rx.set_used_event(5);
    let sent = frame(GUEST, 300, 1);
    let interrupts = station.guest.interrupts().clone();
    for count in 1..=3 {
        assert_eq!(interrupts.used_count(0), 0);
        peer.write_all(&on_wire(&sent)).expect("a peer");
        eventually("no frame", || {
            (station.rx.used_index() == 2 * count).then_some(())
        });
    }
    eventually("no interrupt", || {
        (interrupts.used_count(0) == 1).then_some(())
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_frames_arrive_whole_and_in_order(
        lengths in prop::collection::vec(14usize..20_000, 1..20),
        buffer in 24u32..5000,
        cut in 1usize..3000,
        wanted in prop::sample::select(vec![MRG_RXBUF, MRG_RXBUF | EVENT_IDX]),
    ) {
        let large = Settings { queue_size: 2048, ..settings() };
        let (mut station, mut peer) = station_with(large, wanted);
        let frames: Vec<_> = (0u8..).zip(&lengths).map(|(seed, length)| frame(GUEST, *length, seed)).collect();
        let bytes: Vec<u8> = frames.iter().flat_map(|frame| on_wire(frame)).collect();
        let mut writer = peer.try_clone().expect("a socket");
        let writing = thread::spawn(move || {
            for piece in bytes.chunks(cut) {
                writer.write_all(piece).expect("a peer");
            }
        });
        for frame in &frames {
            let count = (HEADER + frame.len()).div_ceil(buffer as usize);
            for _ in 0..count {
                station.post(&[buffer - 6, 6]);
            }
            station.rx.kick();
            prop_assert_eq!(&station.receive().frame, frame);
        }
        writing.join().expect("a writer");
        for frame in &frames {
            station.queue([0; HEADER], frame, &[3, HEADER + 7]);
            station.tx.kick();
            prop_assert_eq!(&from_wire(&mut peer), frame);
            station.tx.wait();
        }
    }
}

#[test]
fn passt_answers() {
    let test = "passt_answers";
    // SAFETY: the call concerns what this thread and its children see of the network, and no memory.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        println!(
            "SKIP {test}: no network namespace: {}",
            std::io::Error::last_os_error()
        );
        return;
    }
    // passt takes addresses from an interface with a route: here is one that leads nowhere.
    let tap = TapSettings {
        name: Some("uplink".to_owned()),
        address: Some(Ipv4Addr::new(192, 0, 2, 1).into()),
        mask: Some(Ipv4Addr::new(255, 255, 255, 0).into()),
        ..TapSettings::default()
    };
    let uplink = match Tap::open(&tap, 1) {
        Ok(tap) => tap,
        Err(error) => {
            println!("SKIP {test}: {error}");
            return;
        }
    };
    let routed = std::process::Command::new("ip")
        .args(["route", "add", "default", "via", "192.0.2.2"])
        .status();
    if !routed.is_ok_and(|status| status.success()) {
        println!("SKIP {test}: no `ip`");
        return;
    }
    let cable = match passt::start(&["--ipv4-only".to_owned()]) {
        Ok(cable) => cable,
        Err(error) => {
            println!("SKIP {test}: {error}");
            return;
        }
    };
    let mut station = Station::new(Net::new(settings(), cable), MRG_RXBUF);
    station.post_many(16, 1526);
    // Who has the gateway's address?
    let mut question = [0xff; 6].to_vec();
    question.extend(GUEST.0);
    question.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    question.extend(GUEST.0);
    question.extend([192, 0, 2, 1]);
    question.extend([0; 6]);
    question.extend([192, 0, 2, 2]);
    question.extend([0; 18]);
    station.send([0; HEADER], &question);
    let answer = station.receive().frame;
    assert_eq!(answer[..6], GUEST.0);
    assert_eq!(answer[12..14], [8, 6]);
    assert_eq!(answer[20..22], [0, 2], "an answer");
    assert_eq!(answer[28..32], [192, 0, 2, 2]);
    drop((station, uplink));
}

#[test]
fn frames_both_ways_are_counted() {
    let (mut station, mut peer) = station(0);
    station.post_many(4, 2000);
    station.send([0; HEADER], &frame(HOST, 100, 1));
    from_wire(&mut peer);
    for length in [60, 1000] {
        peer.write_all(&on_wire(&frame(GUEST, length, 2)))
            .expect("a peer");
        station.receive();
    }
    let counters = station.guest.device.counters().expect("counters");
    let expected = [
        ("rx_bytes", 1060),
        ("rx_frames", 2),
        ("tx_bytes", 100),
        ("tx_frames", 1),
    ];
    assert_eq!(counters.counts(), expected);
}
