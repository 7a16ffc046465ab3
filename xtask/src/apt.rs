//! Gets what a step needs from Debian, by package name.
//!
//! Tools are installed; kernels, and what is needed once, are only downloaded (the machine's own boot files stay as they are). Nothing is asked of
//! the network when what is needed is already there.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{Context, Error, Result};
use crate::progress::step;

/// A program a step needs and the Debian package that has it.
pub(crate) struct Tool {
    /// The program, as found on `PATH`.
    pub(crate) program: &'static str,
    /// The Debian package.
    pub(crate) package: &'static str,
}

/// Makes sure every tool is there, installing the packages of those that are not.
pub(crate) fn install(tools: &[Tool]) -> Result<()> {
    let missing = |tool: &&Tool| find(tool.program).is_none();
    let wanted: Vec<_> = tools.iter().filter(missing).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let packages: Vec<_> = wanted.iter().map(|tool| tool.package).collect();
    let list = packages.join(" ");
    let name = format!("installing {list}");
    step(&name, || {
        let mut arguments = vec!["install", "--yes", "--no-install-recommends"];
        arguments.extend(&packages);
        let first = apt_get(&arguments);
        if first.is_err() {
            apt_get(&["update"]).and_then(|()| apt_get(&arguments))
        } else {
            first
        }
    })
    .context(|| format!("these Debian packages are missing and could not be installed: {list}"))?;
    match tools.iter().find(missing) {
        Some(tool) => Err(Error::new(format!(
            "package {} is installed, but `{}` is not on PATH",
            tool.package, tool.program
        ))),
        None => Ok(()),
    }
}

/// Downloads the package that the metapackage `meta` depends on (or the newest matching one) into `folder`.
///
/// `prefix` is how the dependency's name starts.
pub(crate) fn download_dependency(meta: &str, prefix: &str, folder: &Path) -> Result<PathBuf> {
    let package = match dependency(meta, prefix, &[])? {
        Some(package) => package,
        None => {
            apt_get(&["update"])?;
            dependency(meta, prefix, &[])?.ok_or_else(|| {
                Error::new(format!(
                    "Debian package {meta} is not known to apt (is this Debian amd64?)"
                ))
            })?
        }
    };
    download_package(&package, folder)
}

/// Downloads `package` into `folder`.
pub(crate) fn download_package(package: &str, folder: &Path) -> Result<PathBuf> {
    std::fs::create_dir_all(folder).context(|| format!("cannot create {}", folder.display()))?;
    if download(package, folder, &[]).is_err() {
        apt_get(&["update"])?;
        download(package, folder, &[])
            .context(|| format!("Debian package {package} could not be downloaded"))?;
    }
    downloaded(package, folder)
}

/// The name of this machine's Debian release, as in `bookworm`.
pub(crate) fn release() -> Result<String> {
    let about = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    about
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(str::to_owned)
        .ok_or_else(|| Error::new("/etc/os-release does not say which Debian this is"))
}

/// What [`download_dependency`] does, from Debian's backports, which this machine's own sources and package lists need not know and do not get to know.
pub(crate) fn download_backport(meta: &str, prefix: &str, folder: &Path) -> Result<PathBuf> {
    let codename = release()?;
    let apt = folder.join("apt");
    for part in ["lists/partial", "cache/archives/partial"] {
        let part = apt.join(part);
        std::fs::create_dir_all(&part).context(|| format!("cannot create {}", part.display()))?;
    }
    let sources = apt.join("sources.list");
    let source = format!(
        "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian {codename}-backports main\n"
    );
    std::fs::write(&sources, source).context(|| format!("cannot write {}", sources.display()))?;
    let options = [
        format!("-oDir::Etc::SourceList={}", sources.display()),
        "-oDir::Etc::SourceParts=/dev/null".into(),
        format!("-oDir::State::Lists={}", apt.join("lists").display()),
        format!("-oDir::Cache={}", apt.join("cache").display()),
    ];
    let mut update = Command::new("apt-get");
    update.args(&options).arg("update");
    quietly(update)?;
    let package = dependency(meta, prefix, &options)?.ok_or_else(|| {
        Error::new(format!(
            "{codename}-backports has no {meta}; name a kernel with --kernel"
        ))
    })?;
    download(&package, folder, &options)?;
    downloaded(&package, folder)
}

fn downloaded(package: &str, folder: &Path) -> Result<PathBuf> {
    let entries =
        std::fs::read_dir(folder).context(|| format!("cannot read {}", folder.display()))?;
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .ok_or_else(|| {
            Error::new(format!(
                "apt-get download {package} left no .deb in {}",
                folder.display()
            ))
        })
}

/// Where `program` is, looking through `PATH` and the system folders that a user's `PATH` may lack.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|folder| folder.join(program))
        .find(|candidate| candidate.is_file())
}

fn dependency(meta: &str, prefix: &str, options: &[String]) -> Result<Option<String>> {
    let output = Command::new("apt-cache")
        .args(options)
        .args(["depends", meta])
        .stderr(Stdio::null())
        .output()
        .context(|| "cannot run apt-cache; the lab needs Debian's apt")?;
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|package| package.starts_with(prefix))
        .map(str::to_owned))
}

fn download(package: &str, folder: &Path, options: &[String]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command
        .args(options)
        .args(["download", package])
        .current_dir(folder);
    quietly(command)
}

fn apt_get(arguments: &[&str]) -> Result<()> {
    let mut command =
        as_root("env").context(|| format!("as root, run: apt-get {}", arguments.join(" ")))?;
    command
        .arg("DEBIAN_FRONTEND=noninteractive")
        .arg("apt-get")
        .args(arguments);
    quietly(command)
}

/// `program`, run by root: directly or through `sudo`.
pub(crate) fn as_root(program: &str) -> Result<Command> {
    // SAFETY: geteuid only reads the caller's credentials and cannot fail.
    if unsafe { libc::geteuid() } == 0 {
        return Ok(Command::new(program));
    }
    if find("sudo").is_none() {
        return Err(Error::new("neither root nor sudo here"));
    }
    let mut command = Command::new("sudo");
    command.arg(program);
    Ok(command)
}

/// Runs a command and shows its output only if it fails.
pub(crate) fn quietly(mut command: Command) -> Result<()> {
    let shown = format!("{command:?}").replace('"', "");
    let output = command
        .stdin(Stdio::null())
        .output()
        .context(|| format!("cannot run {shown}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::new(format!("{shown} failed:\n{}", said.trim_end())))
}
