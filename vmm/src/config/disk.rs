//! `--disk path=PATH,…`

use std::{path::PathBuf, str::FromStr};

use serde::{Deserialize, Serialize};

use super::{
    ConfigError, name,
    options::{keys, number, switch},
    rate_limiter::RateLimiterConfig,
};

/// What the guest can read of a serial.
const SERIAL_LENGTH: usize = 20;

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// The image: a file or a block device. None if a back end has it.
    #[serde(default)]
    pub path: Option<PathBuf>,
    /// The guest cannot write to it; others may read it, too.
    #[serde(default)]
    pub readonly: bool,
    /// Past the host's page cache.
    #[serde(default)]
    pub direct: bool,
    /// Queues, each with a thread; at most one for each VP.
    #[serde(default = "one")]
    pub num_queues: u16,
    /// Entries of a queue; a power of two.
    #[serde(default = "queue_size")]
    pub queue_size: u16,
    /// What the guest may do per time.
    #[serde(default)]
    pub rate_limiter_config: Option<RateLimiterConfig>,
    /// The group of disks that have their limits in common.
    #[serde(default)]
    pub rate_limit_group: Option<String>,
    /// The disk's name; `_disk` and a number if there is none.
    #[serde(default)]
    pub id: Option<String>,
    /// What the guest can know the disk by; its name if there is none.
    #[serde(default)]
    pub serial: Option<String>,
    /// The image may build on other files.
    #[serde(default)]
    pub backing_files: bool,
    /// The guest can give space back to the host.
    #[serde(default = "yes")]
    pub sparse: bool,
    /// What the image is.
    #[serde(default)]
    pub image_type: ImageType,
    /// Another process, a vhost-user back end, has the image and does the work.
    #[serde(default)]
    pub vhost_user: bool,
    /// Where that back end listens.
    #[serde(default)]
    pub vhost_socket: Option<PathBuf>,
}

fn one() -> u16 {
    1
}

fn queue_size() -> u16 {
    128
}

fn yes() -> bool {
    true
}

/// What an image is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageType {
    /// The bytes of the disk.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
    /// What it looks like.
    #[default]
    Unknown,
}

impl FromStr for ImageType {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            _ => Err(ConfigError::NotAnImageType(text.to_owned())),
        }
    }
}

impl DiskConfig {
    /// Checks what the types alone cannot, on a machine with so many VPs at boot.
    pub(super) fn validate(&self, boot_vcpus: u32) -> Result<(), ConfigError> {
        let disk = || name(&self.id).to_owned();
        if let Err(why) = self.source() {
            return Err(ConfigError::Disk { disk: disk(), why });
        }
        if !(1..=boot_vcpus).contains(&self.num_queues.into()) {
            return Err(ConfigError::DiskQueues {
                disk: disk(),
                queues: self.num_queues,
                most: boot_vcpus,
            });
        }
        if self.queue_size < 4 || !self.queue_size.is_power_of_two() {
            return Err(ConfigError::DiskQueueSize {
                disk: disk(),
                size: self.queue_size,
            });
        }
        let serial = self.serial.as_deref().unwrap_or_default();
        if serial.len() > SERIAL_LENGTH {
            return Err(ConfigError::DiskSerial { disk: disk() });
        }
        Ok(())
    }

    /// The one place where the disk's bytes come from, and nothing that only the other kind of place has.
    fn source(&self) -> Result<(), &'static str> {
        if self.rate_limiter_config.is_some() && self.rate_limit_group.is_some() {
            return Err("it has limits of its own or those of its rate_limit_group, not both");
        }
        if !self.vhost_user {
            return match (&self.path, &self.vhost_socket) {
                (Some(_), None) => Ok(()),
                (None, None) => Err("path is missing (or vhost_user=on,socket=PATH)"),
                (_, Some(_)) => Err("a socket goes with vhost_user=on"),
            };
        }
        if self.vhost_socket.is_none() {
            return Err("vhost_user=on goes with socket=PATH");
        }
        let ours = self.path.is_some()
            || self.readonly
            || self.direct
            || self.backing_files
            || self.serial.is_some()
            || self.rate_limiter_config.is_some()
            || self.rate_limit_group.is_some()
            || self.image_type != ImageType::Unknown
            || !self.sparse;
        if ours {
            return Err(
                "with vhost_user=on the image and all about it is the back end's; only socket, num_queues, queue_size and id are said here",
            );
        }
        Ok(())
    }
}

