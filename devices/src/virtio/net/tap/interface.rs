//! The kernel's interface to tap interfaces and their settings.

use std::{
    ffi::CString,
    fs::File,
    io, mem,
    net::{IpAddr, Ipv4Addr},
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
};

use super::super::mac::MacAddr;

/// Whether `name` can be an interface's.
pub(super) fn is_name(name: &str) -> bool {
    (1..libc::IFNAMSIZ).contains(&name.len())
        && !matches!(name, "." | "..")
        && name
            .bytes()
            .all(|byte| byte.is_ascii_graphic() && byte != b'/' && byte != b':')
}

/// A request about interface `name`, which [`is_name`].
fn request(name: &str) -> libc::ifreq {
    // SAFETY: a request of zeros is one without a name.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

fn name_in(request: &libc::ifreq) -> String {
    request
        .ifr_name
        .iter()
        .take_while(|byte| **byte != 0)
        .map(|byte| char::from(*byte as u8))
        .collect()
}

fn checked(result: libc::c_int) -> io::Result<()> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// How many queues an interface may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Queues {
    One,
    Many,
}

/// Makes `file` a queue of the tap interface `name`, which is made if there is none. Returns its name.
pub(super) fn attach(file: &File, name: &str, queues: Queues) -> io::Result<String> {
    let mut request = request(name);
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if queues == Queues::Many {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the kernel reads and writes a request of this type.
    checked(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) })?;
    Ok(name_in(&request))
}

/// Name and flags (`IFF_*`) of the interface that `file` is a queue of.
pub(super) fn describe(file: &File) -> Option<(String, libc::c_int)> {
    let mut request = request("");
    // SAFETY: the kernel writes a request of this type.
    checked(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNGETIFF as _, &raw mut request) })
        .ok()?;
    // SAFETY: the kernel has written the flags.
    let flags = unsafe { request.ifr_ifru.ifru_flags } as u16;
    Some((name_in(&request), flags.into()))
}

/// Another descriptor of the file behind `fd`, which does not block.
pub(super) fn duplicate(fd: RawFd) -> io::Result<File> {
    // SAFETY: the call takes a number that may or may not be a descriptor, and touches no memory.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    checked(copy)?;
    // SAFETY: the descriptor is new, and nobody else's.
    let copy = File::from(unsafe { OwnedFd::from_raw_fd(copy) });
    // SAFETY: as above; the flags are those of the file.
    checked(unsafe {
        let flags = libc::fcntl(copy.as_raw_fd(), libc::F_GETFL);
        libc::fcntl(copy.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK)
    })?;
    Ok(copy)
}

/// Sets how many bytes of header are in front of each frame.
pub(super) fn set_header_length(file: &File, length: libc::c_int) -> io::Result<()> {
    // SAFETY: the kernel reads a number of this type.
    checked(unsafe {
        libc::ioctl(
            file.as_raw_fd(),
            libc::TUNSETVNETHDRSZ as _,
            &raw const length,
        )
    })
}

/// Sets what the reader of frames can do by itself (`TUN_F_*`).
pub(super) fn set_offloads(file: &File, flags: libc::c_uint) -> io::Result<()> {
    // SAFETY: the argument is a number.
    checked(unsafe {
        libc::ioctl(
            file.as_raw_fd(),
            libc::TUNSETOFFLOAD as _,
            libc::c_ulong::from(flags),
        )
    })
}

/// Lets the kernel put frames into the queue, or not.
pub(super) fn set_attached(file: &File, attached: bool) -> io::Result<()> {
    let mut request = request("");
    request.ifr_ifru.ifru_flags = match attached {
        true => libc::IFF_ATTACH_QUEUE,
        false => libc::IFF_DETACH_QUEUE,
    } as libc::c_short;
    // SAFETY: the kernel reads a request of this type.
    checked(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETQUEUE as _, &raw mut request) })
}

/// An interface's settings.
pub(super) struct Interface {
    name: String,
    socket: OwnedFd,
}

impl Interface {
    /// Whether there is an interface with this name.
    pub(super) fn exists(name: &str) -> bool {
        let Ok(name) = CString::new(name) else {
            return false;
        };
        // SAFETY: the name ends with a zero.
        unsafe { libc::if_nametoindex(name.as_ptr()) != 0 }
    }

    pub(super) fn new(name: &str) -> io::Result<Self> {
        Ok(Self {
            name: name.to_owned(),
            socket: socket(libc::AF_INET)?,
        })
    }

    pub(super) fn is_up(&self) -> io::Result<bool> {
        Ok(self.flags()? & libc::IFF_UP as libc::c_short != 0)
    }

