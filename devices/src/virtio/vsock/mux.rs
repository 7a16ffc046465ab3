//! All connections of a guest, and what the host listens on.

use std::{
    collections::{HashMap, VecDeque},
    ffi::OsString,
    io::{self, ErrorKind},
    os::{
        fd::AsRawFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use tracing::{debug, warn};
use vmm_sys_util::epoll::EventSet;

use super::{
    connect::connect,
    connection::{BUFFER, Connection, Outcome},
    greeting::{Greeting, Progress},
    packet::{Header, Operation, Ports},
};
use crate::virtio::{DeviceError, Poll};

/// The most connections, those that are still to say where they want to go included.
pub(super) const MOST_CONNECTIONS: usize = 1024;
/// How many refusals may wait for the guest to take them before no more packets are taken from it.
const MOST_RESETS: usize = 64;
/// Tokens from here on are connections.
pub(super) const FIRST_CONNECTION: u64 = 16;
/// Ports of the host's for connections that it wants.
const FIRST_PORT: u32 = 1 << 30;

/// Where the host listens for itself and for the guest.
pub(super) struct Socket {
    pub(super) path: PathBuf,
    pub(super) listener: UnixListener,
}

impl Socket {
    /// Where the host listens for the guest's connections to `port`.
    fn path_of(&self, port: u32) -> PathBuf {
        let mut path = OsString::from(&self.path);
        path.push(format!("_{port}"));
        path.into()
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            debug!("{}: {error}", self.path.display());
        }
    }
}

/// Listens at `path`.
pub(super) fn listen(path: &Path) -> io::Result<Socket> {
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    Ok(Socket {
        path: path.to_owned(),
        listener,
    })
}

/// Connections by the token that their events come with.
pub(super) struct Mux {
    socket: Arc<Socket>,
    listener_token: u64,
    listening: bool,
    connections: HashMap<u64, Connection>,
    by_ports: HashMap<Ports, u64>,
    greetings: HashMap<u64, Greeting>,
    /// Connections that have something for the guest.
    ready: VecDeque<u64>,
    /// Connections that do not exist, as the guest is to be told.
    resets: VecDeque<Ports>,
    next_token: u64,
    next_port: u32,
}

impl Mux {
    pub(super) fn new(socket: Arc<Socket>, listener_token: u64) -> Self {
        Self {
            socket,
            listener_token,
            listening: false,
            connections: HashMap::new(),
            by_ports: HashMap::new(),
            greetings: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            next_token: FIRST_CONNECTION,
            next_port: FIRST_PORT,
        }
    }

    /// Takes clients, or no longer, as there is room for them.
    pub(super) fn listen(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        let room = self.count() < MOST_CONNECTIONS;
        self.set_listening(room, poll)
    }

    fn set_listening(&mut self, wanted: bool, poll: &Poll) -> Result<(), DeviceError> {
        if wanted == self.listening {
            return Ok(());
        }
        let fd = self.socket.listener.as_raw_fd();
        if wanted {
            poll.add(fd, self.listener_token, EventSet::IN)
        } else {
            poll.remove(fd)
        }
        .map_err(DeviceError::host("cannot wait for connections"))?;
        self.listening = wanted;
        Ok(())
    }

    fn count(&self) -> usize {
        self.connections.len() + self.greetings.len()
    }

    fn token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    /// Clients have come.
    pub(super) fn accept(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        while self.count() < MOST_CONNECTIONS {
            let accepted = self.socket.listener.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(true)?;
                Ok(stream)
            });
            match accepted {
                Ok(stream) => self.greet(stream, poll),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => {
                    // The next tick of the clock tries again.
                    warn!("cannot take a connection to the guest: {error}");
                    return self.set_listening(false, poll);
                }
            }
        }
        self.listen(poll)
    }

    fn greet(&mut self, stream: UnixStream, poll: &Poll) {
        let token = self.token();
        if let Err(error) = poll.add(stream.as_raw_fd(), token, EventSet::IN) {
            warn!("cannot take a connection to the guest: {error}");
            return;
        }
        self.greetings.insert(token, Greeting::new(stream));
    }

    /// Something has happened on the stream with this token, which may be gone already.
    pub(super) fn event(
        &mut self,
        token: u64,
        events: EventSet,
        poll: &Poll,
    ) -> Result<(), DeviceError> {
        if let Some(greeting) = self.greetings.get_mut(&token) {
            let progress = greeting.read();
            return self.hear(token, &progress, poll);
        }
        if let Some(connection) = self.connections.get_mut(&token) {
            let outcome = connection.ready(events);
            return self.settle(token, outcome, poll);
        }
        Ok(())
    }

    fn hear(&mut self, token: u64, progress: &Progress, poll: &Poll) -> Result<(), DeviceError> {
        if matches!(progress, Progress::Incomplete) {
            return Ok(());
        }
        let Some(greeting) = self.greetings.remove(&token) else {
            return Ok(());
        };
        poll.remove(greeting.stream().as_raw_fd())
            .map_err(DeviceError::host("cannot wait for a connection"))?;
        match progress {
            Progress::Port(guest) => {
                let ports = Ports {
                    host: self.free_port(*guest),
                    guest: *guest,
                };
                let connection = Connection::wanted(ports, greeting.into_stream());
                self.insert(token, connection, poll)
            }
            _ => self.listen(poll),
        }
    }

    /// A port of the host's that no connection to the guest's port `guest` has.
    fn free_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_port;
            self.next_port = host.wrapping_add(1).max(FIRST_PORT);
            if !self.by_ports.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    fn insert(
        &mut self,
        token: u64,
        connection: Connection,
        poll: &Poll,
    ) -> Result<(), DeviceError> {
        self.by_ports.insert(connection.ports(), token);
        self.connections.insert(token, connection);
        self.settle(token, Outcome::Continues, poll)
    }

    /// Does what has come of a connection, and waits for what is to come.
    fn settle(&mut self, token: u64, outcome: Outcome, poll: &Poll) -> Result<(), DeviceError> {
        let Some(connection) = self.connections.get_mut(&token) else {
            return Ok(());
        };
        if outcome != Outcome::Continues {
            return self.end(token, outcome, poll);
        }
        if connection.has_packet() && !connection.listed {
            connection.listed = true;
            self.ready.push_back(token);
        }
        watch(connection, connection.interest(), token, poll)
    }

    fn end(&mut self, token: u64, outcome: Outcome, poll: &Poll) -> Result<(), DeviceError> {
        if let Some(mut connection) = self.connections.remove(&token) {
            self.by_ports.remove(&connection.ports());
            if outcome == Outcome::Reset && connection.is_known() {
                self.resets.push_back(connection.ports());
            }
            watch(&mut connection, None, token, poll)?;
        }
        self.listen(poll)
    }

    /// Ends all connections; the guest knows.
    pub(super) fn end_all(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        let tokens: Vec<u64> = self.connections.keys().copied().collect();
        for token in tokens {
            self.end(token, Outcome::Over, poll)?;
        }
        self.ready.clear();
        self.resets.clear();
        Ok(())
    }

    /// Ends those whose time is over.
    pub(super) fn tick(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        let now = Instant::now();
        let late: Vec<u64> = (self.greetings.iter())
            .filter_map(|(token, greeting)| (greeting.deadline() <= now).then_some(*token))
            .collect();
        for token in late {
            self.hear(token, &Progress::Failed, poll)?;
        }
        let late: Vec<u64> = (self.connections.iter())
            .filter_map(|(token, connection)| (connection.deadline()? <= now).then_some(*token))
            .collect();
        for token in late {
            self.end(token, Outcome::Reset, poll)?;
        }
        self.listen(poll)
    }

    /// Whether [`Mux::tick`] has to come again.
    pub(super) fn needs_ticks(&self) -> bool {
        !self.listening
            || !self.greetings.is_empty()
            || self.connections.values().any(|it| it.deadline().is_some())
    }

    /// Whether no more packets may be taken from the guest until it takes some.
    pub(super) fn is_congested(&self) -> bool {
        self.resets.len() >= MOST_RESETS
    }

    /// Takes a packet without data from the guest, or one that is refused.
    pub(super) fn take(&mut self, header: &Header, poll: &Poll) -> Result<(), DeviceError> {
        let ports = header.ports;
        match (self.by_ports.get(&ports), header.operation) {
            (Some(&token), _) => {
                let Some(connection) = self.connections.get_mut(&token) else {
                    return Ok(());
                };
                let outcome = connection.take(header);
                self.settle(token, outcome, poll)
            }
            (None, Operation::Request) => self.request(header, poll),
            (None, Operation::Reset) => Ok(()),
            (None, _) => {
                self.refuse(ports);
                Ok(())
            }
        }
    }

    /// The guest wants to the host's port in `header`.
    fn request(&mut self, header: &Header, poll: &Poll) -> Result<(), DeviceError> {
        let connected = if self.count() < MOST_CONNECTIONS {
            connect(&self.socket.path_of(header.ports.host))
        } else {
            Err(io::Error::other("too many connections"))
        };
        match connected {
            Ok(stream) => {
                let token = self.token();
                self.insert(token, Connection::accepted(header, stream), poll)
            }
            Err(error) => {
                debug!(
                    "the guest's connection to port {}: {error}",
                    header.ports.host
                );
                self.refuse(header.ports);
                Ok(())
            }
        }
    }

    /// Tells the guest that there is no such connection.
    pub(super) fn refuse(&mut self, ports: Ports) {
        self.resets.push_back(ports);
    }

    /// Takes data from the guest, which `read` copies from an offset in it.
    pub(super) fn take_data(
        &mut self,
        header: &Header,
        scratch: &mut [u8],
        mut read: impl FnMut(usize, &mut [u8]) -> usize,
        poll: &Poll,
    ) -> Result<(), DeviceError> {
        let found = self.by_ports.get(&header.ports).copied();
        let Some((token, connection)) =
            found.and_then(|token| Some((token, self.connections.get_mut(&token)?)))
        else {
            self.refuse(header.ports);
            return Ok(());
        };
        let mut outcome = Outcome::Reset;
        if connection.may_take(header.length) {
            outcome = Outcome::Continues;
            let (mut done, length) = (0, header.length as usize);
            while done < length && outcome == Outcome::Continues {
                let piece = scratch.len().min(length - done);
                let count = read(done, &mut scratch[..piece]);
                if count == 0 {
                    break;
                }
                outcome = connection.take_data(header, &scratch[..count]);
                done += count;
            }
        }
        self.settle(token, outcome, poll)
    }

    /// Whether there may be a packet for the guest.
    pub(super) fn has_packets(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// The next packet for the guest, with its data in `data`, which has room for one byte at least.
    pub(super) fn next_packet(
        &mut self,
        data: &mut [u8],
        poll: &Poll,
    ) -> Result<Option<Header>, DeviceError> {
        if let Some(ports) = self.resets.pop_front() {
            return Ok(Some(Header {
                ports,
                length: 0,
                operation: Operation::Reset,
                flags: 0,
                allocated: BUFFER,
                forwarded: 0,
            }));
        }
        while let Some(token) = self.ready.pop_front() {
            let Some(connection) = self.connections.get_mut(&token) else {
                continue;
            };
            connection.listed = false;
            let packet = connection.next_packet(data);
            self.settle(token, Outcome::Continues, poll)?;
            if packet.is_some() {
                return Ok(packet);
            }
        }
        Ok(None)
    }
}

/// Waits for `wanted` events of the connection's stream.
fn watch(
    connection: &mut Connection,
    wanted: Option<EventSet>,
    token: u64,
    poll: &Poll,
) -> Result<(), DeviceError> {
    let fd = connection.stream().as_raw_fd();
    match (connection.watched, wanted) {
        (before, after) if before == after => Ok(()),
        (None, Some(events)) => poll.add(fd, token, events),
        (Some(_), Some(events)) => poll.change(fd, token, events),
        (Some(_) | None, None) => poll.remove(fd),
    }
    .map_err(DeviceError::host("cannot wait for a connection"))?;
    connection.watched = wanted;
    Ok(())
}
