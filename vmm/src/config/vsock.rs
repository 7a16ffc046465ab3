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
    /// Its name; `_vsock0` if there is none.
    #[serde(default)]
    pub id: Option<String>,
}

impl FromStr for VsockConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let [cid, socket, id] = keys(text, ["cid", "socket", "id"], "cid, socket, id")?;
        Ok(Self {
            cid: number("cid", cid.ok_or(ConfigError::Missing("cid"))?)?,
            socket: socket.ok_or(ConfigError::Missing("socket"))?.into(),
            id: id.map(str::to_owned),
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
                socket: "/tmp/vsock".into(),
                id: None,
            })
        );
        let missing = VsockConfig::from_str("cid=3");
        assert_eq!(missing, Err(ConfigError::Missing("socket")));
        assert!(VsockConfig::from_str("cid=-1,socket=x").is_err());
    }
}
