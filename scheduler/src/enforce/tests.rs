//! Enforcement on this machine's control groups, on made-up ones, and without any.
//!
//! What a machine does not have is skipped aloud.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use super::*;
use crate::{
    Cap, CpuSet, Gang, Host, HostSpec, Ledger, Owner, Placement, Plan, Request, SchedMode, Slice,
    Tid, VcpuPlan, VmPlan, VmPolicy, sys,
};

/// The files a kernel gives a new group of version 2, as far as they are used here.
pub(super) fn furnish(path: &Path) -> io::Result<()> {
    if path.starts_with("/sys") {
        return Ok(());
    }
    for (file, content) in [
        ("cgroup.type", "domain"),
        ("cgroup.threads", ""),
        ("cgroup.procs", ""),
        ("cgroup.controllers", "cpuset cpu"),
        ("cgroup.subtree_control", "cpuset cpu"),
        ("cpu.weight", "100"),
        ("cpu.idle", "0"),
        ("cpu.max", "max 100000"),
        ("cpu.max.burst", "0"),
        ("cpuset.cpus", ""),
        ("cpuset.cpus.effective", "0-1"),
    ] {
        fs::write(path.join(file), content)?;
    }
    Ok(())
}

/// A made-up directory of version 2 that goes with the test.
pub(super) struct MadeUp(pub(super) PathBuf);

impl MadeUp {
    pub(super) fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("rota-cgroup-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        furnish(&path).unwrap();
        Self(path)
    }

    pub(super) fn groups(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(&self.0)
            .unwrap()
            .map(|entry| entry.unwrap())
            .filter(|entry| entry.file_type().unwrap().is_dir())
            .map(|entry| entry.file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    pub(super) fn read(&self, part: &str, file: &str) -> String {
        let name = self
            .groups()
            .into_iter()
            .find(|name| name.ends_with(&format!(".{part}")))
            .unwrap();
        fs::read_to_string(self.0.join(name).join(file)).unwrap()
    }
}

impl Drop for MadeUp {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A thread that waits to be told to end, as a vCPU that halts does.
pub(crate) struct Body {
    pub(crate) tid: Tid,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Body {
    /// One that sleeps until it is told to end.
    pub(crate) fn sleeper() -> Self {
        Self::start_every(Some(std::time::Duration::from_millis(100)))
    }

    pub(crate) fn start(spins: bool) -> Self {
        Self::start_every((!spins).then_some(std::time::Duration::from_millis(1)))
    }

    fn start_every(pause: Option<std::time::Duration>) -> Self {
        let end = Arc::new(AtomicBool::new(false));
        let (tell, told) = std::sync::mpsc::channel();
        let stop = Arc::clone(&end);
        let thread = std::thread::spawn(move || {
            tell.send(Tid::current()).unwrap();
            while !stop.load(Ordering::Relaxed) {
                match pause {
                    None => std::hint::spin_loop(),
                    Some(pause) => std::thread::sleep(pause),
                }
            }
        });
        Self {
            tid: told.recv().unwrap(),
            end,
            thread: Some(thread),
        }
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn online() -> CpuSet {
    sys::affinity(Tid::current()).unwrap()
}

pub(crate) fn host() -> Host {
    let mut host = HostSpec {
        cores: online().len(),
        ..HostSpec::default()
    }
    .build();
    host.mode = SchedMode::Root;
    host
}

/// Each vCPU on its own CPU as long as there are so many, then round again.
pub(crate) fn vm(name: &str, vcpus: u32, policy: VmPolicy) -> VmPlan {
    let cpus: Vec<u32> = online().iter().collect();
    VmPlan {
        request: Request {
            vm: name.into(),
            vcpus,
            threads_per_core: 1,
            memory_mib: 64,
            policy,
        },
        mode: SchedMode::Root,
        vcpus: (0..vcpus)
            .map(|vcpu| VcpuPlan {
                vcpu,
                cpus: CpuSet::one(cpus[vcpu as usize % cpus.len()]),
                exclusive: false,
                why: "test".into(),
            })
            .collect(),
        exclusive: CpuSet::new(),
        helpers: online(),
        pool: CpuSet::new(),
        helpers_why: "test".into(),
        memory_nodes: Vec::new(),
        threads_per_core: 1,
        notes: Vec::new(),
    }
}

pub(crate) fn options() -> Options<'static> {
    Options {
        whole_process: false,
        ..Options::new(Owner::current("test").unwrap())
    }
}

pub(super) fn outcome<'a>(effects: &'a [Effect], control: &str) -> &'a Outcome {
    &effects
        .iter()
        .find(|effect| effect.control == control)
        .unwrap_or_else(|| panic!("no effect on {control}: {effects:?}"))
        .outcome
}

/// Is there a hierarchy of version 1 that groups can be made in?
fn version_1() -> Option<[PathBuf; 2]> {
    let places = places_here();
    match (&places.cpu, &places.cpuset) {
        (Some(cpu), Some(cpuset)) if cpu.hierarchy.version() == 1 => {
            Some([cpu.path.clone(), cpuset.path.clone()])
        }
        _ => {
            rota_tests::requires::skip("no control groups of version 1 can be made here");
            None
        }
    }
}

pub(super) fn places_here() -> cgroup::Places {
    cgroup::Places::find(None)
}

pub(super) fn ours(place: &Path, vm: &str) -> Vec<PathBuf> {
    let prefix = format!("rota-{vm}-");
    fs::read_dir(place)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with(&prefix))
        })
        .collect()
}

