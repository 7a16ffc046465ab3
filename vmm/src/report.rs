//! What a run amounted to, as JSON for tools: exits, ioctls, times, memory, scheduler.

use std::{collections::BTreeMap, fs, io, ops::Range, path::Path, time::Instant};

use serde::Serialize;

use crate::{
    memory,
    vm::{Totals, Vm},
};

/// Gathered while a machine runs.
#[derive(Debug)]
pub struct Report {
    begun: Instant,
    times_ms: BTreeMap<&'static str, f64>,
    boots: u64,
    totals: Totals,
    vmm_overhead_kib: Option<u64>,
    /// Why it ended, if it was by an error of the VMM.
    pub error: Option<String>,
    /// vCPUs, as many as were last asked for.
    pub vcpus: u32,
    /// Who schedules the VPs.
    pub scheduler: Option<scheduler::Detection>,
    /// Where and when its vCPUs were to run, if that was asked for.
    pub plan: Option<scheduler::VmPlan>,
    /// What became of each request.
    pub effects: Option<Vec<scheduler::Effect>>,
    /// What each vCPU got and waited for.
    pub metering: Option<scheduler::VmMeter>,
}

#[derive(Serialize)]
struct Json<'a> {
    ended: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: &'a Option<String>,
    vcpus: u32,
    boots: u64,
    times_ms: &'a BTreeMap<&'static str, f64>,
    exits: &'a BTreeMap<&'static str, u64>,
    ioctls: &'a BTreeMap<&'static str, u64>,
    exits_total: u64,
    ioctls_total: u64,
    emulated_instructions: u64,
    unknown_msrs: u64,
    unknown_ports: u64,
    unknown_mmio: u64,
    register_page: bool,
    vmm_overhead_kib: Option<u64>,
    scheduler: &'a Option<scheduler::Detection>,
    #[serde(skip_serializing_if = "Option::is_none")]
    plan: &'a Option<scheduler::VmPlan>,
    #[serde(skip_serializing_if = "Option::is_none")]
    effects: &'a Option<Vec<scheduler::Effect>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    metering: &'a Option<scheduler::VmMeter>,
}

impl Report {
    /// An empty report; times count from `begun`.
    #[must_use]
    pub fn new(begun: Instant) -> Self {
        Self {
            begun,
            times_ms: BTreeMap::new(),
            boots: 0,
            totals: Totals::default(),
            vmm_overhead_kib: None,
            error: None,
            vcpus: 0,
            scheduler: None,
            plan: None,
            effects: None,
            metering: None,
        }
    }

    /// Notes the time of `event`; the first time counts.
    pub fn mark(&mut self, event: &'static str) {
        let elapsed = self.begun.elapsed().as_secs_f64() * 1000.0;
        self.times_ms.entry(event).or_insert(elapsed);
    }

    /// Adds what a machine has done, before its memory goes.
    pub fn add_boot(&mut self, vm: &Vm) {
        self.boots += 1;
        vm.add_to(&mut self.totals);
        let guest = memory::host_ranges(vm.memory());
        let overhead = fs::read_to_string("/proc/self/smaps")
            .ok()
            .map(|smaps| resident_kib(&smaps, &guest));
        self.vmm_overhead_kib = self.vmm_overhead_kib.max(overhead);
    }

    /// Adds ioctls made outside of any machine.
    pub fn add_ioctls(&mut self, ioctls: &BTreeMap<&'static str, u64>) {
        for (name, count) in ioctls {
            *self.totals.ioctls.entry(name).or_default() += count;
        }
    }

    /// Writes the report.
    ///
    /// # Errors
    /// What the host says.
    pub fn write(&self, path: &Path, ended: &str) -> io::Result<()> {
        let totals = &self.totals;
        let json = Json {
            ended,
            error: &self.error,
            vcpus: self.vcpus,
            boots: self.boots,
            times_ms: &self.times_ms,
            exits: &totals.exits,
            ioctls: &totals.ioctls,
            exits_total: totals.exits.values().sum(),
            ioctls_total: totals.ioctls.values().sum(),
            emulated_instructions: totals.emulated_instructions,
            unknown_msrs: totals.unknown_msrs,
            unknown_ports: totals.unknown_ports,
            unknown_mmio: totals.unknown_mmio,
            register_page: totals.register_page,
            vmm_overhead_kib: self.vmm_overhead_kib,
            scheduler: &self.scheduler,
            plan: &self.plan,
            effects: &self.effects,
            metering: &self.metering,
        };
        let mut text = serde_json::to_string_pretty(&json)?;
        text.push('\n');
        fs::write(path, text)
    }
}

/// KiB of this process's memory that are in RAM, without mappings inside `guest`.
fn resident_kib(smaps: &str, guest: &[Range<usize>]) -> u64 {
    let mut counted = true;
    let mut total = 0;
    for line in smaps.lines() {
        let first = line.split_whitespace().next().unwrap_or_default();
        if let Some((start, _)) = first.split_once('-') {
            let start = usize::from_str_radix(start, 16).unwrap_or_default();
            counted = !guest.iter().any(|range| range.contains(&start));
        } else if counted && first == "Rss:" {
            total += line
                .split_whitespace()
                .nth(1)
                .and_then(|kib| kib.parse::<u64>().ok())
                .unwrap_or(0);
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_not_the_vmms() {
        let smaps = "1000-2000 rw-p 00000000 00:00 0 [heap]\nSize: 4 kB\nRss:  12 kB\n\
                     8000-9000 rw-p 00000000 00:00 0\nRss: 4096 kB\nPss: 4 kB\n\
                     a000-b000 r-xp 00000000 00:00 0 /bin/rota\nRss: 30 kB\n";
        let guest = 0x8000..0xa000;
        assert_eq!(resident_kib(smaps, std::slice::from_ref(&guest)), 42);
        assert_eq!(resident_kib(smaps, &[]), 4138);
    }
}
