//! A Debian root file system with systemd, as disk images in `target/lab/guest`: made from the release's packages by `mmdebstrap`, which
//! is only unpacked here, not installed.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::apt::{self, Tool};
use crate::error::{Context, Result};
use crate::progress::step;
use crate::workspace::Workspace;

/// What it takes to make the images, besides `mmdebstrap`.
const TOOLS: &[Tool] = &[
    Tool {
        program: "mke2fs",
        package: "e2fsprogs",
    },
    Tool {
        program: "qemu-img",
        package: "qemu-utils",
    },
    Tool {
        program: "python3",
        package: "python3",
    },
];

/// The packages beside those that every Debian has: systemd, and what is worked with.
const PACKAGES: &str = "systemd-sysv,udev,iproute2,iputils-ping,e2fsprogs,fio,iperf3";

const SCRIPT: &str = include_str!("debian.sh");

/// What is made.
const FILES: [&str; 3] = ["debian.raw", "debian.qcow2", "iperf3"];

/// Makes the images if they are not there as they would be made now.
pub(crate) fn prepare(workspace: &Workspace) -> Result<()> {
    let folder = workspace.lab().join("guest");
    let release = apt::release()?;
    let stamp = format!("{release} {PACKAGES}\n{SCRIPT}");
    let stamp_file = folder.join("debian.stamp");
    if fs::read_to_string(&stamp_file).is_ok_and(|made| made == stamp) {
        return Ok(());
    }
    apt::install(TOOLS)?;
    step("making a Debian disk", || {
        let work = workspace
            .lab()
            .join(format!("debian-{}", std::process::id()));
        for folder in [&work, &folder] {
            fs::create_dir_all(folder).context(|| format!("cannot create {}", folder.display()))?;
        }
        let made = make(&work, &release).and_then(|()| keep(&work, &folder));
        let _ = fs::remove_dir_all(&work);
        made
    })?;
    fs::write(&stamp_file, stamp).context(|| format!("cannot write {}", stamp_file.display()))
}

fn make(work: &Path, release: &str) -> Result<()> {
    let package = apt::download_package("mmdebstrap", work)?;
    let mut unpack = Command::new("dpkg-deb");
    unpack
        .arg("--extract")
        .arg(package)
        .arg(work.join("mmdebstrap"));
    apt::quietly(unpack)?;
    let mut script = apt::as_root("sh")?;
    script
        .args(["-c", SCRIPT, "debian.sh", release, PACKAGES])
        .current_dir(work);
    apt::quietly(script)
}

/// Moves what was made to where guests find it.
fn keep(work: &Path, folder: &Path) -> Result<()> {
    for name in FILES {
        let to = folder.join(name);
        if to.is_dir() {
            let _ = fs::remove_dir_all(&to);
        }
        fs::rename(work.join(name), &to).context(|| format!("cannot make {}", to.display()))?;
    }
    Ok(())
}
