//! A disk with a driver, and an image in memory that does what a test says.

#![allow(dead_code, unreachable_pub, reason = "each test uses its part")]

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsRawFd, RawFd},
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicU32, Ordering},
    },
};

use devices::virtio::{
    block::{
        Block, BlockConfig,
        backend::{Access, Action, Backend, Completion, Geometry, Image, Job, Unmap},
        image::{ImageOptions, open},
    },
    rate_limiter::RateLimiter,
};
use driver::{Guest, Ring};
use vm_memory::VolatileSlice;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;

pub const OK: u8 = 0;
pub const IOERR: u8 = 1;
pub const UNSUPP: u8 = 2;

pub const F_RO: u64 = 1 << 5;
pub const F_FLUSH: u64 = 1 << 9;
pub const F_CONFIG_WCE: u64 = 1 << 11;
pub const F_MQ: u64 = 1 << 12;
pub const F_DISCARD: u64 = 1 << 13;
pub const F_WRITE_ZEROES: u64 = 1 << 14;
pub const EVENT_IDX: u64 = 1 << 29;
/// What Linux agrees on.
pub const ALL: u64 = !EVENT_IDX;

pub fn config() -> BlockConfig {
    BlockConfig {
        name: "blk0".to_owned(),
        queues: 1,
        queue_size: 128,
        serial: "rota-disk".to_owned(),
        unmap: Unmap::Allowed,
        limits: RateLimiter::default(),
    }
}

/// A machine with one disk, of whose first queue the test has the ring.
pub struct Disk {
    pub guest: Guest<Block>,
    pub ring: Ring,
    header: u64,
    status: u64,
    data: u64,
}

/// The most data of a request.
const ROOM: usize = 4 << 20;

impl Disk {
    pub fn new(image: Arc<dyn Image>) -> Self {
        Self::with(image, config(), ALL)
    }

    pub fn open(options: &ImageOptions) -> Self {
        Self::new(open(options).expect("an image"))
    }

    pub fn with(image: Arc<dyn Image>, config: BlockConfig, features: u64) -> Self {
        let mut guest = Guest::new(Block::new(image, config).expect("a disk"));
        guest.activate(features);
        let ring = guest.ring(0);
        let header = guest.allocate(16);
        let status = guest.allocate(1);
        let data = guest.allocate(ROOM as u64);
        Self {
            guest,
            ring,
            header,
            status,
            data,
        }
    }

    /// Does a request with `out` to be read and `room` to be written; its status, what was written, and the length in the
    /// used ring.
    pub fn request(&mut self, kind: u32, sector: u64, out: &[u8], room: u32) -> (u8, Vec<u8>, u32) {
        self.place(self.header, &header(kind, sector));
        self.place(self.status, &[0xee]);
        self.place(self.data, out);
        let mut readable = vec![(self.header, 16)];
        let mut writable = Vec::new();
        // In pieces of odd sizes, which a device must not mind.
        let (mut at, piece) = (0, 3333.max(out.len() / 64 + 1));
        while at < out.len() {
            let length = (out.len() - at).min(piece);
            readable.push((self.data + at as u64, length as u32));
            at += length;
        }
        let into = self.data + out.len() as u64;
        if room > 0 {
            let first = room.min(777);
            writable.push((into, first));
            if room > first {
                writable.push((into + u64::from(first), room - first));
            }
        }
        writable.push((self.status, 1));
        let head = self.ring.add(&readable, &writable);
        self.ring.kick();
        let (used, length) = self.ring.wait();
        assert_eq!(used, head);
        let status = self.guest.read(self.status, 1)[0];
        (status, self.guest.read(into, room as usize), length)
    }

    fn place(&self, at: u64, bytes: &[u8]) {
        use vm_memory::{Bytes, GuestAddress};
        self.guest
            .memory()
            .write_slice(bytes, GuestAddress(at))
            .expect("guest memory");
    }

    pub fn read(&mut self, sector: u64, length: usize) -> Vec<u8> {
        let (status, bytes, used) = self.request(IN, sector, &[], length as u32);
        assert_eq!((status, used), (OK, length as u32 + 1));
        bytes
    }

    pub fn write(&mut self, sector: u64, bytes: &[u8]) {
        let (status, _, used) = self.request(OUT, sector, bytes, 0);
        assert_eq!((status, used), (OK, 1));
    }

    pub fn flush(&mut self) {
        assert_eq!(self.request(FLUSH, 0, &[], 0).0, OK);
    }

    pub fn clear(&mut self, kind: u32, segments: &[(u64, u32, u32)]) -> u8 {
        let bytes: Vec<u8> = segments
            .iter()
            .flat_map(|(sector, sectors, flags)| segment(*sector, *sectors, *flags))
            .collect();
        self.request(kind, 0, &bytes, 0).0
    }
}

pub fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

pub fn segment(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    bytes
}

/// Bytes that differ from place to place.
pub fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

