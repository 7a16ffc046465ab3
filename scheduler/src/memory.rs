//! From which NUMA nodes a guest's memory comes. The kernel is told of the mapping before a page of it is touched, and asked back.

use std::{io, ops::Range};

use crate::{Host, Outcome, Placement, VmPlan, sys};

/// Nodes a kernel can have at most.
const MOST_NODES: u32 = 1024;
const WORDS: usize = MOST_NODES as usize / 64;
/// Bits of a mask, counted as the kernel does: one more than there are.
const BITS: libc::c_ulong = MOST_NODES as libc::c_ulong + 1;
/// From `linux/mempolicy.h`: several nodes are preferred (Linux 5.15).
const MPOL_PREFERRED_MANY: libc::c_int = 5;

/// A policy for memory, as the kernel has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Policy {
    mode: libc::c_int,
    nodes: [u64; WORDS],
}

/// Has the memory at `ranges` (addresses of this process, in whole pages) come from the nodes that `plan` says: from no other ones with
/// `require=on`, from those first otherwise. To be called before any of it is touched; what came of it belongs in
/// [`crate::EnforceOptions`]. `None` if the plan says nothing, or the host has one node.
#[must_use]
pub fn bind_memory(host: &Host, plan: &VmPlan, ranges: &[Range<usize>]) -> Option<Outcome> {
    if !matters(host, plan) {
        return None;
    }
    let outcome = match Policy::of(plan) {
        Ok(policy) => policy.apply(ranges, &requested(plan)),
        Err(why) => Outcome::Advisory { why },
    };
    Some(outcome)
}

/// Is there a choice of nodes, and does `plan` make it?
pub(crate) fn matters(host: &Host, plan: &VmPlan) -> bool {
    host.nodes.len() > 1 && !plan.memory_nodes.is_empty()
}

/// `from NUMA node 0 alone`.
pub(crate) fn requested(plan: &VmPlan) -> String {
    let nodes: Vec<String> = plan.memory_nodes.iter().map(u32::to_string).collect();
    let how = if is_required(plan) { "alone" } else { "first" };
    format!("from NUMA node {} {how}", nodes.join(", "))
}

fn is_required(plan: &VmPlan) -> bool {
    matches!(
        plan.request.policy.placement,
        Placement::NumaLocal { require: true, .. }
    )
}

impl Policy {
    fn of(plan: &VmPlan) -> Result<Self, String> {
        let mut nodes = [0u64; WORDS];
        for &node in &plan.memory_nodes {
            let word = nodes
                .get_mut(node as usize / 64)
                .ok_or_else(|| format!("no kernel has a NUMA node {node}"))?;
            *word |= 1 << (node % 64);
        }
        let mode = match (is_required(plan), &plan.memory_nodes[..]) {
            (true, _) => libc::MPOL_BIND,
            (false, [_]) => libc::MPOL_PREFERRED,
            (false, _) => MPOL_PREFERRED_MANY,
        };
        Ok(Self { mode, nodes })
    }

    fn apply(&self, ranges: &[Range<usize>], requested: &str) -> Outcome {
        let read = ranges
            .iter()
            .try_for_each(|range| self.set(range))
            .and_then(|()| {
                ranges
                    .iter()
                    .map(|range| Self::read(range.start))
                    .find(|read| !matches!(read, Ok(policy) if policy == self))
                    .transpose()
            });
        match read {
            Ok(None) => Outcome::Enforced,
            Ok(Some(other)) => Outcome::Approximated {
                requested: requested.to_owned(),
                effective: other.to_string(),
                why: "that is what the kernel reads back, within the nodes this process may use"
                    .into(),
            },
            Err(error) => Outcome::Advisory {
                why: match error.raw_os_error() {
                    Some(libc::ENOSYS) => "this kernel has no policies for memory".into(),
                    _ => format!("the kernel does not take it: {error}"),
                },
            },
        }
    }

    fn set(&self, range: &Range<usize>) -> io::Result<()> {
        const FLAGS: libc::c_uint = 0;
        // SAFETY: the kernel reads `BITS - 1` bits of the mask; a policy changes where pages come from, not what is in them.
        sys::check(unsafe {
            libc::syscall(
                libc::SYS_mbind,
                range.start,
                range.len(),
                self.mode,
                self.nodes.as_ptr(),
                BITS,
                FLAGS,
            )
        })?;
        Ok(())
    }

