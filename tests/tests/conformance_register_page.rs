//! The register page: what a stopped VP shows there, and what of it the next run takes (`hv_vp_register_page`).
//!
//! A hypervisor may have none: then `mmap` says `ENODEV` and these tests say so.

use mshv_bindings::*;
use rota_tests::guest::{CODE, Guest, UNMAPPED};
use rota_tests::payload::{self, code};
use rota_tests::reg::{self, segment};
use rota_tests::vm::{Device, Page};
use rota_tests::{on_mshv, require, requires};

/// The view of the mapped page.
struct View(Page);

impl View {
    fn of(guest: &Guest) -> View {
        View(
            guest
                .vp
                .map_page(i64::from(MSHV_VP_MMAP_OFFSET_REGISTERS))
                .expect("mmap of the register page"),
        )
    }

    fn read(&self) -> hv_vp_register_page {
        // SAFETY: a page mapped and kept by this value, larger than the structure; the VP is stopped while tests look.
        unsafe { self.0.0.cast::<hv_vp_register_page>().read_volatile() }
    }

    /// Changes the page as a VMM does: the fields, and nothing else of it.
    fn update(&self, change: impl FnOnce(&mut hv_vp_register_page)) {
        // SAFETY: as in `read`; the page is writable and nobody else looks at it while the VP is stopped.
        unsafe { change(&mut *self.0.0.cast::<hv_vp_register_page>()) }
    }

    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8…R15, as the structure orders them.
    fn general(&self) -> [u64; 16] {
        let page = self.read();
        // SAFETY: every bit pattern is a number.
        unsafe {
            page.__bindgen_anon_1
                .__bindgen_anon_1
                .__bindgen_anon_1
                .gp_registers
        }
    }

    fn rip(&self) -> u64 {
        // SAFETY: every bit pattern is a number.
        unsafe { self.read().__bindgen_anon_1.__bindgen_anon_1.rip }
    }

    fn rflags(&self) -> u64 {
        // SAFETY: every bit pattern is a number.
        unsafe { self.read().__bindgen_anon_1.__bindgen_anon_1.rflags }
    }
}

const GENERAL: u32 = 1 << HV_X64_REGISTER_CLASS_GENERAL;
const IP: u32 = 1 << HV_X64_REGISTER_CLASS_IP;
const SEGMENTS: u32 = 1 << HV_X64_REGISTER_CLASS_SEGMENT;
const FLAGS: u32 = 1 << HV_X64_REGISTER_CLASS_FLAGS;

fn set_general(page: &mut hv_vp_register_page, index: usize, value: u64) {
    // SAFETY: every bit pattern is a number.
    unsafe {
        page.__bindgen_anon_1
            .__bindgen_anon_1
            .__bindgen_anon_1
            .gp_registers[index] = value;
    };
}

fn set_rip(page: &mut hv_vp_register_page, value: u64) {
    page.__bindgen_anon_1.__bindgen_anon_1.rip = value;
}

fn stopped_at_a_mark(device: &Device, rest: &[u8]) -> Guest {
    let guest = Guest::real_mode(device, &code(&[&payload::MARK_1, rest, &payload::DONE]));
    let general: Vec<(u32, u64)> = (reg::RAX..=reg::R15)
        .filter(|n| *n != reg::RSP)
        .map(|n| (n, 0x1_0000 + u64::from(n & 0xF)))
        .collect();
    guest.vp.set64(&general);
    assert_eq!(guest.run_to_port().port, 0xF1);
    guest
}

