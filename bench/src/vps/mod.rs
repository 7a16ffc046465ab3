//! VMs with real VPs, in a process under softmshv: one request to the scheduler, and what becomes of the VPs' run time.

mod machine;
mod watch;

use std::{
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use mshv_ioctls::Mshv;
use scheduler::{
    BUDGET, Claim, CpuSet, EnforceOptions, Enforcer, Host, Ledger, Owner, Request, ThreadRole,
    VmId, examine, plan,
};
use serde::{Deserialize, Serialize};

use self::{machine::Machine, machine::Running, watch::Watch};
use crate::{
    Result,
    vm::{Groups, Limits, Shares, confine},
};

/// What is asked for the VPs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Ask {
    /// Two VMs, both on one CPU and nowhere else.
    Affinity,
    /// One VM: no more than 40 % of a CPU.
    Quota,
    /// Two VMs on one CPU, of which one gets three times as much.
    Weights,
}

/// Of whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Asker {
    /// cloud-hypervisor's `sched_setaffinity`; libvirt's groups for quota and shares.
    Peers,
    /// `rota run --sched`.
    Rota,
}

/// One question to be answered in a process under softmshv.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Question {
    pub(crate) ask: Ask,
    pub(crate) asker: Asker,
    pub(crate) cpu: u32,
    pub(crate) time: Duration,
    pub(crate) ledger: PathBuf,
}

/// What became of it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Answer {
    /// Run time of each VP, as a part of the time that passed.
    pub(crate) run: Vec<f64>,
    /// Run time of the thread that called `RUN_VP` for each, likewise.
    pub(crate) thread_run: Vec<f64>,
    /// Of all VPs' run time, the part on the CPU that was asked for.
    pub(crate) on_cpu: f64,
    /// The longest time for which each VP was seen to stand still.
    pub(crate) still: Vec<Duration>,
    /// How far each VP counted.
    pub(crate) counted: Vec<u32>,
    /// What the one that was asked said: nothing, with peers.
    pub(crate) said: Vec<String>,
    /// It was refused: nothing ran.
    pub(crate) refused: bool,
}

/// Asks, in a process under `softmshv --scheduler SCHEDULER`.
pub(crate) fn ask(scheduler: &str, options: &[String], question: &Question) -> Result<Answer> {
    let me = std::env::current_exe()?;
    let output = Command::new(beside(&me, "softmshv"))
        .args(["--scheduler", scheduler])
        .args(options)
        .arg("--")
        .arg(&me)
        .args(["inside", "vps", &serde_json::to_string(question)?])
        .stdin(Stdio::null())
        .output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr)
            .trim()
            .to_owned()
            .into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// A program in the folder of this one.
pub(crate) fn beside(me: &Path, name: &str) -> PathBuf {
    me.with_file_name(name)
}

/// `sched-bench inside vps`.
pub(crate) fn inside(question: &str) -> Result<()> {
    let question: Question = serde_json::from_str(question)?;
    let answer = answer(&question)?;
    println!("{}", serde_json::to_string(&answer)?);
    // The VPs never end: the process does.
    std::process::exit(0);
}

