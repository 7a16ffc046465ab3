//! The network device at tap interfaces of the host, each test in a network namespace of its own.

mod net_common;

use std::{
    fs::{self, OpenOptions},
    net::{Ipv4Addr, UdpSocket},
    os::fd::AsRawFd,
    time::Duration,
};

use devices::virtio::{
    VirtioDevice,
    net::{
        Net, Settings,
        backend::HEADER,
        mac::MacAddr,
        tap::{Tap, TapError, TapSettings},
        vhost::{self, Vhost},
    },
};
use net_common::*;

const CSUM: u64 = 1;
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;
const HOST_TSO4: u64 = 1 << 11;
const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;

const NEEDS_CSUM: u8 = 1;
const GSO_TCPV4: u8 = 1;

/// The host's Ethernet address on the first interface.
const NEAR: MacAddr = MacAddr([2, 0, 0, 0, 1, 1]);
const HOST_IP: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const GUEST_IP: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
/// The same on the second.
const FAR: MacAddr = MacAddr([2, 0, 0, 0, 1, 2]);
const FAR_HOST_IP: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const FAR_GUEST_IP: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);

/// Gives this thread, and those it starts, a network of its own. Says why it cannot, if so.
fn isolate(test: &str) -> bool {
    // SAFETY: the call concerns what this thread sees of the network, and no memory.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        println!(
            "SKIP {test}: no network namespace: {}",
            std::io::Error::last_os_error()
        );
        return false;
    }
    if let Err(error) = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
    {
        println!("SKIP {test}: no tap interfaces: {error}");
        return false;
    }
    // Nothing but what the tests send is wanted on the interfaces.
    for setting in ["default/disable_ipv6", "all/disable_ipv6"] {
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{setting}"), "1");
    }
    true
}

fn near() -> TapSettings {
    TapSettings {
        name: Some("near".to_owned()),
        address: Some(HOST_IP.into()),
        mask: Some(Ipv4Addr::new(255, 255, 255, 0).into()),
        mac: Some(NEAR),
        mtu: None,
    }
}

fn far() -> TapSettings {
    TapSettings {
        name: Some("far".to_owned()),
        address: Some(FAR_HOST_IP.into()),
        mac: Some(FAR),
        ..near()
    }
}

fn station(settings: &TapSettings, wanted: u64) -> Station {
    let tap = Tap::open(settings, 1).expect("a tap interface");
    let net = Net::new(net_common::settings(), tap.cable());
    let mut station = Station::new(net, wanted);
    station.post_many(64, 2048);
    station
}

fn sum(bytes: &[u8], start: u32) -> u32 {
    let mut sum = start;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([
            pair[0],
            pair.get(1).copied().unwrap_or(0),
        ]));
    }
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum
}

/// The sum over what UDP and TCP take from the IP header.
fn pseudo(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, length: usize) -> u32 {
    let mut bytes = [from.octets(), to.octets()].concat();
    bytes.extend([0, protocol]);
    bytes.extend((length as u16).to_be_bytes());
    sum(&bytes, 0)
}

/// What of a frame goes into its checksum.
#[derive(Clone, Copy)]
enum Checksum {
    Whole,
    /// Just the pseudo header: the rest is to be added by somebody else.
    Begun,
    Wrong,
}

fn ip(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0];
    packet.extend((20 + payload.len() as u16).to_be_bytes());
    packet.extend([0, 1, 0x40, 0, 64, protocol, 0, 0]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    let checksum = !(sum(&packet, 0) as u16);
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    packet.extend(payload);
    packet
}

fn ethernet(from: MacAddr, to: MacAddr, kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = [to.0, from.0].concat();
    frame.extend(kind.to_be_bytes());
    frame.extend(payload);
    frame
}

fn fill_checksum(
    segment: &mut [u8],
    at: usize,
    protocol: u8,
    route: (Ipv4Addr, Ipv4Addr),
    how: Checksum,
) {
    let begun = pseudo(route.0, route.1, protocol, segment.len());
    let checksum = match how {
        Checksum::Whole => !(sum(segment, begun) as u16),
        Checksum::Begun => begun as u16,
        Checksum::Wrong => (!(sum(segment, begun) as u16)).wrapping_add(0x101),
    };
    segment[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
}

fn udp(data: &[u8], how: Checksum) -> Vec<u8> {
    let mut segment = Vec::new();
    segment.extend(4000u16.to_be_bytes());
    segment.extend(5000u16.to_be_bytes());
    segment.extend((8 + data.len() as u16).to_be_bytes());
    segment.extend([0, 0]);
    segment.extend(data);
    fill_checksum(&mut segment, 6, 17, (GUEST_IP, HOST_IP), how);
    ethernet(GUEST, NEAR, 0x0800, &ip(GUEST_IP, HOST_IP, 17, &segment))
}

fn checksum_header(flags: u8, offset: u16) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[0] = flags;
    if flags != 0 {
        header[6..8].copy_from_slice(&34u16.to_le_bytes());
        header[8..10].copy_from_slice(&offset.to_le_bytes());
    }
    header
}

