//! The machine as the kernel shows it in `/sys` and `/proc`.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use super::{Abilities, Ability, Cpu, Hierarchies, Host, Node, probe};
use crate::{CpuSet, SchedMode};

/// A machine that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{}: {why}", path.display())]
pub struct HostError {
    path: PathBuf,
    why: String,
}

/// A tick where nothing says how long it is: that of most distributions.
const USUAL_TICK_NS: u64 = 4_000_000;

impl Host {
    /// This machine, with what its kernel can do and this process may tried out.
    ///
    /// # Errors
    ///
    /// `/sys` or `/proc` is not mounted, or shows no CPU.
    pub fn read() -> Result<Self, HostError> {
        let root = Path::new("/");
        let mut host = Self::read_tree(root)?;
        host.abilities = probe::abilities();
        if let Some(tick_ns) = probe::tick_ns() {
            host.tick_ns = tick_ns;
            "resolution of CLOCK_MONOTONIC_COARSE".clone_into(&mut host.tick_source);
        }
        Ok(host)
    }

    /// This machine as it is now: CPUs, memory and cpuset read again, while what its kernel can do, its tick and who schedules
    /// are taken to be what they were.
    ///
    /// # Errors
    ///
    /// As [`Self::read`].
    pub fn reread(&self) -> Result<Self, HostError> {
        let mut host = Self::read_tree(Path::new("/"))?;
        let active = std::mem::take(&mut host.abilities.sched_ext_active);
        host.abilities = Abilities {
            sched_ext_active: active,
            ..self.abilities.clone()
        };
        host.tick_ns = self.tick_ns;
        host.tick_source.clone_from(&self.tick_source);
        host.mode = self.mode;
        Ok(host)
    }

    /// The machine whose `/sys`, `/proc` and `/boot` are recorded below `root`. Its kernel cannot be tried, so that nothing is
    /// known to be possible there.
    ///
    /// # Errors
    ///
    /// No CPU is recorded there.
    pub fn read_tree(root: &Path) -> Result<Self, HostError> {
        let tree = Tree { root };
        let base = root.join("sys/devices/system/cpu");
        let present = tree.cpus("sys/devices/system/cpu/present");
        let present = present
            .or_else(|| tree.cpus("sys/devices/system/cpu/online"))
            .ok_or_else(|| HostError {
                path: base.clone(),
                why: "no list of CPUs there: is sysfs mounted?".to_owned(),
            })?;
        if present.is_empty() {
            let why = "no CPU is present".to_owned();
            return Err(HostError { path: base, why });
        }
        // Without hot-plugging there may be no such file, and then all of them are.
        let online = tree.cpus("sys/devices/system/cpu/online");
        let online = online.unwrap_or_else(|| present.clone());
        let status = tree.text("proc/self/status").unwrap_or_default();
        let hierarchies = Hierarchies::read(root).ok();
        let mut allowed = field(&status, "Cpus_allowed_list:").unwrap_or_else(|| online.clone());
        if let Some(cpuset) = hierarchies.as_ref().and_then(|found| tree.cpuset(found)) {
            allowed.retain(&cpuset);
        }
        let mut isolated = tree
            .cpus("sys/devices/system/cpu/isolated")
            .unwrap_or_default();
        let unified = hierarchies.and_then(|found| found.directory("cgroup2", None));
        if let Some((mount, _)) = unified {
            let file = tree.within(&mount).join("cpuset.cpus.isolated");
            isolated.add(&tree.cpus(file).unwrap_or_default());
        }
        let (tick_ns, tick_source) = tree.tick();
        Ok(Self {
            cpus: tree.topology(&present),
            nodes: tree.nodes(&field(&status, "Mems_allowed_list:")),
            isolated: &isolated & &present,
            nohz_full: tree
                .cpus("sys/devices/system/cpu/nohz_full")
                .unwrap_or_default(),
            online: &online & &present,
            allowed: &allowed & &present,
            tick_ns,
            tick_source,
            mode: SchedMode::Unknown,
            abilities: Abilities {
                sched_ext_active: tree.sched_ext(),
                ..Abilities::default()
            },
        })
    }
}

