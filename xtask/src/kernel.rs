//! Linux kernels: from a Debian package or a file, to what the lab and its guests boot.
//!
//! A prepared kernel is a folder under `target/lab/kernels` with the bzImage (`vmlinuz`), the ELF image inside it
//! (`vmlinux`), its release, and the modules that were asked for, uncompressed, in the order in which they load.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::apt::{self, Tool};
use crate::error::{Context, Error, Result};
use crate::progress::step;
use crate::workspace::Workspace;

/// Debian's two kernels for amd64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flavour {
    /// The general one, which has KVM for AMD and 9p.
    Amd64,
    /// The small one for virtual machines.
    Cloud,
}

impl Flavour {
    fn metapackage(self) -> &'static str {
        match self {
            Flavour::Amd64 => "linux-image-amd64",
            Flavour::Cloud => "linux-image-cloud-amd64",
        }
    }

    fn folder(self) -> &'static str {
        match self {
            Flavour::Amd64 => "amd64",
            Flavour::Cloud => "cloud",
        }
    }
}

/// A kernel ready to boot.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// What `uname -r` says under it.
    pub(crate) release: String,
    /// The compressed image, as bootloaders load it.
    pub(crate) bzimage: PathBuf,
    /// The ELF image with its PVH entry point.
    pub(crate) elf: PathBuf,
    /// The modules, each after those it depends on.
    pub(crate) modules: Vec<PathBuf>,
}

impl Kernel {
    /// Debian's kernel of this flavour, with these modules and all they depend on.
    pub(crate) fn debian(
        workspace: &Workspace,
        flavour: Flavour,
        modules: &[&str],
    ) -> Result<Self> {
        let kernels = workspace.lab().join("kernels");
        let downloads = kernels.join(format!("{}-package", flavour.folder()));
        let package = match only_package(&downloads) {
            Some(package) => package,
            None => step(&format!("downloading {}", flavour.metapackage()), || {
                apt::download_dependency(flavour.metapackage(), "linux-image-", &downloads)
            })?,
        };
        Self::prepare(&package, &kernels.join(flavour.folder()), modules)
    }

    /// The package of the newest kernel Debian's backports have for this machine's release: younger than what the release came with.
    pub(crate) fn backport(workspace: &Workspace) -> Result<PathBuf> {
        let downloads = workspace.lab().join("kernels").join("backport-package");
        match only_package(&downloads) {
            Some(package) => Ok(package),
            None => step("downloading a kernel from backports", || {
                apt::download_backport(Flavour::Amd64.metapackage(), "linux-image-", &downloads)
            }),
        }
    }

    /// The kernel in `file`: a Debian `linux-image` package, or a bzImage whose modules are installed on this machine or
    /// lie in `lib/modules` beside the image's folder.
    pub(crate) fn from_file(workspace: &Workspace, file: &Path, modules: &[&str]) -> Result<Self> {
        let file = file
            .canonicalize()
            .context(|| format!("kernel {}", file.display()))?;
        let name = file.to_string_lossy().trim_matches('/').replace('/', "_");
        Self::prepare(&file, &workspace.lab().join("kernels").join(name), modules)
    }

    /// Of the modules, those named and what they depend on, in the same order.
    pub(crate) fn modules_for(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        let mut wanted: Vec<String> = names.iter().map(|name| name.replace('-', "_")).collect();
        let mut kept = Vec::new();
        // What a module depends on stands before it.
        for module in self.modules.iter().rev() {
            if wanted.contains(&module_name(module)) {
                let bytes =
                    fs::read(module).context(|| format!("cannot read {}", module.display()))?;
                wanted.extend(dependencies(&bytes));
                kept.push(module.clone());
            }
        }
        kept.reverse();
        Ok(kept)
    }

    fn prepare(source: &Path, folder: &Path, modules: &[&str]) -> Result<Self> {
        let about = fs::metadata(source).context(|| format!("cannot read {}", source.display()))?;
        let stamp = format!(
            "{} {} {:?} {modules:?}",
            source.display(),
            about.len(),
            about.modified().ok()
        );
        let stamp_file = folder.join("stamp");
        if fs::read_to_string(&stamp_file).is_ok_and(|old| old == stamp) {
            return Self::load(folder);
        }
        let name = source
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        step(&format!("unpacking {name}"), || {
            // Everything happens in a folder of this process, so that two commands started at once do not meet.
            let work = folder.with_extension(format!("work-{}", std::process::id()));
            let _ = fs::remove_dir_all(&work);
            fs::create_dir_all(work.join("done"))
                .context(|| format!("cannot create {}", work.display()))?;
            let unpacked = unpack(source, &work, modules);
            if unpacked.is_ok() {
                let _ = fs::remove_dir_all(folder);
                fs::write(work.join("done/stamp"), &stamp).context(|| "cannot write the stamp")?;
                fs::rename(work.join("done"), folder)
                    .context(|| format!("cannot create {}", folder.display()))?;
            }
            let _ = fs::remove_dir_all(&work);
            unpacked
        })?;
        Self::load(folder)
    }

