//! What guests boot: Debian's kernels and a small initramfs, in `target/lab/guest`, which is `/guest` in the lab.
//!
//! | file | what |
//! |---|---|
//! | `vmlinuz-cloud`, `vmlinuz-amd64` | Debian's bzImages |
//! | `vmlinux-cloud`, `vmlinux-amd64` | the ELF images inside them, with a PVH entry point |
//! | `initramfs.cpio` | busybox and an init that reports and then obeys `rota.then=` |

use std::fs;
use std::path::Path;

use crate::apt;
use crate::cpio::Archive;
use crate::error::{Context, Error, Result};
use crate::kernel::{Flavour, Kernel};
use crate::workspace::Workspace;

/// What a guest's init prints first.
pub(crate) const MARKER: &str = "ROTA-GUEST-INIT";

/// Makes the guest images if they are not there or older than what they are made of.
pub(crate) fn prepare(workspace: &Workspace) -> Result<()> {
    let folder = workspace.lab().join("guest");
    fs::create_dir_all(&folder).context(|| format!("cannot create {}", folder.display()))?;
    for (flavour, name) in [(Flavour::Cloud, "cloud"), (Flavour::Amd64, "amd64")] {
        let kernel = Kernel::debian(workspace, flavour, crate::lab::modules_of(flavour))?;
        link(&kernel.bzimage, &folder.join(format!("vmlinuz-{name}")))?;
        link(&kernel.elf, &folder.join(format!("vmlinux-{name}")))?;
    }
    let wanted = initramfs().context(|| "cannot make the guests' initramfs")?;
    let file = folder.join("initramfs.cpio");
    if fs::read(&file).is_ok_and(|existing| existing == wanted) {
        return Ok(());
    }
    let work = folder.join(format!("initramfs.{}", std::process::id()));
    fs::write(&work, wanted)
        .and_then(|()| fs::rename(&work, &file))
        .context(|| format!("cannot write {}", file.display()))
}

/// Gives a prepared kernel a second name in `/guest`. Symbolic links would point out of what the lab can see.
fn link(from: &Path, to: &Path) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let inode = |path: &Path| fs::metadata(path).ok().map(|about| about.ino());
    if inode(from).is_some() && inode(from) == inode(to) {
        return Ok(());
    }
    let _ = fs::remove_file(to);
    fs::hard_link(from, to).context(|| format!("cannot link {}", to.display()))
}

/// The initramfs: not compressed, because a guest in the lab unpacks slower than it reads.
fn initramfs() -> Result<Vec<u8>> {
    let busybox = apt::find("busybox")
        .ok_or_else(|| Error::new("busybox is missing (Debian package busybox-static)"))?;
    let busybox = fs::read(&busybox).context(|| format!("cannot read {}", busybox.display()))?;
    let fill = || {
        let mut archive = Archive::new(Vec::new());
        for folder in ["bin", "dev", "proc", "sys"] {
            archive.directory(folder)?;
        }
        archive.character_device("dev/console", 5, 1)?;
        archive.file("init", 0o755, include_bytes!("init.sh"))?;
        archive.file("bin/busybox", 0o755, &busybox)?;
        archive.finish()
    };
    fill().context(|| "cannot write the archive")
}