on_mshv! {
    /// The crate `mshv-ioctls` has a test that looks at the page before the first run.
    fn a_new_vp_shows_its_registers(device) {
        let guest = Guest::real_mode(device, &payload::DONE);
        require!(requires::register_page(&guest));
        let view = View::of(&guest);
        let page = view.read();
        assert_eq!((u32::from(page.version), page.isvalid, page.dirty), (HV_VP_REGISTER_PAGE_VERSION_1, 1, 0));
        assert_eq!(view.rip(), guest.vp.get64(reg::RIP));
    }

    fn a_stopped_vp_shows_its_registers(device) {
        let guest = stopped_at_a_mark(device, &[]);
        require!(requires::register_page(&guest));
        let view = View::of(&guest);
        let page = view.read();
        assert_eq!((u32::from(page.version), page.isvalid, page.dirty), (HV_VP_REGISTER_PAGE_VERSION_1, 1, 0));
        let names: Vec<u32> = (reg::RAX..=reg::R15).collect();
        // SAFETY: every bit pattern is a number.
        let registers: Vec<u64> = guest.vp.get(&names).iter().map(|value| unsafe { value.reg64 }).collect();
        assert_eq!(view.general().as_slice(), registers);
        assert_eq!(view.rip(), CODE);
        assert_eq!(view.rflags(), guest.vp.get64(reg::RFLAGS));
        for (what, shown, name) in [
            ("CR0", page.cr0, reg::CR0), ("CR3", page.cr3, reg::CR3), ("CR4", page.cr4, reg::CR4), ("CR8", page.cr8, reg::CR8),
            ("EFER", page.efer, reg::EFER), ("DR7", page.dr7, reg::DR7),
        ] {
            assert_eq!(shown, guest.vp.get64(name), "{what}");
        }
    }

    fn segments_are_shown(device) {
        let guest = Guest::real_mode(device, &payload::DONE);
        require!(requires::register_page(&guest));
        guest.vp.set(&[(reg::DS, segment(0x300, 0x3000, 0xFFFF, 0x93)), (reg::FS, segment(0x500, 0x5000, 0xFFFF, 0x93))]);
        let _ = guest.run_to_port();
        let page = View::of(&guest).read();
        // SAFETY: every bit pattern is a segment.
        let shown = unsafe { page.__bindgen_anon_3.__bindgen_anon_1 };
        assert_eq!(({ shown.cs.selector }, { shown.cs.base }), (0, 0));
        assert_eq!(({ shown.ds.selector }, { shown.ds.base }), (0x300, 0x3000));
        assert_eq!(({ shown.fs.selector }, { shown.fs.base }), (0x500, 0x5000));
        assert_eq!({ shown.gs.limit }, 0xFFFF_FFFF);
    }

    fn what_is_marked_dirty_is_taken(device) {
        let guest = stopped_at_a_mark(device, &payload::MARK_2);
        require!(requires::register_page(&guest));
        let view = View::of(&guest);
        view.update(|page| {
            set_general(page, 0, 0x77);
            set_general(page, 3, 0x88);
            set_rip(page, CODE + 2);
            page.dirty = GENERAL | IP;
        });
        let exit = guest.run_to_port();
        assert_eq!((exit.port, exit.header.rip, exit.rax), (0xF2, CODE + 2, 0x77));
        assert_eq!((guest.vp.get64(reg::RAX), guest.vp.get64(reg::RBX)), (0x77, 0x88));
        assert_eq!(view.general()[3], 0x88);
        assert_eq!({ view.read().dirty }, 0, "taken once: the next stop shows a clean page");
    }

    fn what_is_not_marked_dirty_is_not_taken(device) {
        let guest = stopped_at_a_mark(device, &payload::MARK_2);
        require!(requires::register_page(&guest));
        let view = View::of(&guest);
        let before = view.general()[3];
        view.update(|page| {
            set_general(page, 3, 0x9999);
            set_rip(page, CODE + 2);
            page.dirty = IP;
        });
        let exit = guest.run_to_port();
        assert_eq!((exit.port, exit.header.rip), (0xF2, CODE + 2), "RIP was marked");
        assert_eq!(guest.vp.get64(reg::RBX), before, "RBX was not");
        assert_eq!(view.general()[3], before, "and the page tells the truth again");
    }

    fn flags_have_their_own_bit(device) {
        let guest = stopped_at_a_mark(device, &payload::MARK_2);
        require!(requires::register_page(&guest));
        let view = View::of(&guest);
        view.update(|page| {
            page.__bindgen_anon_1.__bindgen_anon_1.rflags = 0x8D7;
            set_rip(page, CODE + 2);
            page.dirty = IP | FLAGS;
        });
        let exit = guest.run_to_port();
        assert_eq!((exit.port, exit.header.rflags & 0xFD7), (0xF2, 0x8D7));
    }

    /// XMM0 to XMM5 are on the page too: shown, or taken when marked.
    fn xmm_registers_have_their_own_bit(device) {
        require!(requires::sse(device));
        let program = code(&[&payload::MARK_1, &payload::MOVD_EAX_XMM0, &payload::MARK_2, &payload::MOVD_EAX_XMM0, &payload::DONE]);
        let guest = Guest::long_mode(device, &program);
        require!(requires::register_page(&guest));
        guest.vp.set64(&[(reg::CR4, 0x220)]);
        guest.expect_mark(0xF1);
        let view = View::of(&guest);
        let put = |value: u64, dirty: u32| view.update(|page| {
            page.__bindgen_anon_2.__bindgen_anon_1.xmm0.low_part = value;
            page.dirty |= dirty;
        });
        put(0xABCD, 1 << HV_X64_REGISTER_CLASS_XMM);
        guest.expect_mark(0xF2);
        assert_eq!(guest.vp.get64(reg::RAX), 0xABCD);
        put(0xEF01, 0);
        guest.expect_done();
        assert_eq!(guest.vp.get64(reg::RAX), 0xABCD, "not marked, not taken");
    }

    fn segments_have_their_own_bit(device) {
        // mov al, [bx] through DS, which the client moves to 0x3000 by the page.
        let guest = stopped_at_a_mark(device, &payload::LOAD_AL);
        require!(requires::register_page(&guest));
        guest.ram.write(0x3004, &[0x5C]);
        let view = View::of(&guest);
        view.update(|page| {
            // SAFETY: every bit pattern is a segment.
            let mut segments = unsafe { page.__bindgen_anon_3.__bindgen_anon_1 };
            segments.ds.selector = 0x300;
            segments.ds.base = 0x3000;
            page.__bindgen_anon_3.__bindgen_anon_1 = segments;
            set_general(page, 3, 4);
            set_rip(page, CODE + 2);
            page.dirty = GENERAL | IP | SEGMENTS;
        });
        assert_eq!(guest.run_to_port().rax & 0xFF, 0x5C);
    }

    /// An MMIO load finished through the page alone: the path of one ioctl per exit.
    fn a_load_is_completed_with_the_page_alone(device) {
        let guest = Guest::real_mode(device, &code(&[&payload::LOAD_AX, &payload::LOAD_AX, &payload::DONE]));
        require!(requires::register_page(&guest));
        guest.vp.set(&[(reg::DS, segment(0xD000, UNMAPPED, 0xFFFF, 0x93))]);
        guest.vp.set64(&[(reg::RAX, 0), (reg::RBX, 0)]);
        let view = View::of(&guest);
        for value in [0x1111, 0x2222] {
            let access = guest.run_to_memory();
            assert_eq!(view.rip(), access.header.rip);
            view.update(|page| {
                set_general(page, 0, value);
                set_rip(page, access.header.rip + 2);
                page.dirty = GENERAL | IP;
            });
        }
        let exit = guest.run_to_port();
        assert_eq!((exit.port, exit.rax), (payload::DONE_PORT, 0x2222));
    }

    /// After a register is set by hypercall the page either shows it or says that it is not valid; it does not lie.
    fn a_hypercall_between_leaves_no_stale_page(device) {
        let guest = stopped_at_a_mark(device, &payload::MARK_2);
        require!(requires::register_page(&guest));
        let view = View::of(&guest);
        guest.vp.set64(&[(reg::RBX, 0x4321), (reg::RIP, CODE + 2)]);
        let page = view.read();
        assert!(page.isvalid == 0 || (view.general()[3] == 0x4321 && view.rip() == CODE + 2), "stale: {:x?}", view.general());
        let exit = guest.run_to_port();
        assert_eq!((exit.port, exit.header.rip), (0xF2, CODE + 2));
        assert_eq!(view.general()[3], 0x4321);
    }

    /// Setting one register by hypercall does not throw away what the client wrote to the page and marked.
    fn an_unrelated_hypercall_keeps_the_pages_changes(device) {
        let guest = stopped_at_a_mark(device, &payload::MARK_2);
        require!(requires::register_page(&guest));
        let view = View::of(&guest);
        view.update(|page| {
            set_general(page, 3, 0x5151);
            set_rip(page, CODE + 2);
            page.dirty = GENERAL | IP;
        });
        guest.vp.set64(&[(reg::CR2, 0x1000)]);
        let exit = guest.run_to_port();
        assert_eq!((exit.port, exit.header.rip), (0xF2, CODE + 2), "an unrelated hypercall does not lose the page's changes");
        assert_eq!(guest.vp.get64(reg::RBX), 0x5151);
    }

    fn it_may_be_mapped_twice_and_outlives_the_descriptor(device) {
        let guest = stopped_at_a_mark(device, &[]);
        require!(requires::register_page(&guest));
        let (first, second) = (View::of(&guest), View::of(&guest));
        assert_eq!(first.general(), second.general());
        let Guest { vp, partition, ram } = guest;
        drop(vp);
        assert_eq!(first.rip(), CODE, "the mapping keeps the VP's file");
        drop((first, second, partition, ram));
    }

    fn each_vp_has_its_own(device) {
        let guest = stopped_at_a_mark(device, &[]);
        require!(requires::register_page(&guest));
        let second = guest.partition.create_vp(1).expect("VP 1");
        let page = second.map_page(0).expect("its register page");
        assert_ne!(page.0, View::of(&guest).0.0);
        let before = View::of(&guest).general();
        second.set64(&[(reg::RBX, 0x7777)]);
        assert_eq!(View::of(&guest).general(), before);
    }
}
