//! Who runs on the other hardware threads of a core while a vCPU does: nobody can, by where the vCPUs are, or the kernel is told
//! whom to run there (core scheduling).

use std::collections::BTreeMap;

use super::{Outcome, linux::Linux, rehearse::on_a_thread};
use crate::{CpuSet, Host, SmtIsolation, VmPlan, sys};

impl Linux {
    pub(super) fn try_smt(&mut self, host: &Host, plan: &VmPlan) -> Outcome {
        if has_its_cores(host, plan) {
            return Outcome::Enforced;
        }
        let tried = on_a_thread(|me| {
            sys::create_core_cookie(me)?;
            sys::core_cookie(me)
        });
        match tried {
            Ok(cookie) if cookie != 0 => {
                self.cookies = plan.request.policy.smt;
                Outcome::Enforced
            }
            Ok(_) => Outcome::Advisory {
                why: "the kernel took a core-scheduling cookie and reads back none".into(),
            },
            Err(error) => Outcome::Advisory {
                why: match error.raw_os_error() {
                    Some(libc::EINVAL) => {
                        "this kernel has no core scheduling, and others may run on these cores: ask for \
                         placement=dedicated,cores=one"
                            .into()
                    }
                    Some(libc::ENODEV) => "hardware threads are off on this host".into(),
                    _ => format!("the kernel does not take it: {error}"),
                },
            },
        }
    }
}

/// Is there nobody to keep away from the vCPUs' cores? There is not where cores have one thread, or where they are the VM's own.
/// That a set of CPUs has whole cores in it says nothing: others may run on all of them.
fn has_its_cores(host: &Host, plan: &VmPlan) -> bool {
    let mut threads: BTreeMap<u32, CpuSet> = BTreeMap::new();
    for cpu in &host.cpus {
        if host.online.contains(cpu.id) {
            threads.entry(cpu.core).or_default().insert(cpu.id);
        }
    }
    let of = |cpu: u32| host.cpu(cpu).and_then(|cpu| threads.get(&cpu.core));
    plan.vcpus.iter().all(|vcpu| {
        let mut cores = CpuSet::new();
        let mut single = true;
        for core in vcpu.cpus.iter().filter_map(of) {
            cores.add(core);
            single &= core.len() == 1;
        }
        let alone = || {
            plan.vcpus
                .iter()
                .all(|other| other.vcpu == vcpu.vcpu || other.cpus.is_disjoint(&cores))
        };
        let own = cores.is_subset(&plan.exclusive)
            && (plan.request.policy.smt != SmtIsolation::Vcpu || alone());
        single || own
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{HostSpec, LedgerState, Request, plan};

    /// Four cores.
    fn cores_are_its_own(smt: u32, vcpus: u32, policy: &str) -> bool {
        let host = HostSpec {
            smt,
            ..HostSpec::default()
        }
        .build();
        let request = Request {
            vm: "a".into(),
            vcpus,
            threads_per_core: 1,
            memory_mib: 64,
            policy: policy.parse().unwrap(),
        };
        let plan = plan(&host, &LedgerState::default(), &[request]).unwrap();
        has_its_cores(&host, &plan.vms[0])
    }

    #[test]
    fn whole_cores_that_others_share_are_not_its_own() {
        for smt in ["smt=vm", "smt=vcpu"] {
            for vcpus in [1, 2, 4] {
                assert!(!cores_are_its_own(2, vcpus, smt), "{vcpus} {smt}");
                assert!(cores_are_its_own(1, vcpus, smt), "{vcpus} {smt}");
            }
        }
        assert!(!cores_are_its_own(
            2,
            1,
            "placement=map,map=[0@[0,4]],smt=vm"
        ));
    }

    #[test]
    fn dedicated_cores_are() {
        let whole = "placement=dedicated,cores=whole,smt=vm";
        assert!(cores_are_its_own(2, 2, whole));
        for smt in ["vm", "vcpu"] {
            let one = format!("placement=dedicated,cores=one,smt={smt}");
            assert!(cores_are_its_own(2, 2, &one));
        }
        // The other thread of its core is somebody else's.
        assert!(!cores_are_its_own(2, 1, "placement=dedicated,smt=vm"));
        // Both are its own, and its vCPUs share them.
        assert!(cores_are_its_own(2, 8, "placement=dedicated,smt=vm"));
        assert!(!cores_are_its_own(2, 8, "placement=dedicated,smt=vcpu"));
    }
}
