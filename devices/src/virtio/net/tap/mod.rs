//! Tap interfaces of the host (`/dev/net/tun`), with the device's header in front of each frame: so the host's kernel does
//! what the guest left to be done, and leaves to the guest what that can do.

mod interface;

use std::{
    fs::{File, OpenOptions},
    io,
    net::IpAddr,
    os::{
        fd::{AsFd, AsRawFd, RawFd},
        unix::fs::OpenOptionsExt,
    },
    sync::{Arc, Mutex, PoisonError},
};

use thiserror::Error;
use tracing::info;
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
};

use self::interface::{Interface, Queues};
use super::{
    super::Buffers,
    backend::{Backend, Cable, FRAME, HEADER, Port, Received, Trouble},
    features,
    io::{Vectors, read, write},
    mac::MacAddr,
};

const TUN: &str = "/dev/net/tun";
/// What interfaces are called that nobody has named.
const ANY_NAME: &str = "vmtap%d";

/// What a tap interface is to be like. Address, mask and Ethernet address are set on an interface that is made, and left
/// alone on one that was there before.
#[derive(Clone, Debug, Default)]
pub struct TapSettings {
    /// The interface's name; the kernel finds one where there is none.
    pub name: Option<String>,
    /// The host's address in the network.
    pub address: Option<IpAddr>,
    /// The mask of the network; that of a single address where there is none.
    pub mask: Option<IpAddr>,
    /// The host's Ethernet address in the network.
    pub mac: Option<MacAddr>,
    /// The longest IP packet in bytes.
    pub mtu: Option<u16>,
}

/// Why there is no tap interface.
#[derive(Debug, Error)]
pub enum TapError {
    /// The host has no tap interfaces, or none for us.
    #[error(
        "cannot open {TUN}: {0}; load the kernel's module (`modprobe tun`) and run as a user who may open it, or give the \
         guest a network without privileges (`--net passt`)"
    )]
    Open(#[source] io::Error),
    /// The user may not make, or not use, an interface.
    #[error(
        "no permission to make or use the tap interface {0}; run with CAP_NET_ADMIN, have root make it for you (`ip tuntap \
         add dev NAME mode tap multi_queue vnet_hdr user $USER`), or give the guest a network without privileges (`--net \
         passt`)"
    )]
    Permission(String),
    /// Another process has it, or it was made for another number of queues.
    #[error(
        "cannot use the tap interface {0}: {1}; it may be in use, be something else than a tap interface, or have been made \
         without `multi_queue`, which more than one pair of queues needs"
    )]
    Attach(String, #[source] io::Error),
    /// The name cannot be one.
    #[error("`{0}` cannot be an interface's name: 1 to 15 bytes, no slash, no white space")]
    Name(String),
    /// Something about the interface cannot be set.
    #[error("cannot {what} of the tap interface {name}: {source}")]
    Configure {
        /// The interface.
        name: String,
        /// What was to be done.
        what: &'static str,
        /// What the kernel says.
        source: io::Error,
    },
    /// A descriptor that was given is not open.
    #[error("descriptor {0} is not open: {1}")]
    Descriptor(RawFd, #[source] io::Error),
    /// A descriptor that was given is not a tap interface.
    #[error("descriptor {0} is not a tap interface: it must come from {TUN} after TUNSETIFF")]
    NotTap(RawFd),
    /// A descriptor that was given is of the wrong sort.
    #[error("the tap interface at descriptor {fd} was not opened with {missing}")]
    Flags {
        /// The descriptor.
        fd: RawFd,
        /// What is missing.
        missing: &'static str,
    },
    /// Descriptors of different interfaces.
    #[error("descriptor {0} is of the tap interface {1}, others are of {2}: a device has one")]
    Mixed(RawFd, String, String),
    /// No queue at all.
    #[error("a tap interface needs a queue")]
    NoQueues,
}

/// A queue of a tap interface.
#[derive(Debug)]
pub(super) struct Queue {
    pub(super) file: File,
    attached: Mutex<Attached>,
}

/// Whether the kernel puts frames into a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attached {
    Yes,
    No,
}

/// A tap interface. One that was made is gone with it; one that was there before stays.
#[derive(Debug)]
pub struct Tap {
    name: String,
    queues: Vec<Arc<Queue>>,
    /// The UDP segmentation that this kernel knows.
    uso: u64,
}

