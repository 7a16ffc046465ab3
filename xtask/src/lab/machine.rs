//! The lab's machine: QEMU without acceleration, emulating an AMD processor with SVM and nested paging, and the channels
//! between it and this process.
//!
//! The channels are virtio-serial ports behind Unix sockets: `stdin`, `stdout` and `stderr` of the command, and `status`,
//! on which the lab says how the command ended. The kernel's console is a channel of its own, so that it never mixes with
//! the command's output.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::error::{Context, Error, Result};

/// What the machine is made of.
pub(super) struct Machine<'a> {
    pub(super) kernel: &'a Path,
    pub(super) root: &'a Path,
    pub(super) cpus: u32,
    pub(super) memory: &'a str,
    /// The host folder that is `/target`.
    pub(super) target: &'a Path,
    /// The host folder that is `/out`.
    pub(super) out: &'a Path,
    /// Whether the command gets this process's terminal.
    pub(super) terminal: bool,
    /// Whether to show the kernel's console.
    pub(super) verbose: bool,
    pub(super) timeout: Option<Duration>,
    /// A folder for this run's sockets and logs.
    pub(super) scratch: &'a Path,
}

/// The processor time that a machine may use before it says that it has booted: many times what it takes.
const BOOT_PATIENCE: Patience = Patience {
    worked: Duration::from_secs(90),
    waited: Duration::from_secs(600),
};
/// A machine that lives says so every two seconds, however busy it is; one that works and says nothing has stopped.
const SILENCE: Patience = Patience {
    worked: Duration::from_secs(60),
    waited: Duration::from_secs(300),
};
/// How often to start a machine that stops.
const ATTEMPTS: u32 = 5;

/// What QEMU gets to end by itself: one that hangs altogether would never.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// What the machine's kernel has to say.
const CONSOLE_LOG: &str = "console.log";
/// What QEMU itself has to say.
const QEMU_LOG: &str = "qemu.log";

impl Machine<'_> {
    /// Boots the machine, runs the command, and returns its exit status. A machine that stops is started again.
    pub(super) fn run(&self) -> Result<i32> {
        for _ in 1..ATTEMPTS {
            if let Some(status) = self.attempt()? {
                return Ok(status);
            }
            eprintln!("lab: the emulated machine has stopped; starting it again");
        }
        self.attempt()?.ok_or_else(|| {
            let console = last_lines(&self.scratch.join(CONSOLE_LOG), 15);
            Error::new(format!(
                "the lab's machine stopped {ATTEMPTS} times; its console said last:\n{console}"
            ))
        })
    }

    /// Boots the machine and runs the command; no status when the machine stopped.
    fn attempt(&self) -> Result<Option<i32>> {
        let console = self.scratch.join(CONSOLE_LOG);
        let channels = Channels::listen(self.scratch)?;
        let mut qemu = Qemu(self.start(&console)?);
        let started = Instant::now();

        let (sender, receiver) = mpsc::channel();
        let status = channels.status.accept_in_thread(sender.clone());
        let mut pumps = Vec::new();
        if !self.terminal {
            pumps.push(channels.stdout.pump_to(io::stdout()));
            pumps.push(channels.stderr.pump_to(io::stderr()));
            channels.stdin.feed_from_stdin();
        }
        if self.verbose {
            follow(&console);
        }

        let mut silence = Silence::begin(&qemu, BOOT_PATIENCE);
        let mut has_booted = false;
        let told = loop {
            match receiver.recv_timeout(Duration::from_millis(50)) {
                Ok(Said::Alive) => {
                    has_booted = true;
                    silence = Silence::begin(&qemu, SILENCE);
                }
                Ok(said) => break said,
                Err(_) if silence.is_too_long(&qemu) => {
                    qemu.end();
                    return Ok(None);
                }
                Err(_) => {}
            }
            if let Some(end) = qemu.0.try_wait().context(|| "cannot wait for QEMU")? {
                // The last word may still be on its way from a machine that has powered itself off.
                break receiver
                    .recv_timeout(Duration::from_secs(1))
                    .unwrap_or(Said::Nothing(end.to_string()));
            }
            if self
                .timeout
                .is_some_and(|timeout| started.elapsed() > timeout)
            {
                qemu.end();
                eprintln!(
                    "lab: the command did not end within {:?}",
                    self.timeout.unwrap_or_default()
                );
                return Ok(Some(124));
            }
        };
        drop(status);
        match told {
            Said::Exit(code) => {
                // The machine has nothing to lose: its root is memory, and /out is written through.
                qemu.end();
                for pump in pumps {
                    let _ = pump.join();
                }
                Ok(Some(code))
            }
            // Said on the way, and no end.
            Said::Alive => Ok(None),
            // A processor that the emulation has led astray resets the machine.
            Said::Nothing(_) if has_booted => {
                eprintln!(
                    "lab: the emulated machine has reset itself; its console said last:\n{}",
                    last_lines(&console, 15)
                );
                Ok(None)
            }
            Said::Nothing(end) => Err(Error::new(format!(
                "the lab's machine ended before the command did (QEMU {end}); its console said last:\n{}\n{}",
                last_lines(&console, 15),
                last_lines(&self.scratch.join(QEMU_LOG), 5)
            ))),
        }
    }

    fn start(&self, console: &Path) -> Result<Child> {
        let mut command = Command::new("qemu-system-x86_64");
        let socket = |name: &str| {
            format!(
                "socket,id={name},path={}",
                self.scratch.join(name).display()
            )
        };
        let share = |path: &Path, tag: &str, options: &str| {
            format!(
                "local,path={},mount_tag={tag},security_model=none,multidevs=remap{options}",
                path.display()
            )
        };
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-machine", "q35", "-accel", "tcg,thread=multi"])
            // Five-level paging would only make every nested walk longer. A guest-physical space of 64 GiB is plenty, and
            // some KVMs keep two bytes for each page that a memory slot covers. QEMU 7.2 lets a nested guest set XCR0 past
            // KVM, which then describes another XSAVE area than the guest uses: better none.
            .args(["-cpu", "max,la57=off,phys-bits=36,xsave=off,erms=off,fsrm=off"])
            .args(["-smp", &self.cpus.to_string(), "-m", self.memory])
            .arg("-kernel")
            .arg(self.kernel)
            .arg("-initrd")
            .arg(self.root)
            // TCG's time stamp counters agree between processors, which Linux cannot know by itself; with that said, KVM
            // keeps one clock for all guests, as on hardware.
            // On a busy host the timer can come too late for the kernel's check, which then panics.
            // One processor at first: the others come when the kernel no longer rewrites its code (see `inside::steady`).
            .args(["-append", "console=ttyS0 panic=-1 maxcpus=1 noreplace-smp tsc=reliable no_timer_check mitigations=off nokaslr random.trust_cpu=on quiet loglevel=5"])
            .args(["-serial", &format!("file:{}", console.display())])
            .args(["-device", "virtio-serial-pci"])
            .args(["-chardev", &socket("status"), "-device", "virtserialport,chardev=status,name=status"])
            .args(["-virtfs", &share(self.target, "target", ",readonly=on")])
            .args(["-virtfs", &share(self.out, "out", "")]);
        if self.terminal {
            command.args([
                "-chardev",
                "stdio,id=terminal,signal=off",
                "-device",
                "virtconsole,chardev=terminal",
            ]);
        } else {
            for name in ["stdin", "stdout", "stderr"] {
                command.args(["-chardev", &socket(name)]);
                command.args([
                    "-device",
                    &format!("virtserialport,chardev={name},name={name}"),
                ]);
            }
            command.stdin(Stdio::null()).stdout(Stdio::null());
        }
        let log = self.scratch.join(QEMU_LOG);
        command.stderr(File::create(&log).context(|| format!("cannot create {}", log.display()))?);
        // SAFETY: prctl is async-signal-safe and changes only the child, which must not outlive this process.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        command
            .spawn()
            .context(|| "cannot start qemu-system-x86_64 (Debian package qemu-system-x86)")
    }
}

