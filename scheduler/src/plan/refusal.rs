//! What stands in the way of a request, said so that somebody can do something about it.

use std::fmt::Write;

use super::{
    shared::Crowded,
    space::{Full, Space, Vcpu, WHOLE},
};
use crate::{
    Constraint, Cores, CpuSet, Request, VmPolicy,
    policy::{Count, Milli, PROMISE_MILLI},
};

/// The limit, and a sentence with what was asked, what there is and what can be done.
pub(super) type Refusal = (Constraint, String);

/// Are all of `cpus` there, and nobody else's own? `what` names them.
pub(super) fn reachable(space: &Space<'_>, cpus: &CpuSet, what: &str) -> Result<(), Refusal> {
    let host = space.host;
    let present: CpuSet = host.cpus.iter().map(|cpu| cpu.id).collect();
    let missing = cpus - &present;
    if !missing.is_empty() {
        return Err((
            Constraint::Cpus,
            format!("{what}: there is no CPU {missing} here; there are {present}"),
        ));
    }
    let offline = cpus - &host.online;
    if !offline.is_empty() {
        return Err((
            Constraint::Cpus,
            format!(
                "{what}: CPU {offline} is offline; online are {}",
                host.online
            ),
        ));
    }
    let outside = cpus - &host.allowed;
    if !outside.is_empty() {
        return Err((
            Constraint::Cpus,
            format!(
                "{what}: CPU {outside} is outside the cpuset of this process; allowed are {}",
                space.usable
            ),
        ));
    }
    if let Some(owner) = space.whose(|plan| !plan.exclusive.is_disjoint(cpus)) {
        let taken = cpus & space.taken();
        return Err((
            Constraint::Exclusive,
            format!(
                "{what}: CPU {taken} belongs to VM {owner} alone; nobody's own are {}",
                space.pool()
            ),
        ));
    }
    Ok(())
}

/// Why nothing is left to share.
pub(super) fn nothing_left(space: &Space<'_>) -> String {
    let mut text = format!("none of the CPUs {} is left to share:", space.usable);
    let mut before = " ";
    for claim in space
        .claims
        .iter()
        .filter(|claim| !claim.exclusive.is_empty())
    {
        // Writing to a string does not fail.
        let _ = write!(
            text,
            "{before}{} belong to VM {}",
            claim.exclusive, claim.request.vm
        );
        before = ", ";
    }
    let isolated = &space.usable & &space.host.isolated;
    if !isolated.is_empty() {
        let _ = write!(
            text,
            "{before}{isolated} are isolated, and only for placement=dedicated"
        );
    }
    text
}

/// Why not every vCPU can have CPUs of its own.
pub(super) fn too_few(
    space: &Space<'_>,
    request: &Request,
    cores: Cores,
    room: u32,
    named: &CpuSet,
) -> String {
    let unit = match cores {
        Cores::Any => "a CPU of their own",
        Cores::Whole => "a thread of a core that can be had whole",
        Cores::One => "a core of their own",
    };
    let mut text = format!(
        "{} {} {unit}, {room} can have it of CPUs {}",
        Count(request.vcpus, "vCPU"),
        if request.vcpus == 1 { "wants" } else { "want" },
        space.usable
    );
    for claim in space
        .claims
        .iter()
        .filter(|claim| !claim.exclusive.is_empty())
    {
        // Writing to a string does not fail.
        let _ = write!(
            text,
            "; {} belong to VM {}",
            claim.exclusive, claim.request.vm
        );
    }
    let named = named & space.pool();
    if !named.is_empty() {
        let _ = write!(text, "; {named} are named by maps or for helpers");
    }
    text
}

/// Says why there is no room.
pub(super) fn crowd(space: &Space<'_>, request: &Request, crowded: &Crowded) -> Refusal {
    let Crowded { full, cpus } = crowded;
    let count = cpus.len();
    match full {
        Full::Overcommit => {
            let there: u64 = cpus.iter().map(|cpu| u64::from(space.load(cpu))).sum();
            let there = load(u32::try_from(there).unwrap_or(u32::MAX));
            let own = request
                .policy
                .overcommit_milli
                .unwrap_or(VmPolicy::OVERCOMMIT_MILLI);
            let whose = match space.strictest(cpus, Vcpu::of(request)) {
                Some(vm) => format!("VM {vm} there accepts less than this VM's {}", Milli(own)),
                None => format!("its overcommit limit is {}", Milli(own)),
            };
            (
                Constraint::Overcommit,
                format!(
                    "{} beside {there} of others on {} ({cpus}) is more than these CPUs take: {whose}",
                    Count(request.vcpus, "vCPU"),
                    Count(count, "CPU")
                ),
            )
        }
        Full::Reserve => {
            let there: u64 = cpus.iter().map(|cpu| u64::from(space.reserve(cpu))).sum();
            (
                Constraint::Reserve,
                format!(
                    "reserve={}m beside {}m of others is more than can be promised on {} ({cpus}): {PROMISE_MILLI}m of each",
                    request.policy.reserve_millicpus.unwrap_or(0),
                    there.div_ceil(1000),
                    Count(count, "CPU")
                ),
            )
        }
    }
}

/// A load in vCPUs.
pub(super) fn load(millionths: u32) -> Milli {
    Milli(millionths / (WHOLE / 1000))
}
