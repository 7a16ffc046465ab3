//! The halves of these commands that run inside the lab, where `/dev/kvm` works and time is that of the guests' host.
//!
//! The same executable runs on both sides: the host's half starts `xtask inside …` in the lab.

pub(crate) mod bench;
pub(crate) mod demo;
pub(crate) mod free_memory;
pub(crate) mod io;
mod memory;
pub(crate) mod steady;
pub(crate) mod tests;
pub(crate) mod vm;

use std::path::Path;

use crate::error::{Error, Result};
use crate::workspace::Workspace;

/// This executable's path as the lab sees it.
pub(crate) fn executable(workspace: &Workspace) -> Result<String> {
    let path = std::env::current_exe().unwrap_or_default();
    in_lab(workspace, &path).ok_or_else(|| {
        Error::new(format!(
            "{} is not below {}",
            path.display(),
            workspace.target.display()
        ))
    })
}

/// Where the lab sees a file that is below the host's target folder.
pub(crate) fn in_lab(workspace: &Workspace, path: &Path) -> Option<String> {
    let target = workspace.target.canonicalize().ok()?;
    let below = path
        .canonicalize()
        .ok()?
        .strip_prefix(target)
        .ok()?
        .to_owned();
    Some(format!("/target/{}", below.display()))
}
