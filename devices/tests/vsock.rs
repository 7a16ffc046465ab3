//! The socket device, driven by a guest's driver, with programs of the host at the other end.

use std::{
    collections::HashMap,
    io::{ErrorKind, Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use devices::virtio::{
    VirtioDevice,
    vsock::{Vsock, VsockError, VsockHandle},
};
use driver::{Guest, Raw, Ring};

const CID: u64 = 3;
const HEADER: usize = 44;
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const DATA: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;
/// What a device says it has room for.
const DEVICE_BUFFER: usize = 256 << 10;
const BUFFER: u32 = 4096;

/// A packet as it lies in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Packet {
    source: u64,
    destination: u64,
    source_port: u32,
    destination_port: u32,
    length: u32,
    kind: u16,
    operation: u16,
    flags: u32,
    allocated: u32,
    forwarded: u32,
    data: Vec<u8>,
}

impl Packet {
    /// From the guest's port 1000 to the host's `port`.
    fn to(port: u32, operation: u16) -> Self {
        Self {
            source: CID,
            destination: 2,
            source_port: 1000,
            destination_port: port,
            length: 0,
            kind: 1,
            operation,
            flags: 0,
            allocated: 1 << 20,
            forwarded: 0,
            data: Vec::new(),
        }
    }

    fn with(mut self, data: &[u8]) -> Self {
        self.data = data.to_vec();
        self.length = data.len() as u32;
        self
    }

    fn answer(&self, operation: u16) -> Self {
        Self {
            source_port: self.destination_port,
            ..Self::to(self.source_port, operation)
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.source.to_le_bytes());
        bytes.extend(self.destination.to_le_bytes());
        bytes.extend(self.source_port.to_le_bytes());
        bytes.extend(self.destination_port.to_le_bytes());
        bytes.extend(self.length.to_le_bytes());
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.operation.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.allocated.to_le_bytes());
        bytes.extend(self.forwarded.to_le_bytes());
        bytes.extend(&self.data);
        bytes
    }

    fn parse(bytes: &[u8]) -> Self {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        Self {
            source: long(0),
            destination: long(8),
            source_port: word(16),
            destination_port: word(20),
            length: word(24),
            kind: word(28) as u16,
            operation: (word(28) >> 16) as u16,
            flags: word(32),
            allocated: word(36),
            forwarded: word(40),
            data: bytes[HEADER..].to_vec(),
        }
    }
}

/// A guest's driver with nothing in its receive queue but what [`Socket::stock`] puts there.
struct Socket {
    guest: Guest<Vsock>,
    handle: VsockHandle,
    path: PathBuf,
    receive: Ring,
    transmit: Ring,
    events: Ring,
    buffers: HashMap<u16, u64>,
    scratch: u64,
}