const CAP: Cap = Cap {
    quota_us: 40_000,
    period_us: 100_000,
    burst_us: 10_000,
};

#[test]
fn version_1_groups_are_made_filled_and_removed() {
    let Some([cpu, cpuset]) = version_1() else {
        return;
    };
    let mut plan = vm(
        "v1",
        2,
        VmPolicy {
            weight: Some(300),
            cap: Some(CAP),
            slice: Some(Slice::Throughput),
            ..VmPolicy::default()
        },
    );
    for vcpu in &mut plan.vcpus {
        vcpu.exclusive = true;
    }
    let enforcer = Enforcer::prepare(&host(), &plan, &options()).unwrap();
    let effects = enforcer.effects();
    assert_eq!(*outcome(&effects, "placement"), Outcome::Enforced);
    assert_eq!(*outcome(&effects, "weight"), Outcome::Enforced);
    assert_eq!(*outcome(&effects, "cap"), Outcome::Enforced);
    assert!(matches!(
        outcome(&effects, "slice"),
        Outcome::Approximated { .. } | Outcome::Advisory { .. }
    ));

    let bodies = [Body::start(false), Body::start(false)];
    for (vcpu, body) in bodies.iter().enumerate() {
        let before = sys::affinity(body.tid).unwrap();
        enforcer
            .adopt(ThreadRole::Vcpu(vcpu as u32), body.tid)
            .unwrap();
        assert_eq!(sys::affinity(body.tid).unwrap(), plan.vcpus[vcpu].cpus);
        assert!(plan.vcpus[vcpu].cpus.is_subset(&before));
    }
    let group = cpu.join(
        ours(&cpu, "v1")
            .iter()
            .find_map(|path| vcpu_group(path))
            .unwrap(),
    );
    assert_eq!(
        fs::read_to_string(group.join("cpu.shares")).unwrap(),
        "3072\n"
    );
    let tasks = fs::read_to_string(group.join("tasks")).unwrap();
    for body in &bodies {
        assert!(tasks.lines().any(|line| line == body.tid.0.to_string()));
    }
    assert_eq!(ours(&cpuset, "v1").len(), 2);

    drop(enforcer);
    assert_eq!(ours(&cpu, "v1"), [""; 0].map(PathBuf::from));
    assert_eq!(ours(&cpuset, "v1"), [""; 0].map(PathBuf::from));
    for body in &bodies {
        assert_eq!(sys::affinity(body.tid).unwrap(), online());
    }
}

