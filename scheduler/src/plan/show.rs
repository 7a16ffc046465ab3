//! Plans and refusals as text for a person.

use std::fmt;

use super::{Binding, Constraint, Nearest, Rejection, VmPlan};

impl fmt::Display for VmPlan {
    /// A table: where each vCPU runs and why, then the helpers, then what else should be known.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows = vec![["vCPU", "CPUs", "own", "why"].map(str::to_owned)];
        // Neighbours with the same place are one row.
        let same =
            |a: &super::VcpuPlan, b: &super::VcpuPlan| (&a.cpus, &a.why) == (&b.cpus, &b.why);
        for group in self.vcpus.chunk_by(same) {
            let (first, last) = (&group[0], &group[group.len() - 1]);
            let numbers = if group.len() == 1 {
                first.vcpu.to_string()
            } else {
                format!("{}-{}", first.vcpu, last.vcpu)
            };
            let own = if first.exclusive { "yes" } else { "no" };
            rows.push([
                numbers,
                first.cpus.to_string(),
                own.to_owned(),
                first.why.clone(),
            ]);
        }
        rows.push([
            "helpers".to_owned(),
            self.helpers.to_string(),
            "no".to_owned(),
            self.helpers_why.clone(),
        ]);
        let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
        let (numbers, cpus) = (width(0), width(1));
        for [number, set, own, why] in &rows {
            writeln!(f, "{number:<numbers$}  {set:<cpus$}  {own:<3}  {why}")?;
        }
        let mut pins = self.vcpus.iter().map(|vcpu| vcpu.cpus.clone());
        let idle = pins
            .by_ref()
            .fold(self.exclusive.clone(), |idle, cpus| &idle - &cpus);
        if !idle.is_empty() {
            writeln!(f, "kept idle: CPUs {idle}, siblings of its own")?;
        }
        if !self.memory_nodes.is_empty() {
            let nodes: Vec<String> = self.memory_nodes.iter().map(u32::to_string).collect();
            writeln!(f, "memory: from NUMA node {}", nodes.join(", "))?;
        }
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Rejection {
    /// Each reason, then the nearest request that can be had.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for reason in &self.reasons {
            writeln!(f, "{reason}")?;
        }
        match &self.nearest {
            Some(nearest) => writeln!(f, "{nearest}"),
            None => writeln!(f, "nothing near it can be had"),
        }
    }
}

impl fmt::Display for Nearest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            request,
            sched,
            changes,
        } = self;
        write!(
            f,
            "the nearest that can be had: --cpus boot={} --sched '{sched}' ({})",
            request.vcpus,
            changes.join("; ")
        )
    }
}

impl fmt::Display for Binding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.vm, self.constraint, self.detail)
    }
}

impl fmt::Display for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Policy => "not sound",
            Self::Cpus => "no such CPU",
            Self::Exclusive => "another's CPU",
            Self::Pool => "no shared CPU",
            Self::Dedicated => "too few CPUs to dedicate",
            Self::Numa => "no such NUMA node",
            Self::Overcommit => "overcommit",
            Self::Reserve => "reserve",
            Self::Deadline => "deadline",
            Self::Gang => "gang too wide",
            Self::Helpers => "no CPU for helpers",
            Self::Mode => "not in this mode",
            Self::Name => "name",
        })
    }
}

impl std::error::Error for Rejection {}
