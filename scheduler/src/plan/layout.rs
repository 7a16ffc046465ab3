//! What each placement means on a host: the set of every vCPU, each with its reason.

use super::{
    dedicated, numa,
    pinned::{self, Shape},
    refusal::{Refusal, crowd, load, nothing_left, reachable, too_few},
    shared::{self, Crowded},
    space::{Space, Vcpu},
};
use crate::{
    Constraint, Cores, CpuSet, Helpers, Placement, Request, SchedMode, VcpuPlan, VmPlan, VmPolicy,
    policy::{Count, PROMISE_MILLI},
};

/// A place in the making.
#[derive(Default)]
pub(super) struct Layout {
    /// Of each vCPU, and why.
    pub(super) sets: Vec<(CpuSet, String)>,
    /// What is the VM's own.
    pub(super) exclusive: CpuSet,
    /// Where its memory should be.
    pub(super) nodes: Vec<u32>,
}

/// Looks for a place for `request`; `before` is what it had, if it wants the same kind of place again.
pub(super) fn find(
    space: &mut Space<'_>,
    request: &Request,
    before: Option<&VmPlan>,
) -> Result<Layout, Refusal> {
    if space.usable.is_empty() {
        let why = "no CPU is both online and allowed to this process".to_owned();
        return Err((Constraint::Cpus, why));
    }
    if let Helpers::Set(cpus) = &request.policy.helpers {
        reachable(space, cpus, "helpers")?;
    }
    if space.host.mode.hypervisor_schedules() {
        return everywhere(space, request);
    }
    match &request.policy.placement {
        Placement::Dedicated { cores } => own(space, request, *cores, before),
        Placement::Map(map) => mapped(space, request, map),
        placement => {
            let pool = pool_for(space, request)?;
            deadline_fits(space, request, &pool)?;
            gang_fits(request, &pool)?;
            match placement {
                Placement::Spread => pins(space, request, &pool, before, Shape::Spread),
                Placement::Pack => pins(space, request, &pool, before, Shape::Pack),
                Placement::NumaLocal { require, node } => {
                    local(space, request, &pool, (*require, *node), before)
                }
                _ => parts(space, request, &pool, before, "shared"),
            }
        }
    }
}

/// The shared CPUs a VM can have for its vCPUs: not those its helpers must have to themselves.
fn pool_for(space: &Space<'_>, request: &Request) -> Result<CpuSet, Refusal> {
    let mut pool = space.pool().clone();
    if pool.is_empty() {
        return Err((Constraint::Pool, nothing_left(space)));
    }
    if let Some(rt) = request.policy.rt {
        match &request.policy.helpers {
            Helpers::Set(cpus) => pool.subtract(cpus),
            Helpers::Auto => {
                pool.remove(pool.lowest().unwrap_or(0));
            }
        }
        if pool.is_empty() {
            return Err((
                Constraint::Helpers,
                format!(
                    "rt={rt} needs a CPU for the VM's other threads that no vCPU can keep from them; of the pool {} none would be left for vCPUs",
                    space.pool()
                ),
            ));
        }
    }
    Ok(pool)
}

/// Can the VM's deadlines be admitted with its vCPUs on `pool`?
pub(super) fn deadline_fits(
    space: &Space<'_>,
    request: &Request,
    pool: &CpuSet,
) -> Result<(), Refusal> {
    let Some(deadline) = request.policy.deadline else {
        return Ok(());
    };
    let domain = &space.host.online - &space.host.isolated;
    if *pool != domain {
        return Err((
            Constraint::Deadline,
            format!(
                "the kernel takes deadlines only for threads that may run on the whole root domain, {domain}; of that {} can be used: \
                 drop the deadline, or use placement=dedicated where partitions can be made",
                &domain & pool
            ),
        ));
    }
    let of = |request: &Request| {
        let deadline = request
            .policy
            .deadline
            .map_or(0, |deadline| u64::from(deadline.millicpus()));
        deadline * u64::from(request.vcpus)
    };
    let others = space
        .claims
        .iter()
        .filter(|claim| claim.exclusive.is_empty() && claim.request.vm != request.vm);
    let admitted: u64 = others.map(|claim| of(&claim.request)).sum();
    let room = u64::from(PROMISE_MILLI) * u64::from(pool.len());
    if admitted + of(request) > room {
        return Err((
            Constraint::Deadline,
            format!(
                "{} with {deadline}: {}m beside {admitted}m of others, and the kernel admits {room}m on CPUs {pool}",
                Count(request.vcpus, "vCPU"),
                of(request)
            ),
        ));
    }
    Ok(())
}