/// The next frame that is not about addresses; questions about them are answered.
fn receive(station: &mut Station, own: Ipv4Addr) -> Packet {
    loop {
        let packet = station.receive();
        station.post_many(packet.chains, 2048);
        if packet.frame[12..14] != [0x08, 0x06] {
            return packet;
        }
        let mut answer = packet.frame[14..42].to_vec();
        answer[7] = 2;
        let (asker, asked) = (packet.frame[22..32].to_vec(), &packet.frame[38..42]);
        if asked != own.octets() {
            continue;
        }
        answer[8..14].copy_from_slice(&GUEST.0);
        answer[14..18].copy_from_slice(asked);
        answer[18..28].copy_from_slice(&asker);
        let to = MacAddr(packet.frame[6..12].try_into().expect("six bytes"));
        let frame = ethernet(GUEST, to, 0x0806, &answer);
        station.send([0; HEADER], &frame);
    }
}

#[test]
fn frames_go_both_ways() {
    if !isolate("frames_go_both_ways") {
        return;
    }
    for wanted in [0, MRG_RXBUF, MRG_RXBUF | EVENT_IDX] {
        let mut station = station(&near(), wanted);
        let socket = UdpSocket::bind((HOST_IP, 5000)).expect("a socket");
        socket
            .set_read_timeout(Some(Duration::from_secs(10)))
            .expect("a timeout");
        let mut bytes = [0; 2048];
        for length in [1, 100, 1400] {
            let data: Vec<u8> = (0..length).map(|at| at as u8).collect();
            station.send([0; HEADER], &udp(&data, Checksum::Whole));
            let (count, from) = socket.recv_from(&mut bytes).expect("data");
            assert_eq!(&bytes[..count], data);
            assert_eq!(from, (GUEST_IP, 4000).into());
            socket.send_to(&data, from).expect("a send");
            let packet = receive(&mut station, GUEST_IP);
            assert_eq!(&packet.frame[42..42 + length], data);
            assert_eq!(packet.header[0], 0, "nothing is left to the guest");
            let segment = &packet.frame[34..42 + length];
            let begun = pseudo(HOST_IP, GUEST_IP, 17, segment.len());
            assert_eq!(sum(segment, begun), 0xffff);
        }
    }
}

#[test]
fn tiny_buffers_take_a_frame_of_the_host_together() {
    if !isolate("tiny_buffers_take_a_frame_of_the_host_together") {
        return;
    }
    let tap = Tap::open(&near(), 1).expect("a tap interface");
    let mut station = Station::new(
        Net::new(settings(), tap.cable()),
        MRG_RXBUF | GUEST_CSUM | GUEST_TSO4,
    );
    let socket = UdpSocket::bind((HOST_IP, 5000)).expect("a socket");
    let data: Vec<u8> = (0..1400u16).map(|at| (at / 3) as u8).collect();
    // A neighbour that needs no asking.
    station.post_many(20, 64);
    station.send([0; HEADER], &udp(b"hello", Checksum::Whole));
    socket
        .send_to(&data, (GUEST_IP, 4000))
        .expect("a question first");
    let question = station.receive();
    assert_eq!(question.frame[12..14], [8, 6]);
    let mut answer = question.frame[14..42].to_vec();
    answer[7] = 2;
    answer[8..14].copy_from_slice(&GUEST.0);
    answer[14..18].copy_from_slice(&GUEST_IP.octets());
    answer[18..28].copy_from_slice(&question.frame[22..32]);
    station.send([0; HEADER], &ethernet(GUEST, NEAR, 0x0806, &answer));
    // Twenty small buffers are not enough: the frame waits, and is whole when there are more.
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(station.try_receive(), None);
    station.post_many(20, 64);
    let packet = station.receive();
    assert_eq!(&packet.frame[42..], data);
    assert_eq!(packet.chains, (HEADER + 42 + 1400usize).div_ceil(64));
    assert_eq!(station.guest.interrupts().reset_count(), 0);
}

