//! Random hosts and requests, and what must hold for every plan made of them: the same for the quick run in the tests and the
//! long one in `examples/plan`.

use scheduler::{
    Cap, Constraint, Cores, CpuSet, Deadline, Gang, Helpers, Host, HostSpec, LedgerEntry,
    LedgerState, Owner, Placement, Plan, Request, SchedMode, Slice, SmtIsolation, VmId, VmPlan,
    VmPolicy, plan,
};

/// SplitMix64: a seed gives the same scenario everywhere.
pub(crate) struct Random(pub u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number from `low` to `high`.
    pub(crate) fn within(&mut self, low: u32, high: u32) -> u32 {
        low + (self.next() % u64::from(high - low + 1)) as u32
    }

    /// True in one of `n` cases.
    pub(crate) fn one_in(&mut self, n: u32) -> bool {
        self.within(1, n) == 1
    }

    fn some<T>(&mut self, n: u32, value: impl FnOnce(&mut Self) -> T) -> Option<T> {
        self.one_in(n).then(|| value(self))
    }

    fn cpus(&mut self, below: u32) -> CpuSet {
        (0..self.within(1, 4))
            .map(|_| self.within(0, below))
            .collect()
    }
}

/// A machine of any shape, some of it offline, out of bounds or isolated.
pub(crate) fn host(random: &mut Random) -> Host {
    let spec = HostSpec {
        sockets: random.within(1, 2),
        nodes: random.within(1, 2),
        llcs: random.within(1, 2),
        cores: random.within(1, 6),
        smt: if random.one_in(3) { 1 } else { 2 },
        adjacent: random.one_in(2),
        node_mib: u64::from(random.within(1, 32)) * 1024,
    };
    let mut host = spec.build();
    let count = host.cpus.len() as u32;
    if random.one_in(4) {
        for cpu in &random.cpus(count - 1) {
            host.online.remove(cpu);
        }
    }
    if random.one_in(4) {
        for cpu in &random.cpus(count - 1) {
            host.allowed.remove(cpu);
        }
    }
    if random.one_in(3) {
        host.isolated = random.cpus(count - 1);
    }
    if random.one_in(8) {
        host.mode = SchedMode::Core;
    }
    if random.one_in(4) {
        host.abilities.partitions = scheduler::Ability::no("made up");
    }
    host
}

/// A wish of any kind; most are sound, not all.
pub(crate) fn policy(random: &mut Random, cpus: u32, vcpus: u32) -> VmPolicy {
    let placement = match random.within(0, 11) {
        0..=3 => Placement::Shared,
        4 => Placement::Dedicated { cores: Cores::Any },
        5 => Placement::Dedicated {
            cores: Cores::Whole,
        },
        6 => Placement::Dedicated { cores: Cores::One },
        7 => Placement::Spread,
        8 => Placement::Pack,
        9 | 10 => Placement::NumaLocal {
            require: random.one_in(2),
            node: random.some(4, |random| random.within(0, 4)),
        },
        _ => Placement::Map(
            (0..vcpus)
                .filter_map(|vcpu| random.some(2, |random| (vcpu, random.cpus(cpus))))
                .collect(),
        ),
    };
    VmPolicy {
        placement,
        weight: random.some(4, |random| random.within(0, 10_100)),
        cap: random.some(6, |random| Cap {
            quota_us: u64::from(random.within(1, 200) * 500),
            period_us: u64::from(random.within(1, 100) * 1000),
            burst_us: u64::from(random.within(0, 2) * 1000),
        }),
        reserve_millicpus: random.some(4, |random| random.within(1, 1000 * vcpus)),
        slice: random.some(6, |random| match random.within(0, 3) {
            0 => Slice::Latency,
            1 => Slice::Default,
            2 => Slice::Throughput,
            _ => Slice::Micros(random.within(50, 120_000)),
        }),
        rotate_us: random.some(12, |random| random.within(500, 100_000)),
        gang: match random.within(0, 7) {
            0 => Gang::Soft { quantum_us: 20_000 },
            1 => Gang::Adaptive {
                quantum_us: random.within(500, 100_000),
            },
            _ => Gang::Off,
        },
        deadline: random.some(12, |random| {
            let period_us = u64::from(random.within(1, 50)) * 1000;
            Deadline {
                runtime_us: u64::from(random.within(1, 1000)) * period_us / 1000,
                deadline_us: period_us,
                period_us,
            }
        }),
        rt: random.some(10, |random| random.within(0, 100) as u8),
        smt: match random.within(0, 5) {
            0 => SmtIsolation::Vm,
            1 => SmtIsolation::Vcpu,
            _ => SmtIsolation::Off,
        },
        helpers: match random.within(0, 9) {
            0 => Helpers::Set(random.cpus(cpus)),
            _ => Helpers::Auto,
        },
        strict: random.one_in(6),
        overcommit_milli: random.some(4, |random| random.within(9, 80) * 100),
    }
}

