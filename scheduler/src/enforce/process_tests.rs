//! Whole processes: killed ones, unprivileged ones, and one that is moved as a whole.
//!
//! This test binary starts itself again and has the copy run [`child`], which does nothing unless its environment says so.

use std::{
    env, fs,
    io::{BufRead, BufReader, Write},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use super::{
    tests::{Body, host, ours, places_here, vm},
    *,
};
use crate::{
    Cap, Deadline, Gang, Owner, ReconcileOptions, Reconciler, Slice, VmPlan, VmPolicy, sys,
};

/// Not a test: `ROTA_ENFORCE` says what to do. Says `ready` when that is done, and ends with its input.
#[test]
fn child() {
    let Ok(what) = env::var("ROTA_ENFORCE") else {
        return;
    };
    let mut plan = vm(
        "child",
        1,
        VmPolicy {
            weight: Some(200),
            slice: Some(Slice::Latency),
            ..VmPolicy::default()
        },
    );
    match what.as_str() {
        "gang" => plan.request.policy.gang = Gang::Soft { quantum_us: 20_000 },
        "cap" => {
            plan.request.policy.cap = Some(Cap {
                quota_us: 50_000,
                period_us: 100_000,
                burst_us: 0,
            });
        }
        "exclusive" => make_exclusive(&mut plan),
        "deadline" => {
            plan = vm("child", 1, VmPolicy::default());
            make_exclusive(&mut plan);
            plan.request.policy.deadline = Some(Deadline {
                runtime_us: 2_000,
                deadline_us: 10_000,
                period_us: 10_000,
            });
            plan.helpers = &plan.helpers - &plan.exclusive;
        }
        _ => {}
    }
    let options = Options {
        parent: env::var_os("ROTA_ENFORCE_PARENT").map(PathBuf::from),
        ..Options::new(Owner::current("child").unwrap())
    };
    let enforcer = match Enforcer::prepare(&host(), &plan, &options) {
        Ok(enforcer) => enforcer,
        Err(refused) => {
            println!("refused: {refused}");
            return;
        }
    };
    let body = Body::start(false);
    enforcer.adopt(ThreadRole::Vcpu(0), body.tid).unwrap();
    for effect in enforcer.effects() {
        println!("{}: {}", effect.control, effect.outcome);
    }
    let care = (what == "deadline").then(|| {
        let options = ReconcileOptions::default();
        let tell = |event| println!("event: {event:?}");
        let care = Reconciler::start(&enforcer, None, options, tell).unwrap();
        // It looks at once.
        std::thread::sleep(std::time::Duration::from_millis(200));
        care
    });
    println!("ready");
    std::io::stdout().flush().unwrap();
    let _ = std::io::stdin().lines().next();
    drop(care);
    drop(enforcer);
    println!("released");
}

fn make_exclusive(plan: &mut VmPlan) {
    plan.vcpus[0].exclusive = true;
    plan.exclusive = plan.vcpus[0].cpus.clone();
}

struct Process {
    child: Child,
    said: Vec<String>,
}

/// Starts [`child`], and waits until it is ready or has ended.
fn start(what: &str, change: impl FnOnce(&mut Command)) -> Process {
    let mut command = Command::new(env::current_exe().unwrap());
    change(&mut command);
    start_command(command, what)
}

impl Process {
    fn line(&self, control: &str) -> &str {
        let found = self
            .said
            .iter()
            .find(|line| line.starts_with(&format!("{control}: ")));
        found.unwrap_or_else(|| panic!("nothing on {control}: {:?}", self.said))
    }

    fn end(mut self) {
        drop(self.child.stdin.take());
        assert!(self.child.wait().unwrap().success());
    }
}

fn groups_of_children() -> Vec<PathBuf> {
    places_here()
        .directories()
        .into_iter()
        .flat_map(|place| ours(&place.path, "child"))
        .collect()
}

#[test]
fn a_killed_vm_leaves_groups_that_the_next_one_removes() {
    if places_here().directories().is_empty() {
        rota_tests::requires::skip("no control groups can be made here");
        return;
    }
    let mut first = start("exclusive", |_| ());
    let of_first = |path: &PathBuf| {
        let mark = format!("-{}-", first.child.id());
        path.to_string_lossy().contains(&mark)
    };
    let left: Vec<PathBuf> = groups_of_children().into_iter().filter(of_first).collect();
    assert!(left.len() >= 2, "{left:?}");
    first.child.kill().unwrap();
    first.child.wait().unwrap();
    let second = start("weight", |_| ());
    assert!(left.iter().all(|path| !path.exists()), "{left:?}");
    second.end();
}

#[test]
fn helper_threads_are_where_the_process_is_told_to_be_and_come_back() {
    let Some(place) = places_here().cpu else {
        rota_tests::requires::skip("no control groups can be made here");
        return;
    };
    let process = start("weight", |_| ());
    let id = process.child.id();
    let group = fs::read_dir(&place.path)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| {
            let path = path.to_string_lossy();
            path.contains(&format!("-{id}-")) && path.ends_with(".helpers")
        })
        .unwrap();
    let threads = fs::read_to_string(group.join(place.hierarchy.threads())).unwrap();
    assert!(threads.lines().any(|line| line == id.to_string()));
    process.end();
    assert!(!group.exists());
}

