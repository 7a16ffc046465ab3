//! The report for a person: short blocks, aligned, nothing that a narrow terminal tears apart.

use std::collections::BTreeSet;

use scheduler::{Ability, Effect, Host, Outcome, Says, SchedMode};

use super::Report;

const GREEN: &str = "32";
const YELLOW: &str = "33";
const RED: &str = "31";
const DIM: &str = "2";
const BOLD: &str = "1";

/// Text that may have colours.
struct Page {
    text: String,
    coloured: bool,
}

/// The whole report.
pub(super) fn of(report: &Report, coloured: bool) -> String {
    let mut page = Page {
        text: String::new(),
        coloured,
    };
    page.head(report);
    page.evidence(report);
    page.host(&report.host);
    page.abilities(&report.host);
    page.effects(&report.effects, report.scheduler.mode);
    page.text
}

impl Page {
    fn paint(&self, colour: &str, text: &str) -> String {
        if self.coloured {
            format!("\x1b[{colour}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    fn line(&mut self, text: &str) {
        self.text += text.trim_end();
        self.text.push('\n');
    }

    fn title(&mut self, title: &str) {
        let title = self.paint(BOLD, title);
        self.line("");
        self.line(&title);
    }

    fn head(&mut self, report: &Report) {
        let device = match &report.device.problem {
            None => self.paint(GREEN, "can be used"),
            Some(problem) => self.paint(RED, problem),
        };
        self.line(&format!("device      {} {device}", report.device.path));
        let detection = &report.scheduler.detection;
        self.line(&format!("partition   {}", detection.partition.meaning()));
        let verdict = detection.verdict;
        let name = self.paint(colour_of(verdict), &verdict.to_string());
        self.line(&format!(
            "scheduler   {name}: {} (found out in {:.0} ms)",
            verdict.meaning(),
            report.scheduler.took_ms
        ));
        if report.scheduler.mode != verdict {
            self.line(&format!(
                "policies    as for {}, by --sched-mode",
                report.scheduler.mode
            ));
        }
        if let Some(why) = &report.scheduler.unasked {
            let why = self.paint(RED, &format!("cannot be asked what it gives: {why}"));
            self.line(&format!("hypervisor  {why}"));
        }
        if let Some(ppm) = detection.residual_steal_ppm {
            let share = f64::from(ppm) / 1e4;
            self.line(&format!(
                "steal       {share:.2} % of this partition's CPU time goes to others"
            ));
        }
    }

    fn evidence(&mut self, report: &Report) {
        self.title("evidence");
        for evidence in &report.scheduler.detection.evidence {
            let (colour, says) = match evidence.says {
                Says::Linux => (GREEN, "Linux"),
                Says::Hypervisor => (YELLOW, "hypervisor"),
                Says::Nothing => (DIM, "-"),
            };
            let says = self.paint(colour, &format!("{says:<10}"));
            self.line(&format!(
                "  {says}  {}: {}",
                evidence.source, evidence.value
            ));
            let meaning = self.paint(DIM, evidence.meaning);
            self.line(&format!("              {meaning}"));
        }
    }

    fn host(&mut self, host: &Host) {
        self.title("host");
        let distinct = |of: fn(&scheduler::Cpu) -> u32| {
            host.cpus.iter().map(of).collect::<BTreeSet<_>>().len()
        };
        let cores = distinct(|cpu| cpu.core);
        self.line(&format!(
            "  CPUs       {} of {} usable: {}",
            host.usable().len(),
            host.cpus.len(),
            host.usable()
        ));
        self.line(&format!(
            "  topology   {} per core, {}, {}, {}",
            count(host.cpus.len() / cores.max(1), "thread"),
            count(cores, "core"),
            count(distinct(|cpu| cpu.llc), "last-level cache"),
            count(distinct(|cpu| cpu.socket), "socket"),
        ));
        for node in &host.nodes {
            self.line(&format!(
                "  node {:<5} {} MiB, {} MiB free{}",
                node.id,
                node.total_mib,
                node.free_mib,
                if node.allowed { "" } else { ", not allowed" }
            ));
        }
        self.line(&format!(
            "  tick       {} ms ({})",
            host.tick_ns as f64 / 1e6,
            host.tick_source
        ));
        let set = |cpus: &scheduler::CpuSet| match cpus.is_empty() {
            true => "none".to_owned(),
            false => cpus.to_string(),
        };
        self.line(&format!(
            "  isolated   {}, without tick {}",
            set(&host.isolated),
            set(&host.nohz_full)
        ));
    }

    fn abilities(&mut self, host: &Host) {
        let abilities = &host.abilities;
        let cgroup = &abilities.cgroup;
        self.title("abilities");
        let version = match cgroup.version {
            0 => "none".to_owned(),
            version => format!("version {version}"),
        };
        self.line(&format!("  control groups      {version}"));
        for (name, ability) in [
            ("  cpu controller", &cgroup.cpu),
            ("  cpuset controller", &cgroup.cpuset),
            ("  cpu.idle", &cgroup.idle),
            ("  burst", &cgroup.burst),
            ("  CPU partitions", &abilities.partitions),
            ("custom slices", &abilities.custom_slice),
            ("core scheduling", &abilities.core_scheduling),
            ("sched_ext in charge", &abilities.sched_ext_active),
            ("FIFO class", &abilities.realtime),
            ("deadline class", &abilities.deadline),
            ("negative nice", &abilities.nice),
        ] {
            self.ability(name, ability);
        }
    }

    fn ability(&mut self, name: &str, ability: &Ability) {
        let yes = match ability.yes {
            true => self.paint(GREEN, "yes"),
            false => self.paint(DIM, "no "),
        };
        self.line(&format!("  {name:<19} {yes}  {}", ability.why));
    }

    fn effects(&mut self, effects: &[Effect], mode: SchedMode) {
        self.title(&format!("what requests would get ({mode})"));
        for effect in effects {
            let (colour, word, rest) = words(&effect.outcome);
            let word = self.paint(colour, &format!("{word:<12}"));
            self.line(&format!(
                "  {:<10} {:<11} {word}  {rest}",
                effect.control, effect.requested
            ));
        }
    }
}

fn colour_of(verdict: SchedMode) -> &'static str {
    match verdict {
        SchedMode::Root | SchedMode::Integrated => GREEN,
        SchedMode::Core | SchedMode::Classic => YELLOW,
        SchedMode::Disputed | SchedMode::Unknown => RED,
    }
}

/// Colour, word, and what else there is to say.
fn words(outcome: &Outcome) -> (&'static str, &'static str, String) {
    match outcome {
        Outcome::Enforced => (GREEN, "enforced", String::new()),
        Outcome::Approximated { effective, why, .. } => {
            (GREEN, "approximated", format!("{effective}: {why}"))
        }
        Outcome::Delegated { property, readback } => (
            GREEN,
            "delegated",
            format!("{property}, reads back {readback}"),
        ),
        Outcome::Advisory { why } => (YELLOW, "advisory", why.clone()),
        Outcome::Rejected { why } => (RED, "rejected", why.clone()),
    }
}

/// So many of something.
fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use std::{io, time::Duration};

    use super::*;
    use crate::doctor::{Device, Scheduler};

    #[test]
    fn why_the_hypervisor_cannot_be_asked_is_shown() {
        let refused = io::Error::from(io::ErrorKind::PermissionDenied);
        let detection = scheduler::examine(Err(&refused), Duration::ZERO);
        let report = Report {
            device: Device {
                path: "/dev/mshv",
                usable: true,
                problem: None,
            },
            scheduler: Scheduler {
                meaning: detection.verdict.meaning(),
                mode: SchedMode::Core,
                took_ms: 1.0,
                unasked: Some("creating a partition: no memory".into()),
                detection,
            },
            host: scheduler::HostSpec::default().build(),
            effects: Vec::new(),
        };
        let text = of(&report, false);
        let line = "hypervisor  cannot be asked what it gives: creating a partition: no memory\n";
        assert!(text.contains(line), "{text}");
    }
}
