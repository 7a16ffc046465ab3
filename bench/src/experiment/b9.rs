//! B9: somebody else moves a vCPU: how long it stays where it should not be.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use scheduler::{CpuSet, Tid};

use super::{
    Criterion, Experiment, Metric, Outcome, Planes, Plot, Settings, Variant, own_ledger, rota,
};
use crate::{
    Result, clock,
    protocol::Results,
    vm::{self, Body, Control, Group, Groups, Limits, VmSpec, confine},
};

const WARM_UP: Duration = Duration::from_millis(300);
const LOOK_EVERY_NS: u64 = 200_000;
const LIMIT_MS: f64 = 50.0;
/// How long a CPU is away before it comes back.
const AWAY: Duration = Duration::from_millis(300);
const EVENTS: [(&str, Event); 4] = [
    ("taskset", Event::Taskset),
    ("cpuset", Event::Cpuset),
    ("pod", Event::Pod),
    ("offline", Event::Offline),
];

/// What somebody else does.
#[derive(Clone, Copy, PartialEq)]
enum Event {
    /// `sched_setaffinity` of the vCPU's thread, as `taskset -p` does.
    Taskset,
    /// A write to `cpuset.cpus` of the group the thread is in.
    Cpuset,
    /// The cpuset around the VM's process loses the CPU, and has it again a moment later.
    Pod,
    /// The CPU goes offline, and is back a moment later.
    Offline,
}

impl Event {
    /// Where the vCPU is to be, and the other CPU: the first cannot go offline.
    fn cpus(self, planes: &Planes) -> (CpuSet, CpuSet) {
        match self {
            Self::Offline => (planes.second.clone(), planes.first.clone()),
            _ => (planes.first.clone(), planes.second.clone()),
        }
    }
}

pub(super) fn experiment(settings: &Settings) -> Experiment {
    let metric = |key, label, unit| Metric { key, label, unit };
    Experiment {
        id: "B9",
        title: "somebody else moves a vCPU: how long it stays there",
        timed: true,
        setting: "a VM of 1 vCPU (thread) that never stops, to be on CPU a; somebody moves it to CPU b, with taskset or by writing to \
                  its cpuset. Or CPU a leaves the cpuset around the VM's process for 300 ms, or (with a and b the other way round) goes offline \
                  for as long, and the time counts from its return. At most the run's seconds, in which it was not moved back"
            .into(),
        metrics: vec![
            metric("wrong", "on the wrong CPU", "ms"),
            metric("back", "moved back", "%"),
            metric("refused", "the move cannot be made", "%"),
        ],
        variants: variants(settings),
        criteria,
        plot: Plot::Bars("wrong"),
    }
}

fn variants(settings: &Settings) -> Vec<Variant> {
    let planes = Planes::new(settings);
    let mut variants = Vec::new();
    for (what, event) in EVENTS {
        let (wanted, wrong) = event.cpus(&planes);
        let controls = [
            (
                "cloud-hypervisor",
                "affinity=[0@[a]]: one sched_setaffinity; nobody looks again",
                Control::CloudHypervisor {
                    affinity: vec![wanted.clone()],
                },
            ),
            (
                "libvirt",
                "vcpupin: group and sched_setaffinity; nobody looks again",
                Planes::libvirt(vec![wanted.clone()]),
            ),
            (
                "k8s static",
                "the process in a cpuset of CPU a; the kubelet looks every 10 s, which is longer than a run, and is not emulated",
                Control::Kubernetes {
                    cpus: wanted.clone(),
                    millicpus: 1000,
                },
            ),
            (
                "rota",
                "rota --sched map=[0@[a]] with its reconcile loop",
                rota(format!("map=[0@[{wanted}]]")),
            ),
        ];
        for (who, how, control) in controls {
            let (wanted, wrong) = (wanted.clone(), wrong.clone());
            variants.push(Variant {
                name: format!("{what}, {who}"),
                how: how.into(),
                run: Box::new(move |settings| once(settings, event, &control, &wanted, &wrong)),
            });
        }
    }
    variants
}

