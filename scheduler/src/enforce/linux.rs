//! Where Linux schedules: from a plan to groups, affinities, classes and cookies, each tried before a guest depends on it.
//!
//! What concerns all vCPUs together (weight, cap, `cpu.idle`) is told to a group, what concerns one (its CPUs, its slice) to its
//! thread. Thread controls are rehearsed on a thread that lives for that alone, so that what the kernel refuses is known before
//! anything starts.

use std::{io, path::PathBuf};

use super::{
    Effect, Outcome,
    cgroup::{self, Group, Places, read_cpus, write},
    cgroup2,
    threads::{Class, ThreadControls},
    words,
};
use crate::{
    CpuSet, Gang, Host, Owner, Slice, SmtIsolation, VmPlan, VmPolicy, gang::lever::LeverKind,
};

/// Groups and controls of one VM.
pub(super) struct Linux {
    pub(super) places: Places,
    /// One for all vCPUs, or one for each where they take turns one by one.
    pub(super) vcpu_groups: Vec<Group>,
    pub(super) helper_group: Group,
    /// By vCPU number.
    pub(super) vcpus: Vec<ThreadControls>,
    pub(super) helpers: ThreadControls,
    /// Which threads share a core-scheduling cookie.
    pub(super) cookies: SmtIsolation,
    /// How the VM is held back when it is not its turn.
    pub(super) lever: Option<LeverKind>,
    /// Weight of each vCPU group: its part of the VM's.
    pub(super) group_weight: u32,
    /// The directory whose cpuset limits this VM from above.
    pub(super) cpuset_place: Option<PathBuf>,
    /// Groups of processes that are gone, removed on the way.
    pub(super) reaped: Vec<String>,
}

impl Linux {
    /// Makes groups and finds out what the kernel takes. Whatever fails leaves an effect that says so; what was made goes with
    /// the result. `note_groups` is told which groups are about to be made.
    pub(super) fn prepare(
        host: &Host,
        plan: &VmPlan,
        places: Places,
        owner: &Owner,
        note_groups: &dyn Fn(Vec<PathBuf>),
    ) -> (Self, Vec<Effect>) {
        let mut linux = Self {
            reaped: places
                .directories()
                .into_iter()
                .flat_map(cgroup::reap)
                .collect(),
            cpuset_place: places.limits(),
            places,
            vcpu_groups: Vec::new(),
            helper_group: Group::default(),
            vcpus: Vec::new(),
            helpers: ThreadControls::default(),
            cookies: SmtIsolation::Off,
            lever: None,
            group_weight: VmPolicy::WEIGHT,
        };
        linux.make_groups(plan, owner, note_groups);
        let effects = linux.tell(host, plan);
        (linux, effects)
    }

    /// Makes another plan of the same VM so, which has other vCPUs. Nothing may move threads or levers meanwhile. What fails leaves
    /// an effect that says so; the plan before can be made so again.
    pub(super) fn resize(
        &mut self,
        host: &Host,
        plan: &VmPlan,
        owner: &Owner,
        note_groups: &dyn Fn(Vec<PathBuf>),
    ) -> Vec<Effect> {
        let regrouped = self.regroup(plan, owner, note_groups);
        self.lever = None;
        self.group_weight = VmPolicy::WEIGHT;
        self.cookies = SmtIsolation::Off;
        let mut effects = self.tell(host, plan);
        if let Err(error) = regrouped {
            effects.push(Effect {
                control: "groups".into(),
                requested: words::placement(plan),
                outcome: Outcome::Rejected {
                    why: format!("control groups for these vCPUs cannot be had: {error}"),
                },
            });
        }
        effects
    }

    /// Has as many groups as the plan needs, with its CPUs.
    fn regroup(
        &mut self,
        plan: &VmPlan,
        owner: &Owner,
        note: &dyn Fn(Vec<PathBuf>),
    ) -> io::Result<()> {
        if plan.request.policy.rotate_us.is_some() {
            let wanted = plan.vcpus.len();
            note(self.group_paths(plan, owner));
            for group in self.vcpu_groups.drain(wanted.min(self.vcpu_groups.len())..) {
                group.remove();
            }
            for vcpu in self.vcpu_groups.len()..wanted {
                let part = cgroup::name(&plan.request.vm, owner, &format!("vcpu{vcpu}"));
                self.vcpu_groups.push(self.places.create(&part)?);
            }
        }
        self.fill_cpusets(plan)
    }

