//! After a refusal: the nearest request that can be had.
//!
//! Each limit has requests that ask a little less of it. They are tried, and the first that is accepted, with all the others
//! of the same batch, is the answer; one that meets another limit is made less of in turn.

use super::admission::admit;
use crate::{
    Binding, Constraint, Cores, CpuSet, Deadline, Gang, Helpers, Host, LedgerState, Nearest,
    Placement, Request, VmPolicy, policy::Count,
};

/// Limits a request can meet one after the other before the search gives up.
const ROUNDS: usize = 12;
/// The most vCPUs per CPU a VM can accept, in thousandths.
const MOST_OVERCOMMIT: u32 = 100_000;

/// Looks for something near the refused requests that is accepted.
pub(super) fn search(
    host: &Host,
    ledger: &LedgerState,
    requests: &[Request],
    refused: &[Binding],
) -> Option<Nearest> {
    let index = requests
        .iter()
        .position(|request| request.vm == refused[0].vm)?;
    // One request is changed: where two are wrong, there is no single one that is nearest.
    if refused
        .iter()
        .any(|binding| binding.vm != requests[index].vm)
    {
        return None;
    }
    let found = step_by_step(host, ledger, requests, index, refused[0].constraint)
        .or_else(|| plain(host, ledger, requests, index))?;
    Some(describe(&requests[index], &found))
}

/// Asks less of one limit after the other until there is no more.
fn step_by_step(
    host: &Host,
    ledger: &LedgerState,
    requests: &[Request],
    index: usize,
    mut constraint: Constraint,
) -> Option<Request> {
    let mut trial = requests.to_vec();
    for _ in 0..ROUNDS {
        trial[index] = less(host, ledger, &trial, index, constraint)?;
        match admit(host, ledger, &trial) {
            Ok(_) => return trial.into_iter().nth(index),
            Err(next) => {
                let own = next.iter().find(|binding| binding.vm == trial[index].vm)?;
                constraint = own.constraint;
            }
        }
    }
    None
}

/// Nothing but vCPUs, as many as there is room for: among the shared CPUs, else on some of the VM's own.
fn plain(host: &Host, ledger: &LedgerState, requests: &[Request], index: usize) -> Option<Request> {
    let asked = &requests[index];
    let accepted = |request: &Request| {
        let mut trial = requests.to_vec();
        trial[index] = request.clone();
        admit(host, ledger, &trial).is_ok()
    };
    let dedicated = Placement::Dedicated { cores: Cores::Any };
    [
        (Placement::Shared, None),
        (Placement::Shared, Some(MOST_OVERCOMMIT)),
        (dedicated, None),
    ]
    .into_iter()
    .find_map(|(placement, overcommit_milli)| {
        let mut request = asked.clone();
        request.vcpus = asked.vcpus.clamp(1, super::admission::MOST_VCPUS);
        request.threads_per_core = 1;
        request.policy = VmPolicy {
            placement,
            overcommit_milli,
            weight: asked.policy.weight,
            cap: asked.policy.cap,
            ..VmPolicy::default()
        }
        .clamped(request.vcpus);
        if accepted(&request) {
            Some(request)
        } else {
            fewer(&request, &accepted)
        }
    })
}

