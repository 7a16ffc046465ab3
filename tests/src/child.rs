//! `rota run` as a process: where its binaries and guests are, what it prints, how it ends.
//!
//! | variable | what | if not set |
//! |---|---|---|
//! | `ROTA_GUEST_DIR` | kernels and the initramfs (`vmlinuz-cloud`, `vmlinux-cloud`, `initramfs.cpio`, `initramfs-devices.cpio`) | `/guest` |
//! | `ROTA_BIN` | the VMM | `rota` beside the test's folder, else on the `PATH` |
//! | `SOFTMSHV_BIN` | the launcher that provides a `/dev/mshv` where there is none | `softmshv`, likewise |
//! | `ROTA_BOOT_TIMEOUT` | seconds a boot may take | 120 |

use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use crate::requires;

/// What the guests' first process prints, followed by processors, memory in kB, kernel, hypervisor.
pub const MARKER: &str = "ROTA-GUEST-INIT";

/// Where this machine's guests are.
#[must_use]
pub fn guest(file: &str) -> PathBuf {
    PathBuf::from(std::env::var_os("ROTA_GUEST_DIR").unwrap_or_else(|| "/guest".into())).join(file)
}

/// A built program: by environment variable, beside the test, or on the path.
fn program(variable: &str, name: &str) -> OsString {
    if let Some(given) = std::env::var_os(variable) {
        return given;
    }
    let built = std::env::current_exe()
        .ok()
        .and_then(|test| Some(test.parent()?.parent()?.join(name)));
    built
        .filter(|path| path.exists())
        .map_or_else(|| name.into(), PathBuf::into_os_string)
}

/// Whether `/dev/mshv` is there without help.
#[must_use]
pub fn real_device() -> bool {
    Path::new("/dev/mshv").exists()
}

/// `rota` (under the launcher where there is no device), with nothing else on its command line yet.
#[must_use]
pub fn rota() -> Command {
    let rota = program("ROTA_BIN", "rota");
    if real_device() {
        return Command::new(rota);
    }
    let mut command = Command::new(program("SOFTMSHV_BIN", "softmshv"));
    command.arg("--").arg(rota);
    command
}

/// `command` under the launcher with these options, on a machine without a device.
#[must_use]
pub fn under_softmshv(options: &[&str], command: impl Into<OsString>) -> Command {
    let mut launcher = Command::new(program("SOFTMSHV_BIN", "softmshv"));
    launcher.args(options).arg("--").arg(command.into());
    launcher
}

/// The path of `rota`.
#[must_use]
pub fn rota_program() -> OsString {
    program("ROTA_BIN", "rota")
}

/// softmshv is built, and can work here.
///
/// # Errors
/// What is missing.
pub fn softmshv() -> Result<(), String> {
    let mut found = Ok(());
    if real_device() {
        found = Err("a real /dev/mshv is in the way".into());
    } else if let Err(error) = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        found = Err(format!("/dev/kvm: {error}"));
    } else if under_softmshv(&[], "true")
        .output()
        .map_or(true, |output| !output.status.success())
    {
        found = Err("softmshv is not built".into());
    }
    requires::demanded("softmshv", found)
}

/// `rota` alone, without a launcher.
#[must_use]
pub fn bare_rota() -> Command {
    Command::new(program("ROTA_BIN", "rota"))
}

/// The programs are built.
///
/// # Errors
/// What is missing.
pub fn programs() -> Result<(), String> {
    let version = |command: &mut Command| {
        command
            .arg("--version")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok()
    };
    let mut found = Ok(());
    if !version(&mut bare_rota()) {
        found = Err("rota is not built".into());
    } else if !real_device() && !version(&mut Command::new(program("SOFTMSHV_BIN", "softmshv"))) {
        found = Err("no /dev/mshv, and softmshv is not built".into());
    }
    requires::demanded("programs", found)
}

/// Guest images are here, and a device that runs whole kernels: the real one, or softmshv in the lab.
///
/// # Errors
/// What is missing.
pub fn bootable() -> Result<(), String> {
    programs()?;
    let mut found = Ok(());
    if !guest("vmlinuz-cloud").exists() {
        found = Err(format!(
            "no guest kernel {}",
            guest("vmlinuz-cloud").display()
        ));
    } else if !real_device() && std::env::var_os("ROTA_LAB").is_none() {
        found = Err("whole kernels need the real device or the lab".into());
    }
    requires::demanded("boot", found)
}