impl Socket {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "rota-vsock-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        let device = Vsock::new(CID as u32, &path).expect("a device");
        let handle = device.handle().expect("a handle");
        let mut guest = Guest::new(device);
        guest.activate(1);
        let (receive, transmit, events) = (guest.ring(0), guest.ring(1), guest.ring(2));
        let scratch = guest.allocate(1 << 20);
        Self {
            guest,
            handle,
            path,
            receive,
            transmit,
            events,
            buffers: HashMap::new(),
            scratch,
        }
    }

    /// With buffers to receive into.
    fn stocked() -> Self {
        let mut socket = Self::new();
        socket.stock(32);
        socket
    }

    fn stock(&mut self, count: usize) {
        for _ in 0..count {
            let at = self.guest.allocate(BUFFER.into());
            self.offer(at);
        }
        self.receive.kick();
    }

    fn offer(&mut self, at: u64) {
        let head = self.receive.add(&[], &[(at, BUFFER)]);
        self.buffers.insert(head, at);
    }

    /// Sends a packet and waits until the device has taken it.
    fn send(&mut self, packet: &Packet) {
        self.post(packet);
        self.transmit.wait();
    }

    fn post(&mut self, packet: &Packet) {
        let bytes = packet.bytes();
        use vm_memory::{Bytes, GuestAddress};
        self.guest
            .memory()
            .write_slice(&bytes, GuestAddress(self.scratch))
            .unwrap();
        let split = HEADER as u32;
        let mut chain = vec![(self.scratch, split)];
        if bytes.len() > HEADER {
            chain.push((self.scratch + HEADER as u64, bytes.len() as u32 - split));
        }
        self.transmit.add(&chain, &[]);
        self.transmit.kick();
    }

    fn take(&mut self, (head, length): (u16, u32)) -> Packet {
        let at = self.buffers.remove(&head).expect("a buffer");
        let packet = Packet::parse(&self.guest.read(at, length as usize));
        assert_eq!((packet.source, packet.destination), (2, CID));
        assert_eq!(packet.kind, 1);
        assert_eq!(packet.length as usize, packet.data.len());
        assert_eq!(packet.allocated as usize, DEVICE_BUFFER);
        self.offer(at);
        self.receive.kick();
        packet
    }

    fn receive(&mut self) -> Packet {
        let used = self.receive.wait();
        self.take(used)
    }

    /// The next packet, which is of this kind.
    fn expect(&mut self, operation: u16) -> Packet {
        let packet = self.receive();
        assert_eq!(packet.operation, operation, "{packet:?}");
        packet
    }

    /// That nothing comes.
    fn expect_nothing(&mut self) {
        thread::sleep(Duration::from_millis(100));
        if let Some(used) = self.receive.used() {
            panic!("{:?}", self.take(used));
        }
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(format!("{}_{port}", self.path.display())).expect("a listener")
    }

    /// A connection from the guest's port 1000 to the host's `port`.
    fn connect_out(&mut self, port: u32) -> UnixStream {
        let listener = self.listen(port);
        self.send(&Packet::to(port, REQUEST));
        let answer = self.expect(RESPONSE);
        assert_eq!((answer.source_port, answer.destination_port), (port, 1000));
        patient(listener.accept().expect("a connection").0)
    }

    /// A connection from the host to the guest's port 1000; and the host's port.
    fn connect_in(&mut self) -> (UnixStream, u32) {
        let mut stream = patient(UnixStream::connect(&self.path).unwrap());
        stream.write_all(b"CONNECT 1000\n").unwrap();
        let request = self.expect(REQUEST);
        assert_eq!(request.destination_port, 1000);
        self.send(&request.answer(RESPONSE));
        let line = format!("OK {}\n", request.source_port);
        expect_bytes(&mut stream, line.as_bytes());
        (stream, request.source_port)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let name = self.path.file_name().unwrap().to_str().unwrap().to_owned();
        for entry in std::fs::read_dir(std::env::temp_dir()).unwrap().flatten() {
            let found = entry.file_name();
            if found
                .to_str()
                .is_some_and(|found| found.starts_with(&format!("{name}_")))
            {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
}

fn patient(stream: UnixStream) -> UnixStream {
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    stream
}

fn expect_bytes(stream: &mut impl Read, expected: &[u8]) {
    let mut bytes = vec![0; expected.len()];
    stream.read_exact(&mut bytes).expect("bytes");
    assert!(bytes == expected, "{:?}", String::from_utf8_lossy(&bytes));
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length)
        .map(|index| (index * 7 + index / 251) as u8)
        .collect()
}

#[test]
fn the_host_connects_to_the_guest() {
    let mut socket = Socket::stocked();
    assert_eq!(socket.guest.config(0, 8), CID.to_le_bytes());
    let (mut stream, port) = socket.connect_in();
    stream.write_all(b"question").unwrap();
    let data = socket.expect(DATA);
    assert_eq!(data.data, b"question");
    assert_eq!((data.source_port, data.destination_port), (port, 1000));
    socket.send(&Packet::to(port, DATA).with(b"answer"));
    expect_bytes(&mut stream, b"answer");
}

#[test]
fn what_a_client_sends_at_once_is_for_the_guest() {
    let mut socket = Socket::stocked();
    let mut stream = UnixStream::connect(&socket.path).unwrap();
    stream.write_all(b"CONNECT 7\nhello\n").unwrap();
    let request = socket.expect(REQUEST);
    assert_eq!(request.destination_port, 7);
    socket.send(&request.answer(RESPONSE));
    assert_eq!(socket.expect(DATA).data, b"hello\n");
}

#[test]
fn a_guest_that_does_not_listen_is_told_to_the_host() {
    let mut socket = Socket::stocked();
    let mut stream = patient(UnixStream::connect(&socket.path).unwrap());
    stream.write_all(b"CONNECT 7\n").unwrap();
    let request = socket.expect(REQUEST);
    socket.send(&request.answer(RST));
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    socket.expect_nothing();
}

#[test]
fn a_client_that_says_anything_else_is_cut_off() {
    let mut socket = Socket::stocked();
    for line in [
        "GET / HTTP/1.1\r\n",
        "CONNECT\n",
        "CONNECT 99999999999999999999",
    ] {
        let mut stream = patient(UnixStream::connect(&socket.path).unwrap());
        stream.write_all(line.as_bytes()).unwrap();
        match stream.read(&mut [0]) {
            Ok(0) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            other => panic!("{line}: {other:?}"),
        }
    }
    socket.expect_nothing();
    socket.connect_in();
}

#[test]
fn the_guest_connects_to_the_host() {
    let mut socket = Socket::stocked();
    let mut stream = socket.connect_out(52);
    socket.send(&Packet::to(52, DATA).with(b"from the guest"));
    expect_bytes(&mut stream, b"from the guest");
    stream.write_all(b"from the host").unwrap();
    assert_eq!(socket.expect(DATA).data, b"from the host");
}

#[test]
fn a_port_that_nobody_listens_on_refuses() {
    let mut socket = Socket::stocked();
    socket.send(&Packet::to(53, REQUEST));
    let answer = socket.expect(RST);
    assert_eq!((answer.source_port, answer.destination_port), (53, 1000));
}

#[test]
fn packets_of_no_connection_are_refused_but_resets_are_not() {
    let mut socket = Socket::stocked();
    for operation in [
        RESPONSE,
        SHUTDOWN,
        DATA,
        CREDIT_UPDATE,
        CREDIT_REQUEST,
        8,
        0xffff,
    ] {
        socket.send(&Packet::to(9, operation));
        socket.expect(RST);
    }
    socket.send(&Packet::to(9, RST));
    // A kind of socket that there is not.
    let mut packet = Packet::to(9, REQUEST);
    packet.kind = 2;
    socket.send(&packet);
    socket.expect(RST);
    // Packets from and to others.
    for (source, destination) in [(4, 2), (CID, 3), (u64::MAX, 2), (CID, 1 << 32 | 2)] {
        let mut packet = Packet::to(9, REQUEST);
        (packet.source, packet.destination) = (source, destination);
        socket.send(&packet);
    }
    socket.expect_nothing();
}

#[test]
fn a_second_request_on_a_connection_ends_it() {
    let mut socket = Socket::stocked();
    let mut stream = socket.connect_out(52);
    socket.send(&Packet::to(52, REQUEST));
    socket.expect(RST);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn the_end_of_the_hosts_data_comes_behind_it() {
    let mut socket = Socket::stocked();
    let mut stream = socket.connect_out(52);
    let text = pattern(10_000);
    stream.write_all(&text).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut got = Vec::new();
    while got.len() < text.len() {
        got.extend(socket.expect(DATA).data);
    }
    assert!(got == text);
    assert_eq!(socket.expect(SHUTDOWN).flags, 2, "it sends no more");
    // The other way goes on.
    socket.send(&Packet::to(52, DATA).with(b"still"));
    expect_bytes(&mut stream, b"still");
    let mut end = Packet::to(52, SHUTDOWN);
    end.flags = 3;
    socket.send(&end);
    socket.expect(RST);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_host_that_closes_after_its_data_is_read_to_the_end() {
    let mut socket = Socket::new();
    socket.stock(1);
    let mut stream = socket.connect_out(52);
    let text = pattern(20_000);
    stream.write_all(&text).unwrap();
    drop(stream);
    let mut got = Vec::new();
    let flags = loop {
        let packet = socket.receive();
        match packet.operation {
            DATA => got.extend(packet.data),
            // That it receives nothing may be said before.
            SHUTDOWN if packet.flags & 2 == 0 => assert_eq!(packet.flags, 1),
            SHUTDOWN => break packet.flags,
            _ => panic!("{packet:?}"),
        }
    };
    assert!(got == text);
    assert_eq!(flags, 3);
    socket.send(&Packet::to(52, RST));
    socket.expect_nothing();
}

#[test]
fn a_guest_that_stops_sending_ends_only_that_way() {
    let mut socket = Socket::stocked();
    let mut stream = socket.connect_out(52);
    socket.send(&Packet::to(52, DATA).with(b"last"));
    let mut end = Packet::to(52, SHUTDOWN);
    end.flags = 2;
    socket.send(&end);
    expect_bytes(&mut stream, b"last");
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    stream.write_all(b"answer").unwrap();
    assert_eq!(socket.expect(DATA).data, b"answer");
    socket.send(&Packet::to(52, DATA).with(b"more"));
    socket.expect(RST);
}

#[test]
fn the_guest_sends_as_much_as_it_may_and_no_more() {
    let mut socket = Socket::stocked();
    let mut stream = socket.connect_out(52);
    let text = pattern(DEVICE_BUFFER / 4);
    // Nobody reads: the socket takes some, the device what it has room for.
    let (mut sent, mut forwarded) = (0u32, 0u32);
    while sent - forwarded < DEVICE_BUFFER as u32 {
        let room = DEVICE_BUFFER - (sent - forwarded) as usize;
        let piece = room.min(text.len());
        socket.send(&Packet::to(52, DATA).with(&text[..piece]));
        sent += piece as u32;
        thread::sleep(Duration::from_millis(5));
        while let Some(used) = socket.receive.used() {
            let packet = socket.take(used);
            assert_eq!(packet.operation, CREDIT_UPDATE);
            forwarded = packet.forwarded;
        }
    }
    socket.send(&Packet::to(52, CREDIT_REQUEST));
    let credit = socket.expect(CREDIT_UPDATE);
    let taken = sent - credit.forwarded;
    assert!(taken <= DEVICE_BUFFER as u32, "{taken}");
    // Reading makes room, and the guest hears of it.
    let mut got = vec![0; sent as usize];
    stream.read_exact(&mut got).unwrap();
    for (index, piece) in got.chunks(text.len()).enumerate() {
        assert!(piece == &text[..piece.len()], "piece {index}");
    }
    let mut last = credit.forwarded;
    while sent - last >= DEVICE_BUFFER as u32 / 4 {
        last = socket.expect(CREDIT_UPDATE).forwarded;
    }

    // One that sends more is cut off.
    let mut refused = false;
    for _ in 0..64 {
        socket.send(&Packet::to(52, DATA).with(&text));
        while let Some(used) = socket.receive.used() {
            refused |= socket.take(used).operation == RST;
        }
    }
    assert!(refused);
}

#[test]
fn the_host_sends_as_much_as_the_guest_has_room_for() {
    let mut socket = Socket::stocked();
    let listener = socket.listen(52);
    let mut request = Packet::to(52, REQUEST);
    request.allocated = 10_000;
    socket.send(&request);
    socket.expect(RESPONSE);
    let (mut stream, _) = listener.accept().unwrap();
    let text = pattern(25_000);
    stream.write_all(&text).unwrap();
    let mut got = Vec::new();
    for (end, more) in [(10_000, true), (20_000, true), (25_000, false)] {
        while got.len() < end {
            got.extend(socket.expect(DATA).data);
        }
        assert_eq!(got.len(), end);
        if more {
            socket.expect(CREDIT_REQUEST);
        }
        socket.expect_nothing();
        let mut update = Packet::to(52, CREDIT_UPDATE);
        (update.allocated, update.forwarded) = (10_000, got.len() as u32);
        socket.send(&update);
    }
    assert!(got == text);
    // A guest that says nonsense about its room gets nothing for it.
    let mut update = Packet::to(52, CREDIT_UPDATE);
    (update.allocated, update.forwarded) = (u32::MAX, u32::MAX / 2);
    socket.send(&update);
    update.allocated = 0;
    socket.send(&update);
    stream.write_all(b"more").unwrap();
    socket.expect_nothing();
}

#[test]
fn data_waits_for_buffers_without_work() {
    let mut socket = Socket::stocked();
    let mut stream = socket.connect_out(52);
    // All buffers are filled, none is given back.
    while socket.receive.used().is_some() {}
    let text = pattern(400_000);
    stream.set_nonblocking(true).unwrap();
    let written = stream.write(&text).unwrap();
    thread::sleep(Duration::from_millis(50));
    let before = processor_time();
    thread::sleep(Duration::from_millis(300));
    let used = processor_time() - before;
    assert!(used < Duration::from_millis(225), "{used:?}");
    let mut got = Vec::new();
    while got.len() < written {
        got.extend(socket.expect(DATA).data);
    }
    assert!(got == text[..written]);
}

fn processor_time() -> Duration {
    // SAFETY: the structure is one of integers, which the call fills.
    unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        assert_eq!(libc::getrusage(libc::RUSAGE_SELF, &raw mut usage), 0);
        let micros = |time: libc::timeval| time.tv_sec * 1_000_000 + time.tv_usec;
        Duration::from_micros((micros(usage.ru_utime) + micros(usage.ru_stime)) as u64)
    }
}

#[test]
fn refusals_that_are_not_taken_stop_the_guest() {
    let mut socket = Socket::new();
    for _ in 0..200 {
        socket.post(&Packet::to(9, DATA));
    }
    thread::sleep(Duration::from_millis(100));
    let taken = socket.transmit.used_index();
    assert!(taken < 100, "{taken} packets taken, and nothing answered");
    socket.stock(200);
    for _ in 0..200 {
        socket.expect(RST);
    }
    for _ in 0..200 {
        socket.transmit.wait();
    }
}

#[test]
fn there_is_an_end_to_connections() {
    let mut socket = Socket::stocked();
    // The machine may have less descriptors than the device has connections.
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the calls take one structure, which they fill or read.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit), 0);
        limit.rlim_cur = limit.rlim_max.min(8192);
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit), 0);
    }
    assert!(limit.rlim_cur > 4096, "too few descriptors for this test");
    let listener = socket.listen(52);
    let mut streams = Vec::new();
    for port in 0..1024 {
        let mut request = Packet::to(52, REQUEST);
        request.source_port = port;
        socket.send(&request);
        socket.expect(RESPONSE);
        streams.push(listener.accept().unwrap().0);
    }
    let mut request = Packet::to(52, REQUEST);
    request.source_port = 5000;
    socket.send(&request);
    socket.expect(RST);
    // A client waits, and gets its turn when there is room.
    let mut client = patient(UnixStream::connect(&socket.path).unwrap());
    client.write_all(b"CONNECT 1000\n").unwrap();
    socket.expect_nothing();
    let mut end = Packet::to(52, RST);
    end.source_port = 7;
    socket.send(&end);
    let request = socket.expect(REQUEST);
    socket.send(&request.answer(RESPONSE));
    expect_bytes(&mut client, b"OK ");
}

