//! Where things are: the checkout, cargo's target folder, and the lab's cache in it.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Context, Error, Result};

/// Which build of Rota to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Profile {
    /// Quick to build.
    Dev,
    /// Quick to run.
    Release,
}

impl Profile {
    /// The folder below `target/`.
    pub(crate) fn folder(self) -> &'static str {
        match self {
            Profile::Dev => "debug",
            Profile::Release => "release",
        }
    }
}

/// The folders of this checkout.
#[derive(Clone, Debug)]
pub(crate) struct Workspace {
    /// The root of the checkout.
    pub(crate) root: PathBuf,
    /// Cargo's target folder.
    pub(crate) target: PathBuf,
}

impl Workspace {
    /// The checkout this command was built from.
    pub(crate) fn find() -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .expect("xtask is a folder of the workspace")
            .to_owned();
        let target = match std::env::var_os("CARGO_TARGET_DIR") {
            Some(folder) => root.join(folder),
            None => root.join("target"),
        };
        std::fs::create_dir_all(target.join("lab"))
            .context(|| format!("cannot create {}/lab", target.display()))?;
        Ok(Self { root, target })
    }

    /// The lab's cache.
    pub(crate) fn lab(&self) -> PathBuf {
        self.target.join("lab")
    }

    /// A cargo command that runs in the checkout.
    pub(crate) fn cargo(&self) -> Command {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.current_dir(&self.root);
        command
    }

    /// Builds what the lab runs: `rota`, `softmshv` and its library.
    pub(crate) fn build(&self, profile: Profile) -> Result<()> {
        let mut command = self.cargo();
        command.args(["build", "--package", "rota", "--package", "softmshv"]);
        if profile == Profile::Release {
            command.arg("--release");
        }
        let status = command.status().context(|| "cannot start cargo")?;
        if !status.success() {
            return Err(Error::new("rota and softmshv do not build (see above)"));
        }
        Ok(())
    }
}
