//! In which order VMs get what: who names CPUs before who takes what is left, and who is there already before who comes.

use std::borrow::Cow;

use super::{helpers, place::place, space::Space};
use crate::{
    Binding, Constraint, CpuSet, Helpers, Host, LedgerState, Placement, Plan, Request, VmPlan,
    policy::Count,
};

/// Most vCPUs of a VM: what the hypervisor takes.
pub(super) const MOST_VCPUS: u32 = 2048;

/// [`super::plan()`] without the search for something nearer.
pub(super) fn admit(
    host: &Host,
    ledger: &LedgerState,
    requests: &[Request],
) -> Result<Plan, Vec<Binding>> {
    let wrong: Vec<Binding> = (0..requests.len())
        .flat_map(|index| unsound(requests, index))
        .collect();
    if !wrong.is_empty() {
        return Err(wrong);
    }

    let mut space = Space::new(host);
    let mut before: Vec<Option<&VmPlan>> = vec![None; requests.len()];
    for entry in &ledger.entries {
        match requests
            .iter()
            .position(|request| request.vm == entry.plan.request.vm)
        {
            None => space.add(Cow::Borrowed(&entry.plan)),
            Some(index) if before[index].is_none() => {
                before[index] = Some(&entry.plan);
                // Who asks for the same again is there already; who wants something else has to find it.
                if entry.plan.request == requests[index] {
                    space.add(Cow::Borrowed(&entry.plan));
                }
            }
            Some(_) => {}
        }
    }

    let mut order: Vec<usize> = (0..requests.len()).collect();
    order.sort_by_key(|index| turn(&requests[*index], before[*index]));
    let split = order
        .iter()
        .position(|index| turn(&requests[*index], before[*index]) >= Turn::Placed)
        .unwrap_or(order.len());

    let taken = space.taken().clone();
    place_all(&mut space, requests, &before, &order[..split])?;
    let gone = space.taken() - &taken;
    give_way(&mut space, requests, &gone)?;
    place_all(&mut space, requests, &before, &order[split..])?;
    collect(space, requests)
}

/// Places the requests at `indices`, one after the other.
fn place_all(
    space: &mut Space<'_>,
    requests: &[Request],
    before: &[Option<&VmPlan>],
    indices: &[usize],
) -> Result<(), Vec<Binding>> {
    let mut refused = Vec::new();
    for &index in indices {
        let request = &requests[index];
        space.remove(&request.vm);
        match place(space, request, before[index]) {
            Ok(plan) => space.add(Cow::Owned(plan)),
            Err(binding) => refused.push(binding),
        }
    }
    if refused.is_empty() {
        Ok(())
    } else {
        Err(refused)
    }
}

/// What has come of it: the plans that are new, those of the requests and those of others.
fn collect(space: Space<'_>, requests: &[Request]) -> Result<Plan, Vec<Binding>> {
    let pool = space.pool().clone();
    let mut vms: Vec<Option<VmPlan>> = vec![None; requests.len()];
    let mut adjusted = Vec::new();
    for claim in space.claims {
        let Cow::Owned(mut plan) = claim else {
            continue;
        };
        let requested = requests
            .iter()
            .position(|request| request.vm == plan.request.vm);
        match requested {
            Some(index) => {
                // Helpers share what is left when everybody has his place.
                helpers::settle(&pool, &mut plan).map_err(|binding| vec![binding])?;
                vms[index] = Some(plan);
            }
            None => adjusted.push(plan),
        }
    }
    Ok(Plan {
        vms: vms.into_iter().flatten().collect(),
        adjusted,
    })
}

/// Who goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Turn {
    /// Has CPUs of its own.
    Owns,
    /// Names its CPUs.
    Names,
    /// Wants CPUs of its own.
    Wants,
    /// Has a place among the shared ones.
    Placed,
    /// Wants one.
    Comes,
}

fn turn(request: &Request, before: Option<&VmPlan>) -> Turn {
    let same = before.is_some_and(|plan| plan.request == *request);
    match (&request.policy.placement, same) {
        (Placement::Dedicated { .. }, true) => Turn::Owns,
        (Placement::Map(_), _) => Turn::Names,
        (Placement::Dedicated { .. }, false) => Turn::Wants,
        (_, true) => Turn::Placed,
        (_, false) => Turn::Comes,
    }
}

/// Moves the VMs that are there off the CPUs in `gone`, which have become somebody's own.
fn give_way(
    space: &mut Space<'_>,
    requests: &[Request],
    gone: &CpuSet,
) -> Result<(), Vec<Binding>> {
    for index in 0..space.claims.len() {
        let claim = &space.claims[index];
        // Whoever wrote an entry that no request leads to keeps it: there is nothing to plan it again by.
        if !(1..=MOST_VCPUS).contains(&claim.request.vcpus) || claim.request.threads_per_core == 0 {
            continue;
        }
        let moves = claim.vcpus.iter().any(|vcpu| !vcpu.cpus.is_disjoint(gone));
        let auto = claim.request.policy.helpers == Helpers::Auto;
        let mut plan = if moves && claim.exclusive.is_empty() {
            space.lift(index);
            let claim = space.claims[index].clone();
            place(space, &claim.request, Some(&claim))
                .map_err(|binding| refusal(requests, gone, &binding))?
        } else if auto && !claim.helpers.is_disjoint(gone) {
            space.lift(index);
            space.claims[index].clone().into_owned()
        } else {
            continue;
        };
        helpers::settle(space.pool(), &mut plan)
            .map_err(|binding| refusal(requests, gone, &binding))?;
        space.replace(index, plan);
    }
    Ok(())
}

/// What binds another VM, said of the one that caused it.
fn refusal(requests: &[Request], gone: &CpuSet, binding: &Binding) -> Vec<Binding> {
    let cause = requests
        .iter()
        .find(|request| matches!(request.policy.placement, Placement::Dedicated { .. }));
    let vm = cause.map_or_else(|| binding.vm.clone(), |request| request.vm.clone());
    vec![Binding {
        vm,
        constraint: binding.constraint,
        detail: format!(
            "with CPUs {gone} taken out of the pool, VM {} could not stay: {}",
            binding.vm, binding.detail
        ),
    }]
}

/// What no host would take of request `index`.
fn unsound(requests: &[Request], index: usize) -> Vec<Binding> {
    let request = &requests[index];
    let mut wrong = Vec::new();
    let mut complain = |constraint, detail: String| {
        wrong.push(Binding {
            vm: request.vm.clone(),
            constraint,
            detail,
        });
    };
    if requests[..index].iter().any(|other| other.vm == request.vm) {
        complain(
            Constraint::Name,
            format!(
                "two requests are for VM {}: give one another name (--name NAME)",
                request.vm
            ),
        );
    }
    if request.vcpus == 0 || request.vcpus > MOST_VCPUS {
        complain(
            Constraint::Policy,
            format!(
                "{}: allowed is 1 to {MOST_VCPUS}",
                Count(request.vcpus, "vCPU")
            ),
        );
        return wrong;
    }
    let threads = request.threads_per_core;
    if threads == 0 || !request.vcpus.is_multiple_of(threads) {
        complain(
            Constraint::Policy,
            format!(
                "{} per core: {} is no whole number of such cores",
                Count(threads, "thread"),
                Count(request.vcpus, "vCPU")
            ),
        );
    }
    for error in request.policy.check(request.vcpus) {
        complain(Constraint::Policy, error.to_string());
    }
    wrong
}