#[test]
fn checksums_are_left_to_the_other_side() {
    if !isolate("checksums_are_left_to_the_other_side") {
        return;
    }
    let mut station = station(
        &near(),
        MRG_RXBUF | CSUM | GUEST_CSUM | CTRL_VQ | CTRL_GUEST_OFFLOADS,
    );
    let mut control = station.guest.ring(2);
    let socket = UdpSocket::bind((HOST_IP, 5000)).expect("a socket");
    socket
        .set_read_timeout(Some(Duration::from_secs(10)))
        .expect("a timeout");
    let mut bytes = [0; 2048];
    // A wrong one is refused by the host, one that is only begun is not, if the header says so.
    station.send([0; HEADER], &udp(b"wrong", Checksum::Wrong));
    station.send([0; HEADER], &udp(b"begun, not said", Checksum::Begun));
    station.send(
        checksum_header(NEEDS_CSUM, 6),
        &udp(b"begun", Checksum::Begun),
    );
    let (count, from) = socket.recv_from(&mut bytes).expect("data");
    assert_eq!(&bytes[..count], b"begun");
    let check = |station: &mut Station, flags: u8| {
        socket.send_to(b"answer", from).expect("a send");
        let packet = receive(station, GUEST_IP);
        assert_eq!(packet.header[0] & NEEDS_CSUM, flags);
        let segment = &packet.frame[34..48];
        let begun = pseudo(HOST_IP, GUEST_IP, 17, segment.len());
        let whole = sum(segment, begun) == 0xffff;
        assert_eq!(whole, flags == 0);
    };
    check(&mut station, NEEDS_CSUM);
    // The driver does not want to any more, and then again.
    let offloads = |bits: u64| bits.to_le_bytes();
    assert_eq!(station.command(&mut control, 5, 0, &offloads(0)), 0);
    check(&mut station, 0);
    assert_eq!(station.command(&mut control, 5, 0, &offloads(1 << 1)), 0);
    check(&mut station, NEEDS_CSUM);
    let answer = station.command(&mut control, 5, 0, &offloads(1 << 1 | 1 << 7));
    assert_eq!(answer, 1, "not agreed on");
}

