//! `--memory size=SIZE,…`

use std::str::FromStr;

use devices::virtio::mem::BLOCK;
use serde::{Deserialize, Serialize};

use super::{
    ConfigError,
    options::{keys, size, switch},
};
use crate::{
    layout::{LayoutError, MemoryLayout, Range},
    modules::UNIT,
};

/// Pages are 4 KiB everywhere in the ABI.
const PAGE_SIZE: u64 = 4096;
const HUGE_PAGE_SIZE: u64 = 2 << 20;

/// Guest memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryConfig {
    /// Bytes that are there from the start, and stay.
    pub size: u64,
    /// Backed by a memfd that other processes can map, instead of private anonymous memory.
    #[serde(default)]
    pub shared: bool,
    /// Backed by the host's huge pages (2 MiB each, from its reserved pool).
    #[serde(default)]
    pub hugepages: bool,
    /// How memory comes and goes.
    #[serde(default)]
    pub hotplug_method: HotplugMethod,
    /// Bytes that can come and go.
    #[serde(default)]
    pub hotplug_size: Option<u64>,
    /// Bytes of these that the guest is to have.
    #[serde(default)]
    pub hotplugged_size: Option<u64>,
}

/// How memory comes and goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HotplugMethod {
    /// As memory modules that ACPI tells of, and that stay.
    #[default]
    Acpi,
    /// In blocks that a virtio device tells of.
    VirtioMem,
}

impl FromStr for HotplugMethod {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text {
            "acpi" => Ok(Self::Acpi),
            "virtio-mem" => Ok(Self::VirtioMem),
            _ => Err(ConfigError::NotAHotplugMethod(text.to_owned())),
        }
    }
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: 512 << 20,
            shared: false,
            hugepages: false,
            hotplug_method: HotplugMethod::default(),
            hotplug_size: None,
            hotplugged_size: None,
        }
    }
}

impl MemoryConfig {
    /// Bytes that can come and go; whole units of memory modules, where they come as such.
    #[must_use]
    pub fn hotplug(&self) -> u64 {
        let size = self.hotplug_size.unwrap_or(0);
        match self.hotplug_method {
            HotplugMethod::Acpi => size - size % UNIT,
            HotplugMethod::VirtioMem => size,
        }
    }

    /// Where memory modules come, of a machine with `layout`, if they can.
    pub(crate) fn module_area(&self, layout: &MemoryLayout) -> Option<Range> {
        let as_modules = self.hotplug_method == HotplugMethod::Acpi;
        layout.hotplug.filter(|_| as_modules)
    }

    /// Where memory comes and goes by virtio-mem, likewise.
    pub(crate) fn virtio_mem_area(&self, layout: &MemoryLayout) -> Option<Range> {
        let by_virtio_mem = self.hotplug_method == HotplugMethod::VirtioMem;
        layout.hotplug.filter(|_| by_virtio_mem)
    }

    /// Bytes that the guest begins with in memory modules.
    pub(crate) fn modules(&self) -> u64 {
        match self.hotplug_method {
            HotplugMethod::Acpi => self.hotplugged(),
            HotplugMethod::VirtioMem => 0,
        }
    }

    /// Bytes of these that the guest is to have.
    #[must_use]
    pub fn hotplugged(&self) -> u64 {
        self.hotplugged_size.unwrap_or(0)
    }

    /// Where it lies, on a host with physical addresses of `address_bits` bits.
    ///
    /// # Errors
    /// When there is no room for it.
    pub fn layout(&self, address_bits: u32) -> Result<MemoryLayout, LayoutError> {
        MemoryLayout::new(self.size, self.hotplug(), address_bits)
    }

    /// Checks what the types alone cannot.
    pub(super) fn validate(&self, address_bits: u32) -> Result<(), ConfigError> {
        let size = self.size;
        if size == 0 {
            return Err(ConfigError::NoMemory);
        }
        let page = if self.hugepages {
            HUGE_PAGE_SIZE
        } else {
            PAGE_SIZE
        };
        if !size.is_multiple_of(page) {
            return Err(ConfigError::UnalignedMemory { size, page });
        }
        // RAM above the 32-bit hole is moved up by the size of the hole, at most 4 GiB.
        let limit = 1u64.checked_shl(address_bits).unwrap_or(u64::MAX);
        if size.checked_add(1 << 32).is_none_or(|end| end > limit) {
            return Err(ConfigError::TooMuchMemory {
                size,
                bits: address_bits,
            });
        }
        let (hotplug, hotplugged) = (self.hotplug(), self.hotplugged());
        let unit = match self.hotplug_method {
            HotplugMethod::Acpi => UNIT,
            HotplugMethod::VirtioMem => BLOCK,
        };
        for (key, bytes) in [("hotplug_size", hotplug), ("hotplugged_size", hotplugged)] {
            if !bytes.is_multiple_of(unit) {
                return Err(ConfigError::UnalignedHotplug {
                    key,
                    bytes,
                    mib: unit >> 20,
                });
            }
        }
        if hotplugged > hotplug {
            return Err(ConfigError::TooMuchHotplugged {
                hotplugged,
                hotplug,
            });
        }
        if hotplug > 0 {
            self.layout(address_bits)?;
        }
        Ok(())
    }
}