    /// What each thread is to be told.
    fn set_controls(&mut self, plan: &VmPlan) {
        let policy = &plan.request.policy;
        self.helpers = ThreadControls {
            cpus: some(&plan.helpers),
            ..ThreadControls::default()
        };
        let class = match (policy.deadline, policy.rt) {
            (Some(deadline), _) => Class::Deadline(deadline),
            (None, Some(priority)) => Class::Fifo(priority),
            (None, None) => Class::Fair,
        };
        self.vcpus = plan
            .vcpus
            .iter()
            .map(|vcpu| ThreadControls {
                cpus: some(&vcpu.cpus),
                class,
                slice_us: policy.slice.and_then(Slice::micros),
                nice: None,
            })
            .collect();
        if matches!(class, Class::Deadline(_)) {
            self.part(plan);
        }
        if !all_cpus(plan).is_disjoint(&plan.helpers) && class == Class::Fair {
            // Where they share CPUs with vCPUs, the threads that serve the guest go first when they wake.
            self.helpers.slice_us = Slice::Latency.micros();
            // A vCPU's thread is started by one of them, and has what that has: 0 is the kernel's own slice.
            for vcpu in &mut self.vcpus {
                vcpu.slice_us.get_or_insert(0);
            }
        }
    }

    /// Tells groups, and rehearses what threads will be told.
    fn tell(&mut self, host: &Host, plan: &VmPlan) -> Vec<Effect> {
        self.set_controls(plan);
        let policy = &plan.request.policy;
        let all = all_cpus(plan);
        let mut effects = Vec::new();
        let mut note = |control: &str, requested: String, outcome| {
            effects.push(Effect {
                control: control.into(),
                requested,
                outcome,
            });
        };
        note(
            "placement",
            words::placement(plan),
            self.try_placement(plan),
        );
        note(
            "helpers",
            format!("CPUs {}", plan.helpers),
            self.try_helpers(plan),
        );
        if let Some(weight) = policy.weight {
            note("weight", weight.to_string(), self.try_weight(host, weight));
        } else if policy.rotate_us.is_some()
            && self.vcpu_groups.iter().all(|group| group.cpu.is_some())
            && !host.abilities.sched_ext_active.yes
        {
            // Each of its groups has the weight of a VM to begin with.
            let outcome = self.try_weight(host, VmPolicy::WEIGHT);
            if outcome != Outcome::Enforced {
                note(
                    "weight",
                    format!("{}, as nothing is said", VmPolicy::WEIGHT),
                    outcome,
                );
            }
        }
        if let Some(cap) = policy.cap {
            let mut requested = words::cap(&cap);
            let blackout = words::blackout_us(&cap, plan.request.vcpus);
            if blackout > 0 {
                requested += &format!("; stands still for up to {}", words::micros(blackout));
            }
            note("cap", requested, self.try_cap(&cap));
        }
        if let Some(millicpus) = policy.reserve_millicpus {
            let requested = words::millicpus(millicpus);
            note("reserve", requested.clone(), Outcome::Approximated {
                requested,
                effective: "kept free of other VMs on admission".into(),
                why: "Linux reserves nothing in its fair class: what is no VM of Rota is held off by weight alone".into(),
            });
        }
        if let Some(slice) = policy.slice.filter(|slice| *slice != Slice::Default) {
            note("slice", words::slice(slice), self.try_slice(host, slice));
        }
        if let Some(priority) = policy.rt {
            let outcome = self.try_class(&all, &plan.helpers);
            note("rt", format!("priority {priority}"), outcome);
        }
        if let Some(deadline) = policy.deadline {
            let outcome = self.try_class(&all, &plan.helpers);
            note("deadline", words::deadline(&deadline), outcome);
        }
        if let Some(requested) = words::smt(policy.smt) {
            note("smt", requested, self.try_smt(host, plan));
        }
        if let Some(us) = policy.rotate_us {
            let requested = format!("turns of {}", words::micros(us.into()));
            note("rotate", requested, self.try_lever(host, us));
        }
        if let Some(requested) = words::gang(policy.gang) {
            let (Gang::Soft { quantum_us } | Gang::Adaptive { quantum_us }) = policy.gang else {
                unreachable!("no words for no gang");
            };
            note("gang", requested, self.try_lever(host, quantum_us));
        }
        effects
    }

