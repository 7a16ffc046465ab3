//! Back ends of vhost-user that others wrote, as the tests start and end them.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use vmm_sys_util::tempdir::TempDir;

/// A program that runs until this is dropped.
pub(crate) struct Program(pub(crate) Child);

impl Program {
    /// Starts it.
    pub(crate) fn start(command: &mut Command) -> Self {
        Self(command.spawn().expect("a program that starts"))
    }

    /// Ends it at once.
    pub(crate) fn kill(&mut self) {
        self.0.kill().expect("a program that runs");
        self.0.wait().expect("its end");
    }

    /// Sends it the signal of this name.
    pub(crate) fn signal(&self, name: &str) {
        let sent = Command::new("kill")
            .arg(format!("-{name}"))
            .arg(self.0.id().to_string())
            .status();
        assert!(sent.expect("kill").success());
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Where one of `paths` is, if this host has it; else says that `test` is skipped.
pub(crate) fn find(test: &str, paths: &[&str]) -> Option<PathBuf> {
    let found = paths.iter().map(Path::new).find(|path| path.exists());
    if found.is_none() {
        eprintln!("SKIP {test}: there is no {}", paths.join(" and no "));
    }
    found.map(Path::to_owned)
}

/// A folder that is removed at the end.
pub(crate) fn folder() -> TempDir {
    TempDir::new_with_prefix("/tmp/rota-vhost-user-").expect("a folder")
}

/// A command that says nothing on its own.
pub(crate) fn quiet(program: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

/// Waits until `is_so`.
#[track_caller]
pub(crate) fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is_so() {
        assert!(Instant::now() < deadline, "not within ten seconds: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}
