//! The rows of `bench io`: what a guest is to do, as a command of its shell, and what the command says was done.

use serde::{Deserialize, Serialize};

use super::{HOST, Sample};

/// A line of the table.
pub(crate) struct Row {
    /// Its name, for `--only`.
    pub(crate) name: &'static str,
    /// What is done.
    pub(crate) title: &'static str,
    /// The work.
    pub(crate) load: Load,
    /// What throughput is counted in.
    pub(crate) unit: Unit,
}

/// All rows.
pub(crate) const ROWS: [Row; 9] = [
    disk(
        "block-read-1",
        "4 KiB random read, depth 1",
        "randread",
        4,
        1,
    ),
    disk(
        "block-read-32",
        "4 KiB random read, depth 32",
        "randread",
        4,
        32,
    ),
    disk(
        "block-write-1",
        "4 KiB random write, depth 1",
        "randwrite",
        4,
        1,
    ),
    disk(
        "block-write-32",
        "4 KiB random write, depth 32",
        "randwrite",
        4,
        32,
    ),
    disk("block-read-seq", "128 KiB sequential read", "read", 128, 4),
    disk(
        "block-write-seq",
        "128 KiB sequential write",
        "write",
        128,
        4,
    ),
    Row {
        name: "net-up",
        title: "TCP, guest to host",
        load: Load::Stream(Way::Up),
        unit: Unit::MebibytesPerSecond,
    },
    Row {
        name: "net-down",
        title: "TCP, host to guest",
        load: Load::Stream(Way::Down),
        unit: Unit::MebibytesPerSecond,
    },
    Row {
        name: "net-round-trip",
        title: "round trips",
        load: Load::RoundTrip,
        unit: Unit::PerSecond,
    },
];

const fn disk(
    name: &'static str,
    title: &'static str,
    pattern: &'static str,
    kib: u32,
    depth: u32,
) -> Row {
    Row {
        name,
        title,
        load: Load::Disk {
            pattern,
            kib,
            depth,
        },
        unit: if kib > 4 {
            Unit::MebibytesPerSecond
        } else {
            Unit::PerSecond
        },
    }
}

/// Work for a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Load {
    /// On a disk, past the guest's page cache: `pattern` in fio's words, with so many requests of that size at a time. An operation is
    /// a request.
    Disk {
        pattern: &'static str,
        kib: u32,
        depth: u32,
    },
    /// One TCP connection. An operation is a mebibyte.
    Stream(Way),
    /// One ICMP echo at a time. An operation is one there and back.
    RoundTrip,
}

/// Where data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// From the guest to the host.
    Up,
    /// From the host to the guest.
    Down,
}

/// What throughput is counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Operations.
    PerSecond,
    /// Data.
    MebibytesPerSecond,
}

impl Unit {
    /// As shown behind a figure.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Unit::PerSecond => "/s",
            Unit::MebibytesPerSecond => "MiB/s",
        }
    }
}

/// What does the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    Fio,
    Iperf3,
    Ping,
}

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Done {
    /// How many operations.
    pub(crate) operations: f64,
    /// How much data.
    pub(crate) bytes: f64,
    /// In how much of the guest's time.
    pub(crate) seconds: f64,
}

impl Row {
    /// The sample's throughput in the row's unit.
    pub(crate) fn throughput(&self, sample: &Sample) -> f64 {
        let amount = match self.unit {
            Unit::PerSecond => sample.done.operations,
            Unit::MebibytesPerSecond => sample.done.bytes / f64::from(1 << 20),
        };
        amount / sample.done.seconds
    }

    /// The sample in a few words.
    pub(super) fn describe(&self, sample: &Sample) -> String {
        let per_operation = |count: f64| count / sample.done.operations;
        let took = &sample.took;
        let syscalls = took
            .syscalls
            .map(|count| format!(", {:.2} system calls", per_operation(count)))
            .unwrap_or_default();
        format!(
            "{:.0} {}; each {:.2} exits, {:.2} ioctls{syscalls}, {:.1} µs",
            self.throughput(sample),
            self.unit.name(),
            per_operation(took.exits),
            per_operation(took.ioctls),
            per_operation(took.cpu_us),
        )
    }
}

impl Load {
    pub(super) fn program(self) -> Program {
        match self {
            Load::Disk { .. } => Program::Fio,
            Load::Stream(_) => Program::Iperf3,
            Load::RoundTrip => Program::Ping,
        }
    }

