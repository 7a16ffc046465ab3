//! Where the threads go that are not vCPUs: device queues, timers, the control thread.

use crate::{Binding, Constraint, CpuSet, Helpers, VmPlan};

/// Decides it for `plan`, whose vCPUs have their place; `pool` are the CPUs that are nobody's own.
pub(super) fn settle(pool: &CpuSet, plan: &mut VmPlan) -> Result<(), Binding> {
    let policy = &plan.request.policy;
    if let Helpers::Set(cpus) = &policy.helpers {
        plan.helpers = cpus.clone();
        "as named".clone_into(&mut plan.helpers_why);
        return Ok(());
    }
    let mut vcpus = CpuSet::new();
    plan.vcpus.iter().for_each(|vcpu| vcpus.add(&vcpu.cpus));
    let (helpers, why) = if policy.rt.is_some() {
        let apart = pool - &vcpus;
        if apart.is_empty() {
            return Err(Binding {
                vm: plan.request.vm.clone(),
                constraint: Constraint::Helpers,
                detail: format!(
                    "a real-time VM needs a CPU for its other threads, and of the pool {pool} its vCPUs have all"
                ),
            });
        }
        (
            apart,
            "apart from the real-time vCPUs, which would starve them",
        )
    } else if !pool.is_empty() {
        (pool.clone(), "every CPU that is nobody's own")
    } else {
        let idle = &plan.exclusive - &vcpus;
        match (idle.is_empty(), vcpus.highest()) {
            (false, _) => (
                idle,
                "no CPU is nobody's own: the idle siblings of its vCPUs",
            ),
            (true, Some(last)) => (
                CpuSet::one(last),
                "no CPU is nobody's own: beside its last vCPU",
            ),
            (true, None) => (CpuSet::new(), "no CPU"),
        }
    };
    plan.helpers = helpers;
    why.clone_into(&mut plan.helpers_why);
    Ok(())
}
