//! Threads and signals: a VP is one at a time, a partition is many, and a signal ends a run (`vp_mutex`, `mshv_run_vp_*`).

use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use rota_tests::guest::{CODE, Guest};
use rota_tests::message::Exit;
use rota_tests::on_mshv;
use rota_tests::payload::{self, code};
use rota_tests::raw::{Errno, Sys};
use rota_tests::reg::{self};

const EINTR: Errno = Errno(libc::EINTR);
const SOON: Duration = Duration::from_millis(150);
const LONG: Duration = Duration::from_secs(10);

extern "C" fn nothing(_signal: i32) {}

/// Makes a signal interrupt system calls and do nothing else.
fn catch(signal: i32, flags: i32) {
    // SAFETY: a zeroed sigaction is a valid one; the handler does nothing and so is safe in a signal.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(i32) as usize;
        action.sa_flags = flags;
        assert_eq!(
            libc::sigaction(signal, &raw const action, std::ptr::null_mut()),
            0
        );
    }
}

/// Sends `signal` to a running thread until it reports back: a signal that comes between two calls is lost, so one is not enough.
fn interrupt<T>(
    handle: &std::thread::JoinHandle<()>,
    signal: i32,
    receiver: &mpsc::Receiver<T>,
) -> T {
    for _ in 0..500 {
        // SAFETY: the handle is not joined yet, so the thread's id is valid.
        unsafe { libc::pthread_kill(handle.as_pthread_t(), signal) };
        match receiver.recv_timeout(Duration::from_millis(20)) {
            Ok(value) => return value,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => panic!("the VP's thread is gone"),
        }
    }
    panic!("no signal ends MSHV_RUN_VP");
}

/// Runs `guest` on a thread of its own, interrupts it, gives guest and result back.
fn run_and_interrupt(guest: Guest, signal: i32) -> (Guest, Sys<Exit>) {
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let result = guest.try_run();
        sender.send((guest, result)).unwrap();
    });
    assert!(
        matches!(receiver.recv_timeout(SOON), Err(RecvTimeoutError::Timeout)),
        "the guest has nothing to say"
    );
    let back = interrupt(&thread, signal, &receiver);
    thread.join().unwrap();
    back
}

