//! What holds without running anything: formatting, clippy, documentation, licences.

use super::{cargo_ok, harness::Counts, licences};
use crate::error::Result;
use crate::progress::step;
use crate::workspace::Workspace;

/// Checks by cargo: a name, and the arguments. The documentation includes private items, so it may link to them.
const BY_CARGO: [(&str, &[&str]); 3] = [
    ("formatting", &["fmt", "--all", "--check"]),
    (
        "clippy",
        &[
            "clippy",
            "--workspace",
            "--all-targets",
            "--",
            "--deny",
            "warnings",
        ],
    ),
    (
        "documentation",
        &[
            "doc",
            "--workspace",
            "--no-deps",
            "--document-private-items",
        ],
    ),
];

/// Runs every check, and shows what a failed one has to say.
pub(super) fn run(workspace: &Workspace) -> Counts {
    let mut counts = Counts::default();
    let mut count = |result: Result<()>| match result {
        Ok(()) => counts.passed += 1,
        Err(error) => {
            println!("{error}");
            counts.failed += 1;
        }
    };
    for (name, arguments) in BY_CARGO {
        count(step(name, || {
            cargo_ok(workspace.cargo().args(arguments).env(
                "RUSTDOCFLAGS",
                "--deny warnings --allow rustdoc::private_intra_doc_links",
            ))
        }));
    }
    count(step("licences", || licences::check(workspace.cargo())));
    counts
}
