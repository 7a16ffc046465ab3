//! Trying one control after the other before a guest depends on it, and saying what came of it.
//!
//! What is told to a thread is rehearsed on a thread that lives for that alone; what is told to a group is told for good, and goes
//! with the group.

use std::{io, thread};

use super::{
    Outcome,
    cgroup::{read_number, write},
    linux::Linux,
    threads::{Before, Class, ThreadControls, nice_for},
    words,
};
use crate::{Cap, CpuSet, Host, Slice, Tid, VmPlan, gang::lever::LeverKind};

impl Linux {
    /// Rehearses where each vCPU goes.
    pub(super) fn try_placement(&self, plan: &VmPlan) -> Outcome {
        let tried = on_a_thread(|me| {
            let mut differences = Vec::new();
            for (vcpu, controls) in plan.vcpus.iter().zip(&self.vcpus) {
                self.vcpu_group(vcpu.vcpu).add(me)?;
                if let Some(got) = controls.place(me)?
                    && got != vcpu.cpus
                {
                    differences.push(format!("vCPU {} on {got}", vcpu.vcpu));
                }
            }
            Ok(differences)
        });
        placed(tried, &words::placement(plan))
    }

    pub(super) fn try_helpers(&self, plan: &VmPlan) -> Outcome {
        let tried = on_a_thread(|me| {
            self.helper_group.add(me)?;
            let got = self.helpers.place(me)?.unwrap_or_default();
            let different = got != plan.helpers && !plan.helpers.is_empty();
            Ok(if different {
                vec![format!("CPUs {got}")]
            } else {
                Vec::new()
            })
        });
        placed(tried, &format!("CPUs {}", plan.helpers))
    }

    pub(super) fn try_weight(&mut self, host: &Host, weight: u32) -> Outcome {
        if host.abilities.sched_ext_active.yes {
            return Outcome::Advisory {
                why: "a BPF scheduler is in charge, and takes weights as hints".into(),
            };
        }
        let parts = self.vcpu_groups.len() as u32;
        let share = (weight / parts.max(1)).max(1);
        let mut effective = 0.0;
        for group in &self.vcpu_groups {
            let Some(cpu) = &group.cpu else {
                return self.try_nice(weight);
            };
            match cpu.hierarchy.set_weight(&cpu.path, share) {
                Ok(is) => effective += is,
                Err(error) => {
                    return Outcome::Rejected {
                        why: format!("the kernel does not take it: {error}"),
                    };
                }
            }
        }
        self.group_weight = share;
        within_one_percent(f64::from(weight), effective)
    }

    /// Without groups: a nice value, for each thread.
    pub(super) fn try_nice(&mut self, weight: u32) -> Outcome {
        let (nice, effective) = nice_for(weight);
        let controls = ThreadControls {
            nice: Some(nice),
            ..ThreadControls::default()
        };
        match on_a_thread(|me| controls.classify(me)) {
            Ok(_) => {
                for vcpu in &mut self.vcpus {
                    vcpu.nice = Some(nice);
                }
                Outcome::Approximated {
                    requested: weight.to_string(),
                    effective: format!("nice {nice} for each vCPU, a weight of {effective:.0}"),
                    why: format!(
                        "{}; it counts among the threads of this session",
                        self.why_no_groups()
                    ),
                }
            }
            Err(error) => Outcome::Advisory {
                why: format!("{}, and nice {nice}: {error}", self.why_no_groups()),
            },
        }
    }

