//! What guests boot: Debian's kernels and a small initramfs, in `target/lab/guest`, which is `/guest` in the lab.
//!
//! | file | what |
//! |---|---|
//! | `vmlinuz-cloud`, `vmlinuz-amd64` | Debian's bzImages |
//! | `vmlinux-cloud`, `vmlinux-amd64` | the ELF images inside them, with a PVH entry point |
//! | `initramfs.cpio` | busybox and an init that reports and then obeys `rota.then=` |
//! | `initramfs-devices.cpio` | the same, with the cloud kernel's drivers for virtio and the power button, loaded before the shell |
//! | `initramfs-root.cpio` | the same, with those that a root file system on a disk takes |
//! | `debian.raw`, `debian.qcow2` | such a disk ([`debian`], made when it is needed) |
//! | `iperf3/` | that program of Debian's with its libraries, for the lab |

pub(crate) mod debian;

use std::fs;
use std::path::{Path, PathBuf};

use crate::apt;
use crate::cpio::Archive;
use crate::error::{Context, Error, Result};
use crate::kernel::{Flavour, Kernel};
use crate::workspace::Workspace;

/// What a guest's init prints first.
pub(crate) const MARKER: &str = "ROTA-GUEST-INIT";

/// The drivers in `initramfs-devices.cpio`.
pub(crate) const DRIVERS: &[&str] = &[
    "virtio-pci",
    "virtio-rng",
    "virtio-blk",
    "virtio-net",
    "virtio-console",
    "virtio-balloon",
    "virtio-mem",
    "virtio-pmem",
    "nd-pmem",
    "vmw-vsock-virtio-transport",
    "virtiofs",
    "pvpanic-pci",
    "button",
    "evdev",
];

/// The drivers in `initramfs-root.cpio`; `crc32c-generic` is what the file system's checksums are made by, which it does not say.
pub(crate) const ROOT_DRIVERS: &[&str] = &[
    "virtio-pci",
    "virtio-blk",
    "virtio-net",
    "virtio-rng",
    "crc32c-generic",
    "ext4",
    "button",
    "evdev",
];

/// Makes the guest images if they are not there or older than what they are made of.
pub(crate) fn prepare(workspace: &Workspace) -> Result<()> {
    let folder = workspace.lab().join("guest");
    fs::create_dir_all(&folder).context(|| format!("cannot create {}", folder.display()))?;
    let kernel = |flavour, name: &str| -> Result<Kernel> {
        let kernel = Kernel::debian(workspace, flavour, &crate::lab::modules_of(flavour))?;
        link(&kernel.bzimage, &folder.join(format!("vmlinuz-{name}")))?;
        link(&kernel.elf, &folder.join(format!("vmlinux-{name}")))?;
        Ok(kernel)
    };
    let cloud = kernel(Flavour::Cloud, "cloud")?;
    kernel(Flavour::Amd64, "amd64")?;
    let write = |name, drivers: &[PathBuf]| write(&folder, name, drivers);
    write("initramfs.cpio", &[])?;
    write("initramfs-devices.cpio", &cloud.modules_for(DRIVERS)?)?;
    write("initramfs-root.cpio", &cloud.modules_for(ROOT_DRIVERS)?)
}

/// Writes the initramfs `name` with these modules, if it is not there already.
fn write(folder: &Path, name: &str, modules: &[PathBuf]) -> Result<()> {
    let wanted = initramfs(modules).context(|| format!("cannot make {name}"))?;
    let file = folder.join(name);
    if fs::read(&file).is_ok_and(|existing| existing == wanted) {
        return Ok(());
    }
    let work = folder.join(format!("{name}.{}", std::process::id()));
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
fn initramfs(modules: &[PathBuf]) -> Result<Vec<u8>> {
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
        if !modules.is_empty() {
            archive.modules(modules)?;
        }
        archive.finish()
    };
    fill().context(|| "cannot write the archive")
}
