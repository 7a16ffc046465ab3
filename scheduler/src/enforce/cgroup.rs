//! Control groups, whatever their version: where groups for VMs can be made, and what one group can be told.
//!
//! A VM has a few groups, all beside each other in one parent directory, because the kernel compares only neighbours: the weight
//! and the `cpu.idle` of a group decide between it and the groups next to it, not between it and a stranger's elsewhere.
//!
//! Their names carry the process and its start time (`rota-<vm>-<pid>-<start>.<part>`), so that anybody can tell those whose
//! process is gone ([`reap`]).

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{cgroup1::CGROUP1, cgroup2::CGROUP2, places::SHARED};
use crate::{Cap, CpuSet, Owner, Tid, VmId};

/// What the two versions of control groups do differently.
pub(super) trait Hierarchy: Sync {
    /// Its version.
    fn version(&self) -> u8;
    /// The file that takes thread ids.
    fn threads(&self) -> &'static str;
    /// The file with the CPUs a group really has.
    fn effective_cpus(&self) -> &'static str;
    /// Makes group `path`, for threads, with `controllers`.
    fn create(&self, path: &Path, controllers: &[&str]) -> io::Result<()>;
    /// Share of contended CPUs, 1 to 10000; what it has become.
    fn set_weight(&self, group: &Path, weight: u32) -> io::Result<f64>;
    /// Most CPU time; what it has become.
    fn set_cap(&self, group: &Path, cap: &Cap) -> io::Result<Cap>;
    /// Asks for CPUs; which it has.
    fn set_cpus(&self, group: &Path, cpus: &CpuSet) -> io::Result<CpuSet>;
}

/// One directory in which groups can be made, for one controller or for both.
#[derive(Clone)]
pub(super) struct Place {
    pub(super) hierarchy: &'static dyn Hierarchy,
    pub(super) path: PathBuf,
}

/// Where this process can make groups.
#[derive(Clone, Default)]
pub(super) struct Places {
    pub(super) cpu: Option<Place>,
    pub(super) cpuset: Option<Place>,
    /// The directory of this process's group in the hierarchy that knows cpusets, whether groups can be made there or not.
    pub(super) own_cpuset: Option<PathBuf>,
    /// The process must be moved there first, and back to this in the end.
    pub(super) home: Option<PathBuf>,
    /// Why there is nothing better.
    pub(super) notes: Vec<String>,
}

impl Places {
    /// Makes one group in each hierarchy there is.
    pub(super) fn create(&self, name: &str) -> io::Result<Group> {
        let mut group = Group::default();
        match (&self.cpu, &self.cpuset) {
            (Some(cpu), Some(cpuset)) if cpu.path == cpuset.path => {
                let member = Member::create(cpu, name, &["cpu", "cpuset"])?;
                group.cpuset = Some(member.clone());
                group.cpu = Some(member);
            }
            (cpu, cpuset) => {
                if let Some(place) = cpu {
                    group.cpu = Some(Member::create(place, name, &["cpu"])?);
                }
                if let Some(place) = cpuset {
                    match Member::create(place, name, &["cpuset"]) {
                        Ok(member) => group.cpuset = Some(member),
                        Err(error) => {
                            group.remove();
                            return Err(error);
                        }
                    }
                }
            }
        }
        Ok(group)
    }

    /// The directory whose cpuset limits what this process can have.
    pub(super) fn limits(&self) -> Option<PathBuf> {
        let place = self.cpuset.as_ref().map(|place| place.path.clone());
        place.or_else(|| self.own_cpuset.clone())
    }

    /// The directories, each once.
    pub(super) fn directories(&self) -> Vec<&Place> {
        let mut places: Vec<&Place> = self.cpu.iter().collect();
        if let Some(cpuset) = &self.cpuset
            && places.iter().all(|place| place.path != cpuset.path)
        {
            places.push(cpuset);
        }
        places
    }
}

/// A group in one hierarchy.
#[derive(Clone)]
pub(super) struct Member {
    pub(super) hierarchy: &'static dyn Hierarchy,
    pub(super) path: PathBuf,
}

impl Member {
    fn create(place: &Place, name: &str, controllers: &[&str]) -> io::Result<Self> {
        let path = place.path.join(name);
        place.hierarchy.create(&path, controllers)?;
        Ok(Self {
            hierarchy: place.hierarchy,
            path,
        })
    }
}

/// A group: one directory in each hierarchy that has a controller for it.
#[derive(Clone, Default)]
pub(super) struct Group {
    pub(super) cpu: Option<Member>,
    pub(super) cpuset: Option<Member>,
}

impl Group {
    fn members(&self) -> impl Iterator<Item = &Member> {
        let again = |member: &&Member| self.cpu.as_ref().is_none_or(|cpu| cpu.path != member.path);
        self.cpu.iter().chain(self.cpuset.iter().filter(again))
    }

    /// Moves a thread into it.
    pub(super) fn add(&self, tid: Tid) -> io::Result<()> {
        for member in self.members() {
            write(
                &member.path.join(member.hierarchy.threads()),
                &tid.0.to_string(),
            )?;
        }
        Ok(())
    }

    /// Moves a thread back to where the group was made.
    pub(super) fn expel(&self, tid: Tid) {
        for member in self.members() {
            if let Some(parent) = member.path.parent() {
                let _ = write(&parent.join(member.hierarchy.threads()), &tid.0.to_string());
            }
        }
    }

