//! The control queue of the network device: what it answers, and that it does what it says.

mod net_common;

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    time::Duration,
};

use devices::virtio::{
    VirtioDevice,
    net::{Net, Settings, backend::HEADER, mac::MacAddr},
};
use driver::{Guest, Ring};
use net_common::*;

const OK: u8 = 0;
const ERR: u8 = 1;

const RX: u8 = 0;
const MAC: u8 = 1;
const VLAN: u8 = 2;
const MULTIQUEUE: u8 = 4;
const OFFLOADS: u8 = 5;

const CTRL_RX: u64 = 1 << 18;
const CTRL_VLAN: u64 = 1 << 19;
const CTRL_RX_EXTRA: u64 = 1 << 20;
const CTRL_MAC_ADDR: u64 = 1 << 23;
const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
const EVERYTHING: u64 = CTRL_VQ | CTRL_RX | CTRL_VLAN | CTRL_RX_EXTRA | CTRL_MAC_ADDR;

const OTHER: MacAddr = MacAddr([2, 0, 0, 0, 0, 0x30]);
const GROUP: MacAddr = MacAddr([1, 0, 0x5e, 0, 0, 1]);

/// A station, its control queue and its peer. There is one pair of queues.
fn station(wanted: u64) -> (Station, Ring, UnixStream) {
    let (cable, peer) = socket_cable();
    let mut station = Station::new(Net::new(settings(), cable), wanted);
    let control = station.guest.ring(2);
    (station, control, peer)
}

fn send(peer: &mut UnixStream, frame: &[u8]) {
    peer.write_all(&(frame.len() as u32).to_be_bytes())
        .expect("a peer");
    peer.write_all(frame).expect("a peer");
}

/// Which of these frames come through.
fn passed(station: &mut Station, peer: &mut UnixStream, frames: &[Vec<u8>]) -> Vec<bool> {
    // One that always does comes last.
    let last = frame(GUEST, 99, 99);
    for frame in frames.iter().chain([&last]) {
        send(peer, frame);
    }
    station.post_many(frames.len() + 1, 1526);
    let mut passed = vec![false; frames.len()];
    loop {
        let received = station.receive().frame;
        if received == last {
            return passed;
        }
        let at = frames.iter().position(|frame| *frame == received);
        passed[at.expect("one of the frames")] = true;
    }
}

fn to(address: MacAddr) -> Vec<u8> {
    frame(address, 60, address.0[5])
}

fn tagged(address: MacAddr, vlan: u16) -> Vec<u8> {
    let mut frame = frame(address, 60, vlan as u8);
    frame[12..14].copy_from_slice(&[0x81, 0]);
    frame[14..16].copy_from_slice(&vlan.to_be_bytes());
    frame
}

fn table(addresses: &[MacAddr]) -> Vec<u8> {
    let mut bytes = (addresses.len() as u32).to_le_bytes().to_vec();
    bytes.extend(addresses.iter().flat_map(|address| address.0));
    bytes
}

#[test]
fn modes_and_tables_decide_what_comes_through() {
    let (mut station, mut control, mut peer) = station(EVERYTHING);
    let all = [to(OTHER), to(GROUP), to(MacAddr::BROADCAST)];
    let mut passes = |station: &mut Station| passed(station, &mut peer, &all);
    assert_eq!(passes(&mut station), [true, true, true]);
    assert_eq!(station.command(&mut control, RX, 0, &[0]), OK);
    assert_eq!(passes(&mut station), [false, false, true]);
    for (number, expected) in [
        (1, [false, true, true]),
        (2, [true, false, true]),
        (5, [false, false, false]),
        (0, [true, true, true]),
    ] {
        assert_eq!(station.command(&mut control, RX, number, &[1]), OK);
        assert_eq!(passes(&mut station), expected, "{number}");
        assert_eq!(station.command(&mut control, RX, number, &[0]), OK);
    }
    let mut tables = table(&[OTHER]);
    tables.extend(table(&[GROUP]));
    assert_eq!(station.command(&mut control, MAC, 0, &tables), OK);
    assert_eq!(passes(&mut station), [true, true, true]);
    let mut tables = table(&[]);
    tables.extend(table(&vec![OTHER; 1000]));
    assert_eq!(station.command(&mut control, MAC, 0, &tables), OK);
    assert_eq!(passes(&mut station), [false, true, true], "all groups");
}

