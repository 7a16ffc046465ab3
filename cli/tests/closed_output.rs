//! Somebody pipes `rota` into a program that has read enough.

use std::{io, process::Command};

#[test]
fn an_error_that_nobody_reads_is_still_that_error() {
    let (reader, writer) = io::pipe().expect("a pipe");
    drop(reader);
    let status = Command::new(env!("CARGO_BIN_EXE_rota"))
        .args(["run", "--kernel", "/nowhere", "--memory", "size=0"])
        .stderr(writer)
        .status()
        .expect("rota");
    assert_eq!(status.code(), Some(1));
}
