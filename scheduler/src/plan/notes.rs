//! What is not wrong with a plan and still worth knowing.

use super::{layout::width, place::whole_cores, space::Space};
use crate::{Binding, Host, Placement, Slice, SmtIsolation, VmPlan, policy::Time};

/// How the note begins that a VM was left where it was for want of a better place.
const STAYS: &str = "stays where it was";

/// Writes the notes of `plan`: all of them, but for [`stay`].
pub(super) fn write(space: &Space<'_>, plan: &mut VmPlan) {
    let host = space.host;
    let mut notes = Vec::new();
    placement(host, plan, &mut notes);
    if plan.threads_per_core < plan.request.threads_per_core {
        notes.push(format!(
            "its vCPUs are not siblings on the host, {} to a core; placement=dedicated,cores=whole makes them that",
            plan.request.threads_per_core
        ));
    }
    smt(space, plan, &mut notes);
    time(host, plan, &mut notes);
    others(host, plan, &mut notes);
    plan.notes = notes;
}

fn placement(host: &Host, plan: &VmPlan, notes: &mut Vec<String>) {
    match &plan.request.policy.placement {
        Placement::NumaLocal { .. } if plan.memory_nodes.len() > 1 => {
            notes.push("no single NUMA node has room for the whole VM".to_owned());
        }
        Placement::Map(map) => {
            let stacked = map.iter().enumerate().find_map(|(at, (vcpu, cpus))| {
                let alone = |other: &&(u32, _)| cpus.len() == 1 && other.1 == *cpus;
                Some((map[..at].iter().find(alone)?.0, vcpu, cpus))
            });
            if let Some((first, second, cpu)) = stacked {
                notes.push(format!(
                    "the map puts vCPUs {first} and {second} on CPU {cpu} alone: they never run together"
                ));
            }
            let still = |(_, cpus): &&(u32, crate::CpuSet)| {
                cpus.len() > 1 && !cpus.is_disjoint(&host.isolated)
            };
            if let Some((vcpu, cpus)) = map.iter().find(still) {
                notes.push(format!(
                    "vCPU {vcpu}: Linux does not balance over isolated CPUs; of {cpus} it will use one"
                ));
            }
        }
        _ => {}
    }
}

/// What is a VM's own is so among the VMs of the ledger. Only a partition of the kernel's or isolation at boot keeps other processes
/// off, and a partition is made for deadlines alone.
fn others(host: &Host, plan: &VmPlan, notes: &mut Vec<String>) {
    let open = &plan.exclusive - &host.isolated;
    if plan.request.policy.deadline.is_none() && !open.is_empty() {
        notes.push(format!(
            "no other VM of Rota runs on CPUs {open}; processes that are not Rota's can: isolcpus={open}, or a cpuset without these CPUs \
             around all others, keeps them off"
        ));
    }
}

fn smt(space: &Space<'_>, plan: &VmPlan, notes: &mut Vec<String>) {
    let wanted = plan.request.policy.smt;
    let ability = &space.host.abilities.core_scheduling;
    if wanted == SmtIsolation::Off || ability.yes {
        return;
    }
    let threads = space.host.cpus.iter().any(|cpu| cpu.thread > 0);
    let alone = !plan.exclusive.is_empty() && whole_cores(space, &plan.exclusive);
    if threads && !alone {
        notes.push(format!(
            "smt={wanted} needs core scheduling, which is not there ({}); placement=dedicated,cores=one needs nothing",
            ability.why
        ));
    }
}

fn time(host: &Host, plan: &VmPlan, notes: &mut Vec<String>) {
    let policy = &plan.request.policy;
    if let Some(slice_us) = policy.slice.and_then(Slice::micros) {
        notes.push(format!(
            "slice {}: lasts {} among others on a CPU, since the kernel looks at ticks",
            Time(u64::from(slice_us)),
            Time(host.effective_slice_us(slice_us))
        ));
    }
    if let Some(cap) = policy.cap {
        let busy = plan.request.vcpus.min(width(&plan.vcpus));
        let dark = cap.blackout_us(busy);
        if dark > 0 {
            notes.push(format!(
                "cap {cap}: when {busy} of its vCPUs run at once they stand still for up to {} of every {}",
                Time(dark),
                Time(cap.period_us)
            ));
        }
    }
}

/// Says that `plan` is kept for want of a better one.
pub(super) fn stay(mut plan: VmPlan, binding: &Binding) -> VmPlan {
    plan.notes.push(format!("{STAYS}: {}", binding.detail));
    plan
}

/// What was said by [`stay`] still holds.
pub(super) fn keep_stay(plan: &mut VmPlan, before: &VmPlan) {
    let stays = before.notes.iter().find(|note| note.starts_with(STAYS));
    plan.notes.extend(stays.cloned());
}