/// How long a machine may say nothing. On a host that is busy with other things time passes in which the machine does not
/// run; a stopped one spins. So the time it has worked counts first, and the clock's only for one that does nothing at all.
#[derive(Clone, Copy)]
struct Patience {
    worked: Duration,
    waited: Duration,
}

/// The time since a machine said something.
struct Silence {
    patience: Patience,
    since: Instant,
    /// What the machine had worked then.
    worked: Duration,
}

impl Silence {
    fn begin(qemu: &Qemu, patience: Patience) -> Self {
        Self {
            patience,
            since: Instant::now(),
            worked: qemu.worked(),
        }
    }

    fn is_too_long(&self, qemu: &Qemu) -> bool {
        self.since.elapsed() > self.patience.waited
            || qemu.worked().saturating_sub(self.worked) > self.patience.worked
    }
}

/// QEMU, ended when this goes out of scope.
struct Qemu(Child);

impl Qemu {
    /// The processor time that QEMU has used; none if it has ended.
    fn worked(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap_or_default();
        // SAFETY: no pointer is involved.
        let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
        Duration::from_secs(ticks(&stat)) / u32::try_from(per_second).unwrap_or(100).max(1)
    }

    fn end(&mut self) {
        self.end_within(END_TIMEOUT);
    }