fn once(
    settings: &Settings,
    event: Event,
    control: &Control,
    wanted: &CpuSet,
    wrong: &CpuSet,
) -> Result<Outcome> {
    let mut spec = VmSpec {
        name: "moved".into(),
        vcpus: vec![Body::Units {
            work: settings.work(100.0),
        }],
        control: control.clone(),
    };
    if let Control::Rota { ledger, .. } = &mut spec.control {
        *ledger = own_ledger(settings)?;
    }
    let mut outcome = Outcome::default();
    // Around this process and those it starts, for as long as the run takes.
    let mut groups = None;
    let mut pod = None;
    if event == Event::Pod {
        let made = Groups::here().and_then(|mut groups| {
            let limits = Limits {
                cpus: Some((wanted | wrong).to_string()),
                ..Limits::default()
            };
            let pod = groups.of_process("pod", &limits)?;
            Ok((groups, pod))
        });
        match made {
            Ok((made, group)) => (groups, pod) = (Some(made), Some(group)),
            Err(error) => {
                outcome
                    .notes
                    .push(format!("no cpuset can be made around the VM: {error}"));
                outcome.metrics.insert("refused", 100.0);
                return Ok(outcome);
            }
        }
    }
    let limit = settings.time.saturating_sub(Duration::from_millis(100));
    let mut disturb = |pids: &[u32]| -> Result<()> {
        let (pid, tid) = pids
            .first()
            .and_then(|pid| Some((*pid, vcpu_of(*pid)?)))
            .ok_or("the VM has no vCPU")?;
        let mut begun = clock::now_ns();
        let moved = match (event, &pod) {
            (Event::Taskset, _) => confine(Tid(tid), wrong),
            (Event::Cpuset, _) => write_cpuset(pid, tid, wrong),
            (Event::Offline, _) => take_offline(wanted),
            (Event::Pod, Some(pod)) => shrink_and_grow(pod, wanted, wrong),
            (Event::Pod, None) => Err(io::Error::other("there is no cpuset around it")),
        };
        if matches!(event, Event::Pod | Event::Offline) {
            begun = clock::now_ns();
        }
        let refused = moved.is_err();
        if let Err(error) = moved {
            outcome.notes.push(format!("the move is refused: {error}"));
        }
        let mut back = affinity(pid, tid).as_ref() == Some(wanted);
        while !back && clock::now_ns() - begun < limit.as_nanos() as u64 {
            clock::sleep_until(clock::now_ns() + LOOK_EVERY_NS);
            back = affinity(pid, tid).as_ref() == Some(wanted);
        }
        // A move that is not made says nothing about how long it lasts.
        if !refused {
            let ms = (clock::now_ns() - begun) as f64 / 1e6;
            outcome.metrics.insert("wrong", ms);
            let back = if back { 100.0 } else { 0.0 };
            outcome.metrics.insert("back", back);
        }
        outcome
            .metrics
            .insert("refused", if refused { 100.0 } else { 0.0 });
        Ok(())
    };
    let together = vm::run(&[spec], WARM_UP, settings.time, &mut disturb)?;
    drop(groups);
    outcome.steal = together.steal;
    outcome.others = Some(together.others);
    Ok(outcome)
}

/// The thread of a VM's first vCPU.
fn vcpu_of(pid: u32) -> Option<i32> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    threads
        .filter_map(std::result::Result::ok)
        .find(|entry| {
            fs::read_to_string(entry.path().join("comm")).is_ok_and(|name| name.trim() == "vcpu0")
        })?
        .file_name()
        .to_str()?
        .parse()
        .ok()
}

fn affinity(pid: u32, tid: i32) -> Option<CpuSet> {
    let status = fs::read_to_string(format!("/proc/{pid}/task/{tid}/status")).ok()?;
    let list = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    list.trim().parse().ok()
}

