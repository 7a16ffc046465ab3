//! Page walks: every format, every right, the error codes of the manual, accessed and dirty bits, page borders.

use vcpu::emulate::{Cpu, EmulateError, Exit, Fault, Hint, Outcome, emulate};

use crate::guest::{self, CS, Guest, MMIO, RAX, RBX, SS, Seen};

/// Where the page tables are.
const ROOT: u64 = 0x1000;
/// The linear address of the tests: indices 1, 2, 3, 4 in the four levels.
const LINEAR: u64 = 1 << 39 | 2 << 30 | 3 << 21 | 4 << 12;
const DATA: u64 = 0x2_0000;
const CODE: u64 = 0x5000_0000;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;
const ACCESSED: u64 = 0x20;
const DIRTY: u64 = 0x40;
const LARGE: u64 = 0x80;
const NO_EXECUTE: u64 = 1 << 63;

/// mov al, [rbx]
const READ: &[u8] = &[0x8a, 0x03];
/// mov [rbx], al
const WRITE: &[u8] = &[0x88, 0x03];
/// or [rbx], al
const MODIFY: &[u8] = &[0x08, 0x03];

/// Entry addresses of the tables that `Guest::map` builds for [`LINEAR`], from the root on.
const ENTRIES: [u64; 4] = [
    ROOT + 8,
    ROOT + 0x1000 + 16,
    ROOT + 0x2000 + 24,
    ROOT + 0x3000 + 32,
];

/// 64-bit mode with RBX at [`LINEAR`], whose page is [`DATA`] with `flags` in the last entry.
fn mapped(flags: u64) -> (Guest, Cpu) {
    let guest = Guest::new();
    guest.map(ROOT, LINEAR, DATA, flags);
    let mut cpu = guest::long_mode(ROOT);
    cpu.gpr[RBX] = LINEAR;
    (guest, cpu)
}

fn user(cpu: &mut Cpu) {
    cpu.segments[CS].attributes |= 0x60;
    cpu.segments[SS].attributes |= 0x60;
}

fn page_fault(code: u32, cr2: u64) -> Outcome {
    Outcome::Fault(Fault {
        vector: 14,
        error_code: Some(code),
        cr2: Some(cr2),
    })
}

/// Emulates `bytes` and checks that a fault leaves the registers alone.
fn outcome(guest: &Guest, cpu: &mut Cpu, bytes: &[u8]) -> Outcome {
    let before = cpu.clone();
    let outcome = guest.emulate(cpu, bytes).unwrap();
    if let Outcome::Fault(_) = outcome {
        assert_eq!(*cpu, before);
        assert_eq!(guest.device.seen(), []);
    }
    outcome
}

#[test]
fn absent_page_reports_access_and_privilege() {
    let (guest, mut cpu) = mapped(0);
    assert_eq!(outcome(&guest, &mut cpu, READ), page_fault(0b000, LINEAR));
    assert_eq!(outcome(&guest, &mut cpu, WRITE), page_fault(0b010, LINEAR));
    assert_eq!(outcome(&guest, &mut cpu, MODIFY), page_fault(0b010, LINEAR));
    user(&mut cpu);
    assert_eq!(outcome(&guest, &mut cpu, READ), page_fault(0b100, LINEAR));
    assert_eq!(outcome(&guest, &mut cpu, WRITE), page_fault(0b110, LINEAR));
}

#[test]
fn absent_table_at_each_level() {
    for entry in ENTRIES {
        let (guest, mut cpu) = mapped(PRESENT);
        guest.write_u64(entry, 0);
        assert_eq!(outcome(&guest, &mut cpu, READ), page_fault(0, LINEAR));
    }
}

