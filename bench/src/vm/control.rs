//! Control planes: what each VMM tells the kernel about its vCPU threads, call for call, and Rota's own.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use scheduler::{
    Claim, CpuSet, EnforceOptions, Enforcer, GangSignal, Host, Ledger, Owner, ReconcileOptions,
    Reconciler, Request, Rotator, SchedMode, ThreadRole, Tid, VmId, plan,
};
use serde::{Deserialize, Serialize};

use super::{
    Body, VmSpec,
    body::Threads,
    groups::{Groups, Limits, Shares},
};
use crate::Result;

/// Who places a VM's threads, and how.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Control {
    /// Nobody: Linux as it is.
    Nothing,
    /// cloud-hypervisor with `affinity=`: one `sched_setaffinity` for each vCPU's thread, once.
    CloudHypervisor {
        /// CPUs of each vCPU.
        affinity: Vec<CpuSet>,
    },
    /// libvirt: groups for each vCPU and the emulator, `cpuset` and affinity for pins, shares and quota.
    Libvirt {
        /// `<vcpupin>`; a vCPU without is left alone.
        pins: Vec<CpuSet>,
        /// `<emulatorpin>`.
        emulator: Option<CpuSet>,
        /// `<shares>` of the domain.
        shares: Option<u32>,
        /// `<quota>` and `<period>` of each vCPU, in microseconds.
        quota: Option<(u64, u64)>,
        /// `<vcpusched scheduler='fifo'>`'s priority.
        fifo: Option<u8>,
    },
    /// Kubernetes: the process is in a cpuset (its own with the static CPU manager, or the shared pool), threads float in it, shares by
    /// CPUs requested.
    Kubernetes {
        /// The cpuset.
        cpus: CpuSet,
        /// CPUs requested, in thousandths.
        millicpus: u32,
    },
    /// `rota run --sched`.
    Rota {
        /// The policy, as one types it.
        sched: String,
        /// The ledger all VMs of an experiment share.
        ledger: PathBuf,
    },
}

/// What holds until it is dropped.
#[derive(Default)]
pub(super) struct Held {
    // Dropped in this order: who moves threads first, then where they are, then what the others know.
    _reconciler: Option<Reconciler>,
    rotator: Option<Rotator>,
    enforcer: Option<Enforcer<'static>>,
    _claim: Option<Claim>,
    _groups: Option<Groups>,
}

impl Held {
    pub(super) fn turns(&self) -> bool {
        self.rotator
            .as_ref()
            .is_some_and(|rotator| rotator.state().active.load(Relaxed))
    }

    pub(super) fn effects(&self) -> Vec<String> {
        let effects = self
            .enforcer
            .as_ref()
            .map(Enforcer::effects)
            .unwrap_or_default();
        effects
            .iter()
            .map(|effect| {
                format!(
                    "{} {}: {}",
                    effect.control, effect.requested, effect.outcome
                )
            })
            .collect()
    }
}

pub(super) fn apply(spec: &VmSpec, threads: &Threads) -> Result<Held> {
    let tids = threads.tids();
    match &spec.control {
        Control::Nothing => Ok(Held::default()),
        Control::CloudHypervisor { affinity } => {
            for (tid, cpus) in tids.iter().zip(affinity) {
                confine(*tid, cpus)?;
            }
            Ok(Held::default())
        }
        Control::Libvirt {
            pins,
            emulator,
            shares,
            quota,
            fifo,
        } => {
            let mut groups = Groups::here()?;
            let all = std::fs::read_to_string("/sys/devices/system/cpu/online")?;
            let all = all.trim();
            let domain = Limits {
                shares: shares.map(Shares::Libvirt),
                cpus: Some(all.to_owned()),
                real_time_us: fifo.map(|_| 900_000),
                ..Limits::default()
            };
            let domain = groups.of_process("domain", &domain)?;
            let emulator = Limits {
                cpus: Some(
                    emulator
                        .as_ref()
                        .map_or_else(|| all.to_owned(), CpuSet::to_string),
                ),
                ..Limits::default()
            };
            let emulator = groups.of_threads(&domain, "emulator", &emulator)?;
            groups.put_process(&emulator)?;
            for (vcpu, tid) in tids.iter().enumerate() {
                let pin = pins.get(vcpu);
                let limits = Limits {
                    quota: *quota,
                    cpus: pin.map(CpuSet::to_string),
                    real_time_us: fifo.map(|_| 800_000),
                    ..Limits::default()
                };
                let group = groups.of_threads(&domain, &format!("vcpu{vcpu}"), &limits)?;
                groups.put(&group, tid.0)?;
                if let Some(cpus) = pin {
                    confine(*tid, cpus)?;
                }
                if let Some(priority) = fifo {
                    make_fifo(*tid, *priority)?;
                }
            }
            Ok(Held {
                _groups: Some(groups),
                ..Held::default()
            })
        }
        Control::Kubernetes { cpus, millicpus } => {
            let mut groups = Groups::here()?;
            let limits = Limits {
                shares: Some(Shares::Kubernetes {
                    millicpus: *millicpus,
                }),
                cpus: Some(cpus.to_string()),
                ..Limits::default()
            };
            groups.of_process("pod", &limits)?;
            Ok(Held {
                _groups: Some(groups),
                ..Held::default()
            })
        }
        Control::Rota { sched, ledger } => rota(spec, threads, sched, ledger),
    }
}

