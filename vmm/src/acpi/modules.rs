//! Memory modules that come, in the DSDT: the registers of [`devices::modules`], and a device for each slot.
//!
//! ```text
//! GED._EVT ─▶ MEMH.MMNT ─▶ Notify (Mxxx, device check)
//! is it there, and where? ─▶ Mxxx._STA ─▶ a bit of MMPR, Mxxx._CRS ─▶ the module's resources
//! ```

use acpi_tables::Aml;
use acpi_tables::aml::{
    And, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO,
    If, Local, Method, Name, Notify, OpRegion, OpRegionSpace, Path, ResourceTemplate, Return,
    Store, ZERO,
};
use devices::modules::{LENGTH, MOST, RESOURCES, RESOURCES_LENGTH};

use super::{
    Body,
    hotplug::{DEVICE_CHECK, in_scope},
};
use crate::layout;

/// Present, enabled, shown and working.
const THERE: u8 = 0xf;

/// All of it.
pub(super) fn describe(aml: &mut Vec<u8>) {
    registers(aml);
    for slot in 0..MOST {
        module(slot, aml);
    }
    notify_all(aml);
}

fn name(slot: usize) -> String {
    format!("M{slot:03X}")
}

fn fields(region: &str, fields: Vec<FieldEntry>) -> Field {
    Field::new(
        Path::new(region),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        fields,
    )
}

fn registers(aml: &mut Vec<u8>) {
    // A descriptor of ports tells of fewer than 256.
    let first = layout::MODULES_PORT as u16;
    let ports: Vec<IO> = (0..LENGTH)
        .step_by(RESOURCES_LENGTH as usize)
        .map(|offset| {
            let port = first + offset as u16;
            let count = RESOURCES_LENGTH.min(LENGTH - offset);
            IO::new(port, port, 1, count as u8)
        })
        .collect();
    let ports = ports.iter().map(|port| port as &dyn Aml).collect();
    let start = RESOURCES as u8;
    let there = FieldEntry::Named(*b"MMPR", 32);
    let arrived = FieldEntry::Named(*b"MMAR", 32);
    in_scope(
        "_SB_",
        &Device::new(
            Path::new("MEMH"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0A06")),
                &Name::new(Path::new("_UID"), &"memory"),
                &Name::new(Path::new("_CRS"), &ResourceTemplate::new(ports)),
                &OpRegion::new(Path::new("MMRG"), OpRegionSpace::SystemIO, &first, &start),
                &fields("MMRG", vec![there, arrived]),
            ],
        ),
        aml,
    );
}

fn module(slot: usize, aml: &mut Vec<u8>) {
    let offset = RESOURCES + slot as u64 * RESOURCES_LENGTH;
    let port = (layout::MODULES_PORT + offset) as u16;
    let present = Path::new("\\_SB_.MEMH.MMPR");
    let resources = FieldEntry::Named(*b"MMRS", RESOURCES_LENGTH as usize * 8);
    in_scope(
        "_SB_",
        &Device::new(
            Path::new(&name(slot)),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0C80")),
                &Name::new(Path::new("_UID"), &(slot as u8)),
                &OpRegion::new(
                    Path::new("MMRG"),
                    OpRegionSpace::SystemIO,
                    &port,
                    &(RESOURCES_LENGTH as u8),
                ),
                &fields("MMRG", vec![resources]),
                &Method::new(
                    Path::new("_STA"),
                    0,
                    true,
                    vec![
                        &If::new(
                            &And::new(&ZERO, &present, &(1u32 << slot)),
                            vec![&Return::new(&THERE)],
                        ),
                        &Return::new(&ZERO),
                    ],
                ),
                &Method::new(
                    Path::new("_CRS"),
                    0,
                    true,
                    vec![&Return::new(&Path::new("MMRS"))],
                ),
            ],
        ),
        aml,
    );
}

/// MMNT: tells the modules that have come.
fn notify_all(aml: &mut Vec<u8>) {
    let mut body = Body::default();
    body.add(&Store::new(&Local(0), &Path::new("MMAR")));
    for slot in 0..MOST {
        body.add(&If::new(
            &And::new(&ZERO, &Local(0), &(1u32 << slot)),
            vec![&Notify::new(
                &Path::new(&format!("\\_SB_.{}", name(slot))),
                &DEVICE_CHECK,
            )],
        ));
    }
    let name = Path::new("MMNT");
    in_scope("_SB_.MEMH", &Method::new(name, 0, true, vec![&body]), aml);
}