#[test]
fn read_only_page_binds_the_user_and_with_wp_the_supervisor() {
    let (guest, mut cpu) = mapped(PRESENT | USER);
    assert_eq!(outcome(&guest, &mut cpu, READ), Outcome::Retired);
    assert_eq!(outcome(&guest, &mut cpu, WRITE), page_fault(0b011, LINEAR));
    // A comparison that fails still writes.
    assert_eq!(
        outcome(&guest, &mut cpu, &[0xf0, 0x0f, 0xb0, 0x0b]),
        page_fault(0b011, LINEAR)
    );
    assert_eq!(
        outcome(&guest, &mut cpu, &[0x0f, 0xba, 0x23, 1]),
        Outcome::Retired
    ); // bt
    assert_eq!(
        outcome(&guest, &mut cpu, &[0x0f, 0xba, 0x2b, 1]),
        page_fault(0b011, LINEAR)
    ); // bts
    cpu.cr0 &= !(1 << 16);
    assert_eq!(outcome(&guest, &mut cpu, WRITE), Outcome::Retired);
    user(&mut cpu);
    assert_eq!(outcome(&guest, &mut cpu, WRITE), page_fault(0b111, LINEAR));
}

#[test]
fn rights_are_those_of_all_levels() {
    for entry in &ENTRIES[..3] {
        let (guest, mut cpu) = mapped(PRESENT | WRITABLE | USER);
        guest.write_u64(*entry, guest.read_u64(*entry) & !WRITABLE);
        assert_eq!(outcome(&guest, &mut cpu, WRITE), page_fault(0b011, LINEAR));
        guest.write_u64(*entry, guest.read_u64(*entry) & !USER);
        user(&mut cpu);
        assert_eq!(outcome(&guest, &mut cpu, READ), page_fault(0b101, LINEAR));
    }
}

#[test]
fn supervisor_page_is_closed_to_the_user() {
    let (guest, mut cpu) = mapped(PRESENT | WRITABLE);
    user(&mut cpu);
    assert_eq!(outcome(&guest, &mut cpu, READ), page_fault(0b101, LINEAR));
    assert_eq!(outcome(&guest, &mut cpu, WRITE), page_fault(0b111, LINEAR));
}

#[test]
fn smap_closes_user_pages_to_the_supervisor_unless_ac() {
    let (guest, mut cpu) = mapped(PRESENT | WRITABLE | USER);
    cpu.cr4 |= 1 << 21;
    assert_eq!(outcome(&guest, &mut cpu, READ), page_fault(0b001, LINEAR));
    assert_eq!(outcome(&guest, &mut cpu, WRITE), page_fault(0b011, LINEAR));
    cpu.rflags |= 1 << 18;
    assert_eq!(outcome(&guest, &mut cpu, WRITE), Outcome::Retired);
}

#[test]
fn reserved_bits_fault() {
    let (guest, mut cpu) = mapped(PRESENT | WRITABLE);
    guest.write_u64(ENTRIES[0], guest.read_u64(ENTRIES[0]) | LARGE);
    assert_eq!(outcome(&guest, &mut cpu, READ), page_fault(0b1001, LINEAR));
    let (guest, mut cpu) = mapped(PRESENT | WRITABLE);
    guest.write_u64(ENTRIES[2], 0x2000 | PRESENT | WRITABLE | LARGE);
    assert_eq!(outcome(&guest, &mut cpu, WRITE), page_fault(0b1011, LINEAR));
    // The no-execute bit without EFER.NXE.
    let (guest, mut cpu) = mapped(PRESENT | NO_EXECUTE);
    assert_eq!(outcome(&guest, &mut cpu, READ), Outcome::Retired);
    cpu.efer &= !(1 << 11);
    assert_eq!(outcome(&guest, &mut cpu, READ), page_fault(0b1001, LINEAR));
}

#[test]
fn accessed_and_dirty_bits() {
    let (guest, mut cpu) = mapped(PRESENT | WRITABLE);
    outcome(&guest, &mut cpu, READ);
    for entry in ENTRIES {
        assert_eq!(guest.read_u64(entry) & (ACCESSED | DIRTY), ACCESSED);
    }
    outcome(&guest, &mut cpu, WRITE);
    assert_eq!(
        guest.read_u64(ENTRIES[3]),
        DATA | PRESENT | WRITABLE | ACCESSED | DIRTY
    );
    assert_eq!(guest.read_u64(ENTRIES[2]) & DIRTY, 0);
    let (guest, mut cpu) = mapped(PRESENT);
    outcome(&guest, &mut cpu, WRITE);
    assert_eq!(
        guest.read_u64(ENTRIES[3]),
        DATA | PRESENT,
        "a fault marks nothing"
    );
}