impl FromStr for DiskConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let [
            path,
            readonly,
            direct,
            num_queues,
            queue_size_value,
            id,
            serial,
            backing_files,
            sparse,
            image_type,
            bw_size,
            bw_one_time_burst,
            bw_refill_time,
            ops_size,
            ops_one_time_burst,
            ops_refill_time,
            vhost_user,
            socket,
            rate_limit_group,
        ] = keys(
            text,
            [
                "path",
                "readonly",
                "direct",
                "num_queues",
                "queue_size",
                "id",
                "serial",
                "backing_files",
                "sparse",
                "image_type",
                "bw_size",
                "bw_one_time_burst",
                "bw_refill_time",
                "ops_size",
                "ops_one_time_burst",
                "ops_refill_time",
                "vhost_user",
                "socket",
                "rate_limit_group",
            ],
            "path, readonly, direct, num_queues, queue_size, id, serial, backing_files, sparse, image_type, \
             bw_size, bw_one_time_burst, bw_refill_time, ops_size, ops_one_time_burst, ops_refill_time, \
             rate_limit_group, vhost_user, socket",
        )?;
        let rate_limiter_config = RateLimiterConfig::from_options(
            [bw_size, bw_one_time_burst, bw_refill_time],
            [ops_size, ops_one_time_burst, ops_refill_time],
        )?;
        Ok(Self {
            path: path.map(PathBuf::from),
            vhost_user: switch("vhost_user", vhost_user)?,
            vhost_socket: socket.map(PathBuf::from),
            readonly: switch("readonly", readonly)?,
            direct: switch("direct", direct)?,
            num_queues: small("num_queues", num_queues, one)?,
            queue_size: small("queue_size", queue_size_value, queue_size)?,
            rate_limiter_config,
            rate_limit_group: rate_limit_group.map(str::to_owned),
            id: id.map(str::to_owned),
            serial: serial.map(str::to_owned),
            backing_files: switch("backing_files", backing_files)?,
            sparse: switch("sparse", sparse.or(Some("on")))?,
            image_type: image_type.map_or(Ok(ImageType::Unknown), str::parse)?,
        })
    }
}

