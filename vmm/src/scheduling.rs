//! Scheduling as the machine's owner asked for it: from the configuration to threads that are where they should be.
//!
//! ```text
//! Scheduling::begin ── who schedules? host, ledger, plan       once, before anything is created; may be refused
//!   └ Placed::new ──── groups and controls, or properties      for each boot's partition
//!       ├ adopt ────── each vCPU's thread, before it runs
//!       ├ look_after ─ turns of gangs, the reconcile loop      while the guest runs
//!       └ resize ───── another plan, for more vCPUs or fewer
//! ```
//!
//! A machine nobody asked anything for is left to Linux as it is: no place in the ledger, no control group, no thread touched.

use std::{cell::RefCell, fmt, io, os::fd::AsFd, path::PathBuf};

use scheduler::{
    AdoptError, Claim, ClaimError, Detection, Effect, EnforceOptions, Enforcer, Host, HostError,
    Ledger, LedgerError, Meter, MeterOptions, ModeCheck, NeedsForce, Outcome, Owner,
    PartitionProperties, PolicyError, ReconcileOptions, Reconciler, Refused, Rejection, Request,
    Rotator, RotatorError, RunTimes, SchedMode, Scope, ThreadRole, Tid, VmId, VmMeter, VmPlan,
    VmPolicy, plan,
};
use serde::{Deserialize, Serialize};
use tracing::{debug, info, warn};
use vcpu::ExitKind;
use vm_memory::GuestMemoryMmap;

use crate::{
    config::VmConfig,
    memory,
    partition::{Device, Partition},
};

/// How a machine's vCPUs are to be scheduled.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SchedulingConfig {
    /// What is asked for; nothing when absent.
    #[serde(default)]
    pub policy: Option<VmPolicy>,
    /// Hardware threads per core the guest would like to be told of.
    #[serde(default)]
    pub threads_per_core: Option<u32>,
    /// Carry the policy out as in this mode, whatever was found.
    #[serde(default)]
    pub mode: Option<SchedMode>,
    /// … even if VPs have been seen to run elsewhere than on their threads.
    #[serde(default)]
    pub mode_force: bool,
    /// The machine's name in the ledger.
    #[serde(default)]
    pub name: Option<String>,
    /// Another ledger than the host's.
    #[serde(default)]
    pub ledger: Option<PathBuf>,
    /// Where to write, every second, what each vCPU gets ([`crate::metrics`]); only for machines with a policy.
    #[serde(default)]
    pub metrics: Option<PathBuf>,
}

