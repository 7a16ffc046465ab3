//! Where the hypervisor schedules: what can be told it are properties of the partition. Everything else is refused, because a
//! thread's affinity, class and group say nothing about its VP there.

use std::io;

use mshv_bindings::{
    hv_partition_property_code_HV_PARTITION_PROPERTY_CPU_CAP as CPU_CAP,
    hv_partition_property_code_HV_PARTITION_PROPERTY_CPU_RESERVE as CPU_RESERVE,
    hv_partition_property_code_HV_PARTITION_PROPERTY_CPU_WEIGHT as CPU_WEIGHT,
};

use super::{Effect, Outcome};
use crate::{SmtIsolation, VmPlan, VmPolicy};

/// The partition of a VM, as far as its properties go. The VMM implements it with its partition's descriptor.
pub trait PartitionProperties {
    /// Reads property `code` (an `hv_partition_property_code`).
    ///
    /// # Errors
    /// What the hypervisor or the driver says.
    fn property(&self, code: u32) -> io::Result<u64>;

    /// Sets property `code`.
    ///
    /// # Errors
    /// What the hypervisor or the driver says.
    fn set_property(&self, code: u32, value: u64) -> io::Result<()>;

    /// Was the partition created for a guest that is shown hardware threads (`MSHV_PT_BIT_SMT_ENABLED_GUEST`)? The core
    /// scheduler gives each VP of one that was not a core of its own.
    fn is_shown_threads(&self) -> bool;
}

/// The whole of one logical processor, in the units of cap and reserve.
const WHOLE: u64 = 0x10000;

/// Properties that were changed, to be set back.
#[derive(Default)]
pub(super) struct Changed(Vec<(u32, u64)>);

impl Changed {
    pub(super) fn restore(&self, partition: &dyn PartitionProperties) {
        for (code, value) in self.0.iter().rev() {
            let _ = partition.set_property(*code, *value);
        }
    }

    /// Adds what has been changed since. What a property was before the first change counts.
    pub(super) fn add(&mut self, later: Self) {
        for (code, value) in later.0 {
            if self.0.iter().all(|(had, _)| *had != code) {
                self.0.push((code, value));
            }
        }
    }
}

/// Tells the hypervisor what it can be told of `plan`. One effect for each control that was requested.
pub(super) fn delegate(
    plan: &VmPlan,
    partition: Option<&dyn PartitionProperties>,
) -> (Vec<Effect>, Changed) {
    let mut to = Delegation {
        partition,
        effects: Vec::new(),
        changed: Changed::default(),
    };
    let policy = &plan.request.policy;
    let vps = u64::from(plan.request.vcpus.max(1));
    if let Some(weight) = policy.weight {
        to.set(
            "weight",
            weight.to_string(),
            "CpuWeight",
            CPU_WEIGHT,
            weight.into(),
            None,
        );
    }
    let reserve = policy.reserve_millicpus.map(|millicpus| {
        let exact = WHOLE as f64 * f64::from(millicpus) / (1000 * vps) as f64;
        (millicpus, (exact.round() as u64).min(WHOLE))
    });
    if let Some((_, value)) = reserve {
        to.make_room_for_cap(value);
    }
    if let Some(cap) = policy.cap {
        let exact = WHOLE as f64 * cap.quota_us as f64 / (cap.period_us.max(1) * vps) as f64;
        let value = (exact.round() as u64).clamp(1, WHOLE);
        let why = match cap.burst_us {
            0 => "the hypervisor caps each VP, not the VM",
            _ => "the hypervisor caps each VP, not the VM, and has no burst",
        };
        to.set(
            "cap",
            super::words::cap(&cap),
            "CpuCap",
            CPU_CAP,
            value,
            (vps > 1 || cap.burst_us > 0).then_some(why),
        );
    }
    if let Some((millicpus, value)) = reserve {
        to.set(
            "reserve",
            super::words::millicpus(millicpus),
            "CpuReserve",
            CPU_RESERVE,
            value,
            (vps > 1).then_some("the hypervisor reserves for each VP, not for the VM"),
        );
    }
    to.smt(policy.smt);
    for (control, requested) in policy.for_linux() {
        to.push(
            control,
            requested,
            Outcome::Rejected {
                why: "the hypervisor schedules VPs here, and takes no such control from this machine: do without it; weight, \
                      cap, reserve and smt it takes"
                    .into(),
            },
        );
    }
    (to.effects, to.changed)
}

/// A property that was set.
struct Written {
    before: Option<u64>,
    readback: u64,
}