    /// The group of vCPU `vcpu`.
    pub(super) fn vcpu_group(&self, vcpu: u32) -> &Group {
        match self.vcpu_groups.as_slice() {
            [one] => one,
            each => &each[vcpu as usize % each.len()],
        }
    }

    /// Makes CPUs that are the VM's own a root domain of their own, where the kernel lets us: there it counts deadlines apart. Whether
    /// it did shows when a deadline is tried.
    fn part(&self, plan: &VmPlan) {
        let own = plan.vcpus.iter().all(|vcpu| vcpu.exclusive);
        for cpuset in self
            .vcpu_groups
            .iter()
            .filter_map(|group| group.cpuset.as_ref())
        {
            if own && cpuset.hierarchy.version() == 2 {
                let _ = write(&cpuset.path.join("cpuset.cpus.partition"), "root");
            }
        }
    }

    /// CPUs of a partition of its own.
    pub(super) fn partition(&self) -> CpuSet {
        let cpusets = self
            .vcpu_groups
            .iter()
            .filter_map(|group| group.cpuset.as_ref());
        let parted = cpusets.filter(|cpuset| {
            cpuset.hierarchy.version() == 2
                && cgroup::read(&cpuset.path.join("cpuset.cpus.partition"))
                    .is_ok_and(|kind| kind == "root" || kind == "isolated")
        });
        parted
            .filter_map(|cpuset| {
                read_cpus(&cpuset.path.join(cpuset.hierarchy.effective_cpus())).ok()
            })
            .fold(CpuSet::new(), |all, cpus| &all | &cpus)
    }

    /// The directories of groups with cpusets of their own.
    pub(super) fn cpuset_groups(&self) -> Vec<PathBuf> {
        self.vcpu_groups
            .iter()
            .chain([&self.helper_group])
            .filter_map(|group| Some(group.cpuset.as_ref()?.path.clone()))
            .collect()
    }

    /// Gives vCPUs (by number; those beyond the first plan are new) and helpers other CPUs, and their groups with them. Was a group
    /// otherwise than it should be, though nothing else has changed?
    pub(super) fn confine(&mut self, vcpus: Vec<CpuSet>, helpers: &CpuSet) -> bool {
        let same = self.helpers.cpus == some(helpers)
            && self.vcpus.len() == vcpus.len()
            && self
                .vcpus
                .iter()
                .zip(&vcpus)
                .all(|(controls, cpus)| controls.cpus == some(cpus));
        let template = self.vcpus.first().cloned().unwrap_or_default();
        self.vcpus.resize(vcpus.len(), template);
        let each = self.vcpu_groups.len() > 1;
        let mut groups = vec![CpuSet::new(); self.vcpu_groups.len().max(1)];
        for (index, (controls, cpus)) in self.vcpus.iter_mut().zip(vcpus).enumerate() {
            let group = if each { index % groups.len() } else { 0 };
            groups[group].add(&cpus);
            controls.cpus = some(&cpus);
        }
        self.helpers.cpus = some(helpers);
        let mut wrong = false;
        let all = self
            .vcpu_groups
            .iter()
            .zip(&groups)
            .chain([(&self.helper_group, helpers)]);
        for (group, cpus) in all {
            if let Some(cpuset) = &group.cpuset {
                let effective = read_cpus(&cpuset.path.join(cpuset.hierarchy.effective_cpus()));
                if effective.is_ok_and(|is| is != *cpus) {
                    wrong = true;
                    // What cannot be had will be looked at again.
                    let _ = confine(group, cpus);
                }
            }
        }
        wrong && same
    }

    /// Removes all groups.
    pub(super) fn remove_groups(&self) {
        for group in self.vcpu_groups.iter().chain([&self.helper_group]) {
            group.remove();
        }
        for place in self.places.directories() {
            if place.hierarchy.version() == 2 && self.places.home.is_none() {
                cgroup2::take_back(&place.path, &["cpu", "cpuset"]);
            }
        }
    }

