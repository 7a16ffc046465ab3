//! `--pmem file=PATH,…`

use std::{path::PathBuf, str::FromStr};

use devices::virtio::pmem::ALIGNMENT;
use serde::{Deserialize, Serialize};

use super::{
    ConfigError,
    options::{keys, size, switch},
};

/// A file as persistent memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemConfig {
    /// The file or block device; or a folder, in which a file is made that has no name and goes with the machine.
    pub file: PathBuf,
    /// Bytes that the guest sees of it; all of the file if not said.
    #[serde(default)]
    pub size: Option<u64>,
    /// What the guest writes does not get into the file.
    #[serde(default)]
    pub discard_writes: bool,
    /// Its name; `_pmem` and a number if there is none.
    #[serde(default)]
    pub id: Option<String>,
}

impl PmemConfig {
    /// Checks what the types alone cannot.
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        match self.size {
            Some(size) if size == 0 || !size.is_multiple_of(ALIGNMENT) => {
                Err(ConfigError::PmemSize(size))
            }
            _ => Ok(()),
        }
    }
}

impl FromStr for PmemConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let [file, bytes, discard_writes, iommu, id] = keys(
            text,
            ["file", "size", "discard_writes", "iommu", "id"],
            "file, size, discard_writes, id",
        )?;
        if switch("iommu", iommu)? {
            return Err(ConfigError::Iommu("pmem"));
        }
        Ok(Self {
            file: file.ok_or(ConfigError::Missing("file"))?.into(),
            size: bytes.map(size).transpose()?,
            discard_writes: switch("discard_writes", discard_writes)?,
            id: id.map(str::to_owned),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options() {
        let parsed = PmemConfig::from_str("file=/data.img");
        let wanted = PmemConfig {
            file: "/data.img".into(),
            size: None,
            discard_writes: false,
            id: None,
        };
        assert_eq!(parsed, Ok(wanted));
        let text = "file=/data.img,size=16M,discard_writes=on,iommu=off,id=data";
        let wanted = PmemConfig {
            file: "/data.img".into(),
            size: Some(16 << 20),
            discard_writes: true,
            id: Some("data".into()),
        };
        assert_eq!(PmemConfig::from_str(text), Ok(wanted));
        for (text, error) in [
            ("size=2M", "'file' is missing"),
            (
                "file=a,iommu=on",
                "pmem: iommu=on is not supported: Rota has no virtual IOMMU",
            ),
            (
                "file=a,mergeable=on",
                "unknown key 'mergeable' (known: file, size, discard_writes, id)",
            ),
        ] {
            assert_eq!(PmemConfig::from_str(text).unwrap_err().to_string(), error);
        }
    }

    #[test]
    fn sizes_are_multiples_of_2_mib() {
        let check = |text: &str| PmemConfig::from_str(text).unwrap().validate();
        assert_eq!(check("file=a"), Ok(()));
        assert_eq!(check("file=a,size=2M"), Ok(()));
        for size in [0, 4096, (2 << 20) + 1] {
            let error = check(&format!("file=a,size={size}"));
            assert_eq!(error, Err(ConfigError::PmemSize(size)));
        }
    }
}
