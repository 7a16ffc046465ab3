//! Control groups, version 1: `cpu` and `cpuset` are hierarchies of their own, and threads move one by one in both.

use std::{fs, io, path::Path};

use super::cgroup::{Hierarchy, read, read_cpus, read_number, write};
use crate::{Cap, CpuSet};

/// The one instance.
pub(super) static CGROUP1: Cgroup1 = Cgroup1;

/// Version 1.
pub(super) struct Cgroup1;

impl Hierarchy for Cgroup1 {
    fn version(&self) -> u8 {
        1
    }

    fn threads(&self) -> &'static str {
        "tasks"
    }

    fn effective_cpus(&self) -> &'static str {
        "cpuset.effective_cpus"
    }

    /// A new cpuset has neither CPUs nor memory nodes, and takes no thread before it has both.
    fn create(&self, path: &Path, controllers: &[&str]) -> io::Result<()> {
        fs::create_dir(path)?;
        if controllers.contains(&"cpuset") {
            let parent = path.parent().unwrap_or(path);
            let inherited = ["cpuset.mems", "cpuset.cpus"].iter().try_for_each(|file| {
                let value = read(&parent.join(file))?;
                write(&path.join(file), &value)
            });
            if let Err(error) = inherited {
                let _ = fs::remove_dir(path);
                return Err(error);
            }
        }
        Ok(())
    }

    /// 1024 shares are what 100 is in version 2.
    fn set_weight(&self, group: &Path, weight: u32) -> io::Result<f64> {
        let file = group.join("cpu.shares");
        let shares = (u64::from(weight) * 1024 + 50) / 100;
        write(&file, &shares.to_string())?;
        Ok(read_number::<u64>(&file)? as f64 * 100.0 / 1024.0)
    }

    /// Without a limit first: the kernel checks each of the three numbers against the other two.
    fn set_cap(&self, group: &Path, cap: &Cap) -> io::Result<Cap> {
        let [quota, period, burst] = ["cpu.cfs_quota_us", "cpu.cfs_period_us", "cpu.cfs_burst_us"]
            .map(|file| group.join(file));
        write(&quota, "-1")?;
        if burst.exists() {
            write(&burst, "0")?;
        }
        write(&period, &cap.period_us.to_string())?;
        write(&quota, &cap.quota_us.to_string())?;
        if cap.burst_us > 0 {
            write(&burst, &cap.burst_us.to_string())?;
        }
        Ok(Cap {
            quota_us: read_number(&quota)?,
            period_us: read_number(&period)?,
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
