//! What the dependencies may be: licences compatible with ours, and one version of each crate.
//!
//! Reads `cargo metadata`, so it needs no tool that a fresh machine lacks.

use std::collections::BTreeMap;
use std::process::Command;

use serde::Deserialize;

use crate::error::{Context, Error, Result};

/// Licences that may be combined with Apache-2.0 OR BSD-3-Clause without conditions on our own code.
const ALLOWED: [&str; 8] = [
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "MIT",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Crates that the tree holds twice because two dependencies disagree; nothing of ours can mend it.
const TWICE: [&str; 2] = ["bitflags", "syn"];

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
}

/// Checks every dependency, with `cargo` ready to take a subcommand.
///
/// # Errors
/// One line for each dependency that breaks a rule, or why they cannot be told.
pub(crate) fn check(mut cargo: Command) -> Result<()> {
    let output = cargo
        .args(["metadata", "--format-version", "1", "--locked"])
        .output()
        .context(|| "cannot start cargo metadata")?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        return Err(Error::new(format!("cargo metadata failed: {}", why.trim())));
    }
    let metadata: Metadata =
        serde_json::from_slice(&output.stdout).context(|| "cannot read cargo metadata")?;
    let found = complaints(&metadata.packages);
    if found.is_empty() {
        return Ok(());
    }
    Err(Error::new(found.join("\n")))
}

fn complaints(packages: &[Package]) -> Vec<String> {
    let mut found = Vec::new();
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in packages {
        versions
            .entry(&package.name)
            .or_default()
            .push(&package.version);
        match &package.license {
            Some(expression) if allowed(expression) => {}
            Some(expression) => found.push(format!(
                "{} {}: licence \"{expression}\" is not on the list",
                package.name, package.version
            )),
            None => found.push(format!(
                "{} {}: no licence is given",
                package.name, package.version
            )),
        }
    }
    for (name, versions) in versions {
        if versions.len() > 1 && !TWICE.contains(&name) {
            found.push(format!("{name}: several versions: {}", versions.join(", ")));
        }
    }
    found
}

/// Whether an SPDX expression can be satisfied by the list: every `AND` term needs one allowed `OR` choice.
fn allowed(expression: &str) -> bool {
    expression.replace('/', " OR ").split(" AND ").all(|term| {
        term.trim_matches(['(', ')', ' '])
            .split(" OR ")
            .any(|choice| ALLOWED.contains(&choice.trim_matches(['(', ')', ' '])))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, version: &str, license: Option<&str>) -> Package {
        Package {
            name: name.into(),
            version: version.into(),
            license: license.map(Into::into),
        }
    }

    #[test]
    fn choices_and_conjunctions() {
        for good in [
            "MIT",
            "MIT/Apache-2.0",
            "GPL-2.0-only OR MIT",
            "(MIT OR Apache-2.0) AND Unicode-3.0",
            "Apache-2.0 WITH LLVM-exception OR MIT",
        ] {
            assert!(allowed(good), "{good}");
        }
        for bad in ["GPL-2.0-only", "MIT AND GPL-2.0-only", ""] {
            assert!(!allowed(bad), "{bad}");
        }
    }

    #[test]
    fn a_missing_licence_and_a_second_version_are_named() {
        let found = complaints(&[
            package("a", "1.0.0", Some("MIT")),
            package("a", "2.0.0", Some("MIT")),
            package("b", "1.0.0", None),
        ]);
        assert_eq!(found.len(), 2);
        assert!(found[0].starts_with("b 1.0.0"));
        assert!(found[1].starts_with("a: several versions"));
    }
}
