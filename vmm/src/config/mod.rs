//! What a VM is made of: one type for the command line, for files and for the API.
//!
//! Field names are those of the cloud-hypervisor API, so that its users find them where they expect them. The options of
//! the command line (`boot=2`, `size=512M,shared=on`) parse straight into the same types; defaults live here alone.

mod balloon;
mod console;
mod disk;
mod fs;
mod memory;
mod names;
mod net;
mod options;
mod pmem;
mod rate_limit_group;
mod rate_limiter;
mod rng;
mod vsock;

use std::{path::PathBuf, str::FromStr};

use devices::virtio::net::mac::InvalidMacAddr;
use serde::{Deserialize, Serialize};

use self::options::{keys, number};
use crate::{layout::LayoutError, scheduling::SchedulingConfig};

pub use balloon::BalloonConfig;
pub use console::{ConsoleConfig, ConsoleMode};
pub use disk::{DiskConfig, ImageType};
pub use fs::FsConfig;
pub use memory::{HotplugMethod, MemoryConfig};
pub(crate) use names::name;
pub use net::{NetConfig, PasstConfig};
pub use pmem::PmemConfig;
pub use rate_limit_group::RateLimitGroupConfig;
pub use rate_limiter::{RateLimiterConfig, TokenBucket};
pub use rng::RngConfig;
pub use vsock::VsockConfig;

/// The most VPs a VM may have: what `MSHV_CREATE_VP` of `mshv-ioctls` can name.
pub const MAX_VCPUS: u32 = 255;

/// A whole VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// What to boot.
    pub payload: PayloadConfig,
    /// Virtual processors.
    #[serde(default)]
    pub cpus: CpusConfig,
    /// Guest memory.
    #[serde(default)]
    pub memory: MemoryConfig,
    /// The serial port (COM1).
    #[serde(default)]
    pub serial: SerialConfig,
    /// Limits that disks have in common.
    #[serde(default)]
    pub rate_limit_groups: Vec<RateLimitGroupConfig>,
    /// Disks, in the order of their places on the bus.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// The virtio console.
    #[serde(default)]
    pub console: ConsoleConfig,
    /// The entropy device.
    #[serde(default)]
    pub rng: Option<RngConfig>,
    /// Network devices.
    #[serde(default)]
    pub net: Vec<NetConfig>,
    /// The memory balloon.
    #[serde(default)]
    pub balloon: Option<BalloonConfig>,
    /// The socket device.
    #[serde(default)]
    pub vsock: Option<VsockConfig>,
    /// Whether there is a watchdog.
    #[serde(default)]
    pub watchdog: bool,
    /// Whether there is a device that a guest tells of its panic.
    #[serde(default)]
    pub pvpanic: bool,
    /// Folders of the host.
    #[serde(default)]
    pub fs: Vec<FsConfig>,
    /// Files as persistent memory.
    #[serde(default)]
    pub pmem: Vec<PmemConfig>,
    /// Where and when its vCPUs run.
    #[serde(default)]
    pub scheduling: SchedulingConfig,
}

/// What the guest boots from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PayloadConfig {
    /// A bzImage, or an ELF image with a PVH entry point.
    pub kernel: PathBuf,
    /// The kernel's command line.
    #[serde(default)]
    pub cmdline: Option<String>,
    /// The initial RAM file system.
    #[serde(default)]
    pub initramfs: Option<PathBuf>,
}

/// Virtual processors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpusConfig {
    /// VPs present at boot.
    pub boot_vcpus: u32,
    /// VPs the VM can grow to.
    pub max_vcpus: u32,
}

impl Default for CpusConfig {
    fn default() -> Self {
        Self {
            boot_vcpus: 1,
            max_vcpus: 1,
        }
    }
}

/// Where the other end of the serial port is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialConfig {
    /// The kind of other end.
    pub mode: SerialMode,
    /// The file, where the mode is [`SerialMode::File`].
    #[serde(default)]
    pub file: Option<PathBuf>,
}

