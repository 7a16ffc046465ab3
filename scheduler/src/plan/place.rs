//! One VM's place: what it had if that is still good, else what its placement gives it.

use super::{
    layout::{self, Layout, deadline_fits, had_here, width},
    notes,
    refusal::reachable,
    space::Space,
};
use crate::{Binding, Cores, Cpu, CpuSet, Helpers, Placement, Request, VcpuPlan, VmPlan};

/// Finds a place for `request`, which is not on the host now; `before` is what it had.
pub(super) fn place(
    space: &mut Space<'_>,
    request: &Request,
    before: Option<&VmPlan>,
) -> Result<VmPlan, Binding> {
    let similar = before.filter(|plan| {
        same_kind(&plan.request, request)
            && plan.mode == space.host.mode
            && plan.vcpus.len() == plan.request.vcpus as usize
    });
    let same = similar.filter(|plan| plan.request.vcpus == request.vcpus);
    if let Some(plan) = same.and_then(|plan| kept(space, request, plan)) {
        return Ok(plan);
    }
    let refuse = |(constraint, detail)| Binding {
        vm: request.vm.clone(),
        constraint,
        detail,
    };
    // Where vCPUs come and go, the others stay if they can.
    let found = layout::find(space, request, similar).map_err(refuse);
    match found {
        Ok(layout) => Ok(finish(space, request, layout)),
        // What it had is still good, though it cannot be made better.
        Err(binding) => {
            let stays = same.and_then(|plan| still_good(space, request, plan));
            stays.map(|plan| notes::stay(plan, &binding)).ok_or(binding)
        }
    }
}

/// Would both requests get the same place, but for the number of their vCPUs?
fn same_kind(a: &Request, b: &Request) -> bool {
    (a.threads_per_core, a.memory_mib) == (b.threads_per_core, b.memory_mib)
        && a.policy.placement == b.policy.placement
        && a.policy.helpers == b.policy.helpers
        && a.policy.rt.is_some() == b.policy.rt.is_some()
        && a.policy.deadline.is_some() == b.policy.deadline.is_some()
}

/// The plan the VM had, if nothing has changed for it.
fn kept(space: &mut Space<'_>, request: &Request, plan: &VmPlan) -> Option<VmPlan> {
    let own = !plan.exclusive.is_empty();
    if !own && plan.pool != *space.pool() {
        return None;
    }
    let mut kept = still_good(space, request, plan)?;
    notes::keep_stay(&mut kept, plan);
    Some(kept)
}

/// The plan the VM had, if it would still do.
fn still_good(space: &mut Space<'_>, request: &Request, plan: &VmPlan) -> Option<VmPlan> {
    let policy = &request.policy;
    let mut kept = plan.clone();
    kept.request = request.clone();
    if !policy.gang.is_off() && width(&plan.vcpus) < request.vcpus {
        return None;
    }
    had_here(space.host.mode, policy).ok()?;
    if let Helpers::Set(cpus) = &policy.helpers {
        reachable(space, cpus, "helpers").ok()?;
    }
    let good = if plan.exclusive.is_empty() {
        kept.pool = space.pool().clone();
        plan.vcpus.iter().all(|vcpu| {
            let within = if policy.placement.names(vcpu.vcpu) {
                &space.usable
            } else {
                space.pool()
            };
            !vcpu.cpus.is_empty()
                && vcpu.cpus.is_subset(within)
                && vcpu.cpus.is_disjoint(space.taken())
        }) && deadline_fits(space, request, space.pool()).is_ok()
            && space
                .fits(request, plan.vcpus.iter().map(|vcpu| &vcpu.cpus))
                .is_ok()
    } else {
        let mut free = &space.usable - space.taken();
        free.subtract(&space.named());
        let any = policy.placement == Placement::Dedicated { cores: Cores::Any };
        plan.exclusive.is_subset(&free) && (any || whole_cores(space, &plan.exclusive))
    };
    notes::write(space, &mut kept);
    good.then_some(kept)
}

/// Is no core only partly in `cpus`?
pub(super) fn whole_cores(space: &Space<'_>, cpus: &CpuSet) -> bool {
    let online = |cpu: &&Cpu| space.host.online.contains(cpu.id);
    space.order.chunk_by(|a, b| a.core == b.core).all(|core| {
        let mut threads = core.iter().filter(online).map(|cpu| cpus.contains(cpu.id));
        let first = threads.next();
        threads.all(|inside| Some(inside) == first)
    })
}

fn finish(space: &Space<'_>, request: &Request, layout: Layout) -> VmPlan {
    let own = !layout.exclusive.is_empty();
    let mut plan = VmPlan {
        request: request.clone(),
        mode: space.host.mode,
        vcpus: (0..)
            .zip(layout.sets)
            .map(|(vcpu, (cpus, why))| VcpuPlan {
                vcpu,
                cpus,
                exclusive: own,
                why,
            })
            .collect(),
        exclusive: layout.exclusive,
        helpers: CpuSet::new(),
        helpers_why: String::new(),
        memory_nodes: layout.nodes,
        threads_per_core: 1,
        pool: if own {
            CpuSet::new()
        } else {
            space.pool().clone()
        },
        notes: Vec::new(),
    };
    plan.threads_per_core = threads_per_core(space, &plan);
    notes::write(space, &mut plan);
    plan
}

/// As many threads per core as the guest would like, if its vCPUs are siblings on the host in just that way; else one.
fn threads_per_core(space: &Space<'_>, plan: &VmPlan) -> u32 {
    let wanted = plan.request.threads_per_core;
    let core = |vcpu: &VcpuPlan| {
        let cpu = space.host.cpu(vcpu.cpus.lowest()?)?;
        (vcpu.exclusive && vcpu.cpus.len() == 1).then_some(cpu.core)
    };
    let siblings = plan.vcpus.chunks(wanted as usize).all(|group| {
        let first = core(&group[0]);
        first.is_some() && group.iter().all(|vcpu| core(vcpu) == first)
    });
    if siblings { wanted } else { 1 }
}