/// Why the machine cannot be scheduled as asked.
#[derive(Debug, thiserror::Error)]
pub enum SchedulingError {
    /// The host cannot be read.
    #[error(transparent)]
    Host(#[from] HostError),
    /// No machine of this size can be scheduled like that.
    #[error("--sched: {0}")]
    Policy(#[from] PolicyError),
    /// The mode asked for contradicts what was seen.
    #[error(transparent)]
    Mode(#[from] NeedsForce),
    /// The ledger.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// There is no room in the ledger, or it cannot be used.
    #[error("{}", claim_line(.0))]
    Claim(ClaimError),
    /// A control cannot be had.
    #[error("--sched: {0}")]
    Refused(#[from] Refused),
    /// A thread cannot be placed.
    #[error(transparent)]
    Adopt(#[from] AdoptError),
    /// Gangs.
    #[error(transparent)]
    Rotator(#[from] RotatorError),
    /// The host has no more of something.
    #[error("cannot look after the machine's threads")]
    Io(#[from] io::Error),
}

impl SchedulingError {
    /// What would have become of each request, where that is why.
    #[must_use]
    pub fn effects(&self) -> Option<Vec<Effect>> {
        match self {
            Self::Refused(refused) => Some(refused.effects.clone()),
            _ => None,
        }
    }
}

/// A refusal in one line: what binds, and what could be had instead.
fn claim_line(error: &ClaimError) -> String {
    match error {
        ClaimError::Rejected(rejection) => format!("--sched: {}", rejection_line(rejection)),
        other => other.to_string(),
    }
}

fn rejection_line(rejection: &Rejection) -> String {
    let text = rejection.to_string();
    let lines: Vec<_> = text
        .lines()
        .map(str::trim)
        .filter(|it| !it.is_empty())
        .collect();
    lines.join("; ")
}

/// What was planned for a machine, for as long as it lives.
pub struct Scheduling {
    host: Host,
    detection: Detection,
    owner: Owner,
    claim: Claim,
    /// What is asked for, with what is asked for vCPUs that are still to come.
    request: Request,
}

impl Scheduling {
    /// Plans `config`, if it asks for anything, with what was found out about who schedules, and writes the plan into the host's
    /// ledger.
    ///
    /// # Errors
    /// What cannot be had, and why. Nothing stays behind.
    pub fn begin(
        config: &VmConfig,
        detection: &Detection,
    ) -> Result<Option<Self>, SchedulingError> {
        let asked = &config.scheduling;
        let Some(policy) = asked.policy.clone() else {
            // Others' machines that were killed are cleared away all the same; that they cannot be is no reason not to start.
            if let Err(error) = Ledger::clear_away(asked.ledger.as_deref()) {
                debug!("what killed machines have left stays: {error}");
            }
            return Ok(None);
        };
        let mode = detection.mode(asked.mode, asked.mode_force)?;
        let host = Host {
            mode,
            ..Host::read()?
        };
        let name = asked
            .name
            .clone()
            .unwrap_or_else(|| format!("vm-{}", std::process::id()));
        let max = config.cpus.max_vcpus;
        if let Some(error) = policy.check(max).into_iter().next() {
            return Err(error.into());
        }
        let request = Request {
            vm: VmId(name.clone()),
            vcpus: config.cpus.boot_vcpus,
            threads_per_core: asked.threads_per_core.unwrap_or(1),
            memory_mib: config.memory.size >> 20,
            policy,
        };
        let owner = Owner::current(&name)?;
        let first = for_vcpus(&request, request.vcpus);
        let claim = Ledger::open(asked.ledger.as_deref())?
            .claim(owner.clone(), |ledger| plan(&host, ledger, &[first]))
            .map_err(SchedulingError::Claim)?;
        Ok(Some(Self {
            host,
            detection: detection.clone(),
            owner,
            claim,
            request,
        }))
    }

    /// The plan.
    #[must_use]
    pub fn plan(&self) -> VmPlan {
        self.claim.plan()
    }

    /// Plans the machine, which does not run, with `vcpus` vCPUs.
    ///
    /// # Errors
    /// What cannot be had, and why. The plan is what it was.
    pub fn resize(&self, vcpus: u32) -> Result<(), SchedulingError> {
        self.replan(&self.host.reread()?, vcpus).map(drop)
    }

    fn replan(&self, host: &Host, vcpus: u32) -> Result<VmPlan, SchedulingError> {
        let request = for_vcpus(&self.request, vcpus);
        self.claim
            .replan(|ledger| plan(host, ledger, &[request]))
            .map_err(SchedulingError::Claim)
    }

    /// Has guest memory come from the nodes that were planned, if there is a choice. To be called before any of it is touched.
    #[must_use]
    pub fn bind(&self, memory: &GuestMemoryMmap) -> Option<Outcome> {
        scheduler::bind_memory(&self.host, &self.plan(), &memory::host_ranges(memory))
    }

    /// Makes the plan so for a partition of `device` that is ready to run `vcpus` vCPUs. `before` is what was metered before a reset,
    /// `memory` what came of [`Self::bind`].
    ///
    /// # Errors
    /// Something cannot be had. Nothing stays behind.
    pub fn place<'a>(
        &'a self,
        device: &'a Device,
        partition: &'a Partition,
        vcpus: u32,
        before: Option<VmMeter>,
        memory: Option<Outcome>,
    ) -> Result<Placed<'a>, SchedulingError> {
        // The guest may have ended without letting go of vCPUs that were to go.
        let planned = self.plan().request.vcpus;
        if planned != vcpus
            && let Err(error) = self.resize(vcpus)
        {
            warn!("scheduling: the plan stays one for {planned} vCPUs: {error}");
        }
        // Others may have changed it on making theirs.
        let plan = self.claim.current()?.unwrap_or_else(|| self.plan());
        let meter = Meter::new(MeterOptions {
            before: before.map(Box::new),
            ..MeterOptions::new(
                plan.request.vm.0.as_str(),
                self.detection.metered_as(plan.mode),
                plan.request.vcpus,
                ExitKind::NAMES,
            )
        });
        let options = EnforceOptions {
            partition: Some(partition),
            claim: Some(&self.claim),
            memory,
            guest_tells: meter.gang_signal().is_some(),
            doubt: self.detection.contradiction(plan.mode),
            ..EnforceOptions::new(self.owner.clone())
        };
        let enforcer = Enforcer::prepare(&self.host, &plan, &options)?;
        for name in enforcer.reaped() {
            info!("control group {name} of a process that is gone: removed");
        }
        Ok(Placed {
            scheduling: self,
            device,
            partition,
            meter,
            care: RefCell::default(),
            enforcer,
        })
    }
}

/// `request` for so many vCPUs.
fn for_vcpus(request: &Request, vcpus: u32) -> Request {
    Request {
        vcpus,
        policy: request.policy.for_vcpus(vcpus),
        ..request.clone()
    }
}

/// One boot's threads, placed.
pub struct Placed<'a> {
    scheduling: &'a Scheduling,
    device: &'a Device,
    partition: &'a Partition,
    meter: Meter,
    // Dropped in this order: who moves threads first, then where they are.
    care: RefCell<Care>,
    enforcer: Enforcer<'a>,
}

/// Who moves threads while the guest runs.
#[derive(Default)]
struct Care {
    reconciler: Option<Reconciler>,
    rotator: Option<Rotator>,
}

impl Placed<'_> {
    /// Places the thread of vCPU `index`.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn adopt(&self, index: u32, thread: Tid) -> Result<(), SchedulingError> {
        Ok(self.enforcer.adopt(ThreadRole::Vcpu(index), thread)?)
    }

    /// The thread of vCPU `index` has ended.
    pub fn dismiss(&self, index: u32) {
        self.enforcer.dismiss(index);
    }

    /// Takes turns and keeps the plan true from now on.
    ///
    /// # Errors
    /// The host has no more threads or descriptors.
    pub fn look_after(&self) -> Result<(), SchedulingError> {
        let mut care = self.care.borrow_mut();
        *care = Care::default();
        let claim = &self.scheduling.claim;
        care.rotator = Rotator::start(&self.enforcer, claim, self.meter.gang_signal())?;
        let tell = |event| warn!("scheduling: {event}");
        let detection = &self.scheduling.detection;
        let options = ReconcileOptions {
            mode: Some(ModeCheck::new(self.device.as_fd(), detection)?),
            ..ReconcileOptions::default()
        };
        care.reconciler = Some(Reconciler::start(
            &self.enforcer,
            Some(claim),
            options,
            tell,
        )?);
        Ok(())
    }

    /// How many vCPUs are planned.
    #[must_use]
    pub fn vcpus(&self) -> u32 {
        self.enforcer.plan().request.vcpus
    }

    /// Would a plan for `vcpus` vCPUs be accepted now?
    ///
    /// # Errors
    /// What cannot be had, and why.
    pub fn check(&self, vcpus: u32) -> Result<(), SchedulingError> {
        let ledger = self.scheduling.claim.ledger().read()?;
        let request = for_vcpus(&self.scheduling.request, vcpus);
        plan(&self.host(), &ledger, &[request])
            .map(drop)
            .map_err(|rejection| SchedulingError::Claim(ClaimError::Rejected(Box::new(rejection))))
    }

    /// Plans `vcpus` vCPUs, and makes that so for the threads that there are. Those of vCPUs that go have ended before; those of vCPUs
    /// that come are adopted next. Nobody looks after the plan until then ([`Self::look_after`]).
    ///
    /// # Errors
    /// What cannot be had, and why. Then everything is as it was, and looked after.
    pub fn resize(&self, vcpus: u32) -> Result<(), SchedulingError> {
        let before = self.vcpus();
        *self.care.borrow_mut() = Care::default();
        let resized = self.try_resize(vcpus);
        match &resized {
            Ok(()) => self.meter.resize(vcpus),
            Err(_) => {
                if self.scheduling.plan().request.vcpus != before
                    && let Err(error) = self.try_resize(before)
                {
                    warn!("scheduling: the ledger has {vcpus} vCPUs for {before}: {error}");
                }
                self.look_after()?;
            }
        }
        resized
    }

    fn try_resize(&self, vcpus: u32) -> Result<(), SchedulingError> {
        let host = self.host();
        let plan = self.scheduling.replan(&host, vcpus)?;
        Ok(self.enforcer.resize(&host, &plan)?)
    }

    /// The host as it is now. What this process may use is known from its start: by now it is where its plan has put it.
    fn host(&self) -> Host {
        let at_start = &self.scheduling.host;
        let now = at_start.reread().unwrap_or_else(|_| at_start.clone());
        Host {
            allowed: &at_start.allowed & &self.enforcer.available(),
            ..now
        }
    }

    /// What VPs report to.
    #[must_use]
    pub fn meter(&self) -> &Meter {
        &self.meter
    }

    /// What each vCPU got and waited for until now.
    #[must_use]
    pub fn sample(&self) -> VmMeter {
        self.meter.sample_with(self.partition)
    }

    /// The plan, as it is now.
    #[must_use]
    pub fn plan(&self) -> VmPlan {
        self.enforcer.plan()
    }

    /// What became of each request, as things stand now.
    #[must_use]
    pub fn effects(&self) -> Vec<Effect> {
        let mut effects = self.enforcer.effects();
        effects.extend(known_of(self.scheduling.claim.ledger()));
        effects
    }
}

/// That others' machines may be given the same CPUs, where it is so: root and each user have ledgers of their own.
fn known_of(ledger: &Ledger) -> Option<Effect> {
    (ledger.scope() == Scope::User).then(|| Effect {
        control: "ledger".into(),
        requested: "machines of this host".into(),
        outcome: Outcome::Advisory {
            why: format!(
                "{} knows this user's machines alone: those of root and of other users know nothing of this one's CPUs, nor it of \
                 theirs; --ledger names one that all can use",
                ledger.path().display()
            ),
        },
    })
}

/// The plan and what came of it, as a table.
impl fmt::Display for Placed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plan = self.enforcer.plan();
        writeln!(f, "plan for {} ({})", plan.request.vm, plan.request.policy)?;
        write!(f, "{plan}")?;
        let effects = self.effects();
        let width = |of: fn(&Effect) -> usize| effects.iter().map(of).max().unwrap_or(0);
        let (control, requested) = (
            width(|effect| effect.control.chars().count()),
            width(|effect| effect.requested.chars().count()),
        );
        for effect in &effects {
            writeln!(
                f,
                "  {:control$}  {:requested$}  {}",
                effect.control, effect.requested, effect.outcome
            )?;
        }
        Ok(())
    }
}

impl RunTimes for Partition {
    fn run_time(&self, vcpu: u32) -> io::Result<u64> {
        self.vp_run_time(vcpu)
    }
}

impl PartitionProperties for Partition {
    fn property(&self, code: u32) -> io::Result<u64> {
        self.get_property(code)
    }

    fn set_property(&self, code: u32, value: u64) -> io::Result<()> {
        self.put_property(code, value)
    }

    fn is_shown_threads(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_users_own_ledger_is_told_of() {
        let chosen = std::env::temp_dir().join(format!("rota-scope-{}.json", std::process::id()));
        let chosen = Ledger::open(Some(&chosen)).expect("a ledger");
        assert_eq!(known_of(&chosen), None);
        if let Ok(own) = Ledger::open(None) {
            let told = known_of(&own);
            assert_eq!(told.is_some(), own.scope() == Scope::User, "{told:?}");
        }
    }
}
