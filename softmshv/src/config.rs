//! The options of the launcher, as the library finds them in its environment.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use crate::cpu_list;

/// Where `--trace` goes; `%p` in it stands for the process id.
const TRACE: &str = "SOFTMSHV_TRACE";
/// `root`, `integrated` or `core`.
const SCHEDULER: &str = "SOFTMSHV_SCHEDULER";
/// `on`: the device declares [`SCHEDULER`] and does the other.
const LIE: &str = "SOFTMSHV_LIE";
/// The CPUs that serve as logical processors, as a list ("0-3,8").
const LPS: &str = "SOFTMSHV_LPS";
/// The quantum of the hypervisor's scheduler, in microseconds.
const QUANTUM: &str = "SOFTMSHV_QUANTUM_US";
/// `off`: no register page.
const REGISTER_PAGE: &str = "SOFTMSHV_REGISTER_PAGE";
/// `off`: no hypercalls through the descriptor of the device.
const PASSTHROUGH: &str = "SOFTMSHV_PASSTHROUGH";

/// How long a VP keeps a logical processor that others want, unless the user says otherwise.
const DEFAULT_QUANTUM: Duration = Duration::from_millis(10);
/// Shorter, and the dispatcher would do nothing but change VPs.
const MIN_QUANTUM: Duration = Duration::from_micros(100);

/// A scheduler of the hypervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scheduler {
    /// The client's threads run the VPs, as on a root partition with the root scheduler.
    Root,
    /// The same inside an L1VH, declared by the VMM capabilities.
    Integrated,
    /// The hypervisor schedules.
    Core,
}

/// The options of this process.
#[derive(Debug)]
pub(crate) struct Config {
    /// `--trace`.
    pub(crate) trace: Option<PathBuf>,
    /// `--scheduler`: what the device declares.
    pub(crate) declared: Scheduler,
    /// Whether VPs run on logical processors of the hypervisor and not on the client's threads. Follows
    /// `--scheduler`, or with `--lie` contradicts it.
    pub(crate) hypervisor_schedules: bool,
    /// `--lps`; empty: every CPU that is online.
    pub(crate) lps: Vec<usize>,
    /// `--quantum-us`.
    pub(crate) quantum: Duration,
    /// Cleared by `--no-register-page`: `mmap` of the register page then fails with `ENODEV`, and a VP neither
    /// fills nor reads it.
    pub(crate) register_page: bool,
    /// Cleared by `--no-passthrough`: the descriptor of the device knows no `MSHV_ROOT_HVCALL`, as in drivers from
    /// before hypercalls of a partition on itself.
    pub(crate) passthrough: bool,
}

impl Config {
    fn from(get: impl Fn(&str) -> Option<String>) -> Self {
        let declared = match get(SCHEDULER).as_deref() {
            Some("root") => Scheduler::Root,
            Some("core") => Scheduler::Core,
            None | Some("integrated") => Scheduler::Integrated,
            Some(other) => {
                eprintln!(
                    "softmshv: {SCHEDULER}={other} is none of root, integrated, core; taking integrated"
                );
                Scheduler::Integrated
            }
        };
        let lies = get(LIE).as_deref() == Some("on");
        let quantum = get(QUANTUM)
            .and_then(|text| text.parse().ok())
            .map_or(DEFAULT_QUANTUM, Duration::from_micros);
        Self {
            trace: get(TRACE)
                .map(|path| PathBuf::from(path.replace("%p", &std::process::id().to_string()))),
            declared,
            hypervisor_schedules: (declared == Scheduler::Core) != lies,
            lps: get(LPS)
                .and_then(|text| cpu_list::parse(&text))
                .unwrap_or_default(),
            quantum: quantum.max(MIN_QUANTUM),
            register_page: get(REGISTER_PAGE).as_deref() != Some("off"),
            passthrough: get(PASSTHROUGH).as_deref() != Some("off"),
        }
    }
}

/// The options of this process, read once.
pub(crate) fn config() -> &'static Config {
    static CONFIG: OnceLock<Config> = OnceLock::new();
    CONFIG.get_or_init(|| Config::from(|name| std::env::var(name).ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_environment_is_integrated_with_a_register_page() {
        let config = Config::from(|_| None);
        assert_eq!(config.declared, Scheduler::Integrated);
        assert!(!config.hypervisor_schedules);
        assert_eq!(config.quantum, DEFAULT_QUANTUM);
        assert!(config.register_page && config.passthrough);
        assert!(config.trace.is_none());
    }

    #[test]
    fn every_option_is_read() {
        let config = Config::from(|name| {
            Some(match name {
                TRACE => "/tmp/t.%p".into(),
                SCHEDULER => "core".into(),
                LPS => "0-1,4".into(),
                QUANTUM => "2500".into(),
                _ => "off".into(),
            })
        });
        assert_eq!(config.declared, Scheduler::Core);
        assert!(config.hypervisor_schedules);
        assert_eq!(config.lps, [0, 1, 4]);
        assert_eq!(config.quantum, Duration::from_micros(2500));
        assert!(!config.register_page && !config.passthrough);
        let trace = config.trace.unwrap();
        assert!(trace.ends_with(format!("t.{}", std::process::id())));
    }

    #[test]
    fn a_liar_does_the_other_thing() {
        let lie = |scheduler: &'static str| {
            Config::from(|name| match name {
                SCHEDULER => Some(scheduler.into()),
                LIE => Some("on".into()),
                _ => None,
            })
        };
        assert!(lie("integrated").hypervisor_schedules);
        assert!(lie("root").hypervisor_schedules);
        assert!(!lie("core").hypervisor_schedules);
    }
}
