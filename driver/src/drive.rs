//! A hostile driver: does to a device what a string of bytes says, and nothing that bytes could not say.
//!
//! ```
//! use devices::virtio::rng::Rng;
//!
//! let device = Rng::open("/dev/urandom".as_ref()).unwrap();
//! // A chain with a buffer of 64 bytes, in queue 0, at descriptor 5; and a kick.
//! driver::drive(device, &[2, 0, 5, 1, 0x10, 0, 64, 2, 0, 3, 0]);
//! ```

use std::time::{Duration, Instant};

use devices::virtio::VirtioDevice;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{Epoll, EpollEvent};

use crate::{Guest, Raw, Ring};

/// Where the machine has memory. Between them there is a hole.
const REGIONS: [(u64, usize); 3] = [(0, 4 << 20), (4 << 20, 4 << 20), (16 << 20, 1 << 20)];
/// What a program may reach without going out of its way.
const SMALL: u64 = 1 << 20;
/// How often a program may activate the device. Each time takes memory for the rings.
const MOST_ACTIVATIONS: u32 = 8;
/// How long a kick may go unseen: there are queues that a device does not look at.
const SETTLE: Duration = Duration::from_millis(5);

/// Does to `device` what `program` says, and resets it. Afterwards nothing is left of it.
///
/// A program is a row of steps: a byte that says which, and its arguments. What is missing at the end reads as
/// zero. Rings, descriptors and buffers may lie over each other, and anywhere.
pub fn drive<D: VirtioDevice>(device: D, program: &[u8]) {
    let ranges = REGIONS.map(|(start, length)| (GuestAddress(start), length));
    let memory = GuestMemoryMmap::from_ranges(&ranges).expect("memory");
    let mut driver = Driver {
        guest: Guest::with_memory(device, memory),
        rings: Vec::new(),
        kicks: Epoll::new().expect("an epoll"),
        activations: 0,
    };
    let mut program = Program(program);
    driver.restart(&mut program);
    while !program.0.is_empty() {
        driver.step(&mut program);
    }
    driver.guest.device.reset();
}

/// What is left of a program.
struct Program<'a>(&'a [u8]);

impl Program<'_> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let (taken, rest) = self.0.split_at(N.min(self.0.len()));
        bytes[..taken.len()].copy_from_slice(taken);
        self.0 = rest;
        bytes
    }

    fn byte(&mut self) -> u8 {
        let [byte] = self.bytes();
        byte
    }

    fn word(&mut self) -> u16 {
        u16::from_le_bytes(self.bytes())
    }

    /// As many bytes as the next one says.
    fn string(&mut self) -> Vec<u8> {
        let length = usize::from(self.byte()).min(self.0.len());
        let (taken, rest) = self.0.split_at(length);
        self.0 = rest;
        taken.to_vec()
    }

    /// An address in two bytes, most of them near the rings.
    fn address(&mut self) -> u64 {
        match self.word() {
            0xffff => u64::MAX - u64::from(self.byte()),
            0xfffe => u64::from_le_bytes(self.bytes()),
            // At the ends of memory, just before or behind.
            0xfffd => {
                let (start, length) = REGIONS[usize::from(self.byte() % 3)];
                start + length as u64 - 128 + u64::from(self.byte())
            }
            word => u64::from(word) * 16 % SMALL,
        }
    }

    /// A length in one byte, most of them small.
    fn length(&mut self) -> u32 {
        match self.byte() {
            0xff => u32::from_le_bytes(self.bytes()),
            0xfe => u32::from(self.word()),
            byte if byte >= 0xf0 => 512 << (byte - 0xf0),
            byte => byte.into(),
        }
    }
}

/// A machine with the device, and what it needs for its program.
struct Driver<D> {
    guest: Guest<D>,
    rings: Vec<Ring>,
    kicks: Epoll,
    activations: u32,
}

