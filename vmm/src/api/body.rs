//! Bodies of requests: JSON with cloud-hypervisor's field names.
//!
//! Its clients send every field that they know, also those of features that Rota does not have. Such a field is accepted as long
//! as it asks for nothing.

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use super::Refusal;

/// Fields that Rota does not have, with the value, if there is one, that asks for nothing.
fn elsewhere() -> [(&'static str, Value); 7] {
    [
        ("pci_segment", 0.into()),
        ("pci_device_id", Value::Null),
        ("iommu", false.into()),
        ("queue_affinity", Value::Null),
        ("disable_io_uring", false.into()),
        ("disable_aio", false.into()),
        ("lock_granularity", "ByteRange".into()),
    ]
}

/// The device that is to come.
pub(super) fn device<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    let mut fields: Map<String, Value> = parse(body)?;
    for (field, nothing) in elsewhere() {
        if let Some(value) = fields.remove(field)
            && !value.is_null()
            && value != nothing
        {
            return Err(Refusal::bad(format!("{field}={value} is not supported")));
        }
    }
    serde_json::from_value(Value::Object(fields)).map_err(|error| invalid(&error))
}

/// Any other body.
pub(super) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body).map_err(|error| invalid(&error))
}

fn invalid(error: &serde_json::Error) -> Refusal {
    Refusal::bad(format!("the body of the request is not valid: {error}"))
}

/// `vm.remove-device`
#[derive(Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub(crate) struct RemoveDevice {
    pub(super) id: String,
}

/// `vm.resize`
#[derive(Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub(crate) struct Resize {
    #[serde(default)]
    pub(super) desired_vcpus: Option<u32>,
    #[serde(default)]
    pub(super) desired_ram: Option<u64>,
    #[serde(default)]
    pub(super) desired_balloon: Option<u64>,
}

/// `vm.resize-disk`
#[derive(Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub(crate) struct ResizeDisk {
    pub(super) id: String,
    pub(super) desired_size: u64,
}