/// A list of numbers in a line of `/proc/self/status`.
fn field(status: &str, name: &str) -> Option<CpuSet> {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.parse().ok())
}

/// Files below some root.
struct Tree<'a> {
    root: &'a Path,
}

impl Tree<'_> {
    fn text(&self, path: impl AsRef<Path>) -> io::Result<String> {
        fs::read_to_string(self.root.join(path))
    }

    fn cpus(&self, path: impl AsRef<Path>) -> Option<CpuSet> {
        self.text(path).ok()?.parse().ok()
    }

    fn number(&self, path: impl AsRef<Path>) -> Option<u32> {
        self.text(path).ok()?.trim().parse().ok()
    }

    /// An absolute path, below the root.
    fn within(&self, path: &Path) -> PathBuf {
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The CPUs of this process's cpuset: of its own group or of the nearest above that has the file.
    fn cpuset(&self, hierarchies: &Hierarchies) -> Option<CpuSet> {
        let hierarchy = [
            ("cgroup", Some("cpuset"), "cpuset.effective_cpus"),
            ("cgroup2", None, "cpuset.cpus.effective"),
        ];
        hierarchy.into_iter().find_map(|(kind, controller, file)| {
            let (mount, own) = hierarchies.directory(kind, controller)?;
            own.ancestors()
                .take_while(|group| group.starts_with(&mount))
                .find_map(|group| self.cpus(self.within(group).join(file)))
                .filter(|cpus| !cpus.is_empty())
        })
    }

    fn topology(&self, present: &CpuSet) -> Vec<Cpu> {
        let nodes = self.node_of();
        let (mut cores, mut clusters, mut llcs) =
            (Numbers::default(), Numbers::default(), Numbers::default());
        present
            .iter()
            .map(|id| {
                let base = format!("sys/devices/system/cpu/cpu{id}");
                let topology = |file: &str| self.cpus(format!("{base}/topology/{file}"));
                // A CPU that is offline shows nothing: it stands for itself until it is back.
                let siblings = topology("core_cpus_list")
                    .or_else(|| topology("thread_siblings_list"))
                    .filter(|siblings| siblings.contains(id))
                    .unwrap_or_else(|| CpuSet::one(id));
                let socket = self
                    .number(format!("{base}/topology/physical_package_id"))
                    .unwrap_or(0);
                let package = topology("package_cpus_list")
                    .or_else(|| topology("core_siblings_list"))
                    .unwrap_or_else(|| siblings.clone());
                let first = siblings.lowest().unwrap_or(id);
                // Without clusters the kernel shows the core, or the whole package.
                let cluster = topology("cluster_cpus_list")
                    .filter(|cluster| siblings.is_subset(cluster) && *cluster != package)
                    .unwrap_or_else(|| siblings.clone());
                let llc = self.last_cache(&base).unwrap_or(package);
                Cpu {
                    id,
                    node: nodes.get(&id).copied().unwrap_or(0),
                    socket,
                    cluster: clusters.of(cluster.lowest().unwrap_or(id)),
                    llc: llcs.of(llc.lowest().unwrap_or(id)),
                    core: cores.of(first),
                    thread: siblings.iter().take_while(|other| *other != id).count() as u32,
                }
            })
            .collect()
    }

    /// The CPUs that share the last cache of the CPU at `base`.
    fn last_cache(&self, base: &str) -> Option<CpuSet> {
        (0..10)
            .filter_map(|index| {
                let cache = format!("{base}/cache/index{index}");
                let level = self.number(format!("{cache}/level"))?;
                Some((level, self.cpus(format!("{cache}/shared_cpu_list"))?))
            })
            .max_by_key(|(level, _)| *level)
            .map(|(_, cpus)| cpus)
            .filter(|cpus| !cpus.is_empty())
    }

    fn node_numbers(&self) -> CpuSet {
        self.cpus("sys/devices/system/node/online")
            .filter(|nodes| !nodes.is_empty())
            .unwrap_or_else(|| CpuSet::one(0))
    }

    fn node_of(&self) -> BTreeMap<u32, u32> {
        let mut node_of = BTreeMap::new();
        for node in &self.node_numbers() {
            let cpus = self.cpus(format!("sys/devices/system/node/node{node}/cpulist"));
            for cpu in &cpus.unwrap_or_default() {
                node_of.insert(cpu, node);
            }
        }
        node_of
    }

    fn nodes(&self, allowed: &Option<CpuSet>) -> Vec<Node> {
        self.node_numbers()
            .iter()
            .map(|id| {
                let base = format!("sys/devices/system/node/node{id}");
                // A kernel without NUMA has the whole in one file.
                let meminfo = self
                    .text(format!("{base}/meminfo"))
                    .or_else(|_| self.text("proc/meminfo"))
                    .unwrap_or_default();
                let distance = self.text(format!("{base}/distance")).unwrap_or_default();
                Node {
                    id,
                    total_mib: mib(&meminfo, "MemTotal:"),
                    free_mib: free_mib(&meminfo),
                    allowed: allowed.as_ref().is_none_or(|allowed| allowed.contains(id)),
                    distance: distance
                        .split_whitespace()
                        .map_while(|text| text.parse().ok())
                        .collect(),
                }
            })
            .collect()
    }

    /// The tick as the kernel was configured, else the usual one; and which of the two.
    fn tick(&self) -> (u64, String) {
        let configured = self
            .text("proc/sys/kernel/osrelease")
            .ok()
            .and_then(|release| {
                let file = format!("boot/config-{}", release.trim());
                let config = self.text(&file).ok()?;
                let hz = config
                    .lines()
                    .find_map(|line| line.strip_prefix("CONFIG_HZ="))?;
                let hz: u64 = hz.parse().ok().filter(|hz| (10..=10_000).contains(hz))?;
                Some((1_000_000_000 / hz, format!("CONFIG_HZ in /{file}")))
            });
        configured.unwrap_or_else(|| (USUAL_TICK_NS, "assumed".to_owned()))
    }

    fn sched_ext(&self) -> Ability {
        let state = self.text("sys/kernel/sched_ext/state");
        match state.as_ref().map(|state| state.trim()) {
            Ok("disabled") => Ability::no("no BPF scheduler is loaded"),
            Ok(state) => {
                let name = self
                    .text("sys/kernel/sched_ext/root/ops")
                    .unwrap_or_default();
                Ability::yes(format!("a BPF scheduler is {state}: {}", name.trim()))
            }
            Err(_) => Ability::no("this kernel has no sched_ext"),
        }
    }
}

/// Whether a BPF scheduler is in charge of the machine below `root`.
pub(super) fn sched_ext(root: &Path) -> Ability {
    Tree { root }.sched_ext()
}

/// What is free, and what the kernel gives back at once.
fn free_mib(meminfo: &str) -> u64 {
    [
        "MemFree:",
        "Inactive(file):",
        "Active(file):",
        "KReclaimable:",
    ]
    .iter()
    .map(|name| mib(meminfo, name))
    .sum()
}

/// A line of a `meminfo`, which is in KiB.
fn mib(meminfo: &str, name: &str) -> u64 {
    let kib = meminfo.lines().find_map(|line| {
        let (_, value) = line.split_once(name)?;
        value.split_whitespace().next()?.parse::<u64>().ok()
    });
    kib.unwrap_or(0) / 1024
}

/// Consecutive numbers for things that have a lowest CPU, in the order they turn up.
#[derive(Default)]
struct Numbers(BTreeMap<u32, u32>);

impl Numbers {
    fn of(&mut self, lowest: u32) -> u32 {
        let next = self.0.len() as u32;
        *self.0.entry(lowest).or_insert(next)
    }
}
