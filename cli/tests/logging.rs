//! `-v` and `--log-file` as somebody types them.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
};

fn log_file(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("rota-log-{}-{name}", std::process::id()))
}

fn completions(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_rota"))
        .args(["completions", "bash"])
        .args(arguments)
        .output()
        .expect("rota starts")
}

#[test]
fn details_go_to_the_file_when_asked_for() {
    let file = log_file("details");
    let path = file.display().to_string();
    let quiet = completions(&["--log-file", &path]);
    assert!(quiet.status.success());
    assert_eq!(fs::read_to_string(&file).expect("a file"), "");
    let loud = completions(&["-vv", "--log-file", &path]);
    assert!(loud.status.success() && loud.stderr.is_empty());
    let text = fs::read_to_string(&file).expect("a file");
    assert!(text.contains("DEBUG rota "), "{text}");
    let more = completions(&["-vv", "--log-file", &path]);
    assert!(more.status.success());
    assert!(
        fs::read_to_string(&file)
            .expect("a file")
            .starts_with(&text),
        "what is there stays"
    );
    fs::remove_file(&file).expect("removes");
    let stderr = completions(&["-vv"]).stderr;
    assert!(String::from_utf8_lossy(&stderr).contains("DEBUG rota "));
}

#[test]
fn a_file_that_cannot_be_written_is_an_error() {
    let refused = completions(&["--log-file", "/does/not/exist"]);
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        said.contains("--log-file: cannot write /does/not/exist"),
        "{said}"
    );
}