/// On how many CPUs `vcpus` can run in all.
pub(super) fn width(vcpus: &[VcpuPlan]) -> u32 {
    let mut all = CpuSet::new();
    vcpus.iter().for_each(|vcpu| all.add(&vcpu.cpus));
    all.len()
}

fn gang_fits(request: &Request, cpus: &CpuSet) -> Result<(), Refusal> {
    if request.policy.gang.is_off() || request.vcpus <= cpus.len() {
        return Ok(());
    }
    Err((
        Constraint::Gang,
        format!(
            "a gang of {} cannot run at once on {} ({cpus}): use gang=off, or at most {}",
            Count(request.vcpus, "vCPU"),
            Count(cpus.len(), "CPU"),
            Count(cpus.len(), "vCPU")
        ),
    ))
}

/// A part of `pool` for each vCPU.
fn parts(
    space: &Space<'_>,
    request: &Request,
    pool: &CpuSet,
    before: Option<&VmPlan>,
    kind: &str,
) -> Result<Layout, Refusal> {
    let vcpu = Vcpu::of(request);
    let cpus = space.ordered(pool);
    if request.policy.deadline.is_some() {
        return all(
            space,
            request,
            pool,
            "the whole root domain, which is what deadlines need",
        );
    }
    let had: Option<Vec<&CpuSet>> = before
        .filter(|plan| plan.exclusive.is_empty() && plan.request.vcpus == request.vcpus)
        .map(|plan| plan.vcpus.iter().map(|vcpu| &vcpu.cpus).collect());
    let sets = match had.and_then(|had| shared::refit(space, &had, pool, vcpu)) {
        Some(sets) => sets,
        None => shared::share(space, &cpus, request.vcpus, vcpu)
            .map_err(|crowded| crowd(space, request, &crowded))?,
    };
    let why = if request.vcpus > pool.len() {
        format!(
            "{kind}: {} on {}, which Linux balances; pinned, some would get half of what others get",
            Count(request.vcpus, "vCPU"),
            Count(sets[0].len(), "CPU")
        )
    } else if request.vcpus == 1 {
        format!("{kind}: any CPU of {pool}")
    } else {
        format!("{kind}: its part of {pool}, apart from the VM's other vCPUs")
    };
    Ok(Layout {
        sets: sets.into_iter().map(|cpus| (cpus, why.clone())).collect(),
        ..Layout::default()
    })
}

/// All of `pool` for every vCPU.
fn all(space: &Space<'_>, request: &Request, pool: &CpuSet, why: &str) -> Result<Layout, Refusal> {
    let vcpu = Vcpu::of(request);
    for cpu in pool {
        space
            .accepts(cpu, vcpu, request.vcpus, pool.len())
            .map_err(|full| {
                let cpus = pool.clone();
                crowd(space, request, &Crowded { full, cpus })
            })?;
    }
    Ok(Layout {
        sets: vec![(pool.clone(), why.to_owned()); request.vcpus as usize],
        ..Layout::default()
    })
}