    fn load(folder: &Path) -> Result<Self> {
        let read = |name: &str| {
            fs::read_to_string(folder.join(name))
                .context(|| format!("cannot read {}/{name}", folder.display()))
        };
        Ok(Self {
            release: read("release")?,
            bzimage: folder.join("vmlinuz"),
            elf: folder.join("vmlinux"),
            modules: read("modules")?
                .lines()
                .map(|name| folder.join(name))
                .collect(),
        })
    }
}

/// The `.deb` in `folder`, if it has been downloaded.
fn only_package(folder: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?;
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension() == Some(OsStr::new("deb")))
}

/// Unpacks `source` into `work/done`.
fn unpack(source: &Path, work: &Path, wanted: &[&str]) -> Result<()> {
    let done = work.join("done");
    let (image, module_roots) = if source.extension() == Some(OsStr::new("deb")) {
        let tree = work.join("tree");
        run(Command::new("dpkg-deb")
            .arg("--extract")
            .arg(source)
            .arg(&tree))?;
        let boot = tree.join("boot");
        let image = fs::read_dir(&boot)
            .context(|| format!("{} holds no kernel", source.display()))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| {
                path.file_name()
                    .is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz"))
            })
            .ok_or_else(|| Error::new(format!("{} holds no kernel", source.display())))?;
        (
            image,
            vec![tree.join("lib/modules"), tree.join("usr/lib/modules")],
        )
    } else {
        let beside = source
            .parent()
            .and_then(Path::parent)
            .unwrap_or(Path::new("/"))
            .join("lib/modules");
        (source.to_owned(), vec![beside, "/lib/modules".into()])
    };

    let bytes = fs::read(&image).context(|| format!("cannot read {}", image.display()))?;
    let header = Header::parse(&bytes).context(|| format!("{}", image.display()))?;
    fs::write(done.join("vmlinuz"), &bytes).context(|| "cannot write vmlinuz")?;
    fs::write(done.join("release"), header.release).context(|| "cannot write release")?;
    decompress(header.payload, &work.join("payload"), &done.join("vmlinux"))?;

    let mut names = Vec::new();
    if !wanted.is_empty() {
        let root = module_roots
            .iter()
            .map(|root| root.join(header.release))
            .find(|root| root.is_dir())
            .ok_or_else(|| {
                Error::new(format!(
                    "the modules of {} are neither in {}",
                    header.release,
                    {
                        let places: Vec<_> = module_roots
                            .iter()
                            .map(|root| root.display().to_string())
                            .collect();
                        places.join(" nor in ")
                    }
                ))
            })?;
        let mut files = HashMap::new();
        find_modules(&root, &mut files)?;
        let built_in = fs::read_to_string(root.join("modules.builtin")).unwrap_or_default();
        let built_in: Vec<_> = built_in
            .lines()
            .map(|line| module_name(Path::new(line)))
            .collect();
        for module in wanted {
            add_module(
                &module.replace('-', "_"),
                &files,
                &built_in,
                &done,
                &mut names,
            )?;
        }
    }
    fs::write(done.join("modules"), names.join("\n")).context(|| "cannot write the list of modules")
}

/// The parts of a bzImage's header that matter here (Linux: Documentation/arch/x86/boot.rst).
struct Header<'a> {
    release: &'a str,
    payload: &'a [u8],
}

impl<'a> Header<'a> {
    fn parse(image: &'a [u8]) -> Result<Self> {
        let number = |offset: usize| {
            Some(u32::from_le_bytes(image.get(offset..offset + 4)?.try_into().ok()?) as usize)
        };
        let read = || {
            (image.get(0x202..0x206)? == b"HdrS").then_some(())?;
            let setup_sectors = match image[0x1f1] {
                0 => 4,
                sectors => usize::from(sectors),
            };
            let version = image.get(0x200 + (number(0x20e)? & 0xffff)..)?;
            let release = version.split(|&byte| byte == b' ' || byte == 0).next()?;
            let start = (setup_sectors + 1) * 512 + number(0x248)?;
            let payload = image.get(start..start + number(0x24c)?)?;
            Some(Self {
                release: std::str::from_utf8(release).ok()?,
                payload,
            })
        };
        read().ok_or_else(|| Error::new("not a bzImage"))
    }
}