impl Tap {
    /// Opens or makes the interface, with `queues` queues.
    ///
    /// # Errors
    /// When that is not possible, with what to do about it.
    pub fn open(settings: &TapSettings, queues: usize) -> Result<Self, TapError> {
        let wanted = settings.name.as_deref().unwrap_or(ANY_NAME);
        if !interface::is_name(wanted) {
            return Err(TapError::Name(wanted.to_owned()));
        }
        let existed = Interface::exists(wanted);
        let mut name = wanted.to_owned();
        let mut files = Vec::new();
        for _ in 0..queues {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(TUN)
                .map_err(TapError::Open)?;
            // The first one says what the kernel has called it.
            name = attach(&file, &name, queues).map_err(|error| {
                if error.raw_os_error() == Some(libc::EPERM) {
                    TapError::Permission(name.clone())
                } else {
                    TapError::Attach(name.clone(), error)
                }
            })?;
            files.push(file);
        }
        let tap = Self::over(name, files)?;
        tap.configure(settings, existed)?;
        Ok(tap)
    }

    /// Takes the interface that these descriptors are queues of. They stay open and are not taken over.
    ///
    /// They must have been opened with `IFF_NO_PI`, which the kernel does not tell: its bit has another meaning there.
    ///
    /// # Errors
    /// When they are not, or of the wrong sort.
    pub fn from_descriptors(descriptors: &[RawFd]) -> Result<Self, TapError> {
        let mut files = Vec::new();
        let mut first: Option<String> = None;
        for fd in descriptors.iter().copied() {
            let file = interface::duplicate(fd).map_err(|error| TapError::Descriptor(fd, error))?;
            let (name, flags) = interface::describe(&file).ok_or(TapError::NotTap(fd))?;
            let missing = |missing| TapError::Flags { fd, missing };
            if flags & libc::IFF_TAP == 0 {
                return Err(TapError::NotTap(fd));
            }
            if flags & libc::IFF_VNET_HDR == 0 {
                return Err(missing("IFF_VNET_HDR"));
            }
            if descriptors.len() > 1 && flags & libc::IFF_MULTI_QUEUE == 0 {
                return Err(missing("IFF_MULTI_QUEUE"));
            }
            match &first {
                Some(first) if *first != name => {
                    return Err(TapError::Mixed(fd, name, first.clone()));
                }
                _ => first = Some(name),
            }
            files.push(file);
        }
        Self::over(first.ok_or(TapError::NoQueues)?, files)
    }

    fn over(name: String, files: Vec<File>) -> Result<Self, TapError> {
        let Some(first) = files.first() else {
            return Err(TapError::NoQueues);
        };
        let configure = |what| {
            let name = name.clone();
            move |source| TapError::Configure { name, what, source }
        };
        for file in &files {
            interface::set_header_length(file, HEADER as libc::c_int)
                .map_err(configure("set the header's length"))?;
        }
        let uso = libc::TUN_F_CSUM | libc::TUN_F_USO4 | libc::TUN_F_USO6;
        let uso = interface::set_offloads(first, uso).map_or(0, |()| features::USO);
        interface::set_offloads(first, 0).map_err(configure("set the offloads"))?;
        let queues = files
            .into_iter()
            .map(|file| {
                Arc::new(Queue {
                    file,
                    attached: Mutex::new(Attached::Yes),
                })
            })
            .collect();
        Ok(Self { name, queues, uso })
    }

    fn configure(&self, settings: &TapSettings, existed: bool) -> Result<(), TapError> {
        let configure = |what| {
            move |source| TapError::Configure {
                name: self.name.clone(),
                what,
                source,
            }
        };
        let interface = Interface::new(&self.name).map_err(configure("find the settings"))?;
        if !existed {
            if let Some(mac) = settings.mac {
                interface
                    .set_mac(mac)
                    .map_err(configure("set the Ethernet address"))?;
            }
            if let Some(address) = settings.address {
                interface
                    .set_address(address, settings.mask)
                    .map_err(configure("set the address"))?;
            }
        }
        if let Some(mtu) = settings.mtu
            && interface.mtu().map_err(configure("read the MTU"))? != mtu.into()
        {
            interface.set_mtu(mtu).map_err(configure("set the MTU"))?;
        }
        if !interface.is_up().map_err(configure("read the state"))? {
            interface
                .set_up()
                .map_err(configure("set the state (as `ip link set NAME up` does)"))?;
        }
        let how = if existed { "uses" } else { "made" };
        info!(
            "{how} the tap interface {} with {} queue(s)",
            self.name,
            self.queues.len()
        );
        Ok(())
    }

    /// The interface's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its queues.
    pub(super) fn queues(&self) -> &[Arc<Queue>] {
        &self.queues
    }

    /// The cable of a device, with a port for each queue.
    #[must_use]
    pub fn cable(self) -> Cable {
        let ports = self
            .queues
            .iter()
            .map(|queue| Box::new(TapPort::new(Arc::clone(queue))) as _)
            .collect();
        Cable {
            backend: Arc::new(self),
            ports,
        }
    }

