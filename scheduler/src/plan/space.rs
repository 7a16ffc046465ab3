//! The CPUs of a host and who has what of them, while a plan is being made.
//!
//! Demand is counted in millionths: a vCPU that may run on four CPUs is a load of a quarter on each. That is how Linux spreads
//! it, and it makes a plan feasible by construction: where no CPU's sum is over its limit, there is a schedule.

use std::borrow::Cow;

use crate::{Cpu, CpuSet, Host, Placement, Request, VmId, VmPlan, VmPolicy, policy::PROMISE_MILLI};

/// One vCPU, one CPU.
pub(super) const WHOLE: u32 = 1_000_000;

/// Who has what.
pub(super) struct Space<'a> {
    pub(super) host: &'a Host,
    /// Every CPU of the host, neighbours next to each other: by socket, node, cache, cluster, core, thread.
    pub(super) order: Vec<Cpu>,
    /// CPUs that can be used at all.
    pub(super) usable: CpuSet,
    /// CPUs somebody has for himself.
    taken: CpuSet,
    /// CPUs that are nobody's own and not isolated.
    pool: CpuSet,
    /// The same in topological order.
    pool_order: Vec<Cpu>,
    /// The VMs that are there.
    pub(super) claims: Vec<Cow<'a, VmPlan>>,
    demand: Demand,
}

/// What runs on each CPU number.
struct Demand {
    on: Vec<OnCpu>,
    /// For each overcommit limit in use, ascending, how many sets of VMs with that limit have each CPU.
    limits: Vec<(u32, Vec<u32>)>,
}

/// What runs on one CPU.
#[derive(Clone, Copy)]
struct OnCpu {
    /// vCPUs, in millionths.
    load: u32,
    /// Reserved time, in millionths of a CPU.
    reserve: u32,
    /// The least overcommit limit of those that run there, in millionths; `u32::MAX` if nobody does.
    limit: u32,
}

/// Why a load cannot go on a CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Full {
    /// More vCPUs than somebody there accepts.
    Overcommit,
    /// More reserved time than there is.
    Reserve,
}

/// What one vCPU of a request brings along.
#[derive(Clone, Copy, Debug)]
pub(super) struct Vcpu {
    /// Most vCPUs per CPU its VM accepts, in millionths.
    limit: u32,
    /// Time reserved for it, in millionths of a CPU.
    reserve: u32,
}

impl Vcpu {
    pub(super) fn of(request: &Request) -> Self {
        let reserve = u64::from(request.policy.reserve_millicpus.unwrap_or(0)) * 1000
            / u64::from(request.vcpus.max(1));
        Self {
            limit: limit(&request.policy),
            reserve: u32::try_from(reserve).unwrap_or(u32::MAX),
        }
    }
}

/// The overcommit limit of a policy, in millionths.
fn limit(policy: &VmPolicy) -> u32 {
    policy
        .overcommit_milli
        .unwrap_or(VmPolicy::OVERCOMMIT_MILLI)
        .saturating_mul(1000)
}

impl<'a> Space<'a> {
    /// A host with nobody on it.
    pub(super) fn new(host: &'a Host) -> Self {
        let mut order = host.cpus.clone();
        order.sort_unstable_by_key(|cpu| {
            (
                cpu.socket,
                cpu.node,
                cpu.llc,
                cpu.cluster,
                cpu.core,
                cpu.thread,
                cpu.id,
            )
        });
        let mut usable = host.usable();
        usable.retain(&order.iter().map(|cpu| cpu.id).collect());
        let pool = &usable - &host.isolated;
        let count = usable.highest().map_or(0, |cpu| cpu as usize + 1);
        Self {
            host,
            pool_order: order
                .iter()
                .filter(|cpu| pool.contains(cpu.id))
                .copied()
                .collect(),
            order,
            pool,
            usable,
            taken: CpuSet::new(),
            claims: Vec::new(),
            demand: Demand {
                on: vec![
                    OnCpu {
                        load: 0,
                        reserve: 0,
                        limit: u32::MAX,
                    };
                    count
                ],
                limits: Vec::new(),
            },
        }
    }

    /// CPUs that are nobody's own and not isolated.
    pub(super) fn pool(&self) -> &CpuSet {
        &self.pool
    }

    /// CPUs somebody has for himself.
    pub(super) fn taken(&self) -> &CpuSet {
        &self.taken
    }

