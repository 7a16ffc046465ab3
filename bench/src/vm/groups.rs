//! Control groups as libvirt and Kubernetes make them, of the version this machine has; removed with this.
//!
//! Version 1 has a hierarchy for each controller, and threads of a process are anywhere. In version 2 a group at the root takes the
//! whole process, and threads of it are in *threaded* groups below that.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// How the groups' names begin; the number of the process that made them follows.
const PREFIX: &str = "sched-bench-";
/// Where kernels have it, a group without takes no real-time threads. libvirt leaves that to the administrator.
const REAL_TIME: &str = "cpu.rt_runtime_us";

/// What a peer asks of a group.
#[derive(Default)]
pub(crate) struct Limits {
    /// Its part, against its neighbours.
    pub(crate) shares: Option<Shares>,
    /// Microseconds in each period, and the period.
    pub(crate) quota: Option<(u64, u64)>,
    /// Its CPUs; without, it has those above it.
    pub(crate) cpus: Option<String>,
    /// Real-time microseconds in a second, where groups need them.
    pub(crate) real_time_us: Option<u32>,
}

/// A group's part, in the words of who asks.
#[derive(Clone, Copy)]
pub(crate) enum Shares {
    /// libvirt's `<shares>`: `cpu.shares` in version 1, and as it is `cpu.weight` in version 2.
    Libvirt(u32),
    /// CPUs requested of Kubernetes, in thousandths: 1024 shares a CPU in version 1, mapped to weights as its runtimes do in version 2.
    Kubernetes {
        /// The CPUs.
        millicpus: u32,
    },
}

impl Shares {
    fn shares(self) -> u64 {
        match self {
            Self::Libvirt(shares) => shares.into(),
            Self::Kubernetes { millicpus } => (u64::from(millicpus) * 1024 / 1000).max(2),
        }
    }

    fn weight(self) -> u64 {
        match self {
            Self::Libvirt(shares) => shares.into(),
            Self::Kubernetes { .. } => 1 + (self.shares() - 2) * 9999 / 262_142,
        }
    }
}

/// A group: its directory in each hierarchy it is in.
#[derive(Clone)]
pub(crate) struct Group {
    cpu: PathBuf,
    /// In version 1, and only if it has CPUs of its own.
    cpuset: Option<PathBuf>,
    threaded: bool,
}

impl Group {
    /// Where its CPUs are written.
    pub(crate) fn cpuset(&self) -> &Path {
        self.cpuset.as_ref().unwrap_or(&self.cpu)
    }
}

/// Where groups are made, and what has to be undone.
pub(crate) struct Groups {
    at: Hierarchies,
    made: Vec<PathBuf>,
    /// Threads that were moved, and the file that takes them back.
    moved: Vec<(PathBuf, i32)>,
}

enum Hierarchies {
    /// The groups of this process in the hierarchies of `cpu` and `cpuset`.
    One { cpu: PathBuf, cpuset: PathBuf },
    /// The root, and the group of this process.
    Two { root: PathBuf, home: PathBuf },
}

impl Hierarchies {
    fn here() -> io::Result<Self> {
        let text = fs::read_to_string("/proc/self/cgroup")?;
        let mount = Path::new("/sys/fs/cgroup");
        let own = |controller: &str| {
            text.lines().find_map(|line| {
                let mut parts = line.splitn(3, ':').skip(1);
                let controllers = parts.next()?;
                let path = parts.next()?.trim_start_matches('/');
                let has = controllers.split(',').any(|it| it == controller);
                has.then(|| mount.join(controller).join(path))
            })
        };
        if let (Some(cpu), Some(cpuset)) = (own("cpu"), own("cpuset")) {
            return Ok(Self::One { cpu, cpuset });
        }
        let unified = text.lines().find_map(|line| line.strip_prefix("0::/"));
        let home = unified.map(|path| mount.join(path));
        match home.filter(|_| mount.join("cgroup.controllers").exists()) {
            Some(home) => Ok(Self::Two {
                root: mount.to_owned(),
                home,
            }),
            None => Err(io::Error::other("no hierarchy has cpu and cpuset")),
        }
    }

    fn places(&self) -> Vec<&Path> {
        match self {
            Self::One { cpu, cpuset } => vec![cpu, cpuset],
            Self::Two { root, .. } => vec![root],
        }
    }
}

impl Groups {
    /// Where this process may make them.
    pub(crate) fn here() -> io::Result<Self> {
        let groups = Self {
            at: Hierarchies::here()?,
            made: Vec::new(),
            moved: Vec::new(),
        };
        groups.reap();
        if let Hierarchies::Two { root, .. } = &groups.at {
            hand_on(root)?;
        }
        Ok(groups)
    }