#[test]
fn large_pages() {
    let (guest, mut cpu) = mapped(0);
    guest.write(0x5_4321, &[0x77]);
    guest.write_u64(ENTRIES[2], PRESENT | LARGE); // 2 MiB at 0
    cpu.gpr[RBX] = (LINEAR & !0x1f_ffff) + 0x5_4321;
    assert_eq!(outcome(&guest, &mut cpu, READ), Outcome::Retired);
    assert_eq!(cpu.gpr[RAX] & 0xff, 0x77);
    guest.write_u64(ENTRIES[1], 0xc000_0000 | PRESENT | LARGE); // 1 GiB with the device in it
    cpu.gpr[RBX] = (LINEAR & !0x3fff_ffff) + (MMIO - 0xc000_0000) + 5;
    assert_eq!(outcome(&guest, &mut cpu, READ), Outcome::Retired);
    assert_eq!(
        guest.device.seen(),
        [Seen::Read {
            gpa: MMIO + 5,
            len: 1
        }]
    );
}

#[test]
fn five_levels() {
    let guest = Guest::new();
    let linear = 7u64 << 48 | LINEAR;
    guest.map(ROOT, LINEAR, DATA, PRESENT | WRITABLE);
    guest.write_u64(0x8000 + 7 * 8, ROOT | PRESENT | WRITABLE);
    guest.write(DATA, &[0x42]);
    let mut cpu = guest::long_mode(0x8000);
    cpu.cr4 |= 1 << 12;
    cpu.gpr[RBX] = linear;
    assert_eq!(outcome(&guest, &mut cpu, READ), Outcome::Retired);
    assert_eq!(cpu.gpr[RAX] & 0xff, 0x42);
    cpu.gpr[RBX] = 1 << 57;
    let fault = Fault {
        vector: 13,
        error_code: Some(0),
        cr2: None,
    };
    assert_eq!(outcome(&guest, &mut cpu, READ), Outcome::Fault(fault));
}

#[test]
fn thirty_two_bit_paging() {
    let guest = Guest::new();
    let linear = 5u64 << 22 | 6 << 12 | 0x123;
    guest.write(ROOT + 5 * 4, &(0x2000u32 | 7).to_le_bytes());
    guest.write(0x2000 + 6 * 4, &(DATA as u32 | 5).to_le_bytes());
    guest.write(DATA + 0x123, &[0x99]);
    let mut cpu = guest::protected_mode();
    cpu.cr0 |= 0x8001_0000;
    cpu.cr3 = ROOT;
    cpu.gpr[RBX] = linear;
    assert_eq!(outcome(&guest, &mut cpu, READ), Outcome::Retired);
    assert_eq!(cpu.gpr[RAX], 0x99);
    assert_eq!(outcome(&guest, &mut cpu, WRITE), page_fault(0b011, linear));
    assert_eq!(
        guest.read::<4>(0x2000 + 6 * 4),
        (DATA as u32 | 5 | ACCESSED as u32).to_le_bytes()
    );
    // A page of 4 MiB, once CR4.PSE is set; bits 20 to 13 are address bits 39 to 32.
    guest.write(ROOT + 5 * 4, &(0xd000_0000u32 | 0x83).to_le_bytes());
    cpu.cr4 |= 1 << 4;
    assert_eq!(outcome(&guest, &mut cpu, READ), Outcome::Retired);
    assert_eq!(
        guest.device.seen(),
        [Seen::Read {
            gpa: MMIO + 0x6123,
            len: 1
        }]
    );
    guest.write(
        ROOT + 5 * 4,
        &(0xd000_0000u32 | 3 << 13 | 0x83).to_le_bytes(),
    );
    assert_eq!(outcome(&guest, &mut cpu, READ), Outcome::Retired);
    assert_eq!(
        guest.device.seen(),
        [Seen::Read {
            gpa: (3 << 32) + MMIO + 0x6123,
            len: 1
        }]
    );
    guest.write(ROOT + 5 * 4, &(0xd020_0000u32 | 0x83).to_le_bytes());
    assert_eq!(outcome(&guest, &mut cpu, READ), page_fault(0b1001, linear));
}

