//! A guest whose shell does what it is told.

use std::io::Write;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use super::HOST;
use crate::error::{Context, Error, Result};
use crate::inside::vm::{Input, News, Running, Trace, Vm};

/// The longest time anything may take.
const LIMIT: Duration = Duration::from_secs(120);
/// What stands before the answer to a command.
const ANSWER: &str = "ROTA-ANSWER";
/// The shell's prompt, and its question to the terminal where the cursor is.
const PROMPT: &str = "guest# \x1b[6n";

/// A guest at its shell.
pub(super) struct Guest {
    name: String,
    running: Running,
    news: Receiver<News>,
    /// What it has said since it was last told something.
    said: String,
}

impl Guest {
    /// Boots it up to its shell.
    pub(super) fn boot(
        name: &str,
        command: Vec<String>,
        memory_mib: u64,
        input: Input,
    ) -> Result<Self> {
        let (sender, news) = mpsc::channel();
        let vm = Vm {
            name: name.into(),
            command,
            memory_mib,
            input,
        };
        let running = vm.start(move |news| {
            let _ = sender.send(news);
        })?;
        let mut guest = Self {
            name: name.into(),
            running,
            news,
            said: String::new(),
        };
        guest.wait(|said| said.ends_with(PROMPT).then_some(()))?;
        Ok(guest)
    }

    /// Makes it able to run Debian's programs, and to talk to the lab.
    pub(super) fn prepare(&mut self) -> Result<()> {
        self.runs(&format!(
            "mkdir -p /root; mount -t ext4 -o ro /dev/vda /root; \
             for i in proc sys dev; do mount -o bind /$i /root/$i; done; mount -t tmpfs tmpfs /root/tmp; \
             ip addr add {}/24 dev eth0; ip link set eth0 up; ls /root/usr/bin/fio",
            HOST.replace(".1", ".2")
        ))
        .map(drop)
    }

    /// Has its shell run `command` in Debian's root file system, and returns what it says.
    pub(super) fn runs(&mut self, command: &str) -> Result<String> {
        self.said.clear();
        let command = match command.split_once(' ') {
            Some((program @ ("fio" | "iperf3" | "ping"), rest)) => {
                // By its path, or busybox would be asked first.
                format!("chroot /root /usr/bin/{program} {rest}")
            }
            _ => command.to_owned(),
        };
        // In two parts, or the echo of what is typed would be taken for the answer.
        self.types(&format!("a=$({command}); echo ROTA-\"\"ANSWER \"$a.\"\n"))?;
        self.wait(|said| {
            let (_, after) = said.split_once(ANSWER)?;
            let (answer, _) = after.split_once(".\r\n")?;
            said.ends_with(PROMPT).then(|| answer.trim().to_owned())
        })
    }

    /// Makes it exit to its VMM, so that what has happened before is on record.
    pub(super) fn nudge(&mut self) -> Result<()> {
        self.said.clear();
        self.types("\n")?;
        self.wait(|said| said.ends_with(PROMPT).then_some(()))
    }

    /// Its VMM's process.
    pub(super) fn pid(&self) -> u32 {
        self.running.pid()
    }

    /// What was on record at the last exit a second after another.
    pub(super) fn trace(&self) -> Result<Trace> {
        self.running.trace_so_far()
    }

    /// Ends it.
    pub(super) fn end(mut self) -> Result<()> {
        self.types("poweroff -f\n")?;
        self.running.finish().map(drop)
    }

    fn types(&mut self, text: &str) -> Result<()> {
        let keyboard = self.running.keyboard.as_mut();
        let keyboard = keyboard.ok_or_else(|| Error::new("no keyboard"))?;
        keyboard
            .write_all(text.as_bytes())
            .and_then(|()| keyboard.flush())
            .context(|| format!("{}: cannot type", self.name))
    }

    /// Waits until `found` finds something in what the guest has said.
    fn wait<T>(&mut self, found: impl Fn(&str) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(it) = found(&self.said) {
                return Ok(it);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.news.recv_timeout(left) {
                Ok(News::Console(bytes)) => self.said.push_str(&String::from_utf8_lossy(&bytes)),
                Ok(News::Message(line)) => eprintln!("    {}: {line}", self.name),
                Ok(News::Init(_)) => {}
                Ok(News::Closed) | Err(_) => {
                    return Err(Error::new(format!(
                        "{} does not go on; it said:\n{}",
                        self.name, self.said
                    )));
                }
            }
        }
    }
}
