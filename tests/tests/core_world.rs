//! softmshv with `--scheduler core`: VPs run on logical processors the client has no say over, and get what their partition's
//! properties grant. Each test runs itself again under the launcher, with logical processors of its choice.

use std::os::unix::thread::JoinHandleExt as _;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mshv_bindings::*;
use rota_tests::guest::{CODE, Guest};
use rota_tests::vm::Device;
use rota_tests::{child, payload, require};

const WEIGHT: u32 = hv_partition_property_code_HV_PARTITION_PROPERTY_CPU_WEIGHT;
const CAP: u32 = hv_partition_property_code_HV_PARTITION_PROPERTY_CPU_CAP;
const RESERVE: u32 = hv_partition_property_code_HV_PARTITION_PROPERTY_CPU_RESERVE;
/// All of one logical processor.
const WHOLE: u64 = 0x1_0000;
const LOOKED_AT: Duration = Duration::from_millis(600);
/// Set in the process under the launcher.
const INSIDE: &str = "ROTA_CORE_WORLD";

/// Declares tests that run under the launcher.
macro_rules! in_core_world {
    ($($(#[$attribute:meta])* fn $name:ident($device:ident, $($option:literal),*) $body:block)*) => {$(
        $(#[$attribute])*
        #[test]
        fn $name() {
            fn body($device: &Device) $body
            if std::env::var_os(INSIDE).is_some() {
                return body(&Device::open().expect("/dev/mshv"));
            }
            require!(child::softmshv());
            let me = std::env::current_exe().expect("this program");
            let options = ["--scheduler", "core", $($option),*];
            again(child::under_softmshv(&options, me), stringify!($name));
        }
    )*};
}

fn again(mut command: Command, name: &str) {
    // They measure who gets what of this machine.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let output = command
        .args(["--exact", name, "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .expect("the launcher");
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A VP that never stops, on a thread of its own, until this is dropped.
struct Spinning {
    thread: Option<JoinHandle<()>>,
    end: &'static AtomicBool,
}

extern "C" fn nothing(_signal: i32) {}

impl Spinning {
    fn start(guest: Guest) -> Spinning {
        Spinning::share(Arc::new(guest))
    }

    /// One that others use meanwhile.
    fn share(guest: Arc<Guest>) -> Spinning {
        let end: &'static AtomicBool = Box::leak(Box::default());
        let thread = std::thread::spawn(move || {
            while !end.load(Ordering::Acquire) {
                assert_eq!(
                    guest.try_run().err(),
                    Some(rota_tests::raw::Errno(libc::EINTR))
                );
            }
        });
        Spinning {
            thread: Some(thread),
            end,
        }
    }
}

impl Drop for Spinning {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        self.end.store(true, Ordering::Release);
        while !thread.is_finished() {
            // SAFETY: a handler that does nothing; the thread has not been joined.
            unsafe {
                libc::signal(libc::SIGUSR1, nothing as extern "C" fn(i32) as usize);
                libc::pthread_kill(thread.as_pthread_t(), libc::SIGUSR1);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let _ = thread.join();
    }
}

/// Threads of this process that run VPs, in the order they were started, once there are `count` of them.
fn processors(count: usize) -> Vec<u32> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let mut found: Vec<u32> = std::fs::read_dir("/proc/self/task")
            .expect("threads")
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|tid| {
                std::fs::read_to_string(format!("/proc/self/task/{tid}/comm"))
                    .is_ok_and(|name| name.starts_with("softmshv-vp"))
            })
            .collect();
        if found.len() == count {
            found.sort_unstable();
            return found;
        }
        assert!(
            Instant::now() < deadline,
            "{} threads run VPs, not {count}",
            found.len()
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// How long each of these threads runs and waits while `time` passes, as shares of it.
fn shares(threads: &[u32], time: Duration) -> Vec<(f64, f64)> {
    let read = |tid: &u32| {
        let text =
            std::fs::read_to_string(format!("/proc/self/task/{tid}/schedstat")).unwrap_or_default();
        let mut numbers = text
            .split(' ')
            .map(|number| number.parse::<f64>().unwrap_or(0.0));
        (numbers.next().unwrap_or(0.0), numbers.next().unwrap_or(0.0))
    };
    let (begun, before) = (Instant::now(), threads.iter().map(read).collect::<Vec<_>>());
    std::thread::sleep(time);
    let (wall, after) = (
        begun.elapsed(),
        threads.iter().map(read).collect::<Vec<_>>(),
    );
    let wall = wall.as_nanos() as f64;
    before
        .iter()
        .zip(after)
        .map(|(before, after)| ((after.0 - before.0) / wall, (after.1 - before.1) / wall))
        .collect()
}

fn spinner(device: &Device) -> Guest {
    Guest::real_mode(device, &payload::SPIN)
}

fn set(guest: &Guest, property: u32, value: u64) {
    let outcome = guest.partition.set_property(property, value);
    assert_eq!((outcome.result, outcome.status), (Ok(()), 0));
    assert_eq!(guest.partition.property(property).1, value, "reads back");
}

in_core_world! {
    fn affinity_of_the_client_binds_no_vp(device, "--lps", "0") {
        let guest = spinner(device);
        let vp = processors(1);
        let thread = std::thread::spawn(move || {
            // SAFETY: a set on the stack with one CPU; if there is no such CPU nothing happens.
            unsafe {
                let mut set: libc::cpu_set_t = std::mem::zeroed();
                libc::CPU_SET(1, &mut set);
                libc::sched_setaffinity(0, size_of_val(&set), &raw const set);
            }
            Spinning::start(guest)
        });
        let spinning = thread.join().unwrap();
        let [(run, wait)] = shares(&vp, LOOKED_AT)[..] else { panic!("one VP") };
        assert!(run > 0.05 && run + wait > 0.8, "the VP runs: {run:.2} + {wait:.2}");
        let status = std::fs::read_to_string(format!("/proc/self/task/{}/status", vp[0])).unwrap();
        assert!(status.contains("Cpus_allowed_list:\t0\n"), "{status}");
        drop(spinning);
        assert_eq!(processors(0), [0; 0], "nothing is left of it");
    }

    /// Which thread is in `RUN_VP` when the VP runs: none that uses any time.
    fn the_clients_thread_sleeps(device,) {
        let guest = spinner(device);
        let spinning = Spinning::start(guest);
        std::thread::sleep(Duration::from_millis(100));
        let vp = processors(1);
        let others: Vec<u32> = std::fs::read_dir("/proc/self/task")
            .unwrap()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|tid| !vp.contains(tid))
            .collect();
        for (run, _) in shares(&others, LOOKED_AT) {
            assert!(run < 0.1, "a thread of the client runs {run:.2}");
        }
        drop(spinning);
    }

    /// Register VP_RUNTIME, through the partition while the VP's own descriptor is busy: what the VP has run, and the client's thread
    /// has not.
    fn the_hypervisor_says_how_long_a_vp_ran(device, "--lps", "0") {
        const RUN_TIME: u32 = hv_register_name_HV_REGISTER_VP_RUNTIME;
        let guest = Arc::new(spinner(device));
        let ns = || {
            let (outcome, values) = guest.vp.get_on(guest.partition.fd(), &[RUN_TIME]);
            assert_eq!(outcome.result, Ok(()));
            // SAFETY: every bit pattern is a number.
            unsafe { values[0].reg64 * 100 }
        };
        assert_eq!(ns(), 0, "it has not run");
        let spinning = Spinning::share(Arc::clone(&guest));
        let vp = processors(1);
        let (begun, before) = (Instant::now(), ns());
        let [(run, _)] = shares(&vp, LOOKED_AT)[..] else { panic!("one VP") };
        let told = (ns() - before) as f64 / begun.elapsed().as_nanos() as f64;
        assert!(told > 0.05 && (told - run).abs() < 0.1 * run.max(0.2), "told {told:.3}, ran {run:.3}");
        drop(spinning);
        let stopped = ns();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(ns(), stopped, "it does not run");
    }

    fn equals_share_a_logical_processor(device, "--lps", "0", "--quantum-us", "4000") {
        let spinning: Vec<_> = (0..3).map(|_| Spinning::start(spinner(device))).collect();
        let got = shares(&processors(3), LOOKED_AT);
        let all: f64 = got.iter().map(|(run, _)| run).sum();
        assert!(all < 1.1, "more than one logical processor: {got:?}");
        for (run, _) in &got {
            assert!((0.2..0.5).contains(&(run / all)), "{got:?}");
        }
        drop(spinning);
    }

    fn weight_divides(device, "--lps", "0", "--quantum-us", "2000") {
        let (light, heavy) = (spinner(device), spinner(device));
        set(&heavy, WEIGHT, 300);
        let spinning = [Spinning::start(light), Spinning::start(heavy)];
        let got = shares(&processors(2), LOOKED_AT);
        let ratio = got[1].0 / got[0].0;
        assert!((2.2..4.0).contains(&ratio), "{ratio:.2}: {got:?}");
        drop(spinning);
    }

    fn a_cap_holds_also_while_nobody_else_wants_to_run(device, "--quantum-us", "4000") {
        let guest = spinner(device);
        set(&guest, CAP, WHOLE / 4);
        let spinning = Spinning::start(guest);
        let [(run, _)] = shares(&processors(1), LOOKED_AT)[..] else { panic!("one VP") };
        assert!((0.1..0.3).contains(&run), "{run:.2}");
        drop(spinning);
    }

    fn a_reserve_comes_first(device, "--lps", "0", "--quantum-us", "4000") {
        let (small, heavy) = (spinner(device), spinner(device));
        set(&small, WEIGHT, 1);
        set(&small, RESERVE, WHOLE / 2);
        set(&heavy, WEIGHT, 10_000);
        let spinning = [Spinning::start(small), Spinning::start(heavy)];
        let got = shares(&processors(2), LOOKED_AT);
        let all = got[0].0 + got[1].0;
        let part = got[0].0 / all;
        assert!(part > 0.35, "{part:.2}: {got:?}");
        // On a busy machine the reserve is all there is.
        assert!(part < 0.65 || all < 0.8, "{part:.2}: {got:?}");
        drop(spinning);
    }

    /// A change counts for a VP that runs already.
    fn a_cap_can_come_late(device, "--quantum-us", "4000") {
        let guest = Arc::new(spinner(device));
        let spinning = Spinning::share(Arc::clone(&guest));
        let vp = processors(1);
        // On a busy machine it takes a while until it does.
        let mut looks = (0..25).map(|_| shares(&vp, Duration::from_millis(200))[0]);
        let before = looks.find(|(run, waits)| run + waits > 0.7);
        assert!(before.is_some(), "it does not run");
        set(&guest, CAP, WHOLE / 10);
        let after = shares(&vp, LOOKED_AT)[0];
        assert!(after.0 < 0.15, "{before:?}, then {after:?}");
        drop(spinning);
    }

    fn properties_out_of_range_are_refused(device,) {
        const OUT_OF_RANGE: u16 = HV_STATUS_PROPERTY_VALUE_OUT_OF_RANGE as u16;
        let guest = spinner(device);
        for (property, value) in [
            (WEIGHT, 0), (WEIGHT, 10_001), (CAP, WHOLE + 1), (CAP, 0), (RESERVE, WHOLE + 1),
        ] {
            let outcome = guest.partition.set_property(property, value);
            assert_eq!(outcome.status, OUT_OF_RANGE, "{property:#x} = {value:#x}");
        }
        set(&guest, CAP, WHOLE / 2);
        assert_eq!(guest.partition.set_property(RESERVE, WHOLE).status, OUT_OF_RANGE, "more than the cap");
        set(&guest, RESERVE, WHOLE / 4);
        assert_eq!(guest.partition.set_property(CAP, WHOLE / 8).status, OUT_OF_RANGE, "less than the reserve");
    }

    /// Otherwise every idle guest would cost half of what its neighbour gets.
    fn a_halted_vp_gives_its_logical_processor_away(device, "--lps", "0") {
        let idle = Spinning::start(Guest::real_mode(device, &payload::STI_HLT));
        let busy = Spinning::start(spinner(device));
        std::thread::sleep(Duration::from_millis(50));
        let vps = processors(2);
        let [(idle_run, _), (run, wait)] = shares(&vps, LOOKED_AT)[..] else { panic!("two VPs") };
        assert!(idle_run < 0.05 && run + wait > 0.85, "{idle_run:.2}; {run:.2} + {wait:.2}");
        drop((idle, busy));
    }

    /// It was asleep without a logical processor, and gets one when an interrupt comes.
    fn a_halted_vp_wakes_among_busy_ones(device, "--lps", "0") {
        let program = payload::code(&[&payload::lapic_enable(), &payload::MARK_2, &payload::STI_HLT, &payload::DONE]);
        let guest = Guest::real_mode(device, &program);
        guest.handler(0x40, &payload::handler());
        guest.expect_mark(0xF2);
        let busy: Vec<_> = (0..2).map(|_| Spinning::start(spinner(device))).collect();
        std::thread::scope(|scope| {
            let sleeper = scope.spawn(|| {
                guest.expect_mark(0xF1);
                guest.expect_done();
            });
            std::thread::sleep(Duration::from_millis(100));
            assert!(!sleeper.is_finished(), "it sleeps");
            let fixed = hv_interrupt_type_HV_X64_INTERRUPT_TYPE_FIXED;
            assert_eq!(guest.partition.assert_interrupt(fixed, 0, 0x40, false).status, 0);
            sleeper.join().unwrap();
        });
        drop(busy);
    }

    /// A VP that stops often must not wait a quantum each time.
    fn exits_go_on_while_others_are_busy(device, "--lps", "0") {
        let busy = Spinning::start(spinner(device));
        // inc bx; out 0xF1, al; jmp back
        let guest = Guest::real_mode(device, &payload::code(&[&payload::INC_BX, &payload::MARK_1, &[0xEB, 0xFB]]));
        guest.vp.set64(&[(rota_tests::reg::RIP, CODE)]);
        let begun = Instant::now();
        for _ in 0..100 {
            guest.expect_mark(0xF1);
        }
        let each = begun.elapsed() / 100;
        assert!(each < Duration::from_millis(10), "{each:?} for each exit");
        drop(busy);
    }
}
