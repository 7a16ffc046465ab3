//! The ledger against damage, death and crowds.
//!
//! What happens to processes is tried with processes: this test binary starts itself again and has the copy run one test
//! ([`writer`]) that does nothing unless it is told to by its environment.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use super::*;
use crate::{
    CpuSet, Placement, Plan, Rejection, Request, SchedMode, VcpuPlan, VmPlan, VmPolicy,
    policy::Cores,
};

/// A directory that goes with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = env::temp_dir().join(format!("rota-ledger-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn ledger(&self) -> Ledger {
        Ledger::open(Some(&self.0.join("ledger.json"))).unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// One vCPU alone on CPU `cpu`.
fn dedicated(vm: &str, cpu: u32) -> VmPlan {
    VmPlan {
        request: Request {
            vm: vm.into(),
            vcpus: 1,
            threads_per_core: 1,
            memory_mib: 64,
            policy: VmPolicy {
                placement: Placement::Dedicated { cores: Cores::Any },
                ..VmPolicy::default()
            },
        },
        mode: SchedMode::Root,
        vcpus: vec![VcpuPlan {
            vcpu: 0,
            cpus: CpuSet::one(cpu),
            exclusive: true,
            why: "free".into(),
        }],
        exclusive: CpuSet::one(cpu),
        helpers: CpuSet::one(0),
        pool: CpuSet::new(),
        helpers_why: "the rest".into(),
        memory_nodes: Vec::new(),
        threads_per_core: 1,
        notes: Vec::new(),
    }
}

/// The lowest CPU of 64 that nobody has.
fn first_free(vm: &str, state: &LedgerState) -> Plan {
    let mut taken = CpuSet::new();
    for entry in &state.entries {
        taken.add(&entry.plan.exclusive);
    }
    let cpu = (&CpuSet::first(64) - &taken).iter().next().unwrap();
    Plan {
        vms: vec![dedicated(vm, cpu)],
        adjusted: Vec::new(),
    }
}

fn owner() -> Owner {
    Owner::current("test").unwrap()
}

fn assert_no_cpu_twice(state: &LedgerState) {
    let mut seen = CpuSet::new();
    for entry in &state.entries {
        assert!(entry.plan.exclusive.is_disjoint(&seen), "{state:?}");
        seen.add(&entry.plan.exclusive);
    }
}

#[test]
fn a_claim_is_there_until_it_is_dropped() {
    let scratch = Scratch::new("claim");
    let ledger = scratch.ledger();
    assert_eq!(ledger.read().unwrap().version, LedgerState::VERSION);
    let claim = ledger
        .claim(owner(), |state| Ok(first_free("a", state)))
        .unwrap();
    let second = ledger
        .claim(owner(), |state| Ok(first_free("b", state)))
        .unwrap();
    assert_eq!(ledger.read().unwrap().entries.len(), 2);
    assert_no_cpu_twice(&ledger.read().unwrap());
    let rotation = Rotation {
        since_ns: 1,
        adaptive: false,
        arena: "/".into(),
        gain_milli: None,
    };
    claim.entry().set_rotation(Some(rotation.clone())).unwrap();
    let state = ledger.read().unwrap();
    assert_eq!(state.entry(&"a".into()).unwrap().rotation, Some(rotation));
    assert_eq!(claim.current().unwrap().as_ref(), Some(&claim.plan()));
    drop(claim);
    assert!(ledger.read().unwrap().entry(&"a".into()).is_none());
    drop(second);
    assert!(ledger.read().unwrap().entries.is_empty());
}

#[test]
fn a_name_in_use_is_refused() {
    let scratch = Scratch::new("name");
    let ledger = scratch.ledger();
    let _first = ledger
        .claim(owner(), |state| Ok(first_free("a", state)))
        .unwrap();
    let other = Owner::current("other uuid").unwrap();
    let error = ledger
        .claim(other, |state| Ok(first_free("a", state)))
        .unwrap_err();
    assert!(
        error.to_string().contains("another name (--name NAME)"),
        "{error}"
    );
    assert_eq!(ledger.read().unwrap().entries.len(), 1);
}