#[test]
fn pae_paging() {
    let guest = Guest::new();
    let linear = 3u64 << 30 | 5 << 21 | 6 << 12 | 0x10;
    let root = ROOT + 0x20; // aligned to 32 bytes only
    guest.write_u64(root + 3 * 8, 0x2000 | PRESENT);
    guest.write_u64(0x2000 + 5 * 8, 0x3000 | PRESENT | WRITABLE | USER);
    guest.write_u64(
        0x3000 + 6 * 8,
        MMIO | PRESENT | WRITABLE | USER | NO_EXECUTE,
    );
    let mut cpu = guest::protected_mode();
    cpu.cr0 |= 0x8001_0000;
    cpu.cr4 |= 0x20;
    cpu.efer = 0x800;
    cpu.cr3 = root;
    cpu.gpr[RBX] = linear;
    cpu.gpr[RAX] = 0x5a;
    assert_eq!(outcome(&guest, &mut cpu, WRITE), Outcome::Retired);
    assert_eq!(
        guest.device.seen(),
        [Seen::Write {
            gpa: MMIO + 0x10,
            data: vec![0x5a]
        }]
    );
    assert_eq!(
        guest.read_u64(root + 3 * 8),
        0x2000 | PRESENT,
        "the first level has no accessed bit"
    );
    cpu.efer = 0;
    assert_eq!(outcome(&guest, &mut cpu, READ), page_fault(0b1001, linear));
}

#[test]
fn code_is_fetched_where_the_intercept_brought_none() {
    let (guest, mut cpu) = mapped(PRESENT | WRITABLE);
    guest.write(DATA, &[0xee]);
    guest.map(ROOT + 0x8000, CODE, 0x3_0000, PRESENT);
    guest.write_u64(ROOT, guest.read_u64(ROOT + 0x8000));
    guest.write(0x3_0ffe, READ);
    cpu.rip = CODE + 0xffe;
    for known in 0..=2 {
        cpu.rip = CODE + 0xffe;
        assert_eq!(outcome(&guest, &mut cpu, &READ[..known]), Outcome::Retired);
        assert_eq!((cpu.gpr[RAX], cpu.rip), (0xee, CODE + 0x1000));
    }
    // Across a page border: mov al, [rbx + disp32] with the displacement on the absent page.
    guest.write(0x3_0ffe, &[0x8a, 0x83]);
    cpu.rip = CODE + 0xffe;
    assert_eq!(
        outcome(&guest, &mut cpu, &[]),
        page_fault(0b1_0000, CODE + 0x1000)
    );
}

#[test]
fn fetch_faults_name_the_fetch() {
    let (guest, mut cpu) = mapped(PRESENT | USER | NO_EXECUTE);
    cpu.rip = LINEAR;
    assert_eq!(outcome(&guest, &mut cpu, &[]), page_fault(0b1_0001, LINEAR));
    guest.write_u64(ENTRIES[3], DATA | PRESENT | USER);
    guest.write(DATA, READ);
    assert_eq!(outcome(&guest, &mut cpu, &[]), Outcome::Retired);
    cpu.rip = LINEAR;
    cpu.cr4 |= 1 << 20; // SMEP
    assert_eq!(outcome(&guest, &mut cpu, &[]), page_fault(0b1_0001, LINEAR));
    // Neither NXE nor SMEP: no fetch bit.
    cpu.cr4 &= !(1 << 20);
    cpu.efer &= !(1 << 11);
    guest.write_u64(ENTRIES[3], 0);
    assert_eq!(outcome(&guest, &mut cpu, &[]), page_fault(0, LINEAR));
}