fn tcp(data: &[u8], how: Checksum) -> Vec<u8> {
    let mut segment = Vec::new();
    segment.extend(4000u16.to_be_bytes());
    segment.extend(5000u16.to_be_bytes());
    segment.extend(1_000_000u32.to_be_bytes());
    segment.extend(1u32.to_be_bytes());
    segment.extend([0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend(data);
    let route = (GUEST_IP, FAR_GUEST_IP);
    fill_checksum(&mut segment, 16, 6, route, how);
    ethernet(GUEST, NEAR, 0x0800, &ip(route.0, route.1, 6, &segment))
}

fn segmentation(size: u16) -> [u8; HEADER] {
    let mut header = checksum_header(NEEDS_CSUM, 16);
    header[1] = GSO_TCPV4;
    header[2..4].copy_from_slice(&54u16.to_le_bytes());
    header[4..6].copy_from_slice(&size.to_le_bytes());
    header
}

/// Two guests with the host as the router between them.
fn routed(test: &str, wanted: u64) -> Option<(Station, Station)> {
    if !isolate(test) {
        return None;
    }
    if let Err(error) = fs::write("/proc/sys/net/ipv4/ip_forward", "1") {
        println!("SKIP {test}: no forwarding: {error}");
        return None;
    }
    let near = station(&near(), CSUM | HOST_TSO4);
    let far = station(&far(), wanted);
    Some((near, far))
}

#[test]
fn the_host_cuts_segments_for_a_guest_that_takes_none() {
    let test = "the_host_cuts_segments_for_a_guest_that_takes_none";
    let Some((mut near, mut far)) = routed(test, MRG_RXBUF) else {
        return;
    };
    let data: Vec<u8> = (0..60_000u32).map(|at| (at / 7) as u8).collect();
    near.send(segmentation(1448), &tcp(&data, Checksum::Begun));
    let mut seen: Vec<u8> = Vec::new();
    while seen.len() < data.len() {
        let packet = receive(&mut far, FAR_GUEST_IP);
        assert_eq!(packet.header[..2], [0, 0]);
        let end = 14 + usize::from(u16::from_be_bytes([packet.frame[16], packet.frame[17]]));
        let segment = &packet.frame[34..end];
        let begun = pseudo(GUEST_IP, FAR_GUEST_IP, 6, segment.len());
        assert_eq!(sum(segment, begun), 0xffff, "the checksum is whole");
        let sequence = u32::from_be_bytes(segment[4..8].try_into().expect("four bytes"));
        assert_eq!(sequence as usize, 1_000_000 + seen.len());
        assert!(segment.len() <= 20 + 1448);
        seen.extend(&segment[20..]);
    }
    assert_eq!(seen, data);
}

#[test]
fn a_guest_that_takes_segments_gets_them_as_one() {
    let test = "a_guest_that_takes_segments_gets_them_as_one";
    let Some((mut near, mut far)) = routed(test, MRG_RXBUF | GUEST_CSUM | GUEST_TSO4) else {
        return;
    };
    let data: Vec<u8> = (0..60_000u32).map(|at| (at / 11) as u8).collect();
    near.send(segmentation(1448), &tcp(&data, Checksum::Begun));
    let packet = receive(&mut far, FAR_GUEST_IP);
    assert_eq!(packet.header[0] & NEEDS_CSUM, NEEDS_CSUM);
    assert_eq!(packet.header[1], GSO_TCPV4);
    assert_eq!(packet.header[4..6], 1448u16.to_le_bytes());
    assert_eq!(packet.chains, (HEADER + packet.frame.len()).div_ceil(2048));
    assert_eq!(packet.frame[54..], data);
}

#[test]
fn a_frame_the_host_refuses_is_lost_and_nothing_else() {
    if !isolate("a_frame_the_host_refuses_is_lost_and_nothing_else") {
        return;
    }
    let mut station = station(&near(), MRG_RXBUF);
    let socket = UdpSocket::bind((HOST_IP, 5000)).expect("a socket");
    let mut header = segmentation(0);
    header[1] = 0x77;
    station.send(
        header,
        &udp(b"an unknown kind of segments", Checksum::Whole),
    );
    station.send([0xff; HEADER], &udp(b"nonsense", Checksum::Whole));
    station.send([0; HEADER], &udp(b"fine", Checksum::Whole));
    let mut bytes = [0; 64];
    let count = socket.recv(&mut bytes).expect("data");
    assert_eq!(&bytes[..count], b"fine");
    assert_eq!(station.guest.config(6, 2), [1, 0]);
}

#[test]
fn an_interface_that_is_deleted_takes_the_link_down() {
    if !isolate("an_interface_that_is_deleted_takes_the_link_down") {
        return;
    }
    let tap = Tap::open(&near(), 1).expect("a tap interface");
    let settings = Settings {
        name: "deleted".to_owned(),
        ..settings()
    };
    let mut station = Station::new(Net::new(settings, tap.cable()), STATUS);
    station.post_many(4, 1526);
    let deleted = std::process::Command::new("ip")
        .args(["link", "delete", "near"])
        .status();
    if !deleted.is_ok_and(|status| status.success()) {
        println!("SKIP an_interface_that_is_deleted_takes_the_link_down: no `ip`");
        return;
    }
    eventually("the link stays", || {
        (station.guest.config(6, 2) == [0, 0]).then_some(())
    });
    station.send([0; HEADER], &udp(b"lost", Checksum::Whole));
    assert_rests("deleted-q0");
}

/// The queues of an interface that the kernel puts frames into, told by sending to each of many ports.
#[test]
fn pairs_that_are_off_get_no_frames() {
    if !isolate("pairs_that_are_off_get_no_frames") {
        return;
    }
    let tap = Tap::open(&near(), 2).expect("a tap interface");
    let settings = Settings {
        name: "queues".to_owned(),
        ..settings()
    };
    let mut station = Station::new(Net::new(settings, tap.cable()), MRG_RXBUF | CTRL_VQ | MQ);
    station.post_many(128, 1526);
    let mut second = station.guest.ring(2);
    let mut control = station.guest.ring(4);
    for _ in 0..200 {
        let room = station.guest.allocate(1526);
        second.add(&[], &[(room, 1526)]);
    }
    second.kick();
    let socket = UdpSocket::bind((HOST_IP, 5000)).expect("a socket");
    socket
        .send_to(b"who is it?", (GUEST_IP, 4000))
        .expect("a send");
    receive(&mut station, GUEST_IP);
    let mut spread = |station: &mut Station| {
        for port in 4000..4064 {
            let from = UdpSocket::bind((HOST_IP, 0)).expect("a socket");
            from.send_to(b"here", (GUEST_IP, port)).expect("a send");
        }
        let (mut first, mut other) = (0, 0);
        eventually("64 frames", || {
            while let Some(packet) = station.try_receive() {
                station.post_many(packet.chains, 1526);
                first += 1;
            }
            while second.used().is_some() {
                other += 1;
            }
            (first + other == 64).then_some(())
        });
        (first, other)
    };
    assert_eq!(spread(&mut station), (64, 0));
    assert_rests("queues-q1");
    assert_eq!(station.command(&mut control, 4, 0, &[2, 0]), 0);
    let (first, other) = spread(&mut station);
    assert!(first > 0 && other > 0, "{first} {other}");
    assert_eq!(station.command(&mut control, 4, 0, &[1, 0]), 0);
    assert_eq!(spread(&mut station), (64, 0));
}

#[test]
fn an_interface_is_made_and_gone_again() {
    if !isolate("an_interface_is_made_and_gone_again") {
        return;
    }
    let names = || -> Vec<String> {
        fs::read_to_string("/proc/thread-self/net/dev")
            .expect("interfaces")
            .lines()
            .filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()))
            .collect()
    };
    let first = Tap::open(&TapSettings::default(), 1).expect("a tap interface");
    let second = Tap::open(&TapSettings::default(), 4).expect("a tap interface");
    assert_eq!((first.name(), second.name()), ("vmtap0", "vmtap1"));
    assert!(names().contains(&"vmtap1".to_owned()));
    let again = TapSettings {
        name: Some("vmtap0".to_owned()),
        ..TapSettings::default()
    };
    assert!(matches!(
        Tap::open(&again, 1),
        Err(TapError::Attach(name, _)) if name == "vmtap0"
    ));
    drop((first, second));
    // A process that another test is starting may have them open until it has started.
    eventually("an interface stays", || {
        let gone = !names().iter().any(|name| name.starts_with("vmtap"));
        gone.then_some(())
    });
}

