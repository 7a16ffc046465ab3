//! The DSDT: processors, the PCI root bridge, the resources it does not own, COM1, the soft-off state, and what [`hotplug`] adds.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name,
    Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::sdt::Sdt;
use devices::power;

use super::{AcpiConfig, OEM_ID, OEM_REVISION, OEM_TABLE_ID, hotplug, modules, processors};
use crate::layout;

/// The most processors that have a name: `C` and three hexadecimal digits.
pub(super) const MAX_PROCESSORS: usize = 0x1000;

/// ACPI revision of the DSDT: from 2 on, AML integers have 64 bits.
const REVISION: u8 = 6;

pub(super) fn dsdt(config: &AcpiConfig) -> Sdt {
    let mut aml = Vec::new();
    soft_off(&mut aml);
    match config.hotplug {
        true => processors::describe(config.apic_ids, &mut aml),
        false => processors(config.apic_ids.len(), &mut aml),
    }
    pci_root(&mut aml);
    board_resources(&mut aml);
    if config.serial {
        com1(&mut aml);
    }
    if config.hotplug {
        if config.modules {
            modules::describe(&mut aml);
        }
        hotplug::describe(config.modules, &mut aml);
    }
    let mut dsdt = Sdt::new(*b"DSDT", 36, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&aml);
    dsdt
}

fn soft_off(aml: &mut Vec<u8>) {
    Name::new(
        Path::new("_S5_"),
        &Package::new(vec![&power::SOFT_OFF_TYPE]),
    )
    .to_aml_bytes(aml);
}

pub(super) fn processor_name(uid: u32) -> Path {
    Path::new(&format!("C{uid:03X}"))
}

/// One device per processor under `\_SB`; their UIDs are those of the MADT.
fn processors(count: usize, aml: &mut Vec<u8>) {
    for uid in 0..count as u32 {
        in_system_bus(
            &Device::new(
                processor_name(uid),
                vec![
                    &Name::new(Path::new("_HID"), &"ACPI0007"),
                    &Name::new(Path::new("_UID"), &uid),
                ],
            ),
            aml,
        );
    }
}

/// The root bridge of bus 0 with the I/O ports (but for its own configuration ports) and the 32-bit window it decodes.
fn pci_root(aml: &mut Vec<u8>) {
    let config_first = layout::PCI_CONFIG_PORT as u16;
    let config_end = config_first + layout::PCI_CONFIG_PORTS as u16;
    let window_last = (layout::PCI_WINDOW_START + layout::PCI_WINDOW_LENGTH - 1) as u32;
    in_system_bus(
        &Device::new(
            Path::new("PCI0"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0A08")),
                &Name::new(Path::new("_CID"), &EISAName::new("PNP0A03")),
                &Name::new(Path::new("_UID"), &0u8),
                &Name::new(Path::new("_SEG"), &0u8),
                &Name::new(Path::new("_BBN"), &0u8),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![
                        &AddressSpace::new_bus_number(0u16, 0u16),
                        &IO::new(
                            config_first,
                            config_first,
                            1,
                            layout::PCI_CONFIG_PORTS as u8,
                        ),
                        &AddressSpace::new_io(0u16, config_first - 1, None),
                        &AddressSpace::new_io(config_end, u16::MAX, None),
                        &AddressSpace::new_memory(
                            AddressSpaceCacheable::NotCacheable,
                            true,
                            layout::PCI_WINDOW_START as u32,
                            window_last,
                            None,
                        ),
                    ]),
                ),
            ],
        ),
        aml,
    );
}

/// The ECAM window as motherboard resource: without it Linux does not trust the MCFG.
fn board_resources(aml: &mut Vec<u8>) {
    in_system_bus(
        &Device::new(
            Path::new("MBRD"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0C02")),
                &Name::new(Path::new("_UID"), &0u8),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![&Memory32Fixed::new(
                        true,
                        layout::ECAM_START as u32,
                        layout::ECAM_LENGTH as u32,
                    )]),
                ),
            ],
        ),
        aml,
    );
}

fn com1(aml: &mut Vec<u8>) {
    let port = layout::COM1_PORT as u16;
    in_system_bus(
        &Device::new(
            Path::new("COM1"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
                &Name::new(Path::new("_UID"), &0u8),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![
                        &IO::new(port, port, 1, layout::COM1_PORTS as u8),
                        &Interrupt::new(true, true, false, false, layout::COM1_PIN),
                    ]),
                ),
            ],
        ),
        aml,
    );
}

fn in_system_bus(device: &Device, aml: &mut Vec<u8>) {
    Scope::new(Path::new("_SB_"), vec![device]).to_aml_bytes(aml);
}
