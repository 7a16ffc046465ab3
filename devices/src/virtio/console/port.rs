//! The device's thread: moves bytes between the queues and the line.

use std::{fs::File, io, os::fd::AsRawFd, time::Duration};

use tracing::warn;
use vmm_sys_util::{epoll::EventSet, timerfd::TimerFd};

use super::line::{Input, Line, Output};
use crate::virtio::{Chain, DeviceError, Handler, Poll, VirtQueue};

const RECEIVE_KICK: u64 = 0;
const TRANSMIT_KICK: u64 = 1;
const INPUT: u64 = 2;
const OUTPUT: u64 = 3;
const CLIENT: u64 = 4;
const LOOK: u64 = 5;

/// Bytes that are moved at once.
const AT_ONCE: usize = 4096;
/// How often bytes are moved before other events get their turn.
const TURN: u32 = 256;
/// How often somebody is looked for where the host does not tell.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Whether a descriptor is waited for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Watch {
    On,
    Off,
}

pub(super) struct Port {
    line: Line,
    receive: VirtQueue,
    transmit: VirtQueue,
    /// The buffer that input is read into.
    typed: Chain,
    /// The output that is being taken, and how many of its bytes have been.
    printed: Chain,
    taken: Option<usize>,
    bytes: Box<[u8; AT_ONCE]>,
    input: Watch,
    output: Watch,
    client: Watch,
    look: TimerFd,
}

impl Port {
    pub(super) fn new(line: Line, receive: VirtQueue, transmit: VirtQueue, look: TimerFd) -> Self {
        Self {
            line,
            typed: receive.chain(),
            printed: transmit.chain(),
            taken: None,
            receive,
            transmit,
            bytes: Box::new([0; AT_ONCE]),
            input: Watch::Off,
            output: Watch::Off,
            client: Watch::Off,
            look,
        }
    }

    pub(super) fn into_line(self) -> Line {
        self.line
    }

    /// Takes what the guest prints, for as long as the line does.
    fn transmit(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        for _ in 0..TURN {
            let taken = match self.taken {
                Some(taken) => taken,
                None if self.transmit.pop(&mut self.printed)? => 0,
                None => {
                    self.transmit.signal()?;
                    if self.transmit.enable_kicks()? {
                        continue;
                    }
                    return self.flush(poll);
                }
            };
            self.taken = Some(taken);
            let room = self.line.room().min(AT_ONCE);
            let count = self
                .printed
                .readable
                .read_at(taken, &mut self.bytes[..room]);
            self.line.take(&self.bytes[..count]);
            if taken + count >= self.printed.readable.len() {
                self.transmit.push(self.printed.head(), 0)?;
                self.taken = None;
            } else {
                self.taken = Some(taken + count);
                if self.line.room() == 0 {
                    self.flush(poll)?;
                    if self.line.room() == 0 {
                        return self.transmit.signal();
                    }
                }
            }
        }
        self.transmit.come_back();
        self.transmit.signal()?;
        self.flush(poll)
    }

    /// Writes what is on its way out, and waits for the line to take the rest.
    fn flush(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        match self.line.flush() {
            Output::Done => self.watch_output(Watch::Off, poll),
            Output::Later => self.watch_output(Watch::On, poll),
            Output::End => self.hang_up(poll),
        }
    }

    /// Gives the guest its input, for as long as it has buffers.
    fn receive(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        for _ in 0..TURN {
            if self.line.input().is_none() {
                return self.receive.signal();
            }
            if !self.receive.pop(&mut self.typed)? {
                self.receive.signal()?;
                if self.receive.enable_kicks()? {
                    continue;
                }
                return self.watch_input(Watch::Off, poll);
            }
            let room = self.typed.writable.len().min(AT_ONCE);
            if room == 0 {
                self.receive.push(self.typed.head(), 0)?;
                continue;
            }
            match self.line.read(&mut self.bytes[..room]) {
                Input::Bytes(count) => {
                    let count = self.typed.writable.write_at(0, &self.bytes[..count]);
                    self.receive.push(self.typed.head(), count as u32)?;
                }
                Input::Later => {
                    self.receive.unpop();
                    self.receive.signal()?;
                    return self.watch_input(Watch::On, poll);
                }
                Input::End => {
                    self.receive.unpop();
                    self.receive.signal()?;
                    return self.end(poll);
                }
            }
        }
        self.receive.come_back();
        self.receive.signal()
    }

