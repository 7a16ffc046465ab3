//! Frames through a stream socket, each behind its length as 32 bits in network byte order: what QEMU's `-netdev stream` and
//! passt speak. The other side sees whole frames only, so nothing can be offloaded to it.

pub mod passt;

use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, RawFd},
        unix::net::UnixStream,
    },
    path::Path,
    sync::Arc,
};

use super::{
    super::Buffers,
    backend::{Backend, Cable, FRAME, HEADER, Port, Received, Trouble},
    io::{Vectors, send},
};

/// Bytes of the length in front of a frame.
const LENGTH: usize = 4;
/// Bytes that are read ahead: two of the longest frames.
const AHEAD: usize = 2 * (LENGTH + *FRAME.end());

/// A device's cable into the socket at `path`.
///
/// # Errors
/// When nobody listens there.
pub fn connect(path: &Path) -> io::Result<Cable> {
    UnixStream::connect(path).and_then(over)
}

/// A device's cable into a connected socket.
///
/// # Errors
/// What the kernel says.
pub fn over(socket: UnixStream) -> io::Result<Cable> {
    Ok(cable(Arc::new(Nothing), StreamPort::new(socket)?))
}

fn cable(backend: Arc<dyn Backend>, port: StreamPort) -> Cable {
    Cable {
        backend,
        ports: vec![Box::new(port)],
    }
}

/// A back end without offloads and with one port.
struct Nothing;

impl Backend for Nothing {
    fn features(&self) -> u64 {
        0
    }

    fn set_offloads(&self, _features: u64) -> io::Result<()> {
        Ok(())
    }

    fn attach(&self, _pair: usize) -> io::Result<()> {
        Ok(())
    }

    fn detach(&self, _pair: usize) -> io::Result<()> {
        Ok(())
    }
}

/// A socket, with what is on the way through it.
struct StreamPort {
    socket: UnixStream,
    /// What was read; `start..end` of it is not yet the guest's.
    input: Vec<u8>,
    start: usize,
    end: usize,
    /// What of the last frame is still to be sent.
    output: Vec<u8>,
    scratch: Vectors,
}

impl StreamPort {
    fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            input: vec![0; AHEAD],
            start: 0,
            end: 0,
            output: Vec::new(),
            scratch: Vectors::default(),
        })
    }

    /// Where in the input the next frame lies, if it is there as a whole.
    fn next_frame(&self) -> Result<Option<std::ops::Range<usize>>, Trouble> {
        let ahead = &self.input[self.start..self.end];
        let Some((length, rest)) = ahead.split_first_chunk() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*length) as usize;
        if length > *FRAME.end() {
            let error = format!("a frame of {length} bytes: this is no stream of frames");
            return Err(Trouble::Gone(io::Error::new(
                io::ErrorKind::InvalidData,
                error,
            )));
        }
        let first = self.start + LENGTH;
        Ok((rest.len() >= length).then_some(first..first + length))
    }

    fn read_ahead(&mut self) -> Result<(), Trouble> {
        self.input.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        match self.socket.read(&mut self.input[self.end..]) {
            Ok(0) => Err(Trouble::Gone(io::ErrorKind::UnexpectedEof.into())),
            Ok(count) => {
                self.end += count;
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(trouble(error)),
        }
    }
}

impl Port for StreamPort {
    fn descriptor(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    fn send(&mut self, packet: &Buffers) -> Result<(), Trouble> {
        self.flush()?;
        let length = packet.len().saturating_sub(HEADER);
        let prefix = (length as u32).to_be_bytes();
        let sent = send(
            self.socket.as_fd(),
            &prefix,
            packet,
            HEADER,
            &mut self.scratch,
        )
        .map_err(trouble)?;
        // The rest of a frame that was begun has to follow, whatever becomes of the guest's buffers.
        if sent < LENGTH + length {
            self.output.extend_from_slice(&prefix[sent.min(LENGTH)..]);
            let from = sent.saturating_sub(LENGTH);
            let kept = self.output.len();
            self.output.resize(kept + length - from, 0);
            packet.read_at(HEADER + from, &mut self.output[kept..]);
        }
        Ok(())
    }

    fn receive(&mut self, room: &Buffers) -> Result<Received, Trouble> {
        loop {
            let Some(frame) = self.next_frame()? else {
                self.read_ahead()?;
                continue;
            };
            let length = HEADER + frame.len();
            if !FRAME.contains(&frame.len()) {
                self.start = frame.end;
                return Err(Trouble::Frame(io::ErrorKind::InvalidData.into()));
            }
            if length > room.len() {
                return Ok(Received::Larger(length));
            }
            room.write_at(0, &[0; HEADER]);
            room.write_at(HEADER, &self.input[frame.clone()]);
            self.start = frame.end;
            return Ok(Received::Packet(length));
        }
    }

    fn discard(&mut self) {
        if let Ok(Some(frame)) = self.next_frame() {
            self.start = frame.end;
        }
    }

    fn has_unsent(&self) -> bool {
        !self.output.is_empty()
    }

    fn flush(&mut self) -> Result<(), Trouble> {
        while !self.output.is_empty() {
            match self.socket.write(&self.output) {
                Ok(count) => drop(self.output.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(trouble(error)),
            }
        }
        Ok(())
    }
}

fn trouble(error: io::Error) -> Trouble {
    match error.kind() {
        io::ErrorKind::WouldBlock => Trouble::Later,
        _ => Trouble::Gone(error),
    }
}