    /// Ends it, by force if it has not ended `patience` after it was told to.
    fn end_within(&mut self, patience: Duration) {
        // SIGTERM rather than SIGKILL: QEMU then gives the terminal back as it was.
        // SAFETY: the child has not been waited for, so the process id is still its own.
        unsafe { libc::kill(self.0.id().cast_signed(), libc::SIGTERM) };
        let asked = Instant::now();
        while matches!(self.0.try_wait(), Ok(None)) {
            if asked.elapsed() > patience {
                let _ = self.0.kill();
                let _ = self.0.wait();
                return;
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            self.end();
        }
    }
}

/// What the machine says of itself.
enum Said {
    /// It has booted, or still runs.
    Alive,
    /// The command has ended with this status.
    Exit(i32),
    /// It has stopped without a word; QEMU's own end.
    Nothing(String),
}

/// A socket on which QEMU will call.
struct Channel(UnixListener);

struct Channels {
    stdin: Channel,
    stdout: Channel,
    stderr: Channel,
    status: Channel,
}

impl Channels {
    fn listen(folder: &Path) -> Result<Self> {
        let listen = |name: &str| {
            let path = folder.join(name);
            // An earlier attempt's.
            let _ = fs::remove_file(&path);
            UnixListener::bind(&path)
                .map(Channel)
                .context(|| format!("cannot listen on {}", path.display()))
        };
        Ok(Self {
            stdin: listen("stdin")?,
            stdout: listen("stdout")?,
            stderr: listen("stderr")?,
            status: listen("status")?,
        })
    }
}

impl Channel {
    fn accept(&self) -> io::Result<UnixStream> {
        self.0.accept().map(|(stream, _)| stream)
    }

    fn accept_in_thread(self, told: mpsc::Sender<Said>) -> JoinHandle<()> {
        thread::spawn(move || {
            let Ok(stream) = self.accept() else { return };
            for line in BufReader::new(stream).lines().map_while(io::Result::ok) {
                let said = match line.strip_prefix("exit ") {
                    Some(code) => code.trim().parse().map(Said::Exit).ok(),
                    None => ["up", "alive"]
                        .contains(&line.as_str())
                        .then_some(Said::Alive),
                };
                if said.is_some_and(|said| told.send(said).is_err()) {
                    return;
                }
            }
        })
    }

    fn pump_to(self, mut to: impl Write + Send + 'static) -> JoinHandle<()> {
        thread::spawn(move || {
            let Ok(mut stream) = self.accept() else {
                return;
            };
            let mut buffer = vec![0; 64 << 10];
            while let Ok(count @ 1..) = stream.read(&mut buffer) {
                let _ = to.write_all(&buffer[..count]).and_then(|()| to.flush());
            }
        })
    }

    fn feed_from_stdin(self) {
        thread::spawn(move || {
            let Ok(mut stream) = self.accept() else {
                return;
            };
            let _ = io::copy(&mut io::stdin(), &mut stream);
            let _ = stream.shutdown(Shutdown::Write);
            // The socket stays open: QEMU takes a closed one for a vanished peer.
            thread::sleep(Duration::MAX);
        });
    }
}

/// Copies the console's log to standard error as it grows.
fn follow(console: &Path) {
    let path: PathBuf = console.to_owned();
    thread::spawn(move || {
        let started = Instant::now();
        let mut log = loop {
            match File::open(&path) {
                Ok(log) => break log,
                Err(_) if started.elapsed() < BOOT_PATIENCE.waited => {
                    thread::sleep(Duration::from_millis(50));
                }
                Err(_) => return,
            }
        };
        loop {
            if io::copy(&mut log, &mut io::stderr()).is_err() {
                return;
            }
            thread::sleep(Duration::from_millis(50));
        }
    });
}

/// User and system time in `/proc/…/stat`, whose second field is a name in parentheses that may hold anything.
fn ticks(stat: &str) -> u64 {
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let times = after_name.split_whitespace().skip(11).take(2);
    times.filter_map(|time| time.parse::<u64>().ok()).sum()
}

fn last_lines(file: &Path, count: usize) -> String {
    let text = fs::read(file)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_without_the_processor_is_not_held_against_a_machine() {
        let sleeping = Qemu(Command::new("sleep").arg("60").spawn().unwrap());
        let spinning = Qemu(
            Command::new("sh")
                .args(["-c", "while :; do :; done"])
                .spawn()
                .unwrap(),
        );
        let patience = Patience {
            worked: Duration::from_millis(50),
            waited: Duration::from_secs(60),
        };
        let silences = [&sleeping, &spinning].map(|qemu| Silence::begin(qemu, patience));
        let began = Instant::now();
        while !silences[1].is_too_long(&spinning) {
            assert!(began.elapsed() < patience.waited);
            thread::sleep(Duration::from_millis(5));
        }
        assert!(spinning.worked() > patience.worked);
        assert!(!silences[0].is_too_long(&sleeping));
    }

    #[test]
    fn processor_time_is_user_and_system_time() {
        let stat = "42 (qemu) x (1)) S 1 42 42 0 -1 4194560 9 8 7 6 1000 234 5 4 20 0 3 0 99";
        assert_eq!(ticks(stat), 1234);
        assert_eq!(ticks(""), 0);
    }

    #[test]
    fn a_machine_that_does_not_listen_is_ended_too() {
        let mut command = Command::new("sh");
        command.args([
            "-c",
            "trap '' TERM; echo ready; while :; do sleep 0.1; done",
        ]);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut ready = [0];
        let mut output = child.stdout.take().unwrap();
        output.read_exact(&mut ready).unwrap();
        let mut machine = Qemu(child);
        machine.end_within(Duration::from_millis(100));
        assert!(matches!(machine.0.try_wait(), Ok(Some(_))));
    }
}