fn vcpu_group(path: &Path) -> Option<PathBuf> {
    path.extension()
        .is_some_and(|part| part == "vcpu")
        .then(|| path.to_owned())
}

#[test]
fn groups_of_a_killed_process_go_with_the_next_start() {
    let Some([cpu, _]) = version_1() else {
        return;
    };
    let dead = cpu.join("rota-killed-999999999-1.vcpu");
    fs::create_dir(&dead).unwrap();
    let enforcer =
        Enforcer::prepare(&host(), &vm("reaper", 1, VmPolicy::default()), &options()).unwrap();
    assert!(!dead.exists());
    assert!(
        enforcer
            .reaped()
            .contains(&"rota-killed-999999999-1.vcpu".to_owned())
    );
}

#[test]
fn a_cap_the_kernel_does_not_take_leaves_nothing_behind() {
    let Some([cpu, _]) = version_1() else {
        return;
    };
    let plan = vm(
        "cap",
        1,
        VmPolicy {
            weight: Some(200),
            cap: Some(Cap {
                quota_us: 10,
                period_us: 100,
                burst_us: 0,
            }),
            ..VmPolicy::default()
        },
    );
    let refused = Enforcer::prepare(&host(), &plan, &options()).err().unwrap();
    assert!(refused.to_string().contains("cap"), "{refused}");
    assert!(ours(&cpu, "cap").is_empty());
}

#[test]
fn version_2_gets_threaded_groups_with_their_controls() {
    let root = MadeUp::new("v2");
    let plan = vm(
        "web",
        2,
        VmPolicy {
            weight: Some(300),
            cap: Some(CAP),
            ..VmPolicy::default()
        },
    );
    let options = Options {
        parent: Some(root.0.clone()),
        ..options()
    };
    fs::write(root.0.join("cgroup.subtree_control"), "").unwrap();
    let enforcer = Enforcer::prepare(&host(), &plan, &options).unwrap();
    let effects = enforcer.effects();
    for control in ["placement", "helpers", "weight", "cap"] {
        assert_eq!(*outcome(&effects, control), Outcome::Enforced, "{control}");
    }
    assert_eq!(root.groups().len(), 2);
    let cpus = plan
        .vcpus
        .iter()
        .fold(CpuSet::new(), |all, vcpu| &all | &vcpu.cpus);
    for (file, content) in [
        ("cgroup.type", "threaded"),
        ("cpu.weight", "300"),
        ("cpu.max", "40000 100000"),
        ("cpu.max.burst", "10000"),
        ("cpuset.cpus", &cpus.to_string()),
    ] {
        assert_eq!(root.read("vcpu", file), content, "{file}");
    }
    assert_eq!(root.read("helpers", "cgroup.type"), "threaded");
    drop(enforcer);
    assert!(root.groups().is_empty());
}

#[test]
fn turns_one_by_one_give_each_vcpu_a_group() {
    let root = MadeUp::new("rotate");
    let policy = VmPolicy {
        weight: Some(300),
        rotate_us: Some(20_000),
        ..VmPolicy::default()
    };
    let options = Options {
        parent: Some(root.0.clone()),
        ..options()
    };
    let enforcer = Enforcer::prepare(&host(), &vm("rr", 3, policy), &options).unwrap();
    assert_eq!(*outcome(&enforcer.effects(), "rotate"), Outcome::Enforced);
    assert_eq!(*outcome(&enforcer.effects(), "weight"), Outcome::Enforced);
    assert_eq!(root.groups().len(), 4);
    assert_eq!(root.read("vcpu2", "cpu.weight"), "100");
}

