//! `--vsock cid=CID,socket=PATH`

use std::{path::PathBuf, str::FromStr};

use serde::{Deserialize, Serialize};

use super::{
    ConfigError,
    options::{keys, number},
};

/// The socket device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's address.
    pub cid: u32,
    /// The unix socket that the host's programs connect to.
    pub socket: PathBuf,
}

impl FromStr for VsockConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let [cid, socket] = keys(text, ["cid", "socket"], "cid, socket")?;
        Ok(Self {
            cid: number("cid", cid.ok_or(ConfigError::Missing("cid"))?)?,
            socket: socket.ok_or(ConfigError::Missing("socket"))?.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options() {
        let parsed = VsockConfig::from_str("cid=3,socket=/tmp/vsock");
        assert_eq!(
            parsed,
            Ok(VsockConfig {
                cid: 3,
                socket: "/tmp/vsock".into()
            })
        );
        let missing = VsockConfig::from_str("cid=3");
        assert_eq!(missing, Err(ConfigError::Missing("socket")));
        assert!(VsockConfig::from_str("cid=-1,socket=x").is_err());
    }
}
