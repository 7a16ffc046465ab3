//! A guest's station in a network, with frames in its hands.
#![allow(dead_code, unreachable_pub)]

use std::{
    collections::HashMap,
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use devices::virtio::{
    VirtioDevice,
    net::{
        Net, Settings,
        backend::{Cable, HEADER},
        features,
        mac::MacAddr,
        stream,
    },
    rate_limiter::Limits,
};
use driver::{Guest, Ring};
use vm_memory::{Bytes, GuestAddress};

pub const EVENT_IDX: u64 = 1 << 29;
pub const MRG_RXBUF: u64 = 1 << 15;
pub const CTRL_VQ: u64 = 1 << 17;
pub const MQ: u64 = 1 << 22;
pub const STATUS: u64 = 1 << 16;

/// The guest's address in each test.
pub const GUEST: MacAddr = MacAddr([2, 0, 0, 0, 0, 0x10]);
/// Another one.
pub const HOST: MacAddr = MacAddr([2, 0, 0, 0, 0, 0x20]);

pub fn settings() -> Settings {
    Settings {
        name: "net0".to_owned(),
        mac: GUEST,
        mtu: None,
        queue_size: 256,
        offloads: features::CHECKSUM | features::TSO | features::UFO | features::USO,
        limits: Limits::default(),
    }
}

/// A cable, and its other end.
pub fn socket_cable() -> (Cable, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    theirs
        .set_read_timeout(Some(Duration::from_secs(10)))
        .expect("a timeout");
    (stream::over(ours).expect("a cable"), theirs)
}

/// A frame to `to` that is told from others by `seed`.
pub fn frame(to: MacAddr, length: usize, seed: u8) -> Vec<u8> {
    let mut frame = to.0.to_vec();
    frame.extend(HOST.0);
    frame.extend([0x88, 0xb5]);
    let rest = length - frame.len();
    frame.extend((0..rest).map(|at| seed.wrapping_add((at * 7 + at / 251) as u8)));
    frame
}

/// A frame as it came: the header in front of it, and the frame.
#[derive(Debug, PartialEq, Eq)]
pub struct Packet {
    pub header: [u8; HEADER],
    pub frame: Vec<u8>,
    /// How many chains it took.
    pub chains: usize,
}

/// A machine with a network device.
pub struct Station {
    pub guest: Guest<Net>,
    pub rx: Ring,
    pub tx: Ring,
    posted: HashMap<u16, Vec<(u64, u32)>>,
    areas: Vec<u64>,
}

impl Station {
    /// A station whose driver wants these features.
    pub fn new(net: Net, wanted: u64) -> Self {
        Self::over(Guest::new(net), wanted)
    }

    pub fn over(mut guest: Guest<Net>, wanted: u64) -> Self {
        guest.activate(wanted);
        let (rx, tx) = (guest.ring(0), guest.ring(1));
        Self {
            guest,
            rx,
            tx,
            posted: HashMap::new(),
            areas: Vec::new(),
        }
    }

    /// Resets the device and starts again.
    pub fn restart(mut self, wanted: u64) -> Self {
        self.guest.device.reset();
        Self::over(self.guest, wanted)
    }

    /// Makes a receive buffer available, in parts of these lengths.
    pub fn post(&mut self, parts: &[u32]) {
        let parts: Vec<(u64, u32)> = parts
            .iter()
            .map(|length| (self.area(*length), *length))
            .collect();
        let head = self.rx.add(&[], &parts);
        self.posted.insert(head, parts);
    }

    fn area(&mut self, length: u32) -> u64 {
        // Small ones are used again.
        match length {
            ..=4096 => self
                .areas
                .pop()
                .unwrap_or_else(|| self.guest.allocate(4096)),
            _ => self.guest.allocate(length.into()),
        }
    }

    /// Makes `count` buffers of `length` bytes available and says so.
    pub fn post_many(&mut self, count: usize, length: u32) {
        for _ in 0..count {
            self.post(&[length]);
        }
        self.rx.kick();
    }

    /// The next frame, for which the driver waits.
    pub fn receive(&mut self) -> Packet {
        let used = self.rx.wait();
        self.assemble(used)
    }

    /// The next frame, if there is one.
    pub fn try_receive(&mut self) -> Option<Packet> {
        let used = self.rx.used()?;
        Some(self.assemble(used))
    }

    fn assemble(&mut self, first: (u16, u32)) -> Packet {
        let mut bytes = self.take(first);
        let header: [u8; HEADER] = bytes[..HEADER].try_into().expect("a header");
        let chains = usize::from(u16::from_le_bytes([header[10], header[11]]));
        for _ in 1..chains {
            // A driver does not wait for these: they are there, or the frame is lost.
            let used = self.rx.used().expect("all buffers of a frame at once");
            bytes.extend(self.take(used));
        }
        Packet {
            header,
            frame: bytes.split_off(HEADER),
            chains,
        }
    }

    fn take(&mut self, (head, written): (u16, u32)) -> Vec<u8> {
        let parts = self.posted.remove(&head).expect("a buffer of ours");
        let mut left = written as usize;
        let mut bytes = Vec::new();
        for (address, length) in parts {
            let here = left.min(length as usize);
            bytes.extend(self.guest.read(address, here));
            left -= here;
            if length <= 4096 {
                self.areas.push(address);
            }
        }
        assert_eq!(left, 0, "more written than there was room for");
        bytes
    }

    /// Makes header and frame available to be sent, cut at these places. The device is not told.
    pub fn queue(&mut self, header: [u8; HEADER], frame: &[u8], cuts: &[usize]) -> u16 {
        let mut bytes = header.to_vec();
        bytes.extend(frame);
        let mut parts = Vec::new();
        let mut from = 0;
        for to in cuts.iter().copied().chain([bytes.len()]) {
            parts.push((self.guest.place(&bytes[from..to]), (to - from) as u32));
            from = to;
        }
        self.tx.add(&parts, &[])
    }

    /// Sends a frame and waits until the device has it.
    pub fn send(&mut self, header: [u8; HEADER], frame: &[u8]) {
        let head = self.queue(header, frame, &[]);
        self.tx.kick();
        assert_eq!(self.tx.wait(), (head, 0));
    }

    /// Asks something of the device itself.
    pub fn command(&mut self, ring: &mut Ring, class: u8, number: u8, data: &[u8]) -> u8 {
        let mut command = vec![class, number];
        command.extend(data);
        let length = command.len() as u32;
        let (command, answer) = (self.guest.place(&command), self.guest.place(&[0xaa]));
        let head = ring.add(&[(command, length)], &[(answer, 1)]);
        ring.kick();
        assert_eq!(ring.wait(), (head, 1));
        self.guest.read(answer, 1)[0]
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.guest
            .memory()
            .write_slice(bytes, GuestAddress(address))
            .expect("guest memory");
    }
}

/// Waits until `look` finds something.
pub fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Processor time that the thread with this name has used.
///
/// Threads of other tests may have the same name, so a test that asks gives its device a name of its own.
pub fn cpu_time(name: &str) -> Duration {
    // A listing made while threads end may lack some that do not.
    eventually(&format!("no thread {name}"), || {
        let tasks = std::fs::read_dir("/proc/self/task").expect("threads");
        tasks.flatten().find_map(|task| {
            let read = |file| std::fs::read_to_string(task.path().join(file)).ok();
            if read("comm")?.trim() != name {
                return None;
            }
            let nanoseconds = read("schedstat")?.split(' ').next()?.parse().ok()?;
            Some(Duration::from_nanos(nanoseconds))
        })
    })
}

/// Fails if the thread with this name does not rest.
pub fn assert_rests(name: &str) {
    let before = cpu_time(name);
    std::thread::sleep(Duration::from_millis(200));
    let used = cpu_time(name) - before;
    assert!(used < Duration::from_millis(20), "{name} used {used:?}");
}
