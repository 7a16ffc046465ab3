//! Control groups of version 1, as libvirt and Kubernetes make them; removed with this.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// How the groups' names begin; the number of the process that made them follows.
const PREFIX: &str = "sched-bench-";

/// Groups below that of this process, in the hierarchies of `cpu` and `cpuset`.
pub(crate) struct Groups {
    cpu: PathBuf,
    cpuset: PathBuf,
    made: Vec<PathBuf>,
    inside: Vec<(PathBuf, i32)>,
}

impl Groups {
    /// Where this process may make them.
    pub(crate) fn here() -> io::Result<Self> {
        let place = |controller: &str| -> io::Result<PathBuf> {
            let text = fs::read_to_string("/proc/self/cgroup")?;
            let own = text.lines().find_map(|line| {
                let mut parts = line.splitn(3, ':').skip(1);
                let controllers = parts.next()?;
                let path = parts.next()?;
                controllers
                    .split(',')
                    .any(|it| it == controller)
                    .then_some(path)
            });
            let own = own.ok_or_else(|| {
                io::Error::other(format!(
                    "no version 1 hierarchy has {controller}: this peer is emulated on version 1"
                ))
            })?;
            Ok(Path::new("/sys/fs/cgroup")
                .join(controller)
                .join(own.trim_start_matches('/')))
        };
        let groups = Self {
            cpu: place("cpu")?,
            cpuset: place("cpuset")?,
            made: Vec::new(),
            inside: Vec::new(),
        };
        groups.reap();
        Ok(groups)
    }

    /// Removes what killed processes have left.
    fn reap(&self) {
        for place in [&self.cpu, &self.cpuset] {
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

    /// Makes a group of the controller `cpu`, with these files; `parent` is another one's path, or nothing.
    pub(crate) fn cpu(
        &mut self,
        parent: Option<&Path>,
        name: &str,
        files: &[(&str, String)],
    ) -> io::Result<PathBuf> {
        let parent = parent.unwrap_or(&self.cpu).to_owned();
        self.make(&parent, name, files)
    }

    /// Makes a group of the controller `cpuset` with these CPUs.
    pub(crate) fn cpuset(
        &mut self,
        parent: Option<&Path>,
        name: &str,
        cpus: &str,
    ) -> io::Result<PathBuf> {
        let parent = parent.unwrap_or(&self.cpuset).to_owned();
        let mems = fs::read_to_string(parent.join("cpuset.mems"))?;
        let files = [("cpuset.mems", mems), ("cpuset.cpus", cpus.to_owned())];
        self.make(&parent, name, &files)
    }

    fn make(&mut self, parent: &Path, name: &str, files: &[(&str, String)]) -> io::Result<PathBuf> {
        let path = parent.join(format!("{PREFIX}{}.{name}", std::process::id()));
        fs::create_dir(&path)?;
        self.made.push(path.clone());
        for (file, content) in files {
            fs::write(path.join(file), content)?;
        }
        Ok(path)
    }

    /// Puts one thread into a group.
    pub(crate) fn put(&mut self, group: &Path, tid: i32) -> io::Result<()> {
        fs::write(group.join("tasks"), tid.to_string())?;
        let home = match group.starts_with(&self.cpu) {
            true => self.cpu.clone(),
            false => self.cpuset.clone(),
        };
        self.inside.push((home, tid));
        Ok(())
    }

    /// Puts all threads of this process into a group.
    pub(crate) fn put_process(&mut self, group: &Path) -> io::Result<()> {
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
        for (home, tid) in &self.inside {
            let _ = fs::write(home.join("tasks"), tid.to_string());
        }
        for path in self.made.iter().rev() {
            let _ = fs::remove_dir(path);
        }
    }
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
