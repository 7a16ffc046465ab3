//! Finding where this process can make control groups.
//!
//! For each controller the version that has it counts, not what is mounted: a hybrid machine mounts version 2 without
//! controllers beside version 1.

use std::{fs, io, path::Path};

use super::{
    cgroup::{Place, Places, read, write},
    cgroup1::CGROUP1,
    cgroup2::CGROUP2,
};
use crate::{
    host::{Hierarchies, may_write},
    sys,
};

/// The name of the group below the root of version 2 that root's VMs share where the process's own group has no controllers.
pub(super) const SHARED: &str = "rota";

impl Places {
    /// Looks for them. `parent` is a directory of version 2 to be used instead of this process's own group.
    pub(super) fn find(parent: Option<&Path>) -> Self {
        match Hierarchies::read(Path::new("/")) {
            Ok(proc) => Self::find_in(&proc, parent),
            Err(error) => Self {
                notes: vec![format!("/proc cannot be read: {error}")],
                ..Self::default()
            },
        }
    }

    fn find_in(proc: &Hierarchies, parent: Option<&Path>) -> Self {
        let mut places = Self {
            own_cpuset: proc
                .directory("cgroup", Some("cpuset"))
                .or_else(|| proc.directory("cgroup2", None))
                .map(|(_, own)| own),
            ..Self::default()
        };
        if let Some(parent) = parent {
            places.use_version_2(parent, "the group that was named");
            if places.cpu.is_some() || places.cpuset.is_some() {
                places.home = proc
                    .directory("cgroup2", None)
                    .map(|(_, own)| own)
                    .filter(|own| own != parent);
            }
            return places;
        }
        for (controller, slot) in [("cpu", &mut places.cpu), ("cpuset", &mut places.cpuset)] {
            *slot = proc
                .directory("cgroup", Some(controller))
                .filter(|(_, own)| may_write(own))
                .map(|(_, path)| Place {
                    hierarchy: &CGROUP1,
                    path,
                });
        }
        if places.cpu.is_some() || places.cpuset.is_some() {
            return places;
        }
        let Some((mount, own)) = proc.directory("cgroup2", None) else {
            places.notes.push("no control groups are mounted".into());
            return places;
        };
        places.use_version_2(&own, "this process's group");
        let nothing = places.cpu.is_none() && places.cpuset.is_none();
        // Only the real root has no type.
        let real_root = !mount.join("cgroup.type").exists();
        if nothing && sys::is_root() && real_root && own != mount {
            places.use_shared(&mount);
            places.home = places.cpu.is_some().then_some(own);
        }
        places
    }

    /// Uses `path` for those controllers that it can hand on.
    fn use_version_2(&mut self, path: &Path, what: &str) {
        let available = read(&path.join("cgroup.controllers")).unwrap_or_default();
        if !may_write(path) {
            self.notes.push(format!(
                "{what}, {}, is not delegated to this user (systemd: Delegate=yes)",
                path.display()
            ));
            return;
        }
        for (controller, slot) in [("cpu", &mut self.cpu), ("cpuset", &mut self.cpuset)] {
            if available.split(' ').any(|name| name == controller) {
                *slot = Some(Place {
                    hierarchy: &CGROUP2,
                    path: path.to_owned(),
                });
            } else {
                self.notes.push(format!(
                    "{what}, {}, has no {controller} controller",
                    path.display()
                ));
            }
        }
    }

    /// Root may make a group below the root, which has all controllers. The VMs in it are neighbours, whatever shells or units
    /// they were started from.
    fn use_shared(&mut self, root: &Path) {
        let shared = root.join(SHARED);
        let made = match fs::create_dir(&shared) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            result => result,
        };
        let handed_on = made.and_then(|()| {
            ["+cpu", "+cpuset"]
                .iter()
                .try_for_each(|change| write(&root.join("cgroup.subtree_control"), change))
        });
        match handed_on {
            Ok(()) => self.use_version_2(&shared, "the group of Rota's VMs"),
            Err(error) => self
                .notes
                .push(format!("{} cannot be made: {error}", shared.display())),
        }
    }
}
