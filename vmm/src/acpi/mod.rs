//! The ACPI tables that describe the machine to the guest.
//!
//! The platform is hardware-reduced: no PM1 registers, no SCI, no PM timer, no 8259, no PIT, and the FADT says that there
//! is no keyboard controller, VGA or CMOS clock to look for. Each of these sentences spares the guest a probe, and each
//! probe is a round of exits.

mod dsdt;
mod hotplug;
mod modules;
mod processors;
mod tables;

#[cfg(test)]
mod tests;

use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use thiserror::Error;

use crate::layout;

const OEM_ID: [u8; 6] = *b"ROTA  ";
const OEM_TABLE_ID: [u8; 8] = *b"ROTAVM  ";
const OEM_REVISION: u32 = 1;

/// What varies from machine to machine; all else is [`layout`].
#[derive(Debug, Clone, Copy)]
pub struct AcpiConfig<'a> {
    /// APIC id of each processor in the order of VP index; the ACPI processor UID is the position.
    pub apic_ids: &'a [u32],
    /// How many of them, from the first on, are there when the guest starts; the others can come if there are events.
    pub present: usize,
    /// Whether COM1 exists.
    pub serial: bool,
    /// Whether there are events: devices that come and go, and a power button.
    pub hotplug: bool,
    /// Whether memory modules can come, by those events.
    pub modules: bool,
}

/// The tables, ready to be written to guest memory in one piece.
#[derive(Debug, Clone)]
pub struct AcpiTables {
    /// Guest physical address of the first byte of `bytes`; the RSDP lies there.
    pub address: u64,
    /// RSDP, then all tables, each aligned as ACPI wants it.
    pub bytes: Vec<u8>,
}

/// Why there are no tables for a configuration.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum AcpiError {
    /// More processors than the reserved memory can describe.
    #[error(
        "ACPI tables for {cpus} processors do not fit into the {available} bytes reserved for them"
    )]
    TooLarge {
        /// Number of processors described.
        cpus: usize,
        /// Room for the tables in bytes.
        available: usize,
    },
}

/// Builds all tables for `config`, to be placed at [`layout::ACPI_TABLES`].
///
/// # Errors
/// When they do not fit into [`layout::ACPI_TABLES_CAPACITY`].
pub fn build(config: &AcpiConfig) -> Result<AcpiTables, AcpiError> {
    let too_large = AcpiError::TooLarge {
        cpus: config.apic_ids.len(),
        available: layout::ACPI_TABLES_CAPACITY,
    };
    let most = match config.hotplug {
        true => processors::MOST,
        false => dsdt::MAX_PROCESSORS,
    };
    if config.apic_ids.len() > most {
        return Err(too_large);
    }
    let mut image = Image {
        base: layout::ACPI_TABLES,
        bytes: vec![0; Rsdp::len().next_multiple_of(TABLE_ALIGNMENT)],
    };
    let dsdt = image.append(dsdt::dsdt(config).as_slice());
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(image.append(&aml_bytes(&tables::fadt(dsdt))));
    xsdt.add_entry(image.append(tables::madt(config.apic_ids, config.present).as_slice()));
    xsdt.add_entry(image.append(&aml_bytes(&tables::mcfg())));
    let xsdt = image.append(&aml_bytes(&xsdt));
    let rsdp = aml_bytes(&Rsdp::new(OEM_ID, xsdt));
    image.bytes[..rsdp.len()].copy_from_slice(&rsdp);

    if image.bytes.len() > layout::ACPI_TABLES_CAPACITY {
        return Err(too_large);
    }
    Ok(AcpiTables {
        address: image.base,
        bytes: image.bytes,
    })
}

const TABLE_ALIGNMENT: usize = 64;

struct Image {
    base: u64,
    bytes: Vec<u8>,
}

impl Image {
    /// Places `table` behind what is there and returns its guest physical address.
    fn append(&mut self, table: &[u8]) -> u64 {
        let offset = self.bytes.len().next_multiple_of(TABLE_ALIGNMENT);
        self.bytes.resize(offset, 0);
        self.bytes.extend_from_slice(table);
        self.base + offset as u64
    }
}

/// A method's body, put together piece by piece.
#[derive(Default)]
struct Body(Vec<u8>);

impl Body {
    fn add(&mut self, piece: &dyn Aml) {
        piece.to_aml_bytes(&mut self.0);
    }
}

impl Aml for Body {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn aml_bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}
