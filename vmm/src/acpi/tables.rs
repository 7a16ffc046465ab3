//! FADT, MADT and MCFG: the tables of fixed layout.

use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::sdt::Sdt;
use devices::power;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::layout;

/// IA-PC boot architecture flags (ACPI 6.5, table 5.11). Left clear on purpose: legacy devices (bit 0) and 8042 (bit 1).
const IAPC_NO_VGA: u16 = 1 << 2;
const IAPC_NO_CMOS_RTC: u16 = 1 << 5;

/// The hardware-reduced FADT, with reset and sleep registers in [`devices::power::AcpiPower`].
pub(super) fn fadt(dsdt: u64) -> FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = (IAPC_NO_VGA | IAPC_NO_CMOS_RTC).into();
    fadt.sleep_control_reg = byte_port(layout::ACPI_POWER_PORT + power::SLEEP_CONTROL);
    fadt.sleep_status_reg = byte_port(layout::ACPI_POWER_PORT + power::SLEEP_STATUS);
    fadt.reset_reg = byte_port(layout::ACPI_POWER_PORT + power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"Rota\0\0\0\0").into();
    fadt.finalize()
}

fn byte_port(port: u64) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port)
}

const MADT_LOCAL_APIC: u8 = 0;
const MADT_IOAPIC: u8 = 1;
const MADT_LOCAL_X2APIC: u8 = 9;
pub(super) const MADT_ENABLED: u32 = 1 << 0;
const MADT_ONLINE_CAPABLE: u32 = 1 << 1;
/// Id 255 addresses all local APICs, so processors from there on need the x2APIC form.
const FIRST_X2APIC_ID: u32 = 255;

/// The local APIC of processor `uid`, as the MADT and `_MAT` have it.
pub(super) fn local_apic(uid: u32, apic_id: u32, flags: u32) -> Vec<u8> {
    let mut entry = Vec::new();
    match (u8::try_from(uid), u8::try_from(apic_id)) {
        (Ok(uid), Ok(id)) if apic_id < FIRST_X2APIC_ID => {
            entry.extend_from_slice(&[MADT_LOCAL_APIC, 8, uid, id]);
            entry.extend_from_slice(&flags.to_le_bytes());
        }
        _ => {
            entry.extend_from_slice(&[MADT_LOCAL_X2APIC, 16, 0, 0]);
            entry.extend_from_slice(&apic_id.to_le_bytes());
            entry.extend_from_slice(&flags.to_le_bytes());
            entry.extend_from_slice(&uid.to_le_bytes());
        }
    }
    entry
}

/// The MADT: processors, of which the first `present` are there and the others can come, and the IOAPIC. No interrupt overrides: all ISA interrupts are edge-triggered, active high and
/// wired to the pin of the same number, and the flag for a pair of 8259 stays clear.
pub(super) fn madt(apic_ids: &[u32], present: usize) -> Sdt {
    let mut entries = Vec::new();
    entries.extend_from_slice(&(layout::LAPIC_START as u32).to_le_bytes());
    entries.extend_from_slice(&0u32.to_le_bytes());
    for (uid, &apic_id) in (0u32..).zip(apic_ids) {
        let flags = match (uid as usize) < present {
            true => MADT_ENABLED,
            false => MADT_ONLINE_CAPABLE,
        };
        entries.extend_from_slice(&local_apic(uid, apic_id, flags));
    }
    entries.extend_from_slice(&[MADT_IOAPIC, 12, 0, 0]);
    entries.extend_from_slice(&(layout::IOAPIC_START as u32).to_le_bytes());
    entries.extend_from_slice(&0u32.to_le_bytes());

    let mut madt = Sdt::new(*b"APIC", 36, 5, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    madt.append_slice(&entries);
    madt
}

/// The MCFG: ECAM of one bus, so that a guest scans no other.
pub(super) fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM_START, 0, 0, 0);
    mcfg
}
