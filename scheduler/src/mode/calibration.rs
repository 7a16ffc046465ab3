//! What really happens: two partitions, each with a VP that counts, and a look at the threads that run them.
//!
//! Where Linux schedules, a VP that is busy keeps the thread busy that runs it: the thread is on a CPU or waits for one, all the
//! time. Where the hypervisor schedules, that thread sleeps, although the count in the guest's memory goes up. Somebody looks
//! every millisecond which of the two it is. A busy machine does not blur that, and neither does one that loses time to others:
//! who is kept waiting does not sleep. What became of the thread's time is the second witness.
//!
//! Two VPs whose threads are confined to one CPU then show whether that confines the VPs.

use std::{
    fs::File,
    io,
    os::{fd::BorrowedFd, unix::fs::FileExt},
    ptr,
    sync::{
        Barrier, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use mshv_bindings::{
    HV_PAGE_SIZE, MSHV_SET_MEM_BIT_EXECUTABLE, MSHV_SET_MEM_BIT_WRITABLE, hv_register_assoc,
    hv_register_name, hv_register_name_HV_X64_REGISTER_CS as CS,
    hv_register_name_HV_X64_REGISTER_DS as DS, hv_register_name_HV_X64_REGISTER_RBX as RBX,
    hv_register_name_HV_X64_REGISTER_RFLAGS as RFLAGS, hv_register_name_HV_X64_REGISTER_RIP as RIP,
    hv_register_value, hv_x64_segment_register, mshv_user_mem_region,
};
use mshv_ioctls::VcpuFd;

use super::{
    Evidence, Says,
    probe_partition::{ProbeError, ProbePartition},
    probe_signal::{Blocked, ProbeSignal},
    thread_time::{Stopwatch, Times},
};

/// The source of the evidence that decides.
pub(super) const ONE_VP: &str = "behaviour of one VP";
const TWO_VPS: &str = "behaviour of two VPs on one CPU";

/// Two partitions of one VP, not one of two: a second VP would have to be started by the first.
const PARTITIONS: usize = 2;
/// Guest-physical address of the first page.
const BASE: u64 = 0x1000;
/// `inc dword [bx]`, and again.
const COUNT_FOR_EVER: [u8; 5] = [0x66, 0xff, 0x07, 0xeb, 0xfb];
/// How often to look at a thread.
const LOOK_EVERY: Duration = Duration::from_millis(1);
/// Fewer looks tell nothing.
const ENOUGH_LOOKS: u32 = 5;
/// A thread that has run less has only waited, or slept.
const ENOUGH_RUN: Duration = Duration::from_millis(2);
/// How long to wait for a VP thread that was asked to end before it is asked again.
const KICK_AGAIN: Duration = Duration::from_micros(500);

/// Looks at one VP, then at two, and takes as much of `budget`, of which some has gone since `begun`, as is good for that.
pub(super) fn measure(device: BorrowedFd<'_>, begun: Instant, budget: Duration) -> Vec<Evidence> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let (signal, mut machines) = match prepare(device) {
        Ok(ready) => ready,
        Err(refusal) => return vec![not_measured(ONE_VP, &refusal)],
    };
    let (single, double) = (budget / 20, budget / 12);
    // For taking everything down, and for the steal probe.
    let afterwards = budget / 10;
    let time_for = |time| begun.elapsed() + time + afterwards < budget;
    let mut evidence = Vec::new();
    let (says, alone) = loop {
        // Wherever Linux likes: on a busy machine it finds the better CPU.
        let runs = match run(&mut machines[..1], &signal, None, single) {
            Ok(runs) => runs,
            Err(refusal) => return vec![not_measured(ONE_VP, &refusal)],
        };
        let says = runs[0].says();
        if says != Says::Nothing || !time_for(single) {
            evidence.push(of_one(&runs[0], says));
            break (says, runs[0].cpu);
        }
    };
    if says != Says::Nothing && time_for(2 * double) {
        evidence.push(match run(&mut machines, &signal, alone, double) {
            Ok(runs) => of_two(&runs),
            Err(refusal) => not_measured(TWO_VPS, &refusal),
        });
    }
    evidence
}

fn not_measured(source: &'static str, refusal: &ProbeError) -> Evidence {
    let value = format!("not measured: {refusal}");
    Evidence::new(source, Says::Nothing, value, "how VPs behave is not known")
}

fn of_one(run: &Run, says: Says) -> Evidence {
    let meaning = match says {
        Says::Linux => "the thread that runs a VP is on a CPU all the time: Linux schedules it",
        Says::Hypervisor => "the thread that runs a VP sleeps while the VP runs elsewhere",
        Says::Nothing => "how VPs behave could not be seen",
    };
    Evidence::new(ONE_VP, says, run.to_string(), meaning)
}

fn of_two(runs: &[Run]) -> Evidence {
    let values: Vec<_> = runs.iter().map(Run::to_string).collect();
    let says: Vec<_> = runs.iter().map(Run::says).collect();
    let together: f64 = runs.iter().map(|run| run.times.share(run.times.run)).sum();
    let pinned = runs.iter().all(|run| run.pinned);
    let (says, meaning) = match says[..] {
        [Says::Linux, Says::Linux] if !pinned => (
            Says::Linux,
            "two busy threads; they could not be confined to one CPU",
        ),
        [Says::Linux, Says::Linux] if together < 1.25 => (
            Says::Linux,
            "two threads on one CPU share it: affinity and time slices bind VPs",
        ),
        [Says::Linux, Says::Linux] => (
            Says::Nothing,
            "two threads on one CPU have more than one between them",
        ),
        [Says::Hypervisor, Says::Hypervisor] => (
            Says::Hypervisor,
            "both VPs run while their threads sleep: affinity does not bind VPs",
        ),
        _ => (Says::Nothing, "what becomes of two VPs could not be seen"),
    };
    Evidence::new(TWO_VPS, says, values.join("; "), meaning)
}

/// What became of one VP and its thread.
#[derive(Debug)]
struct Run {
    /// How often somebody has looked at the thread.
    looks: u32,
    /// How often it was on a CPU or waited for one.
    awake: u32,
    times: Times,
    /// How far the VP counted.
    counted: u32,
    /// The thread was confined to one CPU.
    pinned: bool,
    /// Where it was in the end.
    cpu: Option<usize>,
    /// Why the VP has stopped, if it has.
    stopped: Option<String>,
}

impl Run {
    fn says(&self) -> Says {
        if self.counted == 0 || self.looks < ENOUGH_LOOKS || self.stopped.is_some() {
            return Says::Nothing;
        }
        let Times { wall, run, .. } = self.times;
        if self.awake * 5 >= self.looks * 4 && run >= ENOUGH_RUN {
            Says::Linux
        } else if self.awake * 5 <= self.looks && run * 10 <= wall {
            Says::Hypervisor
        } else {
            Says::Nothing
        }
    }
}

impl std::fmt::Display for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let millis = |time: Duration| time.as_secs_f64() * 1e3;
        let Times { wall, run, wait } = self.times;
        write!(
            f,
            "awake in {} of {} looks, R {:.2}: ran {:.1}",
            self.awake,
            self.looks,
            self.times.share(run),
            millis(run)
        )?;
        if let Some(wait) = wait {
            write!(f, " and waited {:.1}", millis(wait))?;
        }
        write!(f, " of {:.1} ms, counted {}", millis(wall), self.counted)?;
        match &self.stopped {
            Some(why) => write!(f, ", stopped: {why}"),
            None => Ok(()),
        }
    }
}