#[test]
fn without_groups_a_weight_is_a_nice_value_and_a_cap_is_refused() {
    let plan = vm(
        "bare",
        1,
        VmPolicy {
            weight: Some(80),
            ..VmPolicy::default()
        },
    );
    let bare = || Options {
        bare: true,
        ..options()
    };
    let enforcer = Enforcer::prepare(&host(), &plan, &bare()).unwrap();
    assert!(matches!(
        outcome(&enforcer.effects(), "weight"),
        Outcome::Approximated { .. }
    ));
    let body = Body::start(false);
    let nice = sys::attributes(body.tid).unwrap().nice;
    enforcer.adopt(ThreadRole::Vcpu(0), body.tid).unwrap();
    assert_eq!(sys::attributes(body.tid).unwrap().nice, 1);
    drop(enforcer);
    if sys::is_root() {
        assert_eq!(sys::attributes(body.tid).unwrap().nice, nice);
    }

    let mut capped = plan;
    capped.request.policy.cap = Some(CAP);
    let refused = Enforcer::prepare(&host(), &capped, &bare()).err().unwrap();
    assert!(refused.to_string().contains("cpu controller"), "{refused}");
}

#[test]
fn what_is_only_advisory_fails_a_strict_vm_before_it_starts() {
    let mut plan = vm(
        "strict",
        1,
        VmPolicy {
            weight: Some(200),
            ..VmPolicy::default()
        },
    );
    plan.mode = SchedMode::Unknown;
    let enforcer = Enforcer::prepare(&host(), &plan, &options()).unwrap();
    assert!(matches!(
        outcome(&enforcer.effects(), "weight"),
        Outcome::Advisory { .. }
    ));
    drop(enforcer);
    plan.request.policy.strict = true;
    let refused = Enforcer::prepare(&host(), &plan, &options()).err().unwrap();
    assert!(refused.strict);
    for place in places_here().directories() {
        assert!(ours(&place.path, "strict").is_empty());
    }
}

#[test]
fn an_adaptive_gang_that_nobody_can_judge_is_only_advisory() {
    let policy = VmPolicy {
        gang: Gang::Adaptive { quantum_us: 20_000 },
        ..VmPolicy::default()
    };
    let mut plan = vm("untold", 1, policy);
    let told = Options {
        guest_tells: true,
        ..options()
    };
    let effects = Enforcer::prepare(&host(), &plan, &told).unwrap().effects();
    assert_eq!(*outcome(&effects, "gang"), Outcome::Enforced);
    let effects = Enforcer::prepare(&host(), &plan, &options())
        .unwrap()
        .effects();
    let untold = outcome(&effects, "gang");
    assert!(matches!(untold, Outcome::Advisory { .. }), "{untold}");
    plan.request.policy.strict = true;
    let refused = Enforcer::prepare(&host(), &plan, &options()).err().unwrap();
    assert!(refused.to_string().contains("gang=soft"), "{refused}");
    plan.request.policy.gang = Gang::Soft { quantum_us: 20_000 };
    assert!(Enforcer::prepare(&host(), &plan, &options()).is_ok());
}

#[test]
fn a_cpu_that_is_not_there_is_refused() {
    let mut plan = vm("nowhere", 1, VmPolicy::default());
    plan.vcpus[0].cpus = CpuSet::one(4000);
    let refused = Enforcer::prepare(&host(), &plan, &options()).err().unwrap();
    assert!(refused.to_string().contains("placement"), "{refused}");
}

#[test]
fn a_vcpu_nobody_planned_is_not_adopted() {
    let enforcer =
        Enforcer::prepare(&host(), &vm("hot", 1, VmPolicy::default()), &options()).unwrap();
    let body = Body::start(false);
    let error = enforcer.adopt(ThreadRole::Vcpu(1), body.tid).unwrap_err();
    assert!(error.to_string().contains("plan again"), "{error}");
}

#[test]
fn real_time_vcpus_must_not_share_cpus_with_helpers() {
    let plan = vm(
        "rt",
        1,
        VmPolicy {
            rt: Some(1),
            ..VmPolicy::default()
        },
    );
    let refused = Enforcer::prepare(&host(), &plan, &options()).err().unwrap();
    assert!(refused.to_string().contains("starve"), "{refused}");
}

