//! What the kernel says of how often and how long it kept a VM's threads from running because of a quota: `cpu.stat`.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use scheduler::Tid;
use serde::{Deserialize, Serialize};

/// Sums over the groups of all vCPUs and the groups above them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Throttled {
    /// Periods in which a group had used up its quota.
    pub(crate) periods: u64,
    /// How long its threads were kept waiting, in microseconds.
    pub(crate) us: u64,
}

impl Throttled {
    /// Counted so far; `None` where no group of these threads has a quota's counters.
    pub(super) fn read(threads: &[Tid]) -> Option<Self> {
        let mut files = BTreeSet::new();
        for tid in threads {
            let text = fs::read_to_string(format!("/proc/self/task/{}/cgroup", tid.0)).ok()?;
            files.extend(files_of(&text));
        }
        let texts = files
            .iter()
            .filter_map(|file| fs::read_to_string(file).ok());
        texts
            .filter_map(|text| parse(&text))
            .reduce(|sum, it| Self {
                periods: sum.periods + it.periods,
                us: sum.us + it.us,
            })
    }

    /// Since `before`.
    pub(super) fn since(self, before: Self) -> Self {
        Self {
            periods: self.periods.saturating_sub(before.periods),
            us: self.us.saturating_sub(before.us),
        }
    }
}

/// `cpu.stat` of the group in `/proc/…/cgroup` that has to do with CPU time, and of those above it.
fn files_of(text: &str) -> Vec<PathBuf> {
    let group = |line: &str| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        let path = path.trim_start_matches('/').to_owned();
        Some((controllers.to_owned(), path))
    };
    let groups: Vec<_> = text.lines().filter_map(group).collect();
    let version_1 = groups
        .iter()
        .find(|(controllers, _)| controllers.split(',').any(|it| it == "cpu"))
        .map(|(_, path)| ("/sys/fs/cgroup/cpu", path));
    let version_2 = groups
        .iter()
        .find(|(controllers, _)| controllers.is_empty());
    let Some((root, path)) = version_1.or(version_2.map(|(_, path)| ("/sys/fs/cgroup", path)))
    else {
        return Vec::new();
    };
    let group = Path::new(root).join(path);
    group
        .ancestors()
        .take_while(|directory| directory.starts_with(root))
        .map(|directory| directory.join("cpu.stat"))
        .collect()
}

/// Version 1 counts nanoseconds, version 2 microseconds.
fn parse(text: &str) -> Option<Throttled> {
    let number = |name: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(name))?;
        value.trim().parse::<u64>().ok()
    };
    Some(Throttled {
        periods: number("nr_throttled ")?,
        us: number("throttled_usec ").or_else(|| Some(number("throttled_time ")? / 1000))?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_are_understood() {
        let wanted = Some(Throttled { periods: 3, us: 42 });
        assert_eq!(
            parse("nr_periods 9\nnr_throttled 3\nthrottled_time 42999\n"),
            wanted
        );
        let second = "usage_usec 1\nnr_periods 9\nnr_throttled 3\nthrottled_usec 42\n";
        assert_eq!(parse(second), wanted);
        assert_eq!(parse("usage_usec 1\nuser_usec 1\n"), None);
    }

    #[test]
    fn the_groups_above_count_too() {
        let first = files_of("4:cpuset:/x\n3:cpu,cpuacct:/vm/vcpu0\n0::/\n");
        let names = ["vm/vcpu0/", "vm/", ""].map(|at| format!("/sys/fs/cgroup/cpu/{at}cpu.stat"));
        assert_eq!(first, names.map(PathBuf::from));
        let second = files_of("0::/vm\n");
        let names = ["vm/", ""].map(|at| format!("/sys/fs/cgroup/{at}cpu.stat"));
        assert_eq!(second, names.map(PathBuf::from));
    }
}