/// Writes to the group a thread is in, if that is not a group of others as well.
fn write_cpuset(pid: u32, tid: i32, cpus: &CpuSet) -> io::Result<()> {
    let own = cpuset_of(Path::new("/proc/self/cgroup"))?;
    let group = cpuset_of(&PathBuf::from(format!("/proc/{pid}/task/{tid}/cgroup")))?;
    if group == own || !group.join(CPUS).exists() {
        return Err(io::Error::other("it has no cpuset of its own"));
    }
    // In version 1 a group within another has to fit into it; in version 2 it gets what fits.
    if let Some(parent) = group.parent().filter(|parent| *parent != own)
        && own.join(CPUS).exists()
    {
        fs::write(parent.join(CPUS), fs::read_to_string(own.join(CPUS))?)?;
    }
    fs::write(group.join(CPUS), cpus.to_string())
}

/// Takes the CPUs away from the pod, and gives them back. A group of version 1 cannot lose what those within it have: then nothing happens.
fn shrink_and_grow(pod: &Group, wanted: &CpuSet, wrong: &CpuSet) -> io::Result<()> {
    let file = pod.cpuset().join(CPUS);
    fs::write(&file, wrong.to_string())?;
    thread::sleep(AWAY);
    fs::write(&file, (wanted | wrong).to_string())
}

/// Takes the CPU offline, where that is allowed, and brings it back, whatever happens.
fn take_offline(cpus: &CpuSet) -> io::Result<()> {
    const ALLOWED: &str = "ROTA_TEST_OFFLINE";
    let cpu = cpus.iter().next().unwrap_or_default();
    let switch = format!("/sys/devices/system/cpu/cpu{cpu}/online");
    if std::env::var_os(ALLOWED).is_none() {
        let why = format!("others use this machine too: {ALLOWED} is not set");
        return Err(io::Error::other(why));
    }
    fs::write(&switch, "0")?;
    thread::sleep(AWAY);
    fs::write(&switch, "1")
}

const CPUS: &str = "cpuset.cpus";

/// The directory of a thread's group that has to do with cpusets: of the hierarchy of version 1 that has them, or of version 2.
fn cpuset_of(file: &Path) -> io::Result<PathBuf> {
    let text = fs::read_to_string(file)?;
    let path = |mark: &str| {
        text.lines()
            .find_map(|line| line.split_once(mark))
            .map(|(_, path)| path.trim_start_matches('/'))
    };
    if let Some(path) = path(":cpuset:") {
        return Ok(Path::new("/sys/fs/cgroup/cpuset").join(path));
    }
    let path = path("0::").ok_or_else(|| io::Error::other("no hierarchy has cpuset"))?;
    Ok(Path::new("/sys/fs/cgroup").join(path))
}

fn criteria(results: &Results) -> Vec<Criterion> {
    EVENTS
        .map(|(what, _)| {
            let (variant, words) = (
                format!("{what}, rota"),
                format!("{what}, rota: at most 50 ms, in the worst run"),
            );
            let median = results.median(&variant, "wrong");
            match results.notes(&variant).first() {
                Some(why) if median.is_none() => Criterion::not_here(words, why),
                _ => {
                    Criterion::number(words, median.map(|median| median.most), |ms| ms <= LIMIT_MS)
                }
            }
        })
        .into()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::protocol::Sample;

    #[test]
    fn what_cannot_be_done_here_says_why() {
        let outcome = Outcome {
            notes: vec!["the move is refused: others use this machine too".into()],
            metrics: [("refused", 100.0)].into(),
            ..Outcome::default()
        };
        let results = Results {
            rounds: 1,
            seconds: 1.0,
            samples: vec![Sample {
                variant: "offline, rota".into(),
                round: 1,
                discarded: false,
                outcome,
            }],
            missing: BTreeMap::new(),
        };
        let lines: Vec<_> = criteria(&results).iter().map(Criterion::line).collect();
        let offline = lines.iter().find(|line| line.contains("offline")).unwrap();
        assert!(
            offline.starts_with("none") && offline.ends_with("others use this machine too"),
            "{offline}"
        );
        assert!(lines[0].starts_with("????"), "it was not run: {}", lines[0]);
    }
}
