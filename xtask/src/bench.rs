//! `cargo xtask bench boot`: how rota boots a guest, beside a peer, in one run of the lab.

use std::fs;
use std::path::PathBuf;

use serde::Serialize;

use crate::error::{Context, Error, Result};
use crate::inside;
use crate::inside::bench::{Boot, Measured};
use crate::lab::{Addition, Lab};
use crate::table::Table;
use crate::workspace::{Profile, Workspace};

/// Runs the benchmark and prints its figures; the exit status says nothing about them.
pub(crate) fn boot(
    workspace: &Workspace,
    cloud_hypervisor: Option<PathBuf>,
    runs: u32,
    json: bool,
) -> Result<i32> {
    let mut lab = Lab {
        profile: Profile::Release,
        ..Lab::default()
    };
    workspace.build(lab.profile)?;
    let name = format!("bench-{}.json", std::process::id());
    let mut command = vec![inside::executable(workspace)?];
    command.extend(
        [
            "inside",
            "bench",
            "--runs",
            &runs.to_string(),
            "--result",
            &format!("/out/{name}"),
        ]
        .map(String::from),
    );
    if let Some(from) = cloud_hypervisor {
        let from = from
            .canonicalize()
            .context(|| format!("{}", from.display()))?;
        lab.additions.push(Addition {
            from,
            to: "/tmp-peer/cloud-hypervisor".into(),
        });
        command.extend(["--cloud-hypervisor", "/tmp-peer/cloud-hypervisor"].map(String::from));
    }
    eprintln!(
        "one guest: Debian's cloud kernel, `quiet`, 1 processor, 512 MiB; {runs} boots each after a warm-up"
    );
    let status = lab.run(workspace, &command)?;
    if status != 0 {
        return Ok(status);
    }
    let file = workspace.lab().join("out").join(name);
    let text =
        fs::read(&file).context(|| format!("the lab left no figures in {}", file.display()))?;
    let _ = fs::remove_file(&file);
    let measured: Measured = serde_json::from_slice(&text).context(|| "the lab's figures")?;
    let figures = Figures::of(&measured)?;
    print!("{}", figures.table(&measured));
    if json {
        println!(
            "{}",
            serde_json::to_string(&figures).context(|| "cannot print JSON")?
        );
    }
    Ok(0)
}

/// Medians, and what they have to be.
#[derive(Debug, Serialize)]
struct Figures {
    runs: usize,
    figures: Vec<Figure>,
}

#[derive(Debug, Serialize)]
struct Figure {
    name: &'static str,
    unit: &'static str,
    rota: f64,
    peer: Option<f64>,
    /// Rota's value as a part of the peer's.
    ratio: Option<f64>,
    target: Target,
    met: Option<bool>,
}

/// What a figure may be at most.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
enum Target {
    /// This value.
    AtMost(f64),
    /// This part of the peer's value.
    OfPeer(f64),
}

impl Figures {
    fn of(measured: &Measured) -> Result<Self> {
        let figure = |name, unit, target, value: &dyn Fn(&Boot) -> f64| -> Result<Figure> {
            let rota = median(measured.rota.iter().map(value))
                .ok_or_else(|| Error::new("no boot was measured"))?;
            let peer = median(measured.peer.iter().map(value));
            let ratio = peer.map(|peer| rota / peer);
            let met = match target {
                Target::AtMost(limit) => Some(rota <= limit),
                Target::OfPeer(limit) => ratio.map(|ratio| ratio <= limit),
            };
            Ok(Figure {
                name,
                unit,
                rota,
                peer,
                ratio,
                target,
                met,
            })
        };
        Ok(Self {
            runs: measured.rota.len(),
            figures: vec![
                figure("ioctls per exit", "", Target::AtMost(1.05), &|boot| {
                    boot.ioctls as f64 / boot.exits as f64
                })?,
                figure("exits to init", "", Target::OfPeer(0.6), &|boot| {
                    boot.exits as f64
                })?,
                figure("start to init", "ms", Target::OfPeer(0.9), &|boot| {
                    boot.init_ms
                })?,
                figure("VMM memory", "MiB", Target::AtMost(10.0), &|boot| {
                    boot.vmm_overhead_kib as f64 / 1024.0
                })?,
            ],
        })
    }

    fn table(&self, measured: &Measured) -> String {
        let mut table = Table::default();
        let peer = measured
            .peer_version
            .clone()
            .unwrap_or_else(|| "peer".into());
        table.row(["medians", "rota", &peer, "ratio", "target", ""]);
        for figure in &self.figures {
            let digits = if figure.name == "ioctls per exit" {
                3
            } else {
                usize::from(figure.unit == "MiB")
            };
            let show = |value: f64| {
                format!("{value:.digits$} {}", figure.unit)
                    .trim_end()
                    .to_owned()
            };
            table.row([
                figure.name.to_owned(),
                show(figure.rota),
                figure.peer.map_or("–".into(), show),
                figure
                    .ratio
                    .map_or("–".into(), |ratio| format!("{ratio:.3}")),
                match figure.target {
                    Target::AtMost(limit) => {
                        format!("≤ {limit} {}", figure.unit).trim_end().to_owned()
                    }
                    Target::OfPeer(limit) => format!("≤ {limit} × peer"),
                },
                match figure.met {
                    Some(true) => "pass".into(),
                    Some(false) => "MISS".into(),
                    None => "needs --peer".into(),
                },
            ]);
        }
        table.render()
    }
}

/// The median, if there are values.
pub(crate) fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        count if count % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), Some(2.5));
        assert_eq!(median(std::iter::empty()), None);
    }

    #[test]
    fn a_figure_without_a_peer_is_neither_met_nor_missed() {
        let boot = Boot {
            init_ms: 1000.0,
            exits: 100,
            ioctls: 104,
            vmm_overhead_kib: 20 << 10,
        };
        let measured = Measured {
            rota: vec![boot],
            ..Measured::default()
        };
        let met: Vec<_> = Figures::of(&measured)
            .unwrap()
            .figures
            .iter()
            .map(|figure| figure.met)
            .collect();
        assert_eq!(met, [Some(true), None, None, Some(false)]);
    }
}
