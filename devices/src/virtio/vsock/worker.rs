//! The device's thread: packets between the queues and the connections.

use std::{os::fd::AsRawFd, time::Duration};

use vmm_sys_util::{epoll::EventSet, eventfd::EventFd, timerfd::TimerFd};

use super::{
    mux::{FIRST_CONNECTION, Mux},
    packet::{HEADER, Header, Operation, Parsed},
};
use crate::virtio::{Chain, DeviceError, Handler, Poll, VirtQueue};

const RECEIVE_KICK: u64 = 0;
const TRANSMIT_KICK: u64 = 1;
const EVENT_KICK: u64 = 2;
pub(super) const CLIENTS: u64 = 3;
const TICK: u64 = 4;
const TRANSPORT_RESET: u64 = 5;

/// The most bytes of data in one packet.
const MOST_DATA: usize = 64 << 10;
/// How many packets are moved before other events get their turn.
const TURN: u32 = 256;
const TICK_EVERY: Duration = Duration::from_millis(500);
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`, as it goes to the driver.
const TRANSPORT_RESET_EVENT: [u8; 4] = [0; 4];

pub(super) struct Switch {
    pub(super) cid: u64,
    pub(super) mux: Mux,
    pub(super) receive: VirtQueue,
    pub(super) transmit: VirtQueue,
    pub(super) events: VirtQueue,
    pub(super) chain: Chain,
    pub(super) data: Vec<u8>,
    pub(super) clock: TimerFd,
    pub(super) clock_runs: bool,
    /// Readable when the connections of the guest are void.
    pub(super) void: EventFd,
    /// The guest is to be told of that.
    pub(super) announce: bool,
}

impl Switch {
    /// Gives the guest its packets, for as long as it has buffers.
    fn receive(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        for _ in 0..TURN {
            if !self.mux.has_packets() {
                return self.receive.signal();
            }
            if !self.receive.pop(&mut self.chain)? {
                self.receive.signal()?;
                if self.receive.enable_kicks()? {
                    continue;
                }
                return Ok(());
            }
            let buffers = &mut self.chain.writable;
            let room = buffers.len().saturating_sub(HEADER).min(MOST_DATA);
            if room == 0 {
                return Err(DeviceError::Malformed("a buffer too small for a packet"));
            }
            self.data.resize(MOST_DATA, 0);
            let Some(header) = self.mux.next_packet(&mut self.data[..room], poll)? else {
                self.receive.unpop();
                continue;
            };
            let data = &self.data[..header.length as usize];
            let written =
                buffers.write_at(0, &header.to_bytes(self.cid)) + buffers.write_at(HEADER, data);
            self.receive.push(self.chain.head(), written as u32)?;
        }
        self.receive.come_back();
        self.receive.signal()
    }

    /// Takes packets from the guest, for as long as it takes the answers.
    fn transmit(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        for _ in 0..TURN {
            if self.mux.is_congested() {
                self.receive(poll)?;
                if self.mux.is_congested() {
                    return self.transmit.signal();
                }
            }
            if !self.transmit.pop(&mut self.chain)? {
                self.transmit.signal()?;
                if self.transmit.enable_kicks()? {
                    continue;
                }
                return self.receive(poll);
            }
            let Some(header) = self.chain.readable.array_at::<HEADER>(0) else {
                return Err(DeviceError::Malformed("a packet without a whole header"));
            };
            self.take(&Header::parse(&header, self.cid), poll)?;
            self.transmit.push(self.chain.head(), 0)?;
        }
        self.transmit.come_back();
        self.transmit.signal()?;
        self.receive(poll)
    }

    fn take(&mut self, packet: &Parsed, poll: &Poll) -> Result<(), DeviceError> {
        let header = match packet {
            Parsed::Packet(header) => header,
            Parsed::Refused(header) => {
                if header.operation != Operation::Reset {
                    self.mux.refuse(header.ports);
                }
                return Ok(());
            }
            Parsed::Stray => return Ok(()),
        };
        if header.operation != Operation::Data {
            return self.mux.take(header, poll);
        }
        let there = self.chain.readable.len() - HEADER;
        if header.length as usize > there {
            return Err(DeviceError::Malformed("a packet longer than its buffers"));
        }
        let readable = &self.chain.readable;
        self.data.resize(MOST_DATA, 0);
        self.mux.take_data(
            header,
            &mut self.data,
            |offset, into| readable.read_at(HEADER + offset, into),
            poll,
        )
    }

    /// Tells the guest that its connections are void, when it has a buffer for that.
    fn announce(&mut self) -> Result<(), DeviceError> {
        while self.announce {
            if !self.events.pop(&mut self.chain)? {
                if self.events.enable_kicks()? {
                    continue;
                }
                return Ok(());
            }
            let written = self.chain.writable.write_at(0, &TRANSPORT_RESET_EVENT);
            self.events.push(self.chain.head(), written as u32)?;
            self.announce = false;
        }
        self.events.signal()
    }

    fn set_clock(&mut self) -> Result<(), DeviceError> {
        let needed = self.mux.needs_ticks();
        if needed == self.clock_runs {
            return Ok(());
        }
        self.clock_runs = needed;
        if needed {
            self.clock.reset(TICK_EVERY, None)
        } else {
            self.clock.clear()
        }
        .map_err(|error| DeviceError::host("cannot set a timer")(error.into()))
    }
}

impl Handler for Switch {
    fn start(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        for (queue, token) in [
            (&self.receive, RECEIVE_KICK),
            (&self.transmit, TRANSMIT_KICK),
            (&self.events, EVENT_KICK),
        ] {
            poll.add_bell(queue.kick(), token)
                .map_err(DeviceError::host("cannot wait for the driver"))?;
        }
        for (fd, token) in [
            (self.clock.as_raw_fd(), TICK),
            (self.void.as_raw_fd(), TRANSPORT_RESET),
        ] {
            poll.add(fd, token, EventSet::IN)
                .map_err(DeviceError::host("cannot wait for events"))?;
        }
        self.mux.listen(poll)
    }

    fn ready(&mut self, token: u64, events: EventSet, poll: &Poll) -> Result<(), DeviceError> {
        match token {
            RECEIVE_KICK => {
                self.receive(poll)?;
                // It may have been held up by answers that were not taken.
                self.transmit(poll)?;
            }
            TRANSMIT_KICK => self.transmit(poll)?,
            EVENT_KICK => self.announce()?,
            CLIENTS => self.mux.accept(poll)?,
            TICK => {
                self.clock_runs = false;
                // The event stays until the timer is set anew.
                self.clock
                    .clear()
                    .map_err(|error| DeviceError::host("cannot set a timer")(error.into()))?;
                self.mux.tick(poll)?;
                self.receive(poll)?;
            }
            TRANSPORT_RESET => {
                let _ = self.void.read();
                self.mux.end_all(poll)?;
                self.announce = true;
                self.announce()?;
            }
            FIRST_CONNECTION.. => {
                self.mux.event(token, events, poll)?;
                self.receive(poll)?;
            }
            _ => {}
        }
        self.set_clock()
    }
}
