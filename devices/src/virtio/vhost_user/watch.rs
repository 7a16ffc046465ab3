//! The thread beside a back end at work: sees it go away, and looks for the next one.

use std::{os::fd::AsRawFd, path::PathBuf, sync::atomic::Ordering, time::Duration};

use tracing::{info, warn};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::{epoll::EventSet, timerfd::TimerFd};

use super::{
    Error,
    backend::{Backend, Needs, Running},
};
use crate::virtio::{DeviceError, Handler, Poll, VirtQueue};

/// How often it is looked for a back end that has gone away.
const LOOK_EVERY: Duration = Duration::from_secs(1);

const SOCKET: u64 = 0;
const NEWS: u64 = 1;
const TIMER: u64 = 2;
const OWN: u64 = 3;

/// What becomes of a device whose back end has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Loss {
    /// Another back end can go on where the one before has stopped.
    GoOn,
    /// The driver has to start anew.
    Reset,
}

/// What one kind of device does differently from another while its back end works.
pub(super) trait Role: Send + 'static {
    /// What becomes of the device without its back end, which has left `queues` as they are.
    fn loss(&mut self, queues: &[VirtQueue]) -> Loss;

    /// The back end is there, or not.
    fn present(&mut self, _present: bool) {}

    /// Whether the driver uses queue `index`.
    fn enabled(&self, _index: u16) -> bool {
        true
    }

    /// The back end's configuration has changed.
    ///
    /// # Errors
    /// When it cannot be read.
    fn config_changed(&mut self, _backend: &mut Backend) -> Result<(), Error> {
        Ok(())
    }

    /// A queue that is not the back end's but the device's own.
    fn own_queue(&self) -> Option<&VirtQueue> {
        None
    }

    /// The driver has kicked that queue. Returns whether it uses other queues from now on.
    ///
    /// # Errors
    /// When the driver has broken a rule.
    fn kicked(&mut self) -> Result<bool, DeviceError> {
        Ok(false)
    }
}

/// A back end at work.
pub(super) struct Watch<R> {
    /// What the warnings call the device.
    pub(super) name: String,
    /// Where the back end listens.
    pub(super) socket: PathBuf,
    /// What is asked of it.
    pub(super) needs: Needs,
    /// The back end, unless it is gone.
    pub(super) backend: Option<Backend>,
    /// What it works on.
    pub(super) running: Running,
    /// What kind of device it is for.
    pub(super) role: R,
    /// Goes off when it is time to look for a back end.
    pub(super) timer: TimerFd,
}

impl<R: Role> Watch<R> {
    fn listen(&self, poll: &Poll) -> Result<(), DeviceError> {
        let waiting = DeviceError::host("cannot wait for the back end");
        let Some(backend) = &self.backend else {
            return Ok(());
        };
        let news = backend.news().map_or(Ok(()), |news| {
            poll.add(news.as_raw_fd(), NEWS, EventSet::IN)
        });
        news.and_then(|()| poll.add(backend.socket().as_raw_fd(), SOCKET, EventSet::READ_HANG_UP))
            .map_err(waiting)
    }

    /// The back end has gone.
    fn lose(&mut self) -> Result<(), DeviceError> {
        // Closing them ends the wait for its descriptors.
        self.backend = None;
        // It may not have come to tell of its last answers.
        for queue in &self.running.queues {
            self.running.notify.used(queue.index());
        }
        let socket = self.socket.display();
        match self.role.loss(&self.running.queues) {
            Loss::GoOn => {
                warn!(
                    "{}: the vhost-user back end at {socket} has gone; looking for it",
                    self.name
                );
                self.role.present(false);
                self.running.notify.config_changed();
                self.timer
                    .reset(LOOK_EVERY, Some(LOOK_EVERY))
                    .map_err(|error| DeviceError::Host {
                        what: "cannot set a timer",
                        source: error.into(),
                    })
            }
            Loss::Reset => {
                warn!(
                    "{}: the vhost-user back end at {socket} has gone, with requests in it; the device needs a reset",
                    self.name
                );
                self.running.notify.needs_reset();
                Ok(())
            }
        }
    }

