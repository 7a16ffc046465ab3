//! Which shared libraries a program needs: what the dynamic loader says through `ldd`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The shared libraries (and the loader) that `programs` need, as absolute paths. A static program needs none.
pub(crate) fn needed_by<'a>(programs: impl IntoIterator<Item = &'a Path>) -> BTreeSet<PathBuf> {
    let mut libraries = BTreeSet::new();
    for program in programs {
        let Ok(output) = Command::new("ldd").arg(program).output() else {
            continue;
        };
        // Lines look like `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)` or `/lib64/ld-linux-x86-64.so.2 (0x…)`.
        let text = String::from_utf8_lossy(&output.stdout);
        libraries.extend(
            text.split_whitespace()
                .filter(|word| word.starts_with('/'))
                .map(PathBuf::from),
        );
    }
    libraries
}
