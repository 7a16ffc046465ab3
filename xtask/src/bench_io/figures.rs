//! Medians of what the lab has measured, and whether they are what they have to be.

use serde::Serialize;

use super::native::Native;
use crate::bench::median;
use crate::error::{Error, Result};
use crate::inside::io::{Measured, Sample, load::ROWS, load::Row};
use crate::table::Table;

/// A row is won with this part of the peer's throughput at least,
const THROUGHPUT: f64 = 1.2;
/// or with this part of its processor time for an operation at most.
const CPU: f64 = 0.8;

/// All figures.
#[derive(Debug, Default, Serialize)]
pub(super) struct Figures {
    /// What the peer calls itself.
    peer: Option<String>,
    /// In the order in which they were measured.
    rows: Vec<Figure>,
    /// What was measured without a VM.
    pub(super) native: Vec<Native>,
}

/// One row.
#[derive(Debug, Serialize)]
struct Figure {
    name: &'static str,
    title: &'static str,
    unit: &'static str,
    rota: Cost,
    peer: Option<Cost>,
    /// Rota's throughput as a part of the peer's.
    throughput_ratio: Option<f64>,
    /// Rota's processor time as a part of the peer's.
    cpu_ratio: Option<f64>,
    met: Option<bool>,
}

/// What one VMM did, and what each operation took: medians.
#[derive(Clone, Debug, Serialize)]
struct Cost {
    /// In the row's unit.
    throughput: f64,
    /// The least and the most of all runs.
    throughput_range: [f64; 2],
    exits: f64,
    ioctls: f64,
    /// From a run of its own.
    syscalls: f64,
    /// Processor time of the VMM without that in which the guest ran.
    cpu_us: f64,
    guest_us: f64,
}

impl Cost {
    fn of(row: &Row, timed: &[Sample], counted: &[Sample]) -> Option<Self> {
        let of = |samples: &[Sample], value: &dyn Fn(&Sample) -> f64| {
            let of_row = samples.iter().filter(|sample| sample.row == row.name);
            median(of_row.map(value))
        };
        let each =
            |value: fn(&Sample) -> f64| of(timed, &|sample| value(sample) / sample.done.operations);
        let of_row = timed.iter().filter(|sample| sample.row == row.name);
        let range = of_row
            .map(|sample| row.throughput(sample))
            .fold([f64::INFINITY, 0.0], |[least, most], value| {
                [value.min(least), value.max(most)]
            });
        Some(Self {
            throughput: of(timed, &|sample| row.throughput(sample))?,
            throughput_range: range,
            exits: each(|sample| sample.took.exits)?,
            ioctls: each(|sample| sample.took.ioctls)?,
            syscalls: of(counted, &|sample| {
                sample.took.syscalls.unwrap_or_default() / sample.done.operations
            })?,
            cpu_us: each(|sample| sample.took.cpu_us)?,
            guest_us: each(|sample| sample.took.guest_us)?,
        })
    }
}

impl Figures {
    /// From the runs whose times count, and those in which system calls were counted.
    pub(super) fn of(timed: &Measured, counted: &Measured) -> Result<Self> {
        let rows: Vec<_> = ROWS
            .iter()
            .filter_map(|row| {
                let rota = Cost::of(row, &timed.rota, &counted.rota)?;
                let peer = Cost::of(row, &timed.peer, &counted.peer);
                let ratio = |of: fn(&Cost) -> f64| peer.as_ref().map(|peer| of(&rota) / of(peer));
                let throughput_ratio = ratio(|cost| cost.throughput);
                let cpu_ratio = ratio(|cost| cost.cpu_us);
                Some(Figure {
                    name: row.name,
                    title: row.title,
                    unit: row.unit.name(),
                    met: throughput_ratio
                        .zip(cpu_ratio)
                        .map(|(throughput, cpu)| throughput >= THROUGHPUT || cpu <= CPU),
                    throughput_ratio,
                    cpu_ratio,
                    rota,
                    peer,
                })
            })
            .collect();
        if rows.is_empty() {
            return Err(Error::new("nothing was measured"));
        }
        Ok(Self {
            peer: timed.peer_version.clone(),
            rows,
            native: Vec::new(),
        })
    }

    /// For people.
    pub(super) fn table(&self) -> String {
        let mut table = Table::default();
        let peer = self.peer.as_deref().unwrap_or("peer");
        table.row([
            "medians",
            "",
            "throughput",
            "CPU µs",
            "exits",
            "ioctls",
            "syscalls",
            "",
        ]);
        for figure in &self.rows {
            table.row([figure.title]);
            for (name, cost) in [("rota", Some(&figure.rota)), (peer, figure.peer.as_ref())] {
                let Some(cost) = cost else { continue };
                table.row([
                    String::new(),
                    name.to_owned(),
                    format!("{:.0} {}", cost.throughput, figure.unit),
                    format!("{:.1}", cost.cpu_us),
                    format!("{:.2}", cost.exits),
                    format!("{:.2}", cost.ioctls),
                    format!("{:.2}", cost.syscalls),
                ]);
            }
            let show = |ratio: Option<f64>| ratio.map_or("–".into(), |it| format!("{it:.2}"));
            table.row([
                String::new(),
                "ratio".into(),
                show(figure.throughput_ratio),
                show(figure.cpu_ratio),
                String::new(),
                String::new(),
                String::new(),
                match figure.met {
                    Some(true) => "pass".into(),
                    Some(false) => "MISS".into(),
                    None => "needs --peer".to_owned(),
                },
            ]);
        }
        format!(
            "{}CPU, exits, ioctls and system calls are those of the VMM's process for one operation: a request, a MiB, a round trip; CPU \
             without the guest's.\npass: throughput ≥ {THROUGHPUT} × peer, or CPU ≤ {CPU} × peer\n",
            table.render()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inside::io::{counts::Counts, load::Done};

    fn sample(operations: f64, cpu_us: f64) -> Sample {
        Sample {
            row: ROWS[0].name.into(),
            done: Done {
                operations,
                bytes: 4096.0 * operations,
                seconds: 2.0,
            },
            took: Counts {
                exits: operations,
                cpu_us,
                syscalls: Some(3.0 * operations),
                ..Counts::default()
            },
        }
    }

    fn figures(rota: &[Sample], peer: &[Sample]) -> Figures {
        let measured = Measured {
            rota: rota.to_vec(),
            peer: peer.to_vec(),
            peer_version: None,
        };
        Figures::of(&measured, &measured).unwrap()
    }

    #[test]
    fn a_row_is_won_by_throughput_or_by_processor_time() {
        let peer = [sample(100.0, 1000.0)];
        for (rota, met) in [
            (sample(120.0, 1200.0), true),
            (sample(100.0, 800.0), true),
            (sample(119.0, 1000.0), false),
            (sample(100.0, 810.0), false),
        ] {
            assert_eq!(figures(&[rota], &peer).rows[0].met, Some(met));
        }
        assert_eq!(figures(&peer, &[]).rows[0].met, None);
    }

    #[test]
    fn costs_are_medians_for_one_operation() {
        let figures = figures(
            &[
                sample(100.0, 500.0),
                sample(200.0, 400.0),
                sample(50.0, 150.0),
            ],
            &[],
        );
        let cost = &figures.rows[0].rota;
        assert_eq!((cost.throughput, cost.cpu_us), (50.0, 3.0));
        assert_eq!(cost.throughput_range, [25.0, 100.0]);
        assert_eq!((cost.exits, cost.syscalls), (1.0, 3.0));
    }
}
