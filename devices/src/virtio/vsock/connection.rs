//! One connection between a port of the guest and a unix stream of the host, and how much each may send.

use std::{
    collections::VecDeque,
    io::{self, ErrorKind, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use vmm_sys_util::epoll::EventSet;

use super::packet::{Header, Operation, Ports, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// Bytes of the guest's that a connection keeps when the host's side does not take them. The guest knows, and sends no more.
pub(super) const BUFFER: u32 = 256 << 10;
/// How long the guest has to answer a request.
const REQUEST_PATIENCE: Duration = Duration::from_secs(10);
/// How long a connection that is at its end may take to get there.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The host wants it, and the guest has not been asked.
    Wanted,
    /// The guest has been asked.
    Requested,
    Established,
}

/// Packets that a connection owes the guest, besides data.
#[derive(Default)]
struct Owed {
    response: bool,
    shutdown: bool,
    credit_update: bool,
    credit_request: bool,
}

/// What comes of a packet, or of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The connection goes on.
    Continues,
    /// It is over, and the guest is to be told.
    Reset,
    /// It is over, as the guest knows.
    Over,
}

pub(super) struct Connection {
    ports: Ports,
    stream: UnixStream,
    stage: Stage,
    deadline: Option<Instant>,
    owed: Owed,
    /// Bytes of the guest's that the stream has not taken.
    outgoing: VecDeque<u8>,
    /// Bytes that the stream has taken, modulo 2^32; and what of that the guest knows.
    forwarded: u32,
    told: u32,
    /// Bytes sent to the guest, modulo 2^32; and the last it has said of its room.
    sent: u32,
    guest_allocated: u32,
    guest_forwarded: u32,
    /// The stream has something to be read, its end included.
    readable: bool,
    /// The other end of the stream is closed.
    hung_up: bool,
    host_sends: bool,
    host_receives: bool,
    guest_sends: bool,
    guest_receives: bool,
    /// In the list of those that have something for the guest.
    pub(super) listed: bool,
    /// The events that are waited for.
    pub(super) watched: Option<EventSet>,
}

impl Connection {
    /// One that the host wants.
    pub(super) fn wanted(ports: Ports, stream: UnixStream) -> Self {
        Self::new(ports, stream, Stage::Wanted)
    }

    /// One that the guest wants with `request`.
    pub(super) fn accepted(request: &Header, stream: UnixStream) -> Self {
        let mut connection = Self::new(request.ports, stream, Stage::Established);
        connection.owed.response = true;
        connection.learn(request);
        connection
    }

    fn new(ports: Ports, stream: UnixStream, stage: Stage) -> Self {
        Self {
            ports,
            stream,
            stage,
            deadline: (stage == Stage::Wanted).then(|| Instant::now() + REQUEST_PATIENCE),
            owed: Owed::default(),
            outgoing: VecDeque::new(),
            forwarded: 0,
            told: 0,
            sent: 0,
            guest_allocated: 0,
            guest_forwarded: 0,
            readable: false,
            hung_up: false,
            host_sends: true,
            host_receives: true,
            guest_sends: true,
            guest_receives: true,
            listed: false,
            watched: None,
        }
    }

    pub(super) fn ports(&self) -> Ports {
        self.ports
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Whether the guest has heard of it.
    pub(super) fn is_known(&self) -> bool {
        self.stage != Stage::Wanted
    }

    /// The events of the stream to wait for; `None` when there is nothing to learn from it any more.
    pub(super) fn interest(&self) -> Option<EventSet> {
        if self.hung_up || self.stage != Stage::Established {
            return None;
        }
        let mut events = EventSet::empty();
        if self.reads() && !self.readable && self.credit() > 0 {
            events |= EventSet::IN;
        }
        if !self.outgoing.is_empty() {
            events |= EventSet::OUT;
        }
        Some(events)
    }

    /// Whether there is a packet for the guest.
    pub(super) fn has_packet(&self) -> bool {
        let owed = &self.owed;
        self.stage == Stage::Wanted
            || owed.response
            || owed.shutdown
            || owed.credit_update
            || owed.credit_request
            || self.has_data()
    }

    fn reads(&self) -> bool {
        self.host_sends && self.guest_receives
    }

    fn has_data(&self) -> bool {
        self.stage == Stage::Established && self.readable && self.reads() && self.credit() > 0
    }

    /// How many bytes the guest has room for.
    fn credit(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_allocated.saturating_sub(in_flight)
    }

    fn learn(&mut self, header: &Header) {
        self.guest_allocated = header.allocated;
        self.guest_forwarded = header.forwarded;
    }

    /// Takes a packet without data from the guest.
    pub(super) fn take(&mut self, header: &Header) -> Outcome {
        self.learn(header);
        match (header.operation, self.stage) {
            (Operation::Reset, _) => return Outcome::Over,
            (Operation::Response, Stage::Requested) => return self.establish(),
            (Operation::Shutdown, Stage::Established) => {
                self.guest_sends &= header.flags & SHUTDOWN_SEND == 0;
                self.guest_receives &= header.flags & SHUTDOWN_RECEIVE == 0;
                if !self.guest_receives {
                    // What the host sends now is refused; it may have closed the stream already.
                    let _ = self.stream.shutdown(Shutdown::Read);
                }
                return self.wind_up();
            }
            (Operation::CreditRequest, Stage::Established) => self.owed.credit_update = true,
            (Operation::CreditUpdate, Stage::Established) => {}
            _ => return Outcome::Reset,
        }
        Outcome::Continues
    }

    fn establish(&mut self) -> Outcome {
        self.stage = Stage::Established;
        self.deadline = None;
        let answer = format!("OK {}\n", self.ports.host);
        match self.stream.write(answer.as_bytes()) {
            Ok(count) if count == answer.len() => Outcome::Continues,
            _ => Outcome::Reset,
        }
    }

    /// Whether the guest may send `length` more bytes.
    pub(super) fn may_take(&self, length: u32) -> bool {
        let waiting = self.outgoing.len() as u32;
        self.stage == Stage::Established
            && self.guest_sends
            && length <= BUFFER.saturating_sub(waiting)
    }

    /// Takes data from the guest, as much as it may send.
    pub(super) fn take_data(&mut self, header: &Header, mut data: &[u8]) -> Outcome {
        self.learn(header);
        while self.host_receives && self.outgoing.is_empty() && !data.is_empty() {
            match self.stream.write(data) {
                Ok(count) => {
                    self.has_forwarded(count);
                    data = &data[count..];
                }
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted => {}
                    ErrorKind::WouldBlock => break,
                    _ => self.host_stops_receiving(),
                },
            }
        }
        if self.host_receives {
            self.outgoing.extend(data);
        } else {
            self.has_forwarded(data.len());
        }
        Outcome::Continues
    }

    /// The stream has room again.
    pub(super) fn flush(&mut self) -> Outcome {
        while !self.outgoing.is_empty() {
            match self.stream.write(self.outgoing.as_slices().0) {
                Ok(count) => {
                    self.outgoing.drain(..count);
                    self.has_forwarded(count);
                }
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted => {}
                    ErrorKind::WouldBlock => return Outcome::Continues,
                    _ => self.host_stops_receiving(),
                },
            }
        }
        // Memory for a burst is not kept for the life of the connection.
        self.outgoing = VecDeque::new();
        self.wind_up()
    }

    fn has_forwarded(&mut self, count: usize) {
        self.forwarded = self.forwarded.wrapping_add(count as u32);
        if self.forwarded.wrapping_sub(self.told) >= BUFFER / 4 {
            self.owed.credit_update = true;
        }
    }

    fn host_stops_receiving(&mut self) {
        self.host_receives = false;
        self.owed.shutdown = true;
        let lost = std::mem::take(&mut self.outgoing).len();
        self.has_forwarded(lost);
        self.end_when_unused();
    }

    /// Passes on that the guest has stopped sending, once all it has sent has been passed on.
    fn wind_up(&mut self) -> Outcome {
        if self.guest_sends {
            return Outcome::Continues;
        }
        if self.outgoing.is_empty() {
            // It fails where the host has closed the stream, and has thus been told.
            let _ = self.stream.shutdown(Shutdown::Write);
            if !self.guest_receives {
                return Outcome::Reset;
            }
        } else if !self.guest_receives {
            self.end_soon();
        }
        Outcome::Continues
    }

    fn end_soon(&mut self) {
        self.deadline.get_or_insert(Instant::now() + END_PATIENCE);
    }

    /// Takes events of the stream.
    pub(super) fn ready(&mut self, events: EventSet) -> Outcome {
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            self.hung_up = true;
            // Reading gives what is left, and then the end.
            self.readable = true;
            if self.host_receives {
                self.host_stops_receiving();
            }
            return self.wind_up();
        }
        self.readable |= events.contains(EventSet::IN);
        if events.contains(EventSet::OUT) {
            return self.flush();
        }
        Outcome::Continues
    }

    /// The next packet for the guest, its data in `data`, whose length says how much there may be: at least one byte.
    pub(super) fn next_packet(&mut self, data: &mut [u8]) -> Option<Header> {
        if self.stage == Stage::Wanted {
            self.stage = Stage::Requested;
            return Some(self.header(Operation::Request, 0, 0));
        }
        if std::mem::take(&mut self.owed.response) {
            return Some(self.header(Operation::Response, 0, 0));
        }
        if self.has_data() {
            let most = data.len().min(self.credit() as usize);
            match self.read(&mut data[..most]) {
                Ok(0) => self.host_stops_sending(),
                Ok(count) => {
                    self.sent = self.sent.wrapping_add(count as u32);
                    if self.credit() == 0 {
                        self.owed.credit_request = true;
                    }
                    return Some(self.header(Operation::Data, count as u32, 0));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
                Err(_) => self.host_stops_sending(),
            }
        }
        if std::mem::take(&mut self.owed.shutdown) {
            let mut flags = 0;
            if !self.host_sends {
                flags |= SHUTDOWN_SEND;
            }
            if !self.host_receives {
                flags |= SHUTDOWN_RECEIVE;
            }
            return Some(self.header(Operation::Shutdown, 0, flags));
        }
        if std::mem::take(&mut self.owed.credit_request) && self.credit() == 0 {
            return Some(self.header(Operation::CreditRequest, 0, 0));
        }
        std::mem::take(&mut self.owed.credit_update)
            .then(|| self.header(Operation::CreditUpdate, 0, 0))
    }

    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.stream.read(data) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }

    fn host_stops_sending(&mut self) {
        self.host_sends = false;
        self.owed.shutdown = true;
        self.end_when_unused();
    }

    /// With the host gone, the guest answers with a reset when it has read what it has. When it does not, it gets one.
    fn end_when_unused(&mut self) {
        if !self.host_sends && !self.host_receives {
            self.end_soon();
        }
    }

    /// A header with the room the guest has here, which it thus knows.
    fn header(&mut self, operation: Operation, length: u32, flags: u32) -> Header {
        self.told = self.forwarded;
        self.owed.credit_update = false;
        Header {
            ports: self.ports,
            length,
            operation,
            flags,
            allocated: BUFFER,
            forwarded: self.forwarded,
        }
    }
}
