//! `--console MODE`

use std::{path::PathBuf, str::FromStr};

use serde::{Deserialize, Serialize};

use super::ConfigError;

/// The virtio console.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleConfig {
    /// The kind of other end.
    pub mode: ConsoleMode,
    /// The file, where the mode is [`ConsoleMode::File`].
    #[serde(default)]
    pub file: Option<PathBuf>,
    /// The socket, where the mode is [`ConsoleMode::Socket`].
    #[serde(default)]
    pub socket: Option<PathBuf>,
}

/// The kinds of other end a virtio console can have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConsoleMode {
    /// No console at all.
    #[default]
    Off,
    /// A console whose output goes nowhere.
    Null,
    /// The terminal (or pipe) on standard input and output.
    Tty,
    /// A new pseudo-terminal; its path is printed.
    Pty,
    /// Output goes to a file.
    File,
    /// A unix socket that one client at a time connects to.
    Socket,
}

impl ConsoleConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let file = (self.mode == ConsoleMode::File) == self.file.is_some();
        let socket = (self.mode == ConsoleMode::Socket) == self.socket.is_some();
        if file && socket {
            Ok(())
        } else {
            Err(ConfigError::ConsolePath)
        }
    }
}

impl FromStr for ConsoleConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let path = |kind: &str| {
            text.strip_prefix(kind)
                .filter(|path| !path.is_empty())
                .map(PathBuf::from)
        };
        let (mode, file, socket) = match text {
            "off" => (ConsoleMode::Off, None, None),
            "null" => (ConsoleMode::Null, None, None),
            "tty" => (ConsoleMode::Tty, None, None),
            "pty" => (ConsoleMode::Pty, None, None),
            _ => match (path("file="), path("socket=")) {
                (Some(file), _) => (ConsoleMode::File, Some(file), None),
                (_, Some(socket)) => (ConsoleMode::Socket, None, Some(socket)),
                _ => return Err(ConfigError::NotAConsoleMode(text.to_owned())),
            },
        };
        Ok(Self { mode, file, socket })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options() {
        let parse = ConsoleConfig::from_str;
        assert_eq!(parse("tty").unwrap().mode, ConsoleMode::Tty);
        let file = parse("file=/tmp/log").unwrap();
        assert_eq!(
            (file.mode, file.file),
            (ConsoleMode::File, Some("/tmp/log".into()))
        );
        let socket = parse("socket=/tmp/s").unwrap();
        assert_eq!(
            (socket.mode, socket.socket),
            (ConsoleMode::Socket, Some("/tmp/s".into()))
        );
        for wrong in ["", "file=", "socket=", "stdio"] {
            assert_eq!(
                parse(wrong),
                Err(ConfigError::NotAConsoleMode(wrong.to_owned()))
            );
        }
        let mut config = parse("tty").unwrap();
        config.socket = Some("/tmp/s".into());
        assert_eq!(config.validate(), Err(ConfigError::ConsolePath));
    }
}