/// Tap interfaces can be made.
///
/// # Errors
/// Why not.
pub fn tap_interfaces() -> Result<(), String> {
    openable("/dev/net/tun")
}

/// The kernel works on the queues of network devices.
///
/// # Errors
/// Why not.
pub fn vhost_net() -> Result<(), String> {
    openable("/dev/vhost-net")
}

fn openable(path: &str) -> Result<(), String> {
    fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map(drop)
        .map_err(|error| format!("{path}: {error}"))
}

/// The longest time a guest may take to do what a test waits for.
#[must_use]
pub fn patience() -> Duration {
    let seconds = std::env::var("ROTA_BOOT_TIMEOUT")
        .ok()
        .and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(120))
}

/// A started VMM whose output is collected line by line.
#[derive(Debug)]
pub struct Vmm {
    child: Child,
    stdin: Option<ChildStdin>,
    /// Pieces of the two streams, by their number.
    pieces: Receiver<(usize, Vec<u8>)>,
    /// What each stream's last line has so far.
    begun: [Vec<u8>; 2],
    /// Everything read so far, standard output and error mixed.
    pub output: Vec<String>,
    /// How many of these lines have been waited for.
    seen: usize,
}

impl Vmm {
    /// Starts `command` in a process group of its own.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn start(command: &mut Command) -> Vmm {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        let mut child = command
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let (sender, pieces) = mpsc::channel();
        let streams: [Box<dyn Read + Send>; 2] = [
            Box::new(child.stdout.take().expect("stdout")),
            Box::new(child.stderr.take().expect("stderr")),
        ];
        for (number, mut stream) in streams.into_iter().enumerate() {
            let sender = sender.clone();
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(count @ 1..) = stream.read(&mut buffer) {
                    let _ = sender.send((number, buffer[..count].to_vec()));
                }
            });
        }
        let stdin = child.stdin.take();
        Vmm {
            child,
            stdin,
            pieces,
            begun: Default::default(),
            output: Vec::new(),
            seen: 0,
        }
    }

    /// Waits for more output, until `deadline`, and adds the lines that it completes.
    fn read(&mut self, deadline: Instant) -> Result<(), RecvTimeoutError> {
        let left = deadline.saturating_duration_since(Instant::now());
        match self.pieces.recv_timeout(left) {
            Ok((number, piece)) => {
                self.add(number, &piece);
                Ok(())
            }
            Err(why) => {
                if why == RecvTimeoutError::Disconnected {
                    for number in 0..self.begun.len() {
                        if !self.begun[number].is_empty() {
                            self.add(number, b"\n");
                        }
                    }
                }
                Err(why)
            }
        }
    }

    fn add(&mut self, number: usize, piece: &[u8]) {
        let begun = &mut self.begun[number];
        for part in piece.split_inclusive(|byte| *byte == b'\n') {
            begun.extend_from_slice(part);
            if part.ends_with(b"\n") {
                let line = String::from_utf8_lossy(begun).trim_end().to_owned();
                begun.clear();
                self.output.push(line);
            }
        }
    }

    /// The next line of the output that nobody has waited for yet.
    fn next_line(&mut self, deadline: Instant) -> Result<String, RecvTimeoutError> {
        loop {
            if let Some(line) = self.output.get(self.seen) {
                self.seen += 1;
                return Ok(line.clone());
            }
            match self.read(deadline) {
                Err(why) if self.seen == self.output.len() => return Err(why),
                _ => {}
            }
        }
    }

    /// `rota run` with the cloud kernel as a bzImage, the initramfs, and these further arguments.
    #[must_use]
    pub fn boot(cmdline: &str, arguments: &[&str]) -> Vmm {
        Vmm::boot_kernel("vmlinuz-cloud", cmdline, arguments)
    }

    /// `rota run` with a kernel of the guest folder.
    #[must_use]
    pub fn boot_kernel(kernel: &str, cmdline: &str, arguments: &[&str]) -> Vmm {
        Vmm::start(run(rota(), kernel, cmdline).args(arguments))
    }

    /// `rota run` with the cloud kernel and the initramfs that has drivers, up to the guest's shell.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn boot_with_drivers(arguments: &[&str]) -> Vmm {
        let mut command = run_with(
            rota(),
            "vmlinuz-cloud",
            "initramfs-devices.cpio",
            "rota.then=shell",
        );
        let mut vmm = Vmm::start(command.args(arguments));
        vmm.wait_for_init();
        vmm
    }

    /// `rota run` with the cloud kernel and the root file system on the disk that `disk` describes.
    #[must_use]
    pub fn boot_from_disk(disk: &str, arguments: &[&str]) -> Vmm {
        let mut command = run_with(
            rota(),
            "vmlinuz-cloud",
            "initramfs-root.cpio",
            "rota.then=root",
        );
        Vmm::start(command.args(["--disk", disk]).args(arguments))
    }

    /// Waits in the guest until `condition` is true, for the guest's shell.
    ///
    /// # Panics
    /// When it is not `within` that time.
    pub fn guest_waits_until(&mut self, condition: &str, within: Duration) {
        let tries = within.as_secs() * 10;
        self.guest_runs(&format!(
            "for i in $(seq {tries}); do {condition} && break; sleep 0.1; done; {condition}"
        ));
    }

    /// Has the guest's shell run `command`, and returns the last line of what it prints.
    ///
    /// # Panics
    /// When the command does not end, or fails.
    pub fn guest_runs(&mut self, command: &str) -> String {
        // In two parts, or the echo of what is typed would be taken for the answer.
        self.type_in(&format!("{command}; echo ROTA-\"\"STATUS $?\n"));
        let line = self.wait_for("ROTA-STATUS");
        assert!(
            line.ends_with("ROTA-STATUS 0"),
            "{command}: {line}; printed:\n{}",
            self.printed()
        );
        let last = self.seen.checked_sub(2);
        last.and_then(|last| self.output.get(last))
            .cloned()
            .unwrap_or_default()
    }

    /// Reads until a line contains `text`, and returns it.
    ///
    /// # Panics
    /// When the output ends before, or [`patience`] does; with what was printed.
    pub fn wait_for(&mut self, text: &str) -> String {
        self.wait_longer_for(text, patience())
    }

    /// The same for what takes longer.
    ///
    /// # Panics
    /// As there.
    pub fn wait_longer_for(&mut self, text: &str, patience: Duration) -> String {
        let deadline = Instant::now() + patience;
        loop {
            match self.next_line(deadline) {
                Ok(line) if line.contains(text) => return line,
                Ok(_) => {}
                Err(why) => panic!(
                    "no line with {text:?} ({why}); printed:\n{}",
                    self.printed()
                ),
            }
        }
    }

    /// Reads until the guest's console stands behind `prompt`, in a line that has not ended.
    ///
    /// # Panics
    /// When it does not come before [`patience`] ends; with what was printed.
    pub fn wait_for_prompt(&mut self, prompt: &str) {
        let deadline = Instant::now() + patience();
        while !self.begun[0].ends_with(prompt.as_bytes()) {
            if let Err(why) = self.read(deadline) {
                panic!(
                    "no prompt {prompt:?} ({why}); printed:\n{}\n{}",
                    self.printed(),
                    String::from_utf8_lossy(&self.begun[0])
                );
            }
        }
        self.seen = self.output.len();
    }

    /// Waits for the guest's init and returns its report.
    ///
    /// # Panics
    /// When it does not come or is not to be understood.
    pub fn wait_for_init(&mut self) -> Report {
        let line = self.wait_for(MARKER);
        Report::parse(&line).unwrap_or_else(|| panic!("no report: {line:?}"))
    }

    /// Types on the guest's console.
    ///
    /// # Panics
    /// When the VMM is gone.
    pub fn type_in(&mut self, text: &str) {
        let stdin = self.stdin.as_mut().expect("standard input");
        stdin
            .write_all(text.as_bytes())
            .and_then(|()| stdin.flush())
            .expect("typing");
    }

    /// The process that is the VMM: the launcher's child, or the child itself when the launcher became it.
    ///
    /// # Panics
    /// When it is gone.
    #[must_use]
    pub fn pid(&self) -> i32 {
        let own = self.child.id() as i32;
        let children =
            std::fs::read_to_string(format!("/proc/{own}/task/{own}/children")).unwrap_or_default();
        children
            .split_whitespace()
            .next()
            .and_then(|pid| pid.parse().ok())
            .unwrap_or(own)
    }

    /// The process group of everything this started.
    #[must_use]
    pub fn group(&self) -> i32 {
        self.child.id() as i32
    }

    /// Sends a signal to the VMM.
    pub fn signal(&self, signal: i32) {
        // SAFETY: no pointer is involved; the process is this test's child or grandchild and is not yet waited for.
        let sent = unsafe { libc::kill(self.pid(), signal) };
        assert_eq!(sent, 0, "signal {signal}");
    }

    /// Waits for the end and returns the exit status; the rest of the output is in [`Vmm::output`].
    ///
    /// # Panics
    /// When it does not end in time.
    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + patience();
        loop {
            if let Some(status) = self.child.try_wait().expect("wait") {
                while self
                    .read(Instant::now() + Duration::from_millis(500))
                    .is_ok()
                {}
                return status;
            }
            let _ = self.read(Instant::now());
            assert!(
                Instant::now() < deadline,
                "it does not end; printed:\n{}",
                self.printed()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Everything printed so far.
    #[must_use]
    pub fn printed(&self) -> String {
        self.output.join("\n")
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // SAFETY: no pointer is involved; the group was made for this child.
            unsafe { libc::kill(-self.group(), libc::SIGKILL) };
            let _ = self.child.wait();
        }
    }
}

