//! Guest memory: mapping, unmapping, overlap rules (`mshv_partition_ioctl_set_memory`), the access bitmap.

use mshv_bindings::*;
use rota_tests::guest::{Guest, ROM, UNMAPPED};
use rota_tests::payload::{self, code};
use rota_tests::raw::{self, Errno};
use rota_tests::reg::{self, segment};
use rota_tests::vm::{Device, EFAULT, EINVAL, Memory, Partition, READ_EXECUTE, READ_WRITE_EXECUTE};
use rota_tests::{on_mshv, requires};

const EEXIST: Errno = Errno(libc::EEXIST);
const UNMAP: u8 = 1 << MSHV_SET_MEM_BIT_UNMAP;

fn setup(device: &Device) -> (Partition, Memory) {
    (device.partition(), Memory::new(0x1_0000))
}

/// Asks for a bitmap into bytes that are not zero before.
fn bitmap(partition: &Partition, operation: u32, base: u64, pages: u64) -> Vec<u8> {
    let mut bits = vec![0xAAu8; pages.div_ceil(8) as usize];
    let mut args = mshv_gpap_access_bitmap {
        access_type: MSHV_GPAP_ACCESS_TYPE_DIRTY as u8,
        access_op: operation as u8,
        page_count: pages,
        gpap_base: base,
        bitmap_ptr: bits.as_mut_ptr() as u64,
        ..Default::default()
    };
    raw::ioctl(partition.fd(), raw::GET_GPAP_ACCESS_BITMAP, &mut args)
        .expect("MSHV_GET_GPAP_ACCESS_BITMAP");
    bits
}

fn track(partition: &Partition) {
    let code = hv_partition_property_code_HV_PARTITION_PROPERTY_GPA_PAGE_ACCESS_TRACKING;
    assert_eq!(
        partition.set_property(code, 1).result,
        Ok(()),
        "page access tracking"
    );
}

