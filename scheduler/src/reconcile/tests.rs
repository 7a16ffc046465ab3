//! Plans against a changing world: others that move threads, cpusets that shrink, and what looking after it costs.

use std::{
    env, fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
        mpsc::{self, Receiver},
    },
    thread,
    time::{Duration, Instant},
};

use super::*;
use crate::{
    CpuSet, EnforceOptions, Enforcer, Evidence, Host, Ledger, ModeCheck, Outcome, Owner, Plan,
    Request, Says, SchedMode, ThreadRole, Tid, VmPolicy,
    enforce::tests::{Body, host, options, vm},
    plan, sys,
};

fn bare() -> EnforceOptions<'static> {
    EnforceOptions {
        bare: true,
        ..options()
    }
}

fn two_cpus() -> Option<[u32; 2]> {
    let cpus: Vec<u32> = sys::affinity(Tid::current()).unwrap().iter().collect();
    if let [first, second, ..] = cpus[..] {
        return Some([first, second]);
    }
    rota_tests::requires::skip("two CPUs are needed");
    None
}

fn start(enforcer: &Enforcer<'_>) -> (Reconciler, Receiver<(Instant, ReconcileEvent)>) {
    let (tell, told) = mpsc::channel();
    let reconciler = Reconciler::start(enforcer, None, ReconcileOptions::default(), move |event| {
        let _ = tell.send((Instant::now(), event));
    })
    .unwrap();
    (reconciler, told)
}

const SOON: Duration = Duration::from_secs(10);

#[test]
fn a_thread_somebody_moves_is_moved_back_until_that_is_a_fight() {
    let Some([first, second]) = two_cpus() else {
        return;
    };
    let plan = vm("moved", 1, VmPolicy::default());
    let enforcer = Enforcer::prepare(&host(), &plan, &bare()).unwrap();
    let body = Body::start(false);
    enforcer.adopt(ThreadRole::Vcpu(0), body.tid).unwrap();
    let (_reconciler, told) = start(&enforcer);
    let (mut soonest, mut slowest) = (SOON, Duration::ZERO);
    for _ in 0..3 {
        // Right after a look: the next one is as far away as it can be.
        thread::sleep(Duration::from_millis(1));
        let begun = Instant::now();
        sys::set_affinity(body.tid, &CpuSet::one(second)).unwrap();
        let (at, event) = told.recv_timeout(SOON).unwrap();
        soonest = soonest.min(at - begun);
        slowest = slowest.max(at - begun);
        assert_eq!(
            event,
            ReconcileEvent::Corrected {
                role: ThreadRole::Vcpu(0),
                found: CpuSet::one(second),
                now: CpuSet::one(first),
            }
        );
    }
    println!("corrected after {soonest:?} to {slowest:?}");
    assert!(soonest < Duration::from_millis(35));
    assert!(slowest < Duration::from_millis(100));
    let (_, event) = told.recv_timeout(SOON).unwrap();
    assert!(matches!(event, ReconcileEvent::Truce { .. }), "{event:?}");
    sys::set_affinity(body.tid, &CpuSet::one(second)).unwrap();
    assert!(told.recv_timeout(Duration::from_millis(200)).is_err());
    let effects = enforcer.effects();
    let placement = effects.iter().find(|effect| effect.control == "placement");
    assert!(
        placement
            .unwrap()
            .outcome
            .to_string()
            .contains("another program")
    );
}

fn placement(enforcer: &Enforcer<'_>) -> Outcome {
    let effects = enforcer.effects();
    let placement = effects
        .into_iter()
        .find(|effect| effect.control == "placement");
    placement.unwrap().outcome
}