/// Nobody's rights: no groups but those that were delegated, no negative nice values, no real-time class.
#[test]
fn without_privileges_it_is_threads_that_are_told() {
    const NOBODY: u32 = 65534;
    if !sys::is_root() {
        rota_tests::requires::skip("only root can become somebody else");
        return;
    }
    let binary = env::current_exe().unwrap();
    let copy = env::temp_dir().join(format!("rota-nobody-{}", std::process::id()));
    fs::copy(&binary, &copy).unwrap();
    let unprivileged = |what: &str| {
        let mut command = Command::new(&copy);
        command.uid(NOBODY).gid(NOBODY);
        start_command(command, what)
    };
    let process = unprivileged("weight");
    assert!(
        process.line("placement").contains("enforced"),
        "{:?}",
        process.said
    );
    // Twice the weight would be a negative nice value.
    assert!(
        process.line("weight").contains("advisory"),
        "{:?}",
        process.said
    );
    let slice = process.line("slice");
    assert!(
        slice.contains("asked for") || slice.contains("6.12"),
        "{slice}"
    );
    process.end();
    for what in ["cap", "gang"] {
        let process = unprivileged(what);
        assert!(
            process
                .said
                .iter()
                .any(|line| line.starts_with("refused: ")),
            "{:?}",
            process.said
        );
        process.end();
    }
    fs::remove_file(copy).unwrap();
}

fn start_command(mut command: Command, what: &str) -> Process {
    command
        .args(["--exact", "enforce::process_tests::child", "--nocapture"])
        .env("ROTA_ENFORCE", what)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut said = Vec::new();
    for line in BufReader::new(child.stdout.as_mut().unwrap()).lines() {
        let line = line.unwrap();
        if line == "ready" {
            break;
        }
        said.push(line);
    }
    Process { child, said }
}

/// Version 2 for real: on a machine that has it, as root, in a group of the test's own.
mod version_2 {
    use super::*;

    /// A domain below the root that goes with the test.
    struct Domain(PathBuf);

    impl Domain {
        fn new(name: &str) -> Option<Self> {
            let root = Path::new("/sys/fs/cgroup");
            let controllers = fs::read_to_string(root.join("cgroup.controllers"));
            if !sys::is_root() || !controllers.unwrap_or_default().contains("cpuset") {
                rota_tests::requires::skip("no control groups of version 2 with controllers here");
                return None;
            }
            for controller in ["+cpu", "+cpuset"] {
                fs::write(root.join("cgroup.subtree_control"), controller).unwrap();
            }
            let path = root.join(format!("rota-test-{name}-{}", std::process::id()));
            fs::create_dir(&path).unwrap();
            Some(Self(path))
        }

        fn groups(&self) -> Vec<PathBuf> {
            fs::read_dir(&self.0)
                .unwrap()
                .map(|entry| entry.unwrap().path())
                .filter(|path| path.is_dir())
                .collect()
        }

        fn read(&self, part: &str, file: &str) -> String {
            let groups = self.groups();
            let group = groups
                .iter()
                .find(|path| path.extension().is_some_and(|is| is == part))
                .unwrap_or_else(|| panic!("{groups:?}"));
            fs::read_to_string(group.join(file))
                .unwrap()
                .trim()
                .to_owned()
        }

        /// A process of [`child`] that is in this group from its start.
        fn start(&self, what: &str) -> Process {
            let procs = self.0.join("cgroup.procs");
            start(what, |command| {
                // SAFETY: writes to a file between fork and exec.
                unsafe {
                    command.pre_exec(move || fs::write(&procs, "0"));
                }
            })
        }
    }

    impl Drop for Domain {
        fn drop(&mut self) {
            for _ in 0..100 {
                if fs::remove_dir(&self.0).is_ok() {
                    return;
                }
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
        }
    }

    #[test]
    fn a_process_makes_threaded_groups_in_its_own_and_removes_them() {
        let Some(domain) = Domain::new("own") else {
            return;
        };
        let process = domain.start("cap");
        for control in ["placement", "helpers", "weight", "cap"] {
            assert!(
                process.line(control).ends_with("enforced"),
                "{:?}",
                process.said
            );
        }
        assert_eq!(domain.groups().len(), 2);
        assert_eq!(domain.read("vcpu", "cgroup.type"), "threaded");
        assert_eq!(domain.read("vcpu", "cpu.weight"), "200");
        assert_eq!(domain.read("vcpu", "cpu.max"), "50000 100000");
        assert_eq!(domain.read("vcpu", "cgroup.threads").lines().count(), 1);
        assert!(domain.read("helpers", "cgroup.threads").lines().count() >= 2);
        process.end();
        assert!(domain.groups().is_empty());
        let kind = fs::read_to_string(domain.0.join("cgroup.type")).unwrap();
        assert_eq!(kind.trim(), "domain");
    }

