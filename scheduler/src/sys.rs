//! The system calls of scheduling that the standard library does not have, each behind a safe function: affinity, scheduling
//! attributes, core-scheduling cookies, and the few descriptors the waiting threads of this crate need.

use std::{
    fs::File,
    io, mem,
    os::fd::{AsRawFd, FromRawFd, RawFd},
    path::Path,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::CpuSet;

/// A thread of this or another process, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Tid(pub i32);

impl Tid {
    /// The thread that asks.
    #[must_use]
    pub fn current() -> Self {
        // SAFETY: takes nothing, always succeeds.
        Self(unsafe { libc::gettid() })
    }

    /// Whether this process has it, still.
    pub(crate) fn is_there(self) -> bool {
        Path::new("/proc/self/task")
            .join(self.0.to_string())
            .exists()
    }
}

/// Words of the largest affinity mask: [`CpuSet::LIMIT`] CPUs.
const MASK_WORDS: usize = CpuSet::LIMIT as usize / 64;

pub(crate) fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// The CPUs `tid` may run on now: what it asked for within what its cpuset and the online CPUs leave.
pub(crate) fn affinity(tid: Tid) -> io::Result<CpuSet> {
    let mut words = [0u64; MASK_WORDS];
    affinity_words(tid, &mut words)?;
    Ok(CpuSet::from_words(&words))
}

fn affinity_words(tid: Tid, words: &mut [u64; MASK_WORDS]) -> io::Result<()> {
    // SAFETY: the kernel writes at most the given number of bytes to the array, and the rest stays zero.
    check(unsafe {
        libc::syscall(
            libc::SYS_sched_getaffinity,
            tid.0,
            size_of_val(words),
            words.as_mut_ptr(),
        )
    })?;
    Ok(())
}

/// Is that exactly `cpus`? Without allocating, for those who ask often.
pub(crate) fn affinity_is(tid: Tid, cpus: &CpuSet) -> io::Result<bool> {
    let mut words = [0u64; MASK_WORDS];
    affinity_words(tid, &mut words)?;
    let (is, rest) = words.split_at(cpus.words().len());
    Ok(is == cpus.words() && rest.iter().all(|word| *word == 0))
}

/// Asks that `tid` run on `cpus` only. The kernel takes those of them that the thread's cpuset has, and refuses if there are none.
pub(crate) fn set_affinity(tid: Tid, cpus: &CpuSet) -> io::Result<()> {
    let words = cpus.words();
    // SAFETY: the kernel reads the given number of bytes of the slice.
    check(unsafe {
        libc::syscall(
            libc::SYS_sched_setaffinity,
            tid.0,
            size_of_val(words),
            words.as_ptr(),
        )
    })?;
    Ok(())
}

/// Scheduling attributes of a thread, as `sched_setattr` takes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Attributes {
    /// `SCHED_OTHER`, `SCHED_FIFO` …
    pub(crate) policy: u32,
    /// `SCHED_FLAG_…`.
    pub(crate) flags: u64,
    /// Nice value, for the fair class.
    pub(crate) nice: i32,
    /// Priority, for the real-time class.
    pub(crate) priority: u32,
    /// Fair class: the slice. Deadline class: the run time. In nanoseconds.
    pub(crate) runtime_ns: u64,
    /// Deadline class, in nanoseconds.
    pub(crate) deadline_ns: u64,
    /// Deadline class, in nanoseconds.
    pub(crate) period_ns: u64,
}

/// What the thread has.
pub(crate) fn attributes(tid: Tid) -> io::Result<Attributes> {
    // SAFETY: a plain structure of integers.
    let mut attr: libc::sched_attr = unsafe { mem::zeroed() };
    let size = size_of_val(&attr);
    // SAFETY: the kernel writes at most `size` bytes to the structure.
    check(unsafe { libc::syscall(libc::SYS_sched_getattr, tid.0, &raw mut attr, size, 0) })?;
    Ok(Attributes {
        policy: attr.sched_policy,
        flags: attr.sched_flags,
        nice: attr.sched_nice,
        priority: attr.sched_priority,
        runtime_ns: attr.sched_runtime,
        deadline_ns: attr.sched_deadline,
        period_ns: attr.sched_period,
    })
}

/// Gives the thread `wanted`.
pub(crate) fn set_attributes(tid: Tid, wanted: &Attributes) -> io::Result<()> {
    let attr = libc::sched_attr {
        size: size_of::<libc::sched_attr>() as u32,
        sched_policy: wanted.policy,
        sched_flags: wanted.flags,
        sched_nice: wanted.nice,
        sched_priority: wanted.priority,
        sched_runtime: wanted.runtime_ns,
        sched_deadline: wanted.deadline_ns,
        sched_period: wanted.period_ns,
    };
    // SAFETY: the kernel reads as many bytes as the structure says it has.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, tid.0, &raw const attr, 0) })?;
    Ok(())
}

/// Gives the thread a core-scheduling cookie of its own.
pub(crate) fn create_core_cookie(tid: Tid) -> io::Result<()> {
    core_scheduling(core_scheduling::CREATE, tid, 0)
}

