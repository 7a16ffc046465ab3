//! `rota run --sched` with real guests: what is shown at the start is so while the guest runs, and gone when it has ended. In the
//! lab, or on a machine with the real device.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rota_tests::child::{self, Vmm};
use rota_tests::require;

const WAITS: &str = "console=ttyS0 quiet rota.then=shell";

/// One machine after the other: they ask for the same processors.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A ledger of the test's own.
struct Ledger(PathBuf);

impl Ledger {
    fn new(name: &str) -> Ledger {
        let folder = std::env::temp_dir().join(format!("rota-sched-{}-{name}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder for the ledger");
        Ledger(folder)
    }

    fn path(&self) -> String {
        self.0.join("ledger.json").display().to_string()
    }

    fn machines(&self) -> Vec<String> {
        let text = fs::read_to_string(self.path()).unwrap_or_default();
        let ledger: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        let entries = ledger["entries"].as_array().cloned().unwrap_or_default();
        let name =
            |entry: &serde_json::Value| entry["plan"]["request"]["vm"].as_str().map(str::to_owned);
        entries.iter().filter_map(name).collect()
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// `rota run` of a small guest with these further arguments.
fn machine(launcher: Command, ledger: &Ledger, arguments: &[&str]) -> Vmm {
    let mut command = child::run(launcher, "vmlinuz-cloud", WAITS);
    command.args(["--memory", "size=256M", "--ledger", &ledger.path()]);
    Vmm::start(command.args(arguments))
}

fn core() -> Command {
    child::under_softmshv(&["--scheduler", "core"], child::rota_program())
}

/// Threads of a process with this name's beginning: where each may run.
fn allowed(pid: i32, name: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let read = |file: &str| fs::read_to_string(task.path().join(file)).unwrap_or_default();
        let comm = read("comm").trim().to_owned();
        let status = read("status");
        let list = status
            .lines()
            .find_map(|line| line.strip_prefix("Cpus_allowed_list:\t"));
        if comm.starts_with(name) {
            found.push((comm, list.unwrap_or_default().to_owned()));
        }
    }
    found.sort();
    found
}

/// Control groups of machines.
fn groups() -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut folders = vec![PathBuf::from("/sys/fs/cgroup")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                if entry.file_name().to_string_lossy().starts_with("rota") {
                    found.insert(entry.path());
                }
                folders.push(entry.path());
            }
        }
    }
    found
}

fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

