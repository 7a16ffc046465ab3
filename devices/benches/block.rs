//! What the block device itself costs: nanoseconds of its thread for a request of 4 KiB, on a back end that does nothing,
//! beside a thread that only walks the queue with the crate `virtio-queue`. `cargo bench -p devices --bench block`
//!
//! Both threads are woken, tell the driver, and go to sleep in the same way; so the difference is what the device does. Rows
//! are medians of runs that take turns. The time is what Linux says that the thread has run, so others on the machine do not
//! count, but for the caches that they leave cold.

use std::{
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

use devices::virtio::{
    Activation, DeviceError, DeviceKind, Handler, Poll, VirtQueue, VirtioDevice, Worker,
    block::{
        Block, BlockConfig,
        backend::{NullImage, Unmap},
    },
    rate_limiter::RateLimiter,
};
use driver::{Guest, Ring};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;

const RUNS: usize = 11;
const RUN: Duration = Duration::from_millis(200);
const DEPTHS: [u16; 2] = [1, 32];
const THREAD: &str = "blk0-q0";
const DATA: u32 = 4096;

fn main() {
    println!("{:<28} {:>6} {:>14}", "device", "depth", "ns per request");
    for depth in DEPTHS {
        let mut figures = [Vec::new(), Vec::new(), Vec::new()];
        for _ in 0..RUNS {
            figures[0].push(measure(Walk(None), depth, 0));
            figures[1].push(measure(null(), depth, 0));
            figures[2].push(measure(null(), depth, 1));
        }
        let names = [
            "bare virtio-queue walk",
            "block, null, read 4 KiB",
            "block, null, write 4 KiB",
        ];
        for (name, figures) in names.iter().zip(&mut figures) {
            figures.sort_by(f64::total_cmp);
            println!("{name:<28} {depth:>6} {:>14.0}", figures[RUNS / 2]);
        }
    }
}

fn null() -> Block {
    let config = BlockConfig {
        name: "blk0".into(),
        queues: 1,
        queue_size: 128,
        serial: String::new(),
        unmap: Unmap::Allowed,
        limits: RateLimiter::default(),
    };
    Block::new(Arc::new(NullImage(1 << 30)), config).expect("a disk")
}

/// Nanoseconds that the device's thread runs for each request of this `kind`, with `depth` of them at a time.
fn measure<D: VirtioDevice>(device: D, depth: u16, kind: u32) -> f64 {
    let mut guest = Guest::new(device);
    guest.activate(!0);
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    let header = guest.place(&header);
    let data = guest.allocate(u64::from(DATA) * u64::from(depth));
    let status = guest.allocate(1);
    let mut ring = guest.ring(0);
    let batch = |ring: &mut Ring| {
        for index in 0..depth {
            let data = (data + u64::from(DATA) * u64::from(index), DATA);
            match kind {
                0 => ring.add(&[(header, 16)], &[data, (status, 1)]),
                _ => ring.add(&[(header, 16), data], &[(status, 1)]),
            };
        }
        ring.set_used_event(ring.used_index().wrapping_add(depth - 1));
        ring.kick();
        for _ in 0..depth {
            while ring.used().is_none() {
                std::hint::spin_loop();
            }
        }
    };
    for _ in 0..100 {
        batch(&mut ring);
    }
    let (before, start) = (thread_time(), Instant::now());
    let mut count = 0u32;
    while start.elapsed() < RUN {
        batch(&mut ring);
        count += u32::from(depth);
    }
    // The last batch is accounted for when the thread sleeps.
    std::thread::sleep(Duration::from_millis(2));
    (thread_time() - before) as f64 / f64::from(count)
}

/// Nanoseconds that the device's thread has run.
fn thread_time() -> u64 {
    fs::read_dir("/proc/self/task")
        .expect("/proc")
        .map(|task| task.expect("a thread").path())
        .find(|task| fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim() == THREAD))
        .and_then(|task| fs::read_to_string(task.join("schedstat")).ok())
        .and_then(|line| line.split_whitespace().next()?.parse().ok())
        .expect("the device's thread")
}

/// A device that walks its queue, and no more.
struct Walk(Option<Worker<Walker>>);

struct Walker {
    queue: VirtQueue,
    ring: Queue,
    memory: GuestMemoryMmap,
}

impl VirtioDevice for Walk {
    fn kind(&self) -> DeviceKind {
        DeviceKind {
            id: 2,
            pci_class: 0,
        }
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![128]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, mut driver: Activation) -> Result<(), DeviceError> {
        let queue = driver.queue(0)?;
        let ring = Queue::try_from(queue.ring().state()).expect("a queue");
        let walker = Walker {
            ring,
            queue,
            memory: driver.memory,
        };
        self.0 = Some(Worker::spawn(THREAD, walker, driver.notify).expect("a thread"));
        Ok(())
    }

    fn reset(&mut self) {
        self.0 = None;
    }
}

impl Handler for Walker {
    fn start(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        poll.add_bell(self.queue.kick(), 0)
            .map_err(DeviceError::host("cannot wait"))
    }

    fn ready(&mut self, _token: u64, _events: EventSet, _poll: &Poll) -> Result<(), DeviceError> {
        loop {
            while let Some(chain) = self.ring.pop_descriptor_chain(&self.memory) {
                let head = chain.head_index();
                let length: u32 = chain.map(|descriptor| descriptor.len()).sum();
                std::hint::black_box(length);
                self.ring.add_used(&self.memory, head, 1).expect("a ring");
            }
            if self.ring.needs_notification(&self.memory).expect("a ring") {
                self.queue.notify().used(0);
            }
            if !self.ring.enable_notification(&self.memory).expect("a ring") {
                return Ok(());
            }
        }
    }
}