#[test]
fn a_transport_reset_ends_all_connections_and_is_told() {
    let mut socket = Socket::stocked();
    let mut stream = socket.connect_out(52);
    socket.handle.reset_transport();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    socket.expect_nothing();
    assert_eq!(socket.events.used(), None);
    let event = socket.guest.place(&[0xff; 4]);
    let head = socket.events.add(&[], &[(event, 4)]);
    socket.events.kick();
    assert_eq!(socket.events.wait(), (head, 4));
    assert_eq!(socket.guest.read(event, 4), [0; 4]);
    socket.connect_in();
}

#[test]
fn a_reset_ends_all_connections_and_the_device_starts_again() {
    let mut socket = Socket::stocked();
    let mut stream = socket.connect_out(52);
    socket.guest.device.reset();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    let mut waiting = patient(UnixStream::connect(&socket.path).unwrap());
    waiting.write_all(b"CONNECT 1000\n").unwrap();
    socket.guest.activate(1);
    (socket.receive, socket.transmit) = (socket.guest.ring(0), socket.guest.ring(1));
    socket.buffers.clear();
    socket.stock(8);
    let request = socket.expect(REQUEST);
    socket.send(&request.answer(RESPONSE));
    expect_bytes(&mut waiting, b"OK ");
}

#[test]
fn packets_that_break_the_rules_end_in_a_request_for_a_reset() {
    let breaks: [fn(&mut Socket); 4] = [
        |socket| {
            // Less than a header.
            let at = socket.scratch;
            socket.transmit.add(&[(at, 43)], &[]);
            socket.transmit.kick();
        },
        |socket| {
            let mut packet = Packet::to(52, DATA).with(b"abc");
            packet.length = 4;
            socket.post(&packet);
        },
        |socket| {
            // No room for a packet.
            let at = socket.scratch;
            socket.receive.add(&[], &[(at, 44)]);
            socket.receive.kick();
            socket.post(&Packet::to(9, DATA));
        },
        |socket| {
            socket.transmit.write_descriptor(
                3,
                Raw {
                    address: u64::MAX - 10,
                    length: 44,
                    flags: 0,
                    next: 0,
                },
            );
            socket.transmit.publish(3);
            socket.transmit.kick();
        },
    ];
    for break_rule in breaks {
        let mut socket = Socket::new();
        break_rule(&mut socket);
        socket.guest.wait_for_reset_request();
    }
}