#[test]
fn a_second_page_faults_before_the_first_is_touched() {
    let (guest, mut cpu) = mapped(PRESENT | WRITABLE);
    cpu.gpr[RBX] = LINEAR + 0xffd;
    cpu.gpr[RAX] = u64::MAX;
    guest.write(DATA + 0xffd, &[1, 2, 3]);
    let fault = page_fault(0b010, LINEAR + 0x1000);
    assert_eq!(outcome(&guest, &mut cpu, &[0x48, 0x89, 0x03]), fault);
    assert_eq!(outcome(&guest, &mut cpu, &[0xf0, 0x48, 0x01, 0x03]), fault);
    assert_eq!(guest.read::<3>(DATA + 0xffd), [1, 2, 3]);
}

#[test]
fn an_access_splits_between_memory_and_device() {
    let (guest, mut cpu) = mapped(PRESENT | WRITABLE);
    guest.map(ROOT, LINEAR + 0x1000, MMIO, PRESENT | WRITABLE);
    cpu.gpr[RBX] = LINEAR + 0xffd;
    cpu.gpr[RAX] = 0x8877_6655_4433_2211;
    assert_eq!(
        outcome(&guest, &mut cpu, &[0x48, 0x89, 0x03]),
        Outcome::Retired
    );
    assert_eq!(guest.read::<3>(DATA + 0xffd), [0x11, 0x22, 0x33]);
    assert_eq!(
        guest.device.seen(),
        [Seen::Write {
            gpa: MMIO,
            data: vec![0x44, 0x55, 0x66, 0x77, 0x88]
        }]
    );
}

#[test]
fn a_hint_replaces_the_walk_for_its_page_only() {
    let guest = Guest::new(); // no page tables at all
    let mut cpu = guest::long_mode(ROOT);
    cpu.gpr[RBX] = LINEAR + 0x10;
    let with = |cpu: &mut Cpu, write, bytes| {
        let hint = Some(Hint {
            gva: LINEAR + 0x18,
            gpa: MMIO + 0x18,
            write,
        });
        emulate(
            cpu,
            &guest.memory,
            &guest.device,
            Exit::new(bytes).with_hint(hint),
        )
        .unwrap()
    };
    assert_eq!(with(&mut cpu, false, READ), Outcome::Retired);
    assert_eq!(
        guest.device.seen(),
        [Seen::Read {
            gpa: MMIO + 0x10,
            len: 1
        }]
    );
    assert_eq!(with(&mut cpu, true, MODIFY), Outcome::Retired);
    assert_eq!(guest.device.seen().len(), 2);
    // The translation of a read says nothing about writes.
    assert_eq!(
        with(&mut cpu, false, WRITE),
        page_fault(0b010, LINEAR + 0x10)
    );
    cpu.gpr[RBX] = LINEAR + 0x1000;
    assert_eq!(with(&mut cpu, true, READ), page_fault(0, LINEAR + 0x1000));
}

#[test]
fn page_tables_outside_memory_end_the_emulation() {
    let guest = Guest::new();
    let mut cpu = guest::long_mode(MMIO);
    cpu.gpr[RBX] = LINEAR;
    let error = guest.emulate(&mut cpu, READ).unwrap_err();
    assert!(
        matches!(error, EmulateError::PageTableOutsideMemory { gpa, linear: LINEAR } if gpa == MMIO + 8)
    );
}

#[test]
fn code_outside_memory_ends_the_emulation() {
    let guest = Guest::new();
    let mut cpu = guest::protected_mode();
    cpu.rip = MMIO;
    let error = guest.emulate(&mut cpu, &[]).unwrap_err();
    assert!(matches!(
        error,
        EmulateError::CodeOutsideMemory { gpa: MMIO, .. }
    ));
}