/// A process that serves a test, as long as it is needed.
pub struct Background(Child);

impl Background {
    /// Starts `command`, which is not listened to; `None` where there is no such program.
    #[must_use]
    pub fn start(command: &mut Command) -> Option<Self> {
        let command = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command.spawn().ok().map(Self)
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// virtiofsd, which serves `folder` at `socket`; `None` where there is none.
#[must_use]
pub fn virtiofsd(folder: &str, socket: &str) -> Option<Background> {
    Background::start(
        Command::new("virtiofsd")
            .arg(format!("--socket-path={socket}"))
            .args(["-o", &format!("source={folder},sandbox=chroot,cache=none")]),
    )
}

/// Adds `run` with a kernel, the initramfs and a command line on the first serial port.
#[must_use]
pub fn run(command: Command, kernel: &str, cmdline: &str) -> Command {
    run_with(command, kernel, "initramfs.cpio", cmdline)
}

fn run_with(mut command: Command, kernel: &str, initramfs: &str, cmdline: &str) -> Command {
    command
        .arg("run")
        .arg("--kernel")
        .arg(guest(kernel))
        .arg("--initramfs")
        .arg(guest(initramfs));
    command
        .arg("--cmdline")
        .arg(format!("console=ttyS0 quiet {cmdline}"));
    command
}

/// What the guest says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Processors it sees.
    pub cpus: u32,
    /// Memory it has, in bytes.
    pub memory: u64,
    /// Its kernel's release.
    pub kernel: String,
    /// The hypervisor it detected.
    pub hypervisor: String,
}

impl Report {
    fn parse(line: &str) -> Option<Report> {
        let mut words = line.split(MARKER).nth(1)?.split_whitespace();
        let cpus = words.next()?.parse().ok()?;
        let memory = words.next()?.parse::<u64>().ok()? * 1024;
        let kernel = words.next()?.to_string();
        Some(Report {
            cpus,
            memory,
            kernel,
            hypervisor: words.collect::<Vec<_>>().join(" "),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read_from_a_console_line() {
        let report = Report::parse(
            "[    1.0] ROTA-GUEST-INIT 2 500000 6.1.0-39-cloud-amd64 Microsoft Hyper-V",
        )
        .unwrap();
        assert_eq!((report.cpus, report.memory), (2, 512_000_000));
        assert_eq!(
            (report.kernel.as_str(), report.hypervisor.as_str()),
            ("6.1.0-39-cloud-amd64", "Microsoft Hyper-V")
        );
        assert_eq!(Report::parse("ROTA-GUEST-INIT two"), None);
        assert_eq!(Report::parse("nothing of the kind"), None);
    }
}