    pub(super) fn try_cap(&self, cap: &Cap) -> Outcome {
        let parts = self.vcpu_groups.len() as u64;
        let share = Cap {
            quota_us: cap.quota_us / parts.max(1),
            burst_us: cap.burst_us / parts.max(1),
            ..*cap
        };
        for group in &self.vcpu_groups {
            let Some(cpu) = &group.cpu else {
                return Outcome::Rejected {
                    why: format!(
                        "a cap needs the cpu controller, and {}",
                        self.why_no_groups()
                    ),
                };
            };
            match cpu.hierarchy.set_cap(&cpu.path, &share) {
                Ok(is) if is == share => {}
                Ok(is) => {
                    return Outcome::Approximated {
                        requested: words::cap(cap),
                        effective: words::cap(&is),
                        why: "that is what the kernel reads back".into(),
                    };
                }
                Err(error) => {
                    return Outcome::Rejected {
                        why: format!(
                            "the kernel does not take it: {error} (1 ms to 1 s a period, at least 1 ms of quota, burst within \
                             quota, and no more than the group above has)"
                        ),
                    };
                }
            }
        }
        if parts > 1 {
            return Outcome::Approximated {
                requested: words::cap(cap),
                effective: format!("{} for each vCPU", words::cap(&share)),
                why: "vCPUs that take turns one by one are groups of their own".into(),
            };
        }
        Outcome::Enforced
    }

    pub(super) fn try_slice(&self, host: &Host, slice: Slice) -> Outcome {
        let (Some(controls), Some(us)) = (self.vcpus.first(), slice.micros()) else {
            return Outcome::Enforced;
        };
        let wanted = ThreadControls {
            slice_us: Some(us),
            ..ThreadControls::default()
        };
        if controls.class != Class::Fair {
            return Outcome::Rejected {
                why: "slices are for the fair class, and these vCPUs are in another".into(),
            };
        }
        if host.abilities.sched_ext_active.yes {
            return Outcome::Advisory {
                why: "a BPF scheduler is in charge, and takes slices as hints".into(),
            };
        }
        match on_a_thread(|me| wanted.classify(me)) {
            Ok(Some(is)) if is.runtime_ns == u64::from(us) * 1000 => Outcome::Approximated {
                requested: words::micros(us.into()),
                effective: format!(
                    "asked for by each vCPU; it runs {} while others wait",
                    words::micros(host.effective_slice_us(us))
                ),
                why: format!(
                    "the kernel looks at ticks, every {}; the shortest slice on a CPU decides",
                    words::micros(host.tick_ns / 1000)
                ),
            },
            Ok(Some(is)) if is.runtime_ns > 0 => Outcome::Approximated {
                requested: words::micros(us.into()),
                effective: words::micros(is.runtime_ns / 1000),
                why: "that is what the kernel reads back: it takes 100 us to 100 ms".into(),
            },
            Ok(_) => Outcome::Advisory {
                why: "this kernel has no custom slices (Linux 6.12 has)".into(),
            },
            Err(error) => Outcome::Advisory {
                why: format!("the kernel does not take it: {error}"),
            },
        }
    }

    /// Rehearses a real-time class.
    pub(super) fn try_class(&self, cpus: &CpuSet, helpers: &CpuSet) -> Outcome {
        if !(cpus & helpers).is_empty() {
            return Outcome::Rejected {
                why: format!(
                    "a vCPU that never blocks would starve the threads that serve the VM: keep helpers ({helpers}) off {cpus}"
                ),
            };
        }
        let tried = on_a_thread(|me| {
            for (vcpu, controls) in self.vcpus.iter().enumerate() {
                let before = Before::of(me)?;
                self.vcpu_group(vcpu as u32).add(me)?;
                controls.place(me)?;
                let result = controls.classify(me);
                before.restore();
                result?;
            }
            Ok(())
        });
        match tried {
            Ok(()) => Outcome::Enforced,
            Err(error) => Outcome::Rejected {
                why: match error.raw_os_error() {
                    Some(libc::EPERM) if matches!(self.vcpus.first(), Some(controls) if matches!(controls.class, Class::Deadline(_))) => {
                        "the kernel takes deadlines from root, for threads that may use a whole root domain: give the VM all \
                         CPUs, or CPUs of a partition of their own"
                            .into()
                    }
                    Some(libc::EPERM) => "this user may not: CAP_SYS_NICE or RLIMIT_RTPRIO".into(),
                    Some(libc::EBUSY) => "the kernel has not that much deadline time left".into(),
                    _ => format!("the kernel does not take it: {error}"),
                },
            },
        }
    }

