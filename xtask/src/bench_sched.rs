//! `cargo xtask bench sched`: the scheduler's benchmarks, which are a crate of their own, on this machine or in the lab.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Context, Error, Result};
use crate::inside;
use crate::kernel::Kernel;
use crate::lab::{Lab, OFFLINE};
use crate::workspace::{Profile, Workspace};

const PAGE: &str = "docs/src/explanation/sched-bench-lab.md";
const IMAGES: &str = "docs/src/images/sched-lab";
/// The last is below the target folder.
const FIGURES: &str = "bench/sched-lab";

/// Builds the benchmarks and runs them on this machine.
pub(crate) fn here(workspace: &Workspace, options: &[String]) -> Result<i32> {
    let program = build(workspace)?;
    let status = Command::new(&program)
        .args(options)
        .current_dir(&workspace.root)
        .status()
        .context(|| format!("{}", program.display()))?;
    Ok(status.code().unwrap_or(1))
}

/// Builds them and runs them in the lab: each experiment in one of its own, so that what is measured is kept if a later one fails. The
/// kernel is `kernel`, or that of Debian's backports.
pub(crate) fn in_lab(
    workspace: &Workspace,
    kernel: Option<PathBuf>,
    options: &[String],
) -> Result<i32> {
    let program = build(workspace)?;
    let (experiments, book, options) = understand(workspace, &program, options)?;
    let lab = Lab {
        // Whoever asks for it: Linux 6.12.95 divides by zero (`inactive_task_timer`) when a CPU goes, 6.1 does not.
        environment: std::env::var(OFFLINE)
            .map(|value| (OFFLINE.into(), value))
            .into_iter()
            .collect(),
        kernel: Some(match kernel {
            Some(file) => file,
            None => Kernel::backport(workspace)?,
        }),
        profile: Profile::Release,
        ..Lab::default()
    };
    let out = format!("sched-{}", std::process::id());
    let folder = Scratch(workspace.lab().join("out").join(&out));
    fs::create_dir_all(&folder.0).context(|| format!("cannot create {}", folder.0.display()))?;
    let page = workspace.root.join(PAGE);
    let inside = inside::in_lab(workspace, &program)
        .ok_or_else(|| Error::new(format!("{} is not below target", program.display())))?;
    for experiment in experiments {
        fs::copy(&page, folder.0.join("page.md")).context(|| format!("{}", page.display()))?;
        let mut command = vec![inside.clone(), "--only".into(), experiment];
        command.extend(options.iter().cloned());
        for (option, file) in [("--out", "json"), ("--images", "svg")] {
            command.extend([option.to_owned(), format!("/out/{out}/{file}")]);
        }
        if book {
            command.extend([
                "--book".into(),
                "--page".into(),
                format!("/out/{out}/page.md"),
            ]);
        }
        let status = lab.run(workspace, &command)?;
        if status != 0 {
            return Ok(status);
        }
        copy_files(&folder.0.join("json"), &workspace.target.join(FIGURES))?;
        if book {
            copy_files(&folder.0.join("svg"), &workspace.root.join(IMAGES))?;
            fs::copy(folder.0.join("page.md"), &page).context(|| format!("{}", page.display()))?;
        }
    }
    Ok(0)
}

/// In one step with what every lab has, since cargo would build softmshv anew for another set of packages.
fn build(workspace: &Workspace) -> Result<PathBuf> {
    for arguments in [
        "--package sched-bench --package rota --package softmshv",
        "--package scheduler --example plan",
    ] {
        let mut command = workspace.cargo();
        command
            .args(["build", "--release"])
            .args(arguments.split(' '));
        let status = command.status().context(|| "cannot start cargo")?;
        if !status.success() {
            return Err(Error::new("the benchmarks do not build (see above)"));
        }
    }
    Ok(workspace
        .target
        .join(Profile::Release.folder())
        .join("sched-bench"))
}

/// Which experiments are meant, whether the book is, and the other options.
fn understand(
    workspace: &Workspace,
    program: &Path,
    options: &[String],
) -> Result<(Vec<String>, bool, Vec<String>)> {
    let (only, book, others) = sort(options);
    let listed = Command::new(program)
        .args(&only)
        .arg("--list")
        .current_dir(&workspace.root)
        .output()
        .context(|| format!("{}", program.display()))?;
    if !listed.status.success() {
        let said = String::from_utf8_lossy(&listed.stderr);
        return Err(Error::new(said.trim().trim_start_matches("error: ")));
    }
    let names = String::from_utf8_lossy(&listed.stdout);
    let names = names
        .lines()
        .filter_map(|line| line.split_whitespace().next());
    Ok((names.map(str::to_owned).collect(), book, others))
}

/// `--only` with its value, whether there is `--book`, and the rest.
fn sort(options: &[String]) -> (Vec<String>, bool, Vec<String>) {
    let (mut only, mut book, mut others) = (Vec::new(), false, Vec::new());
    let mut options = options.iter();
    while let Some(option) = options.next() {
        match option.as_str() {
            "--only" => only.extend([option].into_iter().chain(options.next()).cloned()),
            "--book" => book = true,
            one if one.starts_with("--only=") => only.push(option.clone()),
            _ => others.push(option.clone()),
        }
    }
    (only, book, others)
}

fn copy_files(from: &Path, to: &Path) -> Result<()> {
    let copy = || -> std::io::Result<()> {
        fs::create_dir_all(to)?;
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
        Ok(())
    };
    copy().context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

/// A folder that goes with this.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::sort;

    #[test]
    fn what_is_for_whom() {
        let words = |text: &str| -> Vec<String> { text.split(' ').map(str::to_owned).collect() };
        let sorted = sort(&words("--runs 2 --only B2,B3 --book --only=B4 --seconds 1"));
        assert_eq!(
            sorted,
            (
                words("--only B2,B3 --only=B4"),
                true,
                words("--runs 2 --seconds 1")
            )
        );
    }
}
