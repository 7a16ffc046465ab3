//! The device's thread: plugs and unplugs.

use std::{io, sync::Arc};

use tracing::warn;
use vmm_sys_util::epoll::EventSet;

use super::{
    BLOCK, Backing, Shared,
    request::{ANSWER, Answer, Blocks, Plugged, Request},
};
use crate::virtio::{Chain, DeviceError, Handler, Poll, VirtQueue};

/// How many requests are answered before other events get their turn.
const TURN: u32 = 64;

pub(super) struct Plugger {
    queue: VirtQueue,
    chain: Chain,
    shared: Arc<Shared>,
    backing: Arc<dyn Backing>,
}

impl Plugger {
    pub(super) fn new(queue: VirtQueue, shared: Arc<Shared>, backing: Arc<dyn Backing>) -> Self {
        Self {
            chain: queue.chain(),
            queue,
            shared,
            backing,
        }
    }

    fn serve(&mut self) -> Result<(), DeviceError> {
        for _ in 0..TURN {
            if !self.queue.pop(&mut self.chain)? {
                self.queue.signal()?;
                if self.queue.enable_kicks()? {
                    continue;
                }
                return Ok(());
            }
            if self.chain.writable.len() < ANSWER {
                return Err(DeviceError::Malformed(
                    "a request without room for an answer",
                ));
            }
            let request = Request::read(&self.chain.readable);
            let answer = request.map_or(Answer::Wrong, |request| self.answer(request));
            let written = self.chain.writable.write_at(0, &answer.to_bytes());
            self.queue.push(self.chain.head(), written as u32)?;
        }
        self.queue.come_back();
        self.queue.signal()
    }

    /// Only this thread changes what is plugged, so that nothing is locked while the host is at work.
    fn answer(&self, request: Request) -> Answer {
        match request {
            Request::Plug(blocks) => self.plug(blocks),
            Request::Unplug(blocks) => self.unplug(blocks),
            Request::UnplugAll => {
                let (start, length) = {
                    let state = self.shared.state();
                    (state.region.start(), state.region.length())
                };
                Self::answer_for(self.backing.unplug(start, length), || {
                    self.shared.state().region.clear();
                })
            }
            Request::State(blocks) => {
                let state = self.shared.state();
                match state.region.find(blocks) {
                    Some(range) => Answer::State(state.region.state(range)),
                    None => Answer::Wrong,
                }
            }
        }
    }

    fn plug(&self, blocks: Blocks) -> Answer {
        let length = u64::from(blocks.count) * BLOCK;
        let range = {
            let state = self.shared.state();
            let Some(range) = state.region.find(blocks) else {
                return Answer::Wrong;
            };
            if state.region.state(range.clone()) != Plugged::None {
                return Answer::Wrong;
            }
            if state.region.plugged() + length > state.requested {
                return Answer::TooMuch;
            }
            range
        };
        Self::answer_for(self.backing.plug(blocks.address, length), || {
            self.shared.state().region.set(range, true);
        })
    }

    fn unplug(&self, blocks: Blocks) -> Answer {
        let range = {
            let state = self.shared.state();
            match state.region.find(blocks) {
                Some(range) if state.region.state(range.clone()) == Plugged::All => range,
                _ => return Answer::Wrong,
            }
        };
        let length = u64::from(blocks.count) * BLOCK;
        Self::answer_for(self.backing.unplug(blocks.address, length), || {
            self.shared.state().region.set(range, false);
        })
    }

    fn answer_for(done: io::Result<()>, note: impl FnOnce()) -> Answer {
        match done {
            Ok(()) => {
                note();
                Answer::Done
            }
            Err(error) => {
                warn!("memory cannot be plugged or unplugged: {error}");
                Answer::Busy
            }
        }
    }
}

impl Handler for Plugger {
    fn start(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        poll.add_bell(self.queue.kick(), 0)
            .map_err(DeviceError::host("cannot wait for the driver"))
    }

    fn ready(&mut self, _token: u64, _events: EventSet, _poll: &Poll) -> Result<(), DeviceError> {
        self.serve()
    }
}