fn answer(question: &Question) -> Result<Answer> {
    // Found out before there is a load, as a VMM does.
    let detection = (question.asker == Asker::Rota)
        .then(|| fs::File::open("/dev/mshv").map(|device| examine(Ok(device.as_fd()), BUDGET)))
        .transpose()?;
    let device = Mshv::new()?;
    let vms = match question.ask {
        Ask::Quota => 1,
        Ask::Affinity | Ask::Weights => 2,
    };
    let mut running: Vec<Running> = Vec::new();
    for _ in 0..vms {
        let (machine, vp) = Machine::new(&device)?;
        running.push(machine.run(vp)?);
    }
    let mut said = Vec::new();
    let mut groups = None;
    let mut enforced: Vec<(Enforcer<'_>, Claim)> = Vec::new();
    match detection {
        None => groups = Some(ask_as_peers(question, &running)?),
        Some(detection) => {
            let host = Host {
                mode: detection.verdict,
                ..Host::read()?
            };
            for (number, vm) in running.iter().enumerate() {
                match ask_rota(question, &host, number, vm) {
                    Ok(it) => {
                        said.extend(it.0.effects().iter().map(|effect| {
                            format!(
                                "{} {}: {}",
                                effect.control, effect.requested, effect.outcome
                            )
                        }));
                        enforced.push(it);
                    }
                    Err(error) => {
                        return Ok(Answer {
                            said: vec![error.to_string()],
                            refused: true,
                            ..Answer::default()
                        });
                    }
                }
            }
        }
    }
    std::thread::sleep(Duration::from_millis(200));
    let threads: Vec<i32> = running.iter().map(|vm| vm.tid.0).collect();
    let counted: Vec<u32> = running.iter().map(Running::count).collect();
    let seen = Watch::start(&threads)?.look_for(question.time, &running);
    let answer = Answer {
        run: seen.run,
        thread_run: seen.thread_run,
        on_cpu: seen.cpus.get(&question.cpu).copied().unwrap_or(0.0),
        still: seen.still,
        counted: running
            .iter()
            .zip(counted)
            .map(|(vm, before)| vm.count().wrapping_sub(before))
            .collect(),
        said,
        refused: false,
    };
    drop(enforced);
    drop(groups);
    Ok(answer)
}

/// What cloud-hypervisor and libvirt do; neither is told whether it has any effect.
fn ask_as_peers(question: &Question, running: &[Running]) -> Result<Groups> {
    let mut groups = Groups::here()?;
    if question.ask != Ask::Quota {
        for vm in running {
            confine(vm.tid, &CpuSet::one(question.cpu))?;
        }
    }
    if question.ask == Ask::Affinity {
        return Ok(groups);
    }
    let domain = groups.of_process("domain", &Limits::default())?;
    for (number, vm) in running.iter().enumerate() {
        let limits = match question.ask {
            Ask::Quota => Limits {
                quota: Some((4000, 10_000)),
                ..Limits::default()
            },
            _ => Limits {
                shares: Some(Shares::Libvirt(1024 * (1 + 2 * number as u32))),
                ..Limits::default()
            },
        };
        let group = groups.of_threads(&domain, &format!("vm{number}"), &limits)?;
        groups.put(&group, vm.tid.0)?;
    }
    Ok(groups)
}

fn ask_rota<'a>(
    question: &Question,
    host: &Host,
    number: usize,
    vm: &'a Running,
) -> Result<(Enforcer<'a>, Claim)> {
    let here = host.mode.linux_schedules();
    let map = format!("map=[0@[{}]]", question.cpu);
    let weight = format!("weight={}", 100 * (1 + 2 * number));
    let sched = match question.ask {
        Ask::Affinity => map,
        Ask::Quota => "cap=40%".into(),
        // Where Linux schedules they have to be on one CPU to compete; in core mode the test machine has but one.
        Ask::Weights if here => format!("{map},{weight}"),
        Ask::Weights => weight,
    };
    let name = format!("vm{number}");
    let request = Request {
        vm: VmId(name.clone()),
        vcpus: 1,
        threads_per_core: 1,
        memory_mib: 16,
        policy: sched.parse()?,
    };
    let owner = Owner::current(&name)?;
    let claim = Ledger::open(Some(&question.ledger))?
        .claim(owner.clone(), |state| plan(host, state, &[request]))?;
    let options = EnforceOptions {
        partition: Some(&vm.partition),
        whole_process: false,
        ..EnforceOptions::new(owner)
    };
    let enforcer = Enforcer::prepare(host, &claim.plan(), &options)?;
    enforcer.adopt(ThreadRole::Vcpu(0), vm.tid)?;
    Ok((enforcer, claim))
}

/// The threads of this process, by number.
fn own_threads() -> io::Result<Vec<i32>> {
    let entries = fs::read_dir("/proc/self/task")?;
    Ok(entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect())
}