/// One CPU of `pool` for each vCPU; parts of it where there are more vCPUs.
fn pins(
    space: &Space<'_>,
    request: &Request,
    pool: &CpuSet,
    before: Option<&VmPlan>,
    shape: Shape,
) -> Result<Layout, Refusal> {
    let kind = match shape {
        Shape::Spread => "spread",
        Shape::Pack => "pack",
    };
    if request.vcpus > pool.len() {
        return parts(space, request, pool, before, kind);
    }
    let had: Vec<Option<u32>> = (0..request.vcpus as usize)
        .map(|vcpu| {
            let cpus = &before?.vcpus.get(vcpu)?.cpus;
            cpus.lowest().filter(|_| cpus.len() == 1)
        })
        .collect();
    let cpus = space.ordered(pool);
    let pins = pinned::pin(space, &cpus, &had, Vcpu::of(request), shape)
        .map_err(|crowded| crowd(space, request, &crowded))?;
    let why = |pin: u32| {
        let Some(cpu) = space.host.cpu(pin) else {
            return String::new();
        };
        format!(
            "{kind}: node {}, cache {}, core {}; {} vCPUs of others there",
            cpu.node,
            cpu.llc,
            cpu.core,
            load(space.load(pin))
        )
    };
    Ok(Layout {
        sets: pins
            .into_iter()
            .map(|pin| (CpuSet::one(pin), why(pin)))
            .collect(),
        ..Layout::default()
    })
}

/// The CPUs of one node; of several if need be and allowed.
fn local(
    space: &Space<'_>,
    request: &Request,
    pool: &CpuSet,
    (require, node): (bool, Option<u32>),
    before: Option<&VmPlan>,
) -> Result<Layout, Refusal> {
    let known = |id: &u32| {
        space
            .host
            .nodes
            .iter()
            .any(|node| node.id == *id && node.allowed)
    };
    if let Some(node) = node.filter(|node| !known(node)) {
        let nodes: CpuSet = space
            .host
            .nodes
            .iter()
            .filter(|node| node.allowed)
            .map(|node| node.id)
            .collect();
        return Err((
            Constraint::Numa,
            format!(
                "node={node}: there is no such NUMA node this process may use; there are {nodes}"
            ),
        ));
    }
    let had = before.map_or(&[][..], |plan| &plan.memory_nodes);
    let mut refused = None;
    for (id, cpus) in numa::candidates(space, request, pool, node, had) {
        if !require && request.vcpus > cpus.len() {
            continue;
        }
        let kind = format!("node {id}");
        match gang_fits(request, &cpus).and_then(|()| parts(space, request, &cpus, before, &kind)) {
            Ok(layout) => {
                return Ok(Layout {
                    nodes: vec![id],
                    ..layout
                });
            }
            Err(why) => {
                refused.get_or_insert(why);
            }
        }
    }
    if require {
        return Err(refused.unwrap_or_else(|| {
            let rooms: Vec<String> = space
                .host
                .nodes
                .iter()
                .map(|node| format!("node {}: {} MiB", node.id, numa::room(space, node.id, &request.vm, false)))
                .collect();
            let which = node.map_or_else(|| "no node".to_owned(), |node| format!("node {node} does not"));
            (
                Constraint::Numa,
                format!("{which} has a shared CPU and room for {} MiB ({}); require=off uses several nodes", request.memory_mib, rooms.join(", ")),
            )
        }));
    }
    let (nodes, cpus) = numa::several(space, request, pool);
    let over = if nodes.is_empty() || gang_fits(request, &cpus).is_err() {
        pool
    } else {
        &cpus
    };
    let layout = parts(space, request, over, before, "several nodes")
        .or_else(|_| parts(space, request, pool, before, "all nodes"))?;
    Ok(Layout { nodes, ..layout })
}

/// The CPUs a map names; the pool for vCPUs it does not name.
fn mapped(
    space: &mut Space<'_>,
    request: &Request,
    map: &[(u32, CpuSet)],
) -> Result<Layout, Refusal> {
    if let Some(deadline) = request.policy.deadline {
        return Err((
            Constraint::Deadline,
            format!("deadline={deadline}: not with pinned vCPUs"),
        ));
    }
    let mut named = CpuSet::new();
    for (vcpu, cpus) in map {
        reachable(space, cpus, &format!("vCPU {vcpu}"))?;
        named.add(cpus);
    }
    let mut layout = Layout::default();
    for vcpu in 0..request.vcpus {
        layout
            .sets
            .push(match map.iter().find(|(named, _)| *named == vcpu) {
                Some((_, cpus)) => (cpus.clone(), "the map names it".to_owned()),
                None => {
                    let pool = pool_for(space, request)?;
                    let why = format!("the map does not name it: any CPU of {pool}");
                    (pool, why)
                }
            });
    }
    let mut all = named.clone();
    layout.sets.iter().for_each(|(cpus, _)| all.add(cpus));
    gang_fits(request, &all)?;
    if let (Some(rt), Helpers::Auto) = (request.policy.rt, &request.policy.helpers)
        && (space.pool() - &all).is_empty()
    {
        return Err((
            Constraint::Helpers,
            format!(
                "rt={rt} needs a CPU for the VM's other threads that no vCPU can keep from them; the map leaves none of {}",
                space.pool()
            ),
        ));
    }
    let sets = layout.sets.iter().map(|(cpus, _)| cpus);
    space.fits(request, sets).map_err(|(cpu, full)| {
        let cpus = CpuSet::one(cpu);
        crowd(space, request, &Crowded { full, cpus })
    })?;
    Ok(layout)
}

