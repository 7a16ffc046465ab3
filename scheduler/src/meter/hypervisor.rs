//! What the hypervisor counts for a VP: its register VP_RUNTIME, through whoever has the partition, and more as the driver shows it
//! in debugfs (`mshv/partition/<id>/vp/<n>/stats`, from Linux 7.0).
//!
//! In debugfs, lines are a name, a colon and a number. Names are the interface: their order and number are not.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

/// Where debugfs is.
pub(super) const DEBUGFS: &str = "/sys/kernel/debug";

/// Times are in units of 100 ns, as everywhere in the hypervisor's interface.
const UNIT_NS: u64 = 100;

/// Whoever can ask the hypervisor how long VPs have run, also while they run.
pub trait RunTimes {
    /// Register VP_RUNTIME of VP `vcpu`, in units of 100 ns.
    ///
    /// # Errors
    /// The hypervisor does not tell, or there is no such VP.
    fn run_time(&self, vcpu: u32) -> io::Result<u64>;
}

/// Run time of one VP in nanoseconds, if the hypervisor tells.
pub(super) fn run_ns(times: &dyn RunTimes, vcpu: u32) -> Option<u64> {
    times
        .run_time(vcpu)
        .ok()
        .map(|units| units.saturating_mul(UNIT_NS))
}

/// The open file of one VP.
pub(super) struct VpStats(File);

/// What it says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct VpCounts {
    /// Time the VP ran, with what the hypervisor did for it.
    pub(super) run_ns: Option<u64>,
    /// Time it was ready and had no processor.
    pub(super) wait_ns: Option<u64>,
    /// Moves between processors.
    pub(super) migrations: Option<u64>,
    /// `hlt` instructions.
    pub(super) halts: Option<u64>,
    /// Times it was given a processor.
    pub(super) dispatches: Option<u64>,
    /// Hypercalls by which the guest said that it spins for long.
    pub(super) long_spins: Option<u64>,
}

impl VpStats {
    pub(super) fn open(debugfs: &Path, partition: u64, vp: u32) -> io::Result<Self> {
        let path: PathBuf = debugfs.join(format!("mshv/partition/{partition}/vp/{vp}/stats"));
        File::open(path).map(Self)
    }

    pub(super) fn read(&self, buffer: &mut Vec<u8>) -> Option<VpCounts> {
        const ROOM: usize = 32 * 1024;
        buffer.resize(ROOM, 0);
        let mut length = 0;
        while length < ROOM {
            match self.0.read_at(&mut buffer[length..], length as u64).ok()? {
                0 => break,
                more => length += more,
            }
        }
        std::str::from_utf8(&buffer[..length]).ok().map(parse)
    }
}

fn parse(text: &str) -> VpCounts {
    let mut counts = VpCounts::default();
    for line in text.lines() {
        let Some((name, value)) = line.split_once(':') else {
            continue;
        };
        let value = value.trim().parse::<u64>().ok();
        let time = || value.map(|units| units.saturating_mul(UNIT_NS));
        match name.trim() {
            "VpTotalRunTime" => counts.run_ns = time(),
            "VpWaitingForCpuTime" => counts.wait_ns = time(),
            "VpLogicalProcessorMigrations" => counts.migrations = value,
            "VpHltInstructionsCount" => counts.halts = value,
            "VpLogicalProcessorDispatches" => counts.dispatches = value,
            "VpLongSpinWaitHypercalls" => counts.long_spins = value,
            _ => {}
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_found_by_name_in_any_order() {
        let text = "\
VpHltInstructionsCount                     : 12
VpTotalRunTime                             : 5000
VpSomethingNew                             : 1
VpWaitingForCpuTime                        : 7
no number here";
        assert_eq!(
            parse(text),
            VpCounts {
                run_ns: Some(500_000),
                wait_ns: Some(700),
                halts: Some(12),
                ..VpCounts::default()
            }
        );
    }
}
