//! Turns between VMs whose vCPUs are threads, on this machine's control groups.

use std::{
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::{GangSignal, Rotator, RotatorState};
use crate::{
    Claim, Effect, EnforceOptions, Enforcer, Gang, Ledger, Outcome, Owner, Plan, ThreadRole, Tid,
    VmPlan, VmPolicy,
    enforce::{
        group_name,
        tests::{Body, host, options, vm},
    },
    sys,
};

/// Whoever waits longer waits in vain.
const LONG: Duration = Duration::from_secs(10);

/// A ledger that goes with the test. Tests that measure do so one after the other: they know nothing of each other's ledgers.
struct Scratch(
    PathBuf,
    #[expect(dead_code, reason = "held, not looked at")] MutexGuard<'static, ()>,
);

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("rota-turns-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).unwrap();
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        Self(path, turn)
    }

    fn ledger(&self) -> Ledger {
        Ledger::open(Some(&self.0.join("ledger.json"))).unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Two threads that wait for each other, spinning, over and over.
struct Guest {
    tids: Vec<Tid>,
    barriers: Arc<AtomicU64>,
    end: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Guest {
    fn start() -> Self {
        let (barriers, end) = (
            Arc::new(AtomicU64::new(0)),
            Arc::new(AtomicBool::new(false)),
        );
        let steps = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let (tell, told) = std::sync::mpsc::channel();
        let threads = (0..2)
            .map(|own| {
                let (steps, barriers, end) =
                    (Arc::clone(&steps), Arc::clone(&barriers), Arc::clone(&end));
                let tell = tell.clone();
                thread::spawn(move || {
                    tell.send((own, Tid::current())).unwrap();
                    let mut step = 0;
                    while !end.load(Relaxed) {
                        for _ in 0..2000 {
                            std::hint::spin_loop();
                        }
                        step += 1;
                        steps[own].store(step, Relaxed);
                        while steps[1 - own].load(Relaxed) < step && !end.load(Relaxed) {
                            std::hint::spin_loop();
                        }
                        if own == 0 {
                            barriers.fetch_add(1, Relaxed);
                        }
                    }
                })
            })
            .collect();
        let mut tids: Vec<(usize, Tid)> = (0..2).map(|_| told.recv().unwrap()).collect();
        tids.sort_unstable();
        Self {
            tids: tids.into_iter().map(|(_, tid)| tid).collect(),
            barriers,
            end,
            threads,
        }
    }

    fn adopt_into(&self, enforcer: &Enforcer<'_>) {
        for (vcpu, tid) in self.tids.iter().enumerate() {
            enforcer.adopt(ThreadRole::Vcpu(vcpu as u32), *tid).unwrap();
        }
    }

    fn run_ns(&self) -> u64 {
        self.tids.iter().map(|tid| run_ns(*tid)).sum()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.end.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn claim(ledger: &Ledger, plan: &VmPlan) -> Claim {
    ledger
        .claim(Owner::current(plan.request.vm.0.clone()).unwrap(), |_| {
            Ok(Plan {
                vms: vec![plan.clone()],
                adjusted: Vec::new(),
            })
        })
        .unwrap()
}

fn gang(quantum_ms: u32) -> VmPolicy {
    VmPolicy {
        gang: Gang::Soft {
            quantum_us: quantum_ms * 1000,
        },
        ..VmPolicy::default()
    }
}

/// Owner and group names carry the uuid of the test, so that VMs of one process are told apart.
fn enforcer(plan: &VmPlan) -> Enforcer<'static> {
    Enforcer::prepare(&host(), plan, &options()).unwrap()
}

fn lever_of(enforcer: &Enforcer<'_>) -> Option<Outcome> {
    enforcer
        .effects()
        .into_iter()
        .find(|effect: &Effect| effect.control == "gang" || effect.control == "rotate")
        .map(|effect| effect.outcome)
}

fn enough_cpus() -> bool {
    let enough = thread::available_parallelism().is_ok_and(|cpus| cpus.get() >= 2);
    if !enough {
        rota_tests::requires::skip("two CPUs are needed");
    }
    enough
}

#[test]
fn gangs_take_turns_and_each_gets_its_half() {
    if !enough_cpus() {
        return;
    }
    let scratch = Scratch::new("half");
    let ledger = scratch.ledger();
    let plans = [vm("gang-a", 2, gang(20)), vm("gang-b", 2, gang(20))];
    let enforcers = plans.each_ref().map(enforcer);
    println!("{:?}", lever_of(&enforcers[0]));
    let guests = [Guest::start(), Guest::start()];
    for (guest, enforcer) in guests.iter().zip(&enforcers) {
        guest.adopt_into(enforcer);
    }
    let claims = plans.each_ref().map(|plan| claim(&ledger, plan));
    let rotators = [0, 1].map(|index| {
        Rotator::start(&enforcers[index], &claims[index], None)
            .unwrap()
            .expect("turns")
    });
    thread::sleep(Duration::from_millis(100));
    let before = guests.each_ref().map(Guest::run_ns);
    thread::sleep(Duration::from_millis(800));
    let run: Vec<u64> = guests
        .iter()
        .zip(before)
        .map(|(guest, before)| guest.run_ns() - before)
        .collect();
    let share = run[0] as f64 / (run[0] + run[1]) as f64;
    assert!((0.25..0.75).contains(&share), "{run:?}");
    for rotator in &rotators {
        let state = rotator.state();
        // On a busy machine some are late, or missed altogether.
        assert!(state.turns.load(Relaxed) >= 8);
        println!(
            "turns {} own {} latest {} us",
            state.turns.load(Relaxed),
            state.own.load(Relaxed),
            state.latest_ns.load(Relaxed) / 1000
        );
    }

    // One goes: the other has the CPUs, and takes no turns any more.
    let [first, second] = claims;
    drop(first);
    let begun = Instant::now();
    while rotators[1].state().active.load(Relaxed) {
        assert!(begun.elapsed() < LONG);
        thread::sleep(Duration::from_millis(5));
    }
    drop((rotators, second));
}

#[test]
fn without_groups_turns_are_taken_by_threads() {
    if !sys::is_root() {
        rota_tests::requires::skip("to leave SCHED_IDLE takes a privilege");
        return;
    }
    let scratch = Scratch::new("threads");
    let ledger = scratch.ledger();
    let plans = ["bare-a", "bare-b"].map(|name| vm(name, 1, gang(20)));
    let bare = EnforceOptions {
        bare: true,
        ..options()
    };
    let enforcers = plans
        .each_ref()
        .map(|plan| Enforcer::prepare(&host(), plan, &bare).unwrap());
    let said = lever_of(&enforcers[0]).unwrap().to_string();
    assert!(said.contains("SCHED_IDLE"), "{said}");
    let bodies = [Body::start(false), Body::start(false)];
    for (enforcer, body) in enforcers.iter().zip(&bodies) {
        enforcer.adopt(ThreadRole::Vcpu(0), body.tid).unwrap();
    }
    let claims = plans.each_ref().map(|plan| claim(&ledger, plan));
    let rotators = [0, 1].map(|index| {
        Rotator::start(&enforcers[index], &claims[index], None)
            .unwrap()
            .expect("turns")
    });
    let held_back = || {
        bodies
            .each_ref()
            .map(|body| sys::attributes(body.tid).unwrap().policy == libc::SCHED_IDLE as u32)
    };
    let (mut first, mut second) = (0, 0);
    for _ in 0..100 {
        thread::sleep(Duration::from_millis(5));
        match held_back() {
            [true, false] => first += 1,
            [false, true] => second += 1,
            _ => {}
        }
    }
    println!("held back {first} and {second} of 100 times");
    assert!(first > 15 && second > 15);
    drop(rotators);
    assert_eq!(held_back(), [false; 2]);
}

#[test]
fn a_weight_survives_being_held_back() {
    let plan = vm(
        "heavy",
        1,
        VmPolicy {
            weight: Some(300),
            ..gang(20)
        },
    );
    let _scratch = Scratch::new("heavy");
    let enforcer = enforcer(&plan);
    if lever_of(&enforcer) != Some(Outcome::Enforced) {
        rota_tests::requires::skip("cpu.idle cannot be used here");
        return;
    }
    let shared = enforcer.shared();
    let name = group_name(&plan.request.vm, &options().owner, "vcpu");
    let group = Path::new(&shared.arena().unwrap()).join(name);
    let weight = || {
        let read = |file| std::fs::read_to_string(group.join(file));
        read("cpu.shares").or_else(|_| read("cpu.weight")).unwrap()
    };
    let before = weight();
    let lever = shared.lever(0, &[]).unwrap();
    lever.set(true).unwrap();
    assert_ne!(weight(), before);
    lever.set(false).unwrap();
    assert_eq!(weight(), before);
}

#[test]
fn a_rotator_that_hangs_ends_the_turns_for_everybody() {
    if !enough_cpus() {
        return;
    }
    let scratch = Scratch::new("hangs");
    let ledger = scratch.ledger();
    let plans = [vm("hang-a", 2, gang(20)), vm("hang-b", 2, gang(20))];
    let enforcers = plans.each_ref().map(enforcer);
    if lever_of(&enforcers[0]) != Some(Outcome::Enforced) {
        rota_tests::requires::skip("cpu.idle cannot be used here");
        return;
    }
    let claims = plans.each_ref().map(|plan| claim(&ledger, plan));
    let rotators = [0, 1].map(|index| {
        Rotator::start(&enforcers[index], &claims[index], None)
            .unwrap()
            .expect("turns")
    });
    thread::sleep(Duration::from_millis(200));
    rotators[0].stall();
    let begun = Instant::now();
    while rotators[1].state().suspensions.load(Relaxed) == 0 {
        assert!(begun.elapsed() < LONG);
        thread::sleep(Duration::from_millis(5));
    }
    println!("noticed after {:?}", begun.elapsed());
    thread::sleep(Duration::from_millis(30));
    assert!(!rotators[1].state().active.load(Relaxed));
    let said = lever_of(&enforcers[1]).unwrap().to_string();
    assert!(said.contains("stands still"), "{said}");
}

/// Waits until the effect is as it should be.
fn wait_for(enforcer: &Enforcer<'_>, what: &str, right: impl Fn(&Outcome) -> bool) {
    let begun = Instant::now();
    loop {
        let is = lever_of(enforcer).unwrap();
        if right(&is) {
            println!("{what} after {:?}: {is}", begun.elapsed());
            return;
        }
        assert!(begun.elapsed() < LONG, "{what}: {is}");
        thread::sleep(Duration::from_millis(2));
    }
}

fn says(words: &str) -> impl Fn(&Outcome) -> bool {
    move |is| matches!(is, Outcome::Advisory { why } if why.contains(words))
}

#[test]
fn a_lever_that_does_not_move_is_told_and_tried_again() {
    if !enough_cpus() {
        return;
    }
    let scratch = Scratch::new("sticks");
    let ledger = scratch.ledger();
    let plans = [vm("stick-a", 2, gang(5)), vm("stick-b", 2, gang(5))];
    let enforcers = plans.each_ref().map(enforcer);
    let usual = lever_of(&enforcers[0]).unwrap();
    if lever_of(&enforcer(&vm("stick", 1, gang(50)))) != Some(Outcome::Enforced) {
        rota_tests::requires::skip("cpu.idle cannot be used here");
        return;
    }
    let claims = plans.each_ref().map(|plan| claim(&ledger, plan));
    let rotators = [0, 1].map(|index| {
        Rotator::start(&enforcers[index], &claims[index], None)
            .unwrap()
            .expect("turns")
    });
    thread::sleep(Duration::from_millis(50));
    rotators[0].stick(true);
    wait_for(&enforcers[0], "stuck", says("does not move"));
    // The other one sees that nothing moves here.
    wait_for(&enforcers[1], "noticed", says("stands still"));
    rotators[0].stick(false);
    for (enforcer, rotator) in enforcers.iter().zip(&rotators) {
        wait_for(enforcer, "free", |is| *is == usual);
        assert!(rotator.state().active.load(Relaxed));
    }
    drop(rotators);
    wait_for(&enforcers[0], "ended", says("has ended"));
}

#[test]
fn a_ledger_that_cannot_be_read_is_told_and_read_again() {
    let scratch = Scratch::new("unread");
    let ledger = scratch.ledger();
    let plan = vm("unread", 1, gang(20));
    let enforcer = enforcer(&plan);
    let usual = lever_of(&enforcer).unwrap();
    if usual != Outcome::Enforced {
        rota_tests::requires::skip("cpu.idle cannot be used here");
        return;
    }
    let claim = claim(&ledger, &plan);
    let rotator = Rotator::start(&enforcer, &claim, None)
        .unwrap()
        .expect("turns");
    thread::sleep(Duration::from_millis(50));
    let replace = |text: &str| {
        let new = ledger.path().with_extension("test");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, ledger.path()).unwrap();
    };
    let right = std::fs::read_to_string(ledger.path()).unwrap();
    replace("no ledger");
    let body = Body::start(false);
    enforcer.adopt(ThreadRole::Vcpu(0), body.tid).unwrap();
    // Nothing tells of a new thread: it is seen with the next change, or in a second.
    replace("no ledger either");
    wait_for(&enforcer, "damaged", says("is no ledger"));
    replace(&right);
    wait_for(&enforcer, "repaired", |is| *is == usual);
    drop(rotator);
}

/// A guest that gets `gain` times as much done while turns are taken.
struct Signal {
    state: Arc<OnceLock<Arc<RotatorState>>>,
    gain: u64,
    done: u64,
    counted_ns: u64,
}

impl GangSignal for Signal {
    fn progress(&mut self) -> Option<u64> {
        let now = sys::monotonic_ns();
        let turns = self.state.get()?.active.load(Relaxed);
        self.done += (now - self.counted_ns) * if turns { self.gain } else { 1 };
        self.counted_ns = now;
        Some(self.done)
    }

    fn spins(&mut self) -> Option<u64> {
        None
    }
}

/// Two adaptive VMs on the same CPUs: are turns taken once they have been tried?
fn adaptive(name: &str, gain: u64) -> Vec<bool> {
    const WINDOW: Duration = Duration::from_millis(400);
    let scratch = Scratch::new(name);
    let ledger = scratch.ledger();
    let policy = || VmPolicy {
        gang: Gang::Adaptive { quantum_us: 20_000 },
        ..VmPolicy::default()
    };
    let names = [format!("{name}-a"), format!("{name}-b")];
    let plans = names.each_ref().map(|name| vm(name, 2, policy()));
    let enforcers = plans.each_ref().map(enforcer);
    let claims = plans.each_ref().map(|plan| claim(&ledger, plan));
    let rotators = [0, 1].map(|index| {
        let state = Arc::default();
        let signal = Signal {
            state: Arc::clone(&state),
            gain,
            done: 0,
            counted_ns: sys::monotonic_ns(),
        };
        let (enforcer, claim) = (&enforcers[index], &claims[index]);
        let rotator = Rotator::start_with(enforcer, claim, Some(Box::new(signal)), WINDOW);
        let rotator = rotator.unwrap().expect("turns");
        state.set(rotator.shared_state()).unwrap();
        rotator
    });
    thread::sleep(WINDOW * 2 + Duration::from_millis(200));
    let on = rotators
        .iter()
        .map(|rotator| rotator.state().active.load(Relaxed))
        .collect();
    for entry in &ledger.read().unwrap().entries {
        let rotation = entry.rotation.as_ref().unwrap();
        println!("{} gains {:?}", entry.plan.request.vm, rotation.gain_milli);
    }
    on
}

#[test]
fn adaptive_gangs_that_gain_take_turns() {
    assert_eq!(adaptive("gains", 2), [true; 2]);
}

#[test]
fn adaptive_gangs_that_gain_nothing_do_not() {
    assert_eq!(adaptive("loses", 1), [false; 2]);
}

#[test]
fn vcpus_of_one_vm_take_turns_one_by_one() {
    if !enough_cpus() {
        return;
    }
    let scratch = Scratch::new("rotate");
    let ledger = scratch.ledger();
    let policy = VmPolicy {
        rotate_us: Some(20_000),
        ..VmPolicy::default()
    };
    // Three on two CPUs, wherever they like.
    let mut plan = vm("rotate", 3, policy);
    for vcpu in &mut plan.vcpus {
        vcpu.cpus = plan.helpers.clone();
    }
    let enforcer = enforcer(&plan);
    println!("{:?}", lever_of(&enforcer));
    let bodies = [(); 3].map(|()| Body::start(true));
    for (vcpu, body) in (0..).zip(&bodies) {
        enforcer.adopt(ThreadRole::Vcpu(vcpu), body.tid).unwrap();
    }
    let claim = claim(&ledger, &plan);
    let rotator = Rotator::start(&enforcer, &claim, None).unwrap().unwrap();
    // Other load on the machine blurs it, so one stretch of time without is enough.
    let even = (0..20).any(|_| {
        let before = bodies.each_ref().map(|body| run_ns(body.tid));
        thread::sleep(Duration::from_millis(900));
        let run: Vec<u64> = bodies
            .iter()
            .zip(before)
            .map(|(body, before)| run_ns(body.tid) - before)
            .collect();
        println!("shares {run:?}");
        let total: u64 = run.iter().sum();
        run.iter()
            .all(|run| (0.25..0.42).contains(&(*run as f64 / total as f64)))
    });
    assert!(even, "without turns, one vCPU is alone on a CPU");
    drop(rotator);
}

fn run_ns(tid: Tid) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/self/task/{}/schedstat", tid.0)).unwrap();
    stat.split(' ').next().unwrap().parse().unwrap()
}

/// Not a test: a VM in a process of its own, which takes turns by the ledger `ROTA_TURNS` for as long as its input is open. A line
/// of input is answered with what its rotator has done.
#[test]
fn process() {
    let Some(path) = std::env::var_os("ROTA_TURNS") else {
        return;
    };
    let ledger = Ledger::open(Some(Path::new(&path))).unwrap();
    let plan = vm(&format!("turns-{}", std::process::id()), 2, gang(20));
    let enforcer = enforcer(&plan);
    let guest = Guest::start();
    guest.adopt_into(&enforcer);
    let claim = claim(&ledger, &plan);
    let rotator = Rotator::start(&enforcer, &claim, None)
        .unwrap()
        .expect("turns");
    println!("ready");
    while let Some(Ok(_)) = std::io::stdin().lines().next() {
        let state = rotator.state();
        println!(
            "state {} {} {} {}",
            state.turns.load(Relaxed),
            state.own.load(Relaxed),
            state.suspensions.load(Relaxed),
            u64::from(state.active.load(Relaxed))
        );
    }
}

struct Process {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Process {
    fn start(ledger: &Ledger) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "gang::tests::process", "--nocapture"])
            .env("ROTA_TURNS", ledger.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut process = Self { child, output };
        process.wait_for("ready");
        process
    }

    fn wait_for(&mut self, what: &str) -> String {
        let mut line = String::new();
        while !line.contains(what) {
            line.clear();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "{what}");
        }
        line
    }

    /// Turns, own turns, suspensions, active.
    fn state(&mut self) -> Vec<u64> {
        writeln!(self.child.stdin.as_mut().unwrap(), "state").unwrap();
        let line = self.wait_for("state ");
        let numbers = line[line.find("state ").unwrap() + 6..].split_whitespace();
        numbers.map(|number| number.parse().unwrap()).collect()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn processes_that_know_only_the_ledger_agree_whose_turn_it_is() {
    if !enough_cpus() {
        return;
    }
    let scratch = Scratch::new("processes");
    let ledger = scratch.ledger();
    let mut processes = [(); 2].map(|()| Process::start(&ledger));
    thread::sleep(Duration::from_millis(1000));
    for process in &mut processes {
        let state = process.state();
        println!("{state:?}");
        let [turns, own, _, active] = state[..] else {
            panic!("{state:?}");
        };
        // On a busy machine some are late, or missed altogether.
        assert!(turns > 8 && active == 1, "{state:?}");
        assert!(own * 4 >= turns && own * 4 <= turns * 3, "{state:?}");
    }
    // One is killed: the other goes on alone, and untouched.
    let [first, mut second] = processes;
    drop(first);
    let begun = Instant::now();
    while second.state()[3] == 1 {
        assert!(begun.elapsed() < LONG);
        thread::sleep(Duration::from_millis(10));
    }
    println!("alone after {:?}", begun.elapsed());
    drop(second);
    // What the killed ones have left goes with the next start.
    drop(enforcer(&vm("turns-next", 2, VmPolicy::default())));
}

/// Barriers per second and two CPUs of two guests that spin, placed and in turns: `cargo test -p scheduler gain -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement, of half a minute"]
fn the_gain_for_guests_that_spin() {
    let scratch = Scratch::new("gain");
    let ledger = scratch.ledger();
    let measure = |policies: [VmPolicy; 2]| {
        let mut index = 0;
        let plans = policies.map(|policy| {
            index += 1;
            vm(&format!("gain-{index}"), 2, policy)
        });
        let enforcers = plans.each_ref().map(enforcer);
        let guests = [Guest::start(), Guest::start()];
        for (guest, enforcer) in guests.iter().zip(&enforcers) {
            guest.adopt_into(enforcer);
        }
        let claims = plans.each_ref().map(|plan| claim(&ledger, plan));
        let rotators =
            [0, 1].map(|index| Rotator::start(&enforcers[index], &claims[index], None).unwrap());
        thread::sleep(Duration::from_millis(200));
        let count = || -> u64 {
            guests
                .iter()
                .map(|guest| guest.barriers.load(Relaxed))
                .sum()
        };
        let run = || -> u64 { guests.iter().map(Guest::run_ns).sum() };
        let before = (count(), run());
        thread::sleep(Duration::from_secs(2));
        // Per two CPU seconds: this machine may have other things to do.
        let rate = (count() - before.0) as f64 * 2e6 / (run() - before.1) as f64;
        drop(rotators);
        rate
    };
    for _ in 0..3 {
        let placed = measure([VmPolicy::default(), VmPolicy::default()]);
        let turns = [20, 40].map(|quantum| measure([gang(quantum), gang(quantum)]));
        println!(
            "thousand barriers/s: placed {placed:.1}, turns of 20 ms {:.1}, of 40 ms {:.1}",
            turns[0], turns[1]
        );
    }
}