/// What `rota run` does with `--sched`.
fn rota(spec: &VmSpec, threads: &Threads, sched: &str, ledger: &Path) -> Result<Held> {
    // The vCPUs are threads here, and Linux schedules those.
    let host = Host {
        mode: SchedMode::Root,
        ..Host::read()?
    };
    let request = Request {
        vm: VmId(spec.name.clone()),
        vcpus: spec.vcpus.len() as u32,
        threads_per_core: 1,
        memory_mib: 64,
        policy: sched.parse()?,
    };
    let owner = Owner::current(&spec.name)?;
    let claim =
        Ledger::open(Some(ledger))?.claim(owner.clone(), |state| plan(&host, state, &[request]))?;
    let barriers = spec
        .vcpus
        .iter()
        .any(|body| matches!(body, Body::Barrier { .. }));
    let options = EnforceOptions {
        guest_tells: barriers,
        ..EnforceOptions::new(owner)
    };
    let enforcer = Enforcer::prepare(&host, &claim.plan(), &options)?;
    for (vcpu, tid) in threads.tids().iter().enumerate() {
        enforcer.adopt(ThreadRole::Vcpu(vcpu as u32), *tid)?;
    }
    let signal = threads
        .first_count()
        .filter(|_| barriers)
        .map(|count| Box::new(Barriers(count)) as Box<dyn GangSignal>);
    let rotator = Rotator::start(&enforcer, &claim, signal)?;
    let reconciler =
        Reconciler::start(&enforcer, Some(&claim), ReconcileOptions::default(), |_| {})?;
    Ok(Held {
        _reconciler: Some(reconciler),
        rotator,
        enforcer: Some(enforcer),
        _claim: Some(claim),
        _groups: None,
    })
}

/// What the guest would tell of its progress.
struct Barriers(Arc<AtomicU64>);

impl GangSignal for Barriers {
    fn progress(&mut self) -> Option<u64> {
        Some(self.0.load(Relaxed))
    }

    fn spins(&mut self) -> Option<u64> {
        None
    }
}

/// `sched_setaffinity`.
pub(crate) fn confine(tid: Tid, cpus: &CpuSet) -> io::Result<()> {
    // SAFETY: an empty set is all zeroes.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for cpu in cpus.iter().filter(|cpu| *cpu < libc::CPU_SETSIZE as u32) {
        // SAFETY: the CPU is within the set.
        unsafe { libc::CPU_SET(cpu as usize, &mut set) };
    }
    // SAFETY: a set on the stack, of the size that is said.
    match unsafe { libc::sched_setaffinity(tid.0, size_of_val(&set), &raw const set) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `sched_setscheduler` to `SCHED_FIFO`.
fn make_fifo(tid: Tid, priority: u8) -> io::Result<()> {
    let parameter = libc::sched_param {
        sched_priority: priority.into(),
    };
    // SAFETY: a parameter on the stack.
    match unsafe { libc::sched_setscheduler(tid.0, libc::SCHED_FIFO, &raw const parameter) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