#[test]
fn where_the_hypervisor_schedules_properties_are_set_and_the_rest_is_refused() {
    use std::{cell::RefCell, collections::BTreeMap};

    struct Partition(RefCell<BTreeMap<u32, u64>>);
    impl PartitionProperties for Partition {
        fn property(&self, code: u32) -> io::Result<u64> {
            Ok(self.0.borrow().get(&code).copied().unwrap_or(0))
        }
        fn set_property(&self, code: u32, value: u64) -> io::Result<()> {
            self.0.borrow_mut().insert(code, value);
            Ok(())
        }
        fn is_shown_threads(&self) -> bool {
            false
        }
    }

    let partition = Partition(RefCell::default());
    let mut plan = vm(
        "core",
        2,
        VmPolicy {
            weight: Some(300),
            cap: Some(CAP),
            reserve_millicpus: Some(500),
            ..VmPolicy::default()
        },
    );
    plan.mode = SchedMode::Core;
    let options = || Options {
        partition: Some(&partition),
        ..options()
    };
    let enforcer = Enforcer::prepare(&host(), &plan, &options()).unwrap();
    let effects = enforcer.effects();
    assert_eq!(effects.len(), 3, "{effects:?}");
    for effect in &effects {
        assert!(matches!(effect.outcome, Outcome::Delegated { .. }));
    }
    // 40 % of one CPU for two VPs is a fifth of a CPU each; half a CPU is a quarter each.
    let values: Vec<u64> = partition.0.borrow().values().copied().collect();
    assert_eq!(values, [0x4000, 0x3333, 300]);
    let body = Body::start(false);
    enforcer.adopt(ThreadRole::Vcpu(0), body.tid).unwrap();
    assert_eq!(sys::affinity(body.tid).unwrap(), online());
    drop(enforcer);
    assert!(partition.0.borrow().values().all(|value| *value == 0));

    plan.request.policy.slice = Some(Slice::Latency);
    plan.request.policy.placement = Placement::Spread;
    let refused = Enforcer::prepare(&host(), &plan, &options()).err().unwrap();
    assert!(refused.to_string().contains("slice"), "{refused}");
    assert!(refused.to_string().contains("placement"), "{refused}");
    assert!(partition.0.borrow().values().all(|value| *value == 0));
}

#[test]
fn a_vm_whose_vcpus_take_turns_weighs_as_much_as_any_other() {
    let made_up = MadeUp::new("turns-weigh");
    let plan = vm("turns", 4, "rotate=20ms".parse().unwrap());
    let options = Options {
        parent: Some(made_up.0.clone()),
        ..options()
    };
    let enforcer = Enforcer::prepare(&host(), &plan, &options).unwrap();
    for vcpu in 0..4 {
        assert_eq!(made_up.read(&format!("vcpu{vcpu}"), "cpu.weight"), "25");
    }
    drop(enforcer);
}

#[test]
fn memory_that_nobody_has_bound_is_no_silent_promise() {
    let mut plan = vm("numa", 1, "strict=on".parse().unwrap());
    plan.memory_nodes = vec![0];
    let mut host = host();
    let prepare = |host: &Host, memory| {
        let options = Options {
            memory,
            ..options()
        };
        Enforcer::prepare(host, &plan, &options).map(|enforcer| enforcer.effects())
    };
    assert!(prepare(&host, None).is_ok(), "there is one node");
    host.nodes.push(host.nodes[0].clone());
    let refused = prepare(&host, None).err().unwrap();
    assert!(refused.to_string().contains("memory"), "{refused}");
    let effects = prepare(&host, Some(Outcome::Enforced)).unwrap();
    assert_eq!(*outcome(&effects, "memory"), Outcome::Enforced);
}

