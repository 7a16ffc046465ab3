//! The lab: a Linux machine under QEMU in which `/dev/kvm` can run whole guests, on any host.
//!
//! ```text
//! this process ── sockets ── QEMU (TCG, emulating AMD SVM) ── Debian kernel, kvm-amd, cgroup v2
//!      │                                                          │
//!   target/ ───────────── shared, read only ───────────────── /target, /guest
//!   target/lab/out ────── shared ──────────────────────────── /out
//! ```

mod machine;
mod root;

use std::fs;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::apt::{self, Tool};
use crate::error::{Context, Result};
use crate::guest;
use crate::inside;
use crate::kernel::{Flavour, Kernel};
use crate::workspace::{Profile, Workspace};

use machine::Machine;
pub(crate) use root::Addition;
use root::Root;

const TOOLS: &[Tool] = &[
    Tool {
        program: "qemu-system-x86_64",
        package: "qemu-system-x86",
    },
    Tool {
        program: "busybox",
        package: "busybox-static",
    },
];

/// The modules that Debian's kernel of this flavour is unpacked with.
pub(crate) fn modules_of(flavour: Flavour) -> Vec<&'static str> {
    match flavour {
        Flavour::Amd64 => root::MODULES.into(),
        Flavour::Cloud => [guest::DRIVERS, guest::ROOT_DRIVERS].concat(),
    }
}

/// The environment variable that is set where a CPU may go offline.
pub(crate) const OFFLINE: &str = "ROTA_TEST_OFFLINE";

/// One run in the lab.
#[derive(Clone, Debug)]
pub(crate) struct Lab {
    /// The number of processors.
    pub(crate) cpus: u32,
    /// The amount of memory, as QEMU takes it (`4G`).
    pub(crate) memory: String,
    /// Another kernel than Debian's current one.
    pub(crate) kernel: Option<PathBuf>,
    /// Files of the host to have inside.
    pub(crate) additions: Vec<Addition>,
    /// How long the run may take.
    pub(crate) timeout: Option<Duration>,
    /// Whether to show the kernel's console on standard error.
    pub(crate) verbose: bool,
    /// Which build is on the lab's `PATH`.
    pub(crate) profile: Profile,
    /// Whether the command may have this process's terminal.
    pub(crate) terminal: bool,
    /// Environment variables of the command.
    pub(crate) environment: Vec<(String, String)>,
    /// Whether the command counts system calls.
    pub(crate) syscalls: bool,
}

impl Default for Lab {
    fn default() -> Self {
        Self {
            cpus: 2,
            memory: "3G".into(),
            kernel: None,
            additions: Vec::new(),
            timeout: None,
            verbose: false,
            profile: Profile::Dev,
            terminal: false,
            environment: Vec::new(),
            syscalls: false,
        }
    }
}

impl Lab {
    /// Gets everything that the lab needs and that is not there yet.
    pub(crate) fn prepare(&self, workspace: &Workspace) -> Result<Kernel> {
        apt::install(TOOLS)?;
        guest::prepare(workspace)?;
        match &self.kernel {
            Some(file) => Kernel::from_file(workspace, file, root::MODULES),
            None => Kernel::debian(workspace, Flavour::Amd64, &modules_of(Flavour::Amd64)),
        }
    }

    /// Boots the lab, runs `command` in it, and returns its exit status.
    pub(crate) fn run(&self, workspace: &Workspace, command: &[String]) -> Result<i32> {
        let kernel = self.prepare(workspace)?;
        let scratch = Scratch::new(&workspace.lab())?;
        let out = workspace.lab().join("out");
        fs::create_dir_all(&out).context(|| format!("cannot create {}", out.display()))?;

        let terminal =
            self.terminal && std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
        let built = workspace.target.join(self.profile.folder());
        let mut programs: Vec<_> = ["rota", "softmshv", "libsoftmshv.so"]
            .iter()
            .map(|name| built.join(name))
            .collect();
        programs.extend(std::env::current_exe().ok());
        let root = scratch.0.join("root.cpio");
        Root {
            kernel: &kernel,
            command,
            additions: &self.additions,
            environment: &self.environment,
            programs,
            xtask: inside::executable(workspace).ok(),
            profile: self.profile.folder(),
            syscalls: self.syscalls,
            terminal: terminal.then(terminal_settings),
        }
        .write(&root)?;

        Machine {
            kernel: &kernel.elf,
            root: &root,
            cpus: self.cpus,
            memory: &self.memory,
            target: &workspace.target,
            out: &out,
            terminal,
            verbose: self.verbose,
            timeout: self.timeout,
            scratch: &scratch.0,
        }
        .run()
    }
}

/// A folder for one run, removed at its end. Those of runs that were killed are removed by the next.
struct Scratch(PathBuf);

impl Scratch {
    fn new(lab: &Path) -> Result<Self> {
        let runs = lab.join("run");
        for entry in fs::read_dir(&runs).into_iter().flatten().flatten() {
            let process = Path::new("/proc").join(entry.file_name());
            if !process.exists() {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        let folder = runs.join(std::process::id().to_string());
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).context(|| format!("cannot create {}", folder.display()))?;
        Ok(Self(folder))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The size of this process's terminal, in the words of `stty`.
fn terminal_settings() -> String {
    let size = Command::new("stty")
        .arg("size")
        .stdin(Stdio::inherit())
        .output();
    let size = size
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default();
    match size.split_whitespace().collect::<Vec<_>>()[..] {
        [rows, columns] => format!("rows {rows} cols {columns}"),
        _ => "rows 24 cols 80".into(),
    }
}