    pub(super) fn set_up(&self) -> io::Result<()> {
        let mut request = request(&self.name);
        request.ifr_ifru.ifru_flags = self.flags()? | libc::IFF_UP as libc::c_short;
        self.ask(libc::SIOCSIFFLAGS, &mut request)
    }

    fn flags(&self) -> io::Result<libc::c_short> {
        let mut request = request(&self.name);
        self.ask(libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: the kernel has written the flags.
        Ok(unsafe { request.ifr_ifru.ifru_flags })
    }

    pub(super) fn mtu(&self) -> io::Result<libc::c_int> {
        let mut request = request(&self.name);
        self.ask(libc::SIOCGIFMTU, &mut request)?;
        // SAFETY: the kernel has written the MTU.
        Ok(unsafe { request.ifr_ifru.ifru_mtu })
    }

    pub(super) fn set_mtu(&self, mtu: u16) -> io::Result<()> {
        let mut request = request(&self.name);
        request.ifr_ifru.ifru_mtu = mtu.into();
        self.ask(libc::SIOCSIFMTU, &mut request)
    }

    pub(super) fn set_mac(&self, mac: MacAddr) -> io::Result<()> {
        let mut request = request(&self.name);
        let mut bytes = [0; 14];
        for (to, from) in bytes.iter_mut().zip(mac.0) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_hwaddr = libc::sockaddr {
            sa_family: libc::ARPHRD_ETHER,
            sa_data: bytes,
        };
        self.ask(libc::SIOCSIFHWADDR, &mut request)
    }

    /// Sets address and mask; without a mask, that of a single address.
    pub(super) fn set_address(&self, address: IpAddr, mask: Option<IpAddr>) -> io::Result<()> {
        let wrong = |what| io::Error::new(io::ErrorKind::InvalidInput, what);
        match (address, mask) {
            (IpAddr::V4(address), None) => self.set_v4(address, Ipv4Addr::BROADCAST),
            (IpAddr::V4(address), Some(IpAddr::V4(mask))) => self.set_v4(address, mask),
            (IpAddr::V6(address), None) => self.set_v6(address.octets(), 128),
            (IpAddr::V6(address), Some(IpAddr::V6(mask))) => {
                let bits = u128::from(mask);
                if bits.leading_ones() + bits.trailing_zeros().min(128) != 128 {
                    return Err(wrong("the mask has holes"));
                }
                self.set_v6(address.octets(), bits.leading_ones())
            }
            _ => Err(wrong("address and mask are of different families")),
        }
    }

    fn set_v4(&self, address: Ipv4Addr, mask: Ipv4Addr) -> io::Result<()> {
        let mut with_address = request(&self.name);
        with_address.ifr_ifru.ifru_addr = v4(address);
        self.ask(libc::SIOCSIFADDR, &mut with_address)?;
        let mut with_mask = request(&self.name);
        with_mask.ifr_ifru.ifru_netmask = v4(mask);
        self.ask(libc::SIOCSIFNETMASK, &mut with_mask)
    }

    fn set_v6(&self, address: [u8; 16], prefix: u32) -> io::Result<()> {
        let mut with_index = request(&self.name);
        self.ask(libc::SIOCGIFINDEX, &mut with_index)?;
        let mut request = libc::in6_ifreq {
            ifr6_addr: libc::in6_addr { s6_addr: address },
            ifr6_prefixlen: prefix,
            // SAFETY: the kernel has written the index.
            ifr6_ifindex: unsafe { with_index.ifr_ifru.ifru_ifindex },
        };
        let socket = socket(libc::AF_INET6)?;
        // SAFETY: the kernel reads a request of this type through a socket of this family.
        checked(unsafe {
            libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFADDR as _, &raw mut request)
        })
    }

    fn ask(&self, what: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
        // SAFETY: the kernel reads and writes a request of this type.
        checked(unsafe { libc::ioctl(self.socket.as_raw_fd(), what as _, &raw mut *request) })
    }
}

fn socket(family: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: the call touches no memory.
    let socket = unsafe { libc::socket(family, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    checked(socket)?;
    // SAFETY: the descriptor is new, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(socket) })
}

fn v4(address: Ipv4Addr) -> libc::sockaddr {
    let mut bytes = [0; 14];
    // Two bytes of port, then the address.
    for (to, from) in bytes[2..].iter_mut().zip(address.octets()) {
        *to = from as libc::c_char;
    }
    libc::sockaddr {
        sa_family: libc::AF_INET as libc::sa_family_t,
        sa_data: bytes,
    }
}