#[test]
fn threads_the_guest_is_not_shown_are_advisory() {
    let mut plan = vm("threads", 2, VmPolicy::default());
    plan.request.threads_per_core = 2;
    let effects = Enforcer::prepare(&host(), &plan, &options())
        .unwrap()
        .effects();
    let outcome = outcome(&effects, "topology");
    assert!(matches!(outcome, Outcome::Advisory { .. }), "{outcome}");
    plan.request.policy.strict = true;
    let refused = Enforcer::prepare(&host(), &plan, &options()).err().unwrap();
    assert!(refused.to_string().contains("topology"), "{refused}");
}

/// A partition that makes of what it is told what `makes` says.
struct Stubborn {
    makes: fn(before: u64, value: u64) -> u64,
    value: std::cell::Cell<u64>,
}

impl PartitionProperties for Stubborn {
    fn property(&self, _code: u32) -> io::Result<u64> {
        Ok(self.value.get())
    }
    fn set_property(&self, _code: u32, value: u64) -> io::Result<()> {
        self.value.set((self.makes)(self.value.get(), value));
        Ok(())
    }
    fn is_shown_threads(&self) -> bool {
        false
    }
}

#[test]
fn what_the_hypervisor_reads_back_otherwise_is_not_delegated() {
    let outcome_of = |makes| {
        let partition = Stubborn {
            makes,
            value: 100.into(),
        };
        let mut plan = vm("stubborn", 1, "weight=300".parse().unwrap());
        plan.mode = SchedMode::Core;
        let options = Options {
            partition: Some(&partition),
            ..options()
        };
        let enforcer = Enforcer::prepare(&host(), &plan, &options).unwrap();
        outcome(&enforcer.effects(), "weight").clone()
    };
    assert!(matches!(
        outcome_of(|_, value| value),
        Outcome::Delegated { .. }
    ));
    let kept = outcome_of(|before, _| before);
    assert!(matches!(kept, Outcome::Advisory { .. }), "{kept}");
    let halved = outcome_of(|_, value| value / 2);
    let Outcome::Approximated {
        requested,
        effective,
        ..
    } = &halved
    else {
        panic!("{halved}")
    };
    assert_eq!(
        (requested.as_str(), effective.as_str()),
        ("300", "CpuWeight = 150")
    );
}

#[test]
fn helpers_stay_on_their_cpus_where_the_hypervisor_schedules_too() {
    let first = CpuSet::one(online().lowest().unwrap());
    let mut plan = vm("helped", 1, format!("helpers=[{first}]").parse().unwrap());
    plan.mode = SchedMode::Core;
    plan.helpers = first.clone();
    plan.vcpus[0].cpus = online();
    let enforcer = Enforcer::prepare(&host(), &plan, &options()).unwrap();
    let effects = enforcer.effects();
    assert_eq!(effects.len(), 1, "{effects:?}");
    let outcome = outcome(&effects, "helpers");
    assert!(matches!(outcome, Outcome::Approximated { .. }), "{outcome}");
    let (helper, vcpu) = (Body::sleeper(), Body::sleeper());
    enforcer.adopt(ThreadRole::Helper, helper.tid).unwrap();
    enforcer.adopt(ThreadRole::Vcpu(0), vcpu.tid).unwrap();
    assert_eq!(sys::affinity(helper.tid).unwrap(), first);
    assert_eq!(sys::affinity(vcpu.tid).unwrap(), online());
    drop(enforcer);
    assert_eq!(sys::affinity(helper.tid).unwrap(), online());
}

#[test]
fn real_time_vcpus_beside_their_helpers_run_before_others() {
    let mut plan = vm(
        "fifo",
        1,
        VmPolicy {
            rt: Some(3),
            ..VmPolicy::default()
        },
    );
    plan.helpers.subtract(&plan.vcpus[0].cpus);
    if plan.helpers.is_empty() || !sys::is_root() {
        rota_tests::requires::skip("two CPUs are needed, and root");
        return;
    }
    let enforcer = Enforcer::prepare(&host(), &plan, &options()).unwrap();
    assert_eq!(*outcome(&enforcer.effects(), "rt"), Outcome::Enforced);
    let body = Body::start(false);
    enforcer.adopt(ThreadRole::Vcpu(0), body.tid).unwrap();
    let attributes = sys::attributes(body.tid).unwrap();
    assert_eq!(attributes.policy, libc::SCHED_FIFO as u32);
    assert_eq!(attributes.priority, 3);
    drop(enforcer);
    let attributes = sys::attributes(body.tid).unwrap();
    assert_eq!(attributes.policy, libc::SCHED_OTHER as u32);
}