#[test]
fn what_a_made_interface_is_like() {
    if !isolate("what_a_made_interface_is_like") {
        return;
    }
    let settings = TapSettings {
        mtu: Some(9000),
        ..near()
    };
    let _tap = Tap::open(&settings, 1).expect("a tap interface");
    let Ok(output) = std::process::Command::new("ip")
        .args(["addr", "show", "near"])
        .output()
    else {
        println!("SKIP what_a_made_interface_is_like: no `ip`");
        return;
    };
    let text = String::from_utf8_lossy(&output.stdout);
    for wanted in [
        "mtu 9000",
        "02:00:00:00:01:01",
        "inet 192.0.2.1/24",
        "LOWER_UP",
    ] {
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
}

#[test]
fn names_that_cannot_be() {
    for name in ["", "a/b", "a b", "sixteen-bytes-xx", "..", "a:b", "ü"] {
        let settings = TapSettings {
            name: Some(name.to_owned()),
            ..TapSettings::default()
        };
        let error = Tap::open(&settings, 1).expect_err(name);
        assert!(matches!(error, TapError::Name(_)), "{name}: {error}");
    }
}

#[test]
fn descriptors_are_looked_at_before_they_are_used() {
    if !isolate("descriptors_are_looked_at_before_they_are_used") {
        return;
    }
    let null = fs::File::open("/dev/null").expect("a file");
    let error = Tap::from_descriptors(&[null.as_raw_fd()]).expect_err("no tap");
    assert!(matches!(error, TapError::NotTap(_)), "{error}");
    let error = Tap::from_descriptors(&[987_654]).expect_err("nothing");
    assert!(matches!(error, TapError::Descriptor(987_654, _)), "{error}");
    let error = Tap::from_descriptors(&[]).expect_err("nothing");
    assert!(matches!(error, TapError::NoQueues), "{error}");
    let bare = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .expect("tun");
    let error = Tap::from_descriptors(&[bare.as_raw_fd()]).expect_err("no interface");
    assert!(matches!(error, TapError::NotTap(_)), "{error}");
}

#[test]
fn descriptors_of_one_interface_are_its_queues() {
    if !isolate("descriptors_of_one_interface_are_its_queues") {
        return;
    }
    let files = |name: &str, flags: libc::c_int, count: usize| -> Vec<fs::File> {
        (0..count)
            .map(|_| {
                let file = fs::OpenOptions::new()
                    .read(true)
                    .write(true)
                    .open("/dev/net/tun")
                    .expect("tun");
                // SAFETY: a request of zeros has no name.
                let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
                for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
                    *to = from as libc::c_char;
                }
                request.ifr_ifru.ifru_flags = flags as libc::c_short;
                // SAFETY: the kernel reads and writes a request of this type.
                let made = unsafe {
                    libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request)
                };
                assert_eq!(made, 0);
                file
            })
            .collect()
    };
    let numbers =
        |files: &[fs::File]| -> Vec<i32> { files.iter().map(AsRawFd::as_raw_fd).collect() };
    let good = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
    let (one, other) = (files("one", good, 2), files("other", good, 1));
    let tap = Tap::from_descriptors(&numbers(&one)).expect("an interface");
    assert_eq!(tap.name(), "one");
    let net = Net::new(settings(), tap.cable());
    assert_eq!(net.queue_sizes().len(), 5);
    let mixed = [numbers(&one)[0], numbers(&other)[0]];
    let error = Tap::from_descriptors(&mixed).expect_err("two interfaces");
    assert!(matches!(error, TapError::Mixed(..)), "{error}");
    let bare = files("bare", libc::IFF_TAP | libc::IFF_NO_PI, 1);
    let error = Tap::from_descriptors(&numbers(&bare)).expect_err("no header");
    assert!(error.to_string().contains("IFF_VNET_HDR"), "{error}");
    let by_name = TapSettings {
        name: Some("other".to_owned()),
        ..TapSettings::default()
    };
    Tap::open(&by_name, 1).expect("one more queue of many");
    let single = files("single", good & !libc::IFF_MULTI_QUEUE, 1);
    let twice = [numbers(&single)[0]; 2];
    let error = Tap::from_descriptors(&twice).expect_err("one queue");
    assert!(error.to_string().contains("IFF_MULTI_QUEUE"), "{error}");
    let tun = files("tun", libc::IFF_TUN | libc::IFF_NO_PI, 1);
    let error = Tap::from_descriptors(&numbers(&tun)).expect_err("no Ethernet");
    assert!(matches!(error, TapError::NotTap(_)), "{error}");
}

