//! One device of each kind, as hostile drivers get it: quick to make, and with nothing of the host's in reach.

use std::{
    io,
    os::unix::net::UnixStream,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use devices::{
    power::{PowerRequest, PowerSwitch},
    virtio::{
        Reclaim,
        balloon::{Balloon, BalloonOptions},
        block::{
            Block, BlockConfig,
            backend::{NullImage, Unmap},
        },
        console::{Backend, Console},
        mem::Mem,
        net::{Net, Settings, features, mac::MacAddr, stream},
        pmem::{Persistence, Pmem},
        rate_limiter::{Limits, RateLimiter},
        rng::Rng,
        vsock::Vsock,
        watchdog::Watchdog,
    },
};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// A host that takes note of nothing.
struct Indifferent;

impl PowerSwitch for Indifferent {
    fn request(&self, _request: PowerRequest) {}
}

impl Reclaim for Indifferent {
    fn reclaim(&self, _address: u64, _length: u64) -> io::Result<()> {
        Ok(())
    }
}

/// An entropy device full of zeroes.
#[must_use]
pub fn rng() -> Rng {
    Rng::open("/dev/zero".as_ref()).expect("/dev/zero")
}

/// A disk of two queues that forgets what is written.
#[must_use]
pub fn block() -> Block {
    let config = BlockConfig {
        name: "blk0".to_owned(),
        queues: 2,
        queue_size: 128,
        serial: "specimen".to_owned(),
        unmap: Unmap::Allowed,
        limits: RateLimiter::default(),
    };
    Block::new(Arc::new(NullImage(MIB)), config).expect("a disk")
}

/// A network card, and the other end of its cable, with a few frames in it.
#[must_use]
pub fn net() -> (Net, UnixStream) {
    let (ours, mut theirs) = UnixStream::pair().expect("sockets");
    for length in [60, 1514, 9000] {
        let mut frame = vec![0xff; length];
        frame[6..14].copy_from_slice(&[2, 0, 0, 0, 0, 0x20, 0x08, 0x00]);
        let send = |theirs: &mut UnixStream, bytes: &[u8]| {
            io::Write::write_all(theirs, bytes).expect("room for a frame");
        };
        send(&mut theirs, &(length as u32).to_be_bytes());
        send(&mut theirs, &frame);
    }
    let settings = Settings {
        name: "net0".to_owned(),
        mac: MacAddr([2, 0, 0, 0, 0, 0x10]),
        mtu: Some(9000),
        queue_size: 64,
        offloads: features::CHECKSUM | features::TSO | features::UFO | features::USO,
        limits: Limits::default(),
    };
    let cable = stream::over(ours).expect("a cable");
    (Net::new(settings, cable), theirs)
}

/// A console that nobody looks at.
#[must_use]
pub fn console() -> Console {
    Console::new(Backend::Null).expect("a console")
}

/// A virtio socket device, to whose sockets on the host nobody listens.
#[must_use]
pub fn vsock() -> Vsock {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("rota-specimen-{}-{number}", std::process::id());
    let path: PathBuf = std::env::temp_dir().join(name);
    Vsock::new(3, &path).expect("a socket")
}

/// A balloon that does all a balloon can.
#[must_use]
pub fn balloon() -> Balloon {
    let options = BalloonOptions {
        size: MIB,
        deflate_on_oom: true,
        free_page_reporting: true,
    };
    Balloon::new(options, Arc::new(Indifferent)).expect("a balloon")
}

/// Persistent memory that does not persist.
#[must_use]
pub fn pmem() -> Pmem {
    Pmem::new(GIB, 2 * MIB, Persistence::Discarded).expect("whole pages")
}

/// Memory of which the guest is to use a half.
#[must_use]
pub fn mem() -> Mem {
    Mem::new(4 * GIB, 32 * MIB, 16 * MIB, Arc::new(Indifferent)).expect("whole blocks")
}

/// A watchdog whose bark nobody hears.
#[must_use]
pub fn watchdog() -> Watchdog {
    Watchdog::new(Duration::from_secs(1), Arc::new(Indifferent))
}
