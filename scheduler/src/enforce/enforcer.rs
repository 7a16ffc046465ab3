//! The enforcer of one VM, from before its first thread to after its last.

use std::{
    collections::BTreeMap,
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use tracing::warn;

use super::{
    Effect, Outcome, PartitionProperties,
    cgroup::{Group, Places, read_cpus, write},
    delegated::{self, Changed},
    elsewhere,
    linux::Linux,
    threads::{Before, ThreadControls},
};
use crate::{
    Claim, CpuSet, Gang, Host, Owner, SchedMode, SmtIsolation, Tid, VmPlan,
    gang::lever::{Lever, LeverKind},
    ledger::Entry,
    reconcile::events::effective_cpus_file,
    sys,
};

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ThreadRole {
    /// It runs a vCPU, by number.
    Vcpu(u32),
    /// It serves the guest otherwise.
    Helper,
}

/// How a plan is enforced.
pub struct Options<'a> {
    /// Whose VM it is; control groups carry it in their names.
    pub owner: Owner,
    /// The partition, where the hypervisor schedules.
    pub partition: Option<&'a dyn PartitionProperties>,
    /// The VM's place in the ledger, where its control groups are noted down before they are made, so that they are found should this
    /// process be killed.
    pub claim: Option<&'a Claim>,
    /// A control group (version 2) to make the VM's groups in, instead of this process's own.
    pub parent: Option<PathBuf>,
    /// Make no control groups: tell threads alone.
    pub bare: bool,
    /// All threads of this process, and those it will start, serve this VM. Otherwise only those that are adopted.
    pub whole_process: bool,
    /// Start even if something is rejected: the effects say what.
    pub best_effort: bool,
    /// What came of [`crate::bind_memory`], where it was called.
    pub memory: Option<Outcome>,
    /// The rotator will be told how far the guest gets ([`crate::GangSignal`]), which is what adaptive gangs are judged by.
    pub guest_tells: bool,
    /// Why nothing that is done in the plan's mode may have an effect ([`crate::Detection::contradiction`]).
    pub doubt: Option<String>,
}

impl Options<'_> {
    /// A process that runs one VM, with what it finds.
    #[must_use]
    pub fn new(owner: Owner) -> Self {
        Self {
            owner,
            partition: None,
            claim: None,
            parent: None,
            bare: false,
            whole_process: true,
            best_effort: false,
            memory: None,
            guest_tells: false,
            doubt: None,
        }
    }
}

/// A request that cannot be met. Nothing was left behind.
#[derive(Debug, thiserror::Error)]
pub struct Refused {
    /// Everything that was requested, and what would have become of it.
    pub effects: Vec<Effect>,
    /// Whether advisory effects were refused too.
    pub strict: bool,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut before = "";
        for effect in self.effects.iter().filter(|effect| {
            matches!(effect.outcome, Outcome::Rejected { .. })
                || self.strict && matches!(effect.outcome, Outcome::Advisory { .. })
        }) {
            write!(
                f,
                "{before}{} ({}) is {}",
                effect.control, effect.requested, effect.outcome
            )?;
            before = "; ";
        }
        Ok(())
    }
}

/// A thread that could not be given what the plan says.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// The plan has no such vCPU.
    #[error("the plan has {}, and none with number {vcpu}: plan again first", crate::policy::Count(*planned, "vCPU"))]
    NotPlanned {
        /// Its number.
        vcpu: u32,
        /// How many there are.
        planned: usize,
    },
    /// The kernel refuses something it took when it was rehearsed.
    #[error("{role}: cannot {what}")]
    Kernel {
        /// The thread's role.
        role: ThreadRole,
        /// What was to be done.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// What one VM has been given in the kernel or the hypervisor. Dropped, everything is as it was before.
///
/// ```no_run
/// use scheduler::*;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let request = Request { vm: "web".into(), vcpus: 2, threads_per_core: 1, memory_mib: 512, policy: "weight=200".parse()? };
/// let host = Host::read()?;
/// let owner = Owner::current("uuid of this VM")?;
/// let claim = Ledger::open(None)?.claim(owner.clone(), |ledger| plan(&host, ledger, &[request]))?;
/// let enforcer = Enforcer::prepare(&host, &claim.plan(), &EnforceOptions::new(owner))?;
/// for effect in enforcer.effects() {
///     println!("{}: {} is {}", effect.control, effect.requested, effect.outcome);
/// }
/// // On each vCPU's thread, once it is there:
/// enforcer.adopt(ThreadRole::Vcpu(0), Tid::current())?;
/// // And while the VM runs:
/// let turns = Rotator::start(&enforcer, &claim, None)?;
/// let care = Reconciler::start(&enforcer, Some(&claim), ReconcileOptions::default(), |event| {
///     eprintln!("{event}");
/// })?;
/// # Ok(())
/// # }
/// ```
pub struct Enforcer<'a> {
    pub(super) shared: Arc<Shared>,
    pub(super) partition: Option<&'a dyn PartitionProperties>,
    pub(super) changed: Mutex<Changed>,
    pub(super) owner: Owner,
    pub(super) best_effort: bool,
    pub(super) guest_tells: bool,
    /// Its place in the ledger, where its groups are noted.
    entry: Option<Entry>,
}