on_mshv! {
    fn a_region_maps_and_unmaps(device) {
        let (partition, memory) = setup(device);
        partition.map(&memory, 0x10_0000, READ_WRITE_EXECUTE).expect("map");
        partition.unmap(&memory, 0x10_0000).expect("unmap");
        partition.map(&memory, 0x20_0000, READ_EXECUTE).expect("elsewhere, read-only");
        partition.unmap(&memory, 0x20_0000).expect("unmap");
        partition.map(&memory, 0x1_4000_0000, READ_WRITE_EXECUTE).expect("above 4 GiB");
    }

    fn sizes_addresses_and_flags_are_checked(device) {
        let (partition, memory) = setup(device);
        let good = memory.region(0, READ_WRITE_EXECUTE);
        for (what, region) in [
            ("size zero", mshv_user_mem_region { size: 0, ..good }),
            ("size not of pages", mshv_user_mem_region { size: 0x1800, ..good }),
            ("address not of a page", mshv_user_mem_region { userspace_addr: good.userspace_addr + 8, size: 0x1000, ..good }),
            ("an unknown flag", mshv_user_mem_region { flags: 1 << MSHV_SET_MEM_BIT_COUNT, ..good }),
            ("all flags", mshv_user_mem_region { flags: 0xFF, ..good }),
            ("a reserved byte", mshv_user_mem_region { rsvd: [0, 0, 0, 0, 0, 0, 1], ..good }),
            ("a kernel address", mshv_user_mem_region { userspace_addr: 0xFFFF_8000_0000_0000, ..good }),
            ("an address where nothing is", mshv_user_mem_region { userspace_addr: 0x1000, size: 0x1000, ..good }),
        ] {
            assert_eq!(partition.set_memory(region), Err(EINVAL), "{what}");
        }
        partition.set_memory(good).expect("the good one, after all that");
    }

    /// `mshv_partition_create_region` compares the ranges.
    fn overlap_in_gpa_is_eexist(device) {
        let (partition, memory) = setup(device);
        let other = Memory::new(0x1_0000);
        partition.map(&memory, 0x10_0000, READ_WRITE_EXECUTE).expect("map");
        for (what, gpa) in [("the same GPA", 0x10_0000), ("begins inside", 0x10_F000), ("ends inside", 0xF_1000)] {
            assert_eq!(partition.map(&other, gpa, READ_WRITE_EXECUTE), Err(EEXIST), "{what}");
        }
        partition.map(&other, 0x11_0000, READ_WRITE_EXECUTE).expect("right behind it");
    }

    /// Drivers before Linux 6.18 refuse it; a client with a ROM below 1 MiB and below 4 GiB needs it.
    fn the_same_user_memory_twice_is_allowed_or_eexist(device) {
        let (partition, memory) = setup(device);
        partition.map(&memory, 0x10_0000, READ_WRITE_EXECUTE).expect("map");
        let inside = mshv_user_mem_region {
            userspace_addr: memory.region(0, 0).userspace_addr + 0x4000,
            size: 0x1000,
            ..memory.region(0x30_0000, READ_WRITE_EXECUTE)
        };
        for region in [memory.region(0x20_0000, READ_WRITE_EXECUTE), inside] {
            match partition.set_memory(region) {
                Ok(()) => {
                    let unmap = mshv_user_mem_region { flags: UNMAP, ..region };
                    partition.set_memory(unmap).expect("unmap one of the two");
                }
                refused => assert_eq!(refused, Err(EEXIST)),
            }
        }
        partition.unmap(&memory, 0x10_0000).expect("the first is still there");
    }

    fn an_unmap_must_match_its_map(device) {
        let (partition, memory) = setup(device);
        assert_eq!(partition.unmap(&memory, 0x10_0000), Err(EINVAL), "nothing there");
        partition.map(&memory, 0x10_0000, READ_WRITE_EXECUTE).expect("map");
        let region = memory.region(0x10_0000, UNMAP);
        for (what, region) in [
            ("half of it", mshv_user_mem_region { size: 0x8000, ..region }),
            ("a page inside", mshv_user_mem_region { guest_pfn: 0x101, size: 0x1000, ..region }),
            ("another address", mshv_user_mem_region { userspace_addr: region.userspace_addr + 0x1000, ..region }),
        ] {
            assert_eq!(partition.set_memory(region), Err(EINVAL), "{what}");
        }
        // "If unmap is set, ignore other bits."
        let with_others = mshv_user_mem_region { flags: UNMAP | READ_WRITE_EXECUTE, ..region };
        partition.set_memory(with_others).expect("unmap with the other bits set");
        assert_eq!(partition.unmap(&memory, 0x10_0000), Err(EINVAL), "a second time");
    }

    fn the_same_place_can_be_mapped_again(device) {
        let guest = Guest::real_mode(device, &code(&[&payload::LOAD_AL, &payload::DONE, &payload::LOAD_AL, &payload::DONE]));
        let (first, second) = (Memory::new(0x1000), Memory::new(0x1000));
        first.write(0, &[0x11]);
        second.write(0, &[0x22]);
        guest.vp.set(&[(reg::DS, segment(0xD000, UNMAPPED, 0xFFFF, 0x93))]);
        guest.vp.set64(&[(reg::RBX, 0)]);
        guest.partition.map(&first, UNMAPPED, READ_WRITE_EXECUTE).expect("map");
        guest.expect_done();
        assert_eq!(guest.vp.get64(reg::RAX) & 0xFF, 0x11);
        guest.partition.unmap(&first, UNMAPPED).expect("unmap");
        guest.partition.map(&second, UNMAPPED, READ_WRITE_EXECUTE).expect("map again");
        guest.expect_done();
        assert_eq!(guest.vp.get64(reg::RAX) & 0xFF, 0x22, "the guest sees the new memory");
    }

    fn after_an_unmap_the_guest_faults(device) {
        let guest = Guest::real_mode(device, &code(&[&payload::LOAD_AL, &payload::DONE, &payload::LOAD_AL, &payload::DONE]));
        let memory = Memory::new(0x1000);
        guest.vp.set(&[(reg::DS, segment(0xD000, UNMAPPED, 0xFFFF, 0x93))]);
        guest.vp.set64(&[(reg::RBX, 0)]);
        guest.partition.map(&memory, UNMAPPED, READ_WRITE_EXECUTE).expect("map");
        guest.expect_done();
        guest.partition.unmap(&memory, UNMAPPED).expect("unmap");
        let access = guest.run_to_memory();
        assert_eq!((access.unmapped, access.gpa), (true, UNMAPPED));
    }

    fn both_sides_see_each_others_writes(device) {
        let program = code(&[&payload::LOAD_AX, &payload::INC_BX, &payload::INC_BX, &payload::STORE_AX, &payload::DONE]);
        let guest = Guest::real_mode(device, &program);
        guest.ram.write(0x3000, &[0x34, 0x12]);
        guest.vp.set64(&[(reg::RBX, 0x3000)]);
        guest.expect_done();
        assert_eq!(guest.ram.read(0x3002, 2), [0x34, 0x12]);
    }

    /// A read-only region: loads run without a word, stores are intercepted and do not happen.
    fn a_store_to_read_only_memory_is_a_gpa_intercept(device) {
        let guest = Guest::real_mode(device, &code(&[&payload::LOAD_AL, &payload::MARK_1, &payload::STORE_AX, &payload::DONE]));
        let rom = Memory::new(0x1000);
        rom.write(0, &[0x5A, 0x5B]);
        guest.partition.map(&rom, ROM, READ_EXECUTE).expect("map read-only");
        guest.vp.set(&[(reg::DS, segment(0xC000, ROM, 0xFFFF, 0x93))]);
        guest.vp.set64(&[(reg::RBX, 0), (reg::RAX, 0)]);
        guest.expect_mark(0xF1);
        assert_eq!(guest.vp.get64(reg::RAX), 0x5A);
        let access = guest.run_to_memory();
        assert!(!access.unmapped, "HVMSG_GPA_INTERCEPT, not UNMAPPED_GPA: {access:x?}");
        assert_eq!((access.gpa, access.header.access, access.header.rip), (ROM, 1, 0x1004));
        assert_eq!(rom.read(0, 2), [0x5A, 0x5B], "the store has not happened");
        guest.resume_at(access.header.rip + 2);
        guest.expect_done();
        assert_eq!(rom.read(0, 2), [0x5A, 0x5B], "and did not happen later");
    }

    fn code_runs_from_read_only_memory(device) {
        let guest = Guest::real_mode(device, &payload::jmp_far(0xC000));
        let rom = Memory::new(0x1000);
        rom.write(0, &payload::DONE);
        guest.partition.map(&rom, ROM, READ_EXECUTE).expect("map read-only");
        let port = guest.run_to_port();
        assert_eq!((port.port, port.header.cs_base, port.header.rip), (payload::DONE_PORT, ROM, 0));
    }

    fn bitmap_arguments_are_checked(device) {
        let guest = Guest::reset(device, &payload::DONE);
        track(&guest.partition);
        let fd = guest.partition.fd();
        let mut bits = [0u8; 16];
        let good = mshv_gpap_access_bitmap {
            access_type: MSHV_GPAP_ACCESS_TYPE_DIRTY as u8,
            page_count: 16,
            bitmap_ptr: bits.as_mut_ptr() as u64,
            ..Default::default()
        };
        for (what, mut args) in [
            ("a type that is none", mshv_gpap_access_bitmap { access_type: MSHV_GPAP_ACCESS_TYPE_COUNT as u8, ..good }),
            ("an operation that is none", mshv_gpap_access_bitmap { access_op: MSHV_GPAP_ACCESS_OP_COUNT as u8, ..good }),
            ("a reserved byte", mshv_gpap_access_bitmap { rsvd: [0, 0, 0, 0, 0, 1], ..good }),
            ("no pages", mshv_gpap_access_bitmap { page_count: 0, ..good }),
            ("no bitmap", mshv_gpap_access_bitmap { bitmap_ptr: 0, ..good }),
        ] {
            assert_eq!(raw::ioctl(fd, raw::GET_GPAP_ACCESS_BITMAP, &mut args), Err(EINVAL), "{what}");
        }
        let mut bad = mshv_gpap_access_bitmap { bitmap_ptr: raw::forbidden_page(), ..good };
        assert_eq!(raw::ioctl(fd, raw::GET_GPAP_ACCESS_BITMAP, &mut bad), Err(EFAULT), "a bitmap nobody can write");
    }

    /// Pages 0x20 and 0x23 are written, 0x21 is read, 0x22 left alone; the client moves DS between the accesses. The guest has read
    /// all four before, and run its code: nothing is touched for the first time while writes are counted.
    fn the_dirty_bitmap_shows_what_the_guest_wrote(device) {
        let program = code(&[
            &payload::LOAD_AL, &payload::MARK_1, &payload::LOAD_AL, &payload::MARK_1, &payload::LOAD_AL, &payload::MARK_1,
            &payload::LOAD_AL, &payload::DONE,
            &payload::STORE_AL, &payload::MARK_1, &payload::STORE_AL, &payload::MARK_1, &payload::LOAD_AL, &payload::DONE,
            &payload::STORE_AL, &payload::DONE,
        ]);
        let guest = Guest::real_mode(device, &program);
        track(&guest.partition);
        let dirty = || bitmap(&guest.partition, MSHV_GPAP_ACCESS_OP_CLEAR, 0x20, 4);
        let data = |gpa: u64| guest.vp.set(&[(reg::DS, segment((gpa >> 4) as u16, gpa, 0xFFFF, 0x93))]);
        guest.vp.set64(&[(reg::RBX, 0x10)]);
        for page in [0x2_0000, 0x2_1000, 0x2_2000] {
            data(page);
            guest.expect_mark(0xF1);
        }
        data(0x2_3000);
        guest.expect_done();
        let _ = dirty();
        assert_eq!(dirty(), [0], "cleared, and the guest has not run");

        data(0x2_0000);
        guest.expect_mark(0xF1);
        data(0x2_3000);
        guest.expect_mark(0xF1);
        data(0x2_1000);
        guest.expect_done();
        assert_eq!(dirty(), [0b1001], "pages 0 and 3 of four; the unused bits are zero");
        assert_eq!(dirty(), [0], "reading with CLEAR cleared them");

        guest.expect_done();
        assert_eq!(dirty(), [0b0010], "a page written after a clear shows again");
    }

    /// A read is no write, also when it is the first touch of the page.
    fn a_first_read_leaves_a_page_clean(device) {
        let guest = Guest::real_mode(device, &code(&[&payload::LOAD_AL, &payload::DONE]));
        track(&guest.partition);
        let dirty = || bitmap(&guest.partition, MSHV_GPAP_ACCESS_OP_CLEAR, 0, 0x40);
        let _ = dirty();
        guest.vp.set64(&[(reg::RBX, 0x4000)]);
        guest.expect_done();
        let bits = dirty();
        let set: Vec<usize> = (0..0x40).filter(|i| bits[i / 8] & (1 << (i % 8)) != 0).collect();
        if !set.is_empty() && requires::amd_kvm() {
            return requires::skip("KVM maps a page that is read for the first time as if it were written");
        }
        assert_eq!(set, Vec::<usize>::new());
    }

    fn a_long_bitmap_puts_the_right_bit_in_the_right_byte(device) {
        let guest = Guest::real_mode(device, &code(&[&payload::STORE_AL, &payload::DONE]));
        track(&guest.partition);
        // From page 2 on: not the page of the code.
        let dirty = || bitmap(&guest.partition, MSHV_GPAP_ACCESS_OP_CLEAR, 2, 0x7D);
        let _ = dirty();
        guest.vp.set(&[(reg::DS, segment(0x7A00, 0x7_A000, 0xFFFF, 0x93))]);
        guest.vp.set64(&[(reg::RBX, 0)]);
        guest.expect_done();
        let bits = dirty();
        let set: Vec<usize> = (0..128).filter(|i| bits[i / 8] & (1 << (i % 8)) != 0).collect();
        assert_eq!(set, [0x78]);
    }

    fn set_marks_every_page(device) {
        let guest = Guest::reset(device, &payload::DONE);
        track(&guest.partition);
        let _ = bitmap(&guest.partition, MSHV_GPAP_ACCESS_OP_CLEAR, 0x20, 12);
        let _ = bitmap(&guest.partition, MSHV_GPAP_ACCESS_OP_SET, 0x20, 12);
        assert_eq!(bitmap(&guest.partition, MSHV_GPAP_ACCESS_OP_CLEAR, 0x20, 12), [0xFF, 0x0F]);
        assert_eq!(bitmap(&guest.partition, MSHV_GPAP_ACCESS_OP_CLEAR, 0x20, 12), [0, 0]);
    }
}