/// The kinds of other end a serial port can have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SerialMode {
    /// No serial port at all.
    Off,
    /// A port whose output goes nowhere.
    Null,
    /// The terminal (or pipe) on standard input and output.
    #[default]
    Tty,
    /// A new pseudo-terminal; its path is printed.
    Pty,
    /// Output goes to a file.
    File,
}

/// What is wrong with a configuration. Each message is one line and names the option.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// An option has no `key=value` form.
    #[error("'{0}' is not of the form key=value")]
    NotKeyValue(String),
    /// An option names something unknown.
    #[error("unknown key '{key}' (known: {known})")]
    UnknownKey {
        /// What was given.
        key: String,
        /// What could have been.
        known: &'static str,
    },
    /// A key is given twice.
    #[error("'{0}' is given twice")]
    Duplicate(String),
    /// A required key is missing.
    #[error("'{0}' is missing")]
    Missing(&'static str),
    /// A number that is none.
    #[error("{key}: '{value}' is not a number")]
    NotANumber {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
    },
    /// A size that is none.
    #[error("'{0}' is not a size (examples: 512M, 2G, 1073741824)")]
    NotASize(String),
    /// A switch that is neither on nor off.
    #[error("{key}: '{value}' is neither on nor off")]
    NotASwitch {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
    },
    /// Brackets that do not fit together.
    #[error("'{0}': a bracket is missing or one too many")]
    Brackets(String),
    /// Something about a network device.
    #[error("net: {0}")]
    Net(String),
    /// An Ethernet address that is none.
    #[error("net: {0}")]
    Mac(#[from] InvalidMacAddr),
    /// A serial mode that does not exist.
    #[error("'{0}' is not one of tty, file=PATH, pty, off, null")]
    NotASerialMode(String),
    /// A console mode that does not exist.
    #[error("'{0}' is not one of off, null, tty, pty, file=PATH, socket=PATH")]
    NotAConsoleMode(String),
    /// A console's file or socket without its mode, or the mode without it.
    #[error(
        "console: a file is needed with mode File and a socket with mode Socket, and only there"
    )]
    ConsolePath,
    /// The terminal cannot have two guests' ends.
    #[error(
        "serial and console cannot both be the terminal (with --console tty, give --serial null or off)"
    )]
    TwoTerminals,
    /// More in the balloon than there is.
    #[error("balloon: {balloon} bytes are more than the {memory} of the memory")]
    BalloonTooLarge {
        /// Bytes of the balloon.
        balloon: u64,
        /// Bytes of memory.
        memory: u64,
    },
    /// A CID that no guest can have.
    #[error("vsock: a guest's cid is at least 3 and below 4294967295, not {0}")]
    Cid(u32),
    /// Too few or too many VPs.
    #[error("cpus: {0} virtual processors asked for, 1 to {MAX_VCPUS} are possible")]
    VcpuCount(u32),
    /// Fewer VPs at most than at boot.
    #[error("cpus: max={max} is less than boot={boot}")]
    MaxBelowBoot {
        /// VPs at boot.
        boot: u32,
        /// VPs at most.
        max: u32,
    },
    /// No memory at all.
    #[error("memory: the size is 0")]
    NoMemory,
    /// Not whole pages.
    #[error("memory: size {size} is not a multiple of {page} bytes")]
    UnalignedMemory {
        /// Bytes asked for.
        size: u64,
        /// Bytes in a page.
        page: u64,
    },
    /// More than the host's processors can address.
    #[error("memory: {size} bytes do not fit the host's {bits}-bit physical addresses")]
    TooMuchMemory {
        /// Bytes asked for.
        size: u64,
        /// Width of a physical address on this host.
        bits: u32,
    },
    /// A way for memory to come and go that does not exist.
    #[error("hotplug_method: '{0}' is not one of virtio-mem, acpi")]
    NotAHotplugMethod(String),
    /// Not whole blocks.
    #[error("memory: {key}: {bytes} is not a multiple of {mib} MiB")]
    UnalignedHotplug {
        /// The key.
        key: &'static str,
        /// Its value.
        bytes: u64,
        /// What it has to be a multiple of, in MiB.
        mib: u64,
    },
    /// More of the memory that comes and goes than there is.
    #[error(
        "memory: hotplugged_size: {hotplugged} bytes are more than the {hotplug} of hotplug_size"
    )]
    TooMuchHotplugged {
        /// Bytes that the guest is to have.
        hotplugged: u64,
        /// Bytes that there are.
        hotplug: u64,
    },
    /// There is no room for it.
    #[error("memory: {0}")]
    Layout(#[from] LayoutError),
    /// Persistent memory in other than multiples of 2 MiB.
    #[error("pmem: size {0} is not a multiple of 2 MiB, and more than 0")]
    PmemSize(u64),
    /// A device behind an IOMMU.
    #[error("{0}: iommu=on is not supported: Rota has no virtual IOMMU")]
    Iommu(&'static str),
    /// An image type that Rota does not have.
    #[error(
        "image_type: '{0}' is not one of raw, qcow2; other images have to be converted (qemu-img convert -O qcow2)"
    )]
    NotAnImageType(String),
    /// A disk without a place where its bytes come from, or with two.
    #[error("disk {disk}: {why}")]
    Disk {
        /// The disk.
        disk: String,
        /// What is wrong.
        why: &'static str,
    },
    /// More queues than VPs, or none.
    #[error(
        "disk {disk}: {queues} queues asked for, 1 to {most} are possible (one for each virtual processor)"
    )]
    DiskQueues {
        /// The disk.
        disk: String,
        /// Queues asked for.
        queues: u16,
        /// VPs at most.
        most: u32,
    },
    /// A queue that cannot be that large or small.
    #[error("disk {disk}: queue_size={size} is not a power of two from 4 to 32768")]
    DiskQueueSize {
        /// The disk.
        disk: String,
        /// Entries asked for.
        size: u16,
    },
    /// A serial that the guest would not see whole.
    #[error("disk {disk}: the serial is longer than 20 bytes")]
    DiskSerial {
        /// The disk.
        disk: String,
    },
    /// A group without a limit.
    #[error(
        "rate-limit-group: it limits nothing; give bw_size and bw_refill_time, or ops_size and ops_refill_time"
    )]
    NoLimit,
    /// Two groups that cannot be told apart.
    #[error("rate-limit-group: the id {0:?} is empty, or that of two groups")]
    SameGroup(String),
    /// A group that is not there.
    #[error("disk: there is no rate_limit_group {0:?} (--rate-limit-group id=NAME)")]
    NoGroup(String),
    /// A name that two devices have.
    #[error("two devices have the id '{0}'")]
    SameId(String),
    /// A name that no device can have.
    #[error("the id {0:?} is not of 1 to 64 printable characters")]
    BadId(String),
    /// A tag that no driver can be told.
    #[error("fs: the tag '{0}' is not of 1 to 36 bytes")]
    FsTag(String),
    /// Too few or too many queues.
    #[error("fs: {0} request queues asked for, 1 to {most} are possible", most = FsConfig::MOST_QUEUES)]
    FsQueues(u16),
    /// A size that no queue can have.
    #[error("{device}: queue_size {size} is not a power of two")]
    QueueSize {
        /// The option.
        device: &'static str,
        /// Entries asked for.
        size: u16,
    },
    /// Memory that a back end cannot be given.
    #[error("{0}: another process works on guest memory here, which needs --memory shared=on")]
    PrivateMemory(&'static str),
    /// A serial file without its mode or the mode without a file.
    #[error("serial: a file is needed with mode File, and only there")]
    SerialFile,
}