/// What the threads that look after a running VM share with its [`Enforcer`].
pub(crate) struct Shared {
    /// As it was when the plan was made.
    host: Host,
    pub(super) plan: Mutex<VmPlan>,
    /// All threads of this process serve this VM.
    whole_process: bool,
    pub(super) linux: Mutex<Option<Linux>>,
    pub(super) threads: Mutex<BTreeMap<Tid, Adopted>>,
    pub(super) effects: Mutex<Vec<Effect>>,
    released: AtomicBool,
    /// Why nothing that is done may have an effect.
    doubt: Option<String>,
}

pub(super) struct Adopted {
    pub(super) role: ThreadRole,
    before: Option<Before>,
}

impl<'a> Enforcer<'a> {
    /// Makes `plan` so, as far as that is possible before there are threads: groups are made, thread controls are rehearsed,
    /// properties of the partition are set. [`Enforcer::effects`] says what became of each request.
    ///
    /// # Errors
    /// Something is rejected, or, if the policy is strict, advisory. Then everything is as it was.
    pub fn prepare(host: &Host, plan: &VmPlan, options: &Options<'a>) -> Result<Self, Refused> {
        let shared = Shared {
            host: host.clone(),
            plan: Mutex::new(plan.clone()),
            whole_process: options.whole_process,
            linux: Mutex::new(None),
            threads: Mutex::default(),
            effects: Mutex::default(),
            released: AtomicBool::new(false),
            doubt: match plan.mode {
                SchedMode::Disputed => {
                    Some("what is declared and what is observed differ on who schedules".into())
                }
                SchedMode::Unknown => {
                    Some("nothing says that it is Linux that schedules the VPs".into())
                }
                _ => options.doubt.clone(),
            },
        };
        let mut enforcer = Self {
            shared: Arc::new(shared),
            partition: options.partition,
            changed: Mutex::default(),
            owner: options.owner.clone(),
            best_effort: options.best_effort,
            guest_tells: options.guest_tells,
            entry: options.claim.map(|claim| claim.entry().clone()),
        };
        let effects = if plan.mode.hypervisor_schedules() {
            let (mut effects, changed) = delegated::delegate(plan, options.partition);
            enforcer.changed = Mutex::new(changed);
            if let Some(plan) = delegated::for_helpers(plan) {
                let options = Options {
                    bare: true,
                    owner: options.owner.clone(),
                    parent: None,
                    memory: None,
                    doubt: None,
                    ..*options
                };
                let made = enforcer.prepare_linux(host, &plan, &options);
                effects.extend(delegated::of_helpers(made));
            }
            effects
        } else {
            enforcer.prepare_linux(host, plan, options)
        };
        let effects = enforcer.judge(plan, effects, elsewhere::effects(host, plan, options))?;
        *lock(&enforcer.shared.effects) = effects;
        Ok(enforcer)
    }

