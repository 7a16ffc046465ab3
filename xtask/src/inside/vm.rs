//! Runs one virtual machine over softmshv and watches it: its console as it comes, when its init spoke, what passed
//! through `/dev/mshv`, and how much memory the VMM used.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use serde::Deserialize;

use super::memory;
use crate::error::{Context, Error, Result};
use crate::guest::MARKER;

/// The longest time a VMM may take to end once its guest has ended, or it was told to.
const END_TIMEOUT: Duration = Duration::from_secs(60);

/// What to run.
#[derive(Clone, Debug)]
pub(crate) struct Vm {
    /// Its name, for messages and file names.
    pub(crate) name: String,
    /// The VMM with all its arguments, as run under softmshv.
    pub(crate) command: Vec<String>,
    /// The guest's memory, to tell it from the VMM's.
    pub(crate) memory_mib: u64,
    /// How something is written into its console.
    pub(crate) input: Input,
}

/// What a VMM's standard input is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Input {
    /// Nothing comes.
    Nothing,
    /// A pipe.
    Pipe,
    /// A terminal; cloud-hypervisor listens to nothing else.
    Terminal,
}

/// A VM that runs.
pub(crate) struct Running {
    vm: Vm,
    child: Child,
    started: Instant,
    trace: PathBuf,
    /// The guest's keyboard, if it has one.
    pub(crate) keyboard: Option<File>,
}

/// A piece of news from a VM.
pub(crate) enum News {
    /// Some bytes of its console.
    Console(Vec<u8>),
    /// Its init runs.
    Init(AtInit),
    /// A line that the VMM wrote to standard error.
    Message(String),
    /// Its console is closed; the VMM ends.
    Closed,
}

/// What was seen when the guest's init spoke.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AtInit {
    /// Since the process was started.
    pub(crate) after: Duration,
    /// The VMM's memory beside the guest's.
    pub(crate) vmm_overhead_kib: Option<u64>,
}

/// What softmshv counted.
#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct Trace {
    /// Calls by ioctl.
    #[serde(default)]
    pub(crate) ioctls: BTreeMap<String, u64>,
    /// Exits to the VMM by intercept type.
    #[serde(default)]
    pub(crate) intercepts: BTreeMap<String, u64>,
    /// What the VMM asked for that softmshv does not have.
    #[serde(default)]
    pub(crate) unimplemented: BTreeMap<String, u64>,
}

impl Trace {
    /// All ioctls.
    pub(crate) fn ioctl_count(&self) -> u64 {
        self.ioctls.values().sum()
    }

    /// All exits.
    pub(crate) fn exit_count(&self) -> u64 {
        self.intercepts.values().sum()
    }
}

impl Vm {
    /// Starts it; `tell` gets the news, from threads of this function's own.
    pub(crate) fn start(self, tell: impl Fn(News) + Send + Clone + 'static) -> Result<Running> {
        let trace = PathBuf::from(format!("/tmp/{}-trace.json", self.name));
        let _ = fs::remove_file(&trace);
        let mut command = Command::new("softmshv");
        command
            .arg("--trace")
            .arg(&trace)
            .arg("--")
            .args(&self.command);
        let mut keyboard = None;
        command.stdin(match self.input {
            Input::Nothing => Stdio::null(),
            Input::Pipe => Stdio::piped(),
            Input::Terminal => {
                let (ours, its) = terminal().context(|| "cannot make a terminal")?;
                keyboard = Some(ours);
                its.into()
            }
        });
        let started = Instant::now();
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context(|| format!("cannot start softmshv {}", self.command.join(" ")))?;
        let console = child.stdout.take().ok_or_else(|| Error::new("no pipe"))?;
        let messages = child.stderr.take().ok_or_else(|| Error::new("no pipe"))?;
        let watch = Watch {
            pid: child.id(),
            guest_kib: self.memory_mib << 10,
            started,
        };
        let tell_messages = tell.clone();
        thread::spawn(move || watch.console(console, tell));
        thread::spawn(move || {
            for line in io::BufRead::lines(io::BufReader::new(messages)).map_while(io::Result::ok) {
                tell_messages(News::Message(line));
            }
        });
        let pipe = child.stdin.take();
        let keyboard = keyboard.or_else(|| pipe.map(|pipe| File::from(OwnedFd::from(pipe))));
        Ok(Running {
            vm: self,
            child,
            started,
            trace,
            keyboard,
        })
    }
}

impl Running {
    /// Asks the VMM to end.
    pub(crate) fn terminate(&self) {
        // SAFETY: the child has not been waited for, so the process id is its own.
        unsafe { libc::kill(self.child.id().cast_signed(), libc::SIGTERM) };
    }

    /// The VMM's process: softmshv has become it.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What was counted until about a second ago.
    pub(crate) fn trace_so_far(&self) -> Result<Trace> {
        let text = fs::read(&self.trace)
            .context(|| format!("{}: softmshv left no trace", self.vm.name))?;
        serde_json::from_slice(&text).context(|| format!("{}: softmshv's trace", self.vm.name))
    }