/// A VM of any kind.
pub(crate) fn request(random: &mut Random, name: &str, cpus: u32) -> Request {
    let threads_per_core = if random.one_in(4) { 2 } else { 1 };
    let most = if random.one_in(8) { cpus + 2 } else { 6 };
    let vcpus = threads_per_core * random.within(1, most);
    Request {
        vm: VmId::from(name),
        vcpus,
        threads_per_core,
        memory_mib: u64::from(random.within(1, 16)) * 512,
        policy: policy(random, cpus, vcpus),
    }
}

/// What a run of scenarios came to.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) plans: u64,
    pub(crate) refusals: u64,
    pub(crate) with_nearest: u64,
    pub(crate) violations: Vec<String>,
}

/// VMs come and go on one host; after every step everything that must hold is looked at.
pub(crate) fn run(seed: u64, tally: &mut Tally) {
    let mut random = Random(seed);
    let host = host(&mut random);
    let cpus = host.cpus.len() as u32;
    let mut ledger = LedgerState::default();
    let steps = random.within(2, 10);
    for step in 0..steps {
        let name = format!("vm{step}");
        let batch: Vec<Request> = if random.one_in(8) {
            (0..3)
                .map(|index| request(&mut random, &format!("{name}.{index}"), cpus))
                .collect()
        } else {
            vec![request(&mut random, &name, cpus)]
        };
        let mut complain = |what: &str| {
            tally
                .violations
                .push(format!("seed {seed} step {step}: {what}"));
        };
        let result = plan(&host, &ledger, &batch);
        if result != plan(&host, &ledger, &batch) {
            complain("two answers to one question");
        }
        match result {
            Ok(plan) => {
                tally.plans += 1;
                enter(&mut ledger, &plan);
                check(&host, &ledger, &mut complain);
                let json = serde_json::to_string(&plan).expect("writes");
                if serde_json::from_str::<Plan>(&json).ok().as_ref() != Some(&plan) {
                    complain("JSON does not read back");
                }
            }
            Err(rejection) => {
                tally.refusals += 1;
                if rejection.reasons.is_empty() {
                    complain("refused without a reason");
                }
                if let Some(nearest) = rejection.nearest {
                    tally.with_nearest += 1;
                    let retry: Vec<Request> = batch
                        .iter()
                        .map(|asked| match asked.vm == nearest.request.vm {
                            true => nearest.request.clone(),
                            false => asked.clone(),
                        })
                        .collect();
                    if plan(&host, &ledger, &retry).is_err() {
                        complain("the nearest request is refused");
                    }
                    if nearest.sched.parse::<VmPolicy>().as_ref() != Ok(&nearest.request.policy) {
                        complain(&format!("{} does not read back", nearest.sched));
                    }
                } else if batch.len() == 1
                    && !hopeless(&host, &ledger, rejection.reasons[0].constraint)
                {
                    complain(&format!(
                        "nothing nearest to {} {:?}",
                        batch[0].policy, rejection.reasons
                    ));
                }
            }
        }
        if random.one_in(4) && !ledger.entries.is_empty() {
            let gone = random.within(0, ledger.entries.len() as u32 - 1) as usize;
            ledger.entries.remove(gone);
            check(&host, &ledger, &mut complain);
        }
        again(&host, &mut ledger, &mut complain);
    }
    shaken(&mut random, &host, &ledger, &mut |what| {
        tally
            .violations
            .push(format!("seed {seed} on a changed host: {what}"));
    });
    // Whoever goes, the others can stay.
    for gone in 0..ledger.entries.len() {
        let mut rest = ledger.clone();
        let name = rest.entries.remove(gone).plan.request.vm;
        for entry in rest.entries.clone() {
            if let Err(why) = plan(&host, &rest, &[entry.plan.request]) {
                tally
                    .violations
                    .push(format!("seed {seed}: without {name}: {:?}", why.reasons));
            }
        }
    }
}