    /// Moves its threads back where the group was made, and removes it. What cannot be removed now is by the next start.
    pub(super) fn remove(&self) {
        for member in self.members() {
            remove(member.hierarchy, &member.path);
        }
    }
}

fn threads(file: &Path) -> Vec<Tid> {
    let text = fs::read_to_string(file).unwrap_or_default();
    text.lines()
        .filter_map(|line| line.parse().ok().map(Tid))
        .collect()
}

/// Empties and removes one directory. A dead process's threads take a moment to go.
fn remove(hierarchy: &dyn Hierarchy, path: &Path) {
    let parent = path.parent().map(|parent| parent.join(hierarchy.threads()));
    for _ in 0..20 {
        for tid in threads(&path.join(hierarchy.threads())) {
            if let Some(parent) = &parent {
                let _ = write(parent, &tid.0.to_string());
            }
        }
        match remove_directory(path) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            _ => return,
        }
    }
}

/// In a made-up hierarchy the files have to go first; in the kernel's they go with the directory.
fn remove_directory(path: &Path) -> io::Result<()> {
    if cfg!(test) && !path.starts_with("/sys") {
        return fs::remove_dir_all(path);
    }
    fs::remove_dir(path)
}

/// Writes `value` to a control file, which must be there.
pub(super) fn write(file: &Path, value: &str) -> io::Result<()> {
    let mut options = fs::OpenOptions::new();
    options.write(true).truncate(true);
    io::Write::write_all(&mut options.open(file)?, value.as_bytes())
}

/// Reads a control file.
pub(super) fn read(file: &Path) -> io::Result<String> {
    Ok(fs::read_to_string(file)?.trim().to_owned())
}

/// Reads a control file that holds one number.
pub(super) fn read_number<T: std::str::FromStr>(file: &Path) -> io::Result<T> {
    let text = read(file)?;
    text.parse()
        .map_err(|_| io::Error::other(format!("{} reads '{text}'", file.display())))
}

/// Reads a control file that holds a CPU list.
pub(super) fn read_cpus(file: &Path) -> io::Result<CpuSet> {
    read(file)?.parse().map_err(io::Error::other)
}

/// The name of one group of a VM.
pub(crate) fn name(vm: &VmId, owner: &Owner, part: &str) -> String {
    let vm: String =
        vm.0.chars()
            .take(64)
            .map(|c| match c {
                'a'..='z' | 'A'..='Z' | '0'..='9' | '-' | '_' => c,
                _ => '_',
            })
            .collect();
    format!("rota-{vm}-{}-{}.{part}", owner.pid, owner.start_time)
}

/// Whose group that is, if it is one of ours.
fn owner_of(name: &str) -> Option<Owner> {
    let (name, _part) = name.strip_prefix("rota-")?.rsplit_once('.')?;
    let (name, start_time) = name.rsplit_once('-')?;
    let (_vm, pid) = name.rsplit_once('-')?;
    Some(Owner {
        pid: pid.parse().ok()?,
        start_time: start_time.parse().ok()?,
        uuid: String::new(),
    })
}

/// Removes the groups at `paths`, which `owner`, who is gone, has noted down; those that were there. What does not have a name
/// that `owner` gives is left alone.
pub(crate) fn clear(owner: &Owner, paths: &[PathBuf]) -> Vec<PathBuf> {
    let is_its = |path: &Path| {
        let name = path.file_name().and_then(|name| name.to_str());
        let of = name.and_then(owner_of);
        of.is_some_and(|of| (of.pid, of.start_time) == (owner.pid, owner.start_time))
    };
    let mut cleared = Vec::new();
    for path in paths {
        if !path.is_absolute() || !is_its(path) || !path.is_dir() {
            continue;
        }
        let hierarchy: &dyn Hierarchy = match path.join(CGROUP2.threads()).exists() {
            true => &CGROUP2,
            false => &CGROUP1,
        };
        remove(hierarchy, path);
        cleared.push(path.clone());
        if let Some(parent) = path.parent().filter(|parent| parent.ends_with(SHARED)) {
            // The last one out; while there are others the kernel says no.
            let _ = fs::remove_dir(parent);
        }
    }
    cleared
}

/// Removes the groups in `place` whose processes are gone. Their names.
pub(super) fn reap(place: &Place) -> Vec<String> {
    let mut reaped = Vec::new();
    let Ok(entries) = fs::read_dir(&place.path) else {
        return reaped;
    };
    for entry in entries.flatten() {
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        if owner_of(&name).is_some_and(|owner| !owner.is_alive()) {
            remove(place.hierarchy, &entry.path());
            reaped.push(name);
        }
    }
    reaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_their_owner() {
        let owner = Owner {
            pid: 12,
            start_time: 345,
            uuid: "u".into(),
        };
        let name = name(&"web-1/ä".into(), &owner, "vcpu");
        assert_eq!(name, "rota-web-1__-12-345.vcpu");
        let read = owner_of(&name).unwrap();
        assert_eq!((read.pid, read.start_time), (12, 345));
        for strange in ["rota", "rota-x.vcpu", "rota-a-b-c.vcpu", "user.slice"] {
            assert!(owner_of(strange).is_none(), "{strange}");
        }
    }
}