/// A folder of its own for a test, with its files gone at the end.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        // Not the system's folder for temporary files, which may be in memory and know no direct I/O.
        let path = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("block-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a folder");
        Self(path)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, bytes).expect("a file");
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// An image in memory.
pub struct MemoryImage {
    pub access: Access,
    pub geometry: Geometry,
    state: Mutex<State>,
    released: Condvar,
    event: EventFd,
}

/// Which actions fail, and with what error.
pub type Failure = (fn(Action) -> bool, i32);

#[derive(Default)]
pub struct State {
    pub bytes: Vec<u8>,
    /// What was asked for, with offset and length.
    pub log: Vec<(Action, u64, u64)>,
    /// The most bytes moved at once; zero for all.
    pub most: usize,
    /// The error that comes of these actions.
    pub fail: Option<Failure>,
    /// Nothing gets done.
    pub held: bool,
}

impl MemoryImage {
    pub fn new(size: usize) -> Arc<Self> {
        Self::with(size, Access::ReadWrite, Geometry::plain())
    }

    pub fn with(size: usize, access: Access, geometry: Geometry) -> Arc<Self> {
        Arc::new(Self {
            access,
            geometry,
            state: Mutex::new(State {
                bytes: pattern(size, 1),
                ..State::default()
            }),
            released: Condvar::new(),
            event: EventFd::new(EFD_NONBLOCK).expect("an eventfd"),
        })
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic elsewhere")
    }

    pub fn log(&self) -> Vec<Action> {
        self.state().log.iter().map(|entry| entry.0).collect()
    }

    pub fn release(&self) {
        self.state().held = false;
        self.released.notify_all();
        self.event.write(1).expect("an eventfd");
    }
}

/// An image that a test keeps a hand on.
pub struct Shared(pub Arc<MemoryImage>);

impl Image for Shared {
    fn access(&self) -> Access {
        self.0.access
    }

    fn geometry(&self) -> Geometry {
        self.0.geometry
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.0.state().bytes.len() as u64)
    }

    fn resize(&self, size: u64) -> io::Result<()> {
        self.0.state().bytes.resize(size as usize, 0);
        Ok(())
    }

    fn backend(&self, _name: &str, _depth: u16) -> io::Result<Box<dyn Backend>> {
        Ok(Box::new(MemoryBackend {
            image: Arc::clone(&self.0),
            jobs: VecDeque::new(),
        }))
    }
}

struct MemoryBackend {
    image: Arc<MemoryImage>,
    jobs: VecDeque<Order>,
}

struct Order {
    tag: u16,
    action: Action,
    offset: u64,
    length: u64,
    vectors: *const [libc::iovec],
}

// SAFETY: the vectors belong to the queue's handler, which goes from thread to thread with the back end.
unsafe impl Send for MemoryBackend {}

impl Backend for MemoryBackend {
    unsafe fn submit(&mut self, job: Job<'_>) -> io::Result<()> {
        self.image
            .state()
            .log
            .push((job.action, job.offset, job.length));
        self.jobs.push_back(Order {
            tag: job.tag,
            action: job.action,
            offset: job.offset,
            length: job.length,
            vectors: std::ptr::from_ref(job.vectors),
        });
        Ok(())
    }

    fn start(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn completed(&mut self) -> Option<Completion> {
        let _ = self.image.event.read();
        let mut state = self.image.state();
        if state.held {
            return None;
        }
        let job = self.jobs.pop_front()?;
        Some(Completion {
            tag: job.tag,
            result: run(&mut state, &job),
        })
    }

    fn wait(&mut self) -> io::Result<()> {
        let mut state = self.image.state();
        while state.held {
            state = self.image.released.wait(state).expect("no panic elsewhere");
        }
        Ok(())
    }

    fn descriptor(&self) -> Option<RawFd> {
        Some(self.image.event.as_raw_fd())
    }
}

fn run(state: &mut State, job: &Order) -> io::Result<usize> {
    if let Some((_, errno)) = state.fail.filter(|(which, _)| which(job.action)) {
        return Err(io::Error::from_raw_os_error(errno));
    }
    let mut at = job.offset as usize;
    match job.action {
        Action::Read | Action::Write => {
            let most = if state.most == 0 {
                usize::MAX
            } else {
                state.most
            };
            let start = at;
            // SAFETY: the device keeps vectors and buffers until the job is done.
            for vector in unsafe { &*job.vectors } {
                let length = vector.iov_len.min(most - (at - start));
                // SAFETY: as above.
                let buffer = unsafe { VolatileSlice::new(vector.iov_base.cast(), length) };
                let bytes = &mut state.bytes[at..at + length];
                match job.action {
                    Action::Read => buffer.copy_from(bytes),
                    _ => {
                        buffer.copy_to(bytes);
                    }
                }
                at += length;
            }
            return Ok(at - start);
        }
        Action::Flush => {}
        Action::Discard | Action::WriteZeroes(_) => {
            state.bytes[at..at + job.length as usize].fill(0);
        }
    }
    Ok(0)
}