/// CPUs go away, become isolated or come back: what can be planned then holds too, and keeps whom it can.
fn shaken(random: &mut Random, host: &Host, ledger: &LedgerState, complain: &mut impl FnMut(&str)) {
    let mut changed = host.clone();
    let cpu = random.within(0, host.cpus.len() as u32 - 1);
    match random.within(0, 3) {
        0 => changed.allowed.remove(cpu),
        1 => changed.isolated.insert(cpu),
        2 => changed.isolated.remove(cpu),
        _ => changed.online.remove(cpu),
    };
    let requests: Vec<Request> = ledger
        .entries
        .iter()
        .map(|entry| entry.plan.request.clone())
        .collect();
    if let Ok(settled) = plan(&changed, ledger, &requests) {
        let mut after = ledger.clone();
        enter(&mut after, &settled);
        check(&changed, &after, complain);
        for (before, after) in ledger.entries.iter().zip(&after.entries) {
            let (before, after) = (&before.plan, &after.plan);
            if before.exclusive.is_empty() || after.exclusive.is_empty() {
                continue;
            }
            let lost = &before.exclusive - &changed.usable();
            let cores =
                before.request.policy.placement != Placement::Dedicated { cores: Cores::Any };
            let moved = before
                .vcpus
                .iter()
                .zip(&after.vcpus)
                .filter(|(before, after)| before.cpus != after.cpus)
                .count() as u32;
            // A lost thread takes its core with it.
            let most = if cores { lost.len() * 2 } else { lost.len() };
            if moved > most && before.request.policy.deadline.is_none() {
                complain(&format!(
                    "{} lost {lost} and {moved} vCPUs moved",
                    before.request.vm
                ));
            }
        }
    }
    for request in requests {
        // Any answer will do, but for a panic.
        let _ = plan(&changed, ledger, &[request]);
    }
}

/// Is there nothing to offer? Another VM of that name, or not even room for one vCPU.
fn hopeless(host: &Host, ledger: &LedgerState, constraint: Constraint) -> bool {
    let refused = |placement, overcommit_milli| {
        let request = Request {
            vm: VmId::from("the least"),
            vcpus: 1,
            threads_per_core: 1,
            memory_mib: 1,
            policy: VmPolicy {
                placement,
                overcommit_milli,
                ..VmPolicy::default()
            },
        };
        plan(host, ledger, &[request]).is_err()
    };
    constraint == Constraint::Name
        || (refused(Placement::Shared, Some(100_000))
            && refused(Placement::Dedicated { cores: Cores::Any }, None))
}

