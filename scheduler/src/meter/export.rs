//! A sample for people's tools: Prometheus' text format, JSON, and sums over a VM.

use std::fmt::Write;

use super::{
    histogram::Latency,
    sample::{Metered, VcpuMeter, VmMeter},
};

/// A counter: its name, what it is, nanoseconds or a count, and where it is.
type Counter = (&'static str, &'static str, bool, fn(&VcpuMeter) -> &Metered);

const COUNTERS: &[Counter] = &[
    ("run_seconds", "Time the vCPU ran.", true, |vcpu| {
        &vcpu.run_ns
    }),
    (
        "wait_seconds",
        "Time the vCPU was ready and had no CPU.",
        true,
        |vcpu| &vcpu.wait_ns,
    ),
    (
        "steal_seconds",
        "Time the CPU beneath was taken.",
        true,
        |vcpu| &vcpu.steal_ns,
    ),
    (
        "halted_seconds",
        "Time the vCPU neither ran nor wanted to.",
        true,
        |vcpu| &vcpu.halted_ns,
    ),
    ("slices", "Times the vCPU was given a CPU.", false, |vcpu| {
        &vcpu.slices
    }),
    (
        "voluntary_switches",
        "Times the vCPU gave its CPU up.",
        false,
        |vcpu| &vcpu.voluntary_switches,
    ),
    (
        "involuntary_switches",
        "Times the vCPU's CPU was taken.",
        false,
        |vcpu| &vcpu.involuntary_switches,
    ),
    (
        "migrations",
        "Moves of the vCPU to another CPU.",
        false,
        |vcpu| &vcpu.migrations,
    ),
    (
        "halts",
        "Times the vCPU halted; where Linux schedules and the hypervisor's counters cannot be read, times its thread went to sleep, an upper bound.",
        false,
        |vcpu| &vcpu.halts,
    ),
    (
        "long_spins",
        "Times the guest told the hypervisor that it spins for long.",
        false,
        |vcpu| &vcpu.long_spins,
    ),
];

impl VmMeter {
    /// As JSON, for tools.
    ///
    /// # Errors
    /// None in practice: everything in it has a form in JSON.
    pub fn to_json(&self) -> serde_json::Result<String> {
        serde_json::to_string_pretty(self)
    }

    /// In Prometheus' text format. What is unmetered has no value there: `rota_vcpu_unmetered` names it.
    #[must_use]
    pub fn to_prometheus(&self) -> String {
        let mut text = String::new();
        let vm = escape(&self.vm.0);
        for (name, help, is_time, of) in COUNTERS {
            family(
                &mut text,
                &format!("rota_vcpu_{name}_total"),
                help,
                "counter",
            );
            for vcpu in &self.vcpus {
                if let Metered::Known(value) = of(vcpu) {
                    let labels = format!("vm=\"{vm}\",vcpu=\"{}\"", vcpu.vcpu);
                    let _ = match is_time {
                        true => writeln!(
                            text,
                            "rota_vcpu_{name}_total{{{labels}}} {}",
                            seconds(*value)
                        ),
                        false => writeln!(text, "rota_vcpu_{name}_total{{{labels}}} {value}"),
                    };
                }
            }
        }
        family(
            &mut text,
            "rota_vcpu_unmetered",
            "What nobody here can tell.",
            "gauge",
        );
        for vcpu in &self.vcpus {
            let mut unmetered = |name: &str, why: &str| {
                let _ = writeln!(
                    text,
                    "rota_vcpu_unmetered{{vm=\"{vm}\",vcpu=\"{}\",metric=\"{name}\",why=\"{}\"}} 1",
                    vcpu.vcpu,
                    escape(why)
                );
            };
            for (name, _, _, of) in COUNTERS {
                if let Metered::Unmetered(why) = of(vcpu) {
                    unmetered(name, why);
                }
            }
            if let Metered::Unmetered(why) = &vcpu.irq_to_run {
                unmetered("irq_to_run_seconds", why);
            }
        }
        self.exits(&mut text, &vm);
        for (name, help, of) in [
            (
                "rota_vm_kick_to_run_seconds",
                "From a kick to the moment the thread of the vCPU ran and noticed.",
                (|vcpu| Some(&vcpu.kick_to_run)) as fn(&VcpuMeter) -> Option<&Latency>,
            ),
            (
                "rota_vm_irq_to_run_seconds",
                "From an interrupt whose handler comes back to the VMM to the next time the vCPU was seen, an upper bound.",
                |vcpu| match &vcpu.irq_to_run {
                    Metered::Known(latency) => Some(latency),
                    Metered::Unmetered(_) => None,
                },
            ),
        ] {
            family(&mut text, name, help, "histogram");
            let known: Vec<&Latency> = self.vcpus.iter().filter_map(of).collect();
            if !known.is_empty() {
                histogram(&mut text, name, &vm, &known);
            }
        }
        text
    }

    fn exits(&self, text: &mut String, vm: &str) {
        for (name, help, is_time) in [
            ("rota_vcpu_exits_total", "Exits to the VMM, by kind.", false),
            (
                "rota_vcpu_exit_seconds_total",
                "Time until the vCPU went on, by kind.",
                true,
            ),
        ] {
            family(text, name, help, "counter");
            for vcpu in &self.vcpus {
                for (kind, exit) in &vcpu.exits {
                    let labels = format!("vm=\"{vm}\",vcpu=\"{}\",kind=\"{kind}\"", vcpu.vcpu);
                    let _ = match is_time {
                        true => writeln!(text, "{name}{{{labels}}} {}", seconds(exit.ns)),
                        false => writeln!(text, "{name}{{{labels}}} {}", exit.count),
                    };
                }
            }
        }
    }
}

fn family(text: &mut String, name: &str, help: &str, kind: &str) {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

/// Ends of the buckets, in nanoseconds: 1, 2 and 5 of each power of ten from a microsecond to 10 s. They are always all there, since a
/// series that comes and goes is another one to whoever collects them.
const ENDS: [u64; 22] = {
    let mut ends = [0; 22];
    let (mut index, mut power) = (0, 1_000);
    while index < ends.len() {
        ends[index] = power * [1, 2, 5][index % 3];
        index += 1;
        if index % 3 == 0 {
            power *= 10;
        }
    }
    ends
};

/// All vCPUs together.
fn histogram(text: &mut String, name: &str, vm: &str, latencies: &[&Latency]) {
    let total =
        |of: &dyn Fn(&Latency) -> u64| -> u64 { latencies.iter().map(|latency| of(latency)).sum() };
    for end in ENDS {
        let _ = writeln!(
            text,
            "{name}_bucket{{vm=\"{vm}\",le=\"{}\"}} {}",
            seconds(end),
            total(&|latency| latency.within(end))
        );
    }
    let count = total(&|latency| latency.count);
    let _ = writeln!(text, "{name}_bucket{{vm=\"{vm}\",le=\"+Inf\"}} {count}");
    let sum = seconds(total(&|latency| latency.sum_ns));
    let _ = writeln!(text, "{name}_sum{{vm=\"{vm}\"}} {sum}");
    let _ = writeln!(text, "{name}_count{{vm=\"{vm}\"}} {count}");
}

fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

fn escape(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}