#[test]
fn what_cannot_be_used_is_said_with_what_to_do() {
    if !isolate("what_cannot_be_used_is_said_with_what_to_do") {
        return;
    }
    let loopback = TapSettings {
        name: Some("lo".to_owned()),
        ..TapSettings::default()
    };
    let error = Tap::open(&loopback, 1).expect_err("no tap interface");
    assert!(error.to_string().contains("interface lo"), "{error}");
    // Without privileges, in a namespace where they are needed.
    // SAFETY: the call concerns this thread's identity, and no memory.
    if unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) } != 0 {
        println!("SKIP what_cannot_be_used_is_said_with_what_to_do: no other user");
        return;
    }
    let error = Tap::open(&near(), 1).expect_err("no permission");
    let text = error.to_string();
    assert!(
        text.contains("ip tuntap") || text.contains("modprobe"),
        "{text}"
    );
    assert!(text.contains("--net passt"), "{text}");
}

#[test]
fn the_kernel_works_on_the_queues() {
    if let Err(error) = vhost::is_available() {
        println!("SKIP the_kernel_works_on_the_queues: no vhost-net: {error}");
        return;
    }
    if !isolate("the_kernel_works_on_the_queues") {
        return;
    }
    for wanted in [MRG_RXBUF, MRG_RXBUF | EVENT_IDX | CSUM | GUEST_CSUM] {
        let tap = Tap::open(&near(), 1).expect("a tap interface");
        let net = Net::with_vhost(settings(), Vhost::new(tap));
        let mut station = Station::new(net, wanted);
        station.post_many(64, 2048);
        let socket = UdpSocket::bind((HOST_IP, 5000)).expect("a socket");
        let mut bytes = [0; 2048];
        for round in 0..3 {
            let data = vec![round; 1000];
            station.send([0; HEADER], &udp(&data, Checksum::Whole));
            let (count, from) = socket.recv_from(&mut bytes).expect("data");
            assert_eq!(&bytes[..count], data);
            socket.send_to(&data, from).expect("a send");
            let packet = receive(&mut station, GUEST_IP);
            assert_eq!(&packet.frame[42..1042], data);
            station = station.restart(wanted);
            station.post_many(64, 2048);
        }
        // A ring that jumps is the kernel's to find.
        station.tx.set_available(0x7000);
        station.tx.kick();
        station.guest.wait_for_reset_request();
    }
}