    /// Load on `cpu`, in millionths of a vCPU.
    pub(super) fn load(&self, cpu: u32) -> u32 {
        self.demand.on[cpu as usize].load
    }

    /// Time reserved on `cpu`, in millionths.
    pub(super) fn reserve(&self, cpu: u32) -> u32 {
        self.demand.on[cpu as usize].reserve
    }

    /// The least limit of those on `cpu`, and of `vcpu`, in millionths.
    pub(super) fn limit(&self, cpu: u32, vcpu: Vcpu) -> u32 {
        self.demand.on[cpu as usize].limit.min(vcpu.limit)
    }

    /// Can a vCPU go on `cpu` that spreads over `spread` CPUs, `count` times?
    pub(super) fn accepts(
        &self,
        cpu: u32,
        vcpu: Vcpu,
        count: u32,
        spread: u32,
    ) -> Result<(), Full> {
        let part = |whole: u32| {
            u32::try_from(u64::from(whole) * u64::from(count) / u64::from(spread.max(1)))
                .unwrap_or(u32::MAX)
        };
        if self.load(cpu).saturating_add(part(WHOLE)) > self.limit(cpu, vcpu) {
            Err(Full::Overcommit)
        } else if vcpu.reserve > 0
            && self.reserve(cpu).saturating_add(part(vcpu.reserve)) > PROMISE_MILLI * 1000
        {
            Err(Full::Reserve)
        } else {
            Ok(())
        }
    }

    /// Would every CPU of `sets`, those of the vCPUs of `request`, take what they bring, all of it together?
    pub(super) fn fits<'s>(
        &mut self,
        request: &Request,
        sets: impl Iterator<Item = &'s CpuSet> + Clone,
    ) -> Result<(), (u32, Full)> {
        self.demand
            .change(request, sets.clone(), &self.usable, true);
        let mut cpus = CpuSet::new();
        sets.clone().for_each(|set| cpus.add(set));
        cpus.retain(&self.usable);
        let own = Vcpu::of(request);
        let full = cpus.iter().find_map(|cpu| {
            if self.load(cpu) > self.limit(cpu, own) {
                Some((cpu, Full::Overcommit))
            } else {
                let over = own.reserve > 0 && self.reserve(cpu) > PROMISE_MILLI * 1000;
                over.then_some((cpu, Full::Reserve))
            }
        });
        self.demand.change(request, sets, &self.usable, false);
        full.map_or(Ok(()), Err)
    }

    /// Puts `plan` on the host.
    pub(super) fn add(&mut self, plan: Cow<'a, VmPlan>) {
        self.demand.plan(&plan, &self.usable, true);
        if !plan.exclusive.is_empty() {
            self.taken.add(&plan.exclusive);
            self.pool.subtract(&plan.exclusive);
            let pool = &self.pool;
            self.pool_order.retain(|cpu| pool.contains(cpu.id));
        }
        self.claims.push(plan);
    }

    /// Takes the plan of `vm` away again.
    pub(super) fn remove(&mut self, vm: &VmId) -> Option<Cow<'a, VmPlan>> {
        let index = self.position(vm)?;
        let plan = self.claims.remove(index);
        self.forget(&plan);
        Some(plan)
    }

    /// Puts `plan` in the place of the one that is there for the same VM.
    pub(super) fn replace(&mut self, index: usize, plan: VmPlan) {
        self.demand.plan(&plan, &self.usable, true);
        self.claims[index] = Cow::Owned(plan);
    }

    /// Takes the demand of claim `index` away, which is about to be replaced.
    pub(super) fn lift(&mut self, index: usize) {
        self.demand.plan(&self.claims[index], &self.usable, false);
    }

    fn position(&self, vm: &VmId) -> Option<usize> {
        self.claims.iter().position(|claim| claim.request.vm == *vm)
    }

    fn forget(&mut self, plan: &VmPlan) {
        self.demand.plan(plan, &self.usable, false);
        if !plan.exclusive.is_empty() {
            self.taken = CpuSet::new();
            for claim in &self.claims {
                self.taken.add(&claim.exclusive);
            }
            self.pool = &(&self.usable - &self.host.isolated) - &self.taken;
            let pool = &self.pool;
            let order = self.order.iter().filter(|cpu| pool.contains(cpu.id));
            self.pool_order = order.copied().collect();
        }
    }

    /// The CPUs of `cpus` in topological order.
    pub(super) fn ordered(&self, cpus: &CpuSet) -> Cow<'_, [Cpu]> {
        if *cpus == self.pool {
            return Cow::Borrowed(&self.pool_order);
        }
        let order = self.order.iter().filter(|cpu| cpus.contains(cpu.id));
        Cow::Owned(order.copied().collect())
    }

    /// The first VM that `matches`.
    pub(super) fn whose(&self, matches: impl Fn(&VmPlan) -> bool) -> Option<&VmId> {
        let claim = self.claims.iter().find(|claim| matches(claim))?;
        Some(&claim.request.vm)
    }

    /// The VM on one of `cpus` whose overcommit limit is the least, if it is less than that of `vcpu`.
    pub(super) fn strictest(&self, cpus: &CpuSet, vcpu: Vcpu) -> Option<&VmId> {
        self.claims
            .iter()
            .filter(|claim| claim.exclusive.is_empty())
            .filter(|claim| limit(&claim.request.policy) < vcpu.limit)
            .filter(|claim| claim.vcpus.iter().any(|vcpu| !vcpu.cpus.is_disjoint(cpus)))
            .min_by_key(|claim| limit(&claim.request.policy))
            .map(|claim| &claim.request.vm)
    }

    /// CPUs that cannot become anybody's own, because a VM names them: in its map, or for its helpers.
    pub(super) fn named(&self) -> CpuSet {
        let mut named = CpuSet::new();
        for claim in &self.claims {
            if let Placement::Map(map) = &claim.request.policy.placement {
                map.iter().for_each(|(_, cpus)| named.add(cpus));
            }
            if let crate::Helpers::Set(cpus) = &claim.request.policy.helpers {
                named.add(cpus);
            }
        }
        named
    }
}