/// Whoever fought us has stopped: after the truce the thread is put back once more, and the effect is what it was.
#[test]
fn after_a_truce_everything_is_as_it_was() {
    let Some([first, second]) = two_cpus() else {
        return;
    };
    let plan = vm("truce", 1, VmPolicy::default());
    let enforcer = Enforcer::prepare(&host(), &plan, &bare()).unwrap();
    let body = Body::start(false);
    enforcer.adopt(ThreadRole::Vcpu(0), body.tid).unwrap();
    let before = placement(&enforcer);
    let options = ReconcileOptions {
        truce: Duration::from_millis(200),
        ..ReconcileOptions::default()
    };
    let (tell, told) = mpsc::channel();
    let _reconciler = Reconciler::start(&enforcer, None, options, move |event| {
        let _ = tell.send(event);
    });
    for _ in 0..3 {
        sys::set_affinity(body.tid, &CpuSet::one(second)).unwrap();
        let event = told.recv_timeout(SOON).unwrap();
        assert!(
            matches!(event, ReconcileEvent::Corrected { .. }),
            "{event:?}"
        );
    }
    let event = told.recv_timeout(SOON).unwrap();
    assert!(matches!(event, ReconcileEvent::Truce { .. }), "{event:?}");
    assert!(matches!(placement(&enforcer), Outcome::Advisory { .. }));
    let begun = Instant::now();
    while placement(&enforcer) != before {
        assert!(begun.elapsed() < SOON, "it stays advisory");
        thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(sys::affinity(body.tid).unwrap(), CpuSet::one(first));
}

/// A program that gives a VM's control group other CPUs fights as much as one that moves its threads.
#[test]
fn who_writes_to_our_cpuset_is_told_of_and_given_in_to_at_last() {
    let Some([first, second]) = two_cpus() else {
        return;
    };
    let mut plan = vm("regrouped", 1, VmPolicy::default());
    plan.vcpus[0].exclusive = true;
    plan.exclusive = plan.vcpus[0].cpus.clone();
    let enforcer = Enforcer::prepare(&host(), &plan, &options()).unwrap();
    let group = enforcer.shared().cpuset_groups().into_iter().next();
    let Some(group) = group else {
        rota_tests::requires::skip("no cpusets can be made here");
        return;
    };
    let body = Body::start(false);
    enforcer.adopt(ThreadRole::Vcpu(0), body.tid).unwrap();
    let (_reconciler, told) = start(&enforcer);
    let cpus = group.join("cpuset.cpus");
    let begun = Instant::now();
    let mut regrouped = 0;
    // The group and the thread may be put right one after the other, and count as two.
    'fight: loop {
        assert!(begun.elapsed() < SOON, "it is not given in to");
        fs::write(&cpus, second.to_string()).unwrap();
        loop {
            match told.recv_timeout(SOON).unwrap().1 {
                ReconcileEvent::Truce { .. } => break 'fight,
                ReconcileEvent::Regrouped => {
                    regrouped += 1;
                    break;
                }
                ReconcileEvent::Corrected { .. } => {}
                other => panic!("{other:?}"),
            }
        }
        while sys::affinity(body.tid).unwrap() != CpuSet::one(first) {
            assert!(begun.elapsed() < SOON, "it is not put back");
        }
    }
    assert!(regrouped > 0);
    fs::write(&cpus, second.to_string()).unwrap();
    thread::sleep(Duration::from_millis(100));
    assert_eq!(
        fs::read_to_string(&cpus).unwrap().trim(),
        second.to_string()
    );
}

