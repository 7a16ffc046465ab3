//! What each kind of request would get here: by trial, not by promise.

use crate::{
    Effect, EnforceOptions, Enforcer, Host, LedgerState, Outcome, Owner, PartitionProperties,
    Request, VmId, VmPolicy, meter::guests_tell, plan,
};

/// Every kind of request: the control its effect carries, an example in short, and the policy that asks for it. Classes above
/// the fair one ask for CPUs of their own, since a plan that starves the VM's other threads is refused.
const REQUESTS: [(&str, &str, &str); 16] = [
    ("placement", "shared", "placement=shared"),
    ("placement", "dedicated", "placement=dedicated"),
    ("placement", "spread", "placement=spread"),
    ("placement", "pack", "placement=pack"),
    ("placement", "numa-local", "placement=numa-local"),
    ("helpers", "auto", ""),
    ("weight", "200", "weight=200"),
    ("cap", "50%", "cap=50%"),
    ("reserve", "500m", "reserve=500m"),
    ("slice", "latency", "slice=latency"),
    ("rotate", "20ms", "rotate=20ms"),
    ("gang", "soft", "gang=soft"),
    ("gang", "adaptive", "gang=adaptive"),
    (
        "deadline",
        "2ms/10ms",
        "placement=dedicated,deadline=2ms/10ms",
    ),
    ("rt", "1", "placement=dedicated,rt=1"),
    ("smt", "vm", "smt=vm"),
];

/// Plans and prepares a machine of one vCPU for every kind of request, one after the other, as if this host had no other
/// machines; none starts, and everything is as it was when this returns. `partition` is what the hypervisor is asked about
/// where it schedules.
#[must_use]
pub fn rehearse(host: &Host, partition: Option<&dyn PartitionProperties>) -> Vec<Effect> {
    REQUESTS
        .iter()
        .map(|(control, requested, sched)| Effect {
            control: (*control).to_owned(),
            requested: (*requested).to_owned(),
            outcome: outcome(host, partition, control, sched, guests_tell()),
        })
        .collect()
}

fn outcome(
    host: &Host,
    partition: Option<&dyn PartitionProperties>,
    control: &str,
    sched: &str,
    guest_tells: bool,
) -> Outcome {
    let rejected = |why: String| Outcome::Rejected { why };
    let policy: VmPolicy = match sched.parse() {
        Ok(policy) => policy,
        Err(error) => return rejected(format!("{error}")),
    };
    let request = Request {
        vm: VmId::from("rehearsal"),
        vcpus: 1,
        threads_per_core: 1,
        memory_mib: 64,
        policy,
    };
    let planned = match plan(host, &LedgerState::default(), &[request]) {
        Ok(planned) => planned,
        Err(rejection) => {
            let reasons: Vec<_> = rejection
                .reasons
                .iter()
                .map(|reason| reason.detail.as_str())
                .collect();
            return rejected(reasons.join("; "));
        }
    };
    let owner = match Owner::current("rehearsal") {
        Ok(owner) => owner,
        Err(error) => return rejected(error.to_string()),
    };
    let options = EnforceOptions {
        partition,
        guest_tells,
        whole_process: false,
        best_effort: true,
        ..EnforceOptions::new(owner)
    };
    let effects = match planned.vms.first() {
        Some(vm) => match Enforcer::prepare(host, vm, &options) {
            Ok(enforcer) => enforcer.effects(),
            Err(refused) => refused.effects,
        },
        None => Vec::new(),
    };
    let found = effects.into_iter().find(|effect| effect.control == control);
    match found {
        Some(effect) => effect.outcome,
        None if host.mode.hypervisor_schedules() => Outcome::Advisory {
            why: match control {
                "helpers" => "the hypervisor may move the VP of this machine that is under a CPU",
                _ => "the hypervisor places VPs as it likes",
            }
            .to_owned(),
        },
        None => Outcome::Enforced,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{HostSpec, SchedMode};

    fn outcomes(mode: SchedMode) -> Vec<Effect> {
        let host = Host {
            mode,
            ..HostSpec::default().build()
        };
        rehearse(&host, None)
    }

    fn of(effects: &[Effect], control: &str) -> Outcome {
        let effect = effects.iter().find(|effect| effect.control == control);
        effect.expect("an effect").outcome.clone()
    }

    #[test]
    fn every_request_of_the_list_is_one() {
        for (_, _, sched) in REQUESTS {
            assert!(sched.parse::<VmPolicy>().is_ok(), "{sched}");
        }
    }

    #[test]
    fn where_the_hypervisor_schedules_time_is_not_ours_to_give() {
        let effects = outcomes(SchedMode::Core);
        for control in ["slice", "gang", "rotate", "deadline", "rt"] {
            let outcome = of(&effects, control);
            assert!(
                matches!(outcome, Outcome::Rejected { .. }),
                "{control}: {outcome}"
            );
        }
        // Nobody has a partition to ask.
        assert!(matches!(of(&effects, "weight"), Outcome::Advisory { .. }));
    }

    #[test]
    fn an_adaptive_gang_is_judged_where_guests_tell() {
        let host = Host {
            mode: SchedMode::Root,
            ..HostSpec::default().build()
        };
        let outcome = |tells| outcome(&host, None, "gang", "gang=adaptive", tells);
        if matches!(outcome(true), Outcome::Rejected { .. }) {
            rota_tests::requires::skip("no lever works here");
            return;
        }
        let untold = |outcome: &Outcome| outcome.to_string().contains("nobody tells");
        assert!(untold(&outcome(false)) && !untold(&outcome(true)));
    }

    #[test]
    fn where_that_is_disputed_nothing_is_said_to_be_enforced() {
        for effect in outcomes(SchedMode::Disputed) {
            let outcome = &effect.outcome;
            assert!(
                !matches!(outcome, Outcome::Enforced),
                "{}: {outcome}",
                effect.control
            );
        }
    }
}