    /// Looks for a back end once.
    fn find(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        let found =
            Backend::connect(&self.socket, &self.needs, Duration::ZERO).and_then(|mut backend| {
                self.role.config_changed(&mut backend)?;
                backend.start(
                    &self.running,
                    |queue| used_index(queue).unwrap_or_default(),
                    |index| self.role.enabled(index),
                )?;
                Ok(backend)
            });
        match found {
            Ok(backend) => self.backend = Some(backend),
            Err(Error::Connect { .. }) => return Ok(()),
            Err(error) => {
                warn!("{}: {error}", self.name);
                return Ok(());
            }
        }
        self.timer.clear().map_err(|error| DeviceError::Host {
            what: "cannot clear a timer",
            source: error.into(),
        })?;
        info!(
            "{}: the vhost-user back end at {} is back",
            self.name,
            self.socket.display()
        );
        self.role.present(true);
        self.running.notify.config_changed();
        self.listen(poll)?;
        // Kicks may have gone to the one before.
        for queue in &self.running.queues {
            queue.come_back();
        }
        Ok(())
    }

    fn hear(&mut self) -> Result<(), DeviceError> {
        let Some(backend) = &mut self.backend else {
            return Ok(());
        };
        match backend.hear() {
            Ok(false) => Ok(()),
            Ok(true) => {
                match self.role.config_changed(backend) {
                    Ok(()) => self.running.notify.config_changed(),
                    Err(error) => warn!("{}: {error}", self.name),
                }
                Ok(())
            }
            // It is also closed when the back end goes.
            Err(_) => self.lose(),
        }
    }

    fn own_work(&mut self) -> Result<(), DeviceError> {
        if !self.role.kicked()? {
            return Ok(());
        }
        if let Some(backend) = &mut self.backend {
            let chosen = backend.choose(&self.running.queues, |index| self.role.enabled(index));
            if let Err(error) = chosen {
                warn!("{}: {error}", self.name);
            }
        }
        Ok(())
    }
}

impl<R: Role> Handler for Watch<R> {
    fn start(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        let timer = poll.add(self.timer.as_raw_fd(), TIMER, EventSet::IN);
        let own = self
            .role
            .own_queue()
            .map_or(Ok(()), |queue| poll.add_bell(queue.kick(), OWN));
        timer
            .and(own)
            .map_err(DeviceError::host("cannot wait for the driver"))?;
        self.listen(poll)
    }

    fn ready(&mut self, token: u64, _events: EventSet, poll: &Poll) -> Result<(), DeviceError> {
        match token {
            SOCKET if self.backend.is_some() => self.lose(),
            NEWS => self.hear(),
            OWN => self.own_work(),
            TIMER => {
                let _ = self.timer.wait();
                match self.backend {
                    Some(_) => Ok(()),
                    None => self.find(poll),
                }
            }
            _ => Ok(()),
        }
    }
}

/// How many chains of `queue` were used, as its ring in guest memory says; `None` where there is no memory.
fn used_index(queue: &VirtQueue) -> Option<u16> {
    index_at(queue, queue.ring().used_ring())
}

/// Whether nothing is in `queue` that a back end could have begun with.
pub(super) fn is_idle(queue: &VirtQueue) -> bool {
    used_index(queue) == index_at(queue, queue.ring().avail_ring())
}

fn index_at(queue: &VirtQueue, ring: u64) -> Option<u16> {
    // Behind two bytes of flags (virtio 1.3, sections 2.7.6 and 2.7.8).
    let at = GuestAddress(ring.checked_add(2)?);
    let index: u16 = queue.memory().load(at, Ordering::Acquire).ok()?;
    Some(u16::from_le(index))
}