/// Planning again what is there: accepted, and once it has been done nothing changes any more.
fn again(host: &Host, ledger: &mut LedgerState, complain: &mut impl FnMut(&str)) {
    let requests: Vec<Request> = ledger
        .entries
        .iter()
        .map(|entry| entry.plan.request.clone())
        .collect();
    match plan(host, ledger, &requests) {
        Ok(settled) => {
            if !settled.adjusted.is_empty() {
                complain("planning everything again adjusts somebody else");
            }
            enter(ledger, &settled);
            check(host, ledger, complain);
            for request in &requests {
                match plan(host, ledger, std::slice::from_ref(request)) {
                    Ok(one) => {
                        if ledger.entry(&request.vm).map(|entry| &entry.plan) != one.vms.first()
                            || !one.adjusted.is_empty()
                        {
                            complain(&format!(
                                "planning {} again changes it: {:?} then {:?}",
                                request.vm,
                                ledger.entry(&request.vm),
                                one
                            ));
                        }
                    }
                    Err(why) => complain(&format!(
                        "{} is refused where it is: {:?}",
                        request.vm, why.reasons
                    )),
                }
            }
            if plan(host, ledger, &requests).as_ref() != Ok(&settled) {
                complain("planning everything again is not the same");
            }
        }
        Err(why) => complain(&format!("what is there is refused: {:?}", why.reasons)),
    }
}

/// Writes a plan into the ledger as the processes would.
pub(crate) fn enter(ledger: &mut LedgerState, plan: &Plan) {
    for vm in plan.vms.iter().chain(&plan.adjusted) {
        match ledger
            .entries
            .iter_mut()
            .find(|entry| entry.plan.request.vm == vm.request.vm)
        {
            Some(entry) => entry.plan = vm.clone(),
            None => ledger.entries.push(LedgerEntry {
                rotation: None,
                groups: Vec::new(),
                owner: Owner::default(),
                plan: vm.clone(),
            }),
        }
    }
}

/// Everything that must hold on a host, computed in another way than the planner does.
pub(crate) fn check(host: &Host, ledger: &LedgerState, complain: &mut impl FnMut(&str)) {
    let plans: Vec<&VmPlan> = ledger.entries.iter().map(|entry| &entry.plan).collect();
    let usable = host.usable();
    let mut load = vec![0.0; CpuSet::LIMIT as usize];
    let mut reserve = vec![0.0; CpuSet::LIMIT as usize];
    for vm in &plans {
        let name = &vm.request.vm;
        for other in plans.iter().filter(|other| other.request.vm != *name) {
            let shared = other
                .vcpus
                .iter()
                .any(|vcpu| !vcpu.cpus.is_disjoint(&vm.exclusive));
            if shared
                || !other.exclusive.is_disjoint(&vm.exclusive)
                || !other.helpers.is_disjoint(&vm.exclusive)
            {
                complain(&format!("{} is on CPUs of {name} alone", other.request.vm));
            }
        }
        if vm.vcpus.len() as u32 != vm.request.vcpus {
            complain(&format!("{name} has {} vCPUs", vm.vcpus.len()));
        }
        if vm.helpers.is_empty() || !vm.helpers.is_subset(&usable) {
            complain(&format!("helpers of {name} on {}", vm.helpers));
        }
        for (at, vcpu) in vm.vcpus.iter().enumerate() {
            if vcpu.cpus.is_empty() || !vcpu.cpus.is_subset(&usable) {
                complain(&format!("{name} vCPU {at} on {}", vcpu.cpus));
            }
            if vcpu.why.is_empty() {
                complain("a set without a reason");
            }
            let named = vm.request.policy.placement.names(vcpu.vcpu);
            if vm.exclusive.is_empty() && !named && !vcpu.cpus.is_disjoint(&host.isolated) {
                complain(&format!("{name} shares isolated CPUs"));
            }
            if vm.exclusive.is_empty() {
                for cpu in &vcpu.cpus {
                    let spread = f64::from(vcpu.cpus.len());
                    load[cpu as usize] += 1.0 / spread;
                    let part = f64::from(vm.request.policy.reserve_millicpus.unwrap_or(0));
                    reserve[cpu as usize] += part / f64::from(vm.request.vcpus) / spread;
                }
            }
        }
        apart(host, vm, complain);
        cores(host, vm, complain);
    }
    for vm in plans.iter().filter(|vm| vm.exclusive.is_empty()) {
        let limit = vm
            .request
            .policy
            .overcommit_milli
            .unwrap_or(VmPolicy::OVERCOMMIT_MILLI);
        for cpu in vm.vcpus.iter().flat_map(|vcpu| &vcpu.cpus) {
            if load[cpu as usize] > f64::from(limit) / 1000.0 + 0.001 {
                complain(&format!(
                    "{} accepts {limit} and CPU {cpu} has {}",
                    vm.request.vm, load[cpu as usize]
                ));
            }
            if reserve[cpu as usize] > 950.5 {
                complain(&format!(
                    "CPU {cpu} has {}m reserved",
                    reserve[cpu as usize]
                ));
            }
        }
    }
    let deadlines: u64 = plans
        .iter()
        .filter(|vm| vm.exclusive.is_empty() && vm.mode != SchedMode::Core)
        .filter_map(|vm| {
            Some(u64::from(vm.request.policy.deadline?.millicpus()) * u64::from(vm.request.vcpus))
        })
        .sum();
    if deadlines > 950 * u64::from(usable.len()) {
        complain(&format!("{deadlines}m of deadlines"));
    }
}