impl FromStr for MemoryConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let [bytes, shared, hugepages, method, hotplug, hotplugged] = keys(
            text,
            [
                "size",
                "shared",
                "hugepages",
                "hotplug_method",
                "hotplug_size",
                "hotplugged_size",
            ],
            "size, shared, hugepages, hotplug_method, hotplug_size, hotplugged_size",
        )?;
        Ok(Self {
            size: size(bytes.ok_or(ConfigError::Missing("size"))?)?,
            shared: switch("shared", shared)?,
            hugepages: switch("hugepages", hugepages)?,
            hotplug_method: method.map_or(Ok(HotplugMethod::default()), str::parse)?,
            hotplug_size: hotplug.map(size).transpose()?,
            hotplugged_size: hotplugged.map(size).transpose()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options() {
        let parse = MemoryConfig::from_str;
        let expected = MemoryConfig {
            size: 1 << 30,
            shared: true,
            ..MemoryConfig::default()
        };
        assert_eq!(parse("size=1G,shared=on,hugepages=off"), Ok(expected));
        let error = parse("size=1G,shared=yes").unwrap_err().to_string();
        assert_eq!(error, "shared: 'yes' is neither on nor off");
        assert_eq!(parse("shared=on"), Err(ConfigError::Missing("size")));
        let text = "size=1G,hotplug_method=virtio-mem,hotplug_size=2G,hotplugged_size=512M";
        let expected = MemoryConfig {
            size: 1 << 30,
            hotplug_method: HotplugMethod::VirtioMem,
            hotplug_size: Some(2 << 30),
            hotplugged_size: Some(512 << 20),
            ..MemoryConfig::default()
        };
        assert_eq!(parse(text), Ok(expected.clone()));
        let json = r#"{"size":1073741824,"hotplug_method":"VirtioMem","hotplug_size":2147483648,
            "hotplugged_size":536870912}"#;
        assert_eq!(
            serde_json::from_str::<MemoryConfig>(json).unwrap(),
            expected
        );
        let error = parse("size=1G,hotplug_method=dimm").unwrap_err();
        assert_eq!(
            error.to_string(),
            "hotplug_method: 'dimm' is not one of virtio-mem, acpi"
        );
    }

    #[test]
    fn memory_that_cannot_come_and_go_is_refused() {
        let check = |text: &str| {
            let memory: MemoryConfig = text.parse().unwrap();
            memory.validate(40).map_err(|error| error.to_string())
        };
        // What an engine says that means all of the host's memory.
        assert_eq!(check("size=512M,hotplug_size=1234567890"), Ok(()));
        let modules: MemoryConfig = "size=512M,hotplug_size=300M".parse().unwrap();
        assert_eq!(modules.hotplug(), 256 << 20);
        let virtio = "size=512M,hotplug_method=virtio-mem";
        assert_eq!(check(&format!("{virtio},hotplug_size=1G")), Ok(()));
        assert_eq!(check(&format!("{virtio},hotplug_size=0")), Ok(()));
        for (text, why) in [
            ("size=512M,hotplugged_size=128M", "more than the 0"),
            (
                "size=512M,hotplug_size=1G,hotplugged_size=2M",
                "multiple of 128 MiB",
            ),
            (
                &format!("{virtio},hotplug_size=1M"),
                "hotplug_size: 1048576",
            ),
            (
                &format!("{virtio},hotplug_size=4M,hotplugged_size=1"),
                "hotplugged_size: 1 ",
            ),
            (
                &format!("{virtio},hotplug_size=4M,hotplugged_size=6M"),
                "6291456 bytes are more",
            ),
            (&format!("{virtio},hotplug_size=1T"), "40-bit"),
            (&format!("{virtio},hotplug_size=2T"), "too large"),
        ] {
            let error = check(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
