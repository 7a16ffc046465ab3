//! A partition's life before it runs: initialisation, order, properties (`mshv_partition_ioctl*`, `HvCallInitializePartition`).

use mshv_bindings::*;
use rota_tests::on_mshv;
use rota_tests::raw::{self, Errno, Outcome};
use rota_tests::vm::{
    EFAULT, EINVAL, EIO, ENOTTY, Memory, Partition, READ_WRITE_EXECUTE, SYNTHETIC_FEATURES,
    synthetic_features,
};

on_mshv! {
    /// `pt_initialized` makes a second call a success that does nothing.
    fn initialising_twice_is_harmless(device) {
        let partition = device.create_partition().expect("create");
        partition.initialize().expect("first");
        partition.initialize().expect("second");
        partition.create_vp(0).expect("and it still works");
    }

    /// The hypervisor refuses a VP with `INVALID_PARTITION_STATE`, which the driver's table makes `EIO`.
    fn a_vp_before_initialisation_is_eio(device) {
        let partition = device.create_partition().expect("create");
        assert_eq!(partition.create_vp(0).map(drop), Err(EIO));
        partition.initialize().expect("initialise");
        partition.create_vp(0).expect("the same index afterwards");
    }

    /// `HvCallMapGpaPages` wants an active partition.
    fn memory_before_initialisation_is_eio(device) {
        let partition = device.create_partition().expect("create");
        let memory = Memory::new(0x1000);
        assert_eq!(partition.map(&memory, 0, READ_WRITE_EXECUTE), Err(EIO));
        partition.initialize().expect("initialise");
        partition.map(&memory, 0, READ_WRITE_EXECUTE).expect("the refused region left nothing behind");
    }

    fn early_properties_are_set_before_initialisation(device) {
        let partition = device.create_partition().expect("create");
        let outcome = partition.set_property(SYNTHETIC_FEATURES, synthetic_features());
        assert_eq!(outcome, Outcome { result: Ok(()), status: 0, reps: 0 });
        partition.initialize().expect("initialise");
    }

    fn early_properties_are_refused_after_initialisation(device) {
        let partition = device.partition();
        let outcome = partition.set_property(SYNTHETIC_FEATURES, synthetic_features());
        assert!(outcome.result.is_err(), "{outcome:?}");
        assert_ne!(outcome.status, 0, "the refusal is the hypervisor's and has its status");
        assert_ne!(u32::from(outcome.status), HV_STATUS_UNKNOWN_PROPERTY, "it knows the property: it comes too late");
    }

    /// `IGNORE_WRITE_READ_ZERO` is what VMMs set, after initialisation.
    fn late_properties_are_set_and_read(device) {
        let partition = device.partition();
        let code = hv_partition_property_code_HV_PARTITION_PROPERTY_UNIMPLEMENTED_MSR_ACTION;
        let action = u64::from(hv_unimplemented_msr_action_HV_UNIMPLEMENTED_MSR_ACTION_IGNORE_WRITE_READ_ZERO);
        assert_eq!(partition.set_property(code, action).result, Ok(()));
        let (outcome, value) = partition.property(code);
        assert_eq!((outcome.result, value), (Ok(()), action));
    }

    fn machine_properties_have_sensible_values(device) {
        let partition = device.partition();
        let ask = |code| {
            let (outcome, value) = partition.property(code);
            assert_eq!((outcome.result, outcome.status), (Ok(()), 0), "property {code:#x}");
            value
        };
        let width = ask(hv_partition_property_code_HV_PARTITION_PROPERTY_PHYSICAL_ADDRESS_WIDTH);
        assert!((32..=52).contains(&width), "physical address width {width}");
        let xsave = ask(hv_partition_property_code_HV_PARTITION_PROPERTY_MAX_XSAVE_DATA_SIZE);
        assert!((576..=0x4000).contains(&xsave), "XSAVE area {xsave}");
        let clock = ask(hv_partition_property_code_HV_PARTITION_PROPERTY_PROCESSOR_CLOCK_FREQUENCY);
        assert!(clock > 100_000_000, "processor clock {clock} Hz");
    }

    fn reference_time_goes_on(device) {
        let partition = device.partition();
        let code = hv_partition_property_code_HV_PARTITION_PROPERTY_REFERENCE_TIME;
        let (first, before) = partition.property(code);
        assert_eq!(first.result, Ok(()));
        let started = std::time::Instant::now();
        while started.elapsed().as_millis() < 2 {}
        let (_, after) = partition.property(code);
        assert!(after >= before + 10_000, "2 ms are at least 10 000 ticks of 100 ns: {before} … {after}");
    }

    /// The specification: a code that is none is `HV_STATUS_UNKNOWN_PROPERTY`; the driver's table makes it `EIO`.
    fn an_unknown_property_says_so(device) {
        let partition = device.partition();
        for outcome in [partition.property(0x00FF_FFFF).0, partition.set_property(0x00FF_FFFF, 1)] {
            assert_eq!(outcome.result, Err(EIO));
            assert_eq!(u32::from(outcome.status), HV_STATUS_UNKNOWN_PROPERTY);
        }
    }

    /// `mshv_partition_ioctl` ends in `-ENOTTY`; the 0xF0… numbers were the out-of-tree driver's.
    fn unknown_ioctls_are_enotty(device) {
        let partition = device.partition();
        let mut buffer = [0u8; 256];
        for number in (0xF0..=0xF6).chain([0x42]) {
            let request = raw::request(1, number, 16);
            assert_eq!(raw::ioctl(partition.fd(), request, &mut buffer), Err(ENOTTY), "number {number:#x}");
        }
        for (what, request) in [
            ("the device's CREATE_PARTITION", raw::CREATE_PARTITION),
            ("a VP's RUN_VP", raw::RUN_VP),
            ("CREATE_VP of another size", raw::request(1, 1, 8)),
            ("KVM_CREATE_VCPU", 0xAE41),
        ] {
            assert_eq!(raw::ioctl(partition.fd(), request, &mut buffer), Err(ENOTTY), "{what}");
        }
    }

    fn bad_pointers_are_efault(device) {
        let partition = device.partition();
        let bad = raw::forbidden_page();
        for request in [
            raw::CREATE_VP, raw::SET_GUEST_MEMORY, raw::IRQFD, raw::IOEVENTFD,
            raw::SET_MSI_ROUTING, raw::GET_GPAP_ACCESS_BITMAP, raw::ROOT_HVCALL,
        ] {
            assert_eq!(raw::ioctl_value(partition.fd(), request, bad), Err(EFAULT), "request {request:#x}");
            assert_eq!(raw::ioctl_value(partition.fd(), request, 0), Err(EFAULT), "request {request:#x}, null");
        }
    }

    fn several_partitions_live_side_by_side(device) {
        let partitions: Vec<_> = (0..6).map(|_| device.partition()).collect();
        let memory = Memory::new(0x4000);
        for partition in &partitions {
            partition.map(&memory, 0, READ_WRITE_EXECUTE).expect("one memory in several partitions");
            partition.create_vp(0).expect("VP 0 in each");
        }
        let fds: std::collections::HashSet<_> = partitions.iter().map(Partition::fd).collect();
        assert_eq!(fds.len(), 6);
    }

    /// `mshv_partition_fops` has neither.
    fn nothing_can_be_read_or_mapped(device) {
        let partition = device.partition();
        let mut byte = 0u8;
        // SAFETY: one writable byte.
        let read = unsafe { libc::read(partition.fd(), std::ptr::from_mut(&mut byte).cast(), 1) };
        assert_eq!((read, raw::last_errno()), (-1, EINVAL), "read");
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let page = unsafe { libc::mmap(std::ptr::null_mut(), 0x1000, libc::PROT_READ, libc::MAP_SHARED, partition.fd(), 0) };
        assert_eq!((page, raw::last_errno()), (libc::MAP_FAILED, Errno(libc::ENODEV)), "mmap");
    }
}