on_mshv! {
    fn a_signal_ends_the_run_of_a_busy_guest(device) {
        catch(libc::SIGUSR1, 0);
        let guest = Guest::real_mode(device, &payload::SPIN);
        let (guest, result) = run_and_interrupt(guest, libc::SIGUSR1);
        assert_eq!(result, Err(EINTR));
        assert_eq!(guest.vp.get64(reg::RIP), CODE, "and the VP can be looked at");
    }

    fn a_signal_ends_the_run_of_a_halted_guest(device) {
        catch(libc::SIGUSR1, 0);
        let guest = Guest::real_mode(device, &payload::HLT);
        let (_, result) = run_and_interrupt(guest, libc::SIGUSR1);
        assert_eq!(result, Err(EINTR));
    }

    /// The driver returns `-EINTR`, not `-ERESTARTSYS`: `SA_RESTART` does not restart it.
    fn sa_restart_makes_no_difference(device) {
        catch(libc::SIGUSR2, libc::SA_RESTART);
        let guest = Guest::real_mode(device, &payload::SPIN);
        let (_, result) = run_and_interrupt(guest, libc::SIGUSR2);
        assert_eq!(result, Err(EINTR));
    }

    fn an_interrupted_guest_goes_on_where_it_was(device) {
        catch(libc::SIGUSR1, 0);
        let guest = Guest::real_mode(device, &code(&[&payload::SPIN, &payload::DONE]));
        let (guest, result) = run_and_interrupt(guest, libc::SIGUSR1);
        assert_eq!(result, Err(EINTR));
        let (guest, result) = run_and_interrupt(guest, libc::SIGUSR1);
        assert_eq!(result, Err(EINTR), "it still spins");
        guest.resume_at(CODE + 2);
        guest.expect_done();
    }

    fn an_interrupted_vp_shows_a_valid_register_page(device) {
        catch(libc::SIGUSR1, 0);
        let guest = Guest::real_mode(device, &payload::SPIN);
        guest.vp.set64(&[(reg::RBX, 0x4444)]);
        let Ok(page) = guest.vp.map_page(0) else { return rota_tests::requires::skip("no register page") };
        let (guest, result) = run_and_interrupt(guest, libc::SIGUSR1);
        assert_eq!(result, Err(EINTR));
        // SAFETY: the page is mapped and larger than the structure; the VP is stopped.
        let shown = unsafe { page.0.cast::<mshv_bindings::hv_vp_register_page>().read_volatile() };
        assert_eq!(shown.isvalid, 1, "explicit suspend flushes the page too");
        // SAFETY: every bit pattern is a number.
        let (general, rip) = unsafe {
            let block = shown.__bindgen_anon_1.__bindgen_anon_1;
            (block.__bindgen_anon_1.gp_registers, block.rip)
        };
        assert_eq!((general[3], rip), (0x4444, CODE));
        drop(guest);
    }

    /// `vp_mutex`: whoever comes second waits for the end of the run.
    fn a_second_thread_waits_for_the_vp(device) {
        catch(libc::SIGUSR1, 0);
        let guest = Guest::real_mode(device, &payload::SPIN);
        guest.vp.set64(&[(reg::RBX, 0x5555)]);
        let guest = std::sync::Arc::new(guest);
        let (sender, receiver) = mpsc::channel();
        let runner = std::thread::spawn({
            let (guest, sender) = (guest.clone(), sender.clone());
            move || sender.send(("run", guest.try_run().err(), 0)).unwrap()
        });
        assert!(receiver.recv_timeout(SOON).is_err(), "it runs");
        let reader = std::thread::spawn({
            let guest = guest.clone();
            move || sender.send(("read", None, guest.vp.get64(reg::RBX))).unwrap()
        });
        assert!(receiver.recv_timeout(SOON).is_err(), "the second thread waits");
        // The two report in either order, as soon as the VP is free.
        let first = interrupt(&runner, libc::SIGUSR1, &receiver);
        let second = receiver.recv_timeout(LONG).expect("the other thread's turn");
        let mut both = [first, second];
        both.sort_by_key(|report| report.0);
        assert_eq!(both, [("read", None, 0x5555), ("run", Some(EINTR), 0)]);
        runner.join().unwrap();
        reader.join().unwrap();
    }

    /// Two threads on one VP: each run is one of the guest's, none is lost and none comes twice.
    fn two_threads_share_one_vp(device) {
        // inc bx; out 0xF1, al; jmp back
        let guest = Guest::real_mode(device, &code(&[&payload::INC_BX, &payload::MARK_1, &[0xEB, 0xFB]]));
        guest.vp.set64(&[(reg::RBX, 0), (reg::RAX, 0)]);
        let turn = std::sync::Mutex::new(0u64);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    loop {
                        let mut count = turn.lock().unwrap();
                        if *count == 200 {
                            return;
                        }
                        guest.expect_mark(0xF1);
                        *count += 1;
                        assert_eq!(guest.vp.get64(reg::RBX), *count);
                    }
                });
            }
        });
    }

    /// The VP's own descriptor is busy while it runs; the partition's is not.
    fn the_partition_answers_while_a_vp_runs(device) {
        catch(libc::SIGUSR1, 0);
        let guest = std::sync::Arc::new(Guest::real_mode(device, &payload::SPIN));
        let (sender, receiver) = mpsc::channel();
        let runner = std::thread::spawn({
            let guest = guest.clone();
            move || sender.send(guest.try_run().err()).unwrap()
        });
        assert!(receiver.recv_timeout(SOON).is_err(), "it runs");
        let memory = rota_tests::vm::Memory::new(0x1000);
        guest.partition.map(&memory, 0x10_0000, rota_tests::vm::READ_WRITE_EXECUTE).expect("map");
        guest.partition.unmap(&memory, 0x10_0000).expect("unmap");
        guest.partition.create_vp(1).expect("another VP");
        assert_eq!(interrupt(&runner, libc::SIGUSR1, &receiver), Some(EINTR));
        runner.join().unwrap();
    }

    fn partitions_run_side_by_side(device) {
        let guests: Vec<Guest> = (0..4u64)
            .map(|i| {
                let guest = Guest::real_mode(device, &code(&[&payload::STORE_AX, &payload::DONE]));
                guest.vp.set64(&[(reg::RAX, 0x1000 + i), (reg::RBX, 0x3000)]);
                guest
            })
            .collect();
        std::thread::scope(|scope| {
            for guest in &guests {
                scope.spawn(|| guest.expect_done());
            }
        });
        for (i, guest) in guests.iter().enumerate() {
            assert_eq!(guest.ram.read(0x3000, 2), [i as u8, 0x10], "guest {i} wrote its own memory");
        }
    }

    /// A VP is not bound to the thread that made it.
    fn a_vp_moves_between_threads(device) {
        let guest = Guest::real_mode(device, &code(&[&payload::MARK_1, &payload::MARK_2, &payload::DONE]));
        for port in [0xF1, 0xF2, payload::DONE_PORT] {
            std::thread::scope(|scope| scope.spawn(|| guest.expect_mark(port)).join().unwrap());
        }
    }

    /// A guest's memory is shared while it runs: the client stops it with a flag, no signal and no exit needed before.
    fn a_running_guest_sees_the_clients_writes(device) {
        // mov al, [bx]; test al, al (84 C0); jz back (74 FA); out
        let guest = Guest::real_mode(device, &code(&[&payload::LOAD_AL, &[0x84, 0xC0, 0x74, 0xFA], &payload::DONE]));
        guest.vp.set64(&[(reg::RBX, 0x3000)]);
        let finished = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                guest.expect_done();
                finished.store(true, Ordering::SeqCst);
            });
            std::thread::sleep(SOON);
            assert!(!finished.load(Ordering::SeqCst), "it waits for the flag");
            guest.ram.write(0x3000, &[1]);
        });
    }
}
