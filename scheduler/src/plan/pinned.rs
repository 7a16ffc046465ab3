//! One CPU for each vCPU among those that are shared: as far apart as possible (spread), or as close together (pack).

use std::collections::BTreeMap;

use super::{
    shared::Crowded,
    space::{Full, Space, Vcpu},
};
use crate::{Cpu, CpuSet};

/// Which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// As far apart as possible.
    Spread,
    /// Under as few caches as possible.
    Pack,
}

/// A CPU for each vCPU out of `pool`, which has at least as many; those in `had` that can stay do.
pub(super) fn pin(
    space: &Space<'_>,
    pool: &[Cpu],
    had: &[Option<u32>],
    vcpu: Vcpu,
    shape: Shape,
) -> Result<Vec<u32>, Crowded> {
    let mut full = Full::Overcommit;
    let free: Vec<Cpu> = pool
        .iter()
        .filter(|cpu| match space.accepts(cpu.id, vcpu, 1, 1) {
            Ok(()) => true,
            Err(why) => {
                full = why;
                false
            }
        })
        .copied()
        .collect();
    if free.len() < had.len() {
        return Err(Crowded {
            full,
            cpus: super::shared::numbers(pool),
        });
    }
    let mut used = CpuSet::new();
    let kept: Vec<Option<Cpu>> = had
        .iter()
        .map(|cpu| {
            let cpu = free.iter().find(|free| Some(free.id) == *cpu)?;
            used.insert(cpu.id).then_some(*cpu)
        })
        .collect();
    let missing = kept.iter().filter(|cpu| cpu.is_none()).count();
    if missing == 0 {
        return Ok(kept.iter().flatten().map(|cpu| cpu.id).collect());
    }
    let stay: Vec<Cpu> = kept.iter().flatten().copied().collect();
    let rest: Vec<Cpu> = free
        .into_iter()
        .filter(|cpu| !used.contains(cpu.id))
        .collect();
    let chosen = match shape {
        Shape::Spread => apart(space, &rest, &stay, missing),
        Shape::Pack => together(space, &rest, &stay, missing),
    };
    let mut chosen = chosen.into_iter();
    Ok(kept
        .iter()
        .filter_map(|kept| kept.map(|cpu| cpu.id).or_else(|| chosen.next()))
        .collect())
}

/// How many of the VM's own are in each domain of one kind (nodes, caches, cores).
struct Domains {
    ids: Vec<u32>,
    own: Vec<u32>,
}

impl Domains {
    fn of(cpus: &[Cpu], id: impl Fn(&Cpu) -> u32) -> Self {
        let mut ids: Vec<u32> = cpus.iter().map(id).collect();
        ids.sort_unstable();
        ids.dedup();
        Self {
            own: vec![0; ids.len()],
            ids,
        }
    }

    /// The index of domain `id`; one that is not there counts as the first, which only makes the choice less good.
    fn index(&self, id: u32) -> usize {
        self.ids.binary_search(&id).unwrap_or(0)
    }
}

/// `count` of `free`, each where the fewest of the VM's own are: by node, then cache, then core, then load.
fn apart(space: &Space<'_>, free: &[Cpu], stay: &[Cpu], count: usize) -> Vec<u32> {
    let all = [free, stay].concat();
    let mut nodes = Domains::of(&all, |cpu| cpu.node);
    let mut llcs = Domains::of(&all, |cpu| cpu.llc);
    let mut cores = Domains::of(&all, |cpu| cpu.core);
    let place = |cpu: &Cpu| {
        let (node, llc, core) = (
            nodes.index(cpu.node),
            llcs.index(cpu.llc),
            cores.index(cpu.core),
        );
        (cpu.id, space.load(cpu.id), node, llc, core)
    };
    let mut free: Vec<_> = free.iter().map(&place).collect();
    let stay: Vec<_> = stay.iter().map(&place).collect();
    for (_, _, node, llc, core) in stay {
        nodes.own[node] += 1;
        llcs.own[llc] += 1;
        cores.own[core] += 1;
    }
    let mut chosen = Vec::with_capacity(count);
    while chosen.len() < count {
        let best = (0..free.len()).min_by_key(|index| {
            let (_, load, node, llc, core) = free[*index];
            (nodes.own[node], llcs.own[llc], cores.own[core], load)
        });
        let Some(best) = best else { break };
        let cpu = free.remove(best);
        chosen.push(cpu.0);
        let (_, _, node, llc, core) = cpu;
        nodes.own[node] += 1;
        llcs.own[llc] += 1;
        cores.own[core] += 1;
    }
    chosen
}

/// `count` of `free` under as few caches as possible: where the VM's own are already, else in the cache that is busiest and
/// still has room for all, so that others stay quiet; over several caches, those with the most room.
fn together(space: &Space<'_>, free: &[Cpu], stay: &[Cpu], count: usize) -> Vec<u32> {
    let mut caches: BTreeMap<u32, Vec<Cpu>> = BTreeMap::new();
    for cpu in free {
        caches.entry(cpu.llc).or_default().push(*cpu);
    }
    let near = |llc: u32| stay.iter().filter(|cpu| cpu.llc == llc).count();
    let mut caches: Vec<(u32, Vec<Cpu>)> = caches.into_iter().collect();
    caches.sort_by_key(|(llc, cpus)| {
        let load: u64 = cpus.iter().map(|cpu| u64::from(space.load(cpu.id))).sum();
        let mean = load / cpus.len() as u64;
        let room = cpus.len();
        let all = room >= count;
        // Of those with room for all the busiest, of the others the roomiest.
        let order = if all {
            u64::MAX - mean
        } else {
            u64::MAX - room as u64
        };
        (usize::MAX - near(*llc), !all, order)
    });
    // Caches of one node before those of the next.
    let first = caches
        .first()
        .and_then(|(_, cpus)| cpus.first().map(|cpu| cpu.node));
    if caches.first().is_some_and(|(_, cpus)| cpus.len() < count) {
        caches.sort_by_key(|(_, cpus)| cpus.first().map(|cpu| cpu.node) != first);
    }
    let mut chosen = Vec::with_capacity(count);
    for (_, mut cpus) in caches {
        cpus.sort_by_key(|cpu| space.load(cpu.id));
        cpus.truncate(count - chosen.len());
        chosen.extend(cpus.iter().map(|cpu| cpu.id));
    }
    chosen
}