/// No two vCPUs of a VM on one CPU where there is one for each; a gang has one for each.
fn apart(host: &Host, vm: &VmPlan, complain: &mut impl FnMut(&str)) {
    let policy = &vm.request.policy;
    let mut all = CpuSet::new();
    let mut stacked = false;
    for vcpu in &vm.vcpus {
        stacked |= !vcpu.cpus.is_disjoint(&all);
        all.add(&vcpu.cpus);
    }
    if vm.mode == SchedMode::Core {
        return;
    }
    if !policy.gang.is_off() && all.len() < vm.request.vcpus {
        complain(&format!("gang {} on {all}", vm.request.vm));
    }
    let mut room = match policy.placement {
        Placement::Map(_) => return,
        Placement::Dedicated { .. } => vm.request.vcpus,
        Placement::NumaLocal { require: true, .. } => host
            .cpus
            .iter()
            .filter(|cpu| vm.memory_nodes.contains(&cpu.node) && vm.pool.contains(cpu.id))
            .count() as u32,
        _ => vm.pool.len(),
    };
    if policy.rt.is_some() && vm.exclusive.is_empty() {
        let kept = match &policy.helpers {
            Helpers::Auto => 1,
            Helpers::Set(cpus) => cpus.len(),
        };
        room = room.saturating_sub(kept);
    }
    // A VM that was there while there was less room stays if the room that came is full.
    let stays = vm.notes.iter().any(|note| note.starts_with("stays"));
    if stacked && room >= vm.request.vcpus && policy.deadline.is_none() && !stays {
        complain(&format!("{} is stacked: {:?}", vm.request.vm, vm.vcpus));
    }
}

/// Whole cores are whole, and guest threads are siblings.
fn cores(host: &Host, vm: &VmPlan, complain: &mut impl FnMut(&str)) {
    let core = |cpu: u32| host.cpu(cpu).map(|cpu| cpu.core);
    if let Placement::Dedicated {
        cores: Cores::Whole | Cores::One,
    } = vm.request.policy.placement
    {
        for cpu in &host.cpus {
            let mine = vm.exclusive.iter().any(|own| core(own) == Some(cpu.core));
            if mine && host.online.contains(cpu.id) && !vm.exclusive.contains(cpu.id) {
                complain(&format!(
                    "{} has a core but for CPU {}",
                    vm.request.vm, cpu.id
                ));
            }
        }
    }
    if vm.threads_per_core > 1 {
        for group in vm.vcpus.chunks(vm.threads_per_core as usize) {
            let ids: Vec<_> = group
                .iter()
                .map(|vcpu| vcpu.cpus.lowest().and_then(core))
                .collect();
            if ids.iter().any(|id| *id != ids[0]) {
                complain(&format!(
                    "{} has threads of several cores as one",
                    vm.request.vm
                ));
            }
        }
    }
}
