//! What the running kernel can do and what this process may, by trying it on a thread that is thrown away.

use std::{io, mem, path::Path, thread};

use super::{Abilities, Ability, Cgroup, Hierarchies, may_write};
use crate::sys::{self, Attributes, Tid};

/// A slice nobody has by accident, so that reading it back proves something.
const ODD_SLICE_NS: u64 = 3_210_000;

/// The tick: the coarse clocks move with it and say so.
pub(super) fn tick_ns() -> Option<u64> {
    // SAFETY: a plain structure of integers.
    let mut time: libc::timespec = unsafe { mem::zeroed() };
    // SAFETY: writes the structure.
    let result = unsafe { libc::clock_getres(libc::CLOCK_MONOTONIC_COARSE, &raw mut time) };
    let ns = u64::try_from(time.tv_nsec).ok()?;
    (result == 0 && time.tv_sec == 0 && (100_000..=100_000_000).contains(&ns)).then_some(ns)
}

/// Tries everything out. Nothing of it outlives the call.
pub(super) fn abilities() -> Abilities {
    let root = Path::new("/");
    let tree = super::read::sched_ext(root);
    let (cgroup, partitions) = cgroups(root);
    let on_thread = |probe: fn() -> Ability| {
        thread::Builder::new()
            .name("probe".to_owned())
            .spawn(probe)
            .and_then(|thread| {
                thread
                    .join()
                    .map_err(|_| io::Error::other("the probe panicked"))
            })
            .unwrap_or_else(|error| Ability::no(format!("no thread to try it on: {error}")))
    };
    Abilities {
        custom_slice: on_thread(custom_slice),
        core_scheduling: core_scheduling(),
        realtime: on_thread(realtime),
        deadline: on_thread(deadline),
        nice: on_thread(nice),
        sched_ext_active: tree,
        partitions,
        cgroup,
    }
}

fn custom_slice() -> Ability {
    let tid = Tid::current();
    let asked = sys::attributes(tid).and_then(|own| {
        let wanted = Attributes {
            runtime_ns: ODD_SLICE_NS,
            ..own
        };
        sys::set_attributes(tid, &wanted)?;
        sys::attributes(tid)
    });
    match asked {
        Ok(got) if got.runtime_ns == ODD_SLICE_NS => {
            Ability::yes("sched_setattr takes a slice and sched_getattr gives it back")
        }
        Ok(_) => Ability::no("sched_setattr takes a slice and forgets it (Linux before 6.12)"),
        Err(error) => Ability::no(format!("sched_setattr: {error}")),
    }
}

fn core_scheduling() -> Ability {
    match sys::core_cookie(Tid(0)) {
        Ok(_) => Ability::yes("PR_SCHED_CORE answers"),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {
            Ability::no("this machine has no SMT, or it is off")
        }
        Err(error) => Ability::no(format!("PR_SCHED_CORE: {error} (CONFIG_SCHED_CORE)")),
    }
}

/// Tries `wanted` on this thread.
fn try_class(what: &str, wanted: &Attributes) -> Ability {
    match sys::set_attributes(Tid::current(), wanted) {
        Ok(()) => Ability::yes(format!("{what} was granted to a thread")),
        Err(error) => Ability::no(format!("{what}: {error}")),
    }
}

fn realtime() -> Ability {
    let wanted = Attributes {
        policy: libc::SCHED_FIFO as u32,
        flags: 0,
        nice: 0,
        priority: 1,
        runtime_ns: 0,
        deadline_ns: 0,
        period_ns: 0,
    };
    let tried = try_class("SCHED_FIFO", &wanted);
    if tried.yes {
        return tried;
    }
    Ability::no(format!(
        "{}; CAP_SYS_NICE or an RLIMIT_RTPRIO above 0 (it is {}) gives it",
        tried.why,
        limit(libc::RLIMIT_RTPRIO)
    ))
}

fn deadline() -> Ability {
    let wanted = Attributes {
        policy: libc::SCHED_DEADLINE as u32,
        flags: 0,
        nice: 0,
        priority: 0,
        runtime_ns: 100_000,
        deadline_ns: 100_000_000,
        period_ns: 100_000_000,
    };
    try_class("SCHED_DEADLINE", &wanted)
}

fn nice() -> Ability {
    let Ok(own) = sys::attributes(Tid::current()) else {
        return Ability::no("sched_getattr is refused");
    };
    let wanted = Attributes { nice: -20, ..own };
    let tried = try_class("nice -20", &wanted);
    if tried.yes {
        return tried;
    }
    Ability::no(format!(
        "{}; CAP_SYS_NICE or an RLIMIT_NICE of 40 (it is {}) gives it",
        tried.why,
        limit(libc::RLIMIT_NICE)
    ))
}

