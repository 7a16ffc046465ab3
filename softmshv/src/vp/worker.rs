//! The thread that runs a VP where the hypervisor schedules, and the client's `RUN_VP` that sleeps meanwhile.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::signals::{self, Held, Woken};
use super::{Message, Until, Vp};
use crate::errno::Errno;
use crate::lps::Turn;

/// How long to wait for a VP that was asked to stop before it is asked again.
const ASK_AGAIN: Duration = Duration::from_micros(500);

/// What the thread is to do.
enum Order {
    Wait,
    /// Its VP, until there is a result. The client's call keeps the VP alive longer than the thread does.
    Run(Arc<Vp>),
    End,
}

struct Shared {
    order: Mutex<Order>,
    ordered: Condvar,
    /// `None`: stopped because the client asked.
    result: Mutex<Option<Result<Option<Message>, Errno>>>,
    /// Readable when there is a result.
    done: OwnedFd,
    turn: Arc<Turn>,
}

/// A VP's thread.
pub(super) struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread of VP `index`.
    ///
    /// # Errors
    /// When there are too many threads or descriptors.
    pub(super) fn start(index: u32, turn: Arc<Turn>) -> Result<Self, Errno> {
        // SAFETY: takes a number and flags.
        let done = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if done < 0 {
            turn.end();
            return Err(Errno::last());
        }
        let shared = Arc::new(Shared {
            order: Mutex::new(Order::Wait),
            ordered: Condvar::new(),
            result: Mutex::new(None),
            // SAFETY: a descriptor just made, that nobody else owns.
            done: unsafe { OwnedFd::from_raw_fd(done) },
            turn,
        });
        // The client's signals are none of this thread's: it is born with all of them blocked.
        let _held = Held::new();
        let body = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name(format!("softmshv-vp{index}"))
            .spawn(move || body.serve());
        match thread {
            Ok(thread) => Ok(Self {
                shared,
                thread: Some(thread),
            }),
            Err(error) => {
                shared.turn.end();
                Err(error.into())
            }
        }
    }

    /// The client's side of `RUN_VP`: sleeps until there is a message.
    ///
    /// # Errors
    /// `EINTR` when a signal arrived first; those of running the VP.
    pub(super) fn run(&self, vp: &Arc<Vp>) -> Result<Message, Errno> {
        let held = Held::new();
        let shared = &*self.shared;
        shared.turn.allow();
        shared.give(Order::Run(Arc::clone(vp)));
        if held.sleep(shared.done.as_raw_fd()) == Woken::Signalled {
            // The VP is suspended; a message that comes at the same time is one all the same.
            while {
                shared.turn.suspend();
                signals::nap(shared.done.as_raw_fd(), ASK_AGAIN) != Woken::Ready
            } {}
        }
        drain(&shared.done);
        let result = shared
            .result
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        match result {
            Some(Ok(Some(message))) => Ok(message),
            Some(Ok(None)) => Err(Errno(libc::EINTR)),
            Some(Err(errno)) => Err(errno),
            None => Err(Errno(libc::EIO)),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.give(Order::End);
        if let Some(thread) = self.thread.take() {
            // A thread that has panicked has said so.
            let _ = thread.join();
        }
        self.shared.turn.end();
    }
}

impl Shared {
    fn give(&self, order: Order) {
        *self.order.lock().unwrap_or_else(PoisonError::into_inner) = order;
        self.ordered.notify_one();
    }

    fn next(&self) -> Order {
        let mut order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match std::mem::replace(&mut *order, Order::Wait) {
                Order::Wait => {
                    order = self
                        .ordered
                        .wait(order)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                given => return given,
            }
        }
    }

    /// The thread's life.
    fn serve(&self) {
        self.turn.adopt();
        while let Order::Run(vp) = self.next() {
            let result = self.run(&vp, &Held::new());
            drop(vp);
            *self.result.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
            let one = 1u64;
            // SAFETY: eight bytes of a counter; the descriptor is open as long as the thread lives.
            unsafe { libc::write(self.done.as_raw_fd(), (&raw const one).cast(), 8) };
        }
    }

    /// Runs the VP whenever it has a logical processor; `None` when the client wants it to stop.
    fn run(&self, vp: &Vp, held: &Held) -> Result<Option<Message>, Errno> {
        vp.begin()?;
        let mut new = true;
        while self.turn.take(std::mem::take(&mut new)) {
            match vp.stretch(held, Until::Over(&self.turn)) {
                Ok(None) => {}
                ended => {
                    self.turn.leave();
                    return ended;
                }
            }
        }
        vp.suspend()?;
        Ok(None)
    }
}

fn drain(counter: &OwnedFd) {
    let mut value = 0u64;
    // SAFETY: eight bytes for the value.
    unsafe { libc::read(counter.as_raw_fd(), (&raw mut value).cast(), 8) };
}