#[test]
fn a_cid_that_is_not_a_guests_is_refused() {
    let path = std::env::temp_dir().join(format!("rota-vsock-cid-{}", std::process::id()));
    for cid in [0, 1, 2, u32::MAX] {
        assert!(matches!(Vsock::new(cid, &path), Err(VsockError::Cid(found)) if found == cid));
    }
    let device = Vsock::new(3, &path).unwrap();
    assert!(matches!(
        Vsock::new(4, &path),
        Err(VsockError::Listen { .. })
    ));
    drop(device);
    assert!(!path.exists());
}

#[test]
fn megabytes_go_both_ways_at_once() {
    let mut socket = Socket::stocked();
    let stream = socket.connect_out(52);
    let text = pattern(3 << 20);
    let (mut reader, mut writer) = (stream.try_clone().unwrap(), stream);
    let (expected, to_send) = (text.clone(), text.clone());
    let read = thread::spawn(move || {
        let mut got = vec![0; expected.len()];
        reader.read_exact(&mut got).unwrap();
        assert!(got == expected);
        reader
    });
    let write = thread::spawn(move || {
        writer.write_all(&to_send).unwrap();
        writer
    });
    let (mut sent, mut device_forwarded, mut got) = (0usize, 0u32, Vec::new());
    let deadline = Instant::now() + Duration::from_secs(30);
    while sent < text.len() || got.len() < text.len() {
        assert!(Instant::now() < deadline, "{sent} sent, {} got", got.len());
        let in_flight = (sent as u32).wrapping_sub(device_forwarded) as usize;
        let piece = (DEVICE_BUFFER - in_flight)
            .min(30_000)
            .min(text.len() - sent);
        if piece > 0 {
            let mut packet = Packet::to(52, DATA).with(&text[sent..sent + piece]);
            packet.forwarded = got.len() as u32;
            socket.send(&packet);
            sent += piece;
        } else {
            let mut packet = Packet::to(52, CREDIT_UPDATE);
            packet.forwarded = got.len() as u32;
            socket.send(&packet);
        }
        while let Some(used) = socket.receive.used() {
            let packet = socket.take(used);
            device_forwarded = packet.forwarded;
            match packet.operation {
                DATA => got.extend(packet.data),
                CREDIT_UPDATE | CREDIT_REQUEST => {}
                _ => panic!("{packet:?}"),
            }
        }
    }
    assert!(got == text);
    drop((read.join().unwrap(), write.join().unwrap()));
}