fn limit(resource: libc::__rlimit_resource_t) -> u64 {
    // SAFETY: a plain structure of integers.
    let mut limit: libc::rlimit = unsafe { mem::zeroed() };
    // SAFETY: writes the structure.
    unsafe { libc::getrlimit(resource, &raw mut limit) };
    limit.rlim_cur
}

/// Control groups, and whether CPU partitions can be made of them.
fn cgroups(root: &Path) -> (Cgroup, Ability) {
    let nothing = |why: &str| {
        let cgroup = Cgroup {
            cpu: Ability::no(why),
            cpuset: Ability::no(why),
            ..Cgroup::default()
        };
        (cgroup, Ability::no(why))
    };
    let Ok(found) = Hierarchies::read(root) else {
        return nothing("/proc does not say where control groups are");
    };
    let version_1 = |controller| {
        found
            .directory("cgroup", Some(controller))
            .map(|(_, own)| own)
    };
    let (cpu, cpuset) = (version_1("cpu"), version_1("cpuset"));
    if cpu.is_some() || cpuset.is_some() {
        let at = |own: Option<&Path>, controller: &str| match own {
            None => Ability::no(format!("no {controller} controller is mounted")),
            Some(own) if may_write(own) => {
                Ability::yes(format!("{} may be written", own.display()))
            }
            Some(own) => Ability::no(format!("{} may not be written", own.display())),
        };
        let has = |file: &str| match &cpu {
            Some(own) if own.join(file).exists() => Ability::yes(format!("{file} is there")),
            _ => Ability::no(format!("{file} is not there")),
        };
        let cgroup = Cgroup {
            version: 1,
            cpu: at(cpu.as_deref(), "cpu"),
            cpuset: at(cpuset.as_deref(), "cpuset"),
            idle: has("cpu.idle"),
            burst: has("cpu.cfs_burst_us"),
            cpu_path: cpu.map(|own| own.display().to_string()),
            cpuset_path: cpuset.map(|own| own.display().to_string()),
        };
        let why = "version 1 has none: the root's sched_load_balance would have to be cleared, for the whole host";
        return (cgroup, Ability::no(why));
    }
    let Some((mount, own)) = found.directory("cgroup2", None) else {
        return nothing("no control groups are mounted");
    };
    // Root makes its groups below the root where its own group cannot have any.
    let root_may = sys::is_root() && may_write(&mount);
    let text = |directory: &Path| {
        std::fs::read_to_string(directory.join("cgroup.controllers")).unwrap_or_default()
    };
    let usable = |controller: &str| {
        let has = |directory: &Path| {
            text(directory)
                .split_whitespace()
                .any(|name| name == controller)
                && may_write(directory)
        };
        match (has(&own), root_may && has(&mount)) {
            (true, _) => Ability::yes(format!("{} has it and may be written", own.display())),
            (false, true) => Ability::yes(format!("{} has it and may be written", mount.display())),
            (false, false) => Ability::no(format!(
                "{} does not have it or may not be written (systemd: Delegate=yes)",
                own.display()
            )),
        }
    };
    let (cpu, cpuset) = (usable("cpu"), usable("cpuset"));
    // Files of the controller are in every group that has it, but never in the root.
    let has = |file: &str| {
        let below = std::fs::read_dir(&mount).into_iter().flatten().flatten();
        let found = own.join(file).exists()
            || below
                .into_iter()
                .any(|entry| entry.path().join(file).exists());
        if found {
            Ability::yes(format!("{file} is there"))
        } else {
            Ability::no(format!("no group has {file}"))
        }
    };
    let path = if may_write(&own) { &own } else { &mount };
    let cgroup = Cgroup {
        version: 2,
        idle: has("cpu.idle"),
        burst: has("cpu.max.burst"),
        cpu_path: cpu.yes.then(|| path.display().to_string()),
        cpuset_path: cpuset.yes.then(|| path.display().to_string()),
        cpu,
        cpuset: cpuset.clone(),
    };
    let partitions = match (cpuset.yes, root_may) {
        (true, true) => Ability::yes("groups below the root can be partitions"),
        (true, false) => Ability::no("a partition belongs to the parent of a delegated group"),
        (false, _) => Ability::no(cpuset.why),
    };
    (cgroup, partitions)
}
