//! Processors that come and go, in the DSDT: the registers of [`devices::processors`], and a device for each processor that there can
//! be.
//!
//! ```text
//! GED._EVT ─▶ PRHP.PRNT ─▶ PRN0 … PRN7 ─▶ Notify (Cxxx, device check or eject request)
//! is it there? ─▶ Cxxx._STA ─▶ a bit of PRP0 … PRP7
//! the guest lets go ─▶ Cxxx._EJ0 ─▶ PREJ          … or does not ─▶ Cxxx._OST ─▶ PRHP.PROS ─▶ PRAN
//! ```

use acpi_tables::aml::{
    And, Arg, BufferData, Device, EISAName, Equal, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, IO, If, Local, Method, MethodCall, Name, Notify, OpRegion,
    OpRegionSpace, Or, Path, ResourceTemplate, Return, ShiftLeft, Store, ZERO,
};
use devices::processors::{ANSWER, ARRIVED, EJECT, LEAVING, PER_WORD, PRESENT};

use super::{
    Body,
    dsdt::processor_name,
    hotplug::{DEVICE_CHECK, EJECT_REQUEST, in_scope},
    tables::{MADT_ENABLED, local_apic},
};
use crate::layout;

/// Present, enabled, shown and working.
const THERE: u8 = 0xf;

/// Processors that the registers have bits for.
pub(super) const MOST: usize = devices::processors::MOST as usize;

/// All of it, for processors with these APIC ids.
pub(super) fn describe(apic_ids: &[u32], aml: &mut Vec<u8>) {
    let words = apic_ids.len().div_ceil(PER_WORD as usize);
    registers(words, aml);
    for (uid, apic_id) in (0..).zip(apic_ids) {
        processor(uid, *apic_id, aml);
    }
    for word in 0..words {
        notify(word, apic_ids.len(), aml);
    }
    notify_all(words, aml);
}

/// A register for processors, by what it tells and which of them it is of.
fn word_name(kind: char, word: usize) -> String {
    format!("PR{kind}{word}")
}

fn in_device(name: &str) -> Path {
    Path::new(&format!("\\_SB_.PRHP.{name}"))
}

fn registers(words: usize, aml: &mut Vec<u8>) {
    let port = layout::PROCESSORS_PORT as u16;
    let ports = layout::PROCESSORS_PORTS as u8;
    let mut fields = Vec::new();
    let mut at = 0;
    let mut field = |offset: u64, name: String| {
        let before = offset as usize * 8 - at;
        if before > 0 {
            fields.push(FieldEntry::Reserved(before));
        }
        if let Ok(name) = name.into_bytes().try_into() {
            fields.push(FieldEntry::Named(name, 32));
            at = offset as usize * 8 + 32;
        }
    };
    for (start, kind) in [(PRESENT, 'P'), (ARRIVED, 'A'), (LEAVING, 'L')] {
        for word in 0..words {
            field(start + word as u64 * 4, word_name(kind, word));
        }
    }
    field(EJECT, "PREJ".to_owned());
    field(ANSWER, "PRAN".to_owned());
    in_scope(
        "_SB_",
        &Device::new(
            Path::new("PRHP"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0A06")),
                &Name::new(Path::new("_UID"), &"processors"),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![&IO::new(port, port, 1, ports)]),
                ),
                &OpRegion::new(Path::new("PRRG"), OpRegionSpace::SystemIO, &port, &ports),
                &Field::new(
                    Path::new("PRRG"),
                    FieldAccessType::DWord,
                    FieldLockRule::NoLock,
                    FieldUpdateRule::WriteAsZeroes,
                    fields,
                ),
                // PROS(processor, event, status): what became of a request to go.
                &Method::new(
                    Path::new("PROS"),
                    3,
                    true,
                    vec![&If::new(
                        &Equal::new(&Arg(1), &EJECT_REQUEST),
                        vec![
                            &ShiftLeft::new(&Local(0), &Arg(2), &16u8),
                            &Or::new(&Path::new("PRAN"), &Local(0), &Arg(0)),
                        ],
                    )],
                ),
            ],
        ),
        aml,
    );
}

fn processor(uid: u32, apic_id: u32, aml: &mut Vec<u8>) {
    let present = in_device(&word_name('P', (uid / PER_WORD) as usize));
    in_scope(
        "_SB_",
        &Device::new(
            processor_name(uid),
            vec![
                &Name::new(Path::new("_HID"), &"ACPI0007"),
                &Name::new(Path::new("_UID"), &uid),
                // The MADT is of the start; who reads this looks at _STA before.
                &Name::new(
                    Path::new("_MAT"),
                    &BufferData::new(local_apic(uid, apic_id, MADT_ENABLED)),
                ),
                &Method::new(
                    Path::new("_STA"),
                    0,
                    true,
                    vec![
                        &If::new(
                            &And::new(&ZERO, &present, &(1u32 << (uid % PER_WORD))),
                            vec![&Return::new(&THERE)],
                        ),
                        &Return::new(&ZERO),
                    ],
                ),
                &Method::new(
                    Path::new("_EJ0"),
                    1,
                    true,
                    vec![&Store::new(&in_device("PREJ"), &uid)],
                ),
                &Method::new(
                    Path::new("_OST"),
                    3,
                    true,
                    vec![&MethodCall::new(
                        in_device("PROS"),
                        vec![&uid, &Arg(0), &Arg(1)],
                    )],
                ),
            ],
        ),
        aml,
    );
}

/// PRNx(processors, what): tells each processor of word x.
fn notify(word: usize, count: usize, aml: &mut Vec<u8>) {
    let first = word as u32 * PER_WORD;
    let mut body = Body::default();
    for uid in (first..count as u32).take(PER_WORD as usize) {
        body.add(&If::new(
            &And::new(&ZERO, &Arg(0), &(1u32 << (uid - first))),
            vec![&Notify::new(
                &Path::new(&format!("\\_SB_.C{uid:03X}")),
                &Arg(1),
            )],
        ));
    }
    let name = Path::new(&word_name('N', word));
    in_scope("_SB_.PRHP", &Method::new(name, 2, true, vec![&body]), aml);
}

/// PRNT: tells all processors what the registers say.
fn notify_all(words: usize, aml: &mut Vec<u8>) {
    let mut body = Body::default();
    for (kind, what) in [('L', EJECT_REQUEST), ('A', DEVICE_CHECK)] {
        for word in 0..words {
            body.add(&Store::new(&Local(0), &Path::new(&word_name(kind, word))));
            let tell = MethodCall::new(Path::new(&word_name('N', word)), vec![&Local(0), &what]);
            body.add(&If::new(&Local(0), vec![&tell]));
        }
    }
    let name = Path::new("PRNT");
    in_scope("_SB_.PRHP", &Method::new(name, 0, true, vec![&body]), aml);
}
