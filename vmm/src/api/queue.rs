//! The way of a request from the server's thread to the control thread and back.

use std::{io, os::fd::AsRawFd, os::fd::RawFd, sync::Arc, sync::mpsc};

use serde_json::Value;
use tokio::sync::oneshot;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Refusal, call::Call};

/// What is answered: a body, nothing but "done", or a refusal.
pub(crate) type Answer = Result<Option<Value>, Refusal>;

/// The way back. A client that has gone away does not mind.
pub(crate) struct Reply(oneshot::Sender<Answer>);

impl Reply {
    pub(crate) fn send(self, answer: Answer) {
        let _ = self.0.send(answer);
    }

    /// It is done, and there is nothing more to say.
    pub(crate) fn done(self) {
        self.send(Ok(None));
    }
}

/// A request on its way.
pub(crate) struct Asked {
    pub(crate) call: Call,
    pub(crate) reply: Reply,
}

/// What a client wishes of the whole machine, answered once it is so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    /// It starts anew.
    Reboot,
    /// It ends, and waits for somebody to start it again.
    ShutDown,
    /// It starts again.
    Boot,
    /// It ends, and the VMM too.
    Leave,
}

/// The control thread's end. Its descriptor is readable when there are requests.
pub(crate) struct Queue {
    requests: mpsc::Receiver<Asked>,
    event: Arc<EventFd>,
}

impl Queue {
    /// The next request.
    pub(crate) fn next(&self) -> Option<Asked> {
        let next = self.requests.try_recv().ok();
        if next.is_none() {
            // What comes after this read is an event again; what came before it is looked for once more.
            let _ = self.event.read();
            return self.requests.try_recv().ok();
        }
        next
    }
}

impl AsRawFd for Queue {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

/// The server's end.
#[derive(Clone)]
pub(super) struct Asker {
    requests: mpsc::Sender<Asked>,
    event: Arc<EventFd>,
}

/// Both ends.
pub(super) fn queue() -> io::Result<(Asker, Queue)> {
    let (sender, requests) = mpsc::channel();
    let event = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
    let asker = Asker {
        requests: sender,
        event: Arc::clone(&event),
    };
    Ok((asker, Queue { requests, event }))
}

impl Asker {
    /// Has the control thread answer. Each connection has one request on its way, so that they do not pile up.
    pub(super) async fn ask(&self, call: Call) -> Answer {
        let ended = || Refusal::failed("the machine has ended");
        let (reply, answer) = oneshot::channel();
        let reply = Reply(reply);
        self.requests
            .send(Asked { call, reply })
            .map_err(|_| ended())?;
        let _ = self.event.write(1);
        answer.await.unwrap_or_else(|_| Err(ended()))
    }
}