/// What a measurement needs.
fn prepare(device: BorrowedFd<'_>) -> Result<(ProbeSignal, Vec<Machine>), ProbeError> {
    let signal = ProbeSignal::borrow().map_err(ProbeError::system("borrowing a signal"))?;
    let machines = (0..PARTITIONS).map(|_| Machine::new(device));
    Ok((signal, machines.collect::<Result<_, _>>()?))
}

/// A partition with one VP. Fields are dropped in this order: VP, partition, and only then its memory.
struct Machine {
    vp: VcpuFd,
    _partition: ProbePartition,
    memory: Memory,
}

impl Machine {
    fn new(device: BorrowedFd<'_>) -> Result<Self, ProbeError> {
        let memory = Memory::new().map_err(ProbeError::system("memory for a guest"))?;
        let partition = ProbePartition::create(device)?;
        partition
            .fd()
            .map_user_memory(memory.region())
            .map_err(ProbeError::refused("giving a partition memory"))?;
        let vp = partition
            .fd()
            .create_vcpu(0)
            .map_err(ProbeError::refused("creating a VP"))?;
        vp.set_reg(&start())
            .map_err(ProbeError::refused("setting a VP's registers"))?;
        Ok(Self {
            vp,
            _partition: partition,
            memory,
        })
    }
}

