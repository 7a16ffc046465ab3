//! Completion scripts and man pages as somebody installs them.

use std::process::{Command, Output};

fn rota(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_rota"))
        .args(arguments)
        .output()
        .expect("rota starts")
}

#[test]
fn every_shell_gets_a_script_that_knows_the_options() {
    for shell in ["bash", "zsh", "fish"] {
        let output = rota(&["completions", shell]);
        assert!(output.status.success(), "{output:?}");
        let script = String::from_utf8_lossy(&output.stdout);
        for word in ["initramfs", "doctor", "completions"] {
            assert!(script.contains(word), "{word} for {shell}");
        }
    }
    let unknown = rota(&["completions", "tcsh"]);
    assert_eq!(unknown.status.code(), Some(2));
    assert_eq!(String::from_utf8_lossy(&unknown.stderr).lines().count(), 1);
}

#[test]
fn bash_takes_its_script() {
    let script = String::from_utf8(rota(&["completions", "bash"]).stdout).expect("UTF-8");
    let ask = "COMP_WORDS=(rota run --init); COMP_CWORD=2; _rota rota --init run; echo \"${COMPREPLY[@]}\"";
    let Ok(output) = Command::new("bash")
        .args(["-c", &format!("{script}\n{ask}")])
        .output()
    else {
        return rota_tests::requires::skip("there is no bash");
    };
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(said.trim(), "--initramfs", "{output:?}");
}

#[test]
fn there_is_a_man_page_for_every_command() {
    let folder = std::env::temp_dir().join(format!("rota-man-{}", std::process::id()));
    let output = rota(&["man", folder.to_str().expect("UTF-8")]);
    assert!(output.status.success(), "{output:?}");
    let page = |name: &str| std::fs::read_to_string(folder.join(name)).expect(name);
    assert!(page("rota.1").contains("rota\\-doctor(1)"));
    let run = page("rota-run.1");
    for word in ["\\-\\-kernel", "Exit status:", "Ctrl\\-A x"] {
        assert!(run.contains(word), "{word} in {run}");
    }
    for name in ["rota-plan.1", "rota-completions.1", "rota-man.1"] {
        page(name);
    }
    std::fs::remove_dir_all(&folder).expect("removed");
}

#[test]
fn a_folder_that_cannot_be_made_is_named_in_one_line() {
    let output = rota(&["man", "/dev/null/man"]);
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(error.lines().count(), 1, "{error}");
    assert!(error.contains("/dev/null/man"), "{error}");
}
