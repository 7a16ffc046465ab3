//! passt, a program that gives a guest the network of the user who runs it, without privileges.

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    process::{Child, Command, Stdio},
    sync::Arc,
};

use thiserror::Error;

use super::{super::backend::Backend, Cable, StreamPort, cable};

/// Why passt does not run.
#[derive(Debug, Error)]
pub enum PasstError {
    /// It cannot be started.
    #[error("cannot start passt: {0}; it is a program of its own: `apt install passt`")]
    Start(#[source] io::Error),
    /// There is no connection to it.
    #[error("cannot connect to passt")]
    Connect(#[source] io::Error),
}

/// Starts passt with these `arguments` (for instance `-t 2222:22`) besides those that connect it to the device. It ends with
/// the cable, also when this process is killed.
///
/// # Errors
/// When it cannot be started.
pub fn start(arguments: &[String]) -> Result<Cable, PasstError> {
    let (ours, theirs) = UnixStream::pair().map_err(PasstError::Connect)?;
    let port = StreamPort::new(ours).map_err(PasstError::Connect)?;
    let child = Command::new("passt")
        .args(["--foreground", "--quiet", "--fd", "0"])
        .args(arguments)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .spawn()
        .map_err(PasstError::Start)?;
    Ok(cable(Arc::new(Passt(child)), port))
}

/// A running passt.
struct Passt(Child);

impl Backend for Passt {
    fn features(&self) -> u64 {
        0
    }

    fn set_offloads(&self, _features: u64) -> io::Result<()> {
        Ok(())
    }

    fn attach(&self, _pair: usize) -> io::Result<()> {
        Ok(())
    }

    fn detach(&self, _pair: usize) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
