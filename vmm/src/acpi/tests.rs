//! The tables as a guest reads them: found from the RSDP, checked, parsed.

use super::*;

/// What a guest finds when it follows the pointers from the RSDP.
struct Found {
    fadt: Vec<u8>,
    madt: Vec<u8>,
    mcfg: Vec<u8>,
    dsdt: Vec<u8>,
}

fn dword(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn qword(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// The table at a guest physical address, with its signature, length and checksum verified.
fn table(tables: &AcpiTables, address: u64, signature: &[u8; 4]) -> Vec<u8> {
    let start = (address - tables.address) as usize;
    assert_eq!(start % 4, 0);
    assert_eq!(&tables.bytes[start..start + 4], signature);
    let length = dword(&tables.bytes, start + 4) as usize;
    let table = &tables.bytes[start..start + length];
    assert_eq!(
        sum(table),
        0,
        "checksum of {}",
        String::from_utf8_lossy(signature)
    );
    table.to_vec()
}

fn find(tables: &AcpiTables) -> Found {
    let rsdp = &tables.bytes[..36];
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!(sum(&rsdp[..20]), 0);
    assert_eq!(sum(rsdp), 0);
    let xsdt = table(tables, qword(rsdp, 24), b"XSDT");
    let entries: Vec<u64> = xsdt[36..].chunks(8).map(|entry| qword(entry, 0)).collect();
    assert_eq!(entries.len(), 3);
    let fadt = table(tables, entries[0], b"FACP");
    let dsdt = table(tables, qword(&fadt, 140), b"DSDT");
    Found {
        madt: table(tables, entries[1], b"APIC"),
        mcfg: table(tables, entries[2], b"MCFG"),
        fadt,
        dsdt,
    }
}

fn built(cpus: u32) -> AcpiTables {
    let apic_ids: Vec<u32> = (0..cpus).collect();
    build(&AcpiConfig {
        apic_ids: &apic_ids,
        present: cpus as usize,
        serial: true,
        hotplug: cpus <= 256,
        modules: false,
    })
    .unwrap()
}

/// Type, then the whole entry, of each interrupt controller structure in a MADT.
fn madt_entries(madt: &[u8]) -> Vec<(u8, &[u8])> {
    let mut entries = Vec::new();
    let mut rest = &madt[44..];
    while let [kind, length, ..] = rest {
        let (entry, behind) = rest.split_at(usize::from(*length));
        entries.push((*kind, entry));
        rest = behind;
    }
    entries
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

#[test]
fn all_tables_are_found_and_sum_to_zero() {
    for cpus in [1, 2, 255, 256, 1024] {
        let tables = built(cpus);
        assert_eq!(tables.address, layout::ACPI_TABLES);
        find(&tables);
    }
}

#[test]
fn the_fadt_spares_the_guest_its_probes() {
    let fadt = find(&built(1)).fadt;
    assert_eq!(fadt.len(), 276);
    let flags = dword(&fadt, 112);
    assert_ne!(flags & 1 << 20, 0, "hardware-reduced");
    assert_ne!(flags & 1 << 10, 0, "reset register supported");
    let boot_arch = u16::from_le_bytes([fadt[109], fadt[110]]);
    assert_eq!(
        boot_arch,
        1 << 2 | 1 << 5,
        "no VGA, no CMOS clock, no legacy devices, no 8042"
    );
    assert_eq!(fadt[208..220], [0; 12], "no PM timer");
    // Generic addresses: I/O space, 8 bits wide, byte access.
    for (at, port) in [(116, 0x602), (244, 0x600), (256, 0x601)] {
        assert_eq!(fadt[at..at + 4], [1, 8, 0, 1]);
        assert_eq!(qword(&fadt, at + 4), port);
    }
    assert_eq!(fadt[128], devices::power::RESET_VALUE);
}

#[test]
fn the_madt_lists_each_processor_once_and_one_ioapic() {
    let madt = find(&built(300)).madt;
    assert_eq!(dword(&madt, 36), 0xfee0_0000);
    assert_eq!(dword(&madt, 40), 0, "no pair of 8259");
    let entries = madt_entries(&madt);
    assert_eq!(entries.len(), 301);
    for (cpu, (kind, entry)) in (0u32..).zip(&entries[..300]) {
        let (uid, apic_id, flags) = match kind {
            0 => (u32::from(entry[2]), u32::from(entry[3]), dword(entry, 4)),
            9 => (dword(entry, 12), dword(entry, 4), dword(entry, 8)),
            other => panic!("structure of type {other}"),
        };
        assert_eq!((uid, apic_id, flags), (cpu, cpu, 1));
        assert_eq!(*kind == 0, cpu < 255);
    }
    let (kind, ioapic) = entries[300];
    assert_eq!(kind, 1);
    assert_eq!((dword(ioapic, 4), dword(ioapic, 8)), (0xfec0_0000, 0));
}

#[test]
fn sparse_apic_ids_keep_their_processors() {
    let apic_ids = [0, 4, 300];
    let madt = find(
        &build(&AcpiConfig {
            apic_ids: &apic_ids,
            present: 3,
            serial: false,
            hotplug: false,
            modules: false,
        })
        .unwrap(),
    )
    .madt;
    let entries = madt_entries(&madt);
    assert_eq!(entries[1].1[2..4], [1, 4]);
    assert_eq!(
        (
            entries[2].0,
            dword(entries[2].1, 4),
            dword(entries[2].1, 12)
        ),
        (9, 300, 2)
    );
}

#[test]
fn the_mcfg_has_one_bus() {
    let mcfg = find(&built(1)).mcfg;
    assert_eq!(mcfg.len(), 44 + 16);
    assert_eq!(qword(&mcfg, 44), layout::ECAM_START);
    assert_eq!(mcfg[52..56], [0, 0, 0, 0], "segment 0, buses 0 to 0");
    assert_eq!(devices::pci::Ecam::LENGTH, layout::ECAM_LENGTH);
}

#[test]
fn the_dsdt_has_what_the_machine_has() {
    let dsdt = find(&built(3)).dsdt;
    for name in [
        b"_S5_", b"PCI0", b"MBRD", b"COM1", b"C000", b"C001", b"C002",
    ] {
        assert!(contains(&dsdt, name));
    }
    for name in [
        b"HPLG", b"GED0", b"PWRB", b"PCNT", b"S001", b"S01F", b"_EJ0",
    ] {
        assert!(contains(&dsdt, name));
    }
    assert!(!contains(&dsdt, b"S000"), "the host bridge stays");
    assert!(!contains(&dsdt, b"C003"));
    let silent = find(
        &build(&AcpiConfig {
            apic_ids: &[0],
            present: 1,
            serial: false,
            hotplug: false,
            modules: false,
        })
        .unwrap(),
    )
    .dsdt;
    assert!(!contains(&silent, b"COM1"));
    assert!(!contains(&silent, b"GED0"));
}

/// 34 processors, of which 2 are there when the guest starts.
fn growing(hotplug: bool) -> Found {
    let apic_ids: Vec<u32> = (0..34).collect();
    let tables = build(&AcpiConfig {
        apic_ids: &apic_ids,
        present: 2,
        serial: false,
        hotplug,
        modules: false,
    });
    find(&tables.unwrap())
}

#[test]
fn processors_that_can_come_are_online_capable() {
    let madt = growing(true).madt;
    let flags: Vec<u32> = madt_entries(&madt)[..34]
        .iter()
        .map(|(_, entry)| dword(entry, 4))
        .collect();
    assert_eq!(flags[..3], [1, 1, 2], "enabled, or online-capable");
    assert!(flags[3..].iter().all(|flags| *flags == 2));
}

#[test]
fn processors_that_come_and_go_have_their_methods() {
    let dsdt = growing(true).dsdt;
    let count = |name: &[u8; 4]| dsdt.windows(4).filter(|part| part == name).count();
    // The slots of the PCI bus but the host bridge's, and the processors.
    assert_eq!(count(b"_EJ0"), 31 + 34);
    assert_eq!(
        (count(b"_MAT"), count(b"_OST"), count(b"_STA")),
        (34, 34, 34)
    );
    for name in [
        b"PRHP", b"PRP0", b"PRP1", b"PRN1", b"PREJ", b"PRAN", b"C021",
    ] {
        assert!(contains(&dsdt, name));
    }
    assert!(!contains(&dsdt, b"PRP2"), "two words are enough");
    // _MAT of processor 33: a local APIC that is enabled, whether or not it was at the start.
    assert!(contains(&dsdt, &[0, 8, 33, 33, 1, 0, 0, 0]));
    // The field of PRP0, PRP1, then 24 bytes of nothing, PRA0 …: a name and its bits, or bits alone in two bytes.
    assert!(contains(&dsdt, b"PRP0\x20PRP1\x20\0\x40\x0cPRA0\x20"));
    assert!(contains(&dsdt, b"PRL1\x20\0\x40\x0cPREJ\x20PRAN\x20"));
    assert!(!contains(&growing(false).dsdt, b"PRHP"));
}

#[test]
fn most_processors_that_can_come_fit() {
    let apic_ids: Vec<u32> = (0..257).collect();
    let tables = |count: usize| {
        build(&AcpiConfig {
            apic_ids: &apic_ids[..count],
            present: 1,
            serial: true,
            hotplug: true,
            modules: false,
        })
    };
    assert!(tables(256).unwrap().bytes.len() < layout::ACPI_TABLES_CAPACITY);
    assert!(tables(257).is_err(), "the registers have no bit for it");
}

#[test]
fn too_many_processors_are_refused() {
    for cpus in [3000, 0x1001, 0x2000] {
        let apic_ids: Vec<u32> = (0..cpus).collect();
        let error = build(&AcpiConfig {
            apic_ids: &apic_ids,
            present: 1,
            serial: true,
            hotplug: false,
            modules: false,
        })
        .unwrap_err();
        assert_eq!(
            error,
            AcpiError::TooLarge {
                cpus: cpus as usize,
                available: layout::ACPI_TABLES_CAPACITY
            }
        );
    }
}

#[test]
fn memory_modules_have_their_slots() {
    let dsdt = |modules| {
        let tables = build(&AcpiConfig {
            apic_ids: &[0],
            present: 1,
            serial: false,
            hotplug: true,
            modules,
        });
        find(&tables.unwrap()).dsdt
    };
    let count = |dsdt: &[u8], name: &[u8]| {
        let parts = dsdt.windows(name.len());
        parts.filter(|part| *part == name).count()
    };
    let with = dsdt(true);
    // PNP0C80, compressed.
    assert_eq!(count(&with, &[0x41, 0xd0, 0x0c, 0x80]), 16);
    assert_eq!(
        count(&with, b"MMRS"),
        2 * 16,
        "a field, and what returns it"
    );
    assert_eq!(count(&with, b"MMNT"), 2, "a method, and its caller");
    assert_eq!(count(&dsdt(false), b"MEMH"), 0);
}