impl<D: VirtioDevice> Driver<D> {
    fn step(&mut self, program: &mut Program<'_>) {
        match program.byte() % 12 {
            0 => self.descriptor(program),
            1 => {
                let head = program.word();
                self.with_ring(program, |ring, _| ring.publish(head));
            }
            2 => self.chain(program),
            3 => self.kick(program),
            4 => {
                let offset = config_offset(program);
                let length = usize::from(program.byte());
                let _ = self.guest.config(offset, length);
            }
            5 => {
                let (offset, data) = (config_offset(program), program.string());
                self.guest.device.write_config(offset, &data);
            }
            6 => self.restart(program),
            7 => {
                let index = program.word();
                self.with_ring(program, |ring, _| ring.set_available(index));
            }
            8 => {
                let (address, data) = (program.address(), program.string());
                // Outside of memory it goes nowhere.
                let _ = self
                    .guest
                    .memory()
                    .write_slice(&data, GuestAddress(address));
            }
            9 => {
                let index = program.word();
                self.with_ring(program, |ring, _| ring.set_used_event(index));
            }
            10 => {
                let off = program.byte() & 1 != 0;
                self.with_ring(program, |ring, _| ring.set_no_interrupt(off));
            }
            _ => self.table(program),
        }
    }

    fn with_ring(
        &mut self,
        program: &mut Program<'_>,
        act: impl FnOnce(&mut Ring, &mut Program<'_>),
    ) {
        let index = usize::from(program.byte());
        let count = self.rings.len().max(1);
        if let Some(ring) = self.rings.get_mut(index % count) {
            act(ring, program);
        }
    }

    /// One descriptor, with nothing right about it.
    fn descriptor(&mut self, program: &mut Program<'_>) {
        self.with_ring(program, |ring, program| {
            let index = program.word() % ring.size();
            ring.write_descriptor(index, raw(program));
        });
    }

    /// A chain as it should be, as long as its buffers do not lie in the rings.
    fn chain(&mut self, program: &mut Program<'_>) {
        self.with_ring(program, |ring, program| {
            let first = u16::from(program.byte()) % ring.size();
            let count = u16::from(program.byte() % 8).min(ring.size()).max(1);
            for position in 0..count {
                let more = position + 1 < count;
                let address = program.address();
                let length = program.length();
                let write = u16::from(program.byte() & 2);
                let index = first.wrapping_add(position) % ring.size();
                let next = index.wrapping_add(1) % ring.size();
                ring.write_descriptor(
                    index,
                    Raw {
                        address,
                        length,
                        flags: write | u16::from(more),
                        next,
                    },
                );
            }
            ring.publish(first);
        });
    }

    /// An indirect table, right or wrong, and the descriptor that leads to it.
    fn table(&mut self, program: &mut Program<'_>) {
        let address = program.address() % SMALL;
        let table: Vec<Raw> = (0..program.byte() % 8).map(|_| raw(program)).collect();
        self.with_ring(program, |ring, program| {
            ring.write_table(address, &table);
            let index = u16::from(program.byte()) % ring.size();
            let length = match program.byte() {
                0 => 16 * table.len() as u32,
                other => other.into(),
            };
            let flags = 4;
            ring.write_descriptor(
                index,
                Raw {
                    address,
                    length,
                    flags,
                    next: 0,
                },
            );
            ring.publish(index);
        });
    }

    /// A kick, and then there is time to see it.
    fn kick(&mut self, program: &mut Program<'_>) {
        self.with_ring(program, |ring, _| ring.kick());
        let deadline = Instant::now() + SETTLE;
        let mut events = [EpollEvent::default(); 1];
        while self.kicks.wait(0, &mut events).unwrap_or(0) > 0
            && self.guest.interrupts().reset_count() == 0
            && Instant::now() < deadline
        {
            std::thread::yield_now();
        }
    }

    /// The device is reset and activated again, with other features.
    fn restart(&mut self, program: &mut Program<'_>) {
        self.activations += 1;
        if self.activations > MOST_ACTIVATIONS {
            return;
        }
        self.guest.device.reset();
        let features = u64::from_le_bytes(program.bytes());
        self.rings.clear();
        self.kicks = Epoll::new().expect("an epoll");
        // A device may well not want to.
        if self.guest.try_activate(features).is_err() {
            return;
        }
        let queues = self.guest.device.queue_sizes().len();
        for index in 0..queues as u16 {
            let ring = self.guest.ring(index);
            ring.watch_kicks(&self.kicks);
            self.rings.push(ring);
        }
    }
}

/// A descriptor as it comes.
fn raw(program: &mut Program<'_>) -> Raw {
    Raw {
        address: program.address(),
        length: program.length(),
        flags: u16::from(program.byte() & 7),
        next: program.byte().into(),
    }
}

/// An offset into the configuration in one byte, most of them small.
fn config_offset(program: &mut Program<'_>) -> u64 {
    match program.byte() {
        0xff => u64::from_le_bytes(program.bytes()),
        0xfe => u64::MAX,
        byte => byte.into(),
    }
}
