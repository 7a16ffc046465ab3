//! `rota doctor`: what it says of a machine, to people and to programs.

use std::process::{Command, Output};

use rota_tests::{child, require};
use serde_json::Value;

fn doctor(softmshv: &[&str], arguments: &[&str]) -> Output {
    let mut command = child::under_softmshv(softmshv, child::rota_program());
    run(command.arg("doctor").args(arguments))
}

fn run(command: &mut Command) -> Output {
    let output = command.output().expect("rota");
    assert!(!text(&output.stderr).contains("panicked"), "{output:?}");
    output
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("UTF-8")
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

/// The outcome of the first effect of that control.
fn effect<'a>(report: &'a Value, control: &str) -> &'a str {
    let effects = report["effects"].as_array().expect("effects");
    let effect = effects.iter().find(|effect| effect["control"] == control);
    effect.expect("an effect of that control")["outcome"]["outcome"]
        .as_str()
        .expect("a word")
}

#[test]
fn one_object_tells_everything() {
    require!(child::programs());
    require!(child::softmshv());
    let output = doctor(&[], &["--json"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(text(&output.stdout).lines().count(), 1);
    let report = json(&output);
    assert_eq!(report["device"]["usable"], true);
    let scheduler = &report["scheduler"];
    assert_eq!(scheduler["verdict"], "integrated");
    assert_eq!(
        (&scheduler["mode"], &scheduler["consistent"]),
        (&"integrated".into(), &true.into())
    );
    for evidence in scheduler["evidence"].as_array().expect("evidence") {
        for part in ["source", "value", "meaning", "says"] {
            assert!(
                evidence[part].as_str().is_some_and(|part| !part.is_empty()),
                "{evidence}"
            );
        }
        assert!(
            evidence["at_ms"].as_u64() > Some(1_700_000_000_000),
            "{evidence}"
        );
    }
    assert!(
        report["host"]["cpus"]
            .as_array()
            .is_some_and(|cpus| !cpus.is_empty())
    );
    assert_ne!(effect(&report, "placement"), "rejected");
}

#[test]
fn where_the_hypervisor_schedules_it_says_what_can_be_delegated() {
    require!(child::programs());
    require!(child::softmshv());
    let report = json(&doctor(&["--scheduler", "core"], &["--json"]));
    assert_eq!(report["scheduler"]["verdict"], "core");
    for control in ["weight", "cap", "reserve", "smt"] {
        assert_eq!(effect(&report, control), "delegated", "{control}");
    }
    for control in ["slice", "gang", "rotate", "deadline", "rt"] {
        assert_eq!(effect(&report, control), "rejected", "{control}");
    }
}

#[test]
fn a_person_gets_a_table_without_colours_in_a_pipe() {
    require!(child::programs());
    require!(child::softmshv());
    let output = doctor(&["--scheduler", "core"], &["--quick"]);
    let page = text(&output.stdout);
    assert!(!page.contains('\x1b'), "{page}");
    for words in [
        "/dev/mshv can be used",
        "core: the hypervisor schedules",
        "evidence",
        "abilities",
        "what requests would get (core)",
    ] {
        assert!(page.contains(words), "{words:?} is not in:\n{page}");
    }
    assert!(
        page.lines().all(|line| line.trim_end() == line),
        "blanks at an end of a line"
    );
    assert!(!page.contains("behaviour"), "--quick runs nothing");
}

#[test]
fn on_a_machine_without_a_device_it_says_so_and_what_to_do() {
    require!(child::programs());
    if child::real_device() {
        return rota_tests::requires::skip("there is a /dev/mshv");
    }
    let output = run(child::bare_rota().args(["doctor", "--json"]));
    assert_eq!(output.status.code(), Some(1));
    let report = json(&output);
    assert_eq!(report["device"]["usable"], false);
    assert!(
        report["device"]["problem"]
            .as_str()
            .is_some_and(|text| text.contains("softmshv"))
    );
    assert_eq!(report["scheduler"]["verdict"], "unknown");
}

#[test]
fn another_mode_changes_what_is_done_and_not_what_is_known() {
    require!(child::programs());
    require!(child::softmshv());
    let report = json(&doctor(&[], &["--json", "--quick", "--sched-mode", "core"]));
    assert_eq!(report["scheduler"]["verdict"], "integrated");
    assert_eq!(report["scheduler"]["mode"], "core");
    assert_eq!(effect(&report, "slice"), "rejected");
}

#[test]
fn what_was_seen_is_only_denied_by_force() {
    require!(child::programs());
    require!(child::softmshv());
    let core = ["--scheduler", "core"];
    let output = doctor(&core, &["--sched-mode", "root"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let lines: Vec<_> = text(&output.stderr).lines().collect();
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("--sched-mode-force"), "{lines:?}");
    let forced = doctor(
        &core,
        &["--json", "--sched-mode", "root", "--sched-mode-force"],
    );
    let report = json(&forced);
    assert_eq!(report["scheduler"]["verdict"], "core");
    assert_eq!(report["scheduler"]["mode"], "root");
}

#[test]
fn wrong_usage_is_one_line() {
    require!(child::programs());
    for arguments in [
        &["--sched-mode", "fair"][..],
        &["--sched-mode-force"],
        &["everything"],
    ] {
        let output = run(child::bare_rota().arg("doctor").args(arguments));
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        assert_eq!(text(&output.stderr).lines().count(), 1, "{output:?}");
    }
}
