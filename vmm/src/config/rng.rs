//! `--rng src=PATH`

use std::{path::PathBuf, str::FromStr};

use serde::{Deserialize, Serialize};

use super::{ConfigError, options::keys};

/// The entropy device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngConfig {
    /// Where the host's randomness comes from.
    pub src: PathBuf,
}

impl FromStr for RngConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let [src] = keys(text, ["src"], "src")?;
        let src = src.ok_or(ConfigError::Missing("src"))?.into();
        Ok(Self { src })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options() {
        let parsed = RngConfig::from_str("src=/dev/urandom").unwrap();
        assert_eq!(parsed.src, PathBuf::from("/dev/urandom"));
        assert_eq!(
            RngConfig::from_str("source=x").unwrap_err().to_string(),
            "unknown key 'source' (known: src)"
        );
    }
}
