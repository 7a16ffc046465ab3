//! Control groups, version 2: one hierarchy, and threads of one process in several groups only inside a *threaded* subtree.
//!
//! The groups of a VM are threaded children of the group the process is in already, or of the root: nothing moves but threads,
//! which works in a delegated subtree without privileges. The process's group becomes the domain of the subtree by that, and is
//! an ordinary one again when the children are gone.

use std::{fs, io, path::Path};

use super::cgroup::{Hierarchy, read, read_cpus, read_number, write};
use crate::{Cap, CpuSet};

/// The one instance.
pub(super) static CGROUP2: Cgroup2 = Cgroup2;

/// Version 2.
pub(super) struct Cgroup2;

impl Hierarchy for Cgroup2 {
    fn version(&self) -> u8 {
        2
    }

    fn threads(&self) -> &'static str {
        "cgroup.threads"
    }

    fn effective_cpus(&self) -> &'static str {
        "cpuset.cpus.effective"
    }

    /// Threaded first: a group with processes in it hands controllers on only to threaded children.
    fn create(&self, path: &Path, controllers: &[&str]) -> io::Result<()> {
        let parent = path.parent().unwrap_or(path);
        let _alone = alone_in(parent);
        fs::create_dir(path)?;
        #[cfg(test)]
        super::tests::furnish(path)?;
        let made = write(&path.join("cgroup.type"), "threaded")
            .and_then(|()| hand_on(parent, controllers));
        if made.is_err() {
            let _ = fs::remove_dir(path);
        }
        made
    }

    fn set_weight(&self, group: &Path, weight: u32) -> io::Result<f64> {
        let file = group.join("cpu.weight");
        write(&file, &weight.to_string())?;
        read_number(&file)
    }

    /// Without a burst first: it must not be more than the quota at any moment.
    fn set_cap(&self, group: &Path, cap: &Cap) -> io::Result<Cap> {
        let [max, burst] = ["cpu.max", "cpu.max.burst"].map(|file| group.join(file));
        if burst.exists() {
            write(&burst, "0")?;
        }
        write(&max, &format!("{} {}", cap.quota_us, cap.period_us))?;
        if cap.burst_us > 0 {
            write(&burst, &cap.burst_us.to_string())?;
        }
        let text = read(&max)?;
        let (quota, period) = text
            .split_once(' ')
            .and_then(|(quota, period)| Some((quota.parse().ok()?, period.parse().ok()?)))
            .ok_or_else(|| io::Error::other(format!("cpu.max reads '{text}'")))?;
        Ok(Cap {
            quota_us: quota,
            period_us: period,
            burst_us: if burst.exists() {
                read_number(&burst)?
            } else {
                0
            },
        })
    }

    fn set_cpus(&self, group: &Path, cpus: &CpuSet) -> io::Result<CpuSet> {
        write(&group.join("cpuset.cpus"), &cpus.to_string())?;
        read_cpus(&group.join(self.effective_cpus()))
    }
}

/// Nobody else makes the first group in `parent`, or cleans up after the last, as long as this is held. Best effort: without it
/// things go wrong only if both happen in the same microseconds.
fn alone_in(parent: &Path) -> Option<fs::File> {
    let directory = fs::File::open(parent).ok()?;
    directory.lock().ok()?;
    Some(directory)
}

/// Lets the children of `parent` have `controllers`.
fn hand_on(parent: &Path, controllers: &[&str]) -> io::Result<()> {
    let file = parent.join("cgroup.subtree_control");
    let has = read(&file)?;
    for controller in controllers {
        if !has.split(' ').any(|name| name == *controller) {
            write(&file, &format!("+{controller}"))?;
        }
    }
    Ok(())
}

/// Takes `controllers` back from the children of `parent`, of which there must be none any more: so that the parent is an
/// ordinary group again.
pub(super) fn take_back(parent: &Path, controllers: &[&str]) {
    let _alone = alone_in(parent);
    let childless = fs::read_dir(parent).is_ok_and(|entries| {
        !entries
            .flatten()
            .any(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
    });
    if childless {
        for controller in controllers {
            let _ = write(
                &parent.join("cgroup.subtree_control"),
                &format!("-{controller}"),
            );
        }
    }
}