/// `trial[index]`, asking less of `constraint`; `None` if it cannot ask less.
fn less(
    host: &Host,
    ledger: &LedgerState,
    trial: &[Request],
    index: usize,
    constraint: Constraint,
) -> Option<Request> {
    let mut request = trial[index].clone();
    let accepted = |request: &Request| {
        let mut trial = trial.to_vec();
        trial[index] = request.clone();
        admit(host, ledger, &trial).is_ok()
    };
    let policy = &mut request.policy;
    match constraint {
        Constraint::Policy => {
            if request.vcpus == 0 {
                request.vcpus = 1;
            }
            request.vcpus = request.vcpus.min(super::admission::MOST_VCPUS);
            if request.threads_per_core == 0
                || !request.vcpus.is_multiple_of(request.threads_per_core)
            {
                request.threads_per_core = 1;
            }
            request.policy = request.policy.clamped(request.vcpus);
        }
        Constraint::Cpus | Constraint::Exclusive => {
            narrow(policy, &free(host, ledger, trial))?;
        }
        Constraint::Pool => {
            if matches!(policy.placement, Placement::Dedicated { .. }) {
                policy.placement = Placement::Shared;
            } else {
                policy.placement = Placement::Dedicated { cores: Cores::Any };
                (policy.gang, policy.overcommit_milli) = (Gang::Off, None);
            }
        }
        Constraint::Dedicated => {
            let less = match policy.placement {
                Placement::Dedicated { cores: Cores::One } => Some(Cores::Whole),
                Placement::Dedicated {
                    cores: Cores::Whole,
                } => Some(Cores::Any),
                _ => None,
            };
            match less {
                Some(cores) => policy.placement = Placement::Dedicated { cores },
                // Sharing needs something to share.
                None if (&free(host, ledger, trial) - &host.isolated).is_empty() => {
                    return fewer(&request, &accepted);
                }
                None => policy.placement = Placement::Shared,
            }
        }
        Constraint::Numa => {
            policy.placement = match policy.placement {
                Placement::NumaLocal {
                    node: Some(_),
                    require,
                } => Placement::NumaLocal {
                    node: None,
                    require,
                },
                Placement::NumaLocal { require: true, .. } => Placement::NumaLocal {
                    node: None,
                    require: false,
                },
                _ => Placement::Shared,
            };
        }
        Constraint::Overcommit => return overcommit(&request, &accepted),
        Constraint::Reserve => {
            let reserve = policy.reserve_millicpus?;
            let with = |reserve| {
                let mut request = request.clone();
                request.policy.reserve_millicpus = Some(reserve);
                request
            };
            return Some(
                match most(1, reserve - 1, |reserve| accepted(&with(reserve))) {
                    Some(reserve) => with(reserve),
                    None => {
                        request.policy.reserve_millicpus = None;
                        request
                    }
                },
            );
        }
        Constraint::Deadline => {
            let deadline = policy.deadline?;
            let with = |runtime: u32| {
                let mut request = request.clone();
                request.policy.deadline = Some(Deadline {
                    runtime_us: u64::from(runtime),
                    ..deadline
                });
                request
            };
            let runtime = u32::try_from(deadline.runtime_us).ok()?;
            return Some(
                match most(2, runtime - 1, |runtime| accepted(&with(runtime))) {
                    Some(runtime) => with(runtime),
                    None => {
                        request.policy.deadline = None;
                        request
                    }
                },
            );
        }
        Constraint::Gang => policy.gang = Gang::Off,
        Constraint::Helpers => {
            if policy.helpers == Helpers::Auto {
                policy.rt = None;
            } else {
                policy.helpers = Helpers::Auto;
            }
        }
        Constraint::Mode => *policy = policy.without_linux(),
        Constraint::Name => return None,
    }
    (request != trial[index]).then_some(request)
}

/// The least overcommit limit that is enough, if it is the VM's own that binds; else somewhere less crowded; else as many
/// vCPUs as there is room for.
fn overcommit(request: &Request, accepted: &impl Fn(&Request) -> bool) -> Option<Request> {
    let limited = |limit: u32| {
        let mut request = request.clone();
        request.policy.overcommit_milli = Some(limit);
        request
    };
    let own = request
        .policy
        .overcommit_milli
        .unwrap_or(VmPolicy::OVERCOMMIT_MILLI);
    if own < MOST_OVERCOMMIT && accepted(&limited(MOST_OVERCOMMIT)) {
        // Searched in tenths: nobody wants to type 5.333.
        let tenths = least(own / 100 + 1, MOST_OVERCOMMIT / 100, |tenths| {
            accepted(&limited(tenths * 100))
        });
        return Some(limited(tenths * 100));
    }
    if request.policy.placement != Placement::Shared {
        let mut request = request.clone();
        request.policy.placement = Placement::Shared;
        return Some(request);
    }
    fewer(request, accepted)
}

