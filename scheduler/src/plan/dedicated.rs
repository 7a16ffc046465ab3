//! CPUs of one's own: isolated ones first, under one cache if possible, as few of them torn out of use as possible, and those
//! the VM had before all others.

use crate::{Cores, Cpu, CpuSet, Request, VmPlan};

use super::space::Space;

/// What a VM gets for itself.
#[derive(Clone, Debug)]
pub(super) struct Own {
    /// The CPU of each vCPU.
    pub(super) pins: Vec<u32>,
    /// Those and their idle siblings.
    pub(super) exclusive: CpuSet,
    /// Are they isolated?
    pub(super) isolated: bool,
    /// How near they are to each other.
    pub(super) under: &'static str,
}

/// A core, as far as it can be had.
struct Core {
    at: Cpu,
    /// Where it is in topological order.
    order: usize,
    /// Its threads that can be had.
    cpus: Vec<u32>,
    /// How many vCPUs go on it.
    room: usize,
    isolated: bool,
    /// Has it no tick while one thread runs there?
    tickless: bool,
    /// CPUs the VM had before.
    had: usize,
    /// Can all of its threads be had?
    full: bool,
    /// Does it carry CPU 0, where the host's own work is?
    boot: bool,
    load: u64,
}

/// Looks for CPUs for `request` among those that are neither taken nor `named` by somebody; `Err` is how many vCPUs could have one.
pub(super) fn find(
    space: &Space<'_>,
    request: &Request,
    cores: Cores,
    named: &CpuSet,
    had: Option<&VmPlan>,
) -> Result<Own, u32> {
    let mut free = &space.usable - space.taken();
    free.subtract(named);
    let wanted = request.vcpus as usize;
    let before: Vec<Option<u32>> = (0..wanted)
        .map(|vcpu| had.and_then(|plan| plan.vcpus.get(vcpu)?.cpus.lowest()))
        .collect();
    let had: CpuSet = before.iter().flatten().copied().collect();
    let all = collect(space, cores, &free, &had);

    // What the VM had comes before everything else: a move costs more than a cache further away. Then isolated CPUs or others,
    // mixed only if neither is enough; then the smallest domain.
    let keepable: usize = all.iter().map(|core| core.had).sum();
    let tiers: [fn(&Core) -> bool; 3] = [|core| core.isolated, |core| !core.isolated, |_| true];
    let mut best: Option<Choice<'_>> = None;
    'search: for tier in tiers {
        let eligible: Vec<&Core> = all.iter().filter(|core| tier(core)).collect();
        for (domain, under) in DOMAINS {
            let found = nearest(&eligible, wanted, domain);
            if let Some(cores) = found {
                let had = cores.iter().map(|core| core.had).sum();
                if best.as_ref().is_none_or(|best| had > best.had) {
                    best = Some(Choice { cores, had, under });
                }
            }
            if best.as_ref().is_some_and(|best| best.had == keepable) {
                break 'search;
            }
        }
    }
    match best {
        Some(mut choice) => {
            choice.cores.sort_by_key(|core| core.order);
            Ok(assign(&choice.cores, cores, &before, choice.under))
        }
        None => Err(all.iter().map(|core| core.room as u32).sum()),
    }
}

/// Cores that are enough.
struct Choice<'c> {
    cores: Vec<&'c Core>,
    /// CPUs among them that the VM had.
    had: usize,
    under: &'static str,
}

/// What CPUs can be in together, by the number of it, from near to far.
type Domain = fn(&Cpu) -> u32;
const DOMAINS: [(Domain, &str); 4] = [
    (|cpu| cpu.llc, "under one cache"),
    (|cpu| cpu.node, "in one NUMA node"),
    (|cpu| cpu.socket, "in one socket"),
    (|_| 0, "over several sockets"),
];

