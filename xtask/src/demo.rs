//! `cargo xtask demo`: from a clean checkout to two Debian guests that boot side by side.

use std::time::Instant;

use crate::error::Result;
use crate::inside;
use crate::lab::Lab;
use crate::progress::step;
use crate::terminal;
use crate::workspace::{Profile, Workspace};

/// Runs the demo; returns its exit status.
pub(crate) fn run(workspace: &Workspace, shell: bool, json: bool) -> Result<i32> {
    let start = Instant::now();
    let lab = Lab {
        profile: Profile::Release,
        terminal: shell,
        ..Lab::default()
    };
    // The compiler and the downloads do not need the same things.
    let kernel = std::thread::scope(|scope| {
        let build = scope.spawn(|| {
            step("building rota and softmshv", || {
                workspace.build(lab.profile)
            })
        });
        let kernel = lab.prepare(workspace);
        build
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        kernel
    })?;
    eprintln!(
        "  the lab: Linux {} under QEMU, with nested virtualization",
        kernel.release
    );
    let mut command = vec![
        inside::executable(workspace)?,
        "inside".into(),
        "demo".into(),
    ];
    let flags = [
        (shell, "--shell"),
        (json, "--json"),
        (terminal::colours(), "--colour"),
    ];
    command.extend(
        flags
            .iter()
            .filter(|(on, _)| *on)
            .map(|(_, flag)| (*flag).to_owned()),
    );
    let status = lab.run(workspace, &command)?;
    eprintln!("  all in {:.0} s", start.elapsed().as_secs_f64());
    Ok(status)
}