/// A VM on both CPUs, one that takes one of them for itself, and what becomes of the first when that goes.
#[test]
fn cpus_that_become_free_are_taken_up() {
    let Some([first, second]) = two_cpus() else {
        return;
    };
    let host = Host {
        mode: SchedMode::Root,
        ..Host::read().unwrap()
    };
    if host.usable().len() != 2 || !host.isolated.is_empty() {
        rota_tests::requires::skip("a machine with exactly two CPUs is needed");
        return;
    }
    let directory = env::temp_dir().join(format!("rota-grow-{}", std::process::id()));
    let ledger = Ledger::open(Some(&directory.join("ledger.json"))).unwrap();
    let owner = Owner::current("test").unwrap();
    let claim = |name: &str, vcpus: u32, policy: &str| {
        let request = Request {
            vm: name.into(),
            vcpus,
            threads_per_core: 1,
            memory_mib: 64,
            policy: policy.parse().unwrap(),
        };
        ledger
            .claim(owner.clone(), |state| plan(&host, state, &[request]))
            .unwrap()
    };
    let own = claim("grows", 2, "placement=shared");
    let newcomer = claim("newcomer", 1, "placement=dedicated");
    // The plan as it was before the newcomer came.
    let enforcer = Enforcer::prepare(&host, &own.plan(), &bare()).unwrap();
    let bodies = [Body::start(false), Body::start(false)];
    for (vcpu, body) in (0..).zip(&bodies) {
        enforcer.adopt(ThreadRole::Vcpu(vcpu), body.tid).unwrap();
    }
    let masks = || {
        let masks = bodies
            .each_ref()
            .map(|body| sys::affinity(body.tid).unwrap());
        let [one, other] = masks.each_ref();
        (one == other, one | other)
    };
    let both: CpuSet = [first, second].into_iter().collect();
    assert_eq!(masks(), (false, both.clone()));
    let (reconciler, _told) = {
        let (tell, told) = mpsc::channel();
        let options = ReconcileOptions::default();
        let reconciler = Reconciler::start(&enforcer, Some(&own), options, move |event| {
            let _ = tell.send(event);
        });
        (reconciler.unwrap(), told)
    };
    let wait_for = |wanted: (bool, CpuSet)| {
        let begun = Instant::now();
        while masks() != wanted {
            assert!(begun.elapsed() < SOON, "{:?}", masks());
            thread::sleep(Duration::from_millis(1));
        }
    };
    let left = &both - &newcomer.plan().exclusive;
    wait_for((true, left.clone()));
    assert!(own.current().unwrap().unwrap().pool == left);
    drop(newcomer);
    wait_for((false, both));
    assert!(enforcer.plan() == own.current().unwrap().unwrap());
    drop(reconciler);
    let _ = fs::remove_dir_all(directory);
}