    /// Finds a lever that works. Demotion is noticed at the next tick, so turns of a few ticks are not what they say.
    pub(super) fn try_lever(&mut self, host: &Host, quantum_us: u32) -> Outcome {
        if !matches!(self.vcpus.first(), Some(controls) if controls.class == Class::Fair) {
            return Outcome::Rejected {
                why: "only the fair class takes turns".into(),
            };
        }
        let group_idle = self.vcpu_groups.iter().try_for_each(|group| {
            let cpu = group.cpu.as_ref().ok_or_else(|| self.why_no_groups())?;
            let file = cpu.path.join("cpu.idle");
            let demoted = write(&file, "1")
                .and_then(|()| read_number::<u8>(&file))
                .map_err(|error| format!("cpu.idle: {error}"))?;
            let restored = write(&file, "0")
                .and_then(|()| cpu.hierarchy.set_weight(&cpu.path, self.group_weight));
            match (demoted, restored) {
                (1, Ok(_)) => Ok(()),
                (_, Ok(_)) => Err("cpu.idle does not read back".to_owned()),
                (_, Err(error)) => Err(format!("cpu.idle: {error}")),
            }
        });
        let why_not = match group_idle {
            Ok(()) => {
                self.lever = Some(LeverKind::GroupIdle);
                None
            }
            Err(why) => {
                self.lever = [LeverKind::ThreadIdle, LeverKind::ThreadNice]
                    .into_iter()
                    .find(|kind| on_a_thread(|me| kind.rehearse(me)).is_ok());
                Some(why)
            }
        };
        let tick_us = host.tick_ns / 1000;
        match (self.lever, why_not) {
            (None, why) => Outcome::Rejected {
                why: format!(
                    "nothing here can hold a vCPU back and let it go again: {}, and leaving SCHED_IDLE or a nice value needs \
                     CAP_SYS_NICE",
                    why.unwrap_or_default()
                ),
            },
            (Some(_), _) if u64::from(quantum_us) < 5 * tick_us => Outcome::Approximated {
                requested: format!("turns of {}", words::micros(quantum_us.into())),
                effective: format!("turns that begin up to {} late", words::micros(tick_us)),
                why: "the kernel notices at ticks who is to wait: ask for 5 of them or more".into(),
            },
            (Some(_), None) => Outcome::Enforced,
            (Some(kind), Some(why)) => Outcome::Approximated {
                requested: "turns by cpu.idle of the VM's group".into(),
                effective: format!("turns by {} of each vCPU", kind.name()),
                why,
            },
        }
    }

    fn why_no_groups(&self) -> String {
        if self.places.notes.is_empty() {
            return "no group has a cpu controller".into();
        }
        self.places.notes.join("; ")
    }
}

fn placed(tried: io::Result<Vec<String>>, requested: &str) -> Outcome {
    match tried {
        Ok(differences) if differences.is_empty() => Outcome::Enforced,
        Ok(differences) => Outcome::Approximated {
            requested: requested.into(),
            effective: differences.join(", "),
            why: "the cpuset of this process, or CPUs that are offline, leave no more".into(),
        },
        Err(error) => Outcome::Rejected {
            why: format!(
                "the kernel does not take it: {error} (CPUs that are offline, or outside the cpuset of this process)"
            ),
        },
    }
}

fn within_one_percent(requested: f64, effective: f64) -> Outcome {
    if (effective - requested).abs() <= requested / 100.0 {
        return Outcome::Enforced;
    }
    Outcome::Approximated {
        requested: requested.to_string(),
        effective: format!("{effective:.1}"),
        why: "the kernel knows whole numbers only".into(),
    }
}

/// Runs `rehearsal` on a thread that is nobody's, and ends.
pub(super) fn on_a_thread<T: Send>(
    rehearsal: impl FnOnce(Tid) -> io::Result<T> + Send,
) -> io::Result<T> {
    thread::scope(|scope| {
        scope
            .spawn(|| rehearsal(Tid::current()))
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the rehearsal panicked")))
    })
}
