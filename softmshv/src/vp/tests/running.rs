//! What happens to a VP that runs: signals, visits, interruptions, startup.

use super::*;

#[test]
fn a_signal_ends_the_run_and_nothing_is_lost() {
    extern "C" fn nothing(_: i32) {}
    let signal = libc::SIGRTMIN() + 8;
    // SAFETY: a handler that does nothing, for a signal only this test uses.
    unsafe { libc::signal(signal, nothing as extern "C" fn(i32) as usize) };
    // inc ecx; jmp back
    let Some(guest) = boot(&[0x66, 0x41, 0xeb, 0xfc]) else {
        return;
    };
    let vp = Arc::clone(&guest.vp);
    let runner = thread::spawn(move || (vp.run().map(drop), vp.run().map(drop)));
    let handle = std::os::unix::thread::JoinHandleExt::as_pthread_t(&runner);
    while !runner.is_finished() {
        thread::sleep(Duration::from_millis(20));
        // SAFETY: the thread has not been joined.
        unsafe { libc::pthread_kill(handle, signal) };
    }
    let interrupted = Err(Errno(libc::EINTR));
    assert_eq!(runner.join().unwrap(), (interrupted, interrupted));
    assert!(guest.get(hv::hv_register_name_HV_X64_REGISTER_RCX) > 0);
    assert!((CODE..CODE + 4).contains(&guest.rip()));
}

#[test]
fn a_running_vp_can_be_read_and_its_memory_changed() {
    // loop: inc cx; test byte es:[0x3000], 1; jz loop; out dx, al
    let code = [0x41, 0x26, 0xf6, 0x06, 0x00, 0x30, 0x01, 0x74, 0xf7, OUT];
    let Some(guest) = boot(&code) else { return };
    let (vp, done) = (Arc::clone(&guest.vp), Arc::new(AtomicBool::new(false)));
    let finished = Arc::clone(&done);
    let runner = thread::spawn(move || {
        let result = vp.run().map(drop);
        finished.store(true, Ordering::Release);
        result
    });
    thread::sleep(Duration::from_millis(10));
    for pfn in 0x100..0x120 {
        guest.get(hv::hv_register_name_HV_X64_REGISTER_RCX);
        let region = mshv_user_mem_region {
            size: 0x1000,
            guest_pfn: pfn,
            userspace_addr: guest.ram as u64 + 0x2_0000,
            flags: 3,
            rsvd: [0; 7],
        };
        guest.partition.memory.set(&region, true).unwrap();
        guest
            .partition
            .memory
            .set(&mshv_user_mem_region { flags: 4, ..region }, true)
            .unwrap();
    }
    assert!(!done.load(Ordering::Acquire));
    guest.partition.memory.write(0x3000, &[1]).unwrap();
    assert_eq!(runner.join().unwrap(), Ok(()));
    assert_eq!(guest.rip(), CODE + 9);
}

#[test]
fn an_injected_exception_goes_through_the_guests_table() {
    let Some(guest) = boot(&[OUT]) else { return };
    guest
        .partition
        .memory
        .write(6 * 4, &[0x00, 0x20, 0, 0])
        .unwrap();
    guest.partition.memory.write(0x2000, &[0x90, OUT]).unwrap();
    guest.set(&[(hv::hv_register_name_HV_REGISTER_PENDING_EVENT0, 1 | 6 << 16)]);
    ends_with_out(&guest, 0x2001);
}

#[test]
fn the_client_learns_when_an_interrupt_could_be_taken() {
    // nop; sti; nop; jmp to itself
    let Some(guest) = boot(&[0x90, 0xfb, 0x90, 0xeb, 0xfe]) else {
        return;
    };
    guest.set(&[(
        hv::hv_register_name_HV_REGISTER_DELIVERABILITY_NOTIFICATIONS,
        NOTIFY_INTERRUPT,
    )]);
    let message = guest.run();
    assert_eq!(
        kind(&message),
        hv::hv_message_type_HVMSG_X64_INTERRUPTION_DELIVERABLE
    );
    let notifications = hv::hv_register_name_HV_REGISTER_DELIVERABILITY_NOTIFICATIONS;
    assert_eq!(guest.get(notifications), 0);
    assert_eq!(guest.rip(), CODE + 3);
    // The client takes it up: vector 0x20 of the table at 0.
    guest
        .partition
        .memory
        .write(0x20 * 4, &[0x00, 0x20, 0, 0])
        .unwrap();
    guest.partition.memory.write(0x2000, &[OUT]).unwrap();
    let pending = hv::hv_register_name_HV_REGISTER_PENDING_INTERRUPTION;
    guest.set(&[(pending, 1 | 0x20 << 16)]);
    ends_with_out(&guest, 0x2000);
}

#[test]
fn a_second_vp_waits_for_its_startup_ipi() {
    let Some(guest) = boot(&[OUT]) else { return };
    let second = Arc::new(Vp::new(&guest.partition, 1).unwrap());
    let name = [hv::hv_register_name_HV_REGISTER_INTERNAL_ACTIVITY_STATE];
    let mut value = [hv_register_value::default()];
    second.get_registers(&name, &mut value);
    // SAFETY: a plain integer.
    assert_eq!(unsafe { value[0].reg64 }, 1);
    let (done, vp) = (Arc::new(AtomicBool::new(false)), Arc::clone(&second));
    let finished = Arc::clone(&done);
    let runner = thread::spawn(move || {
        let result = vp.run().map(drop);
        finished.store(true, Ordering::Release);
        result
    });
    thread::sleep(Duration::from_millis(30));
    assert!(!done.load(Ordering::Acquire));
    // Startup at 0x2000: first INIT, then the vector, as messages to APIC id 1.
    guest.partition.memory.write(0x2000, &[OUT]).unwrap();
    for data in [0x4500, 0x4602] {
        let msi = kvm_bindings::kvm_msi {
            address_lo: 0xfee0_1000,
            data,
            ..Default::default()
        };
        guest.partition.vm.signal_msi(msi).unwrap();
    }
    assert_eq!(runner.join().unwrap(), Ok(()));
    let mut value = [hv_register_value::default(); 2];
    let names = [
        hv::hv_register_name_HV_X64_REGISTER_CS,
        hv::hv_register_name_HV_REGISTER_VP_INDEX,
    ];
    second.get_registers(&names, &mut value);
    // SAFETY: a segment, and a plain integer.
    let (selector, index) = unsafe { (value[0].segment.selector, value[1].reg64) };
    assert_eq!((selector, index), (0x200, 1));
}