/// Lets VPs run for `time`, their threads confined to `cpu` if there is one.
fn run(
    machines: &mut [Machine],
    signal: &ProbeSignal,
    cpu: Option<usize>,
    time: Duration,
) -> Result<Vec<Run>, ProbeError> {
    let session = &Session {
        signal,
        cpu,
        start: Barrier::new(machines.len() + 1),
        end: AtomicBool::new(false),
        threads: machines.iter().map(|_| Watched::default()).collect(),
        running: Mutex::new(Vec::new()),
        ended: Condvar::new(),
    };
    thread::scope(|scope| {
        let blocked = Blocked::all();
        let threads: Vec<_> = machines
            .iter_mut()
            .zip(&session.threads)
            .map(|(machine, watched)| {
                thread::Builder::new()
                    .name("rota-calibrate".to_owned())
                    .spawn_scoped(scope, move || session.thread(machine, watched))
            })
            .collect();
        drop(blocked);
        // Those that could not be started are not waited for.
        for _ in threads.iter().filter(|thread| thread.is_err()) {
            scope.spawn(|| session.start.wait());
        }
        session.start.wait();
        session.watch(time);
        threads
            .into_iter()
            .map(|thread| {
                let refused = ProbeError::system("a thread for a VP");
                thread
                    .and_then(|thread| {
                        let panicked = |_| io::Error::other("it has panicked");
                        thread.join().map_err(panicked)
                    })
                    .map_err(refused)
            })
            .collect()
    })
}

/// One thread, as it is watched.
#[derive(Default)]
struct Watched {
    /// Its number, from when it is about to run its VP.
    tid: AtomicI32,
    looks: AtomicU32,
    awake: AtomicU32,
}

/// One run, as its threads see it.
struct Session<'a> {
    signal: &'a ProbeSignal,
    cpu: Option<usize>,
    start: Barrier,
    end: AtomicBool,
    threads: Vec<Watched>,
    /// Threads that can be looked at and kicked.
    running: Mutex<Vec<libc::pid_t>>,
    ended: Condvar,
}