/// Gives the calling thread's cookie to `tid`.
pub(crate) fn share_core_cookie(tid: Tid) -> io::Result<()> {
    core_scheduling(core_scheduling::SHARE_TO, tid, 0)
}

/// Gives `tid`'s cookie to the calling thread.
pub(crate) fn take_core_cookie(tid: Tid) -> io::Result<()> {
    core_scheduling(core_scheduling::SHARE_FROM, tid, 0)
}

/// The thread's cookie; 0 is none.
pub(crate) fn core_cookie(tid: Tid) -> io::Result<u64> {
    let mut cookie = 0u64;
    core_scheduling(core_scheduling::GET, tid, &raw mut cookie as usize)?;
    Ok(cookie)
}

/// From `linux/prctl.h`.
mod core_scheduling {
    pub(super) const PR_SCHED_CORE: libc::c_int = 62;
    pub(super) const GET: libc::c_int = 0;
    pub(super) const CREATE: libc::c_int = 1;
    pub(super) const SHARE_TO: libc::c_int = 2;
    pub(super) const SHARE_FROM: libc::c_int = 3;
}

fn core_scheduling(command: libc::c_int, tid: Tid, address: usize) -> io::Result<()> {
    const ONE_THREAD: libc::c_ulong = 0;
    let set = core_scheduling::PR_SCHED_CORE;
    // SAFETY: writes a u64 to `address` for `GET`, where the caller gives one; nothing otherwise.
    let result = unsafe { libc::prctl(set, command, tid.0, ONE_THREAD, address) };
    check(result.into())?;
    Ok(())
}

/// Lets the calling thread's timers fire when they are due, not up to 50 us later.
pub(crate) fn precise_timers() {
    // SAFETY: changes only the timer slack of the calling thread.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
}

/// `CLOCK_MONOTONIC`, in nanoseconds.
pub(crate) fn monotonic_ns() -> u64 {
    clock_ns(libc::CLOCK_MONOTONIC)
}

/// `CLOCK_BOOTTIME`, in nanoseconds: it goes on while this machine sleeps.
pub(crate) fn boottime_ns() -> u64 {
    clock_ns(libc::CLOCK_BOOTTIME)
}

/// CPU time the calling thread has used, in nanoseconds.
pub(crate) fn thread_cpu_ns() -> u64 {
    clock_ns(libc::CLOCK_THREAD_CPUTIME_ID)
}

fn clock_ns(clock: libc::clockid_t) -> u64 {
    // SAFETY: a plain structure of integers.
    let mut time: libc::timespec = unsafe { mem::zeroed() };
    // SAFETY: writes the structure.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Is this process privileged in its user namespace?
pub(crate) fn is_root() -> bool {
    // SAFETY: takes nothing, always succeeds.
    unsafe { libc::geteuid() == 0 }
}

/// The real user of this process.
pub(crate) fn uid() -> u32 {
    // SAFETY: takes nothing, always succeeds.
    unsafe { libc::getuid() }
}

/// Waits until one of `fds` is readable or `timeout` has passed; which are readable, by index. Nothing is readable after a signal.
pub(crate) fn wait_readable(fds: &[RawFd], timeout: Option<Duration>) -> io::Result<Vec<bool>> {
    let mut polls: Vec<libc::pollfd> = fds
        .iter()
        .map(|&fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    let timeout = timeout.map(|timeout| libc::timespec {
        tv_sec: timeout.as_secs() as libc::time_t,
        tv_nsec: timeout.subsec_nanos().into(),
    });
    let timeout = timeout
        .as_ref()
        .map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: an array and its length, a valid time or none, no signal mask.
    let result = unsafe {
        libc::ppoll(
            polls.as_mut_ptr(),
            polls.len() as libc::nfds_t,
            timeout,
            std::ptr::null(),
        )
    };
    match check(result.into()) {
        Ok(_) => Ok(polls.iter().map(|poll| poll.revents != 0).collect()),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(vec![false; fds.len()]),
        Err(error) => Err(error),
    }
}

/// A descriptor that another thread makes readable, once and for all.
#[derive(Debug)]
pub(crate) struct StopSignal(File);

impl StopSignal {
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: creates a descriptor.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        check(fd.into())?;
        // SAFETY: just created, owned by nobody else.
        Ok(Self(unsafe { File::from_raw_fd(fd) }))
    }

    pub(crate) fn raise(&self) {
        // It cannot overflow: each waiting thread is told once.
        let _ = io::Write::write(&mut &self.0, &1u64.to_ne_bytes());
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn affinity_is_read_back_as_set() {
        std::thread::spawn(|| {
            let me = Tid::current();
            let before = affinity(me).unwrap();
            let first = CpuSet::one(before.iter().next().unwrap());
            set_affinity(me, &first).unwrap();
            assert_eq!(affinity(me).unwrap(), first);
            let nowhere = CpuSet::one(CpuSet::LIMIT - 1);
            assert!(set_affinity(me, &nowhere).is_err());
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_stop_signal_ends_a_wait() {
        let stop = StopSignal::new().unwrap();
        let short = Some(Duration::from_millis(1));
        assert_eq!(wait_readable(&[stop.fd()], short).unwrap(), [false]);
        stop.raise();
        assert_eq!(wait_readable(&[stop.fd()], None).unwrap(), [true]);
    }
}