    /// What the effects amount to where it is not certain who schedules, and whether they will do, with those `elsewhere`.
    pub(super) fn judge(
        &self,
        plan: &VmPlan,
        mut effects: Vec<Effect>,
        elsewhere: Vec<Effect>,
    ) -> Result<Vec<Effect>, Refused> {
        let policy = &plan.request.policy;
        if !plan.mode.hypervisor_schedules()
            && !self.guest_tells
            && matches!(policy.gang, Gang::Adaptive { .. })
        {
            untold(&mut effects);
        }
        for effect in &mut effects {
            self.shared.doubt(effect);
        }
        effects.extend(elsewhere);
        let strict = policy.strict;
        let refused = effects.iter().any(|effect| match effect.outcome {
            Outcome::Rejected { .. } => strict || !self.best_effort,
            Outcome::Advisory { .. } => strict,
            _ => false,
        });
        if refused {
            return Err(Refused { effects, strict });
        }
        Ok(effects)
    }

    fn prepare_linux(&self, host: &Host, plan: &VmPlan, options: &Options<'_>) -> Vec<Effect> {
        let places = match options.bare {
            true => Places {
                cpu: None,
                cpuset: None,
                home: None,
                notes: vec!["control groups are not to be used".into()],
                ..Places::find(None)
            },
            false => Places::find(options.parent.as_deref()),
        };
        if let (Some(home), Some(cpu)) = (&places.home, &places.cpu) {
            // The groups of this process's threads can only be below the group of the process.
            if let Err(error) = move_process(&cpu.path) {
                let _ = move_process(home);
                let places = Places {
                    notes: vec![format!(
                        "{} does not take this process: {error}",
                        cpu.path.display()
                    )],
                    ..Places::default()
                };
                return self.install(host, plan, options, places);
            }
        }
        self.install(host, plan, options, places)
    }

    /// Tells the others which groups are about to be made.
    pub(super) fn note_groups(&self, groups: Vec<PathBuf>) {
        if groups.is_empty() {
            return;
        }
        let noted = self.entry.as_ref().map(|entry| entry.set_groups(groups));
        if let Some(Err(error)) = noted {
            warn!("control groups are not noted in the ledger: {error}");
        }
    }

    fn install(
        &self,
        host: &Host,
        plan: &VmPlan,
        options: &Options<'_>,
        places: Places,
    ) -> Vec<Effect> {
        let note_groups = |groups| self.note_groups(groups);
        let (linux, mut effects) = Linux::prepare(host, plan, places, &options.owner, &note_groups);
        *lock(&self.shared.linux) = Some(linux);
        if options.whole_process {
            // What the threads of this process start later is where they are.
            for tid in own_threads() {
                if let Err(error) = self.adopt(ThreadRole::Helper, tid)
                    && tid.is_there()
                {
                    effects.push(Effect {
                        control: format!("thread {}", tid.0),
                        requested: "with the VM's helpers".into(),
                        outcome: Outcome::Advisory {
                            why: error.to_string(),
                        },
                    });
                }
            }
        }
        effects
    }

    /// Gives one thread what the plan says for its role; also one that starts later, when a vCPU is plugged in.
    ///
    /// # Errors
    /// The kernel refuses. The thread is as it was.
    pub fn adopt(&self, role: ThreadRole, tid: Tid) -> Result<(), AdoptError> {
        self.shared.adopt(role, tid)
    }

    /// What became of each request, as things stand now.
    #[must_use]
    pub fn effects(&self) -> Vec<Effect> {
        lock(&self.shared.effects).clone()
    }

    /// Names of control groups of VMs whose process is gone, which were removed on the way.
    #[must_use]
    pub fn reaped(&self) -> Vec<String> {
        lock(&self.shared.linux)
            .as_ref()
            .map_or_else(Vec::new, |linux| linux.reaped.clone())
    }

    /// The plan, as it is now.
    #[must_use]
    pub fn plan(&self) -> VmPlan {
        self.shared.plan()
    }

    /// What the threads that look after a running VM need.
    pub(crate) fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }

    /// Puts everything back: threads, groups, properties.
    pub fn release(self) {
        drop(self);
    }
}

impl Drop for Enforcer<'_> {
    fn drop(&mut self) {
        self.shared.release();
        if let Some(partition) = self.partition {
            lock(&self.changed).restore(partition);
        }
    }
}

