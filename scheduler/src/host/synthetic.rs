//! Hosts that do not exist: for tests, for benchmarks, and for asking what would happen on a machine of another shape.

use serde::{Deserialize, Serialize};

use super::{Abilities, Ability, Cgroup, Cpu, Host, Node};
use crate::{CpuSet, SchedMode};

/// The shape of a regular machine. Every number counts within one of what stands before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostSpec {
    /// Sockets.
    pub sockets: u32,
    /// Memory nodes of each socket.
    pub nodes: u32,
    /// Last-level caches of each node.
    pub llcs: u32,
    /// Cores under each cache.
    pub cores: u32,
    /// Hardware threads of each core.
    pub smt: u32,
    /// Are the threads of a core numbered one after the other (as virtual machines show it), or all first threads first?
    pub adjacent: bool,
    /// Memory of each node, in MiB.
    pub node_mib: u64,
}

impl Default for HostSpec {
    /// One socket of four cores.
    fn default() -> Self {
        Self {
            sockets: 1,
            nodes: 1,
            llcs: 1,
            cores: 4,
            smt: 1,
            adjacent: false,
            node_mib: 16 * 1024,
        }
    }
}

impl HostSpec {
    /// Such a machine, everything online and allowed, nothing isolated, a tick of 4 ms, and a kernel that can do everything.
    /// Shapes of more than [`CpuSet::LIMIT`] CPUs end there.
    #[must_use]
    pub fn build(&self) -> Host {
        let cores = u64::from(self.sockets)
            * u64::from(self.nodes)
            * u64::from(self.llcs)
            * u64::from(self.cores);
        let cores = cores.min(u64::from(CpuSet::LIMIT)) as u32;
        let smt = self.smt.max(1);
        let mut cpus: Vec<Cpu> = (0..cores)
            .flat_map(|core| (0..smt).map(move |thread| (core, thread)))
            .map(|(core, thread)| {
                let llc = core / self.cores;
                let node = llc / self.llcs;
                Cpu {
                    id: if self.adjacent {
                        core * smt + thread
                    } else {
                        thread * cores + core
                    },
                    node,
                    socket: node / self.nodes,
                    cluster: core,
                    llc,
                    core,
                    thread,
                }
            })
            .filter(|cpu| cpu.id < CpuSet::LIMIT)
            .collect();
        cpus.sort_by_key(|cpu| cpu.id);
        let all: CpuSet = cpus.iter().map(|cpu| cpu.id).collect();
        let count = (self.sockets * self.nodes).max(1);
        let distance =
            |a: u32, b: u32| match (a == b, a / self.nodes.max(1) == b / self.nodes.max(1)) {
                (true, _) => 10,
                (_, true) => 12,
                _ => 21,
            };
        Host {
            cpus,
            nodes: (0..count)
                .map(|id| Node {
                    id,
                    total_mib: self.node_mib,
                    free_mib: self.node_mib,
                    allowed: true,
                    distance: (0..count).map(|other| distance(id, other)).collect(),
                })
                .collect(),
            online: all.clone(),
            allowed: all,
            isolated: CpuSet::new(),
            nohz_full: CpuSet::new(),
            tick_ns: 4_000_000,
            tick_source: "made up".to_owned(),
            mode: SchedMode::Root,
            abilities: everything(),
        }
    }
}

/// What a kernel can do that can do everything.
fn everything() -> Abilities {
    let yes = || Ability::yes("made up");
    Abilities {
        custom_slice: yes(),
        core_scheduling: yes(),
        realtime: yes(),
        deadline: yes(),
        nice: yes(),
        sched_ext_active: Ability::no("made up"),
        partitions: yes(),
        cgroup: Cgroup {
            version: 2,
            cpu_path: None,
            cpuset_path: None,
            cpu: yes(),
            cpuset: yes(),
            idle: yes(),
            burst: yes(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_of_numbering_threads() {
        let spec = HostSpec {
            sockets: 2,
            nodes: 2,
            llcs: 2,
            cores: 4,
            smt: 2,
            ..HostSpec::default()
        };
        let host = spec.build();
        assert_eq!(host.cpus.len(), 64);
        assert_eq!(
            host.cpu(0).map(|cpu| cpu.core),
            host.cpu(32).map(|cpu| cpu.core)
        );
        let cpu = host.cpu(31).expect("there");
        assert_eq!(
            (cpu.socket, cpu.node, cpu.llc, cpu.core, cpu.thread),
            (1, 3, 7, 31, 0)
        );
        assert_eq!(host.nodes[0].distance, [10, 12, 21, 21]);
        let host = HostSpec {
            adjacent: true,
            ..spec
        }
        .build();
        assert_eq!(
            host.cpu(0).map(|cpu| cpu.core),
            host.cpu(1).map(|cpu| cpu.core)
        );
    }

    #[test]
    fn absurd_shapes_end_at_the_limit() {
        let host = HostSpec {
            sockets: 1000,
            cores: 1000,
            smt: 8,
            ..HostSpec::default()
        }
        .build();
        assert!(host.cpus.len() <= CpuSet::LIMIT as usize);
    }
}