fn small(key: &'static str, value: Option<&str>, default: fn() -> u16) -> Result<u16, ConfigError> {
    let Some(value) = value else {
        return Ok(default());
    };
    number(key, value)?
        .try_into()
        .map_err(|_| ConfigError::NotANumber {
            key,
            value: value.to_owned(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::TokenBucket;

    #[test]
    fn options() {
        let plain: DiskConfig = "path=disk.img".parse().unwrap();
        let expected = DiskConfig {
            path: Some("disk.img".into()),
            vhost_user: false,
            vhost_socket: None,
            readonly: false,
            direct: false,
            num_queues: 1,
            queue_size: 128,
            rate_limiter_config: None,
            rate_limit_group: None,
            id: None,
            serial: None,
            backing_files: false,
            sparse: true,
            image_type: ImageType::Unknown,
        };
        assert_eq!(plain, expected);
        let from_json: DiskConfig = serde_json::from_str(r#"{"path":"disk.img"}"#).unwrap();
        assert_eq!(from_json, expected);
        let full: DiskConfig =
            "path=/dev/sdb,readonly=on,direct=on,num_queues=4,queue_size=256,id=data,serial=S1,\
             backing_files=on,sparse=off,image_type=qcow2,bw_size=1000,bw_refill_time=100,\
             ops_size=5,ops_one_time_burst=7,ops_refill_time=1000"
                .parse()
                .unwrap();
        let bucket = |size, one_time_burst, refill_time| {
            Some(TokenBucket {
                size,
                one_time_burst,
                refill_time,
            })
        };
        assert_eq!(
            full,
            DiskConfig {
                path: Some("/dev/sdb".into()),
                vhost_user: false,
                vhost_socket: None,
                readonly: true,
                direct: true,
                num_queues: 4,
                queue_size: 256,
                rate_limiter_config: Some(RateLimiterConfig {
                    bandwidth: bucket(1000, None, 100),
                    ops: bucket(5, Some(7), 1000),
                }),
                rate_limit_group: None,
                id: Some("data".into()),
                serial: Some("S1".into()),
                backing_files: true,
                sparse: false,
                image_type: ImageType::Qcow2,
            }
        );
    }

    #[test]
    fn wrong_options_are_named() {
        let error = |text: &str| text.parse::<DiskConfig>().unwrap_err().to_string();
        assert_eq!(
            error("path=a,direct=1"),
            "direct: '1' is neither on nor off"
        );
        assert_eq!(
            error("path=a,queue_size=x"),
            "queue_size: 'x' is not a number"
        );
        assert_eq!(
            error("path=a,num_queues=65536"),
            "num_queues: '65536' is not a number"
        );
        assert_eq!(
            error("path=a,image_type=vhdx"),
            "image_type: 'vhdx' is not one of raw, qcow2; other images have to be converted (qemu-img convert -O qcow2)"
        );
        assert_eq!(error("path=a,bw_size=5"), "'bw_refill_time' is missing");
        assert_eq!(
            error("path=a,ops_one_time_burst=5"),
            "'ops_size' is missing"
        );
        assert!(error("path=a,iommu=on").starts_with("unknown key 'iommu' (known: path, "));
    }

    /// Checks a disk of a machine with two VPs.
    fn check(text: &str) -> Result<(), String> {
        let mut disk: DiskConfig = text.parse().unwrap();
        disk.id = Some("data".into());
        disk.validate(2).map_err(|error| error.to_string())
    }

    #[test]
    fn impossible_disks_are_named() {
        assert_eq!(check("path=b,num_queues=2"), Ok(()));
        let queues = check("path=a,num_queues=3").unwrap_err();
        assert!(queues.starts_with("disk data: ") && queues.contains("1 to 2"));
        assert!(check("path=a,num_queues=0").unwrap_err().contains("1 to 2"));
        for size in ["0", "2", "100", "65535"] {
            let error = check(&format!("path=a,queue_size={size}")).unwrap_err();
            assert!(error.contains("power of two"), "{error}");
        }
        let long = "path=a,serial=123456789012345678901";
        assert!(check(long).unwrap_err().contains("20 bytes"));
    }

    #[test]
    fn a_disk_has_one_source() {
        assert_eq!(check("vhost_user=on,socket=/run/d,num_queues=2"), Ok(()));
        for (text, why) in [
            ("readonly=on", "path is missing"),
            (
                "path=a,rate_limit_group=g,ops_size=1,ops_refill_time=1",
                "not both",
            ),
            ("path=a,socket=/run/d", "a socket goes with vhost_user=on"),
            ("vhost_user=on", "vhost_user=on goes with socket=PATH"),
            ("vhost_user=on,socket=/run/d,path=a", "the back end's"),
            ("vhost_user=on,socket=/run/d,readonly=on", "the back end's"),
            ("vhost_user=on,socket=/run/d,sparse=off", "the back end's"),
        ] {
            let error = check(text).unwrap_err();
            assert!(
                error.starts_with("disk data: ") && error.contains(why),
                "{error}"
            );
        }
        let from_json = r#"{"vhost_user":true,"vhost_socket":"/run/d"}"#;
        let disk: DiskConfig = serde_json::from_str(from_json).unwrap();
        assert_eq!(disk.validate(1), Ok(()));
    }
}
