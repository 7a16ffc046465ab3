//! `--fs tag=TAG,socket=PATH`

use std::{path::PathBuf, str::FromStr};

use devices::virtio::vhost_user::Tag;
use serde::{Deserialize, Serialize};

use super::{
    ConfigError,
    options::{keys, number},
};

const KNOWN: &str = "tag, socket, num_queues, queue_size, id";

/// A folder of the host, served by a vhost-user back end like virtiofsd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsConfig {
    /// By which name the guest mounts it.
    pub tag: String,
    /// Where the back end listens.
    pub socket: PathBuf,
    /// How many queues it has for requests.
    #[serde(default = "FsConfig::default_num_queues")]
    pub num_queues: u16,
    /// Entries in each; a power of two.
    #[serde(default = "FsConfig::default_queue_size")]
    pub queue_size: u16,
    /// Its name; `_fs` and a number if there is none.
    #[serde(default)]
    pub id: Option<String>,
}

impl FsConfig {
    fn default_num_queues() -> u16 {
        1
    }

    fn default_queue_size() -> u16 {
        1024
    }

    /// Checks what the types alone cannot.
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        Tag::from_str(&self.tag).map_err(|_| ConfigError::FsTag(self.tag.clone()))?;
        if !(1..=FsConfig::MOST_QUEUES).contains(&self.num_queues) {
            return Err(ConfigError::FsQueues(self.num_queues));
        }
        if !self.queue_size.is_power_of_two() {
            return Err(ConfigError::QueueSize {
                device: "fs",
                size: self.queue_size,
            });
        }
        Ok(())
    }

    /// More than any back end has, and as many as a transport carries with the one for what is urgent.
    pub(super) const MOST_QUEUES: u16 = 1023;
}

impl FromStr for FsConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let names = ["tag", "socket", "num_queues", "queue_size", "id"];
        let [tag, socket, num_queues, queue_size, id] = keys(text, names, KNOWN)?;
        let short = |key, value: Option<&str>, otherwise: fn() -> u16| {
            value.map_or_else(
                || Ok(otherwise()),
                |value| {
                    u16::try_from(number(key, value)?).map_err(|_| ConfigError::NotANumber {
                        key,
                        value: value.to_owned(),
                    })
                },
            )
        };
        Ok(Self {
            tag: tag.ok_or(ConfigError::Missing("tag"))?.to_owned(),
            socket: socket.ok_or(ConfigError::Missing("socket"))?.into(),
            num_queues: short("num_queues", num_queues, Self::default_num_queues)?,
            queue_size: short("queue_size", queue_size, Self::default_queue_size)?,
            id: id.map(str::to_owned),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options() {
        let parsed = FsConfig::from_str("tag=home,socket=/run/fs.sock").unwrap();
        let wanted = FsConfig {
            tag: "home".into(),
            socket: "/run/fs.sock".into(),
            num_queues: 1,
            queue_size: 1024,
            id: None,
        };
        assert_eq!(parsed, wanted);
        let text = "tag=home,socket=/run/fs.sock,num_queues=4,queue_size=512,id=homes";
        let parsed = FsConfig::from_str(text).unwrap();
        assert_eq!((parsed.num_queues, parsed.queue_size), (4, 512));
        assert_eq!(parsed.id.as_deref(), Some("homes"));
        for (text, error) in [
            ("socket=/x", "'tag' is missing"),
            ("tag=x", "'socket' is missing"),
            (
                "tag=x,socket=/x,num_queues=65537",
                "num_queues: '65537' is not a number",
            ),
            (
                "tag=x,socket=/x,dax=on",
                "unknown key 'dax' (known: tag, socket, num_queues, queue_size, id)",
            ),
        ] {
            assert_eq!(FsConfig::from_str(text).unwrap_err().to_string(), error);
        }
    }

    #[test]
    fn what_cannot_work_is_refused() {
        let good = FsConfig::from_str("tag=home,socket=/x").unwrap();
        assert_eq!(good.validate(), Ok(()));
        let tag = "x".repeat(37);
        let long = FsConfig {
            tag: tag.clone(),
            ..good.clone()
        };
        assert_eq!(long.validate(), Err(ConfigError::FsTag(tag)));
        for num_queues in [0, 1024] {
            let bad = FsConfig {
                num_queues,
                ..good.clone()
            };
            assert_eq!(bad.validate(), Err(ConfigError::FsQueues(num_queues)));
        }
        for size in [0, 1000] {
            let bad = FsConfig {
                queue_size: size,
                ..good.clone()
            };
            let device = "fs";
            assert_eq!(bad.validate(), Err(ConfigError::QueueSize { device, size }));
        }
    }
}
