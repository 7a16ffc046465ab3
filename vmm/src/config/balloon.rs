//! `--balloon size=SIZE[,deflate_on_oom=on|off][,free_page_reporting=on|off]`

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{
    ConfigError,
    options::{keys, size, switch},
};

/// The memory balloon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonConfig {
    /// Bytes that it is to take from the guest at first.
    pub size: u64,
    /// Whether the guest takes memory back when it would have to kill a process otherwise.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// Whether the guest tells of memory that it does not use.
    #[serde(default)]
    pub free_page_reporting: bool,
}

impl FromStr for BalloonConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let [bytes, oom, reporting] = keys(
            text,
            ["size", "deflate_on_oom", "free_page_reporting"],
            "size, deflate_on_oom, free_page_reporting",
        )?;
        Ok(Self {
            size: size(bytes.ok_or(ConfigError::Missing("size"))?)?,
            deflate_on_oom: switch("deflate_on_oom", oom)?,
            free_page_reporting: switch("free_page_reporting", reporting)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options() {
        assert_eq!(
            BalloonConfig::from_str("size=64M,deflate_on_oom=on"),
            Ok(BalloonConfig {
                size: 64 << 20,
                deflate_on_oom: true,
                free_page_reporting: false
            })
        );
        let missing = BalloonConfig::from_str("free_page_reporting=on");
        assert_eq!(missing, Err(ConfigError::Missing("size")));
    }
}