impl Shared {
    fn adopt(&self, role: ThreadRole, tid: Tid) -> Result<(), AdoptError> {
        let linux = lock(&self.linux);
        let Some(linux) = linux.as_ref() else {
            return Ok(());
        };
        let (group, controls) = settings(linux, role)?;
        let error = |what| move |source| AdoptError::Kernel { role, what, source };
        let before = Before::of(tid).map_err(error("look at the thread"))?;
        let applied = apply(tid, group, controls, role).and_then(|placed| {
            share_cookie(linux.cookies, role, self.another_vcpu(role), tid)
                .map_err(error("set its core-scheduling cookie"))?;
            Ok(placed)
        });
        match applied {
            Ok(placed) => {
                self.note_placed(role, controls, placed);
                let mut threads = lock(&self.threads);
                if let ThreadRole::Vcpu(_) = role {
                    // A vCPU has one thread: after a reset of the machine another one.
                    threads.retain(|_, thread| thread.role != role);
                }
                threads.insert(
                    tid,
                    Adopted {
                        role,
                        before: Some(before),
                    },
                );
                Ok(())
            }
            Err(error) => {
                group.expel(tid);
                before.restore();
                Err(error)
            }
        }
    }

    /// Says so if the kernel has given a thread other CPUs than it did when that was rehearsed.
    pub(super) fn note_placed(
        &self,
        role: ThreadRole,
        controls: &ThreadControls,
        placed: Option<CpuSet>,
    ) {
        let (Some(wanted), Some(got)) = (&controls.cpus, placed) else {
            return;
        };
        if *wanted == got {
            lock(&self.effects).retain(|effect| effect.control != name_of(role));
        } else {
            self.set_effect(Effect {
                control: name_of(role),
                requested: format!("CPUs {wanted}"),
                outcome: Outcome::Approximated {
                    requested: wanted.to_string(),
                    effective: got.to_string(),
                    why: "CPUs are offline, or the cpuset of this process has shrunk".into(),
                },
            });
        }
    }

    /// Puts a thread where it belongs now, after somebody has moved it.
    pub(crate) fn move_thread(&self, role: ThreadRole, tid: Tid) -> Result<(), AdoptError> {
        let linux = lock(&self.linux);
        let Some(linux) = linux.as_ref() else {
            return Ok(());
        };
        let (group, controls) = settings(linux, role)?;
        let placed = apply(tid, group, controls, role)?;
        self.note_placed(role, controls, placed);
        Ok(())
    }

    /// Threads of this process that were not there yet, or not known, go where its helpers are. One that cannot be had is looked at
    /// again the next time.
    pub(crate) fn adopt_newcomers(&self) {
        let linux = lock(&self.linux);
        let (Some(linux), true) = (linux.as_ref(), self.whole_process) else {
            return;
        };
        let mut threads = lock(&self.threads);
        let first = Tid(std::process::id().cast_signed());
        let before = threads.get(&first).and_then(|thread| thread.before.clone());
        for tid in own_threads() {
            // How it competes is its own affair: it may be there to be prompt.
            if !threads.contains_key(&tid)
                && linux.helper_group.add(tid).is_ok()
                && linux.helpers.place(tid).is_ok()
            {
                let before = before.as_ref().map(|before| before.placed(tid));
                let role = ThreadRole::Helper;
                threads.insert(tid, Adopted { role, before });
            }
        }
    }

    /// Is every thread where it belongs? One system call a thread.
    pub(crate) fn is_in_place(&self) -> bool {
        let linux = lock(&self.linux);
        let Some(linux) = linux.as_ref() else {
            return true;
        };
        lock(&self.threads).iter().all(|(tid, thread)| {
            let cpus = settings(linux, thread.role)
                .ok()
                .and_then(|(_, controls)| controls.cpus.as_ref());
            cpus.is_none_or(|cpus| matches!(sys::affinity_is(*tid, cpus), Ok(true)))
        })
    }

    /// Is it Linux that this VM's threads are placed by?
    pub(crate) fn places_threads(&self) -> bool {
        lock(&self.linux).is_some()
    }

    /// Are there threads to look after?
    pub(crate) fn has_threads(&self) -> bool {
        self.places_threads() && !lock(&self.threads).is_empty()
    }

    /// Gives vCPUs and helpers other CPUs, and their groups with them. Was a group otherwise than it should be, though nothing
    /// else has changed?
    pub(crate) fn confine(&self, vcpus: Vec<CpuSet>, helpers: &CpuSet) -> bool {
        self.with_linux(|linux| linux.confine(vcpus, helpers))
            .unwrap_or(false)
    }

    /// The host as it was when the plan was made.
    pub(crate) fn host(&self) -> &Host {
        &self.host
    }

