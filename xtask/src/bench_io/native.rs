//! The rows without a VM: what the models of a disk and of a network card cost by themselves, beside the bare walk of a queue. They
//! are measured by the crate `devices`' own benchmarks.

use std::process::Stdio;

use serde::Serialize;

use crate::error::{Context, Error, Result};
use crate::table::Table;
use crate::workspace::Workspace;

/// What a request or a packet may take.
const GOAL_NS: f64 = 400.0;

/// A figure of one of the benchmarks.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct Native {
    /// What is measured.
    name: String,
    /// Nanoseconds for a request or a packet.
    ns: f64,
    /// The same of a bare walk of the queue.
    walk_ns: f64,
    /// Whether it is what it has to be, where that is said.
    met: Option<bool>,
}

/// Runs the benchmarks.
pub(super) fn measure(workspace: &Workspace) -> Result<Vec<Native>> {
    let mut command = workspace.cargo();
    command.args([
        "bench",
        "--package",
        "devices",
        "--bench",
        "block",
        "--bench",
        "net",
    ]);
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .context(|| "cannot start cargo")?;
    if !output.status.success() {
        return Err(Error::new(
            "the benchmarks of devices have failed (see above)",
        ));
    }
    let rows = rows(&String::from_utf8_lossy(&output.stdout));
    if rows.is_empty() {
        return Err(Error::new("the benchmarks of devices have said nothing"));
    }
    Ok(rows)
}

/// The lines `block, null, read 4 KiB   1   345`, whose walk has a line of its own for each depth, and `net, transmit   345   123`.
fn rows(text: &str) -> Vec<Native> {
    let lines: Vec<(&str, [f64; 2])> = text
        .lines()
        .filter_map(|line| {
            let (rest, last) = line.trim_end().rsplit_once(' ')?;
            let (name, first) = rest.trim_end().rsplit_once(' ')?;
            Some((name.trim_end(), [first.parse().ok()?, last.parse().ok()?]))
        })
        .collect();
    let walk = |depth: f64| {
        let bare = lines
            .iter()
            .find(|(name, numbers)| name.starts_with("bare") && numbers[0] == depth)?;
        Some(bare.1[1])
    };
    lines
        .iter()
        .filter_map(|(name, numbers)| match name.split(',').next()? {
            "block" => Some(Native {
                name: format!("{name}, depth {}", numbers[0]),
                ns: numbers[1],
                walk_ns: walk(numbers[0])?,
                met: Some(numbers[1] <= GOAL_NS),
            }),
            "net" => Some(Native {
                name: format!("{name}, one packet"),
                ns: numbers[0],
                walk_ns: numbers[1],
                met: Some(numbers[0] <= GOAL_NS),
            }),
            _ => None,
        })
        .collect()
}

/// For people.
pub(super) fn table(rows: &[Native]) -> String {
    let mut table = Table::default();
    let goal = format!("≤ {GOAL_NS} ns");
    table.row(["without a VM", "ns", "bare walk", "target", ""]);
    for row in rows {
        table.row([
            row.name.clone(),
            format!("{:.0}", row.ns),
            format!("{:.0}", row.walk_ns),
            goal.clone(),
            match row.met {
                Some(true) => "pass".into(),
                Some(false) => "MISS".into(),
                None => String::new(),
            },
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_benchmarks_print_is_understood() {
        let text = "device                        depth ns per request\n\
                    bare virtio-queue walk            1            900\n\
                    block, null, read 4 KiB           1           1100\n\
                    bare virtio-queue walk           32             80\n\
                    block, null, read 4 KiB          32            250\n\
                    one frame at a time           ns   bare walk of virtio-queue\n\
                    net, transmit                310       90\n";
        let rows = rows(text);
        let of: Vec<_> = rows
            .iter()
            .map(|row| (row.name.as_str(), row.ns, row.walk_ns, row.met))
            .collect();
        assert_eq!(
            of,
            [
                (
                    "block, null, read 4 KiB, depth 1",
                    1100.0,
                    900.0,
                    Some(false)
                ),
                ("block, null, read 4 KiB, depth 32", 250.0, 80.0, Some(true)),
                ("net, transmit, one packet", 310.0, 90.0, Some(true)),
            ]
        );
    }
}