impl VmConfig {
    /// Checks what the types alone cannot. `address_bits` is the width of a physical address on this host.
    ///
    /// # Errors
    /// The first thing found that cannot work.
    pub fn validate(&self, address_bits: u32) -> Result<(), ConfigError> {
        let CpusConfig {
            boot_vcpus: boot,
            max_vcpus: max,
        } = self.cpus;
        for count in [boot, max] {
            if !(1..=MAX_VCPUS).contains(&count) {
                return Err(ConfigError::VcpuCount(count));
            }
        }
        if max < boot {
            return Err(ConfigError::MaxBelowBoot { boot, max });
        }
        self.memory.validate(address_bits)?;
        if (self.serial.mode == SerialMode::File) != self.serial.file.is_some() {
            return Err(ConfigError::SerialFile);
        }
        names::validate(self)?;
        rate_limit_group::validate(self)?;
        self.disks.iter().try_for_each(|disk| disk.validate(max))?;
        self.net.iter().try_for_each(NetConfig::validate)?;
        self.validate_devices()
    }

    fn validate_devices(&self) -> Result<(), ConfigError> {
        self.fs.iter().try_for_each(FsConfig::validate)?;
        self.pmem.iter().try_for_each(PmemConfig::validate)?;
        let elsewhere = [
            ("fs", !self.fs.is_empty()),
            ("disk", self.disks.iter().any(|disk| disk.vhost_user)),
            ("net", self.net.iter().any(|net| net.vhost_user)),
        ];
        if let Some((option, _)) = elsewhere.iter().find(|(_, is_there)| *is_there)
            && !self.memory.shared
        {
            return Err(ConfigError::PrivateMemory(option));
        }
        self.console.validate()?;
        if self.console.mode == ConsoleMode::Tty && self.serial.mode == SerialMode::Tty {
            return Err(ConfigError::TwoTerminals);
        }
        if let Some(BalloonConfig { size: balloon, .. }) = self.balloon
            && balloon > self.memory.size
        {
            return Err(ConfigError::BalloonTooLarge {
                balloon,
                memory: self.memory.size,
            });
        }
        if let Some(VsockConfig { cid, .. }) = self.vsock
            && !(3..u32::MAX).contains(&cid)
        {
            return Err(ConfigError::Cid(cid));
        }
        Ok(())
    }
}