#[test]
fn a_ledger_without_a_place_says_how_to_name_another() {
    let scratch = Scratch::new("place");
    let file = scratch.0.join("file");
    fs::write(&file, "").unwrap();
    let error = Ledger::open(Some(&file.join("rota/ledger.json"))).unwrap_err();
    assert!(error.to_string().contains("(--ledger FILE)"), "{error}");
}

#[test]
fn plans_of_others_are_adjusted_in_the_same_step() {
    let scratch = Scratch::new("adjust");
    let ledger = scratch.ledger();
    let first = ledger
        .claim(owner(), |state| Ok(first_free("a", state)))
        .unwrap();
    let _second = ledger
        .claim(owner(), |_| {
            Ok(Plan {
                vms: vec![dedicated("b", 0)],
                adjusted: vec![dedicated("a", 7)],
            })
        })
        .unwrap();
    assert_eq!(first.current().unwrap().unwrap().exclusive, CpuSet::one(7));
}

#[test]
fn a_vm_is_planned_again_or_keeps_what_it_has() {
    let scratch = Scratch::new("again");
    let ledger = scratch.ledger();
    let claim = ledger
        .claim(owner(), |state| Ok(first_free("a", state)))
        .unwrap();
    let rotation = Rotation {
        since_ns: 1,
        adaptive: false,
        arena: "here".into(),
        gain_milli: None,
    };
    claim.entry().set_rotation(Some(rotation.clone())).unwrap();
    let moved = claim.replan(|state| {
        assert_eq!(state.entries.len(), 1, "it sees itself");
        Ok(Plan {
            vms: vec![dedicated("a", 7)],
            adjusted: Vec::new(),
        })
    });
    assert_eq!(moved.unwrap().exclusive, CpuSet::one(7));
    assert_eq!(claim.plan().exclusive, CpuSet::one(7));
    let state = ledger.read().unwrap();
    assert_eq!(state.entries[0].plan, claim.plan());
    assert_eq!(
        state.entries[0].rotation,
        Some(rotation),
        "it still takes turns"
    );
    let refused = claim.replan(|_| {
        Err(Rejection {
            reasons: Vec::new(),
            nearest: None,
        })
    });
    assert!(matches!(refused, Err(ClaimError::Rejected(_))));
    assert_eq!(ledger.read().unwrap(), state);
    assert_eq!(claim.plan().exclusive, CpuSet::one(7));
}

#[test]
fn what_a_dead_process_has_left_is_dropped() {
    let scratch = Scratch::new("dead");
    let ledger = scratch.ledger();
    let gone = Owner {
        start_time: 1,
        ..owner()
    };
    std::mem::forget(
        ledger
            .claim(gone, |state| Ok(first_free("gone", state)))
            .unwrap(),
    );
    assert!(ledger.read().unwrap().entries.is_empty());
    let claim = ledger
        .claim(owner(), |state| Ok(first_free("a", state)))
        .unwrap();
    assert_eq!(claim.plan().exclusive, CpuSet::one(0));
    assert!(!fs::read_to_string(ledger.path()).unwrap().contains("gone"));
}

#[test]
fn a_ledger_cut_off_anywhere_is_refused_and_left_alone() {
    let scratch = Scratch::new("cut");
    let ledger = scratch.ledger();
    let _claim = ledger
        .claim(owner(), |state| Ok(first_free("a", state)))
        .unwrap();
    let whole = fs::read_to_string(ledger.path()).unwrap();
    for length in 0..whole.trim_end().len() {
        fs::write(ledger.path(), &whole[..length]).unwrap();
        let error = ledger.read().unwrap_err();
        assert!(matches!(error, LedgerError::Damaged { .. }), "{error}");
        assert!(error.to_string().contains("`rm /"), "{error}");
        assert!(
            ledger
                .claim(owner(), |state| Ok(first_free("b", state)))
                .is_err()
        );
        assert_eq!(fs::read_to_string(ledger.path()).unwrap(), whole[..length]);
    }
    fs::write(ledger.path(), whole).unwrap();
}

