//! Regions on a real KVM virtual machine; skipped where there is no `/dev/kvm`.

use super::*;

/// Anonymous memory of the test.
struct Pages(*mut libc::c_void, usize);

impl Pages {
    fn new(count: usize) -> Self {
        let len = count * PAGE as usize;
        // SAFETY: a new anonymous mapping.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(address, libc::MAP_FAILED);
        Self(address, len)
    }

    fn region(&self, pfn: u64, flags: u8) -> mshv_user_mem_region {
        mshv_user_mem_region {
            size: self.1 as u64,
            guest_pfn: pfn,
            userspace_addr: self.0 as u64,
            flags,
            ..Default::default()
        }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`.
        unsafe { libc::munmap(self.0, self.1) };
    }
}

fn memory(background: bool) -> Option<Memory> {
    let Ok(kvm) = kvm_ioctls::Kvm::new() else {
        rota_tests::requires::skip("no usable /dev/kvm");
        return None;
    };
    Some(Memory::new(
        Arc::new(kvm.create_vm().unwrap()),
        36,
        background,
    ))
}

fn code(result: Result<(), Errno>) -> i32 {
    result.unwrap_err().0
}

#[test]
fn bad_arguments_are_refused_as_by_the_driver() {
    let pages = Pages::new(2);
    let Some(memory) = memory(false) else { return };
    let refused = |change: fn(&mut mshv_user_mem_region)| {
        let mut args = pages.region(1, WRITABLE);
        change(&mut args);
        code(memory.set(&args, true))
    };
    assert_eq!(refused(|a| a.size = 0), libc::EINVAL);
    assert_eq!(refused(|a| a.size += 1), libc::EINVAL);
    assert_eq!(refused(|a| a.userspace_addr += 1), libc::EINVAL);
    assert_eq!(refused(|a| a.flags = 8), libc::EINVAL);
    assert_eq!(refused(|a| a.rsvd[6] = 1), libc::EINVAL);
    assert_eq!(refused(|a| a.userspace_addr = 0), libc::EINVAL);
    assert_eq!(refused(|a| a.userspace_addr = 1 << 63), libc::EINVAL);
    assert_eq!(
        code(memory.set(&pages.region(1, WRITABLE), false)),
        libc::EIO
    );
}

#[test]
fn overlap_and_a_mismatched_unmap_are_refused() {
    let (one, other) = (Pages::new(2), Pages::new(2));
    let Some(memory) = memory(false) else { return };
    memory
        .set(&one.region(0x100, WRITABLE | EXECUTABLE), true)
        .unwrap();
    assert_eq!(
        code(memory.set(&other.region(0x101, WRITABLE), true)),
        libc::EEXIST
    );
    assert_eq!(
        code(memory.set(&other.region(0xff, WRITABLE), true)),
        libc::EEXIST
    );
    memory
        .set(&one.region(0x200, WRITABLE), true)
        .expect("the same user memory twice");
    assert_eq!(
        code(memory.set(&one.region(0x300, UNMAP), true)),
        libc::EINVAL
    );
    assert_eq!(
        code(memory.set(&one.region(0x101, UNMAP), true)),
        libc::EINVAL
    );
    assert_eq!(
        code(memory.set(&other.region(0x100, UNMAP), true)),
        libc::EINVAL
    );
    memory.set(&one.region(0x100, UNMAP), true).unwrap();
    assert_eq!(memory.lookup(0x10_0000), Mapping::Unmapped);
}

#[test]
fn reads_and_writes_cross_regions_and_stop_at_holes() {
    let (one, other) = (Pages::new(1), Pages::new(1));
    let Some(memory) = memory(false) else { return };
    memory.set(&one.region(1, WRITABLE), true).unwrap();
    memory.set(&other.region(2, EXECUTABLE), true).unwrap();
    memory.write(0x1ffe, &[1, 2, 3, 4]).unwrap();
    let mut back = [0; 4];
    memory.read(0x1ffe, &mut back).unwrap();
    assert_eq!(back, [1, 2, 3, 4]);
    assert_eq!(memory.write(0x2ffe, &[0; 4]), Err(Unmapped));
    assert_eq!(memory.read(u64::MAX, &mut back), Err(Unmapped));
    assert_eq!(
        memory.lookup(0x1000),
        Mapping::Mapped {
            writable: true,
            executable: false
        }
    );
    assert_eq!(
        memory.lookup(0x2fff),
        Mapping::Mapped {
            writable: false,
            executable: true
        }
    );
}

#[test]
fn background_is_laid_before_a_vp_runs_and_follows_changes() {
    let pages = Pages::new(2);
    let Some(memory) = memory(false) else { return };
    // Too small an address space for the cost of background slots to matter, wherever this runs.
    let memory = Memory {
        background_end: Some(1 << 24),
        stale: AtomicBool::new(true),
        ..memory
    };
    memory.set(&pages.region(0x10, WRITABLE), true).unwrap();
    let mut immediate_exit = 1u8;
    let kick = Kick::new(&raw mut immediate_exit);
    drop(memory.run_guard(&kick).unwrap());
    assert_eq!(immediate_exit, 0);
    assert_eq!(memory.layout.read().unwrap().background.len(), 2);
    memory.set(&pages.region(0x10, UNMAP), true).unwrap();
    drop(memory.run_guard(&kick).unwrap());
    assert_eq!(memory.layout.read().unwrap().background.len(), 3);
    memory.set(&pages.region(0x40, WRITABLE), true).unwrap();
    drop(memory.run_guard(&kick).unwrap());
    assert_eq!(memory.layout.read().unwrap().background.len(), 4);
}

#[test]
fn writes_show_in_the_dirty_bitmap_until_cleared() {
    let pages = Pages::new(4);
    let Some(memory) = memory(false) else { return };
    memory.set(&pages.region(0x10, WRITABLE), true).unwrap();
    assert_eq!(
        memory.dirty_bitmap(0x10, 4, AccessOp::Keep),
        Err(Errno(libc::EIO))
    );
    memory.set_tracking(true).unwrap();
    assert_eq!(memory.dirty_bitmap(0x10, 4, AccessOp::Keep).unwrap(), [0]);
    memory.write(0x11_fff, &[0; 2]).unwrap();
    assert_eq!(
        memory.dirty_bitmap(0x10, 4, AccessOp::Keep).unwrap(),
        [0b0110]
    );
    assert_eq!(
        memory.dirty_bitmap(0x11, 3, AccessOp::Clear).unwrap(),
        [0b011]
    );
    assert_eq!(memory.dirty_bitmap(0x10, 4, AccessOp::Keep).unwrap(), [0]);
    assert_eq!(
        memory.dirty_bitmap(0x13, 2, AccessOp::Keep),
        Err(Errno(libc::EINVAL))
    );
    assert_eq!(
        memory.set_tracking(false),
        Err(crate::errno::HvStatus::OPERATION_DENIED)
    );
    memory.dirty_bitmap(0x10, 4, AccessOp::Set).unwrap();
    memory.set_tracking(false).unwrap();
    assert!(!memory.is_tracking());
}

#[test]
fn a_change_gets_busy_vps_out_and_they_come_back() {
    let pages = Pages::new(1);
    let Some(memory) = memory(false) else { return };
    let stop = AtomicBool::new(false);
    let kick = Arc::new(Kick::new(Box::leak(Box::new(0u8))));
    memory.add_vp(Arc::clone(&kick));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let _guard = memory.run_guard(&kick).unwrap();
                // Stands for KVM_RUN: ends early when a signal comes.
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        });
        for _ in 0..100 {
            memory.set(&pages.region(1, WRITABLE), true).unwrap();
            memory.set(&pages.region(1, UNMAP), true).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_read_only_alias_shows_shared_memory_and_refuses_private() {
    let private = Pages::new(1);
    assert!(ReadOnlyAlias::new(private.0 as u64, PAGE).is_none());
    // SAFETY: a new anonymous mapping.
    let shared = unsafe {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        libc::mmap(
            std::ptr::null_mut(),
            PAGE as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            -1,
            0,
        )
    };
    let shared = Pages(shared, PAGE as usize);
    let alias = ReadOnlyAlias::new(shared.0 as u64, PAGE).expect("an alias");
    // SAFETY: both are mapped for a page; the alias may be read.
    let seen = unsafe {
        shared.0.cast::<u8>().write_volatile(7);
        (alias.host() as *const u8).read_volatile()
    };
    assert_eq!(seen, 7);
}
