//! What a VMM has done: its exits and ioctls by softmshv's trace, its processor time and system calls by the kernel.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::FromRawFd;
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::guest::Guest;
use crate::error::{Context, Error, Result};

/// Where the lab's kernel has the number of the event that is a system call's beginning.
const SYSTEM_CALL: &str = "/sys/kernel/debug/tracing/events/raw_syscalls/sys_enter/id";

/// softmshv writes its trace at the first ioctl in a new second.
const TRACE_PERIOD: Duration = Duration::from_millis(1100);

/// How often something has happened in a VMM's process, since it began or between two moments.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Counts {
    /// Exits to the VMM.
    pub(crate) exits: f64,
    /// ioctls on `/dev/mshv`.
    pub(crate) ioctls: f64,
    /// System calls of all threads, if they were counted.
    pub(crate) syscalls: Option<f64>,
    /// Processor time of all threads without that in which the guest ran, in microseconds.
    pub(crate) cpu_us: f64,
    /// Processor time in which the guest ran.
    pub(crate) guest_us: f64,
}

impl Counts {
    /// What is more than in `other`.
    pub(super) fn without(&self, other: &Self) -> Self {
        let more = |own: f64, other: f64| (own - other).max(0.0);
        Self {
            exits: more(self.exits, other.exits),
            ioctls: more(self.ioctls, other.ioctls),
            syscalls: self
                .syscalls
                .zip(other.syscalls)
                .map(|(own, other)| more(own, other)),
            cpu_us: more(self.cpu_us, other.cpu_us),
            guest_us: more(self.guest_us, other.guest_us),
        }
    }
}

/// Looks at one VMM's process.
pub(super) struct Meter {
    pid: u32,
    syscalls: Option<Vec<File>>,
}

impl Meter {
    /// Begins to count, system calls only if that is asked for: counted ones are slower.
    pub(super) fn new(pid: u32, syscalls: bool) -> Result<Self> {
        let counters = || -> io::Result<Vec<File>> {
            fs::read_dir(format!("/proc/{pid}/task"))?
                .map(|thread| {
                    let name = thread?.file_name();
                    let thread = name.to_string_lossy().parse().map_err(io::Error::other)?;
                    count_system_calls(thread)
                })
                .collect()
        };
        let syscalls = syscalls
            .then(counters)
            .transpose()
            .context(|| "cannot count system calls")?;
        Ok(Self { pid, syscalls })
    }

    /// Has the guest run a command, and counts from its beginning to its end.
    pub(super) fn around(&mut self, guest: &mut Guest, command: &str) -> Result<(String, Counts)> {
        let before = self.look(guest)?;
        let said = guest.runs(command)?;
        Ok((said, self.look(guest)?.without(&before)))
    }

    fn look(&mut self, guest: &mut Guest) -> Result<Counts> {
        thread::sleep(TRACE_PERIOD);
        guest.nudge()?;
        let trace = guest.trace()?;
        let syscalls = self.syscalls.as_mut().map(|counters| {
            let counts = counters.iter_mut().map(count);
            counts.sum::<io::Result<u64>>().map(|sum| sum as f64)
        });
        let guest_us = guest_time_us(self.pid)?;
        Ok(Counts {
            exits: trace.exit_count() as f64,
            ioctls: trace.ioctl_count() as f64,
            syscalls: syscalls
                .transpose()
                .context(|| "cannot read a count of system calls")?,
            cpu_us: processor_time_us(self.pid)? - guest_us,
            guest_us,
        })
    }
}

/// Processor time of a process, with that of threads that have ended.
fn processor_time_us(pid: u32) -> Result<f64> {
    let mut clock = 0;
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes the clock's number; no other pointer is involved.
    let found = unsafe { libc::clock_getcpuclockid(pid.cast_signed(), &raw mut clock) };
    // SAFETY: writes the structure it is given.
    if found != 0 || unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return Err(Error::new("the VMM's processor time cannot be read"));
    }
    Ok(time.tv_sec as f64 * 1e6 + time.tv_nsec as f64 / 1e3)
}

/// The time in which a process's guest ran: by what the kernel's clock ticks have met.
fn guest_time_us(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))
        .context(|| "the VMM's times cannot be read")?;
    // Behind the name, which may hold anything, the fields from the third on; this is the 43rd.
    let ticks: Option<f64> = stat.rsplit_once(')').and_then(|(_, fields)| {
        let field = fields.split_whitespace().nth(43 - 3)?;
        field.parse().ok()
    });
    // SAFETY: no pointer is involved.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64;
    ticks
        .map(|ticks| ticks * 1e6 / per_second)
        .ok_or_else(|| Error::new("the VMM's times are not understood"))
}

/// Holds on to an event that system calls raise, as long as this process lives. The kernel rewrites its code when the first of them
/// comes and when the last one goes.
pub(crate) fn hold_system_calls() -> Result<()> {
    let own = count_system_calls(0).context(|| "cannot count system calls")?;
    std::mem::forget(own);
    Ok(())
}

/// What `perf_event_open` takes, in its first version (Linux: include/uapi/linux/perf_event.h).
#[repr(C)]
#[derive(Default)]
struct PerfEvent {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup: u32,
    breakpoint: u32,
    config1: u64,
}

/// `PERF_TYPE_TRACEPOINT`.
const TRACEPOINT: u32 = 2;
/// Threads that the thread starts count, too.
const INHERIT: u64 = 1 << 1;

/// Counts the system calls of a thread, 0 being this one, and of those that it starts.
fn count_system_calls(thread: i32) -> io::Result<File> {
    let id = fs::read_to_string(SYSTEM_CALL)?;
    let event = PerfEvent {
        kind: TRACEPOINT,
        size: size_of::<PerfEvent>() as u32,
        config: id.trim().parse().map_err(io::Error::other)?,
        flags: INHERIT,
        ..PerfEvent::default()
    };
    // SAFETY: reads the structure, which has the size that it says; on any processor, in no group, without flags.
    let descriptor = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            &raw const event,
            thread,
            -1,
            -1,
            0,
        )
    };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it, and nobody else knows it.
    Ok(unsafe { File::from_raw_fd(descriptor as i32) })
}

fn count(counter: &mut File) -> io::Result<u64> {
    let mut number = [0; 8];
    counter.read_exact(&mut number)?;
    Ok(u64::from_ne_bytes(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_program_costs_to_start_is_not_counted() {
        let of = |count: f64| Counts {
            exits: count,
            syscalls: Some(2.0 * count),
            ..Counts::default()
        };
        let more = of(5.0).without(&of(2.0));
        assert_eq!((more.exits, more.syscalls), (3.0, Some(6.0)));
        let less = of(1.0).without(&of(2.0));
        assert_eq!((less.exits, less.ioctls), (0.0, 0.0));
        assert_eq!(of(1.0).without(&Counts::default()).syscalls, None);
    }

    #[test]
    fn processor_time_grows_and_no_guest_has_run() {
        let own = std::process::id();
        let before = processor_time_us(own).unwrap();
        let began = std::time::Instant::now();
        while began.elapsed() < Duration::from_millis(20) {}
        assert!(processor_time_us(own).unwrap() > before);
        assert_eq!(guest_time_us(own).unwrap(), 0.0);
    }
}
