//! A VM whose vCPUs come and go while it runs.

use super::{
    Effect, Enforcer, Refused, Shared, ThreadRole, delegated,
    enforcer::{apply, lock, settings, share_cookie},
};
use crate::{CpuSet, Host, SmtIsolation, Tid, VmPlan};

impl Enforcer<'_> {
    /// Makes `plan` so, which has more vCPUs than the one before, or fewer. Threads of vCPUs that go have ended before; those of vCPUs
    /// that come are adopted afterwards. A [`Rotator`](crate::Rotator) and a [`Reconciler`](crate::Reconciler) act by the plan
    /// that they were started with: they are dropped before and started anew when all threads are there.
    ///
    /// # Errors
    /// Something is rejected, or, if the policy is strict, advisory. Then everything is as it was.
    pub fn resize(&self, host: &Host, plan: &VmPlan) -> Result<(), Refused> {
        let had_cookies = self.shared.cookies();
        let effects = if plan.mode.hypervisor_schedules() {
            let (effects, changed) = delegated::delegate(plan, self.partition);
            let judged = self.judge(plan, effects, Vec::new());
            match (&judged, self.partition) {
                (Err(_), Some(partition)) => changed.restore(partition),
                _ => lock(&self.changed).add(changed),
            }
            let effects = judged?;
            if let Some(plan) = delegated::for_helpers(plan) {
                // What has become of them has been said.
                self.retell(host, &plan);
            }
            effects
        } else {
            let told = self.retell(host, plan);
            self.judge(plan, told, Vec::new()).inspect_err(|_| {
                self.retell(host, &self.plan());
            })?
        };
        lock(&self.shared.plan).clone_from(plan);
        self.shared.replace_effects(effects);
        self.shared.follow(plan.vcpus.len(), had_cookies);
        Ok(())
    }

    fn retell(&self, host: &Host, plan: &VmPlan) -> Vec<Effect> {
        let note_groups = |groups| self.note_groups(groups);
        lock(&self.shared.linux)
            .as_mut()
            .map_or_else(Vec::new, |linux| {
                linux.resize(host, plan, &self.owner, &note_groups)
            })
    }

    /// A vCPU whose thread has ended for good.
    pub fn dismiss(&self, vcpu: u32) {
        lock(&self.shared.threads).retain(|_, thread| thread.role != ThreadRole::Vcpu(vcpu));
    }

    /// CPUs that this VM can have at all, now: those that are online, within the cpuset above it, and those of its own partition. The
    /// affinity of this process does not tell, since that is what its plan has made it.
    #[must_use]
    pub fn available(&self) -> CpuSet {
        self.shared.available()
    }
}

impl Shared {
    fn cookies(&self) -> SmtIsolation {
        lock(&self.linux)
            .as_ref()
            .map_or(SmtIsolation::Off, |linux| linux.cookies)
    }

    /// Moves the threads that are there where they belong now, and forgets those of vCPUs from `vcpus` on.
    fn follow(&self, vcpus: usize, had_cookies: SmtIsolation) {
        let linux = lock(&self.linux);
        let Some(linux) = linux.as_ref() else {
            return;
        };
        lock(&self.threads).retain(|_, thread| match thread.role {
            ThreadRole::Vcpu(vcpu) => (vcpu as usize) < vcpus,
            ThreadRole::Helper => true,
        });
        let mut first: Option<Tid> = None;
        for (tid, role) in self.threads() {
            // What cannot be told now is put right by the reconciler; a thread that has ended needs nothing.
            let Ok((group, controls)) = settings(linux, role) else {
                continue;
            };
            if let Ok(placed) = apply(tid, group, controls, role) {
                self.note_placed(role, controls, placed);
            }
            if linux.cookies != had_cookies && matches!(role, ThreadRole::Vcpu(_)) {
                let _ = share_cookie(linux.cookies, role, first, tid);
                first.get_or_insert(tid);
            }
        }
    }