/// As many vCPUs as there is room for.
fn fewer(request: &Request, accepted: &impl Fn(&Request) -> bool) -> Option<Request> {
    let threads = request.threads_per_core;
    let with = |cores: u32| {
        let mut request = request.clone();
        request.vcpus = cores * threads;
        request.policy = request.policy.clamped(request.vcpus);
        request
    };
    let cores = (request.vcpus / threads).checked_sub(1)?;
    most(1, cores, |cores| accepted(&with(cores))).map(with)
}

/// CPUs that are no other VM's own.
fn free(host: &Host, ledger: &LedgerState, trial: &[Request]) -> CpuSet {
    let mut free = host.usable();
    let others = ledger.entries.iter().map(|entry| &entry.plan);
    for plan in others.filter(|plan| trial.iter().all(|other| other.vm != plan.request.vm)) {
        free.subtract(&plan.exclusive);
    }
    free
}

/// Leaves out of `policy` every CPU that is not in `free`.
fn narrow(policy: &mut VmPolicy, free: &CpuSet) -> Option<()> {
    let before = policy.clone();
    if let Placement::Map(map) = &mut policy.placement {
        map.iter_mut().for_each(|(_, cpus)| cpus.retain(free));
        map.retain(|(_, cpus)| !cpus.is_empty());
        if map.is_empty() {
            policy.placement = Placement::Shared;
        }
    }
    if let Helpers::Set(cpus) = &mut policy.helpers {
        cpus.retain(free);
        if cpus.is_empty() {
            policy.helpers = Helpers::Auto;
        }
    }
    (*policy != before).then_some(())
}

/// The greatest number of `low..=high` that is good, found by halving: where good numbers are not all below the bad ones it is
/// still one that is good and whose neighbour is not.
fn most(low: u32, high: u32, good: impl Fn(u32) -> bool) -> Option<u32> {
    if low > high || !good(low) {
        return None;
    }
    let (mut low, mut high) = (low, high);
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if good(middle) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    Some(low)
}

/// The least number of `low..=high` that is good, `high` being good.
fn least(low: u32, high: u32, good: impl Fn(u32) -> bool) -> u32 {
    let (mut low, mut high) = (low, high);
    while low < high {
        let middle = low + (high - low) / 2;
        if good(middle) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    high
}

/// What is different, as one would type it.
fn describe(asked: &Request, nearest: &Request) -> Nearest {
    let (before, sched) = (asked.policy.to_string(), nearest.policy.to_string());
    let keys = |text: &str| -> Vec<String> {
        let parts = crate::policy::affinity::split(text).unwrap_or_default();
        parts.into_iter().map(str::to_owned).collect()
    };
    let (old, new) = (keys(&before), keys(&sched));
    let name = |part: &String| part.split('=').next().unwrap_or_default().to_owned();
    let mut changes = Vec::new();
    if asked.vcpus != nearest.vcpus {
        changes.push(format!(
            "{} instead of {}",
            Count(nearest.vcpus, "vCPU"),
            asked.vcpus
        ));
    }
    if asked.threads_per_core != nearest.threads_per_core {
        changes.push(format!(
            "{} per core instead of {}",
            Count(nearest.threads_per_core, "thread"),
            asked.threads_per_core
        ));
    }
    for part in &new {
        match old.iter().find(|other| name(other) == name(part)) {
            Some(same) if same == part => {}
            Some(other) => changes.push(format!("{part} instead of {other}")),
            None => changes.push(part.clone()),
        }
    }
    let dropped = old
        .iter()
        .filter(|part| new.iter().all(|other| name(other) != name(part)));
    changes.extend(dropped.map(|part| format!("no {part}")));
    Nearest {
        request: nearest.clone(),
        sched,
        changes,
    }
}
