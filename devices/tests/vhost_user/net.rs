//! A network card whose packets a small back end of ours sends back, driven by a guest's driver.

use std::path::PathBuf;

use crate::back_end::{folder, wait_until};
use crate::echo::Echo;
use devices::virtio::{
    VirtioDevice,
    vhost_user::{Error, Net},
};
use driver::{Guest, Ring};

const MAC: [u8; 6] = [2, 0, 0, 1, 2, 3];
/// `VIRTIO_NET_F_*`.
const MTU: u64 = 1 << 3;
const MAC_BIT: u64 = 1 << 5;
const STATUS: u64 = 1 << 16;
const CTRL_VQ: u64 = 1 << 17;
const MQ: u64 = 1 << 22;
/// `VIRTIO_F_EVENT_IDX`.
const EVENT_IDX: u64 = 1 << 29;

fn connect(socket: PathBuf, pairs: u16) -> Net {
    Net::connect(socket, MAC, Some(9000), pairs, 64).expect("a back end")
}

/// A packet out of `sender` and into `receiver`.
#[track_caller]
fn round_trip(guest: &mut Guest<Net>, receiver: &mut Ring, sender: &mut Ring, packet: &[u8]) {
    let (from, to) = (guest.place(packet), guest.allocate(2048));
    receiver.add(&[], &[(to, 2048)]);
    let head = sender.add(&[(from, packet.len() as u32)], &[]);
    sender.kick();
    assert_eq!(sender.wait(), (head, 0));
    assert_eq!(receiver.wait().1, packet.len() as u32);
    assert_eq!(guest.read(to, packet.len()), packet);
}

fn is_up(guest: &Guest<Net>) -> bool {
    guest.config(6, 2) == [1, 0]
}

#[test]
fn packets_go_out_and_come_in() {
    let folder = folder();
    let echo = Echo::listen(&folder.as_path().join("socket"), 1);
    let mut guest = Guest::shared(connect(echo.socket.clone(), 1));
    assert_eq!(guest.device.features(), MTU | MAC_BIT | STATUS);
    assert_eq!(guest.device.ring_features(), EVENT_IDX, "and not indirect");
    let mut config = MAC.to_vec();
    config.extend([1, 0, 1, 0]);
    config.extend(9000_u16.to_le_bytes());
    assert_eq!(guest.config(0, 12), config);
    for features in [0, EVENT_IDX] {
        guest.activate(features | MAC_BIT | STATUS);
        let (mut receiver, mut sender) = (guest.ring(0), guest.ring(1));
        for length in [60, 1514] {
            round_trip(&mut guest, &mut receiver, &mut sender, &vec![7; length]);
        }
        guest.device.reset();
    }
    assert_eq!(guest.interrupts().reset_count(), 0);
}

#[test]
fn pairs_work_when_the_driver_says_that_it_uses_them() {
    let folder = folder();
    let echo = Echo::listen(&folder.as_path().join("socket"), 2);
    let mut guest = Guest::shared(connect(echo.socket.clone(), 2));
    assert_eq!(guest.device.features() & (MQ | CTRL_VQ), MQ | CTRL_VQ);
    guest.activate(MQ | CTRL_VQ);
    let mut control = guest.ring(4);
    let (mut receiver, mut sender) = (guest.ring(2), guest.ring(3));

    let packet = guest.place(&[9; 60]);
    sender.add(&[(packet, 60)], &[]);
    sender.kick();
    let mut ask = |guest: &mut Guest<Net>, bytes: &[u8]| {
        let command = (guest.place(bytes), bytes.len() as u32);
        let answer = guest.place(&[0xff]);
        control.add(&[command], &[(answer, 1)]);
        control.kick();
        control.wait();
        guest.read(answer, 1)[0]
    };
    for bad in [
        &[4, 0, 0, 0][..],
        &[4, 0, 3, 0],
        &[1, 0, 2, 0],
        &[4, 0, 2],
        &[],
    ] {
        assert_eq!(ask(&mut guest, bad), 1, "VIRTIO_NET_ERR for {bad:?}");
    }
    assert_eq!(sender.used(), None, "a pair that the driver does not use");
    assert_eq!(ask(&mut guest, &[4, 0, 2, 0]), 0, "VIRTIO_NET_OK");
    let to = guest.allocate(2048);
    receiver.add(&[], &[(to, 2048)]);
    receiver.kick();
    sender.kick();
    assert_eq!(receiver.wait().1, 60);
    assert_eq!(guest.read(to, 60), [9; 60]);
    sender.wait();
    round_trip(&mut guest, &mut receiver, &mut sender, &[8; 100]);
}

#[test]
fn the_link_is_down_while_the_back_end_is_away() {
    let folder = folder();
    let socket = folder.as_path().join("socket");
    let echo = Echo::listen(&socket, 1);
    let mut guest = Guest::shared(connect(socket.clone(), 1));
    guest.activate(STATUS);
    let (mut receiver, mut sender) = (guest.ring(0), guest.ring(1));
    round_trip(&mut guest, &mut receiver, &mut sender, &[1; 60]);
    assert!(is_up(&guest));
    echo.end();
    wait_until("down", || !is_up(&guest));
    wait_until("told", || guest.interrupts().config_count() == 1);
    let _echo = Echo::listen(&socket, 1);
    // Sent while nobody is there.
    round_trip(&mut guest, &mut receiver, &mut sender, &[2; 60]);
    wait_until("up", || is_up(&guest));
    round_trip(&mut guest, &mut receiver, &mut sender, &[3; 60]);
    assert_eq!(guest.interrupts().reset_count(), 0);
}

#[test]
fn a_back_end_that_restarts_between_two_drivers_is_found_again() {
    let folder = folder();
    let socket = folder.as_path().join("socket");
    let echo = Echo::listen(&socket, 1);
    let mut guest = Guest::shared(connect(socket.clone(), 1));
    echo.end();
    let _echo = Echo::listen(&socket, 1);
    guest.activate(0);
    let (mut receiver, mut sender) = (guest.ring(0), guest.ring(1));
    round_trip(&mut guest, &mut receiver, &mut sender, &[1; 60]);
}

#[test]
fn a_back_end_with_too_few_pairs_is_refused() {
    let folder = folder();
    let echo = Echo::listen(&folder.as_path().join("socket"), 1);
    let error = Net::connect(echo.socket.clone(), MAC, None, 2, 64);
    assert!(matches!(error, Err(Error::Queues { has: 2, wanted: 4 })));
}
