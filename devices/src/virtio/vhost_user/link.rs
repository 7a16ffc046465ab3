//! A device's link to its back end, over all the times that the driver activates and resets it.

use std::{path::PathBuf, time::Duration};

use tracing::warn;
use vmm_sys_util::timerfd::TimerFd;

use super::{
    Error,
    backend::{Backend, Needs, Running},
    watch::{Role, Watch},
};
use crate::virtio::{DeviceError, VirtQueue, Worker};

/// How long a back end is waited for that is started together with the machine.
const START: Duration = Duration::from_secs(3);

/// A device's link to its back end.
pub(super) struct Link<R> {
    name: String,
    socket: PathBuf,
    needs: Needs,
    /// What the back end at the start could do with rings.
    ring_features: u64,
    state: State<R>,
}

enum State<R> {
    /// The driver does not use the device. `None`: the back end has gone.
    Idle(Option<Backend>),
    /// It does.
    Active(Worker<Watch<R>>),
}

impl<R: Role> Link<R> {
    /// Connects the device `name` to the back end at `socket`, which may be just starting. Returns the back end, too, for a
    /// look at it.
    ///
    /// # Errors
    /// When there is none, or none that has what the device `needs`.
    pub(super) fn new<T>(
        name: &str,
        socket: PathBuf,
        needs: Needs,
        look: impl FnOnce(&mut Backend) -> Result<T, Error>,
    ) -> Result<(Self, T), Error> {
        let mut backend = Backend::connect(&socket, &needs, START)?;
        let seen = look(&mut backend)?;
        let link = Self {
            name: name.to_owned(),
            socket,
            needs,
            ring_features: backend.features() & VirtQueue::FEATURES,
            state: State::Idle(Some(backend)),
        };
        Ok((link, seen))
    }

    /// What the driver may use of the rings' features.
    pub(super) fn ring_features(&self) -> u64 {
        self.ring_features
    }

    /// Puts the back end to work on `running`. One that has gone since the last time is connected to again.
    ///
    /// # Errors
    /// When there is none, or it does not want to.
    pub(super) fn start(&mut self, running: Running, mut role: R) -> Result<(), DeviceError> {
        let State::Idle(backend) = &mut self.state else {
            return Err(DeviceError::Malformed("a device activated twice"));
        };
        let backend = match backend.take() {
            Some(mut backend) => match begin(&mut backend, &running, &role) {
                Ok(()) => backend,
                Err(error) if error.is_loss() => {
                    warn!("{}: {error}; connecting again", self.name);
                    self.begin_anew(&running, &mut role)?
                }
                Err(error) => return Err(error.into()),
            },
            None => self.begin_anew(&running, &mut role)?,
        };
        let notify = running.notify.clone();
        let watch = Watch {
            name: self.name.clone(),
            socket: self.socket.clone(),
            needs: self.needs.clone(),
            backend: Some(backend),
            running,
            role,
            timer: TimerFd::new().map_err(|error| DeviceError::Host {
                what: "cannot get a timer",
                source: error.into(),
            })?,
        };
        let worker = Worker::spawn(&self.name, watch, notify)
            .map_err(DeviceError::host("cannot start a thread"))?;
        self.state = State::Active(worker);
        Ok(())
    }

    fn begin_anew(&self, running: &Running, role: &mut R) -> Result<Backend, Error> {
        let mut backend = Backend::connect(&self.socket, &self.needs, Duration::ZERO)?;
        role.config_changed(&mut backend)?;
        begin(&mut backend, running, role)?;
        role.present(true);
        running.notify.config_changed();
        Ok(backend)
    }

    /// Ends the back end's work.
    pub(super) fn stop(&mut self) {
        let worker = match std::mem::replace(&mut self.state, State::Idle(None)) {
            State::Active(worker) => worker,
            idle @ State::Idle(_) => {
                self.state = idle;
                return;
            }
        };
        let Some(mut watch) = worker.stop() else {
            return;
        };
        if let Some(backend) = &mut watch.backend
            && let Err(error) = backend.stop(&watch.running.queues)
        {
            warn!("{}: {error}; hanging up", self.name);
            watch.backend = None;
        }
        self.state = State::Idle(watch.backend);
    }
}

/// Puts `backend` to work on queues that nobody has worked on.
fn begin<R: Role>(backend: &mut Backend, running: &Running, role: &R) -> Result<(), Error> {
    use virtio_queue::QueueT;
    backend.start(
        running,
        |queue| queue.ring().next_avail(),
        |index| role.enabled(index),
    )
}
