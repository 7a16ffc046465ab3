//! The node, or the few nodes, a VM's memory and vCPUs can be in together.

use super::space::Space;
use crate::{CpuSet, Request, VmId};

/// Nodes for a VM, in the order they should be tried.
pub(super) fn candidates(
    space: &Space<'_>,
    request: &Request,
    pool: &CpuSet,
    node: Option<u32>,
    had: &[u32],
) -> Vec<(u32, CpuSet)> {
    let mut found: Vec<_> = space
        .host
        .nodes
        .iter()
        .filter(|candidate| candidate.allowed && node.is_none_or(|node| node == candidate.id))
        .map(|candidate| (candidate.id, cpus(space, candidate.id, pool)))
        .filter(|(id, cpus)| {
            let before = had == [*id];
            !cpus.is_empty() && room(space, *id, &request.vm, before) >= request.memory_mib
        })
        .map(|(id, cpus)| {
            let load: u64 = cpus.iter().map(|cpu| u64::from(space.load(cpu))).sum();
            let stacked = request.vcpus > cpus.len();
            let mean = load / u64::from(cpus.len());
            ((had != [id], stacked, mean, id), (id, cpus))
        })
        .collect();
    found.sort_by_key(|(rank, _)| *rank);
    found.into_iter().map(|(_, candidate)| candidate).collect()
}

/// Several nodes, the nearest to each other, with room for the VM's memory and a CPU for each vCPU where that is possible.
pub(super) fn several(space: &Space<'_>, request: &Request, pool: &CpuSet) -> (Vec<u32>, CpuSet) {
    let mut rest: Vec<(usize, u32, u64, CpuSet)> = space
        .host
        .nodes
        .iter()
        .enumerate()
        .filter(|(_, node)| node.allowed)
        .map(|(index, node)| {
            (
                index,
                node.id,
                room(space, node.id, &request.vm, false),
                cpus(space, node.id, pool),
            )
        })
        .filter(|(.., cpus)| !cpus.is_empty())
        .collect();
    rest.sort_by_key(|(_, id, room, cpus)| (u64::MAX - room, u32::MAX - cpus.len(), *id));
    let (mut nodes, mut all, mut memory) = (Vec::new(), CpuSet::new(), 0u64);
    let mut from = None;
    while !rest.is_empty() && (memory < request.memory_mib || all.len() < request.vcpus) {
        if let Some(from) = from {
            let distance = |to: usize| {
                let row = space
                    .host
                    .nodes
                    .get::<usize>(from)
                    .map(|node| &node.distance);
                row.and_then(|row| row.get(to).copied()).unwrap_or(u32::MAX)
            };
            rest.sort_by_key(|(index, ..)| distance(*index));
        }
        let (index, id, room, cpus) = rest.remove(0);
        from.get_or_insert(index);
        nodes.push(id);
        all.add(&cpus);
        memory = memory.saturating_add(room);
    }
    nodes.sort_unstable();
    (nodes, all)
}

/// CPUs of `pool` in node `id`.
fn cpus(space: &Space<'_>, id: u32, pool: &CpuSet) -> CpuSet {
    let order = space.order.iter();
    order
        .filter(|cpu| cpu.node == id && pool.contains(cpu.id))
        .map(|cpu| cpu.id)
        .collect()
}

/// Memory node `id` has left for `vm`, in MiB: no more than what is free, and what no other VM has been promised. A VM that was there
/// `before` has its memory already, so that what is free says nothing about it.
pub(super) fn room(space: &Space<'_>, id: u32, vm: &VmId, before: bool) -> u64 {
    let Some(node) = space.host.nodes.iter().find(|node| node.id == id) else {
        return 0;
    };
    let promised: u64 = space
        .claims
        .iter()
        .filter(|claim| claim.memory_nodes.contains(&id) && claim.request.vm != *vm)
        .map(|claim| claim.request.memory_mib / claim.memory_nodes.len() as u64)
        .fold(0, u64::saturating_add);
    let left = node.total_mib.saturating_sub(promised);
    if before {
        left
    } else {
        left.min(node.free_mib)
    }
}
