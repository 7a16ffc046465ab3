//! The lab's root file system: an initramfs with busybox, the kernel modules, the shared libraries of the programs that
//! run in the lab, and the command itself. Built anew for each run, which takes a few milliseconds.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::BufWriter;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::apt;
use crate::cpio::Archive;
use crate::error::{Context, Error, Result};
use crate::inside::steady;
use crate::kernel::Kernel;
use crate::shared_libraries;

/// The modules the lab loads: KVM, virtio for its ports and shared folders, and what guests' networks are made of.
pub(super) const MODULES: &[&str] = &[
    "kvm-amd",
    "virtio-pci",
    "virtio-console",
    "9pnet-virtio",
    "9p",
    "tun",
    "vhost-net",
];

/// A file or folder of the host that the lab sees.
#[derive(Clone, Debug)]
pub(crate) struct Addition {
    /// Where it is on the host.
    pub(crate) from: PathBuf,
    /// Where it is in the lab.
    pub(crate) to: String,
}

impl std::str::FromStr for Addition {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (from, to) = match text.split_once('=') {
            Some((from, to)) => (Path::new(from), to.to_owned()),
            None => (Path::new(text), String::new()),
        };
        let from = from
            .canonicalize()
            .map_err(|error| format!("{}: {error}", from.display()))?;
        let name = from
            .file_name()
            .ok_or_else(|| format!("{text} has no file name"))?
            .to_string_lossy()
            .into_owned();
        let to = if to.is_empty() {
            format!("/add/{name}")
        } else {
            to
        };
        Ok(Self { from, to })
    }
}

/// What goes into the root file system.
pub(super) struct Root<'a> {
    pub(super) kernel: &'a Kernel,
    pub(super) command: &'a [String],
    pub(super) additions: &'a [Addition],
    pub(super) environment: &'a [(String, String)],
    /// Programs below `/target` whose shared libraries are needed.
    pub(super) programs: Vec<PathBuf>,
    /// This executable, as the lab sees it.
    pub(super) xtask: Option<String>,
    /// The folder below `/target` with the built binaries.
    pub(super) profile: &'a str,
    /// Whether system calls will be counted.
    pub(super) syscalls: bool,
    /// Settings for the terminal (`stty`), if the command gets one.
    pub(super) terminal: Option<String>,
}

impl Root<'_> {
    /// Writes the archive to `path`.
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let busybox = apt::find("busybox")
            .ok_or_else(|| Error::new("busybox is missing (Debian package busybox-static)"))?;
        let file = File::create(path).context(|| format!("cannot create {}", path.display()))?;
        let mut archive = Archive::new(BufWriter::new(file));
        self.fill(&mut archive, &busybox)
            .and_then(|()| archive.finish())
            .context(|| format!("cannot write {}", path.display()))?;
        Ok(())
    }

    fn fill(&self, archive: &mut Archive<BufWriter<File>>, busybox: &Path) -> std::io::Result<()> {
        for folder in [
            "bin", "dev", "proc", "sys", "tmp", "run", "root", "target", "out", "add", "lab",
        ] {
            archive.directory(folder)?;
        }
        archive.character_device("dev/console", 5, 1)?;
        archive.file("init", 0o755, include_bytes!("init.sh"))?;
        archive.file("bin/busybox", 0o755, &fs::read(busybox)?)?;
        archive.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n")?;
        archive.file("etc/group", 0o644, b"root:x:0:\n")?;
        archive.file("etc/hosts", 0o644, b"127.0.0.1 localhost lab\n")?;
        archive.symlink("guest", "target/lab/guest")?;

        archive.modules(&self.kernel.modules)?;

        archive.file("lab/command", 0o644, self.script().as_bytes())?;
        if let Some(xtask) = &self.xtask {
            archive.symlink("lab/xtask", xtask)?;
        }
        if self.syscalls {
            archive.file(steady::SYSCALLS, 0o644, b"")?;
        }
        if let Some(settings) = &self.terminal {
            archive.file("lab/terminal", 0o644, settings.as_bytes())?;
        }

        let added = self
            .additions
            .iter()
            .map(|addition| addition.from.as_path());
        for library in
            shared_libraries::needed_by(self.programs.iter().map(PathBuf::as_path).chain(added))
        {
            archive.file(&library.to_string_lossy(), 0o755, &fs::read(&library)?)?;
        }
        for addition in self.additions {
            add(archive, &addition.from, &addition.to)?;
        }
        Ok(())
    }

    /// The shell script that becomes the command.
    fn script(&self) -> String {
        let mut script = format!(
            "export PATH=/target/{}:/add:/bin HOME=/root LD_LIBRARY_PATH=/add ROTA_LAB=1\n",
            self.profile
        );
        let inherited = std::env::vars().filter(|(name, _)| {
            let chosen =
                ["TERM", "NO_COLOR", "RUST_LOG", "RUST_BACKTRACE"].contains(&name.as_str());
            chosen || (name.starts_with("ROTA_") && name != "ROTA_LAB")
        });
        for (name, value) in inherited.chain(self.environment.iter().cloned()) {
            let _ = writeln!(script, "export {name}={}", quoted(&value));
        }
        script.push_str("cd /\nexec");
        for word in self.command {
            script.push(' ');
            script.push_str(&quoted(word));
        }
        script.push('\n');
        script
    }
}

fn add(archive: &mut Archive<BufWriter<File>>, from: &Path, to: &str) -> std::io::Result<()> {
    let about = fs::metadata(from)?;
    if !about.is_dir() {
        return archive.file(to, about.permissions().mode() & 0o777, &fs::read(from)?);
    }
    archive.directory(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        add(
            archive,
            &entry.path(),
            &format!("{to}/{}", entry.file_name().to_string_lossy()),
        )?;
    }
    Ok(())
}

/// `word` as the shell reads it back unchanged.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoting_survives_quotes_and_spaces() {
        assert_eq!(quoted("a b"), "'a b'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }

    #[test]
    fn an_addition_lands_in_add_unless_told_otherwise() {
        assert_eq!(
            "/bin/sh".parse::<Addition>().unwrap().to.split('/').nth(1),
            Some("add")
        );
        assert_eq!("/bin/sh=/x/y".parse::<Addition>().unwrap().to, "/x/y");
        assert!("/does/not/exist".parse::<Addition>().is_err());
    }
}