/// The kernel's decision is another, and then the first one again: told each time, threads are put in their places again, and the
/// effects say what it means.
#[test]
fn another_scheduler_is_told_and_the_plan_done_anew() {
    let Some([first, second]) = two_cpus() else {
        return;
    };
    let plan = vm("mode", 1, VmPolicy::default());
    assert!(plan.mode.linux_schedules());
    let enforcer = Enforcer::prepare(&host(), &plan, &bare()).unwrap();
    let body = Body::start(false);
    enforcer.adopt(ThreadRole::Vcpu(0), body.tid).unwrap();
    let says = |says, value: &str| vec![Evidence::new("kernel's decision", says, value, "")];
    let core = Arc::new(AtomicBool::new(false));
    let now = Arc::clone(&core);
    let read = move || match now.load(Relaxed) {
        true => says(Says::Hypervisor, "the hypervisor's"),
        false => says(Says::Linux, "its own"),
    };
    let said = says(Says::Linux, "its own");
    let options = ReconcileOptions {
        // Nobody looks at threads by themselves.
        look_every: Duration::from_secs(3600),
        mode: Some(ModeCheck::of(read, said, Duration::from_millis(5))),
        ..ReconcileOptions::default()
    };
    let (tell, told) = mpsc::channel();
    let reconciler = Reconciler::start(&enforcer, None, options, move |event| {
        let _ = tell.send(event);
    });
    let mode = || {
        let effects = enforcer.effects();
        let mode = effects.into_iter().find(|effect| effect.control == "mode");
        mode.map(|effect| effect.outcome)
    };
    // What is put right in between is told as well.
    let change = || loop {
        match told.recv_timeout(SOON).unwrap() {
            ReconcileEvent::Mode(change) => return change,
            ReconcileEvent::Corrected { .. } => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(mode(), None);
    core.store(true, Relaxed);
    assert_eq!(change().says, Says::Hypervisor);
    assert!(matches!(mode(), Some(Outcome::Advisory { .. })));
    sys::set_affinity(body.tid, &CpuSet::one(second)).unwrap();
    core.store(false, Relaxed);
    assert_eq!(change().says, Says::Linux);
    assert_eq!(mode(), Some(Outcome::Enforced));
    let begun = Instant::now();
    while sys::affinity(body.tid).unwrap() != CpuSet::one(first) {
        assert!(begun.elapsed() < SOON, "it is not put back");
        thread::sleep(Duration::from_millis(1));
    }
    drop(reconciler);
}

#[test]
fn threads_follow_when_the_plan_changes_in_the_ledger() {
    let Some([first, second]) = two_cpus() else {
        return;
    };
    let directory = env::temp_dir().join(format!("rota-replan-{}", std::process::id()));
    let ledger = Ledger::open(Some(&directory.join("ledger.json"))).unwrap();
    let plan = vm("replanned", 1, VmPolicy::default());
    let owner = Owner::current("test").unwrap();
    let claim = |name: &str, adjusted| {
        let plan = vm(name, 1, VmPolicy::default());
        let vms = vec![plan];
        ledger
            .claim(owner.clone(), move |_| Ok(Plan { vms, adjusted }))
            .unwrap()
    };
    let own = claim("replanned", Vec::new());
    let enforcer = Enforcer::prepare(&host(), &plan, &bare()).unwrap();
    let body = Body::start(false);
    enforcer.adopt(ThreadRole::Vcpu(0), body.tid).unwrap();
    assert_eq!(sys::affinity(body.tid).unwrap(), CpuSet::one(first));
    let (tell, told) = mpsc::channel();
    let reconciler = Reconciler::start(
        &enforcer,
        Some(&own),
        ReconcileOptions::default(),
        move |event| {
            let _ = tell.send(event);
        },
    )
    .unwrap();
    let mut other = plan.clone();
    other.vcpus[0].cpus = CpuSet::one(second);
    let begun = Instant::now();
    let _newcomer = claim("newcomer", vec![other]);
    assert_eq!(told.recv_timeout(SOON).unwrap(), ReconcileEvent::Replanned);
    assert!(matches!(
        told.recv_timeout(SOON).unwrap(),
        ReconcileEvent::Corrected { .. }
    ));
    println!("followed after {:?}", begun.elapsed());
    assert_eq!(sys::affinity(body.tid).unwrap(), CpuSet::one(second));
    drop(reconciler);
    let _ = fs::remove_dir_all(directory);
}

#[test]
fn a_thread_that_has_ended_is_forgotten() {
    let plan = vm("ended", 1, VmPolicy::default());
    let enforcer = Enforcer::prepare(&host(), &plan, &bare()).unwrap();
    let body = Body::start(false);
    enforcer.adopt(ThreadRole::Vcpu(0), body.tid).unwrap();
    let (_reconciler, told) = start(&enforcer);
    drop(body);
    let begun = Instant::now();
    while !enforcer.shared().threads().is_empty() {
        assert!(begun.elapsed() < SOON);
        thread::sleep(Duration::from_millis(5));
    }
    assert!(told.try_recv().is_err());
}

#[test]
fn looking_after_64_threads_costs_next_to_nothing() {
    let plan = vm("cost", 64, VmPolicy::default());
    let enforcer = Enforcer::prepare(&host(), &plan, &bare()).unwrap();
    let bodies: Vec<Body> = (0..64).map(|_| Body::sleeper()).collect();
    for (vcpu, body) in (0..).zip(&bodies) {
        enforcer.adopt(ThreadRole::Vcpu(vcpu), body.tid).unwrap();
    }
    let known = thread_ids();
    let (_reconciler, _told) = start(&enforcer);
    thread::sleep(Duration::from_millis(50));
    let own = thread_ids()
        .into_iter()
        .find(|tid| !known.contains(tid) && name_of(*tid) == "reconcile");
    let Some(own) = own else {
        rota_tests::requires::skip("other tests' threads are in the way");
        return;
    };
    let before = run_ns(own);
    thread::sleep(Duration::from_secs(1));
    let cost = run_ns(own) - before;
    println!("64 threads: {} us a second", cost / 1000);
    let slice_ns = sys::attributes(Tid(own)).unwrap().runtime_ns;
    // A kernel without slices of threads says 0.
    assert!(slice_ns <= 100_000, "it is prompt: {slice_ns}");
    // A twentieth of a CPU would be a mistake on any machine, an emulated one too.
    assert!(cost < 50_000_000);
}

fn thread_ids() -> Vec<i32> {
    fs::read_dir("/proc/self/task")
        .unwrap()
        .map(|entry| {
            entry
                .unwrap()
                .file_name()
                .to_str()
                .unwrap()
                .parse()
                .unwrap()
        })
        .collect()
}

fn name_of(tid: i32) -> String {
    let name = fs::read_to_string(format!("/proc/self/task/{tid}/comm"));
    name.unwrap_or_default().trim().to_owned()
}

fn run_ns(tid: i32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/self/task/{tid}/schedstat")).unwrap();
    stat.split(' ').next().unwrap().parse().unwrap()
}

/// Not a test: a VM of two vCPUs in a process of its own, for as long as its input is open. Says what happens and when, on
/// `CLOCK_MONOTONIC`. vCPU 1 has its CPU for itself if `ROTA_RECONCILE` is `dedicated`.
#[test]
fn guest() {
    let Ok(kind) = env::var("ROTA_RECONCILE") else {
        return;
    };
    let mut input = BufReader::new(std::io::stdin()).lines();
    // Only once it has been put into its cpuset.
    input.next();
    let mut plan = vm("guest", 2, VmPolicy::default());
    if kind == "dedicated" {
        plan.vcpus[1].exclusive = true;
        plan.exclusive = plan.vcpus[1].cpus.clone();
    }
    let options = EnforceOptions {
        whole_process: true,
        ..options()
    };
    let enforcer = Enforcer::prepare(&host(), &plan, &options).unwrap();
    let bodies = [Body::start(true), Body::start(true)];
    for (vcpu, body) in (0..).zip(&bodies) {
        enforcer.adopt(ThreadRole::Vcpu(vcpu), body.tid).unwrap();
    }
    let reconciler = Reconciler::start(&enforcer, None, ReconcileOptions::default(), |event| {
        println!("{} {event:?}", sys::monotonic_ns());
    })
    .unwrap();
    // Another one that nobody adopts, and that goes its own way.
    let newcomer = Body::start(false);
    sys::set_affinity(newcomer.tid, &plan.vcpus[0].cpus).unwrap();
    println!("ready");
    while let Some(Ok(_)) = input.next() {
        let mask = |body: &Body| sys::affinity(body.tid).unwrap().to_string();
        println!("helper {}", mask(&newcomer));
        println!("placement {:?}", placement(&enforcer));
        println!("masks {}", bodies.each_ref().map(mask).join(" "));
    }
    drop(newcomer);
    drop(reconciler);
    drop(bodies);
}

/// A cpuset of version 1 that goes with the test.
struct Cpuset(PathBuf);

impl Cpuset {
    fn new(name: &str, cpus: &CpuSet) -> Option<Self> {
        let root = Path::new("/sys/fs/cgroup/cpuset");
        let path = root.join(format!("rota-test-{name}-{}", std::process::id()));
        if fs::create_dir(&path).is_err() {
            rota_tests::requires::skip("no cpusets of version 1 can be made here");
            return None;
        }
        let cpuset = Self(path);
        let mems = fs::read_to_string(root.join("cpuset.mems")).unwrap();
        fs::write(cpuset.0.join("cpuset.mems"), mems.trim()).unwrap();
        cpuset.set(cpus);
        Some(cpuset)
    }

    fn set(&self, cpus: &CpuSet) {
        fs::write(self.0.join("cpuset.cpus"), cpus.to_string()).unwrap();
    }
}

impl Drop for Cpuset {
    fn drop(&mut self) {
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// The process of [`guest`], inside a cpuset.
struct Guest {
    child: Child,
    lines: Receiver<String>,
}

impl Guest {
    fn start(cpuset: &Cpuset, kind: &str) -> Self {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "reconcile::tests::guest", "--nocapture"])
            .env("ROTA_RECONCILE", kind)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        fs::write(cpuset.0.join("cgroup.procs"), child.id().to_string()).unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (tell, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                let _ = tell.send(line);
            }
        });
        let mut guest = Self { child, lines };
        guest.say();
        guest.wait_for("ready");
        guest
    }

    fn say(&mut self) {
        use std::io::Write;
        writeln!(self.child.stdin.as_mut().unwrap(), "go").unwrap();
    }

    fn wait_for(&self, what: &str) -> String {
        loop {
            let line = self
                .lines
                .recv_timeout(SOON)
                .unwrap_or_else(|_| panic!("{what}"));
            if line.contains(what) {
                return line;
            }
        }
    }

    fn masks(&mut self) -> String {
        self.say();
        self.wait_for("masks ")
    }

    /// Until the vCPUs are where they should be.
    fn wait_for_masks(&mut self, wanted: &str) {
        let begun = Instant::now();
        while self.masks() != wanted {
            assert!(begun.elapsed() < SOON, "{wanted}");
        }
    }

    /// Until what the guest says of `what` contains `wanted`.
    fn wait_until_it_says(&mut self, what: &str, wanted: &str) {
        let begun = Instant::now();
        loop {
            self.say();
            if self.wait_for(&format!("{what} ")).contains(wanted) {
                return;
            }
            assert!(begun.elapsed() < SOON, "{what} {wanted}");
        }
    }

    /// Milliseconds from `since_ns` to the event `what`.
    fn ms_until(&self, what: &str, since_ns: u64) -> f64 {
        let line = self.wait_for(what);
        let at: u64 = line.split(' ').next().unwrap().parse().unwrap();
        at.saturating_sub(since_ns) as f64 / 1e6
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

#[test]
fn a_cpuset_that_shrinks_and_grows_is_followed() {
    let Some([first, second]) = two_cpus() else {
        return;
    };
    let both: CpuSet = [first, second].into_iter().collect();
    let Some(cpuset) = Cpuset::new("shrink", &both) else {
        return;
    };
    let mut guest = Guest::start(&cpuset, "shared");
    assert_eq!(guest.masks(), format!("masks {first} {second}"));
    for _ in 0..3 {
        let begun = sys::monotonic_ns();
        cpuset.set(&CpuSet::one(first));
        let shrunk = guest.ms_until("Available", begun);
        guest.wait_for_masks(&format!("masks {first} {first}"));
        guest.wait_until_it_says("placement", "Approximated");
        let begun = sys::monotonic_ns();
        cpuset.set(&both);
        let grown = guest.ms_until("Available", begun);
        guest.wait_for_masks(&format!("masks {first} {second}"));
        guest.wait_until_it_says("placement", "Enforced");
        guest.wait_until_it_says("helper", &both.to_string());
        println!("followed after {shrunk:.1} ms, and back after {grown:.1} ms");
        assert!(shrunk < 50.0 && grown < 50.0);
    }
}

#[test]
fn a_dedicated_cpu_that_goes_offline_is_told() {
    let Some([_, second]) = two_cpus() else {
        return;
    };
    // On a machine others use too, this is not ours to do.
    let switch = PathBuf::from(format!("/sys/devices/system/cpu/cpu{second}/online"));
    if env::var_os("ROTA_TEST_OFFLINE").is_none() || !switch.exists() {
        rota_tests::requires::skip(
            "ROTA_TEST_OFFLINE is not set, or the second CPU cannot go offline",
        );
        return;
    }
    let plan = {
        let mut plan = vm("offline", 2, VmPolicy::default());
        plan.vcpus[1].exclusive = true;
        plan.exclusive = plan.vcpus[1].cpus.clone();
        plan
    };
    let enforcer = Enforcer::prepare(&host(), &plan, &options()).unwrap();
    let bodies = [Body::start(true), Body::start(true)];
    for (vcpu, body) in (0..).zip(&bodies) {
        enforcer.adopt(ThreadRole::Vcpu(vcpu), body.tid).unwrap();
    }
    let (_reconciler, told) = start(&enforcer);
    let wait_for = |wanted: fn(&ReconcileEvent) -> bool| {
        loop {
            let (at, event) = told.recv_timeout(SOON).unwrap();
            if wanted(&event) {
                return at;
            }
        }
    };
    fs::write(&switch, "0").unwrap();
    let gone = Instant::now();
    let lost = wait_for(|event| matches!(event, ReconcileEvent::Lost { vcpu: 1, .. }));
    fs::write(&switch, "1").unwrap();
    let back = Instant::now();
    let regained = wait_for(|event| matches!(event, ReconcileEvent::Regained { vcpu: 1 }));
    while sys::affinity(bodies[1].tid).unwrap() != CpuSet::one(second) {
        assert!(back.elapsed() < SOON, "it is not back on its CPU");
        thread::sleep(Duration::from_millis(1));
    }
    println!(
        "lost told {:?} after, regained {:?} after, back on its CPU {:?} after",
        lost.saturating_duration_since(gone),
        regained.saturating_duration_since(back),
        back.elapsed()
    );
}