#[test]
fn a_vcpu_does_not_inherit_the_slice_of_the_helper_that_started_it() {
    let plan = vm("heir", 1, VmPolicy::default());
    let enforcer = Enforcer::prepare(&host(), &plan, &options()).unwrap();
    let me = Tid::current();
    let usual = sys::attributes(me).unwrap().runtime_ns;
    enforcer.adopt(ThreadRole::Helper, me).unwrap();
    if sys::attributes(me).unwrap().runtime_ns != 100_000 {
        rota_tests::requires::skip("this kernel has no custom slices");
        return;
    }
    let body = Body::start(false);
    assert_eq!(sys::attributes(body.tid).unwrap().runtime_ns, 100_000);
    enforcer.adopt(ThreadRole::Vcpu(0), body.tid).unwrap();
    assert_eq!(sys::attributes(body.tid).unwrap().runtime_ns, usual);
}

#[test]
fn what_is_in_doubt_is_never_said_to_be_enforced() {
    let policy = VmPolicy {
        weight: Some(200),
        ..VmPolicy::default()
    };
    let forced = Options {
        doubt: Some("VPs were seen to run elsewhere".into()),
        ..options()
    };
    let enforcer = Enforcer::prepare(&host(), &vm("forced", 1, policy.clone()), &forced).unwrap();
    let doubted = |enforcer: &Enforcer<'_>| {
        enforcer
            .effects()
            .iter()
            .all(|effect| match &effect.outcome {
                Outcome::Advisory { why } => why.contains("VPs were seen"),
                _ => false,
            })
    };
    assert!(doubted(&enforcer), "{:?}", enforcer.effects());
    // Nor is what is found out later.
    enforcer.shared().set_effect(Effect {
        control: "gang".into(),
        requested: "adaptive".into(),
        outcome: Outcome::Enforced,
    });
    assert!(doubted(&enforcer), "{:?}", enforcer.effects());
    drop(enforcer);
    let strict = VmPolicy {
        strict: true,
        ..policy
    };
    assert!(Enforcer::prepare(&host(), &vm("forced", 1, strict), &forced).is_err());
}

#[test]
fn groups_are_in_the_ledger_as_long_as_they_are_there() {
    let scratch = std::env::temp_dir().join(format!("rota-noted-{}", std::process::id()));
    fs::create_dir(&scratch).unwrap();
    let ledger = Ledger::open(Some(&scratch.join("ledger.json"))).unwrap();
    let plan = vm("noted", 1, VmPolicy::default());
    let own = Plan {
        vms: vec![plan.clone()],
        adjusted: Vec::new(),
    };
    let claim = ledger.claim(options().owner, |_| Ok(own)).unwrap();
    let noting = Options {
        claim: Some(&claim),
        ..options()
    };
    let enforcer = Enforcer::prepare(&host(), &plan, &noting).unwrap();
    let noted = ledger.read().unwrap().entries.remove(0).groups;
    let made = enforcer.shared().cpuset_groups();
    assert!(made.iter().all(|group| noted.contains(group)), "{noted:?}");
    assert_eq!(noted.is_empty(), places_here().directories().is_empty());
    assert!(noted.iter().all(|group| group.is_dir()), "{noted:?}");
    drop(enforcer);
    assert!(noted.iter().all(|group| !group.exists()), "{noted:?}");
    drop(claim);
    fs::remove_dir_all(&scratch).unwrap();
}