#[test]
fn vlans_are_let_through_by_name() {
    let (mut station, mut control, mut peer) = station(EVERYTHING);
    assert_eq!(station.command(&mut control, RX, 0, &[0]), OK);
    let all = [tagged(GUEST, 7), tagged(GUEST, 8), to(MacAddr::BROADCAST)];
    let mut passes = |station: &mut Station| passed(station, &mut peer, &all);
    assert_eq!(passes(&mut station), [false, false, true]);
    assert_eq!(station.command(&mut control, VLAN, 0, &[7, 0]), OK);
    assert_eq!(passes(&mut station), [true, false, true]);
    assert_eq!(station.command(&mut control, VLAN, 1, &[7, 0]), OK);
    assert_eq!(passes(&mut station), [false, false, true]);
    assert_eq!(station.command(&mut control, VLAN, 0, &[0, 0x10]), ERR);
}

#[test]
fn the_driver_chooses_another_address() {
    let (mut station, mut control, mut peer) = station(EVERYTHING);
    assert_eq!(station.guest.config(0, 6), GUEST.0);
    assert_eq!(station.command(&mut control, RX, 0, &[0]), OK);
    assert_eq!(station.command(&mut control, MAC, 1, &OTHER.0), OK);
    assert_eq!(station.guest.config(0, 6), OTHER.0);
    send(&mut peer, &to(GUEST));
    send(&mut peer, &to(OTHER));
    station.post_many(2, 1526);
    assert_eq!(station.receive().frame, to(OTHER));
    station.guest.device.reset();
    assert_eq!(
        station.guest.config(0, 6),
        GUEST.0,
        "until the device is reset"
    );
}

#[test]
fn what_was_not_agreed_on_is_refused() {
    let (mut station, mut control, _peer) = station(CTRL_VQ);
    let tables = [table(&[]), table(&[])].concat();
    for (class, number, data) in [
        (RX, 0, &[1][..]),
        (RX, 2, &[1]),
        (MAC, 0, &tables),
        (MAC, 1, &OTHER.0),
        (VLAN, 0, &[7, 0]),
        (MULTIQUEUE, 0, &[1, 0]),
        (OFFLOADS, 0, &[0; 8]),
    ] {
        let answer = station.command(&mut control, class, number, data);
        assert_eq!(answer, ERR, "{class}/{number}");
    }
}

#[test]
fn malformed_commands_are_refused() {
    let (mut station, mut control, _peer) = station(EVERYTHING | MQ | CTRL_GUEST_OFFLOADS);
    let huge = [&0xffff_ffffu32.to_le_bytes()[..], &[0; 60]].concat();
    let short = [&table(&[OTHER, GROUP])[..12], &[]].concat();
    let half = table(&[OTHER]);
    for (class, number, data) in [
        (RX, 0, &[][..]),
        (RX, 6, &[1]),
        (RX, 255, &[1]),
        (MAC, 0, &[]),
        (MAC, 0, &huge),
        (MAC, 0, &short),
        (MAC, 0, &half),
        (MAC, 1, &OTHER.0[..5]),
        (MAC, 2, &OTHER.0),
        (VLAN, 0, &[7]),
        (VLAN, 2, &[7, 0]),
        (3, 0, &[]),
        (MULTIQUEUE, 0, &[1]),
        (99, 0, &[1; 100]),
    ] {
        let answer = station.command(&mut control, class, number, data);
        assert_eq!(answer, ERR, "{class}/{number} {data:?}");
    }
    let (byte, answers) = (station.guest.place(&[RX]), station.guest.place(&[0xaa; 2]));
    control.add(&[(byte, 1)], &[(answers, 1)]);
    control.add(&[], &[(answers + 1, 1)]);
    control.kick();
    control.wait();
    control.wait();
    assert_eq!(station.guest.read(answers, 2), [ERR; 2]);
    assert_eq!(station.guest.interrupts().reset_count(), 0);
}

#[test]
fn a_command_without_room_for_an_answer_ends_in_a_request_for_a_reset() {
    let (mut station, mut control, _peer) = station(EVERYTHING);
    let command = station.guest.place(&[RX, 0, 1]);
    control.add(&[(command, 3)], &[]);
    control.kick();
    station.guest.wait_for_reset_request();
}

#[test]
fn commands_in_pieces_and_in_a_row() {
    let (mut station, mut control, _peer) = station(EVERYTHING);
    let bytes = [&[MAC, 1][..], &OTHER.0].concat();
    let command = station.guest.place(&bytes);
    let answers = station.guest.place(&[0xaa; 8]);
    for at in 0..8 {
        control.add(
            &[(command, 1), (command + 1, 3), (command + 4, 4)],
            &[(answers + at, 1)],
        );
    }
    control.kick();
    for _ in 0..8 {
        assert_eq!(control.wait().1, 1);
    }
    assert_eq!(station.guest.read(answers, 8), [OK; 8]);
    assert_eq!(station.guest.config(0, 6), OTHER.0);
}

