//! The device node and the ioctls on its own descriptor (`mshv_dev_*` in `mshv_root_main.c`).

use std::os::fd::AsRawFd;

use mshv_bindings::*;
use rota_tests::on_mshv;
use rota_tests::raw::{self, Errno, bytes_of, bytes_of_mut, close};
use rota_tests::vm::{Device, EBADF, EFAULT, EINVAL, ENOTTY, LAPIC_FLAGS};

fn create(device: &Device, flags: u64, isolation: u64) -> Result<(), Errno> {
    let mut args = mshv_create_partition {
        pt_flags: flags,
        pt_isolation: isolation,
    };
    raw::ioctl(device.fd(), raw::CREATE_PARTITION, &mut args).map(close)
}

on_mshv! {
    /// A misc character device, as `misc_register` makes it.
    fn the_node_is_a_character_device(_device) {
        use std::os::unix::fs::FileTypeExt;
        let metadata = std::fs::metadata("/dev/mshv").expect("stat /dev/mshv");
        assert!(metadata.file_type().is_char_device());
        assert!(std::path::Path::new("/dev/mshv").exists());
    }

    fn it_opens_many_times_and_in_every_mode(_device) {
        for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR, libc::O_RDWR | libc::O_NONBLOCK] {
            // SAFETY: a NUL-terminated path.
            close(raw::checked(unsafe { libc::open(c"/dev/mshv".as_ptr(), flags | libc::O_CLOEXEC) }).expect("open"));
        }
        let devices: Vec<_> = (0..8).map(|_| Device::open().expect("open")).collect();
        for device in &devices {
            device.create_partition().expect("a partition from each");
        }
    }

    fn openat_and_std_find_it_too(_device) {
        // SAFETY: a NUL-terminated path.
        let fd = unsafe { libc::openat(libc::AT_FDCWD, c"/dev/mshv".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
        close(raw::checked(fd).expect("openat"));
        let file = std::fs::OpenOptions::new().read(true).write(true).open("/dev/mshv").expect("open through std");
        let mut args = mshv_create_partition { pt_flags: LAPIC_FLAGS, pt_isolation: 0 };
        close(raw::ioctl(file.as_raw_fd(), raw::CREATE_PARTITION, &mut args).expect("create through std's descriptor"));
    }

    fn close_on_exec_is_as_asked(device) {
        for (flag, expected) in [(libc::O_CLOEXEC, libc::FD_CLOEXEC), (0, 0)] {
            // SAFETY: a NUL-terminated path.
            let fd = raw::checked(unsafe { libc::open(c"/dev/mshv".as_ptr(), libc::O_RDWR | flag) }).expect("open");
            // SAFETY: no pointer is involved.
            assert_eq!(unsafe { libc::fcntl(fd, libc::F_GETFD) }, expected);
            close(fd);
        }
        let partition = device.create_partition().expect("create");
        // SAFETY: no pointer is involved.
        assert_eq!(unsafe { libc::fcntl(partition.fd(), libc::F_GETFD) }, libc::FD_CLOEXEC, "a partition always");
    }

    /// `mshv_dev_ioctl` ends in `-ENOTTY`. A request is all of its 32 bits: a wrong size or direction is a stranger.
    fn unknown_ioctls_are_enotty(device) {
        let mut buffer = [0u8; 256];
        for number in [0x42, 0x7F, 0xF0, 0xF6, 0xFF] {
            let request = raw::request(3, number, 16);
            assert_eq!(raw::ioctl(device.fd(), request, &mut buffer), Err(ENOTTY), "number {number:#x}");
        }
        for (what, request) in [
            ("a partition's CREATE_VP", raw::CREATE_VP),
            ("a partition's SET_GUEST_MEMORY", raw::SET_GUEST_MEMORY),
            ("a VP's RUN_VP", raw::RUN_VP),
            ("half a CREATE_PARTITION", raw::request(1, 0, 8)),
            ("the other direction", raw::request(2, 0, 16)),
            ("KVM_GET_API_VERSION", 0xAE00),
        ] {
            assert_eq!(raw::ioctl(device.fd(), request, &mut buffer), Err(ENOTTY), "{what}");
        }
    }

    fn partitions_come_with_every_combination_of_first_flags(device) {
        for flags in 0..8 {
            create(device, flags, 0).unwrap_or_else(|e| panic!("flags {flags:#x}: {e:?}"));
        }
    }

    /// `pt_flags & ~MSHV_PT_FLAGS_MASK`, `pt_isolation >= MSHV_PT_ISOLATION_COUNT`.
    fn unknown_flags_and_isolation_are_einval(device) {
        for flags in [1 << 20, 1 << 31, 1 << 63, u64::MAX] {
            assert_eq!(create(device, flags, 0), Err(EINVAL), "flags {flags:#x}");
        }
        for isolation in [u64::from(MSHV_PT_ISOLATION_COUNT), 1 << 32, u64::MAX] {
            assert_eq!(create(device, LAPIC_FLAGS, isolation), Err(EINVAL), "isolation {isolation:#x}");
        }
    }

    fn a_bad_pointer_is_efault(device) {
        let bad = raw::forbidden_page();
        assert_eq!(raw::ioctl_value(device.fd(), raw::CREATE_PARTITION, bad), Err(EFAULT));
        assert_eq!(raw::ioctl_value(device.fd(), raw::CREATE_PARTITION, 0), Err(EFAULT), "null");
    }

    fn version_two_arguments_are_taken(device) {
        let mut args = mshv_create_partition_v2 {
            pt_flags: LAPIC_FLAGS | (1 << MSHV_PT_BIT_CPU_AND_XSAVE_FEATURES),
            pt_num_cpu_fbanks: MSHV_NUM_CPU_FEATURES_BANKS as u16,
            ..Default::default()
        };
        let attempt = |args: &mut mshv_create_partition_v2| raw::ioctl(device.fd(), raw::CREATE_PARTITION, args);
        match attempt(&mut args) {
            Err(EINVAL) => return rota_tests::requires::skip("this kernel's driver has no version-two arguments"),
            other => close(other.expect("create, version two")),
        }
        args.pt_num_cpu_fbanks = 3;
        assert_eq!(attempt(&mut args), Err(EINVAL), "more banks than there are");
        args.pt_num_cpu_fbanks = 2;
        args.pt_rsvd[5] = 1;
        assert_eq!(attempt(&mut args), Err(EINVAL), "reserved bytes");
        args.pt_rsvd[5] = 0;
        args.pt_rsvd1[1] = 1;
        assert_eq!(attempt(&mut args), Err(EINVAL), "reserved words");
    }

    /// Newer drivers let the device ask about the host's own partition, and about nothing else.
    fn the_hosts_own_properties_can_be_asked(device) {
        let code = hv_partition_property_code_HV_PARTITION_PROPERTY_PROCESSOR_FEATURES0;
        let input = hv_input_get_partition_property { property_code: code, ..Default::default() };
        let mut features = 0u64;
        let outcome = raw::hypercall(device.fd(), HVCALL_GET_PARTITION_PROPERTY, 0, bytes_of(&input), bytes_of_mut(&mut features));
        if outcome.result == Err(ENOTTY) {
            return rota_tests::requires::skip("this kernel's driver has no hypercalls on the device");
        }
        assert_eq!((outcome.result, outcome.status), (Ok(()), 0));
        assert_ne!(features, 0, "no processor has no features");

        let registers = raw::hypercall(device.fd(), HVCALL_GET_VP_REGISTERS, 1, &[0; 24], &mut [0; 16]);
        assert_eq!(registers.result, Err(EINVAL), "the host's registers are none of a client's business");
        let set = raw::hypercall(device.fd(), HVCALL_SET_PARTITION_PROPERTY, 0, &[0; 24], &mut []);
        assert_eq!(set.result, Err(EINVAL), "nor are its properties to be set");
    }

    /// `mshv_dev_fops` has neither.
    fn nothing_can_be_read_or_written(device) {
        let mut byte = 0u8;
        // SAFETY: one writable byte.
        let read = unsafe { libc::read(device.fd(), std::ptr::from_mut(&mut byte).cast(), 1) };
        assert_eq!((read, raw::last_errno()), (-1, EINVAL), "read");
        // SAFETY: one readable byte.
        let written = unsafe { libc::write(device.fd(), std::ptr::from_ref(&byte).cast(), 1) };
        assert_eq!((written, raw::last_errno()), (-1, EINVAL), "write");
    }

    fn a_duplicate_outlives_the_original_and_ends_with_its_own_close(_device) {
        let device = Device::open().expect("open");
        let duplicate = raw::high_duplicate(device.fd());
        drop(device);
        let mut args = mshv_create_partition { pt_flags: LAPIC_FLAGS, pt_isolation: 0 };
        close(raw::ioctl(duplicate, raw::CREATE_PARTITION, &mut args).expect("the duplicate lives on"));
        close(duplicate);
        assert_eq!(raw::ioctl(duplicate, raw::CREATE_PARTITION, &mut args), Err(EBADF));
    }
}
