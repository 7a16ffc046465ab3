//! The thread of a pair of queues: frames both ways between the queues and a port.

use std::{
    io,
    os::fd::AsRawFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tracing::warn;
use vmm_sys_util::{
    epoll::EventSet,
    eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd},
};

use super::{
    super::{DeviceError, Handler, Notify, Poll},
    backend::{Port, Trouble},
    receive::{self, Receiver},
    shared::Shared,
    transmit::{self, Transmitter},
};

/// Whether the driver uses a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Position {
    On,
    Off,
}

/// Turns a pair on and off from another thread.
pub(super) struct Switch {
    position: Mutex<Position>,
    /// Wakes the pair's thread.
    bell: EventFd,
}

impl Switch {
    pub(super) fn new(position: Position) -> io::Result<Self> {
        Ok(Self {
            position: Mutex::new(position),
            bell: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    /// Turns the pair on or off. When this returns, a pair that is off does nothing with its queues and its port.
    pub(super) fn turn(&self, position: Position) {
        *self.lock() = position;
        self.ring();
    }

    fn lock(&self) -> MutexGuard<'_, Position> {
        self.position.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ring(&self) {
        // An eventfd that is full is readable, too.
        let _ = self.bell.write(1);
    }
}

/// What the thread waits for.
#[derive(Clone, Copy)]
#[repr(u64)]
enum Token {
    ReceiveKick,
    TransmitKick,
    Port,
    Bell,
    ReceiveRate,
    TransmitRate,
}

/// Whether there is any point in looking at the port for a direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waits {
    /// When the port is ready, there is something to do.
    ForPort,
    /// Something else has to happen first.
    ForOthers,
}

/// A pair of queues at a port.
pub(super) struct Pair {
    receiver: Receiver,
    transmitter: Transmitter,
    port: Box<dyn Port>,
    switch: Arc<Switch>,
    shared: Arc<Shared>,
    notify: Arc<dyn Notify>,
    receiving: Waits,
    transmitting: Waits,
    /// What the port is polled for.
    polled: EventSet,
}

impl Pair {
    pub(super) fn new(
        receiver: Receiver,
        transmitter: Transmitter,
        port: Box<dyn Port>,
        switch: Arc<Switch>,
        shared: Arc<Shared>,
        notify: Arc<dyn Notify>,
    ) -> Self {
        Self {
            receiver,
            transmitter,
            port,
            switch,
            shared,
            notify,
            receiving: Waits::ForPort,
            transmitting: Waits::ForOthers,
            polled: EventSet::empty(),
        }
    }

    /// The port, for the next driver.
    pub(super) fn into_port(self) -> Box<dyn Port> {
        self.port
    }

    fn receive(&mut self) -> Result<(), DeviceError> {
        if !self.shared.is_connected() {
            return Ok(());
        }
        self.receiving = match self.receiver.run(&mut *self.port)? {
            receive::Pause::NoFrames => Waits::ForPort,
            receive::Pause::NoBuffers | receive::Pause::Rate => Waits::ForOthers,
            receive::Pause::Turn => {
                self.switch.ring();
                Waits::ForPort
            }
            receive::Pause::Gone(error) => {
                self.disconnect(&error);
                Waits::ForOthers
            }
        };
        Ok(())
    }

    fn transmit(&mut self) -> Result<(), DeviceError> {
        let pause = if self.shared.is_connected() {
            self.transmitter.run(&mut *self.port)?
        } else {
            self.transmitter.lose()?
        };
        self.transmitting = match pause {
            transmit::Pause::NoRoom => Waits::ForPort,
            transmit::Pause::NoFrames | transmit::Pause::Rate => Waits::ForOthers,
            transmit::Pause::Turn => {
                self.switch.ring();
                Waits::ForOthers
            }
            transmit::Pause::Gone(error) => {
                self.disconnect(&error);
                // What is in the queue is lost.
                self.switch.ring();
                Waits::ForOthers
            }
        };
        Ok(())
    }

    fn flush(&mut self) {
        if let Err(Trouble::Gone(error) | Trouble::Frame(error)) = self.port.flush() {
            self.disconnect(&error);
        }
    }

    /// The port is ready. One that says so for no reason would say so for ever: it is gone.
    fn port_is_ready(&mut self, events: EventSet) -> Result<(), DeviceError> {
        if events.contains(EventSet::OUT) {
            self.flush();
            self.transmit()?;
        }
        let hung_up = events.intersects(EventSet::ERROR | EventSet::HANG_UP);
        // Who waits for buffers or for the rate finds the frames when there are some.
        if hung_up || (events.contains(EventSet::IN) && self.receiving == Waits::ForPort) {
            self.receive()?;
        }
        if hung_up && self.receiving == Waits::ForPort && self.shared.is_connected() {
            self.disconnect(&io::ErrorKind::ConnectionAborted.into());
        }
        Ok(())
    }

    fn disconnect(&mut self, error: &io::Error) {
        warn!("the network's other side is gone: {error}");
        self.shared.disconnect(&*self.notify);
    }

    /// Polls the port: for frames always, each time that some come, so that it costs no system call to stop and to go on; for room
    /// when it had none.
    fn look(&mut self, position: Position, poll: &Poll) -> Result<(), DeviceError> {
        let mut wanted = EventSet::empty();
        if position == Position::On && self.shared.is_connected() {
            wanted = EventSet::IN | EventSet::EDGE_TRIGGERED;
            if self.transmitting == Waits::ForPort || self.port.has_unsent() {
                wanted |= EventSet::OUT;
            }
        }
        if wanted == self.polled {
            return Ok(());
        }
        let (port, token) = (self.port.descriptor(), Token::Port as u64);
        let polled = if self.polled.is_empty() {
            poll.add(port, token, wanted)
        } else if wanted.is_empty() {
            poll.remove(port)
        } else {
            poll.change(port, token, wanted)
        };
        polled.map_err(DeviceError::host("cannot wait for the network"))?;
        self.polled = wanted;
        Ok(())
    }
}

impl Handler for Pair {
    fn start(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        let bells = [
            (self.receiver.queue().kick(), Token::ReceiveKick),
            (self.transmitter.queue().kick(), Token::TransmitKick),
            (&self.switch.bell, Token::Bell),
        ];
        for (bell, token) in bells {
            poll.add_bell(bell, token as u64)
                .map_err(DeviceError::host("cannot wait for the driver"))?;
        }
        let gates = [
            (self.receiver.gate().as_raw_fd(), Token::ReceiveRate),
            (self.transmitter.gate().as_raw_fd(), Token::TransmitRate),
        ];
        for (gate, token) in gates {
            poll.add(gate, token as u64, EventSet::IN)
                .map_err(DeviceError::host("cannot wait for the rate limiter"))?;
        }
        // What has come before the thread was there is looked at first.
        self.switch.ring();
        Ok(())
    }

    fn ready(&mut self, token: u64, events: EventSet, poll: &Poll) -> Result<(), DeviceError> {
        let switch = Arc::clone(&self.switch);
        let position = switch.lock();
        if token == Token::ReceiveRate as u64 {
            reopen(self.receiver.gate())?;
        } else if token == Token::TransmitRate as u64 {
            reopen(self.transmitter.gate())?;
        }
        if *position == Position::On {
            if token == Token::Port as u64 {
                self.port_is_ready(events)?;
            } else if token == Token::ReceiveKick as u64 || token == Token::ReceiveRate as u64 {
                self.receive()?;
            } else if token == Token::TransmitKick as u64 || token == Token::TransmitRate as u64 {
                self.transmit()?;
            } else {
                self.transmit()?;
                self.receive()?;
            }
        }
        self.look(*position, poll)
    }
}

fn reopen(gate: &mut super::super::rate_limiter::Gate) -> Result<(), DeviceError> {
    gate.reopen()
        .map_err(DeviceError::host("cannot wait for the rate limiter"))
}