    /// Waits for its end and reads what was counted.
    pub(crate) fn finish(mut self) -> Result<Trace> {
        let name = &self.vm.name;
        let asked = Instant::now();
        let status = loop {
            let ended = self
                .child
                .try_wait()
                .context(|| format!("{name}: cannot wait for the VMM"))?;
            match ended {
                Some(status) => break status,
                None if asked.elapsed() > END_TIMEOUT => {
                    return Err(Error::new(format!(
                        "{name}: the VMM did not end within {END_TIMEOUT:?}"
                    )));
                }
                None => thread::sleep(Duration::from_millis(10)),
            }
        };
        if !status.success() {
            let after = self.started.elapsed().as_secs_f64();
            return Err(Error::new(format!(
                "{name}: the VMM ended with {status} after {after:.1} s"
            )));
        }
        let trace = self.trace_so_far()?;
        for (what, count) in &trace.unimplemented {
            eprintln!("{name}: softmshv does not have {what} (asked for {count} times)");
        }
        Ok(trace)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Starts `vm`, waits until its init speaks, ends it, and returns what was seen.
pub(crate) fn to_init(vm: Vm, limit: Duration) -> Result<(AtInit, Trace)> {
    let name = vm.name.clone();
    let (sender, receiver) = mpsc::channel();
    let running = vm.start(move |news| {
        let _ = sender.send(news);
    })?;
    let deadline = Instant::now() + limit;
    let mut said = String::new();
    loop {
        match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(News::Init(at)) => {
                running.terminate();
                return Ok((at, running.finish()?));
            }
            Ok(News::Console(bytes)) => said.push_str(&String::from_utf8_lossy(&bytes)),
            Ok(News::Message(line)) => said.push_str(&format!("{line}\n")),
            Ok(News::Closed) => {
                return Err(Error::new(format!(
                    "{name} ended before its init ran; it said:\n{said}"
                )));
            }
            Err(_) => {
                return Err(Error::new(format!(
                    "{name} did not reach its init within {limit:?}; it said:\n{said}"
                )));
            }
        }
    }
}

/// A terminal that changes nothing that is typed: the end to type at, and the VMM's.
fn terminal() -> io::Result<(File, File)> {
    let (mut ours, mut its): (RawFd, RawFd) = (-1, -1);
    // SAFETY: zeroes are a valid value of these numbers.
    let mut settings: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: both write to the structure they are given.
    unsafe {
        libc::cfmakeraw(&raw mut settings);
        libc::cfsetspeed(&raw mut settings, libc::B115200);
    }
    settings.c_cflag |= libc::CREAD;
    // SAFETY: writes the two descriptors and reads the settings; no name and no size are asked for.
    let made = unsafe {
        libc::openpty(
            &raw mut ours,
            &raw mut its,
            std::ptr::null_mut(),
            &raw const settings,
            std::ptr::null(),
        )
    };
    if made != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just made them, and nobody else knows them.
    let ends = unsafe { (File::from_raw_fd(ours), File::from_raw_fd(its)) };
    // SAFETY: no pointer is involved. The VMM must not hold the end that is typed at.
    if unsafe { libc::fcntl(ours, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(ends)
}

struct Watch {
    pid: u32,
    guest_kib: u64,
    started: Instant,
}

impl Watch {
    fn console(self, mut console: impl Read, tell: impl Fn(News)) {
        let mut buffer = [0; 4096];
        // The end of what was seen, in which a marker that comes in pieces may begin.
        let mut tail = Vec::new();
        let mut waiting = true;
        while let Ok(count @ 1..) = console.read(&mut buffer) {
            let piece = &buffer[..count];
            if waiting {
                tail.extend_from_slice(piece);
                if tail
                    .windows(MARKER.len())
                    .any(|window| window == MARKER.as_bytes())
                {
                    waiting = false;
                    let after = self.started.elapsed();
                    let vmm_overhead_kib = memory::beside_guest_kib(self.pid, self.guest_kib);
                    tell(News::Init(AtInit {
                        after,
                        vmm_overhead_kib,
                    }));
                }
                tail.drain(..tail.len().saturating_sub(MARKER.len()));
            }
            tell(News::Console(piece.to_vec()));
        }
        tell(News::Closed);
    }
}

/// The arguments of `rota run` for a guest of this size.
pub(crate) fn rota(
    program: &str,
    files: &GuestFiles,
    cpus: u32,
    memory_mib: u64,
    cmdline: &str,
) -> Vec<String> {
    let mut command = common(program, files, cpus, memory_mib, cmdline);
    command.insert(1, "run".into());
    command
}

/// The arguments of cloud-hypervisor for the same guest.
pub(crate) fn cloud_hypervisor(
    program: &str,
    files: &GuestFiles,
    cpus: u32,
    memory_mib: u64,
    cmdline: &str,
) -> Vec<String> {
    let mut command = common(program, files, cpus, memory_mib, cmdline);
    // Its system call filter knows its own calls, not those that softmshv makes beneath it.
    command.extend(["--console", "off", "--seccomp", "false"].map(String::from));
    command
}

fn common(
    program: &str,
    files: &GuestFiles,
    cpus: u32,
    memory_mib: u64,
    cmdline: &str,
) -> Vec<String> {
    [
        program,
        "--kernel",
        &files.kernel,
        "--initramfs",
        &files.initramfs,
        "--cmdline",
        cmdline,
        "--cpus",
        &format!("boot={cpus}"),
        "--memory",
        &format!("size={memory_mib}M"),
        "--serial",
        "tty",
    ]
    .map(String::from)
    .into()
}

/// What a guest boots, as paths in the lab.
#[derive(Clone, Debug)]
pub(crate) struct GuestFiles {
    /// The kernel.
    pub(crate) kernel: String,
    /// The initramfs.
    pub(crate) initramfs: String,
}
