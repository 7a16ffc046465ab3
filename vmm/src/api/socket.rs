//! `--api-socket path=PATH`, or just the path, or `fd=N`.

use std::{
    io, mem,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::net::UnixListener,
    },
    path::PathBuf,
    str::FromStr,
};

use thiserror::Error;

/// Where the API listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ApiSocket {
    /// At a Unix socket with this path, which is made and removed.
    Path(PathBuf),
    /// At a Unix socket that whoever started this process listens at already.
    Fd(RawFd),
}

/// Not the form of an API socket.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("'{0}' is neither a path nor path=PATH nor fd=N")]
pub struct InvalidApiSocket(String);

impl FromStr for ApiSocket {
    type Err = InvalidApiSocket;

    fn from_str(text: &str) -> Result<Self, InvalidApiSocket> {
        let invalid = || InvalidApiSocket(text.to_owned());
        if let Some(fd) = text.strip_prefix("fd=") {
            let fd = fd.parse().ok().filter(|fd| *fd >= 0);
            return fd.map(Self::Fd).ok_or_else(invalid);
        }
        let path = match text.strip_prefix("path=") {
            Some(path) => path,
            // A relative path with an equals sign in it would be another key.
            None if text.starts_with('/') || !text.contains('=') => text,
            None => "",
        };
        if path.is_empty() {
            return Err(invalid());
        }
        Ok(Self::Path(path.into()))
    }
}

/// The socket behind the descriptor `fd`, which stays open.
///
/// # Errors
/// It is not open, or not a Unix socket that is listened at.
pub(super) fn inherited(fd: RawFd) -> io::Result<UnixListener> {
    // SAFETY: the call takes a number that may or may not be a descriptor, and touches no memory.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, and nobody else's.
    let listener = UnixListener::from(unsafe { OwnedFd::from_raw_fd(copy) });
    listener.local_addr()?;
    let mut listens: libc::c_int = 0;
    let mut length = mem::size_of_val(&listens) as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to a number of that size.
    let asked = unsafe {
        libc::getsockopt(
            listener.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ACCEPTCONN,
            (&raw mut listens).cast(),
            &raw mut length,
        )
    };
    if asked < 0 {
        return Err(io::Error::last_os_error());
    }
    if listens == 0 {
        let why = "nobody listens at this socket: listen(2) comes first";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    listener.set_nonblocking(true)?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::unix::net::UnixDatagram};

    use super::*;

    #[test]
    fn a_path_with_or_without_its_key_or_a_descriptor() {
        for text in ["path=/run/a=b.sock", "/run/a=b.sock"] {
            assert_eq!(text.parse(), Ok(ApiSocket::Path("/run/a=b.sock".into())));
        }
        assert_eq!("rota.sock".parse(), Ok(ApiSocket::Path("rota.sock".into())));
        assert_eq!("fd=3".parse(), Ok(ApiSocket::Fd(3)));
        for text in ["", "path=", "fd=", "fd=-1", "fd=x", "port=80"] {
            let error = text.parse::<ApiSocket>().unwrap_err();
            assert_eq!(error, InvalidApiSocket(text.into()));
        }
    }

    #[test]
    fn only_a_unix_socket_that_is_listened_at_is_taken() {
        assert!(inherited(RawFd::MAX).is_err());
        let file = File::open("/dev/null").unwrap();
        assert!(inherited(file.as_raw_fd()).is_err());
        let (datagrams, _other) = UnixDatagram::pair().unwrap();
        let error = inherited(datagrams.as_raw_fd()).unwrap_err();
        assert!(error.to_string().contains("listen(2)"), "{error}");
    }
}
