//! What makes a thread of the client's process a processor of the hypervisor: neither the client's affinity nor its
//! control group, priority or policy binds it, as far as the kernel lets go.

use std::fs;
use std::mem;
use std::path::{Path, PathBuf};

use crate::config::config;
use crate::cpu_list;

/// The CPUs that serve as logical processors.
pub(super) fn cpus() -> Vec<usize> {
    if !config().lps.is_empty() {
        return config().lps.clone();
    }
    fs::read_to_string("/sys/devices/system/cpu/online")
        .ok()
        .and_then(|list| cpu_list::parse(&list))
        .unwrap_or_else(|| vec![0])
}

/// Puts the calling thread on one CPU, if its cpuset has it.
pub(super) fn move_to(cpu: usize) {
    // SAFETY: a set on the stack; CPUs beyond it are left out. A refusal leaves the thread where it was.
    unsafe {
        let mut set: libc::cpu_set_t = mem::zeroed();
        if cpu < libc::CPU_SETSIZE as usize {
            libc::CPU_SET(cpu, &mut set);
            libc::sched_setaffinity(0, size_of_val(&set), &raw const set);
        }
    }
}

/// Takes from the calling thread what it has inherited of its maker: policy, niceness, control groups.
pub(super) fn become_processor() {
    // SAFETY: plain system calls on the calling thread; a refusal leaves things as they are.
    unsafe {
        let normal: libc::sched_param = mem::zeroed();
        libc::sched_setscheduler(0, libc::SCHED_OTHER, &raw const normal);
        libc::setpriority(libc::PRIO_PROCESS, 0, 0);
    }
    leave_groups();
}

/// Lets the calling thread interrupt whatever runs on its CPU: the shortest slice, and priority where that is allowed.
pub(super) fn become_dispatcher() {
    /// `struct sched_attr`, its first version.
    #[repr(C)]
    struct Attributes {
        size: u32,
        policy: u32,
        flags: u64,
        nice: i32,
        priority: u32,
        runtime: u64,
        deadline: u64,
        period: u64,
    }
    become_processor();
    let mut attributes = Attributes {
        size: size_of::<Attributes>() as u32,
        policy: 0,
        flags: 0,
        nice: -20,
        priority: 0,
        runtime: 100_000,
        deadline: 0,
        period: 0,
    };
    // SAFETY: the kernel reads a structure of the size it states; a refusal leaves things as they are.
    unsafe {
        if libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) != 0 {
            attributes.nice = 0;
            libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0);
        }
    }
    move_to_any();
}

/// Takes the calling thread's affinity away: its maker may be pinned.
fn move_to_any() {
    // SAFETY: a set on the stack with every bit set.
    unsafe {
        let mut set: libc::cpu_set_t = mem::zeroed();
        for cpu in 0..libc::CPU_SETSIZE as usize {
            libc::CPU_SET(cpu, &mut set);
        }
        libc::sched_setaffinity(0, size_of_val(&set), &raw const set);
    }
}

/// Moves the calling thread to the top of the hierarchies that share out CPUs, or as far up as it may go.
fn leave_groups() {
    let memberships = fs::read_to_string("/proc/thread-self/cgroup").unwrap_or_default();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for (controllers, path) in memberships.lines().filter_map(membership) {
        let unified = controllers.is_empty();
        let shares_cpus = controllers
            .split(',')
            .any(|name| matches!(name, "cpu" | "cpuset"));
        if path == "/" || !(unified || shares_cpus) {
            continue;
        }
        let Some(mount) = mounts.lines().find_map(|line| mount(line, controllers)) else {
            continue;
        };
        let file = if unified { "cgroup.threads" } else { "tasks" };
        for group in ancestors(&mount, path) {
            if fs::write(group.join(file), "0").is_ok() {
                break;
            }
        }
    }
}

/// Controllers and path of a line of `/proc/…/cgroup`; no controllers: the unified hierarchy.
fn membership(line: &str) -> Option<(&str, &str)> {
    let (_, rest) = line.split_once(':')?;
    rest.split_once(':')
}

/// The mount point in a line of `mountinfo`, if it is the hierarchy with these controllers.
fn mount(line: &str, controllers: &str) -> Option<PathBuf> {
    let (fields, rest) = line.split_once(" - ")?;
    let mut rest = rest.split(' ');
    let (kind, _, options) = (rest.next()?, rest.next()?, rest.next()?);
    let found = if controllers.is_empty() {
        kind == "cgroup2"
    } else {
        kind == "cgroup"
            && controllers
                .split(',')
                .all(|name| options.split(',').any(|option| option == name))
    };
    found.then(|| PathBuf::from(fields.split(' ').nth(4).unwrap_or("/")))
}

/// The groups above `path`, the topmost first.
fn ancestors(mount: &Path, path: &str) -> Vec<PathBuf> {
    let own = mount.join(path.trim_start_matches('/'));
    let mut groups: Vec<_> = own
        .ancestors()
        .skip(1)
        .take_while(|group| group.starts_with(mount))
        .map(Path::to_path_buf)
        .collect();
    groups.reverse();
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_found() {
        let v1 = "32 24 0:28 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct";
        let v2 = "30 24 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate";
        let expected = Some(PathBuf::from("/sys/fs/cgroup/cpu,cpuacct"));
        assert_eq!(mount(v1, "cpu,cpuacct"), expected);
        assert_eq!(mount(v1, "cpuset"), None);
        assert_eq!(mount(v1, ""), None);
        assert_eq!(mount(v2, ""), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(membership("4:cpuset:/a/b"), Some(("cpuset", "/a/b")));
        assert_eq!(membership("0::/user.slice"), Some(("", "/user.slice")));
    }

    #[test]
    fn the_topmost_group_comes_first() {
        let groups = ancestors(Path::new("/sys/fs/cgroup"), "/a/b");
        let expected = ["/sys/fs/cgroup", "/sys/fs/cgroup/a"].map(PathBuf::from);
        assert_eq!(groups, expected);
    }
}
