//! Where control groups are mounted and which this process is in.
//!
//! What counts is which hierarchy has a controller, not what is mounted: a hybrid machine mounts version 2 without controllers
//! beside version 1.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// What `/proc` says about control groups.
pub(crate) struct Hierarchies {
    /// `/proc/self/mountinfo`.
    mounts: String,
    /// `/proc/self/cgroup`.
    groups: String,
}

impl Hierarchies {
    /// Reads it under `root`: that of this machine, or of a tree recorded on another.
    pub(crate) fn read(root: &Path) -> io::Result<Self> {
        Ok(Self {
            mounts: fs::read_to_string(root.join("proc/self/mountinfo"))?,
            groups: fs::read_to_string(root.join("proc/self/cgroup"))?,
        })
    }

    /// Where the hierarchy is mounted whose file system is `kind` and which has `controller`, if one is asked for.
    fn mount(&self, kind: &str, controller: Option<&str>) -> Option<(PathBuf, &str)> {
        self.mounts.lines().find_map(|line| {
            let (place, system) = line.split_once(" - ")?;
            let mut place = place.split(' ').skip(3);
            let (root, point) = (place.next()?, place.next()?);
            let mut system = system.split(' ');
            let fits = system.next()? == kind
                && controller.is_none_or(|controller| {
                    system
                        .nth(1)
                        .is_some_and(|options| options.split(',').any(|name| name == controller))
                });
            fits.then(|| (PathBuf::from(point), root))
        })
    }

    /// The group of this process: in the hierarchy of `controller`, or in that of version 2.
    fn group(&self, controller: Option<&str>) -> Option<&str> {
        self.groups.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (names, path) = (fields.next()?, fields.next()?);
            let fits = match controller {
                Some(controller) => names.split(',').any(|name| name == controller),
                None => names.is_empty(),
            };
            fits.then_some(path)
        })
    }

    /// The mount point and the directory of this process's group in it. What is mounted may be only a part of the hierarchy.
    pub(crate) fn directory(
        &self,
        kind: &str,
        controller: Option<&str>,
    ) -> Option<(PathBuf, PathBuf)> {
        let (mount, root) = self.mount(kind, controller)?;
        let path = Path::new(self.group(controller)?);
        let inside = path.strip_prefix(root).unwrap_or(Path::new(""));
        let inside = inside.strip_prefix("/").unwrap_or(inside);
        let directory = if inside.as_os_str().is_empty() {
            mount.clone()
        } else {
            mount.join(inside)
        };
        Some((mount, directory))
    }
}

/// May this process write in `directory`?
pub(crate) fn may_write(directory: &Path) -> bool {
    let Ok(path) = std::ffi::CString::new(directory.as_os_str().as_encoded_bytes()) else {
        return false;
    };
    // SAFETY: a string that ends in zero.
    unsafe { libc::access(path.as_ptr(), libc::W_OK) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
30 29 0:26 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
31 29 0:27 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset
32 29 0:28 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw";

    #[test]
    fn each_hierarchy_is_found_by_its_controllers() {
        let proc = Hierarchies {
            mounts: HYBRID.into(),
            groups: "3:cpuset:/a b\n1:cpu,cpuacct:/vm:1\n0::/x".into(),
        };
        let directory = |kind, controller| proc.directory(kind, controller).unwrap().1;
        let root = Path::new("/sys/fs/cgroup");
        assert_eq!(directory("cgroup", Some("cpu")), root.join("cpu/vm:1"));
        assert_eq!(directory("cgroup", Some("cpuset")), root.join("cpuset/a b"));
        assert_eq!(directory("cgroup2", None), root.join("unified/x"));
        assert!(proc.directory("cgroup", Some("memory")).is_none());
    }

    #[test]
    fn a_part_of_a_hierarchy_is_the_whole_of_a_container() {
        let proc = Hierarchies {
            mounts: "32 29 0:28 /pod/c1 /sys/fs/cgroup ro - cgroup2 cgroup2 rw".into(),
            groups: "0::/pod/c1".into(),
        };
        let (mount, own) = proc.directory("cgroup2", None).unwrap();
        assert_eq!(
            (mount.as_path(), &own),
            (Path::new("/sys/fs/cgroup"), &mount)
        );
    }
}
