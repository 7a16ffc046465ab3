//! Threads that do the jobs of a queue one at a time each, with system calls that block: for hosts without io_uring, and for
//! images that have only such an interface.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsRawFd, RawFd},
    panic::{self, AssertUnwindSafe},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Action, Backend, Completion, Job};

/// Threads of a queue.
const THREADS: usize = 4;

/// An image that does a job before it returns.
pub(in super::super) trait Blocking: Send + Sync + 'static {
    /// Does it, and returns how many bytes were read or written.
    ///
    /// # Safety
    /// The buffers that `job.vectors` point to are valid.
    unsafe fn run(&self, job: &Job<'_>) -> io::Result<usize>;
}

/// A back end that hands jobs to threads.
pub(in super::super) struct Pool {
    desk: Arc<Desk>,
    threads: Vec<JoinHandle<()>>,
    /// Jobs that are done and were fetched from the desk.
    fetched: VecDeque<Completion>,
}

/// Where jobs are left and picked up.
struct Desk {
    orders: Mutex<Orders>,
    ordered: Condvar,
    done: Mutex<VecDeque<Completion>>,
    finished: Condvar,
    /// Written whenever something is done.
    event: EventFd,
}

struct Orders {
    jobs: VecDeque<Order>,
    closed: bool,
}

/// A [`Job`] on its way to a thread.
struct Order {
    tag: u16,
    action: Action,
    offset: u64,
    length: u64,
    vectors: *const libc::iovec,
    count: usize,
}

// SAFETY: whoever submitted the job keeps the vectors and what they point to until it is done; it may be touched from any
// thread.
unsafe impl Send for Order {}

impl Pool {
    /// Threads called `name` that work on `image`, for at most `depth` jobs at a time.
    pub(in super::super) fn new<B: Blocking>(
        image: &Arc<B>,
        name: &str,
        depth: u16,
    ) -> io::Result<Self> {
        let desk = Arc::new(Desk {
            orders: Mutex::new(Orders {
                jobs: VecDeque::with_capacity(depth.into()),
                closed: false,
            }),
            ordered: Condvar::new(),
            done: Mutex::new(VecDeque::with_capacity(depth.into())),
            finished: Condvar::new(),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        });
        let mut pool = Self {
            desk,
            threads: Vec::new(),
            fetched: VecDeque::with_capacity(depth.into()),
        };
        for number in 0..THREADS.min(depth.into()) {
            let (desk, image) = (Arc::clone(&pool.desk), Arc::clone(image));
            let thread = thread::Builder::new()
                .name(format!("{name}-io{number}"))
                .spawn(move || work(&desk, &*image))?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }
}

impl Backend for Pool {
    unsafe fn submit(&mut self, job: Job<'_>) -> io::Result<()> {
        lock(&self.desk.orders).jobs.push_back(Order {
            tag: job.tag,
            action: job.action,
            offset: job.offset,
            length: job.length,
            vectors: job.vectors.as_ptr(),
            count: job.vectors.len(),
        });
        self.desk.ordered.notify_one();
        Ok(())
    }

    fn start(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn completed(&mut self) -> Option<Completion> {
        if self.fetched.is_empty() {
            // Before the look: what is done after it is announced again.
            let _ = self.desk.event.read();
            std::mem::swap(&mut self.fetched, &mut *lock(&self.desk.done));
        }
        self.fetched.pop_front()
    }

    fn wait(&mut self) -> io::Result<()> {
        if !self.fetched.is_empty() {
            return Ok(());
        }
        let mut done = lock(&self.desk.done);
        while done.is_empty() {
            done = self
                .desk
                .finished
                .wait(done)
                .unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }

    fn descriptor(&self) -> Option<RawFd> {
        Some(self.desk.event.as_raw_fd())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        lock(&self.desk.orders).closed = true;
        self.desk.ordered.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn work<B: Blocking>(desk: &Desk, image: &B) {
    while let Some(order) = next(desk) {
        // An image that panics must not leave its request, and so the driver, waiting.
        let result = panic::catch_unwind(AssertUnwindSafe(|| {
            // SAFETY: the pointers are those of the job's vectors, which are valid until the job is done.
            unsafe {
                image.run(&Job {
                    tag: order.tag,
                    action: order.action,
                    offset: order.offset,
                    length: order.length,
                    vectors: std::slice::from_raw_parts(order.vectors, order.count),
                })
            }
        }))
        .unwrap_or_else(|_| Err(io::Error::other("the image format's code has panicked")));
        lock(&desk.done).push_back(Completion {
            tag: order.tag,
            result,
        });
        desk.finished.notify_one();
        // An eventfd that is read again and again has room.
        let _ = desk.event.write(1);
    }
}

/// Waits for a job; `None` when there will be no more.
fn next(desk: &Desk) -> Option<Order> {
    let mut orders = lock(&desk.orders);
    loop {
        if let Some(order) = orders.jobs.pop_front() {
            return Some(order);
        }
        if orders.closed {
            return None;
        }
        orders = desk
            .ordered
            .wait(orders)
            .unwrap_or_else(PoisonError::into_inner);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