    /// CPUs that this VM can have at all, now.
    pub(crate) fn available(&self) -> CpuSet {
        let place = self.cpuset_place();
        let effective = place.as_deref().and_then(effective_cpus_file);
        let online = || read_cpus(Path::new("/sys/devices/system/cpu/online"));
        let above = effective
            .as_deref()
            .map_or_else(online, read_cpus)
            .unwrap_or_default();
        // A partition takes its CPUs away from the groups above it.
        let own = self.with_linux(|linux| linux.partition());
        &above | &own.unwrap_or_default()
    }

    /// Another plan for the same VM.
    pub(crate) fn replan(&self, plan: &VmPlan) {
        *lock(&self.plan) = plan.clone();
        for effect in &mut *lock(&self.effects) {
            match effect.control.as_str() {
                "placement" => effect.requested = plan.placement_in_words(),
                "helpers" => effect.requested = format!("CPUs {}", plan.helpers),
                _ => {}
            }
        }
        let vcpus = plan.vcpus.iter().map(|vcpu| vcpu.cpus.clone()).collect();
        self.confine(vcpus, &plan.helpers);
    }

    /// The directory whose cpuset limits this VM from above.
    pub(crate) fn cpuset_place(&self) -> Option<PathBuf> {
        self.with_linux(|linux| linux.cpuset_place.clone())
            .flatten()
    }

    /// The directories of this VM's groups with cpusets of their own.
    pub(crate) fn cpuset_groups(&self) -> Vec<PathBuf> {
        self.with_linux(|linux| linux.cpuset_groups())
            .unwrap_or_default()
    }

    /// A thread that runs another vCPU, and lives.
    fn another_vcpu(&self, than: ThreadRole) -> Option<Tid> {
        lock(&self.threads)
            .iter()
            .filter(|(_, thread)| thread.role != than)
            .filter(|(_, thread)| matches!(thread.role, ThreadRole::Vcpu(_)))
            .map(|(tid, _)| *tid)
            .find(|tid| sys::affinity(*tid).is_ok())
    }

    /// The threads with their roles.
    pub(crate) fn threads(&self) -> Vec<(Tid, ThreadRole)> {
        lock(&self.threads)
            .iter()
            .map(|(tid, thread)| (*tid, thread.role))
            .collect()
    }

    /// A thread that is no more.
    pub(crate) fn forget(&self, tid: Tid) {
        lock(&self.threads).remove(&tid);
    }

    pub(crate) fn plan(&self) -> VmPlan {
        lock(&self.plan).clone()
    }

    /// The effect on `control`.
    pub(crate) fn effect(&self, control: &str) -> Option<Effect> {
        let effects = lock(&self.effects);
        effects
            .iter()
            .find(|effect| effect.control == control)
            .cloned()
    }

    /// What was told has an effect only where whoever was told schedules.
    fn doubt(&self, effect: &mut Effect) {
        let Some(why) = &self.doubt else { return };
        let told = match effect.outcome {
            Outcome::Enforced | Outcome::Approximated { .. } => "Linux",
            Outcome::Delegated { .. } => "the hypervisor",
            Outcome::Advisory { .. } | Outcome::Rejected { .. } => return,
        };
        effect.outcome = Outcome::Advisory {
            why: format!("{told} was told, and {why}"),
        };
    }

    /// Replaces the effect on the same control, or adds one. A doubt about all of them stays.
    pub(crate) fn set_effect(&self, mut effect: Effect) {
        self.doubt(&mut effect);
        let mut effects = lock(&self.effects);
        match effects.iter_mut().find(|old| old.control == effect.control) {
            Some(old) => *old = effect,
            None => effects.push(effect),
        }
    }

    fn with_linux<T>(&self, look: impl FnOnce(&mut Linux) -> T) -> Option<T> {
        lock(&self.linux).as_mut().map(look)
    }

    /// Where its vCPUs compete, if there is a lever on them.
    pub(crate) fn arena(&self) -> Option<String> {
        self.with_linux(|linux| linux.lever.map(|_| linux.arena()))
            .flatten()
    }