/// A device with two pairs, each with a peer of its own.
fn two_pairs(name: &str) -> (Guest<Net>, [UnixStream; 2]) {
    let (mut cable, first) = socket_cable();
    let (other, second) = socket_cable();
    cable.ports.extend(other.ports);
    let settings = Settings {
        name: name.to_owned(),
        ..settings()
    };
    (Guest::new(Net::new(settings, cable)), [first, second])
}

fn receive_from(peer: &mut UnixStream) -> Option<Vec<u8>> {
    let mut length = [0; 4];
    peer.set_read_timeout(Some(Duration::from_millis(100)))
        .expect("a timeout");
    peer.read_exact(&mut length).ok()?;
    let mut frame = vec![0; u32::from_be_bytes(length) as usize];
    peer.read_exact(&mut frame).expect("a frame");
    Some(frame)
}

#[test]
fn pairs_are_used_when_the_driver_says_so() {
    let (guest, mut peers) = two_pairs("pairs");
    assert_eq!(guest.config(8, 2), [2, 0]);
    assert_eq!(guest.device.queue_sizes(), [256, 256, 256, 256, 64]);
    let mut station = Station::over(guest, CTRL_VQ | MQ);
    let (mut rx, mut tx) = (station.guest.ring(2), station.guest.ring(3));
    let mut control = station.guest.ring(4);
    let mut bytes = vec![0; HEADER];
    bytes.extend(frame(HOST, 60, 1));
    let address = station.guest.place(&bytes);
    let length = bytes.len() as u32;
    let room = station.guest.allocate(2048);

    let send_second = |tx: &mut Ring| {
        tx.add(&[(address, length)], &[]);
        tx.kick();
    };
    send_second(&mut tx);
    rx.add(&[], &[(room, 2048)]);
    rx.kick();
    let incoming = frame(GUEST, 60, 2);
    send(&mut peers[1], &incoming);
    assert_eq!(
        receive_from(&mut peers[1]),
        None,
        "a pair that is not in use"
    );
    assert_eq!((rx.used(), tx.used()), (None, None));
    assert_rests("pairs-q1");

    assert_eq!(station.command(&mut control, MULTIQUEUE, 0, &[2, 0]), OK);
    assert_eq!(receive_from(&mut peers[1]), Some(frame(HOST, 60, 1)));
    tx.wait();
    assert_eq!(rx.wait().1, (HEADER + 60) as u32);

    for count in [0u16, 3, 0x8000, 0xffff] {
        let data = count.to_le_bytes();
        assert_eq!(station.command(&mut control, MULTIQUEUE, 0, &data), ERR);
    }
    send_second(&mut tx);
    assert!(receive_from(&mut peers[1]).is_some(), "still in use");
    tx.wait();

    assert_eq!(station.command(&mut control, MULTIQUEUE, 0, &[1, 0]), OK);
    send_second(&mut tx);
    assert_eq!(receive_from(&mut peers[1]), None);
    station.send([0; HEADER], &frame(HOST, 60, 3));
    assert_eq!(receive_from(&mut peers[0]), Some(frame(HOST, 60, 3)));
}

#[test]
fn a_driver_that_knows_one_pair_finds_its_control_queue() {
    let (guest, _peers) = two_pairs("one");
    let mut station = Station::over(guest, EVERYTHING);
    let mut control = station.guest.ring(2);
    assert_eq!(station.command(&mut control, MAC, 1, &OTHER.0), OK);
    assert_eq!(station.command(&mut control, MULTIQUEUE, 0, &[2, 0]), ERR);
}

#[test]
fn the_mtu_is_told_where_there_is_one() {
    let (cable, _peer) = socket_cable();
    let with_mtu = Settings {
        mtu: Some(9000),
        ..settings()
    };
    let guest = Guest::new(Net::new(with_mtu, cable));
    assert_eq!(guest.device.features() & 1 << 3, 1 << 3);
    assert_eq!(guest.config(10, 2), 9000u16.to_le_bytes());
    assert_eq!(guest.config(10, 8), [0x28, 0x23, 0, 0, 0, 0, 0, 0]);
    assert_eq!(guest.config(u64::MAX, 4), [0; 4]);
    let (cable, _peer) = socket_cable();
    let without = Net::new(settings(), cable);
    assert_eq!(without.features() & 1 << 3, 0);
}
