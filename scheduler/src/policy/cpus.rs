//! The `--cpus` option as far as it says where vCPUs run: cloud-hypervisor's keys, with cloud-hypervisor's meaning.

use std::str::FromStr;

use super::{Placement, PolicyError, SmtIsolation, VmPolicy, affinity};
use crate::CpuSet;

/// What `--cpus` says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpusOption {
    /// `boot=`: vCPUs at start.
    pub boot: u32,
    /// The first number of `topology=`: hardware threads per core the guest would like to be shown.
    pub threads_per_core: u32,
    /// `topology=` as it stood there.
    pub topology: Option<String>,
    /// `affinity=`.
    pub affinity: Vec<(u32, CpuSet)>,
    /// `core_scheduling=`.
    pub core_scheduling: Option<SmtIsolation>,
    /// The options that say how many vCPUs there are and what they are like, as they stood there.
    pub others: String,
}

impl FromStr for CpusOption {
    type Err = PolicyError;

    /// Reads `boot=N[,topology=T:C:D:P][,affinity=[…]][,core_scheduling=vm|vcpu|off]`. Keys of `--cpus` that have nothing to do
    /// with scheduling are left to others.
    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let wrong = |key: &str, value: &str, allowed: String| PolicyError {
            key: key.to_owned(),
            value: value.to_owned(),
            allowed,
        };
        let mut cpus = Self {
            boot: 1,
            threads_per_core: 1,
            ..Self::default()
        };
        for option in affinity::split(text).map_err(|why| wrong("cpus", text, why))? {
            let (key, value) = option
                .split_once('=')
                .ok_or_else(|| wrong("cpus", option, "is not key=value".to_owned()))?;
            let bad = |allowed: String| wrong(key, value, allowed);
            if !matches!(key.trim(), "topology" | "affinity" | "core_scheduling") {
                let comma = if cpus.others.is_empty() { "" } else { "," };
                cpus.others += &format!("{comma}{option}");
            }
            match key.trim() {
                "boot" => {
                    let number = value.trim().parse();
                    cpus.boot = number.map_err(|_| bad("a number of vCPUs".to_owned()))?;
                }
                "topology" => {
                    let numbers: Result<Vec<u32>, _> =
                        value.split(':').map(|text| text.trim().parse()).collect();
                    match numbers.as_deref() {
                        Ok(parts @ [threads, _, _, _]) if !parts.contains(&0) => {
                            cpus.threads_per_core = *threads;
                            cpus.topology = Some(value.trim().to_owned());
                        }
                        _ => {
                            let shape = "THREADS:CORES:DIES:PACKAGES, as in 2:4:1:1";
                            return Err(bad(shape.to_owned()));
                        }
                    }
                }
                "affinity" => cpus.affinity = affinity::parse(value).map_err(bad)?,
                "core_scheduling" => {
                    cpus.core_scheduling =
                        Some(affinity::parse_core_scheduling(value).map_err(bad)?);
                }
                "max" | "kvm_hyperv" | "max_phys_bits" | "features" | "nested" | "profile" => {}
                _ => {
                    return Err(bad(
                        "no such key; there are: boot, max, topology, affinity, core_scheduling"
                            .to_owned(),
                    ));
                }
            }
        }
        Ok(cpus)
    }
}

impl CpusOption {
    /// What of it the guest will not see, in a sentence.
    #[must_use]
    pub fn unseen(&self) -> Option<String> {
        let topology = self.topology.as_ref()?;
        Some(format!(
            "topology={topology} is not shown to the guest, which sees what the hypervisor shows it; placement=dedicated puts the vCPUs of a \
             core on one of the host where it can"
        ))
    }

    /// Puts what is said here into `policy`, which is what `--sched` says.
    ///
    /// # Errors
    ///
    /// Both say where vCPUs run, or who shares a core, and not the same; or the policy is strict and something has no effect.
    pub fn complete(&self, policy: &mut VmPolicy) -> Result<(), PolicyError> {
        let contradiction = |key: &str, value: String, said: String| PolicyError {
            key: key.to_owned(),
            value,
            allowed: format!("--sched says {said}: say it once"),
        };
        if !self.affinity.is_empty() {
            let map = Placement::Map(self.affinity.clone());
            if policy.placement != Placement::Shared && policy.placement != map {
                let value = affinity::Map(&self.affinity).to_string();
                return Err(contradiction(
                    "affinity",
                    value,
                    policy.placement.to_string(),
                ));
            }
            policy.placement = map;
        }
        if let Some(smt) = self.core_scheduling {
            if policy.smt != SmtIsolation::Off && policy.smt != smt {
                let said = format!("smt={}", policy.smt);
                return Err(contradiction("core_scheduling", smt.to_string(), said));
            }
            policy.smt = smt;
        }
        match (&self.topology, policy.strict) {
            (Some(topology), true) => Err(PolicyError {
                key: "topology".to_owned(),
                value: topology.clone(),
                allowed: "it is not shown to the guest, and strict=on refuses what has no effect"
                    .to_owned(),
            }),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fills_a_policy() {
        let cpus: CpusOption =
            "boot=2,max=4,topology=2:1:1:1,affinity=[0@[0,2],1@[1,3]],core_scheduling=vcpu"
                .parse()
                .expect("reads");
        assert_eq!((cpus.boot, cpus.threads_per_core), (2, 2));
        assert_eq!(cpus.others, "boot=2,max=4");
        let mut policy: VmPolicy = "weight=200".parse().expect("reads");
        cpus.complete(&mut policy).expect("agrees");
        assert_eq!(
            policy.to_string(),
            "placement=map,map=[0@[0,2],1@[1,3]],weight=200,smt=vcpu"
        );
        cpus.complete(&mut policy).expect("says the same again");
    }

    #[test]
    fn a_topology_the_guest_is_not_shown_is_said_and_refused_if_strict() {
        for (topology, unseen) in [
            (",topology=2:2:1:1", true),
            (",topology=1:4:1:1", true),
            ("", false),
        ] {
            let cpus: CpusOption = format!("boot=4{topology}").parse().expect("reads");
            assert_eq!(cpus.unseen().is_some(), unseen, "{topology}");
            cpus.complete(&mut VmPolicy::default()).expect("goes on");
            let mut strict: VmPolicy = "strict=on".parse().expect("reads");
            assert_eq!(cpus.complete(&mut strict).is_err(), unseen, "{topology}");
        }
    }

    #[test]
    fn contradictions_are_refused() {
        let cpus: CpusOption = "boot=1,affinity=[0@1],core_scheduling=vm"
            .parse()
            .expect("reads");
        for sched in ["placement=dedicated", "map=[0@2]", "smt=vcpu"] {
            let mut policy: VmPolicy = sched.parse().expect("reads");
            assert!(cpus.complete(&mut policy).is_err(), "{sched}");
        }
        for bad in [
            "boot",
            "boot=x",
            "topology=a",
            "topology=2",
            "topology=2:1:1",
            "topology=0:1:1:1",
            "topology=2:1:1:1:1",
            "affinity=[0@1",
            "core_scheduling=x",
            "booot=1",
        ] {
            assert!(bad.parse::<CpusOption>().is_err(), "{bad}");
        }
    }
}
