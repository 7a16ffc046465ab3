//! What makes PCI devices come and go, and the power button, in the DSDT: the registers of [`devices::hotplug`], the Generic
//! Event Device whose interrupt says that there is something in them, and a device for each slot.
//!
//! ```text
//! interrupt ─▶ GED._EVT ─▶ PCI0.PCNT ─▶ Notify (Sxx, device check or eject request)
//!                      ├─▶ Notify (PWRB, pressed)
//!                      ├─▶ PRHP.PRNT, see [`processors`](super::processors)
//!                      └─▶ MEMH.MMNT, see [`modules`](super::modules)
//! the guest lets go ─▶ Sxx._EJ0 ─▶ HPLG.PCEJ ─▶ the eject register
//! ```

use acpi_tables::Aml;
use acpi_tables::aml::{
    And, Arg, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule,
    IO, If, Interrupt, Local, Method, MethodCall, Name, Notify, OpRegion, OpRegionSpace, Path,
    ResourceTemplate, Scope, ShiftLeft, Store, ZERO,
};
use devices::{hotplug, pci};

use super::Body;
use crate::layout;

/// ACPI 6.5, table 5.187: the device has come; the device is asked to go. Table 5.190: the button was pressed.
pub(super) const DEVICE_CHECK: u8 = 1;
pub(super) const EJECT_REQUEST: u8 = 3;
const BUTTON_PRESSED: u8 = 0x80;

/// Slots that have a device in the DSDT. The host bridge's does not: it stays.
fn slots() -> impl Iterator<Item = u8> {
    1..pci::DEVICES
}

fn slot_name(slot: u8) -> Path {
    Path::new(&format!("S{slot:03X}"))
}

/// All of it, to go behind `\_SB.PCI0`, and with `modules` behind [`super::modules`].
pub(super) fn describe(modules: bool, aml: &mut Vec<u8>) {
    registers(aml);
    power_button(aml);
    pci_slots(aml);
    event_device(modules, aml);
}

fn registers(aml: &mut Vec<u8>) {
    let port = layout::HOTPLUG_PORT as u16;
    let field = |access, fields| {
        Field::new(
            Path::new("HPRG"),
            access,
            FieldLockRule::NoLock,
            FieldUpdateRule::WriteAsZeroes,
            fields,
        )
    };
    let bits = |offset: u64| offset as usize * 8;
    in_scope(
        "_SB_",
        &Device::new(
            Path::new("HPLG"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0A06")),
                &Name::new(Path::new("_UID"), &"hot-plug"),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![&IO::new(
                        port,
                        port,
                        1,
                        layout::HOTPLUG_PORTS as u8,
                    )]),
                ),
                &OpRegion::new(
                    Path::new("HPRG"),
                    OpRegionSpace::SystemIO,
                    &port,
                    &(layout::HOTPLUG_PORTS as u8),
                ),
                &field(FieldAccessType::Byte, vec![FieldEntry::Named(*b"EVNT", 8)]),
                &field(
                    FieldAccessType::DWord,
                    vec![
                        FieldEntry::Reserved(bits(hotplug::ARRIVED)),
                        FieldEntry::Named(*b"PCIA", 32),
                        FieldEntry::Named(*b"PCIL", 32),
                        FieldEntry::Named(*b"PCIE", 32),
                    ],
                ),
                &Method::new(
                    Path::new("PCEJ"),
                    1,
                    true,
                    vec![&ShiftLeft::new(&Path::new("PCIE"), &1u8, &Arg(0))],
                ),
            ],
        ),
        aml,
    );
}

fn power_button(aml: &mut Vec<u8>) {
    in_scope(
        "_SB_",
        &Device::new(
            Path::new("PWRB"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0C0C")),
                &Name::new(Path::new("_UID"), &0u8),
            ],
        ),
        aml,
    );
}

/// The slots, and the method that tells their drivers what the registers say.
fn pci_slots(aml: &mut Vec<u8>) {
    for slot in slots() {
        in_scope(
            "_SB_.PCI0",
            &Device::new(
                slot_name(slot),
                vec![
                    &Name::new(Path::new("_SUN"), &slot),
                    &Name::new(Path::new("_ADR"), &(u32::from(slot) << 16)),
                    &Method::new(
                        Path::new("_EJ0"),
                        1,
                        true,
                        vec![&MethodCall::new(Path::new("\\_SB_.HPLG.PCEJ"), vec![&slot])],
                    ),
                ],
            ),
            aml,
        );
    }
    // PCNF(devices, what): tells each of them.
    let mut cases = Body::default();
    for slot in slots() {
        cases.add(&If::new(
            &And::new(&ZERO, &Arg(0), &(1u32 << slot)),
            vec![&Notify::new(&slot_name(slot), &Arg(1))],
        ));
    }
    in_scope(
        "_SB_.PCI0",
        &Method::new(Path::new("PCNF"), 2, true, vec![&cases]),
        aml,
    );
    in_scope(
        "_SB_.PCI0",
        &Method::new(
            Path::new("PCNT"),
            0,
            true,
            vec![
                &Store::new(&Local(0), &Path::new("\\_SB_.HPLG.PCIL")),
                &MethodCall::new(Path::new("PCNF"), vec![&Local(0), &EJECT_REQUEST]),
                &Store::new(&Local(0), &Path::new("\\_SB_.HPLG.PCIA")),
                &MethodCall::new(Path::new("PCNF"), vec![&Local(0), &DEVICE_CHECK]),
            ],
        ),
        aml,
    );
}

fn event_device(modules: bool, aml: &mut Vec<u8>) {
    let mut handler = Body::default();
    handler.add(&Store::new(&Local(0), &Path::new("\\_SB_.HPLG.EVNT")));
    let mut on = |event: u8, what: &dyn Aml| {
        handler.add(&If::new(&And::new(&ZERO, &Local(0), &event), vec![what]));
    };
    let call = |method: &str| MethodCall::new(Path::new(method), vec![]);
    on(hotplug::PCI_EVENT, &call("\\_SB_.PCI0.PCNT"));
    let button = Path::new("\\_SB_.PWRB");
    on(
        hotplug::POWER_BUTTON_EVENT,
        &Notify::new(&button, &BUTTON_PRESSED),
    );
    on(hotplug::PROCESSOR_EVENT, &call("\\_SB_.PRHP.PRNT"));
    if modules {
        on(hotplug::MODULE_EVENT, &call("\\_SB_.MEMH.MMNT"));
    }
    in_scope(
        "_SB_",
        &Device::new(
            Path::new("GED0"),
            vec![
                &Name::new(Path::new("_HID"), &"ACPI0013"),
                &Name::new(Path::new("_UID"), &0u8),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![&Interrupt::new(
                        true,
                        true,
                        false,
                        false,
                        layout::HOTPLUG_PIN,
                    )]),
                ),
                &Method::new(Path::new("_EVT"), 1, true, vec![&handler]),
            ],
        ),
        aml,
    );
}

pub(super) fn in_scope(scope: &str, object: &dyn Aml, aml: &mut Vec<u8>) {
    Scope::new(Path::new(scope), vec![object]).to_aml_bytes(aml);
}