    #[test]
    fn two_vms_in_one_group_do_not_disturb_each_other() {
        let Some(domain) = Domain::new("two") else {
            return;
        };
        let first = domain.start("gang");
        assert!(first.line("gang").ends_with("enforced"), "{:?}", first.said);
        let second = domain.start("exclusive");
        assert_eq!(domain.groups().len(), 4);
        first.end();
        assert_eq!(domain.groups().len(), 2);
        assert!(second.line("placement").ends_with("enforced"));
        second.end();
        assert!(domain.groups().is_empty());
    }

    #[test]
    fn a_killed_vm_is_cleaned_up_after() {
        let Some(domain) = Domain::new("killed") else {
            return;
        };
        let mut first = domain.start("exclusive");
        first.child.kill().unwrap();
        first.child.wait().unwrap();
        assert_eq!(domain.groups().len(), 2);
        let second = domain.start("weight");
        assert_eq!(domain.groups().len(), 2);
        second.end();
        assert!(domain.groups().is_empty());
    }

    #[test]
    fn an_unprivileged_user_enforces_in_a_delegated_group() {
        const NOBODY: u32 = 65534;
        let Some(domain) = Domain::new("delegated") else {
            return;
        };
        for file in [
            "",
            "cgroup.procs",
            "cgroup.threads",
            "cgroup.subtree_control",
        ] {
            std::os::unix::fs::chown(domain.0.join(file), Some(NOBODY), Some(NOBODY)).unwrap();
        }
        let copy = env::temp_dir().join(format!("rota-delegated-{}", std::process::id()));
        fs::copy(env::current_exe().unwrap(), &copy).unwrap();
        let mut command = Command::new(&copy);
        let procs = domain.0.join("cgroup.procs");
        // SAFETY: writes to a file between fork and exec, before the user changes.
        unsafe {
            command.pre_exec(move || {
                fs::write(&procs, "0")?;
                if libc::setgid(NOBODY) != 0 || libc::setuid(NOBODY) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let process = start_command(command, "gang");
        for control in ["placement", "weight", "gang"] {
            assert!(
                process.line(control).ends_with("enforced"),
                "{:?}",
                process.said
            );
        }
        process.end();
        assert!(domain.groups().is_empty());
        fs::remove_file(copy).unwrap();
    }

    #[test]
    fn from_a_group_without_controllers_root_moves_to_a_shared_one() {
        let Some(domain) = Domain::new("poor") else {
            return;
        };
        let poor = domain.0.join("inner");
        fs::create_dir(&poor).unwrap();
        let procs = poor.join("cgroup.procs");
        let process = start("gang", |command| {
            // SAFETY: writes to a file between fork and exec.
            unsafe {
                command.pre_exec(move || fs::write(&procs, "0"));
            }
        });
        for control in ["placement", "weight", "gang"] {
            assert!(
                process.line(control).ends_with("enforced"),
                "{:?}",
                process.said
            );
        }
        let groups = fs::read_to_string(format!("/proc/{}/cgroup", process.child.id())).unwrap();
        assert!(groups.trim().starts_with("0::/rota"), "{groups}");
        process.end();
        assert!(!Path::new("/sys/fs/cgroup/rota").exists());
        fs::remove_dir(poor).unwrap();
    }

    #[test]
    fn a_deadline_is_kept_on_cpus_of_its_own() {
        // Partitions begin at the root, so this one needs the root for a parent.
        let Some(domain) = Domain::new("unused") else {
            return;
        };
        drop(domain);
        let process = start("deadline", |_| ());
        println!("{:?}", process.said);
        assert!(
            process.line("deadline").ends_with("enforced"),
            "{:?}",
            process.said
        );
        // The partition has taken the CPU away from the group above, and not from the VM.
        assert!(
            !process.said.iter().any(|line| line.starts_with("event: ")),
            "{:?}",
            process.said
        );
        process.end();
    }

    #[test]
    fn what_shrinks_above_is_what_is_left() {
        let Some(domain) = Domain::new("shrink") else {
            return;
        };
        let process = domain.start("exclusive");
        let has = domain.read("vcpu", "cpuset.cpus.effective");
        let all = fs::read_to_string("/sys/fs/cgroup/cpuset.cpus.effective").unwrap();
        let other: crate::CpuSet = all.parse().unwrap();
        let other = &other - &has.parse().unwrap();
        if other.is_empty() {
            rota_tests::requires::skip("two CPUs are needed");
            return;
        }
        fs::write(domain.0.join("cpuset.cpus"), other.to_string()).unwrap();
        // Asked for what there is not any more, a group has what the group above has.
        assert_eq!(
            domain.read("vcpu", "cpuset.cpus.effective"),
            other.to_string()
        );
        fs::write(domain.0.join("cpuset.cpus"), all.trim()).unwrap();
        assert_eq!(domain.read("vcpu", "cpuset.cpus.effective"), has);
        process.end();
    }
}