/// The cores of which something can be had.
fn collect(space: &Space<'_>, cores: Cores, free: &CpuSet, had: &CpuSet) -> Vec<Core> {
    let mut all = Vec::new();
    for threads in space.order.chunk_by(|a, b| a.core == b.core) {
        let online = threads
            .iter()
            .filter(|cpu| space.host.online.contains(cpu.id));
        let online: Vec<&Cpu> = online.collect();
        let cpus: Vec<u32> = online
            .iter()
            .map(|cpu| cpu.id)
            .filter(|cpu| free.contains(*cpu))
            .collect();
        let full = cpus.len() == online.len();
        let (Some(first), true) = (cpus.first(), full || cores == Cores::Any) else {
            continue;
        };
        all.push(Core {
            at: threads[0],
            order: all.len(),
            room: if cores == Cores::One { 1 } else { cpus.len() },
            isolated: space.host.isolated.contains(*first),
            tickless: space.host.nohz_full.contains(*first),
            had: cpus.iter().filter(|cpu| had.contains(**cpu)).count(),
            full,
            boot: cpus.contains(&0),
            load: cpus.iter().map(|cpu| u64::from(space.load(*cpu))).sum(),
            cpus,
        });
    }
    all
}

/// Cores for `wanted` vCPUs in the best domain of a kind: where the VM was, else the one with the least to spare.
fn nearest<'c>(eligible: &[&'c Core], wanted: usize, domain: Domain) -> Option<Vec<&'c Core>> {
    let mut ids: Vec<u32> = eligible.iter().map(|core| domain(&core.at)).collect();
    ids.sort_unstable();
    ids.dedup();
    let candidates = ids.into_iter().filter_map(|id| {
        let cores: Vec<&Core> = eligible
            .iter()
            .filter(|core| domain(&core.at) == id)
            .copied()
            .collect();
        let room: usize = cores.iter().map(|core| core.room).sum();
        let had: usize = cores.iter().map(|core| core.had).sum();
        let load: u64 = cores.iter().map(|core| core.load).sum();
        (room >= wanted).then_some(((usize::MAX - had, room, load, id), cores))
    });
    let (_, cores) = candidates.min_by_key(|(rank, _)| *rank)?;
    Some(pick(cores, wanted))
}

/// Of `cores`, those that are enough for `wanted` vCPUs.
fn pick(mut cores: Vec<&Core>, wanted: usize) -> Vec<&Core> {
    cores.sort_by_key(|core| {
        (
            usize::MAX - core.had,
            !core.full,
            !core.tickless,
            core.boot,
            core.load,
        )
    });
    let (mut chosen, mut room) = (Vec::new(), 0);
    let mut rest = cores.into_iter().collect::<std::collections::VecDeque<_>>();
    while room < wanted {
        let Some(mut core) = rest.pop_front() else {
            break;
        };
        // The last vCPU does not break a whole core where a broken one is left over.
        if room + core.room > wanted
            && core.had == 0
            && let Some(index) = rest.iter().position(|other| room + other.room == wanted)
            && let Some(other) = rest.remove(index)
        {
            core = other;
        }
        room += core.room;
        chosen.push(core);
    }
    chosen
}

/// A CPU for each vCPU: the one it had, else the next.
fn assign(chosen: &[&Core], cores: Cores, before: &[Option<u32>], under: &'static str) -> Own {
    let slots = chosen
        .iter()
        .flat_map(|core| core.cpus.iter().take(core.room));
    let mut slots: Vec<u32> = slots.copied().collect();
    let kept: Vec<Option<u32>> = before
        .iter()
        .map(|cpu| {
            let index = slots.iter().position(|slot| Some(*slot) == *cpu)?;
            Some(slots.remove(index))
        })
        .collect();
    let mut slots = slots.into_iter();
    let pins: Vec<u32> = kept
        .iter()
        .filter_map(|kept| kept.or_else(|| slots.next()))
        .collect();
    let exclusive = match cores {
        Cores::Any => pins.iter().copied().collect(),
        Cores::Whole | Cores::One => chosen.iter().flat_map(|core| core.cpus.clone()).collect(),
    };
    Own {
        pins,
        exclusive,
        isolated: chosen.iter().all(|core| core.isolated),
        under,
    }
}