    /// What became of each request now. What else has been noted stays, but for single vCPUs: they have been placed anew.
    fn replace_effects(&self, new: Vec<Effect>) {
        let mut effects = lock(&self.effects);
        let old = std::mem::replace(&mut *effects, new);
        for effect in old {
            let known = effects.iter().any(|new| new.control == effect.control);
            if !known && !effect.control.starts_with("vcpu") {
                effects.push(effect);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, collections::BTreeMap, io};

    use mshv_bindings::{
        hv_partition_property_code_HV_PARTITION_PROPERTY_CPU_CAP as CAP,
        hv_partition_property_code_HV_PARTITION_PROPERTY_CPU_RESERVE as RESERVE,
    };

    use super::*;
    use crate::{
        AdoptError, SchedMode,
        enforce::{
            Options, Outcome, PartitionProperties,
            tests::{Body, MadeUp, host, options, outcome, vm},
        },
        sys,
    };

    fn bare() -> Options<'static> {
        Options {
            bare: true,
            ..options()
        }
    }

    #[test]
    fn a_vcpu_that_comes_is_adopted_and_one_that_goes_is_forgotten() {
        let plan = |vcpus| vm("resize", vcpus, "slice=latency".parse().unwrap());
        let enforcer = Enforcer::prepare(&host(), &plan(1), &bare()).unwrap();
        let (first, second) = (Body::start(false), Body::start(false));
        enforcer.adopt(ThreadRole::Vcpu(0), first.tid).unwrap();
        let early = enforcer.adopt(ThreadRole::Vcpu(1), second.tid);
        assert!(matches!(early, Err(AdoptError::NotPlanned { .. })));
        enforcer.resize(&host(), &plan(2)).unwrap();
        assert_eq!(enforcer.plan().vcpus.len(), 2);
        enforcer.adopt(ThreadRole::Vcpu(1), second.tid).unwrap();
        let cpus = &plan(2).vcpus[1].cpus;
        assert_eq!(sys::affinity(second.tid).unwrap(), *cpus);
        let shared = enforcer.shared();
        assert!(shared.is_in_place());
        assert_eq!(shared.threads().len(), 2);
        enforcer.dismiss(1);
        enforcer.resize(&host(), &plan(1)).unwrap();
        assert_eq!(shared.threads(), [(first.tid, ThreadRole::Vcpu(0))]);
    }

    #[test]
    fn those_that_are_there_follow_the_plan() {
        let body = Body::start(false);
        let policy = || "weight=200".parse().unwrap();
        let enforcer = Enforcer::prepare(&host(), &vm("f", 1, policy()), &bare()).unwrap();
        enforcer.adopt(ThreadRole::Vcpu(0), body.tid).unwrap();
        let mut plan = vm("f", 2, policy());
        plan.vcpus.reverse();
        plan.vcpus[0].vcpu = 0;
        plan.vcpus[1].vcpu = 1;
        enforcer.resize(&host(), &plan).unwrap();
        assert_eq!(sys::affinity(body.tid).unwrap(), plan.vcpus[0].cpus);
    }

    #[test]
    fn what_cannot_be_had_leaves_everything_as_it_was() {
        let plan = vm("refused", 1, "slice=latency".parse().unwrap());
        let enforcer = Enforcer::prepare(&host(), &plan, &bare()).unwrap();
        let body = Body::start(false);
        enforcer.adopt(ThreadRole::Vcpu(0), body.tid).unwrap();
        let before = (enforcer.plan(), enforcer.effects());
        let mut larger = vm("refused", 2, plan.request.policy.clone());
        larger.vcpus[1].cpus = CpuSet::one(4000);
        let refused = enforcer.resize(&host(), &larger).unwrap_err();
        assert!(refused.to_string().contains("placement"), "{refused}");
        assert_eq!((enforcer.plan(), enforcer.effects()), before);
        assert_eq!(sys::affinity(body.tid).unwrap(), plan.vcpus[0].cpus);
        let second = Body::start(false);
        let adopted = enforcer.adopt(ThreadRole::Vcpu(1), second.tid);
        assert!(matches!(adopted, Err(AdoptError::NotPlanned { .. })));
    }

    #[test]
    fn vcpus_that_take_turns_share_their_vms_weight_with_those_that_come() {
        let root = MadeUp::new("resize");
        let options = Options {
            parent: Some(root.0.clone()),
            ..options()
        };
        let plan = |vcpus| vm("r", vcpus, "weight=300,rotate=20ms".parse().unwrap());
        let enforcer = Enforcer::prepare(&host(), &plan(1), &options).unwrap();
        assert_eq!(root.read("vcpu0", "cpu.weight"), "300");
        enforcer.resize(&host(), &plan(3)).unwrap();
        assert_eq!(root.groups().len(), 4);
        for part in ["vcpu0", "vcpu1", "vcpu2"] {
            assert_eq!(root.read(part, "cpu.weight"), "100");
        }
        assert_eq!(*outcome(&enforcer.effects(), "rotate"), Outcome::Enforced);
        enforcer.resize(&host(), &plan(1)).unwrap();
        assert_eq!(root.groups().len(), 2);
        assert_eq!(root.read("vcpu0", "cpu.weight"), "300");
        drop(enforcer);
        assert!(root.groups().is_empty());
    }

    /// A hypervisor that takes no cap below the reserve, and no reserve above the cap.
    struct Partition(RefCell<BTreeMap<u32, u64>>);

    impl PartitionProperties for Partition {
        fn property(&self, code: u32) -> io::Result<u64> {
            let none = if code == CAP { 0x10000 } else { 0 };
            Ok(self.0.borrow().get(&code).copied().unwrap_or(none))
        }

        fn set_property(&self, code: u32, value: u64) -> io::Result<()> {
            let fits = match code {
                CAP => value >= self.property(RESERVE)?,
                RESERVE => value <= self.property(CAP)?,
                _ => true,
            };
            if !fits {
                return Err(io::Error::other("out of range"));
            }
            self.0.borrow_mut().insert(code, value);
            Ok(())
        }

        fn is_shown_threads(&self) -> bool {
            false
        }
    }

    #[test]
    fn the_hypervisor_is_told_the_share_of_each_vp_anew() {
        let partition = Partition(RefCell::default());
        let told = || [CAP, RESERVE].map(|code| partition.property(code).unwrap());
        let plan = |vcpus| {
            let mut plan = vm("core", vcpus, "cap=50%,reserve=250m".parse().unwrap());
            plan.mode = SchedMode::Core;
            plan
        };
        let options = Options {
            partition: Some(&partition),
            ..options()
        };
        let enforcer = Enforcer::prepare(&host(), &plan(1), &options).unwrap();
        assert_eq!(told(), [0x8000, 0x4000]);
        for (vcpus, shares) in [(4, [0x2000, 0x1000]), (2, [0x4000, 0x2000])] {
            enforcer.resize(&host(), &plan(vcpus)).unwrap();
            assert_eq!(told(), shares);
            for effect in enforcer.effects() {
                assert!(matches!(effect.outcome, Outcome::Delegated { .. }));
            }
        }
        drop(enforcer);
        assert_eq!(told(), [0x10000, 0], "as before the first");
    }
}