    /// That of the page at `address`.
    fn read(address: usize) -> io::Result<Self> {
        const MPOL_F_ADDR: libc::c_ulong = 1 << 1;
        let mut policy = Self {
            mode: 0,
            nodes: [0; WORDS],
        };
        // SAFETY: the kernel writes an integer and at most `BITS - 1` bits of the mask.
        sys::check(unsafe {
            libc::syscall(
                libc::SYS_get_mempolicy,
                &raw mut policy.mode,
                policy.nodes.as_mut_ptr(),
                BITS,
                address,
                MPOL_F_ADDR,
            )
        })?;
        Ok(policy)
    }
}

impl std::fmt::Display for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let how = match self.mode {
            libc::MPOL_BIND => "alone",
            libc::MPOL_PREFERRED | MPOL_PREFERRED_MANY => "first",
            _ => return f.write_str("from any NUMA node"),
        };
        let has = |node: &u32| self.nodes[*node as usize / 64] >> (node % 64) & 1 != 0;
        let nodes: Vec<String> = (0..MOST_NODES)
            .filter(has)
            .map(|node| node.to_string())
            .collect();
        write!(f, "from NUMA node {} {how}", nodes.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{HostSpec, LedgerState, Request, plan};

    const PAGES: usize = 1 << 20;

    /// Untouched memory of this process, left to its end.
    fn memory(flags: libc::c_int) -> Range<usize> {
        // SAFETY: a new mapping wherever there is room.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGES,
                libc::PROT_READ | libc::PROT_WRITE,
                flags | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(address, libc::MAP_FAILED);
        address as usize..address as usize + PAGES
    }

    fn two_nodes() -> Host {
        HostSpec {
            nodes: 2,
            ..HostSpec::default()
        }
        .build()
    }

    fn planned(host: &Host, policy: &str) -> VmPlan {
        let request = Request {
            vm: "a".into(),
            vcpus: 2,
            threads_per_core: 1,
            memory_mib: 64,
            policy: policy.parse().unwrap(),
        };
        let plan = plan(host, &LedgerState::default(), &[request]).unwrap();
        plan.vms.into_iter().next().unwrap()
    }

    #[test]
    fn memory_is_bound_to_the_node_of_the_plan() {
        let host = two_nodes();
        for (policy, mode, words) in [
            (
                "placement=numa-local,node=0,require=on",
                libc::MPOL_BIND,
                "from NUMA node 0 alone",
            ),
            (
                "placement=numa-local,node=0",
                libc::MPOL_PREFERRED,
                "from NUMA node 0 first",
            ),
        ] {
            let plan = planned(&host, policy);
            assert_eq!(requested(&plan), words);
            for flags in [libc::MAP_PRIVATE, libc::MAP_SHARED] {
                let ranges = [memory(flags), memory(flags)];
                match bind_memory(&host, &plan, &ranges) {
                    Some(Outcome::Advisory { why }) if why.contains("no policies") => {
                        rota_tests::requires::skip(&why);
                        return;
                    }
                    other => assert_eq!(other, Some(Outcome::Enforced)),
                }
                for range in ranges {
                    let read = Policy::read(range.start).unwrap();
                    assert_eq!((read.mode, read.nodes[0]), (mode, 1));
                    assert_eq!(read.to_string(), words);
                }
            }
        }
    }

    #[test]
    fn a_node_that_is_not_there_is_said() {
        let host = two_nodes();
        let mut plan = planned(&host, "placement=numa-local,node=1,require=on");
        for node in [1023, 1024, u32::MAX] {
            plan.memory_nodes = vec![node];
            let outcome = bind_memory(&host, &plan, &[memory(libc::MAP_PRIVATE)]);
            assert!(
                matches!(outcome, Some(Outcome::Advisory { .. })),
                "{outcome:?}"
            );
        }
    }

    #[test]
    fn where_there_is_no_choice_nothing_is_bound() {
        let host = HostSpec::default().build();
        let plan = planned(&host, "placement=numa-local");
        assert_eq!(plan.memory_nodes, [0]);
        assert_eq!(bind_memory(&host, &plan, &[]), None);
        let host = two_nodes();
        assert_eq!(bind_memory(&host, &planned(&host, ""), &[]), None);
    }
}
