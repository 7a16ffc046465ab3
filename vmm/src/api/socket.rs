//! `--api-socket path=PATH`, or just the path.

use std::{path::PathBuf, str::FromStr};

use thiserror::Error;

/// Where the API listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiSocket {
    /// The path of the Unix socket.
    pub path: PathBuf,
}

/// Not the form of an API socket.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("'{0}' is neither a path nor path=PATH")]
pub struct InvalidApiSocket(String);

impl FromStr for ApiSocket {
    type Err = InvalidApiSocket;

    fn from_str(text: &str) -> Result<Self, InvalidApiSocket> {
        let path = match text.strip_prefix("path=") {
            Some(path) => path,
            // A relative path with an equals sign in it would be another key.
            None if text.starts_with('/') || !text.contains('=') => text,
            None => "",
        };
        if path.is_empty() {
            return Err(InvalidApiSocket(text.to_owned()));
        }
        Ok(Self { path: path.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_with_or_without_its_key() {
        for text in ["path=/run/a=b.sock", "/run/a=b.sock"] {
            let path = "/run/a=b.sock".into();
            assert_eq!(text.parse(), Ok(ApiSocket { path }));
        }
        let path = "rota.sock".into();
        assert_eq!("rota.sock".parse(), Ok(ApiSocket { path }));
        for text in ["", "path=", "fd=3", "port=80"] {
            let error = text.parse::<ApiSocket>().unwrap_err();
            assert_eq!(error, InvalidApiSocket(text.into()));
        }
    }
}
