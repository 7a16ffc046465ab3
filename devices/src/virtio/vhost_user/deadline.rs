//! No waiting for a back end for ever: who does not answer in time is hung up on.

use std::{
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::mpsc::{RecvTimeoutError, sync_channel},
    thread,
    time::Duration,
};

/// How long a back end may take for one conversation. They are about memory and rings, not about the work itself.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// Has `conversation` over `socket`. When it takes longer than `patience`, the socket is shut down, which ends any wait for it.
pub(super) fn within<T>(
    patience: Duration,
    socket: &UnixStream,
    conversation: impl FnOnce() -> T,
) -> T {
    thread::scope(|scope| {
        let (done, is_done) = sync_channel::<()>(0);
        scope.spawn(move || {
            if is_done.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
                // It may be shut down already.
                let _ = socket.shutdown(Shutdown::Both);
            }
        });
        let result = conversation();
        drop(done);
        result
    })
}

#[cfg(test)]
mod tests {
    use std::{io::Read, time::Instant};

    use super::*;

    #[test]
    fn a_silent_peer_is_hung_up_on() {
        let (mut ours, _theirs) = UnixStream::pair().unwrap();
        let socket = ours.try_clone().unwrap();
        let started = Instant::now();
        let read = within(Duration::from_millis(50), &socket, || {
            ours.read(&mut [0; 1])
        });
        assert_eq!(read.unwrap(), 0);
        assert!(started.elapsed() >= Duration::from_millis(50));
    }

    #[test]
    fn an_answer_ends_the_wait_at_once() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let started = Instant::now();
        assert_eq!(within(Duration::from_secs(60), &ours, || 7), 7);
        assert!(started.elapsed() < Duration::from_secs(30));
        use std::io::Write;
        (&theirs).write_all(b"x").unwrap();
        assert_eq!((&ours).read(&mut [0; 1]).unwrap(), 1, "still connected");
    }
}
