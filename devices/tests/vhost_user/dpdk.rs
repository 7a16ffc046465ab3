//! A network card whose back end is DPDK's: its `dpdk-testpmd` answers whoever asks for an address or pings.

use std::{path::Path, process::Stdio};

use crate::back_end::{Program, find, folder, quiet, wait_until};
use devices::virtio::{VirtioDevice, vhost_user::Net};
use driver::{Guest, Ring};

const MAC: [u8; 6] = [2, 0, 0, 1, 2, 3];
/// `VIRTIO_NET_F_MAC`, `VIRTIO_NET_F_STATUS` and `VIRTIO_F_EVENT_IDX`.
const FEATURES: u64 = 1 << 5 | 1 << 16 | 1 << 29;
/// What stands before a frame (`struct virtio_net_hdr_v1`).
const HEADER: usize = 12;
/// Bytes of a buffer for a frame.
const ROOM: u32 = 2048;

const OWN: [u8; 4] = [192, 0, 2, 2];
const OTHER: [u8; 4] = [192, 0, 2, 1];

#[test]
fn it_answers_arp_and_ping() {
    let Some(program) = find("it_answers_arp_and_ping", &["/usr/bin/dpdk-testpmd"]) else {
        return;
    };
    let folder = folder();
    let socket = folder.as_path().join("socket");
    let _back_end = start(&program, &socket);
    wait_until("a socket", || socket.exists());
    let net = Net::connect(socket, MAC, None, 1, 64).expect("a back end");
    let mut guest = Guest::shared(net);
    // One driver after the other, as when a guest is reset.
    for features in [FEATURES, FEATURES & !(1 << 29)] {
        guest.activate(features);
        let mut card = Card {
            receiver: guest.ring(0),
            sender: guest.ring(1),
        };
        let answer = card.ask(&mut guest, &arp());
        assert_eq!(answer[..6], MAC, "to whom");
        let other: [u8; 6] = answer[6..12].try_into().expect("an address");
        assert_eq!(answer[12..14], [8, 6], "ARP");
        assert_eq!(answer[20..22], [0, 2], "an answer");
        assert_eq!(answer[22..28], other);
        assert_eq!(answer[28..32], OTHER);
        for number in 0..200_u16 {
            let length = usize::from(number) * 7;
            let question = ping(other, number, length);
            let answer = card.ask(&mut guest, &question);
            assert_eq!(answer[..12], [MAC, other].concat());
            assert_eq!(answer[26..34], [OTHER, OWN].concat());
            assert_eq!(answer[34], 0, "an answer");
            assert_eq!(answer[38..], question[38..], "its number and data");
        }
        guest.device.reset();
    }
    assert_eq!(guest.interrupts().reset_count(), 0);
}

/// The back end, which listens at `socket`. It wants no huge pages and no cards.
fn start(program: &Path, socket: &Path) -> Program {
    let mut command = quiet(program);
    command.args([
        "--no-huge",
        "--no-pci",
        "--no-shconf",
        "--no-telemetry",
        "-m",
        "128",
        "-l",
        "0,1",
    ]);
    command.arg(format!("--vdev=net_vhost0,iface={}", socket.display()));
    command.args([
        "--",
        "--forward-mode=icmpecho",
        "--auto-start",
        "--total-num-mbufs=2048",
    ]);
    // It ends when it reads anything.
    command.stdin(Stdio::piped());
    Program::start(&mut command)
}

/// The driver's half of a card.
struct Card {
    receiver: Ring,
    sender: Ring,
}

impl Card {
    /// Sends `frame` and waits for one.
    fn ask(&mut self, guest: &mut Guest<Net>, frame: &[u8]) -> Vec<u8> {
        let packet = [&[0; HEADER], frame].concat();
        let (from, to) = (guest.place(&packet), guest.allocate(ROOM.into()));
        self.receiver.add(&[], &[(to, ROOM)]);
        self.receiver.kick();
        self.sender.add(&[(from, packet.len() as u32)], &[]);
        self.sender.kick();
        let length = self.receiver.wait().1 as usize;
        self.sender.wait();
        guest.read(to, length).split_off(HEADER)
    }
}

/// Who has `OTHER`?
fn arp() -> Vec<u8> {
    let mut frame = [[0xff; 6], MAC].concat();
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(MAC);
    frame.extend(OWN);
    frame.extend([0; 6]);
    frame.extend(OTHER);
    frame
}

/// An echo request with `length` bytes of data.
fn ping(to: [u8; 6], number: u16, length: usize) -> Vec<u8> {
    let mut icmp = vec![8, 0, 0, 0, 0, 1];
    icmp.extend(number.to_be_bytes());
    icmp.extend((0..length).map(|at| at as u8));
    let sum = checksum(&icmp);
    icmp[2..4].copy_from_slice(&sum);

    let total = (20 + icmp.len()) as u16;
    let mut ip = vec![0x45, 0];
    ip.extend(total.to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 1, 0, 0]);
    ip.extend(OWN);
    ip.extend(OTHER);
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum);

    [&to[..], &MAC, &[8, 0], &ip, &icmp].concat()
}

/// The Internet's (RFC 1071).
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum = bytes
        .chunks(2)
        .map(|pair| u32::from_be_bytes([0, 0, pair[0], pair.get(1).copied().unwrap_or(0)]))
        .sum::<u32>();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}
