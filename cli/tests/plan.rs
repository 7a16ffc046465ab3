//! `rota plan` as somebody types it.

use std::process::{Command, Output};

fn rota(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_rota"))
        .arg("plan")
        .args(arguments)
        .output()
        .expect("rota starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// A machine of eight CPUs, written where `--host` finds it.
fn eight_cpus() -> tempfile::Recorded {
    let host = scheduler::HostSpec {
        cores: 8,
        ..scheduler::HostSpec::default()
    }
    .build();
    tempfile::Recorded::new(&serde_json::to_string(&host).expect("writes"))
}

/// A file that goes away with the test.
mod tempfile {
    use std::{
        path::PathBuf,
        sync::atomic::{AtomicU32, Ordering},
    };

    pub(crate) struct Recorded(PathBuf);

    impl Recorded {
        pub(crate) fn new(text: &str) -> Self {
            static NUMBER: AtomicU32 = AtomicU32::new(0);
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let name = format!("rota-plan-{}-{number}", std::process::id());
            let path = std::env::temp_dir().join(name);
            std::fs::write(&path, text).expect("written");
            Self(path)
        }

        pub(crate) fn path(&self) -> &str {
            self.0.to_str().expect("UTF-8")
        }
    }

    impl Drop for Recorded {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }
}

#[test]
fn a_plan_is_a_table_with_reasons() {
    let host = eight_cpus();
    let output = rota(&[
        "--host",
        host.path(),
        "--cpus",
        "boot=2",
        "--sched",
        "placement=dedicated",
    ]);
    let table = text(&output.stdout);
    assert!(output.status.success(), "{table}");
    for part in [
        "CPUs 0-7",
        "own",
        "its own: core 1, under one cache",
        "helpers",
    ] {
        assert!(table.contains(part), "{table}");
    }
}

#[test]
fn json_is_the_plan() {
    let host = eight_cpus();
    let output = rota(&[
        "--host",
        host.path(),
        "--cpus",
        "boot=2,affinity=[0@[0-1],1@3]",
        "--json",
    ]);
    let plan: scheduler::Plan = serde_json::from_slice(&output.stdout).expect("a plan");
    let cpus: Vec<_> = plan.vms[0]
        .vcpus
        .iter()
        .map(|vcpu| vcpu.cpus.to_string())
        .collect();
    assert_eq!(cpus, ["0-1", "3"]);
}

#[test]
fn a_refusal_is_status_1_and_says_what_can_be_had() {
    let host = eight_cpus();
    let wish = [
        "--host",
        host.path(),
        "--cpus",
        "boot=9",
        "--sched",
        "placement=dedicated",
    ];
    let output = rota(&wish);
    assert_eq!(output.status.code(), Some(1));
    let why = text(&output.stderr);
    assert!(
        why.contains("8 can have it") && why.contains("--sched 'placement=shared'"),
        "{why}"
    );
    let json = rota(&[&wish[..], &["--json"]].concat());
    let rejection: scheduler::Rejection =
        serde_json::from_slice(&json.stdout).expect("a rejection");
    assert_eq!(
        rejection.reasons[0].constraint,
        scheduler::Constraint::Dedicated
    );
}

#[test]
fn wrong_usage_is_status_2_and_bad_files_are_status_1() {
    for (arguments, status, part) in [
        (&["--sched", "wieght=1"][..], 2, "no such key"),
        (&["--cpus", "boot=many"], 2, "boot=many"),
        (&["--host", "/nonexistent"], 1, "cannot read"),
        (&["--host", "/proc/self/status"], 1, "no recorded host"),
        (&["--libvirt", "/proc/self/status"], 1, "not XML"),
        (&["--ledger", "/nonexistent"], 1, "cannot read"),
        (&["--ledger", "/"], 1, "cannot read /: Is a directory"),
        (
            &[
                "--cpus",
                "boot=1,affinity=[0@0]",
                "--sched",
                "placement=spread",
            ],
            1,
            "say it once",
        ),
    ] {
        let output = rota(arguments);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{arguments:?}: {said}");
        assert!(said.contains(part), "{arguments:?}: {said}");
    }
}

/// A ledger with one entry, that of process 1 when it had started at `start_time`.
fn ledger_of_one(host: &str, start_time: u64) -> String {
    let plan = rota(&[
        "--host",
        host,
        "--name",
        "other",
        "--json",
        "--sched",
        "placement=dedicated",
    ]);
    let plan: scheduler::Plan = serde_json::from_slice(&plan.stdout).expect("a plan");
    let entry = scheduler::LedgerEntry {
        owner: scheduler::Owner {
            pid: 1,
            start_time,
            uuid: "other".to_owned(),
        },
        plan: plan.vms[0].clone(),
        rotation: None,
        groups: Vec::new(),
    };
    let state = scheduler::LedgerState {
        version: scheduler::LedgerState::VERSION,
        entries: vec![entry],
    };
    serde_json::to_string(&state).expect("writes")
}

#[test]
fn a_ledger_is_read_as_a_start_reads_it() {
    let host = eight_cpus();
    let good = ledger_of_one(host.path(), u64::MAX);
    let newer = good.replacen("\"version\":1", "\"version\":7", 1);
    for (text_of_it, part) in [
        (newer.as_str(), "a newer Rota"),
        (&good[..good.len() / 2], "it ends after"),
        ("", "it is empty"),
    ] {
        let file = tempfile::Recorded::new(text_of_it);
        for host in [&["--host", host.path()][..], &[]] {
            let output = rota(&[&["--ledger", file.path()][..], host].concat());
            let said = text(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{said}");
            assert!(said.contains(part), "{said}");
        }
    }
}

#[test]
fn a_ledgers_dead_processes_count_on_another_host_only() {
    let host = eight_cpus();
    // Nothing that runs here started then.
    let ledger = tempfile::Recorded::new(&ledger_of_one(host.path(), u64::MAX));
    let wish = ["--ledger", ledger.path(), "--json"];
    let planned = |arguments: &[&str]| -> scheduler::Plan {
        let output = rota(&[&wish[..], arguments].concat());
        serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}", text(&output.stderr)))
    };
    let elsewhere = planned(&["--host", host.path()]);
    assert_eq!(elsewhere.vms[0].vcpus[0].cpus.len(), 7);
    let here = planned(&[]);
    let usable = scheduler::Host::read().expect("this host").usable();
    assert_eq!(here.vms[0].vcpus[0].cpus, usable);
}

#[test]
fn a_libvirt_domain() {
    let host = eight_cpus();
    let xml = tempfile::Recorded::new(
        "<domain><vcpu>2</vcpu><cputune><vcpupin vcpu='0' cpuset='2'/><cachetune vcpus='0'/></cputune></domain>",
    );
    let output = rota(&["--host", host.path(), "--libvirt", xml.path()]);
    assert!(output.status.success());
    assert!(text(&output.stdout).contains("the map names it"));
    assert!(text(&output.stderr).contains("not mapped <cachetune>"));
}

#[test]
fn this_host_can_be_recorded() {
    let output = rota(&["--print-host"]);
    let host: scheduler::Host = serde_json::from_slice(&output.stdout).expect("a host");
    assert!(!host.usable().is_empty());
}