    fn turn(&self, pair: usize, wanted: Attached) -> io::Result<()> {
        let queue = self
            .queues
            .get(pair)
            .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        let mut attached = queue
            .attached
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if *attached != wanted {
            interface::set_attached(&queue.file, wanted == Attached::Yes)?;
            *attached = wanted;
        }
        Ok(())
    }
}

impl Backend for Tap {
    fn features(&self) -> u64 {
        features::CHECKSUM | features::TSO | features::UFO | self.uso
    }

    fn set_offloads(&self, features: u64) -> io::Result<()> {
        let has = |bit: u32| features & (1 << bit) != 0;
        let mut flags = 0;
        // The kernel knows no segments without checksums.
        if has(VIRTIO_NET_F_GUEST_CSUM) {
            flags |= libc::TUN_F_CSUM;
            for (bit, flag) in [
                (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
                (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
                (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
                (VIRTIO_NET_F_GUEST_UFO, libc::TUN_F_UFO),
            ] {
                flags |= if has(bit) { flag } else { 0 };
            }
            // It takes both kinds of UDP segments, or none.
            if has(VIRTIO_NET_F_GUEST_USO4) && has(VIRTIO_NET_F_GUEST_USO6) {
                flags |= libc::TUN_F_USO4 | libc::TUN_F_USO6;
            }
        }
        interface::set_offloads(&self.queues[0].file, flags)
    }

    fn attach(&self, pair: usize) -> io::Result<()> {
        self.turn(pair, Attached::Yes)
    }

    fn detach(&self, pair: usize) -> io::Result<()> {
        self.turn(pair, Attached::No)
    }
}

/// A queue of a tap interface, as the port of a pair.
struct TapPort {
    queue: Arc<Queue>,
    /// What the kernel fills when a packet is longer than the room for it.
    spill: Vec<u8>,
    /// A packet that there was not enough room for; empty if there is none.
    kept: Vec<u8>,
    scratch: Vectors,
}

impl TapPort {
    fn new(queue: Arc<Queue>) -> Self {
        Self {
            queue,
            spill: vec![0; HEADER + FRAME.end() + 1],
            kept: Vec::new(),
            scratch: Vectors::default(),
        }
    }

    fn receive_kept(&mut self, room: &Buffers) -> Received {
        let length = self.kept.len();
        if room.len() < length {
            return Received::Larger(length);
        }
        room.write_at(0, &self.kept);
        self.kept.clear();
        Received::Packet(length)
    }
}

impl Port for TapPort {
    fn descriptor(&self) -> RawFd {
        self.queue.file.as_raw_fd()
    }

    fn send(&mut self, packet: &Buffers) -> Result<(), Trouble> {
        match write(self.queue.file.as_fd(), packet) {
            Ok(_) => Ok(()),
            Err(error) => Err(trouble(error)),
        }
    }

    fn receive(&mut self, room: &Buffers) -> Result<Received, Trouble> {
        if !self.kept.is_empty() {
            return Ok(self.receive_kept(room));
        }
        let file = self.queue.file.as_fd();
        let (length, direct) =
            read(file, room, &mut self.spill, &mut self.scratch).map_err(trouble)?;
        let Some(spilt) = length
            .checked_sub(direct)
            .and_then(|spilt| self.spill.get(..spilt))
        else {
            return Ok(Received::Packet(length));
        };
        if spilt.len() == self.spill.len() {
            return Err(Trouble::Frame(io::ErrorKind::InvalidData.into()));
        }
        if room.len() >= length {
            room.write_at(direct, spilt);
            return Ok(Received::Packet(length));
        }
        self.kept.resize(direct, 0);
        room.read_at(0, &mut self.kept);
        self.kept.extend_from_slice(spilt);
        Ok(Received::Larger(length))
    }

    fn discard(&mut self) {
        self.kept.clear();
    }
}

/// Makes `file` one of `queues` queues of the interface `name`; see [`interface::attach`].
fn attach(file: &File, name: &str, queues: usize) -> io::Result<String> {
    if queues > 1 {
        return interface::attach(file, name, Queues::Many);
    }
    // An interface that was made for many queues is one for no others.
    interface::attach(file, name, Queues::One).or_else(|error| match error.raw_os_error() {
        Some(libc::EINVAL) => interface::attach(file, name, Queues::Many),
        _ => Err(error),
    })
}

fn trouble(error: io::Error) -> Trouble {
    match error.raw_os_error() {
        Some(libc::EAGAIN) => Trouble::Later,
        // The interface was deleted, or the queue is not attached.
        Some(libc::EBADFD | libc::ENODEV) => Trouble::Gone(error),
        _ => Trouble::Frame(error),
    }
}