    /// The lever on the `index`th group of vCPUs, which these threads are in.
    pub(crate) fn lever(&self, index: usize, threads: &[Tid]) -> Option<Lever> {
        self.with_linux(|linux| match linux.lever? {
            LeverKind::GroupIdle => {
                let cpu = linux.vcpu_groups.get(index)?.cpu.as_ref()?;
                let version = cpu.hierarchy.version();
                Lever::on_group(&cpu.path, version, linux.group_weight).ok()
            }
            kind => {
                let slice_us = linux.vcpus.first().and_then(|vcpu| vcpu.slice_us);
                Some(Lever::on_threads(kind, threads, slice_us))
            }
        })
        .flatten()
    }

    fn release(&self) {
        if self.released.swap(true, Ordering::AcqRel) {
            return;
        }
        if let Some(linux) = lock(&self.linux).take() {
            linux.remove_groups();
            if let Some(home) = &linux.places.home {
                let _ = move_process(home);
                if let Some(cpu) = &linux.places.cpu {
                    // The last one out; while there are others the kernel says no.
                    let _ = fs::remove_dir(&cpu.path);
                }
            }
        }
        // Not before: inside their groups they may not be able to have what they had.
        for thread in std::mem::take(&mut *lock(&self.threads)).values() {
            if let Some(before) = &thread.before {
                before.restore();
            }
        }
    }
}

pub(super) fn settings(
    linux: &Linux,
    role: ThreadRole,
) -> Result<(&Group, &ThreadControls), AdoptError> {
    match role {
        ThreadRole::Helper => Ok((&linux.helper_group, &linux.helpers)),
        ThreadRole::Vcpu(vcpu) => match linux.vcpus.get(vcpu as usize) {
            Some(controls) => Ok((linux.vcpu_group(vcpu), controls)),
            None => Err(AdoptError::NotPlanned {
                vcpu,
                planned: linux.vcpus.len(),
            }),
        },
    }
}

pub(super) fn apply(
    tid: Tid,
    group: &Group,
    controls: &ThreadControls,
    role: ThreadRole,
) -> Result<Option<CpuSet>, AdoptError> {
    let error = |what| move |source| AdoptError::Kernel { role, what, source };
    group
        .add(tid)
        .map_err(error("move it into its control group"))?;
    let placed = controls.place(tid).map_err(error("set its CPUs"))?;
    match role {
        ThreadRole::Vcpu(_) => controls
            .classify(tid)
            .map(drop)
            .map_err(error("set its scheduling class"))?,
        // A shorter slice for helpers is a favour nobody has asked for.
        ThreadRole::Helper => drop(controls.classify(tid)),
    }
    Ok(placed)
}

/// A cookie passes from thread to thread by way of the one that asks, which would keep it: so a thread that ends is used.
pub(super) fn share_cookie(
    cookies: SmtIsolation,
    role: ThreadRole,
    first: Option<Tid>,
    tid: Tid,
) -> io::Result<()> {
    match (cookies, role, first) {
        (SmtIsolation::Off, _, _) | (_, ThreadRole::Helper, _) => Ok(()),
        (SmtIsolation::Vm, _, Some(first)) => std::thread::scope(|scope| {
            let carrier = scope.spawn(|| {
                sys::take_core_cookie(first)?;
                sys::share_core_cookie(tid)
            });
            carrier
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the carrier of a cookie panicked")))
        }),
        _ => sys::create_core_cookie(tid),
    }
}

fn name_of(role: ThreadRole) -> String {
    match role {
        ThreadRole::Vcpu(vcpu) => format!("vcpu{vcpu} cpus"),
        ThreadRole::Helper => "helpers".into(),
    }
}

/// Turns that could be taken, for a gang of which nobody will know whether they help.
fn untold(effects: &mut [Effect]) {
    let gang = effects.iter_mut().filter(|effect| {
        effect.control == "gang" && !matches!(effect.outcome, Outcome::Rejected { .. })
    });
    for effect in gang {
        effect.outcome = Outcome::Advisory {
            why: "nobody tells how far this guest gets, and so whether turns help it: they are taken only where others on these \
                  CPUs take them; gang=soft always takes them"
                .into(),
        };
    }
}

fn move_process(group: &Path) -> io::Result<()> {
    write(&group.join("cgroup.procs"), &std::process::id().to_string())
}

fn own_threads() -> Vec<Tid> {
    let Ok(entries) = fs::read_dir("/proc/self/task") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok().map(Tid))
        .collect()
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
