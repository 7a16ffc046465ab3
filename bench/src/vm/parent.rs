//! Starting VMs, measuring them all in the same window, and ending them.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::process::CommandExt as _,
    process::{Child, ChildStdout, Command, Stdio},
    time::Duration,
};

use super::{VmResult, VmSpec};
use crate::{
    Error, Result,
    clock::{self, Machine},
};

/// What VMs that ran side by side came to.
pub(crate) struct Together {
    /// In the order of the VMs.
    pub(crate) vms: Vec<VmResult>,
    /// What the hypervisor below took of the CPUs meanwhile, as a part.
    pub(crate) steal: f64,
    /// What others on this machine used, as a part.
    pub(crate) others: f64,
}

/// Runs the VMs side by side for `time`, after `warm_up`. `disturb` is called with their process ids when that time begins, and must
/// not take longer.
pub(crate) fn run(
    specs: &[VmSpec],
    warm_up: Duration,
    time: Duration,
    disturb: &mut dyn FnMut(&[u32]) -> Result<()>,
) -> Result<Together> {
    let mut vms = Vec::new();
    for spec in specs {
        vms.push(Vm::start(spec)?);
    }
    let begin = clock::now_ns() + warm_up.as_nanos() as u64;
    let end = begin + time.as_nanos() as u64;
    for vm in &mut vms {
        if let Some(input) = vm.child.stdin.as_mut() {
            writeln!(input, "{begin} {end}")?;
        }
    }
    clock::sleep_until(begin);
    let before = Machine::read()?;
    let pids: Vec<u32> = vms.iter().map(|vm| vm.child.id()).collect();
    disturb(&pids)?;
    clock::sleep_until(end);
    let after = Machine::read()?;
    let results = vms
        .iter_mut()
        .map(|vm| Ok(serde_json::from_str(&vm.line()?)?))
        .collect::<Result<Vec<VmResult>>>()?;
    let own = Duration::from_nanos(results.iter().map(|result| result.process_ns).sum());
    let (steal, others) = after.since(&before, own);
    Ok(Together {
        vms: results,
        steal,
        others,
    })
}

struct Vm {
    name: String,
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Vm {
    fn start(spec: &VmSpec) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["inside", "vm", &serde_json::to_string(spec)?])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // What ends us at the terminal must not end it before it has cleaned up.
            .process_group(0)
            .spawn()?;
        let output = child.stdout.take().ok_or("no pipe")?;
        let mut vm = Self {
            name: spec.name.clone(),
            child,
            output: BufReader::new(output),
        };
        match vm.line()?.trim() {
            "ready" => Ok(vm),
            other => Err(format!("{}: {other}", vm.name).into()),
        }
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        match self.output.read_line(&mut line)? {
            0 => Err(Error::from(format!("VM {} has ended early", self.name))),
            _ => Ok(line),
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // It goes when nobody is at the other end.
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}