macro_rules! sched_tests {
    ($($(#[$attribute:meta])* fn $name:ident() $body:block)*) => {$(
        $(#[$attribute])*
        #[test]
        fn $name() {
            require!(child::bootable());
            if processors() < 2 {
                return rota_tests::requires::skip("takes two processors");
            }
            let _turn = turn();
            $body
        }
    )*};
}

sched_tests! {
    fn dedicated_vcpus_are_where_the_plan_says() {
        let ledger = Ledger::new("dedicated");
        let mut vm = machine(child::rota(), &ledger, &["--cpus", "boot=2", "--sched", "placement=dedicated", "--name", "mine"]);
        vm.wait_for("plan for mine");
        vm.wait_for("enforced");
        vm.wait_for_init();
        let vcpus = allowed(vm.pid(), "vcpu");
        let places: BTreeSet<_> = vcpus.iter().map(|(_, list)| list.clone()).collect();
        assert_eq!(vcpus.len(), 2, "{vcpus:?}");
        assert_eq!(places.len(), 2, "each has its own: {vcpus:?}");
        assert!(places.iter().all(|list| list.parse::<u32>().is_ok()), "one processor: {vcpus:?}");
        assert_eq!(ledger.machines(), ["mine"]);
        // A second one finds nothing left, and is told so.
        let mut second = machine(child::rota(), &ledger, &["--cpus", "boot=2", "--sched", "placement=dedicated", "--name", "second"]);
        if processors() == 2 {
            assert_eq!(second.wait().code(), Some(1), "{}", second.printed());
            let printed = second.printed();
            assert!(printed.contains("second: too few CPUs") && printed.contains("VM mine"), "names what binds:\n{printed}");
            assert!(!printed.contains(child::MARKER));
        }
        drop(second);
        vm.signal(libc::SIGTERM);
        assert_eq!(vm.wait().code(), Some(0), "{}", vm.printed());
        assert_eq!(ledger.machines(), [""; 0]);
        assert_eq!(groups(), BTreeSet::new());
    }

    fn affinity_is_cloud_hypervisors() {
        let ledger = Ledger::new("affinity");
        let mut vm = machine(child::rota(), &ledger, &["--cpus", "boot=2,affinity=[0@[1],1@[0-1]]"]);
        vm.wait_for_init();
        let vcpus = allowed(vm.pid(), "vcpu");
        assert_eq!(vcpus, [("vcpu0".to_owned(), "1".to_owned()), ("vcpu1".to_owned(), "0-1".to_owned())]);
        vm.signal(libc::SIGTERM);
        assert_eq!(vm.wait().code(), Some(0), "{}", vm.printed());
    }

    /// The hypervisor schedules: weight, cap and reserve are its own, and what Linux could only seem to do is refused.
    fn the_hypervisor_is_handed_what_it_takes() {
        let ledger = Ledger::new("core");
        let file = ledger.0.join("report.json");
        let report = file.display().to_string();
        let mut vm = machine(core(), &ledger, &["--sched", "weight=200,cap=50%", "--report", &report]);
        let line = vm.wait_for("CpuWeight");
        assert!(line.contains("delegated") && line.contains("reads back 200"), "{line}");
        vm.wait_for_init();
        vm.signal(libc::SIGTERM);
        assert_eq!(vm.wait().code(), Some(0), "{}", vm.printed());
        // Its thread slept all the time: the hypervisor says how long the VP has run.
        let text = fs::read_to_string(&file).expect("the report");
        let report: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let vcpu = &report["metering"]["vcpus"][0];
        assert!(vcpu["run_ns"].as_u64().is_some_and(|ns| ns > 1_000_000), "{vcpu}");
        assert!(vcpu["wait_ns"]["unmetered"].is_string(), "nobody can tell: {vcpu}");
        let mut refused = machine(core(), &ledger, &["--sched", "gang=soft:20ms", "--report", &file.display().to_string()]);
        assert_eq!(refused.wait().code(), Some(1), "{}", refused.printed());
        let printed = refused.printed();
        assert!(printed.contains("the hypervisor schedules the VPs here (core), and gang=soft:20ms"), "{printed}");
        let text = fs::read_to_string(&file).expect("the report of a refused start");
        let told: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(told["scheduler"]["verdict"], "core", "{text}");
        assert!(told["error"].as_str().is_some_and(|error| printed.contains(error)), "{text}");
        assert_eq!(ledger.machines(), [""; 0]);
    }

    /// Somebody insists that Linux schedules where it does not: nothing is enforced by that, and the thread's time is not the VP's.
    fn what_is_forced_is_in_doubt_and_metered_as_it_is() {
        let ledger = Ledger::new("forced");
        let [report, log] = ["report.json", "log"].map(|file| ledger.0.join(file));
        let [report_path, log_path] = [&report, &log].map(|file| file.display().to_string());
        let forced = ["--sched", "weight=200", "--sched-mode", "root", "--sched-mode-force"];
        let told = ["--report", &report_path, "-v", "--log-file", &log_path];
        let mut vm = machine(core(), &ledger, &[forced, told].concat());
        vm.wait_for("whatever --sched-mode=root says");
        vm.wait_for_init();
        vm.signal(libc::SIGTERM);
        assert_eq!(vm.wait().code(), Some(0), "{}", vm.printed());
        let text = fs::read_to_string(&report).expect("the report");
        let report: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(report["plan"]["mode"], "root", "{text}");
        let effects = report["effects"].to_string();
        assert!(effects.contains("advisory") && !effects.contains("enforced"), "{effects}");
        assert_eq!(report["metering"]["mode"], "core", "{text}");
        let vcpu = &report["metering"]["vcpus"][0];
        assert!(vcpu["run_ns"].as_u64().is_some_and(|ns| ns > 1_000_000), "the register says it: {vcpu}");
        assert!(vcpu["wait_ns"]["unmetered"].is_string(), "{vcpu}");
        // What was decided and why is in the log, too.
        let log = fs::read_to_string(&log).expect("the log");
        for line in ["evidence: ", "plan for ", "  weight "] {
            assert!(log.contains(line), "{line}: {log}");
        }
        // Who will have nothing that is only advisory is refused, and the report says what would have become of it.
        let strict = ["--sched", "weight=200,strict=on", "--sched-mode", "root", "--sched-mode-force", "--report", &report_path];
        let mut refused = machine(core(), &ledger, &strict);
        assert_eq!(refused.wait().code(), Some(1), "{}", refused.printed());
        let text = fs::read_to_string(&report_path).expect("the report of a refused start");
        let report: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!((&report["ended"], &report["scheduler"]["verdict"]), (&"error".into(), &"core".into()), "{text}");
        assert!(report["effects"].to_string().contains("advisory"), "{text}");
        assert!(report["error"].as_str().is_some_and(|error| error.contains("whatever --sched-mode")), "{text}");
    }

    /// What a killed machine leaves is removed by the next one that starts.
    fn a_killed_machine_is_cleared_away_by_the_next() {
        let ledger = Ledger::new("killed");
        let mut killed = machine(child::rota(), &ledger, &["--cpus", "boot=2", "--sched", "placement=dedicated,weight=200", "--name", "killed"]);
        killed.wait_for_init();
        killed.signal(libc::SIGKILL);
        killed.wait();
        let mut next = machine(child::rota(), &ledger, &["--cpus", "boot=2", "--sched", "placement=dedicated", "--name", "next"]);
        next.wait_for_init();
        assert_eq!(ledger.machines(), ["next"], "its processors are free again");
        next.signal(libc::SIGTERM);
        assert_eq!(next.wait().code(), Some(0), "{}", next.printed());
        assert_eq!(groups(), BTreeSet::new());
    }

    /// Wherever it starts: where the hypervisor schedules no groups are made, and a machine without a policy asks for none.
    fn a_killed_machine_is_cleared_away_by_any_other() {
        let ledger = Ledger::new("killed-any");
        for (launcher, policy) in [(core(), &["--sched", "weight=200"][..]), (child::rota(), &[])] {
            let mut killed = machine(child::rota(), &ledger, &["--cpus", "boot=2", "--sched", "placement=dedicated,weight=200", "--name", "killed"]);
            killed.wait_for_init();
            let made = groups();
            assert_ne!(made, BTreeSet::new());
            killed.signal(libc::SIGKILL);
            killed.wait();
            let mut next = machine(launcher, &ledger, policy);
            next.wait_for_init();
            assert_eq!(groups(), BTreeSet::new(), "all of {made:?} is gone");
            next.signal(libc::SIGTERM);
            assert_eq!(next.wait().code(), Some(0), "{}", next.printed());
            assert_eq!(ledger.machines(), [""; 0]);
        }
    }

    fn metrics_are_there_while_it_runs_and_gone_afterwards() {
        let ledger = Ledger::new("metrics");
        let file = ledger.0.join("vm.prom");
        let path = file.display().to_string();
        let mut vm = machine(child::rota(), &ledger, &["--cpus", "boot=2", "--sched", "weight=200", "--name", "seen", "--metrics", &path]);
        vm.wait_for_init();
        let run_time = || {
            let text = fs::read_to_string(&file).expect("metrics");
            let line = text.lines().find(|line| line.starts_with("rota_vcpu_run_seconds_total{vm=\"seen\",vcpu=\"0\"} "));
            line.and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).unwrap_or_else(|| panic!("{text}"))
        };
        let first = run_time();
        let deadline = std::time::Instant::now() + child::patience();
        while run_time() <= first {
            assert!(std::time::Instant::now() < deadline, "the file is not written anew");
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        vm.signal(libc::SIGTERM);
        assert_eq!(vm.wait().code(), Some(0), "{}", vm.printed());
        assert!(!file.exists());
    }

    fn the_report_meters_each_vcpu() {
        let ledger = Ledger::new("metered");
        let file = ledger.0.join("report.json");
        let report = file.display().to_string();
        let mut vm = machine(child::rota(), &ledger, &["--cpus", "boot=2", "--sched", "weight=200", "--report", &report]);
        vm.wait_for_init();
        vm.signal(libc::SIGTERM);
        assert_eq!(vm.wait().code(), Some(0), "{}", vm.printed());
        let text = fs::read_to_string(&file).expect("the report");
        let report: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let vcpus = report["metering"]["vcpus"].as_array().expect("vCPUs");
        assert_eq!(vcpus.len(), 2, "{text}");
        for (index, vcpu) in vcpus.iter().enumerate() {
            assert!(vcpu["run_ns"].as_u64().is_some_and(|ns| ns > 0), "vCPU {index} ran: {vcpu}");
            // The end itself is a kick.
            assert!(vcpu["kick_to_run"]["count"].as_u64().is_some_and(|count| count > 0), "{vcpu}");
        }
        // The serial port has interrupted somebody, and its handler has read a register.
        let known = |vcpu: &serde_json::Value| vcpu["irq_to_run"]["count"].as_u64().is_some_and(|count| count > 0);
        assert!(vcpus.iter().any(known), "{text}");
        assert!(vcpus.iter().all(|vcpu| known(vcpu) || vcpu["irq_to_run"]["unmetered"].is_string()), "{text}");
        assert!(vcpus[0]["exits"]["port_write"]["count"].as_u64().is_some_and(|count| count > 0), "{text}");
        assert!(report["effects"].as_array().is_some_and(|effects| !effects.is_empty()), "{text}");
    }
}
