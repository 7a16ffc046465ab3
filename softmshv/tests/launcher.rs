//! The launcher and the preloaded library as a user meets them: ordinary programs, ordinary mistakes.

use std::path::Path;
use std::process::{Command, Output};
use std::sync::Once;

/// The library beside the launcher: `cargo test` builds the one and not the other.
fn library() {
    static BUILT: Once = Once::new();
    BUILT.call_once(|| {
        let folder = Path::new(env!("CARGO_BIN_EXE_softmshv"))
            .parent()
            .expect("a folder");
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args([
            "build",
            "--quiet",
            "--lib",
            "--package",
            "softmshv",
            "--target-dir",
        ]);
        cargo.arg(folder.parent().expect("the target folder"));
        if folder.ends_with("release") {
            cargo.arg("--release");
        }
        assert!(cargo.status().expect("cargo starts").success());
    });
}

fn softmshv(arguments: &[&str]) -> Output {
    library();
    Command::new(env!("CARGO_BIN_EXE_softmshv"))
        .args(arguments)
        .output()
        .expect("the launcher starts")
}

/// Whether the machine has what the device is made of.
fn has_kvm() -> bool {
    let usable = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok();
    if !usable {
        rota_tests::requires::skip("no usable /dev/kvm");
    }
    usable
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("text")
}

#[test]
fn the_device_is_there_for_the_command_and_for_what_it_starts() {
    if !has_kvm() || Path::new("/dev/mshv").exists() {
        return;
    }
    let output = softmshv(&[
        "--",
        "sh",
        "-c",
        "test -c /dev/mshv && sh -c 'exec 3<>/dev/mshv' && stat -c %t /dev/mshv",
    ]);
    assert_eq!(text(&output.stderr), "");
    assert_eq!(text(&output.stdout), "a\n", "a misc device");
    assert!(output.status.success());
}

#[test]
fn programs_that_do_not_care_are_left_alone() {
    if !has_kvm() {
        return;
    }
    let output = softmshv(&[
        "--",
        "sh",
        "-c",
        "echo out; echo err >&2; ls / | head -1 >/dev/null; exit 7",
    ]);
    assert_eq!(
        (text(&output.stdout), text(&output.stderr)),
        ("out\n", "err\n")
    );
    assert_eq!(output.status.code(), Some(7));
}

#[test]
fn a_command_that_is_not_there_is_one_line() {
    if !has_kvm() {
        return;
    }
    let output = softmshv(&["--", "no-such-command"]);
    let message = text(&output.stderr);
    assert!(
        message.starts_with("softmshv: no-such-command: "),
        "{message}"
    );
    assert_eq!(message.lines().count(), 1);
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn a_trace_is_written_by_those_who_open_the_device_alone() {
    if !has_kvm() {
        return;
    }
    let folder = std::env::temp_dir().join(format!("softmshv-launcher-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder for the trace");
    let file = folder.join("trace.json");
    let trace = file.to_str().expect("a name in UTF-8");
    assert!(softmshv(&["--trace", trace, "--", "true"]).status.success());
    assert!(!file.exists(), "nobody opened the device");
    assert!(
        softmshv(&["--trace", trace, "--", "sh", "-c", "exec 3<>/dev/mshv"])
            .status
            .success()
    );
    let written = std::fs::read_to_string(&file).expect("a trace");
    let value: serde_json::Value = serde_json::from_str(&written).expect("JSON");
    for key in ["ioctls", "hypercalls", "intercepts", "unimplemented"] {
        assert!(value[key].is_object(), "{written}");
    }
    std::fs::remove_dir_all(&folder).expect("the folder goes");
}