#[test]
fn a_newer_ledger_is_refused_by_its_version_whatever_else_it_says() {
    let scratch = Scratch::new("newer");
    let ledger = scratch.ledger();
    let newer = r#"{"version": 7, "vms": {"a": 1}}"#;
    fs::write(ledger.path(), newer).unwrap();
    let error = ledger
        .claim(owner(), |state| Ok(first_free("a", state)))
        .unwrap_err();
    let said = error.to_string();
    assert!(
        said.contains("version 7") && said.contains("newer Rota"),
        "{said}"
    );
    assert_eq!(fs::read_to_string(ledger.path()).unwrap(), newer);
}

/// Not a test: what a copy of this binary runs. `ROTA_LEDGER_WRITER` is the ledger; it claims and gives back for as many
/// milliseconds as `ROTA_LEDGER_FOR` says, and dies at the step `ROTA_LEDGER_DIE_AT` says.
#[test]
fn writer() {
    let Some(path) = env::var_os("ROTA_LEDGER_WRITER") else {
        return;
    };
    let ledger = Ledger::open(Some(Path::new(&path))).unwrap();
    let number = |name| env::var(name).ok().and_then(|text| text.parse().ok());
    let duration = Duration::from_millis(number("ROTA_LEDGER_FOR").unwrap_or(0));
    let name = format!("vm-{}", std::process::id());
    let begun = Instant::now();
    let mut claims = 0;
    loop {
        let claim = ledger
            .claim(owner(), |state| Ok(first_free(&name, state)))
            .unwrap();
        use_alone(
            Path::new(&path),
            claim.plan().exclusive.iter().next().unwrap(),
        );
        drop(claim);
        claims += 1;
        if begun.elapsed() >= duration {
            break;
        }
    }
    println!("claims {claims}");
}

/// Fails if another process that lives uses `cpu` too.
fn use_alone(ledger: &Path, cpu: u32) {
    let mark = ledger.with_file_name(format!("cpu{cpu}"));
    if let Ok(other) = fs::read_to_string(&mark)
        && let Ok(pid) = other.parse::<u32>()
        && pid != std::process::id()
    {
        assert!(start_time(pid).is_none(), "CPU {cpu} is used by {pid} too");
    }
    fs::write(&mark, std::process::id().to_string()).unwrap();
    std::thread::yield_now();
    assert_eq!(
        fs::read_to_string(&mark).unwrap(),
        std::process::id().to_string()
    );
    fs::remove_file(&mark).unwrap();
}

fn start_writer(ledger: &Ledger, die_at: Option<u64>, for_ms: u64) -> Child {
    let mut command = Command::new(env::current_exe().unwrap());
    command
        .args(["--exact", "ledger::tests::writer", "--nocapture"])
        .env("ROTA_LEDGER_WRITER", ledger.path())
        .env("ROTA_LEDGER_FOR", for_ms.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    if let Some(step) = die_at {
        command.env("ROTA_LEDGER_DIE_AT", step.to_string());
    }
    command.spawn().unwrap()
}

#[test]
fn killed_between_any_two_steps_a_writer_leaves_a_ledger() {
    let scratch = Scratch::new("killed");
    let ledger = scratch.ledger();
    let claim = ledger
        .claim(owner(), |state| Ok(first_free("stays", state)))
        .unwrap();
    for step in 0..100 {
        let output = start_writer(&ledger, Some(step), 0)
            .wait_with_output()
            .unwrap();
        let state = ledger.read().unwrap();
        assert_no_cpu_twice(&state);
        assert_eq!(state.entries.len(), 1, "step {step}: {state:?}");
        assert_eq!(state.entries[0].plan, claim.plan());
        // Whoever comes next can work.
        let next = ledger
            .claim(owner(), |state| Ok(first_free("next", state)))
            .unwrap();
        assert_eq!(next.plan().exclusive, CpuSet::one(1), "step {step}");
        if output.status.success() {
            // A claim and its end pass nine points each.
            assert!(step >= 16, "only {step} steps");
            return;
        }
    }
    panic!("the writer has no end");
}

#[test]
fn a_crowd_with_deaths_in_it_shares_no_cpu() {
    let scratch = Scratch::new("crowd");
    let ledger = scratch.ledger();
    let mut writers: Vec<Child> = (0..20).map(|_| start_writer(&ledger, None, 1500)).collect();
    // Every third is killed somewhere on its way.
    for (index, writer) in writers.iter_mut().enumerate() {
        if index % 3 == 0 {
            std::thread::sleep(Duration::from_millis(60));
            writer.kill().unwrap();
        }
        assert_no_cpu_twice(&ledger.read().unwrap());
    }
    let mut total = 0;
    for (index, writer) in writers.into_iter().enumerate() {
        let output = writer.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if index % 3 == 0 {
            continue;
        }
        let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}{complaint}");
        total += said
            .lines()
            .find_map(|line| line.strip_prefix("claims "))
            .and_then(|count| count.parse::<u64>().ok())
            .unwrap_or_else(|| panic!("{said}"));
    }
    println!("{total} claims");
    assert!(ledger.read().unwrap().entries.is_empty());
    assert!(total >= 13);
}