/// The threads that are no vCPUs are Linux's whoever schedules VPs: what is left of `plan` for it, if CPUs were named for them.
pub(super) fn for_helpers(plan: &VmPlan) -> Option<VmPlan> {
    let helpers = plan.request.policy.helpers.clone();
    if helpers.is_auto() {
        return None;
    }
    let mut plan = plan.clone();
    plan.request.policy = VmPolicy {
        helpers,
        ..VmPolicy::default()
    };
    Some(plan)
}

/// What became of [`for_helpers`], without what was not requested.
pub(super) fn of_helpers(effects: Vec<Effect>) -> Vec<Effect> {
    let mut effects: Vec<Effect> = effects
        .into_iter()
        .filter(|effect| effect.control != "placement")
        .collect();
    for effect in &mut effects {
        if effect.outcome == Outcome::Enforced {
            effect.outcome = Outcome::Approximated {
                requested: effect.requested.clone(),
                effective: format!("{} of this machine", effect.requested),
                why: "the hypervisor may move the VP of this machine that is under such a CPU"
                    .into(),
            };
        }
    }
    effects
}

struct Delegation<'a> {
    partition: Option<&'a dyn PartitionProperties>,
    effects: Vec<Effect>,
    changed: Changed,
}

impl Delegation<'_> {
    fn push(&mut self, control: &str, requested: String, outcome: Outcome) {
        self.effects.push(Effect {
            control: control.into(),
            requested,
            outcome,
        });
    }

    /// Sets a property and reads it back. `conversion`: why its unit is not that of the request.
    fn set(
        &mut self,
        control: &str,
        requested: String,
        name: &str,
        code: u32,
        value: u64,
        conversion: Option<&str>,
    ) {
        let of = |value: u64| match code {
            CPU_WEIGHT => value.to_string(),
            _ => format!(
                "{value} ({:.1} % of a CPU per VP)",
                value as f64 * 100.0 / WHOLE as f64
            ),
        };
        let conversion = conversion.map_or(String::new(), |why| format!("; {why}"));
        let outcome = match self.write(code, value) {
            Ok(Written { readback, .. }) if readback == value => Outcome::Delegated {
                property: format!("{name} = {value}"),
                readback: of(readback) + &conversion,
            },
            Ok(Written { before, readback }) if before == Some(readback) => Outcome::Advisory {
                why: format!(
                    "{name}: the hypervisor took {value} and still has {}, as before",
                    of(readback)
                ),
            },
            Ok(Written { readback, .. }) => Outcome::Approximated {
                requested: requested.clone(),
                effective: format!("{name} = {}", of(readback)),
                why: format!("that is what the hypervisor made of {value}{conversion}"),
            },
            Err(why) => Outcome::Advisory {
                why: format!("{name}: {why}"),
            },
        };
        self.push(control, requested, outcome);
    }

    /// A cap that is less than the reserve is not taken: where more VPs are to share the same, the reserve of each goes down first.
    fn make_room_for_cap(&mut self, reserve: u64) {
        let has = self
            .partition
            .and_then(|partition| partition.property(CPU_RESERVE).ok());
        if has.is_some_and(|has| has > reserve) {
            // If it is not taken, it will be said where it is set for good.
            let _ = self.write(CPU_RESERVE, reserve);
        }
    }

    fn write(&mut self, code: u32, value: u64) -> Result<Written, String> {
        let partition = self.partition.ok_or("there is no partition to set it on")?;
        let before = partition.property(code).ok();
        partition
            .set_property(code, value)
            .map_err(|error| format!("the hypervisor does not take it: {error}"))?;
        if let Some(before) = before {
            self.changed.0.push((code, before));
        }
        let readback = partition
            .property(code)
            .map_err(|error| format!("it was taken and cannot be read back: {error}"))?;
        Ok(Written { before, readback })
    }

    fn smt(&mut self, smt: SmtIsolation) {
        let requested = super::words::smt(smt);
        let Some(requested) = requested else { return };
        let shown = self.partition.map(PartitionProperties::is_shown_threads);
        let outcome = match (smt, shown) {
            (_, None) => Outcome::Advisory {
                why: "there is no partition to ask".into(),
            },
            // The core scheduler never lets two VMs share a core.
            (SmtIsolation::Vm, Some(true)) | (_, Some(false)) => Outcome::Delegated {
                property: "SMT_ENABLED_GUEST".into(),
                readback: match shown {
                    Some(true) => "on: VPs of this VM may share a core, with nobody else",
                    _ => "off: each VP has a core to itself",
                }
                .into(),
            },
            (_, Some(true)) => Outcome::Rejected {
                why: "the partition was created for a guest that is shown hardware threads: create it with one thread per core"
                    .into(),
            },
        };
        self.push("smt", requested, outcome);
    }
}