    /// Without groups everything is told to threads.
    fn make_groups(&mut self, plan: &VmPlan, owner: &Owner, note: &dyn Fn(Vec<PathBuf>)) {
        // In version 1 a group's parent cannot shrink below it: for shared CPUs affinity does, and stands in nobody's way.
        let exclusive = plan.vcpus.iter().any(|vcpu| vcpu.exclusive);
        if !exclusive
            && let Some(cpuset) = &self.places.cpuset
            && cpuset.hierarchy.version() == 1
        {
            self.places.cpuset = None;
        }
        if (plan.request.policy.rt.is_some() || plan.request.policy.deadline.is_some())
            && let Some(cpu) = &self.places.cpu
            && cpu.path.join("cpu.rt_runtime_us").exists()
        {
            self.places.cpu = None;
            let why = "a new group of version 1 has no real-time budget on this kernel";
            self.places.notes.push(why.into());
        }
        note(self.group_paths(plan, owner));
        let vm = &plan.request.vm;
        let made = parts(plan)
            .iter()
            .try_for_each(|part| {
                let group = self.places.create(&cgroup::name(vm, owner, part))?;
                self.vcpu_groups.push(group);
                Ok(())
            })
            .and_then(|()| {
                self.helper_group = self.places.create(&cgroup::name(vm, owner, "helpers"))?;
                Ok(())
            })
            .and_then(|()| self.fill_cpusets(plan));
        if let Err(error) = made {
            let error: io::Error = error;
            self.remove_groups();
            self.helper_group = Group::default();
            self.vcpu_groups = vec![Group::default()];
            self.places = Places {
                home: self.places.home.take(),
                own_cpuset: self.places.own_cpuset.take(),
                notes: vec![format!("no control groups can be made: {error}")],
                ..Places::default()
            };
        }
    }

    /// The directories of the groups that the plan needs.
    fn group_paths(&self, plan: &VmPlan, owner: &Owner) -> Vec<PathBuf> {
        let places = self.places.directories();
        parts(plan)
            .iter()
            .map(String::as_str)
            .chain(["helpers"])
            .map(|part| cgroup::name(&plan.request.vm, owner, part))
            .flat_map(|name| places.iter().map(move |place| place.path.join(&name)))
            .collect()
    }

    fn fill_cpusets(&self, plan: &VmPlan) -> io::Result<()> {
        let each = self.vcpu_groups.len() > 1;
        for (index, group) in self.vcpu_groups.iter().enumerate() {
            let cpus = plan
                .vcpus
                .iter()
                .enumerate()
                .filter(|(vcpu, _)| !each || *vcpu == index)
                .fold(CpuSet::new(), |all, (_, vcpu)| &all | &vcpu.cpus);
            confine(group, &cpus)?;
        }
        confine(&self.helper_group, &plan.helpers)
    }

    /// Where the vCPUs compete: gangs take turns only with those that compete there too.
    pub(super) fn arena(&self) -> String {
        if let Some(place) = &self.places.cpu {
            return place.path.display().to_string();
        }
        // Without groups of their own, the threads of a session are one group to the scheduler.
        let session = std::fs::read_to_string("/proc/self/autogroup").unwrap_or_default();
        let group = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let session = session.split_whitespace().next().unwrap_or_default();
        format!("{session} {}", group.lines().last().unwrap_or_default())
    }
}

/// The CPUs of all vCPUs.
fn all_cpus(plan: &VmPlan) -> CpuSet {
    plan.vcpus
        .iter()
        .fold(CpuSet::new(), |all, vcpu| &all | &vcpu.cpus)
}

/// What the vCPUs' groups are called: there is one for each where they take turns one by one.
fn parts(plan: &VmPlan) -> Vec<String> {
    match plan.request.policy.rotate_us {
        None => vec!["vcpu".into()],
        Some(_) => (0..plan.vcpus.len())
            .map(|vcpu| format!("vcpu{vcpu}"))
            .collect(),
    }
}

/// An empty set is no request.
fn some(cpus: &CpuSet) -> Option<CpuSet> {
    (!cpus.is_empty()).then(|| cpus.clone())
}

fn confine(group: &Group, cpus: &CpuSet) -> io::Result<()> {
    if let Some(cpuset) = &group.cpuset
        && !cpus.is_empty()
    {
        cpuset.hierarchy.set_cpus(&cpuset.path, cpus)?;
    }
    Ok(())
}