/// Decompresses a kernel payload with the host's tools.
fn decompress(payload: &[u8], scratch: &Path, elf: &Path) -> Result<()> {
    // All but gzip are followed by four bytes with the uncompressed size, which their tools do not expect.
    let without_size = &payload[..payload.len().saturating_sub(4)];
    let (tool, data) = match payload {
        [0x1f, 0x8b, ..] => (
            Tool {
                program: "gzip",
                package: "gzip",
            },
            payload,
        ),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => (
            Tool {
                program: "xz",
                package: "xz-utils",
            },
            without_size,
        ),
        [0x02, 0x21, 0x4c, 0x18, ..] => (
            Tool {
                program: "lz4",
                package: "lz4",
            },
            without_size,
        ),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => (
            Tool {
                program: "zstd",
                package: "zstd",
            },
            without_size,
        ),
        [0x7f, b'E', b'L', b'F', ..] => {
            return fs::write(elf, payload).context(|| "cannot write vmlinux");
        }
        _ => {
            return Err(Error::new(
                "the kernel is compressed in a way this tool does not know",
            ));
        }
    };
    fs::write(scratch, data).context(|| "cannot write the kernel's payload")?;
    expand(&tool, scratch, elf)
}

/// Expands `from` into the file `to` with `tool -dc`.
fn expand(tool: &Tool, from: &Path, to: &Path) -> Result<()> {
    let program = tool.program;
    apt::install(std::slice::from_ref(tool))?;
    let out = File::create(to).context(|| format!("cannot create {}", to.display()))?;
    run(Command::new(program)
        .arg("-dc")
        .stdin(File::open(from).context(|| "cannot open")?)
        .stdout(out))
}

/// A module's name as in the kernel's own lists: without folders and suffixes, with underscores.
fn module_name(path: &Path) -> String {
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    file.split('.').next().unwrap_or_default().replace('-', "_")
}

fn find_modules(folder: &Path, found: &mut HashMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).context(|| format!("cannot read {}", folder.display()))? {
        let path = entry
            .context(|| format!("cannot read {}", folder.display()))?
            .path();
        if path.is_dir() && !path.is_symlink() {
            find_modules(&path, found)?;
        } else if path.to_string_lossy().contains(".ko") {
            found.insert(module_name(&path), path);
        }
    }
    Ok(())
}

/// Copies `module` into `done` after those it depends on, unless it is there already or part of the kernel.
fn add_module(
    module: &str,
    files: &HashMap<String, PathBuf>,
    built_in: &[String],
    done: &Path,
    names: &mut Vec<String>,
) -> Result<()> {
    let name = format!("{module}.ko");
    if names.contains(&name) {
        return Ok(());
    }
    let Some(file) = files.get(module) else {
        if built_in.iter().any(|built_in| built_in == module) {
            return Ok(());
        }
        return Err(Error::new(format!("the kernel has no module {module}")));
    };
    let copy = done.join(&name);
    match file.extension().and_then(OsStr::to_str) {
        Some("xz") => expand(
            &Tool {
                program: "xz",
                package: "xz-utils",
            },
            file,
            &copy,
        )?,
        Some("zst") => expand(
            &Tool {
                program: "zstd",
                package: "zstd",
            },
            file,
            &copy,
        )?,
        Some("gz") => expand(
            &Tool {
                program: "gzip",
                package: "gzip",
            },
            file,
            &copy,
        )?,
        _ => fs::copy(file, &copy)
            .map(drop)
            .context(|| format!("cannot copy {}", file.display()))?,
    }
    let bytes = fs::read(&copy).context(|| format!("cannot read {}", copy.display()))?;
    for dependency in dependencies(&bytes) {
        add_module(&dependency, files, built_in, done, names)?;
    }
    names.push(name);
    Ok(())
}

/// What a module says it depends on: the value of `depends=` in its `.modinfo` section.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = module[at + KEY.len()..]
        .split(|&byte| byte == 0)
        .next()
        .unwrap_or_default();
    let value = String::from_utf8_lossy(value);
    value
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

fn run(command: &mut Command) -> Result<()> {
    let shown = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stderr(Stdio::piped())
        .spawn()
        .and_then(std::process::Child::wait_with_output);
    let output = output.context(|| format!("cannot run {shown}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::new(format!(
        "{shown} failed: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_from_modinfo() {
        let module = b"\x7fELF..\0license=GPL\0depends=kvm,cc-p\0name=kvm_amd\0";
        assert_eq!(dependencies(module), ["kvm", "cc_p"]);
        assert!(dependencies(b"\0depends=\0").is_empty());
        assert!(dependencies(b"nothing").is_empty());
    }

    #[test]
    fn module_names_have_no_suffix_and_underscores() {
        assert_eq!(
            module_name(Path::new("kernel/arch/x86/kvm/kvm-amd.ko.xz")),
            "kvm_amd"
        );
    }

    #[test]
    fn a_file_that_is_no_kernel_is_refused() {
        assert!(Header::parse(&[0; 0x300]).is_err());
        assert!(Header::parse(b"short").is_err());
    }
}