    /// Removes what killed processes have left.
    fn reap(&self) {
        for place in self.at.places() {
            for entry in fs::read_dir(place).into_iter().flatten().flatten() {
                let name = entry.file_name().into_string().unwrap_or_default();
                let pid = name
                    .strip_prefix(PREFIX)
                    .and_then(|rest| rest.split('.').next());
                if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
                    let _ = remove(&entry.path());
                }
            }
        }
    }

    /// The group of a VM or pod, with this process in it.
    pub(crate) fn of_process(&mut self, name: &str, limits: &Limits) -> io::Result<Group> {
        let group = self.make(None, name, limits)?;
        self.put_process(&group)?;
        Ok(group)
    }

    /// A group for some of the threads of a VM.
    pub(crate) fn of_threads(
        &mut self,
        vm: &Group,
        name: &str,
        limits: &Limits,
    ) -> io::Result<Group> {
        self.make(Some(vm), name, limits)
    }

    fn make(&mut self, parent: Option<&Group>, name: &str, limits: &Limits) -> io::Result<Group> {
        let name = format!("{PREFIX}{}.{name}", std::process::id());
        match &self.at {
            Hierarchies::One { cpu, cpuset } => {
                let (cpu, cpuset) = match parent {
                    Some(group) => (&group.cpu, group.cpuset.as_ref().unwrap_or(cpuset)),
                    None => (cpu, cpuset),
                };
                let (cpu, cpuset) = (cpu.join(&name), cpuset.join(&name));
                self.make_version_1(cpu, cpuset, limits)
            }
            Hierarchies::Two { root, .. } => {
                let path = parent.map_or(root, |group| &group.cpu).join(&name);
                self.make_version_2(path, parent, limits)
            }
        }
    }

    fn make_version_1(
        &mut self,
        cpu: PathBuf,
        cpuset: PathBuf,
        limits: &Limits,
    ) -> io::Result<Group> {
        self.create(&cpu)?;
        if let Some(shares) = limits.shares {
            fs::write(cpu.join("cpu.shares"), shares.shares().to_string())?;
        }
        if let Some((quota, period)) = limits.quota {
            fs::write(cpu.join("cpu.cfs_period_us"), period.to_string())?;
            fs::write(cpu.join("cpu.cfs_quota_us"), quota.to_string())?;
        }
        if let Some(time) = limits.real_time_us
            && cpu.join(REAL_TIME).exists()
        {
            fs::write(cpu.join(REAL_TIME), time.to_string())?;
        }
        let cpuset = match &limits.cpus {
            Some(cpus) => {
                self.create(&cpuset)?;
                let above = cpuset.parent().unwrap_or(&cpuset);
                let mems = fs::read_to_string(above.join("cpuset.mems"))?;
                fs::write(cpuset.join("cpuset.mems"), mems)?;
                fs::write(cpuset.join("cpuset.cpus"), cpus)?;
                Some(cpuset)
            }
            None => None,
        };
        Ok(Group {
            cpu,
            cpuset,
            threaded: true,
        })
    }

    fn make_version_2(
        &mut self,
        path: PathBuf,
        parent: Option<&Group>,
        limits: &Limits,
    ) -> io::Result<Group> {
        self.create(&path)?;
        if let Some(parent) = parent {
            // In this order: a group with processes in it hands controllers on only to threaded ones.
            fs::write(path.join("cgroup.type"), "threaded")?;
            hand_on(&parent.cpu)?;
        }
        if let Some(shares) = limits.shares {
            fs::write(path.join("cpu.weight"), shares.weight().to_string())?;
        }
        if let Some((quota, period)) = limits.quota {
            fs::write(path.join("cpu.max"), format!("{quota} {period}"))?;
        }
        if let Some(cpus) = &limits.cpus {
            fs::write(path.join("cpuset.cpus"), cpus)?;
        }
        Ok(Group {
            cpu: path,
            cpuset: None,
            threaded: parent.is_some(),
        })
    }

    fn create(&mut self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)?;
        self.made.push(path.to_owned());
        Ok(())
    }

    /// Puts one thread into a group.
    pub(crate) fn put(&mut self, group: &Group, tid: i32) -> io::Result<()> {
        match &self.at {
            Hierarchies::One { cpu, cpuset } => {
                fs::write(group.cpu.join("tasks"), tid.to_string())?;
                self.moved.push((cpu.join("tasks"), tid));
                if let Some(own) = &group.cpuset {
                    fs::write(own.join("tasks"), tid.to_string())?;
                    self.moved.push((cpuset.join("tasks"), tid));
                }
                Ok(())
            }
            Hierarchies::Two { .. } => fs::write(group.cpu.join("cgroup.threads"), tid.to_string()),
        }
    }

    /// Puts all threads of this process into a group.
    pub(crate) fn put_process(&mut self, group: &Group) -> io::Result<()> {
        if !group.threaded {
            if let Hierarchies::Two { home, .. } = &self.at {
                let pid = std::process::id() as i32;
                self.moved.push((home.join("cgroup.procs"), pid));
            }
            return fs::write(group.cpu.join("cgroup.procs"), "0");
        }
        for entry in fs::read_dir("/proc/self/task")? {
            if let Some(tid) = entry?
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
            {
                self.put(group, tid)?;
            }
        }
        Ok(())
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        for (file, number) in &self.moved {
            let _ = fs::write(file, number.to_string());
        }
        for path in self.made.iter().rev() {
            let _ = fs::remove_dir(path);
        }
    }
}

/// Lets the groups below `path` have controllers.
fn hand_on(path: &Path) -> io::Result<()> {
    fs::write(path.join("cgroup.subtree_control"), "+cpu +cpuset")
}

/// A group and those in it.
fn remove(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

#[cfg(test)]
mod tests {
    use super::Shares;

    #[test]
    fn shares_are_what_the_peers_make_of_them() {
        let pod = |millicpus| Shares::Kubernetes { millicpus };
        assert_eq!((pod(1000).shares(), pod(1000).weight()), (1024, 39));
        assert_eq!((pod(0).shares(), pod(0).weight()), (2, 1));
        let domain = Shares::Libvirt(3072);
        assert_eq!((domain.shares(), domain.weight()), (3072, 3072));
    }
}
