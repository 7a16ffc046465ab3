//! Devices whose queues another process works on: the front end's side of
//! [vhost-user](https://qemu-project.gitlab.io/qemu/interop/vhost-user.html).
//!
//! The back end — virtiofsd, DPDK, SPDK, `qemu-storage-daemon` — listens on a Unix socket. Rota connects to it, gives it the
//! guest's memory, the rings, and the events that the driver kicks and is interrupted with; from then on it is in no request's
//! way.
//!
//! ```text
//! Block, Net, Fs ── Link ─┬─ idle:   Backend ────────── socket ──▶ the back end's process
//!                         └─ active: Watch (a thread) ─ Backend ─ ▲
//! driver ──── kick (ioeventfd) ───────────────────────────────────┘ ── call (irqfd) ──▶ driver
//! ```
//!
//! A back end that does not answer for [`PATIENCE`](deadline::PATIENCE) is hung up on, so that no VP waits for it for ever. One that
//! goes away ([`watch`]) is said to be gone, and connected to again where nothing is lost by that.

mod backend;
mod block;
mod deadline;
mod fs;
mod link;
mod memory;
mod net;
mod watch;

use std::{io, path::PathBuf};

use thiserror::Error;
use vhost::vhost_user::{self, VhostUserProtocolFeatures};

use super::DeviceError;

pub use block::Block;
pub use fs::{Fs, InvalidTag, Tag};
pub use net::Net;

/// Why a back end is of no use.
#[derive(Debug, Error)]
pub enum Error {
    /// Nobody listens.
    #[error("cannot connect to the vhost-user back end at {}: {reason}", socket.display())]
    Connect {
        /// Where it should listen.
        socket: PathBuf,
        /// What the host said.
        reason: io::Error,
    },
    /// It does not do what it is asked to, or does not answer.
    #[error("the vhost-user back end does not {what}: {reason}")]
    Refused {
        /// What it was asked to do.
        what: &'static str,
        /// What came of it.
        reason: vhost::Error,
    },
    /// It knows only what was before virtio 1.0.
    #[error("the vhost-user back end does not speak virtio 1.0")]
    Legacy,
    /// It does not know a part of the protocol that the device needs.
    #[error("the vhost-user back end lacks the protocol feature {0:?}")]
    Protocol(VhostUserProtocolFeatures),
    /// It has not enough queues.
    #[error("the vhost-user back end has {has} queues, not the {wanted} that were asked for")]
    Queues {
        /// How many it has.
        has: u64,
        /// How many the device has.
        wanted: u16,
    },
    /// It does not do any more what the driver was promised.
    #[error("the vhost-user back end lacks features that the driver uses: {0:#x}")]
    Features(u64),
    /// Guest memory that another process cannot be given.
    #[error(
        "vhost-user needs guest memory that can be shared with the back end: use --memory shared=on"
    )]
    PrivateMemory,
    /// A ring that does not lie in one piece of memory.
    #[error("queue {0} does not lie in one region of guest memory")]
    Ring(u16),
    /// The host has no more of something.
    #[error("cannot {what}: {reason}")]
    Host {
        /// What the host was asked for.
        what: &'static str,
        /// What it said.
        reason: io::Error,
    },
}

impl Error {
    /// For `map_err`: what the back end was asked to do.
    fn refused<E: Into<vhost::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |reason| Self::Refused {
            what,
            reason: reason.into(),
        }
    }

    /// For `map_err`: what the host was asked for.
    fn host(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |reason| Self::Host { what, reason }
    }

    /// Whether there is nobody at the other end of the socket any more.
    fn is_loss(&self) -> bool {
        use vhost_user::Error::{Disconnected, PartialMessage, SocketBroken};
        matches!(
            self,
            Self::Refused {
                reason: vhost::Error::VhostUserProtocol(
                    Disconnected | PartialMessage | SocketBroken(_)
                ),
                ..
            }
        )
    }
}

impl From<Error> for DeviceError {
    fn from(error: Error) -> Self {
        Self::Host {
            what: "vhost-user",
            source: io::Error::other(error),
        }
    }
}