/// The entry of a VM whose process is gone, with groups of these names in `directory`.
fn left_behind(vm: &str, directory: &Path, names: &[&str]) -> LedgerEntry {
    let mut owner = owner();
    owner.start_time += 1;
    let groups = names.iter().map(|name| {
        let name = name.replace("OWNER", &format!("{}-{}", owner.pid, owner.start_time));
        let path = directory.join(name);
        fs::create_dir(&path).unwrap();
        path
    });
    LedgerEntry {
        groups: groups.collect(),
        plan: dedicated(vm, 0),
        rotation: None,
        owner,
    }
}

#[test]
fn groups_of_the_dead_go_with_their_entries() {
    let scratch = Scratch::new("groups");
    let ledger = scratch.ledger();
    let elsewhere = scratch.0.join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let names = [
        "rota-a-OWNER.vcpu",
        "rota-a-OWNER.helpers",
        "somebody.slice",
    ];
    let dead = left_behind("a", &elsewhere, &names);
    let groups = dead.groups.clone();
    let there = || groups.iter().map(|path| path.exists()).collect::<Vec<_>>();
    let add = |entry: &LedgerEntry| {
        let text = format!(
            "{{\"version\": 1, \"entries\": [{}]}}",
            serde_json::to_string(entry).unwrap()
        );
        fs::write(ledger.path(), text).unwrap();
    };
    add(&dead);
    // Whoever only reads touches nothing.
    assert_eq!(ledger.read().unwrap().entries, []);
    assert_eq!(there(), [true; 3]);
    let claim = ledger
        .claim(owner(), |state| Ok(first_free("b", state)))
        .unwrap();
    assert_eq!(
        there(),
        [false, false, true],
        "what has another name is not its own"
    );
    drop(claim);
    // A machine without a claim clears away, too, and writes nothing where nothing is to be done.
    fs::create_dir(&groups[0]).unwrap();
    add(&dead);
    Ledger::clear_away(Some(ledger.path())).unwrap();
    assert!(!groups[0].exists());
    assert!(ledger.read().unwrap().entries.is_empty());
    let none = scratch.0.join("none/ledger.json");
    Ledger::clear_away(Some(&none)).unwrap();
    assert!(!scratch.0.join("none").exists());
}

#[test]
fn an_entry_without_groups_is_as_it_always_was() {
    let entry = LedgerEntry {
        owner: owner(),
        plan: dedicated("a", 0),
        rotation: None,
        groups: Vec::new(),
    };
    let text = serde_json::to_string(&entry).unwrap();
    assert!(!text.contains("groups"), "{text}");
    assert_eq!(serde_json::from_str::<LedgerEntry>(&text).unwrap(), entry);
}