impl Demand {
    /// Adds what `plan` brings, or takes it away. Nobody else is on exclusive CPUs: there is nothing to share and nothing to
    /// exceed there.
    fn plan(&mut self, plan: &VmPlan, usable: &CpuSet, add: bool) {
        if plan.exclusive.is_empty() {
            let sets = plan.vcpus.iter().map(|vcpu| &vcpu.cpus);
            self.change(&plan.request, sets, usable, add);
        }
    }

    fn change<'s>(
        &mut self,
        request: &Request,
        sets: impl Iterator<Item = &'s CpuSet>,
        usable: &CpuSet,
        add: bool,
    ) {
        let vcpu = Vcpu::of(request);
        let at = match self
            .limits
            .binary_search_by_key(&vcpu.limit, |(limit, _)| *limit)
        {
            Ok(at) => at,
            Err(at) => {
                let on = vec![0; self.on.len()];
                self.limits.insert(at, (vcpu.limit, on));
                at
            }
        };
        let mut sets = sets.peekable();
        while let Some(set) = sets.next() {
            // vCPUs with one set are counted together, or rounding would count them differently from `accepts`.
            let mut same = 1u64;
            while sets.next_if(|next| *next == set).is_some() {
                same += 1;
            }
            let cpus = if set.is_subset(usable) {
                Cow::Borrowed(set)
            } else {
                Cow::Owned(set & usable)
            };
            let spread = u64::from(cpus.len().max(1));
            let part =
                |whole: u32| u32::try_from(u64::from(whole) * same / spread).unwrap_or(u32::MAX);
            let (load, reserve) = (part(WHOLE), part(vcpu.reserve));
            if add {
                let counts = &mut self.limits[at].1;
                for cpu in cpus.iter() {
                    let cpu = cpu as usize;
                    let on = &mut self.on[cpu];
                    on.load = on.load.saturating_add(load);
                    on.reserve = on.reserve.saturating_add(reserve);
                    on.limit = on.limit.min(vcpu.limit);
                    counts[cpu] += 1;
                }
            } else {
                for cpu in cpus.iter() {
                    let cpu = cpu as usize;
                    let on = &mut self.on[cpu];
                    on.load = on.load.saturating_sub(load);
                    on.reserve = on.reserve.saturating_sub(reserve);
                    let count = &mut self.limits[at].1[cpu];
                    *count = count.saturating_sub(1);
                    if *count == 0 && on.limit == vcpu.limit {
                        let next = self.limits[at..].iter().find(|(_, counts)| counts[cpu] > 0);
                        on.limit = next.map_or(u32::MAX, |(limit, _)| *limit);
                    }
                }
            }
        }
    }
}