    fn watch_input(&mut self, wanted: Watch, poll: &Poll) -> Result<(), DeviceError> {
        set_watch(&mut self.input, wanted, self.line.input(), INPUT, poll)
    }

    fn watch_output(&mut self, wanted: Watch, poll: &Poll) -> Result<(), DeviceError> {
        set_watch(&mut self.output, wanted, self.line.output(), OUTPUT, poll)
    }

    /// The input has come to its end.
    fn end(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        if self.line.is_one_connection() {
            return self.hang_up(poll);
        }
        self.watch_input(Watch::Off, poll)?;
        self.line.end_input();
        Ok(())
    }

    /// Nobody is there any more: the guest's output is not held up from now on.
    fn hang_up(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        self.watch_input(Watch::Off, poll)?;
        self.watch_output(Watch::Off, poll)?;
        self.line.hang_up();
        self.transmit.come_back();
        self.look_later()
    }

    /// Looks for somebody after a while, where the host does not tell.
    fn look_later(&mut self) -> Result<(), DeviceError> {
        if self.line.needs_looking() || self.client == Watch::Off {
            self.look
                .reset(LOOK_EVERY, None)
                .map_err(|error| DeviceError::host("cannot set a timer")(error.into()))?;
        }
        Ok(())
    }

    fn look(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        // The event stays until the timer is set anew.
        self.look
            .clear()
            .map_err(|error| DeviceError::host("cannot set a timer")(error.into()))?;
        self.watch_clients(poll)?;
        if self.line.needs_looking() && !matches!(self.line.look_for_peer(), Ok(true)) {
            return self.look_later();
        }
        self.greet(poll)
    }

    fn watch_clients(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        if let Some(listener) = self.line.listener()
            && self.client == Watch::Off
        {
            poll.add(listener.as_raw_fd(), CLIENT, EventSet::IN)
                .map_err(DeviceError::host("cannot wait for clients of the console"))?;
        }
        self.client = Watch::On;
        Ok(())
    }

    /// A client has come, and takes the place of the one before.
    fn accept(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        self.hang_up(poll)?;
        match self.line.accept() {
            Ok(()) => self.greet(poll),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => {
                warn!("the console cannot take a client: {error}");
                if let Some(listener) = self.line.listener() {
                    poll.remove(listener.as_raw_fd())
                        .map_err(DeviceError::host("cannot wait for clients of the console"))?;
                }
                self.client = Watch::Off;
                self.look_later()
            }
        }
    }

    /// Somebody has come, or may have.
    fn greet(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        self.transmit(poll)?;
        self.receive(poll)
    }
}

impl Handler for Port {
    fn start(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        poll.add_bell(self.receive.kick(), RECEIVE_KICK)
            .and_then(|()| poll.add_bell(self.transmit.kick(), TRANSMIT_KICK))
            .and_then(|()| poll.add(self.look.as_raw_fd(), LOOK, EventSet::IN))
            .map_err(DeviceError::host("cannot wait for the driver"))?;
        self.look(poll)
    }

    fn ready(&mut self, token: u64, _events: EventSet, poll: &Poll) -> Result<(), DeviceError> {
        match token {
            RECEIVE_KICK | INPUT => self.receive(poll),
            TRANSMIT_KICK => self.transmit(poll),
            OUTPUT => {
                self.flush(poll)?;
                self.transmit(poll)
            }
            CLIENT => self.accept(poll),
            _ => self.look(poll),
        }
    }
}

/// Waits for `file`, which `watch` belongs to, or does so no longer.
fn set_watch(
    watch: &mut Watch,
    wanted: Watch,
    file: Option<&File>,
    token: u64,
    poll: &Poll,
) -> Result<(), DeviceError> {
    let Some(file) = file else {
        *watch = Watch::Off;
        return Ok(());
    };
    if *watch == wanted {
        return Ok(());
    }
    let events = if token == INPUT {
        EventSet::IN
    } else {
        EventSet::OUT
    };
    let done = match wanted {
        Watch::On => poll.add(file.as_raw_fd(), token, events),
        Watch::Off => poll.remove(file.as_raw_fd()),
    };
    match done {
        // An ordinary file: there is nothing to wait for.
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => Ok(()),
        Err(source) => Err(DeviceError::host("cannot wait for the console")(source)),
        Ok(()) => {
            *watch = wanted;
            Ok(())
        }
    }
}