impl Session<'_> {
    /// A VP's thread.
    fn thread(&self, machine: &mut Machine, watched: &Watched) -> Run {
        let pinned = confine(self.cpu);
        // SAFETY: takes no arguments.
        let tid = unsafe { libc::gettid() };
        self.running
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(tid);
        self.signal.admit();
        let counter = machine.memory.counter();
        self.start.wait();
        let before = counter.load(Ordering::Relaxed);
        let watch = Stopwatch::start();
        let mut stopped = None;
        watched.tid.store(tid, Ordering::Release);
        while !self.end.load(Ordering::Acquire) {
            match machine.vp.run() {
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
                Ok(message) => {
                    stopped = Some(format!("message {:#x}", { message.header.message_type }));
                    break;
                }
                Err(error) => {
                    stopped = Some(io::Error::from_raw_os_error(error.errno()).to_string());
                    break;
                }
            }
        }
        let times = watch.read();
        // SAFETY: takes no arguments.
        let cpu = usize::try_from(unsafe { libc::sched_getcpu() }).ok();
        let counted = counter.load(Ordering::Relaxed).wrapping_sub(before);
        // Whoever kicks holds this lock: from here on nobody does.
        self.running
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|thread| *thread != tid);
        self.ended.notify_one();
        Run {
            looks: watched.looks.load(Ordering::Relaxed),
            awake: watched.awake.load(Ordering::Relaxed),
            times,
            counted,
            pinned,
            cpu,
            stopped,
        }
    }

    /// Looks at the threads for `time`, or until every one has given up, and ends the run.
    fn watch(&self, time: Duration) {
        let mut looking: Vec<Option<File>> = self.threads.iter().map(|_| None).collect();
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let begun = Instant::now();
        while begun.elapsed() < time && !running.is_empty() {
            running = self
                .ended
                .wait_timeout(running, LOOK_EVERY)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            for (watched, file) in self.threads.iter().zip(&mut looking) {
                let tid = watched.tid.load(Ordering::Acquire);
                if !running.contains(&tid) {
                    continue;
                }
                if file.is_none() {
                    *file = File::open(format!("/proc/self/task/{tid}/stat")).ok();
                }
                if let Some(awake) = file.as_ref().and_then(is_awake) {
                    watched.looks.fetch_add(1, Ordering::Relaxed);
                    watched.awake.fetch_add(awake.into(), Ordering::Relaxed);
                }
            }
        }
        self.end.store(true, Ordering::Release);
        for thread in running.iter() {
            // Where that is allowed: on a busy machine it would otherwise wait for its turn before it could end.
            // SAFETY: a system call about a thread that cannot end while this lock is held.
            unsafe { libc::setpriority(libc::PRIO_PROCESS, thread.cast_unsigned(), -20) };
        }
        while !running.is_empty() {
            for thread in running.iter() {
                self.signal.send(*thread);
            }
            running = self
                .ended
                .wait_timeout(running, KICK_AGAIN)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// Whether a thread is on a CPU or waits for one, by the state in its `stat`, which stands behind its name. One that waits for
/// memory of its own (`D`) neither runs a VP nor sleeps while another does.
fn is_awake(stat: &File) -> Option<bool> {
    let mut text = [0; 256];
    let length = stat.read_at(&mut text, 0).ok()?;
    let end_of_name = text[..length].iter().rposition(|byte| *byte == b')')?;
    match text[..length].get(end_of_name + 2)? {
        b'R' => Some(true),
        b'S' => Some(false),
        _ => None,
    }
}

/// Makes the calling thread an ordinary one on `cpu`; whether it is there.
fn confine(cpu: Option<usize>) -> bool {
    // SAFETY: plain system calls on the calling thread; the set lives on the stack, and CPUs beyond it are left out.
    unsafe {
        let normal: libc::sched_param = std::mem::zeroed();
        libc::sched_setscheduler(0, libc::SCHED_OTHER, &raw const normal);
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        let Some(cpu) = cpu.filter(|cpu| *cpu < libc::CPU_SETSIZE as usize) else {
            return false;
        };
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &raw const set) == 0
    }
}

/// Real mode, at the code, with BX at the count.
fn start() -> [hv_register_assoc; 5] {
    let register = |name: hv_register_name, value| hv_register_assoc {
        name,
        value,
        ..Default::default()
    };
    let segment = |attributes| {
        let mut segment = hv_x64_segment_register {
            limit: 0xffff,
            ..Default::default()
        };
        segment.__bindgen_anon_1.attributes = attributes;
        hv_register_value { segment }
    };
    let word = |reg64| hv_register_value { reg64 };
    let count = BASE + HV_PAGE_SIZE as u64;
    [
        register(CS, segment(0x9b)),
        register(DS, segment(0x93)),
        register(RIP, word(BASE)),
        register(RBX, word(count)),
        register(RFLAGS, word(2)),
    ]
}

/// Two pages of guest memory: code, and a count.
struct Memory(*mut u8);

// SAFETY: the count is only accessed as an atomic, and the code only before there is a VP.
unsafe impl Send for Memory {}

impl Memory {
    const SIZE: usize = 2 * HV_PAGE_SIZE;

    fn new() -> io::Result<Self> {
        // SAFETY: a new anonymous mapping, into whose first page, of at least that size, the code is written.
        unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let start = libc::mmap(ptr::null_mut(), Self::SIZE, protection, flags, -1, 0);
            if start == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            let start = start.cast::<u8>();
            ptr::copy_nonoverlapping(COUNT_FOR_EVER.as_ptr(), start, COUNT_FOR_EVER.len());
            Ok(Self(start))
        }
    }

    fn region(&self) -> mshv_user_mem_region {
        mshv_user_mem_region {
            size: Self::SIZE as u64,
            guest_pfn: BASE / HV_PAGE_SIZE as u64,
            userspace_addr: self.0 as u64,
            flags: 1 << MSHV_SET_MEM_BIT_WRITABLE | 1 << MSHV_SET_MEM_BIT_EXECUTABLE,
            ..Default::default()
        }
    }

    fn counter(&self) -> &AtomicU32 {
        // SAFETY: at the start of the second page, and only ever accessed so from this side.
        unsafe { AtomicU32::from_ptr(self.0.add(HV_PAGE_SIZE).cast()) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`; the partition that used it is gone.
        unsafe { libc::munmap(self.0.cast(), Self::SIZE) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    /// Awake in so many of 20 looks.
    fn run(awake: u32, run_ms: u64, wait_ms: u64, wall_ms: u64) -> Run {
        let millis = Duration::from_millis;
        Run {
            looks: 20,
            awake,
            times: Times {
                wall: millis(wall_ms),
                run: millis(run_ms),
                wait: Some(millis(wait_ms)),
            },
            counted: 9,
            pinned: true,
            cpu: Some(0),
            stopped: None,
        }
    }

    #[test]
    fn one_vp_is_judged_by_sleep_not_by_contention() {
        assert_eq!(run(20, 40, 0, 40).says(), Says::Linux);
        assert_eq!(run(20, 8, 32, 40).says(), Says::Linux, "a busy machine");
        assert_eq!(
            run(20, 9, 22, 150).says(),
            Says::Linux,
            "one that lost time"
        );
        assert_eq!(run(0, 0, 0, 40).says(), Says::Hypervisor);
        assert_eq!(run(1, 0, 30, 40).says(), Says::Hypervisor, "a busy machine");
        assert_eq!(run(20, 1, 39, 40).says(), Says::Nothing, "it only waited");
        assert_eq!(run(10, 20, 0, 40).says(), Says::Nothing);
        assert_eq!(
            run(3, 7, 3, 40).says(),
            Says::Nothing,
            "it was late, and then counted"
        );
        assert_eq!(
            run(0, 30, 0, 40).says(),
            Says::Nothing,
            "the witnesses differ"
        );
    }

    #[test]
    fn what_was_not_seen_is_not_judged() {
        let nothing = |run: Run| assert_eq!(run.says(), Says::Nothing, "{run}");
        let asleep = || run(0, 0, 0, 40);
        nothing(Run {
            counted: 0,
            ..asleep()
        });
        nothing(Run {
            looks: 2,
            ..asleep()
        });
        nothing(Run {
            stopped: Some("message 0x80000000".to_owned()),
            ..asleep()
        });
    }

    #[test]
    fn two_vps_tell_whether_affinity_binds() {
        let says = |runs: [Run; 2]| of_two(&runs).says;
        let linux = |run_ms| run(20, run_ms, 60 - run_ms, 60);
        let core = || run(0, 0, 1, 60);
        assert_eq!(says([linux(30), linux(30)]), Says::Linux);
        assert_eq!(says([linux(10), linux(9)]), Says::Linux, "a busy machine");
        assert_eq!(says([linux(60), linux(60)]), Says::Nothing, "on two CPUs");
        assert_eq!(says([core(), core()]), Says::Hypervisor);
        assert_eq!(says([core(), linux(60)]), Says::Nothing);
    }

    #[test]
    fn a_device_that_is_none_is_not_measured() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let evidence = measure(null.as_fd(), Instant::now(), Duration::from_millis(500));
        assert_eq!(evidence.len(), 1);
        assert_eq!(evidence[0].says, Says::Nothing);
        assert!(
            evidence[0].value.contains("creating a partition"),
            "{evidence:?}"
        );
    }
}
