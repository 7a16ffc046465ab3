//! A connection to a back end: what it can do, and the conversations in which it is put to work and to rest.

use std::{
    io,
    os::{fd::AsRawFd, unix::net::UnixStream},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use vhost::{
    VhostBackend,
    vhost_user::{
        Frontend, FrontendReqHandler, HandlerResult, VhostUserFrontend,
        VhostUserFrontendReqHandler, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
        message::{VhostUserConfigFlags, VhostUserHeaderFlag},
    },
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{
    Error,
    deadline::{PATIENCE, within},
    memory,
};
use crate::virtio::{Activation, Notify, VirtQueue};

/// How often it is looked for a back end that is still starting.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// What a device needs of its back end.
#[derive(Clone, Debug)]
pub(super) struct Needs {
    /// How many queues it is to work on.
    pub(super) queues: u16,
    /// The part of the protocol without which it is of no use.
    pub(super) protocol: VhostUserProtocolFeatures,
}

/// What a back end works with, once the driver is ready.
pub(super) struct Running {
    /// The features agreed on with the driver.
    pub(super) features: u64,
    /// The guest's memory.
    pub(super) memory: GuestMemoryMmap,
    /// The queues that are the back end's.
    pub(super) queues: Vec<VirtQueue>,
    /// The way to the driver.
    pub(super) notify: Arc<dyn Notify>,
}

impl Running {
    /// All queues that the driver has set up.
    pub(super) fn all_queues(driver: Activation) -> Self {
        Self {
            features: driver.features,
            memory: driver.memory,
            queues: driver.queues.into_iter().flatten().collect(),
            notify: driver.notify,
        }
    }
}

/// What a back end says without being asked.
#[derive(Default)]
pub(super) struct News {
    config_changed: AtomicBool,
}

impl VhostUserFrontendReqHandler for News {
    fn handle_config_change(&self) -> HandlerResult<u64> {
        self.config_changed.store(true, Ordering::Relaxed);
        Ok(0)
    }
}

/// A back end that is connected to.
pub(super) struct Backend {
    frontend: Frontend,
    /// The same socket, to hang up and to see whether the other side has.
    socket: UnixStream,
    /// The other way, on which the back end asks.
    news: Option<(FrontendReqHandler<News>, Arc<News>)>,
    features: u64,
    protocol: VhostUserProtocolFeatures,
}

impl Backend {
    /// Connects to the back end at `socket`, waiting for it for at most `patience`.
    ///
    /// # Errors
    /// When there is none, or none that has what the device `needs`.
    pub(super) fn connect(socket: &Path, needs: &Needs, patience: Duration) -> Result<Self, Error> {
        let deadline = Instant::now() + patience;
        let socket = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) if is_early(&error) && Instant::now() < deadline => {
                    thread::sleep(LOOK_EVERY);
                }
                Err(reason) => {
                    return Err(Error::Connect {
                        socket: socket.to_owned(),
                        reason,
                    });
                }
            }
        };
        let stream = socket.try_clone().map_err(Error::host("share a socket"))?;
        let mut backend = Self {
            frontend: Frontend::from_stream(stream, needs.queues.into()),
            socket,
            news: None,
            features: 0,
            protocol: VhostUserProtocolFeatures::empty(),
        };
        backend.converse(|backend| backend.negotiate(needs))?;
        Ok(backend)
    }

    /// All feature bits that it offers.
    pub(super) fn features(&self) -> u64 {
        self.features
    }

    /// The socket to it.
    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// The way on which it asks, if it has one.
    pub(super) fn news(&self) -> Option<&impl AsRawFd> {
        self.news.as_ref().map(|(requests, _)| requests)
    }

    /// Takes one request from the back end. Returns whether its configuration has changed.
    ///
    /// # Errors
    /// When the request cannot be understood.
    pub(super) fn hear(&mut self) -> Result<bool, Error> {
        let Some((requests, news)) = &mut self.news else {
            return Ok(false);
        };
        requests
            .handle_request()
            .map_err(Error::refused("ask for what it may"))?;
        Ok(news.config_changed.swap(false, Ordering::Relaxed))
    }

    /// The first `N` bytes of the device's configuration.
    ///
    /// # Errors
    /// When the back end does not say them.
    pub(super) fn config<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        self.converse(|backend| {
            let (_, bytes) = backend
                .frontend
                .get_config(0, N as u32, VhostUserConfigFlags::empty(), &[0; N])
                .map_err(Error::refused("say its configuration"))?;
            bytes.try_into().map_err(|_| Error::Refused {
                what: "say its configuration",
                reason: vhost::Error::VhostUserProtocol(vhost::vhost_user::Error::InvalidMessage),
            })
        })
    }

    /// Puts the back end to work on `running`: each queue from where `base` says on, and those that `enabled` names.
    ///
    /// # Errors
    /// When it does not want to.
    pub(super) fn start(
        &mut self,
        running: &Running,
        base: impl Fn(&VirtQueue) -> u16,
        enabled: impl Fn(u16) -> bool,
    ) -> Result<(), Error> {
        let missing = running.features & !self.features;
        if missing != 0 {
            return Err(Error::Features(missing));
        }
        let table = memory::table(&running.memory)?;
        self.converse(|backend| {
            let frontend = &mut backend.frontend;
            let features = running.features
                | 1 << VIRTIO_F_VERSION_1
                | backend.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
            frontend
                .set_features(features)
                .map_err(Error::refused("take the features"))?;
            frontend
                .set_mem_table(&table)
                .map_err(Error::refused("take the guest's memory"))?;
            for queue in &running.queues {
                let index = usize::from(queue.index());
                let vring = memory::vring(&running.memory, queue)?;
                let call = match running.notify.call(queue.index()) {
                    Some(call) => call,
                    None => unheard()?,
                };
                let refused = || Error::refused("take a queue");
                frontend
                    .set_vring_num(index, queue.ring().size())
                    .map_err(refused())?;
                frontend.set_vring_addr(index, &vring).map_err(refused())?;
                frontend
                    .set_vring_base(index, base(queue))
                    .map_err(refused())?;
                frontend.set_vring_call(index, &call).map_err(refused())?;
                frontend
                    .set_vring_kick(index, queue.kick())
                    .map_err(refused())?;
            }
            backend.enable(&running.queues, &enabled)
        })
    }

    /// Has the back end work on those of `queues` that `enabled` names, and on no others.
    ///
    /// # Errors
    /// When it does not want to.
    pub(super) fn choose(
        &mut self,
        queues: &[VirtQueue],
        enabled: impl Fn(u16) -> bool,
    ) -> Result<(), Error> {
        self.converse(|backend| backend.enable(queues, &enabled))
    }

    /// Ends the work on `queues`: when the back end has answered, it does not touch them any more.
    ///
    /// # Errors
    /// When it does not answer.
    pub(super) fn stop(&mut self, queues: &[VirtQueue]) -> Result<(), Error> {
        self.converse(|backend| {
            backend.enable(queues, &|_| false)?;
            for queue in queues {
                backend
                    .frontend
                    .get_vring_base(queue.index().into())
                    .map_err(Error::refused("let go of a queue"))?;
            }
            Ok(())
        })
    }

    fn enable(
        &mut self,
        queues: &[VirtQueue],
        enabled: &impl Fn(u16) -> bool,
    ) -> Result<(), Error> {
        if self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            // Such a back end knows only queues that are enabled.
            return Ok(());
        }
        for queue in queues {
            self.frontend
                .set_vring_enable(queue.index().into(), enabled(queue.index()))
                .map_err(Error::refused("enable or disable a queue"))?;
        }
        Ok(())
    }

    fn negotiate(&mut self, needs: &Needs) -> Result<(), Error> {
        let frontend = &mut self.frontend;
        frontend
            .set_owner()
            .map_err(Error::refused("take an owner"))?;
        self.features = frontend
            .get_features()
            .map_err(Error::refused("say its features"))?;
        if self.features & (1 << VIRTIO_F_VERSION_1) == 0 {
            return Err(Error::Legacy);
        }
        if self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0 {
            let known = needs.protocol
                | VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::REPLY_ACK;
            let offered = frontend
                .get_protocol_features()
                .map_err(Error::refused("say its protocol features"))?;
            let mut wanted = offered & known;
            // The other way is of use for nothing but changes of the configuration.
            if wanted.contains(VhostUserProtocolFeatures::CONFIG) {
                wanted |= offered & VhostUserProtocolFeatures::BACKEND_REQ;
            }
            frontend
                .set_protocol_features(wanted)
                .map_err(Error::refused("take the protocol features"))?;
            self.protocol = wanted;
        }
        let missing = needs.protocol - self.protocol;
        if !missing.is_empty() {
            return Err(Error::Protocol(missing));
        }
        if self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        if self.protocol.contains(VhostUserProtocolFeatures::MQ) {
            let has = frontend
                .get_queue_num()
                .map_err(Error::refused("say how many queues it has"))?;
            if has < needs.queues.into() {
                return Err(Error::Queues {
                    has,
                    wanted: needs.queues,
                });
            }
        }
        if self
            .protocol
            .contains(VhostUserProtocolFeatures::BACKEND_REQ)
        {
            self.open_news()?;
        }
        Ok(())
    }

    fn open_news(&mut self) -> Result<(), Error> {
        let news = Arc::new(News::default());
        let mut requests = FrontendReqHandler::new(Arc::clone(&news))
            .map_err(Error::refused("get a way to ask on"))?;
        requests.set_reply_ack_flag(self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK));
        self.frontend
            .set_backend_request_fd(&requests.get_tx_raw_fd())
            .map_err(Error::refused("take a way to ask on"))?;
        self.news = Some((requests, news));
        Ok(())
    }

    fn converse<T>(
        &mut self,
        conversation: impl FnOnce(&mut Self) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let socket = self
            .socket
            .try_clone()
            .map_err(Error::host("share a socket"))?;
        within(PATIENCE, &socket, || conversation(self))
    }
}

/// Whether a back end that is about to listen is met like this.
fn is_early(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
    )
}

/// An event in place of an interrupt that the driver does not want. Without it, the back end would keep the one of a driver before.
fn unheard() -> Result<EventFd, Error> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::host("get an event"))
}
