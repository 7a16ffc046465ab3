//! What a client says first: `CONNECT <port>` and a newline.

use std::{
    io::{ErrorKind, Read},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

/// How long a client has to say where it wants to go.
const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes of the longest line.
const LONGEST: usize = "CONNECT 4294967295\n".len() + 1;

/// A client that has not said yet where it wants to go.
pub(super) struct Greeting {
    stream: UnixStream,
    line: Vec<u8>,
    deadline: Instant,
}

/// How far a greeting is.
pub(super) enum Progress {
    /// There is more to come.
    Incomplete,
    /// The client wants to this port.
    Port(u32),
    /// It has gone, or it says something else.
    Failed,
}

impl Greeting {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            line: Vec::with_capacity(LONGEST),
            deadline: Instant::now() + PATIENCE,
        }
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    pub(super) fn into_stream(self) -> UnixStream {
        self.stream
    }

    pub(super) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Reads what has come, and not a byte beyond the line: what follows is for the guest.
    pub(super) fn read(&mut self) -> Progress {
        let mut byte = [0];
        while self.line.len() < LONGEST {
            match self.stream.read(&mut byte) {
                Ok(0) => return Progress::Failed,
                Ok(_) if byte == *b"\n" => {
                    return port(&self.line).map_or(Progress::Failed, Progress::Port);
                }
                Ok(_) => self.line.push(byte[0]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Progress::Incomplete,
                Err(_) => return Progress::Failed,
            }
        }
        Progress::Failed
    }
}

/// The port in a line without its newline.
fn port(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?;
    let (word, port) = line.trim_end().split_once(' ')?;
    if !word.eq_ignore_ascii_case("CONNECT") || !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    port.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::port;

    #[test]
    fn only_a_port_is_a_port() {
        assert_eq!(port(b"CONNECT 1024"), Some(1024));
        assert_eq!(port(b"connect 4294967295\r"), Some(u32::MAX));
        for wrong in [
            "",
            "CONNECT",
            "CONNECT ",
            "CONNECT x",
            "CONNECT +1",
            "CONNECT -1",
            "CONNECT 1 2",
            "CONNECT 4294967296",
            "HELLO 1",
            "CONNECT  1",
        ] {
            assert_eq!(port(wrong.as_bytes()), None, "{wrong:?}");
        }
        assert_eq!(port(b"CONNECT \xff"), None);
    }
}