/// CPUs of its own.
fn own(
    space: &Space<'_>,
    request: &Request,
    cores: Cores,
    before: Option<&VmPlan>,
) -> Result<Layout, Refusal> {
    let partitions = &space.host.abilities.partitions;
    if let Some(deadline) = request.policy.deadline.filter(|_| !partitions.yes) {
        return Err((
            Constraint::Deadline,
            format!(
                "deadline={deadline} on CPUs of one's own needs a partition, which cannot be made here ({}): drop one of the two",
                partitions.why
            ),
        ));
    }
    let mut named = space.named();
    if let Helpers::Set(cpus) = &request.policy.helpers {
        named.add(cpus);
    }
    let own = dedicated::find(space, request, cores, &named, before).map_err(|room| {
        (
            Constraint::Dedicated,
            too_few(space, request, cores, room, &named),
        )
    })?;
    if let (Some(rt), Helpers::Auto) = (request.policy.rt, &request.policy.helpers)
        && (space.pool() - &own.exclusive).is_empty()
    {
        return Err((
            Constraint::Helpers,
            format!(
                "rt={rt} needs a CPU for the VM's other threads that no vCPU can keep from them; with {} its own none is left",
                own.exclusive
            ),
        ));
    }
    let (isolated, under) = (if own.isolated { "isolated, " } else { "" }, own.under);
    let idle = &own.exclusive - &own.pins.iter().copied().collect();
    let siblings = if idle.is_empty() {
        ""
    } else {
        ", siblings idle"
    };
    let why = |pin: u32| {
        let core = space.host.cpu(pin).map_or(0, |cpu| cpu.core);
        format!("its own: core {core}, {isolated}{under}{siblings}")
    };
    let sets = own.pins.iter().map(|pin| {
        let cpus = match request.policy.deadline {
            Some(_) => own.exclusive.clone(),
            None => CpuSet::one(*pin),
        };
        (cpus, why(*pin))
    });
    let mut nodes: Vec<u32> = own
        .pins
        .iter()
        .filter_map(|pin| Some(space.host.cpu(*pin)?.node))
        .collect();
    nodes.sort_unstable();
    nodes.dedup();
    Ok(Layout {
        sets: sets.collect(),
        exclusive: own.exclusive,
        nodes,
    })
}

/// Does `policy` leave to the hypervisor what only Linux could do, where it is the hypervisor that schedules VPs?
pub(super) fn had_here(mode: SchedMode, policy: &VmPolicy) -> Result<(), Refusal> {
    let asked = policy.for_linux();
    if !mode.hypervisor_schedules() || asked.is_empty() {
        return Ok(());
    }
    let asked: Vec<String> = asked
        .into_iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    Err((
        Constraint::Mode,
        format!(
            "the hypervisor schedules the VPs here ({mode}), and {} would be told to threads that only wait: what it takes is \
             weight, cap, reserve and smt",
            asked.join(", ")
        ),
    ))
}

/// Where the hypervisor places VPs: every thread anywhere, and nothing promised that is not ours to give.
fn everywhere(space: &Space<'_>, request: &Request) -> Result<Layout, Refusal> {
    had_here(space.host.mode, &request.policy)?;
    let pool = space.pool().clone();
    if pool.is_empty() {
        return Err((Constraint::Pool, nothing_left(space)));
    }
    let why = "the hypervisor places the VP; this is where its thread waits";
    all(space, request, &pool, why)
}