impl FromStr for CpusConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let [boot, max] = keys(text, ["boot", "max"], "boot, max")?;
        let boot_vcpus = number("boot", boot.ok_or(ConfigError::Missing("boot"))?)?;
        let max_vcpus = max.map_or(Ok(boot_vcpus), |value| number("max", value))?;
        Ok(Self {
            boot_vcpus,
            max_vcpus,
        })
    }
}

impl FromStr for SerialConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let mode = match text {
            "off" => SerialMode::Off,
            "null" => SerialMode::Null,
            "tty" => SerialMode::Tty,
            "pty" => SerialMode::Pty,
            _ => {
                let path = text.strip_prefix("file=").filter(|path| !path.is_empty());
                let path = path.ok_or_else(|| ConfigError::NotASerialMode(text.to_owned()))?;
                return Ok(Self {
                    mode: SerialMode::File,
                    file: Some(path.into()),
                });
            }
        };
        Ok(Self { mode, file: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn config() -> VmConfig {
        VmConfig {
            payload: PayloadConfig {
                kernel: "vmlinuz".into(),
                cmdline: None,
                initramfs: None,
            },
            cpus: CpusConfig::default(),
            memory: MemoryConfig::default(),
            serial: SerialConfig::default(),
            rate_limit_groups: Vec::new(),
            disks: Vec::new(),
            console: ConsoleConfig::default(),
            rng: None,
            net: Vec::new(),
            balloon: None,
            vsock: None,
            watchdog: false,
            pvpanic: false,
            fs: Vec::new(),
            pmem: Vec::new(),
            scheduling: SchedulingConfig::default(),
        }
    }

    #[test]
    fn cpus_options() {
        let parse = CpusConfig::from_str;
        assert_eq!(
            parse("boot=4"),
            Ok(CpusConfig {
                boot_vcpus: 4,
                max_vcpus: 4
            })
        );
        assert_eq!(
            parse("boot=2,max=8"),
            Ok(CpusConfig {
                boot_vcpus: 2,
                max_vcpus: 8
            })
        );
        assert_eq!(parse("max=8"), Err(ConfigError::Missing("boot")));
        assert_eq!(parse("4"), Err(ConfigError::NotKeyValue("4".into())));
        assert_eq!(
            parse("boot=1,boot=2"),
            Err(ConfigError::Duplicate("boot".into()))
        );
        let error = parse("boot=1,threads=2").unwrap_err().to_string();
        assert_eq!(error, "unknown key 'threads' (known: boot, max)");
    }

    #[test]
    fn serial_options() {
        let parse = SerialConfig::from_str;
        assert_eq!(parse("tty").unwrap().mode, SerialMode::Tty);
        assert_eq!(parse("off").unwrap().mode, SerialMode::Off);
        assert_eq!(
            parse("file=/tmp/log").unwrap().file,
            Some("/tmp/log".into())
        );
        assert!(parse("file=").is_err() && parse("socket=x").is_err());
    }

    #[test]
    fn impossible_machines_are_named() {
        let check = |change: fn(&mut VmConfig)| {
            let mut config = config();
            change(&mut config);
            config.validate(46).map_err(|error| error.to_string())
        };
        assert_eq!(check(|_| {}), Ok(()));
        assert_eq!(
            check(|c| c.memory.size = 0),
            Err("memory: the size is 0".into())
        );
        assert!(
            check(|c| c.memory.size = 4097)
                .unwrap_err()
                .contains("multiple of 4096")
        );
        assert!(
            check(|c| c.memory.size = 1 << 46)
                .unwrap_err()
                .contains("46-bit")
        );
        assert!(
            check(|c| c.memory.size = !4095)
                .unwrap_err()
                .contains("46-bit")
        );
        assert!(
            check(|c| c.console.mode = ConsoleMode::Tty)
                .unwrap_err()
                .contains("--serial null")
        );
        assert!(
            check(|c| c.balloon = Some("size=1T".parse().unwrap()))
                .unwrap_err()
                .contains("more than the")
        );
        assert!(
            check(|c| c.vsock = Some("cid=2,socket=x".parse().unwrap()))
                .unwrap_err()
                .contains("not 2")
        );
        let huge = |c: &mut VmConfig| {
            c.memory = MemoryConfig {
                size: 4096,
                hugepages: true,
                ..MemoryConfig::default()
            }
        };
        assert!(check(huge).unwrap_err().contains("multiple of 2097152"));
        assert!(
            check(|c| c.cpus.boot_vcpus = 0)
                .unwrap_err()
                .contains("1 to 255")
        );
        assert!(
            check(|c| c.cpus.boot_vcpus = 2)
                .unwrap_err()
                .contains("less than boot")
        );
        assert!(check(|c| c.serial.mode = SerialMode::File).is_err());
    }

    #[test]
    fn the_json_form_has_the_api_names_and_defaults() {
        let text = r#"{"payload":{"kernel":"k","cmdline":"quiet"},"cpus":{"boot_vcpus":2,"max_vcpus":2},
            "serial":{"mode":"Null"}}"#;
        let parsed: VmConfig = serde_json::from_str(text).unwrap();
        assert_eq!(parsed.cpus.boot_vcpus, 2);
        assert_eq!(parsed.memory, MemoryConfig::default());
        assert_eq!(parsed.serial.mode, SerialMode::Null);
        let again: VmConfig =
            serde_json::from_str(&serde_json::to_string(&parsed).unwrap()).unwrap();
        assert_eq!(again, parsed);
        assert!(
            serde_json::from_str::<VmConfig>(r#"{"payload":{"kernel":"k"},"disk":1}"#).is_err()
        );
    }
}