    /// The command that does it for so long.
    pub(super) fn command(self, seconds: u32) -> String {
        match self.program() {
            Program::Fio => self.with(&format!("--time_based --runtime={seconds}")),
            Program::Iperf3 => self.with(&format!("-t {seconds}")),
            Program::Ping => self.with(&format!("-w {seconds}")),
        }
    }

    /// A command that does next to nothing, in the same way.
    pub(super) fn start(self) -> String {
        match self.program() {
            Program::Fio => self.with("--number_ios=1"),
            Program::Iperf3 => self.with("-n 64K"),
            Program::Ping => self.with("-c 1"),
        }
    }

    fn with(self, limit: &str) -> String {
        match self {
            Load::Disk {
                pattern,
                kib,
                depth,
            } => format!(
                "fio --name=io --filename=/dev/vdb --direct=1 --ioengine=libaio --thread --rw={pattern} \
                 --bs={kib}k --iodepth={depth} --norandommap --gtod_reduce=1 {limit} \
                 --output-format=terse | cut -d';' -f6,9,47,50"
            ),
            Load::Stream(way) => {
                let reverse = if way == Way::Down { " -R" } else { "" };
                format!("iperf3 -c {HOST} -i 0 -f k{reverse} {limit} | grep receiver")
            }
            Load::RoundTrip => format!("ping -A -q {limit} {HOST} | grep transmitted"),
        }
    }

    /// What the command has done, by what it said.
    pub(super) fn done(self, said: &str) -> Option<Done> {
        match self {
            Load::Disk { kib, .. } => {
                // KiB and milliseconds, of what was read and what was written.
                let numbers: Vec<f64> = said
                    .split(';')
                    .map(|number| number.trim().parse().ok())
                    .collect::<Option<_>>()?;
                let [read, reading, written, writing] = numbers[..] else {
                    return None;
                };
                let kibibytes = read + written;
                Some(Done {
                    operations: kibibytes / f64::from(kib),
                    bytes: kibibytes * 1024.0,
                    seconds: (reading + writing) / 1000.0,
                })
            }
            Load::Stream(_) => {
                // [ 5] 0.00-8.01 sec 120 MBytes 126000 Kbits/sec receiver
                let words: Vec<&str> = said.split_whitespace().collect();
                let before = |unit| {
                    let at = words.iter().position(|word| *word == unit)?;
                    words.get(at.checked_sub(1)?).copied()
                };
                let rate: f64 = before("Kbits/sec")?.parse().ok()?;
                let seconds: f64 = before("sec")?.split_once('-')?.1.parse().ok()?;
                let bytes = rate * seconds * 1000.0 / 8.0;
                Some(Done {
                    operations: bytes / f64::from(1 << 20),
                    bytes,
                    seconds,
                })
            }
            Load::RoundTrip => {
                // 1000 packets transmitted, 1000 received, 0% packet loss, time 8001ms
                let received: f64 = said
                    .split(", ")
                    .find_map(|part| part.strip_suffix(" received"))?
                    .parse()
                    .ok()?;
                let time = said.rsplit_once("time ")?.1;
                let milliseconds: f64 = time.trim().strip_suffix("ms")?.parse().ok()?;
                Some(Done {
                    operations: received,
                    bytes: received * 64.0,
                    seconds: milliseconds / 1000.0,
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(name: &str, said: &str) -> Option<(f64, f64, f64)> {
        let row = ROWS.iter().find(|row| row.name == name)?;
        let done = row.load.done(said)?;
        Some((done.operations, done.bytes, done.seconds))
    }

    #[test]
    fn what_the_programs_say_is_understood() {
        assert_eq!(
            done("block-read-1", "8192;4000;0;0"),
            Some((2048.0, 8_388_608.0, 4.0))
        );
        assert_eq!(
            done("block-write-seq", "0;0;1280;500"),
            Some((10.0, 1_310_720.0, 0.5))
        );
        let line =
            "[  5]   0.00-8.00   sec   2 MBytes  2097152 Kbits/sec                  receiver";
        assert_eq!(done("net-up", line), Some((2000.0, 2_097_152_000.0, 8.0)));
        let line = "100 packets transmitted, 99 received, 1% packet loss, time 2000ms";
        assert_eq!(done("net-round-trip", line), Some((99.0, 6336.0, 2.0)));
        for name in ["block-read-1", "net-up", "net-round-trip"] {
            assert_eq!(done(name, "iperf3: error - unable to connect"), None);
        }
    }
}
