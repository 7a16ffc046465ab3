//! What the model of the network device costs by itself: a driver on shared memory in front of it, a port behind it that does
//! nothing. One frame at a time, beside the bare walk of `virtio-queue` over the same ring.
//!
//! `cargo bench -p devices --bench net`

use std::{
    os::fd::RawFd,
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use devices::virtio::{
    Activation, Buffers, DeviceError, DeviceKind, VirtQueue, VirtioDevice,
    net::{
        backend::{HEADER, Port, Received, Trouble},
        counts::counters,
        filter::Filter,
        mac::MacAddr,
        receive::{Chains, Receiver},
        transmit::Transmitter,
    },
    rate_limiter::RateLimiter,
};
use driver::{Guest, Ring};
use virtio_queue::{QueueOwnedT, QueueT};

const ROUNDS: u32 = 200_000;
const FRAME: usize = 1514;
const EVENT_IDX: u64 = 1 << 29;

/// A device that keeps its queues for whoever asks.
struct Bare(Option<Activation>);

impl VirtioDevice for Bare {
    fn kind(&self) -> DeviceKind {
        DeviceKind {
            id: 1,
            pci_class: 0x0200,
        }
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![256]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, driver: Activation) -> Result<(), DeviceError> {
        self.0 = Some(driver);
        Ok(())
    }

    fn reset(&mut self) {}
}

/// Takes all frames, and has as many for the guest as it is told.
struct Null {
    frames: u32,
}

impl Port for Null {
    fn descriptor(&self) -> RawFd {
        -1
    }

    fn send(&mut self, packet: &Buffers) -> Result<(), Trouble> {
        assert_eq!(packet.len(), HEADER + FRAME);
        Ok(())
    }

    fn receive(&mut self, _room: &Buffers) -> Result<Received, Trouble> {
        if self.frames == 0 {
            return Err(Trouble::Later);
        }
        self.frames -= 1;
        Ok(Received::Packet(HEADER + FRAME))
    }

    fn discard(&mut self) {}
}

/// A ring with a buffer, and the device's side of it. The driver wants no interrupts.
fn queue() -> (Guest<Bare>, Ring, VirtQueue, u64) {
    let mut guest = Guest::new(Bare(None));
    guest.activate(EVENT_IDX);
    let ring = guest.ring(0);
    ring.set_used_event(0x8000);
    let queue = guest
        .device
        .0
        .as_mut()
        .and_then(|driver| driver.queue(0).ok());
    let buffer = guest.allocate(4096);
    (guest, ring, queue.expect("a queue"), buffer)
}

/// Nanoseconds that `device` takes for what `driver` has made available, without what looking at the clock takes. The median,
/// since others may have the processor in between.
fn measure(ring: &mut Ring, mut driver: impl FnMut(&mut Ring), mut device: impl FnMut()) -> u128 {
    let (mut device_times, mut clock_times) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        driver(ring);
        // Far from where the device is: no interrupt.
        ring.set_used_event((round as u16).wrapping_add(0x8000));
        let start = Instant::now();
        device();
        device_times.push(start.elapsed());
        let start = Instant::now();
        clock_times.push(start.elapsed());
        assert!(ring.used().is_some());
    }
    median(device_times).saturating_sub(median(clock_times))
}

fn median(mut times: Vec<Duration>) -> u128 {
    times.sort_unstable();
    times[times.len() / 2].as_nanos()
}

fn send(ring: &mut Ring, buffer: u64) {
    ring.add(&[(buffer, HEADER as u32), (buffer + 64, FRAME as u32)], &[]);
}

fn receive(ring: &mut Ring, buffer: u64) {
    ring.add(&[], &[(buffer, (HEADER + FRAME) as u32)]);
}

/// The ring of `virtio-queue` and nothing else: take a chain, look at its descriptors, give it back.
fn bare(readable: bool) -> u128 {
    let (mut guest, mut ring, _, buffer) = queue();
    guest.activate(EVENT_IDX);
    ring = {
        drop(ring);
        guest.ring(0)
    };
    let memory = guest.memory().clone();
    let mut queue = virtio_queue::Queue::new(256).expect("a queue");
    let [descriptors, available, used] = ring.addresses();
    let halves = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
    let (low, high) = halves(descriptors);
    queue.set_desc_table_address(low, high);
    let (low, high) = halves(available);
    queue.set_avail_ring_address(low, high);
    let (low, high) = halves(used);
    queue.set_used_ring_address(low, high);
    queue.set_event_idx(true);
    queue.set_ready(true);
    let driver = |ring: &mut Ring| match readable {
        true => send(ring, buffer),
        false => receive(ring, buffer),
    };
    measure(&mut ring, driver, || {
        queue.disable_notification(&memory).expect("rings");
        loop {
            while let Some(chain) = queue.iter(&memory).expect("rings").next() {
                let head = chain.head_index();
                let bytes: u32 = chain.map(|descriptor| descriptor.len()).sum();
                queue.add_used(&memory, head, bytes).expect("rings");
            }
            queue.needs_notification(&memory).expect("rings");
            if !queue.enable_notification(&memory).expect("rings") {
                break;
            }
        }
    })
}

fn main() {
    let gate = || RateLimiter::default().gate().expect("a timer");
    let transmit = {
        let (_guest, mut ring, queue, buffer) = queue();
        let mut transmitter = Transmitter::new(queue, gate(), counters(1).lane(0));
        let mut port = Null { frames: 0 };
        measure(
            &mut ring,
            |ring| send(ring, buffer),
            || {
                transmitter
                    .run(&mut port)
                    .expect("a driver that keeps the rules");
            },
        )
    };
    let receive = {
        let (_guest, mut ring, queue, buffer) = queue();
        let filter = Arc::new(ArcSwap::from_pointee(Filter::open(MacAddr::default())));
        let counts = counters(1).lane(0);
        let mut receiver =
            Receiver::new(queue, Chains::Any, HEADER + FRAME, gate(), filter, counts);
        let mut port = Null { frames: 0 };
        measure(
            &mut ring,
            |ring| receive(ring, buffer),
            || {
                port.frames = 1;
                receiver
                    .run(&mut port)
                    .expect("a driver that keeps the rules");
            },
        )
    };
    println!("one frame at a time           ns   bare walk of virtio-queue");
    println!("net, transmit           {transmit:8} {:8}", bare(true));
    println!("net, receive            {receive:8} {:8}", bare(false));
}
