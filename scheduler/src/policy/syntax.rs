//! Policies as one types them: `--sched placement=dedicated,weight=200,cap=40%:10ms`, and back.
//!
//! What is printed reads back as the same policy. A key that is not written has its default; a preset (`--sched latency`)
//! fills several keys, and whatever is written after it wins.

use std::{fmt, str::FromStr};

use super::{
    Cap, Cores, Deadline, Gang, Helpers, Placement, Slice, SmtIsolation, VmPolicy, affinity,
};
use crate::{CpuSet, PolicyError};

/// The keys and presets, for the help of those who read policies from a command line.
pub const HELP: &str = "\
Keys of --sched:
  placement=shared|dedicated|spread|pack|numa-local|map   cores=any|whole|one   node=N   require=on|off
  map=[VCPU@[CPUS],…]     weight=1-10000     cap=PERCENT[:PERIOD]|QUOTA:PERIOD     burst=TIME     reserve=N[m]
  slice=latency|default|throughput|TIME      rotate=TIME     gang=off|soft[:TIME]|adaptive[:TIME]
  deadline=RUNTIME[/DEADLINE]/PERIOD         rt=1-99         smt=off|vm|vcpu     helpers=auto|CPUS
  strict=on|off           overcommit=N
Caps, reserves and weights are for all vCPUs of the machine together (not its other threads), deadlines for each vCPU;
100% is one CPU.
Presets: fair, latency, throughput, realtime, gang; what is written after one wins.";

/// The keys, for who has misspelled one.
const KEYS: &str = "placement, cores, node, require, map, weight, cap, burst, reserve, slice, rotate, gang, deadline, rt, \
                    smt, helpers, strict, overcommit";

/// Length of a gang's turn where none is said: measured to be enough for 9 tenths of what gangs can give.
const QUANTUM_US: u32 = 20_000;
/// A cap's period where none is said: short, because a VM whose quota is used up stands still for the rest of it.
const CAP_PERIOD_US: u64 = 10_000;

impl FromStr for VmPolicy {
    type Err = PolicyError;

    /// Reads `key=value,…` and presets. Values that read but that no host takes are [`VmPolicy::check`]'s to find.
    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let mut policy = Self::default();
        let mut open = Open::default();
        for option in affinity::split(text).map_err(|why| wrong("sched", text, why))? {
            let option = option.trim();
            if option.is_empty() {
                continue;
            }
            match option.split_once('=') {
                Some((key, value)) => open.set(&mut policy, key.trim(), value.trim())?,
                None => {
                    policy = Self::preset(option).ok_or_else(|| {
                        wrong(
                            "sched",
                            option,
                            format!(
                                "neither key=value nor a preset ({})",
                                Self::PRESETS.join(", ")
                            ),
                        )
                    })?;
                    open = Open::of(&policy);
                }
            }
        }
        open.close(&mut policy)?;
        Ok(policy)
    }
}

/// Parts of the placement and of the cap as they come, in any order.
#[derive(Default)]
struct Open {
    kind: Option<String>,
    cores: Option<Cores>,
    node: Option<u32>,
    require: Option<bool>,
    map: Option<Vec<(u32, CpuSet)>>,
    burst_us: Option<u64>,
}

impl Open {
    /// The parts of a preset.
    fn of(policy: &VmPolicy) -> Self {
        let mut open = Self {
            burst_us: policy.cap.map(|cap| cap.burst_us),
            ..Self::default()
        };
        match &policy.placement {
            Placement::Dedicated { cores } => open.cores = Some(*cores),
            Placement::NumaLocal { require, node } => {
                open.require = Some(*require);
                open.node = *node;
            }
            Placement::Map(map) => open.map = Some(map.clone()),
            Placement::Shared | Placement::Spread | Placement::Pack => {}
        }
        open.kind = Some(policy.placement.name().to_owned());
        open
    }

    fn set(&mut self, policy: &mut VmPolicy, key: &str, value: &str) -> Result<(), PolicyError> {
        let bad = |allowed: &str| wrong(key, value, allowed);
        match key {
            "placement" => {
                if !Placement::NAMES.contains(&value) {
                    return Err(bad(&format!("allowed is {}", Placement::NAMES.join(", "))));
                }
                // What belonged to another placement (a preset's, perhaps) goes with it.
                if self.kind.as_deref() != Some(value) && self.kind.is_some() {
                    (self.cores, self.node, self.require) = (None, None, None);
                }
                self.kind = Some(value.to_owned());
            }
            "cores" => {
                self.cores = Some(match value {
                    "any" => Cores::Any,
                    "whole" => Cores::Whole,
                    "one" => Cores::One,
                    _ => return Err(bad("allowed is any, whole, one")),
                });
            }
            "node" => {
                self.node = Some(
                    value
                        .parse()
                        .map_err(|_| bad("the number of a NUMA node"))?,
                );
            }
            "require" => {
                self.require = Some(toggle(value).ok_or_else(|| bad("allowed is on, off"))?);
            }
            "map" => self.map = Some(affinity::parse(value).map_err(|why| bad(&why))?),
            "weight" => {
                policy.weight = Some(value.parse().map_err(|_| bad("allowed is 1 to 10000"))?);
            }
            "cap" => {
                policy.cap =
                    Some(cap(value).ok_or_else(|| bad("as in 40%, 150%:10ms or 4ms:10ms"))?);
            }
            "burst" => self.burst_us = Some(time(value).ok_or_else(|| bad("a time, as in 2ms"))?),
            "reserve" => {
                policy.reserve_millicpus =
                    Some(millicpus(value).ok_or_else(|| bad("CPUs, as in 500m or 1.5"))?);
            }
            "slice" => {
                policy.slice =
                    Some(match value {
                        "latency" => Slice::Latency,
                        "default" => Slice::Default,
                        "throughput" => Slice::Throughput,
                        _ => Slice::Micros(micros(value).ok_or_else(|| {
                            bad("latency, default, throughput, or a time as in 3ms")
                        })?),
                    });
            }
            "rotate" => {
                policy.rotate_us = Some(micros(value).ok_or_else(|| bad("a time, as in 20ms"))?);
            }
            "gang" => {
                policy.gang =
                    gang(value).ok_or_else(|| bad("off, soft[:20ms] or adaptive[:20ms]"))?;
            }
            "deadline" => {
                policy.deadline = Some(deadline(value).ok_or_else(|| {
                    bad("RUNTIME/PERIOD or RUNTIME/DEADLINE/PERIOD, as in 2ms/10ms")
                })?);
            }
            "rt" => policy.rt = Some(value.parse().map_err(|_| bad("allowed is 1 to 99"))?),
            "smt" => {
                policy.smt = match value {
                    "off" => SmtIsolation::Off,
                    "vm" => SmtIsolation::Vm,
                    "vcpu" => SmtIsolation::Vcpu,
                    _ => return Err(bad("allowed is off, vm, vcpu")),
                };
            }
            "helpers" => {
                policy.helpers = match value {
                    "auto" => Helpers::Auto,
                    _ => Helpers::Set(
                        bare(value)
                            .parse::<CpuSet>()
                            .map_err(|error| bad(&error.to_string()))?,
                    ),
                };
            }
            "strict" => policy.strict = toggle(value).ok_or_else(|| bad("allowed is on, off"))?,
            "overcommit" => {
                policy.overcommit_milli =
                    Some(milli(value).ok_or_else(|| bad("vCPUs per CPU, as in 4 or 1.5"))?);
            }
            _ => return Err(wrong(key, value, format!("no such key; there are: {KEYS}"))),
        }
        Ok(())
    }

    fn close(self, policy: &mut VmPolicy) -> Result<(), PolicyError> {
        // One of a placement's own keys is enough to say which is meant.
        let kind = self.kind.unwrap_or_else(|| {
            let implied = if self.map.is_some() {
                "map"
            } else if self.cores.is_some() {
                "dedicated"
            } else if self.node.is_some() || self.require.is_some() {
                "numa-local"
            } else {
                "shared"
            };
            implied.to_owned()
        });
        let stray = |key: &str, value: String, of: &str| {
            Err(wrong(
                key,
                &value,
                format!("is of placement={of}, and this is placement={kind}"),
            ))
        };
        if let Some(cores) = self.cores.filter(|_| kind != "dedicated") {
            return stray("cores", cores.to_string(), "dedicated");
        }
        if let Some(node) = self.node.filter(|_| kind != "numa-local") {
            return stray("node", node.to_string(), "numa-local");
        }
        if let Some(require) = self.require.filter(|_| kind != "numa-local") {
            return stray("require", on(require).to_owned(), "numa-local");
        }
        if let Some(map) = self.map.as_ref().filter(|_| kind != "map") {
            return stray("map", affinity::Map(map).to_string(), "map");
        }
        policy.placement = match kind.as_str() {
            "dedicated" => Placement::Dedicated {
                cores: self.cores.unwrap_or_default(),
            },
            "spread" => Placement::Spread,
            "pack" => Placement::Pack,
            "numa-local" => Placement::NumaLocal {
                require: self.require.unwrap_or(false),
                node: self.node,
            },
            "map" => Placement::Map(
                self.map
                    .ok_or_else(|| wrong("placement", "map", "needs map=[VCPU@[CPUS],…]"))?,
            ),
            _ => Placement::Shared,
        };
        match (&mut policy.cap, self.burst_us) {
            (Some(cap), burst) => cap.burst_us = burst.unwrap_or(0),
            (None, Some(burst)) => {
                return Err(wrong(
                    "burst",
                    &Time(burst).to_string(),
                    "needs a cap, as in cap=40%:10ms",
                ));
            }
            (None, None) => {}
        }
        Ok(())
    }
}

fn wrong(key: &str, value: &str, allowed: impl Into<String>) -> PolicyError {
    PolicyError {
        key: key.to_owned(),
        value: value.chars().take(60).collect(),
        allowed: allowed.into(),
    }
}

fn toggle(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "on" | "true" => Some(true),
        "off" | "false" => Some(false),
        _ => None,
    }
}

fn on(yes: bool) -> &'static str {
    if yes { "on" } else { "off" }
}

/// Without the brackets a list needs where commas would end it.
fn bare(text: &str) -> &str {
    text.strip_prefix('[')
        .and_then(|text| text.strip_suffix(']'))
        .unwrap_or(text)
}

/// A number with at most three decimals, in thousandths.
fn thousandths(text: &str) -> Option<u64> {
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || part.len() > 3 || !digits(whole) || !digits(part) {
        return None;
    }
    let part: u64 = format!("{part:0<3}").parse().ok()?;
    whole
        .parse::<u64>()
        .ok()?
        .checked_mul(1000)?
        .checked_add(part)
}

fn milli(text: &str) -> Option<u32> {
    thousandths(text)?.try_into().ok()
}

/// CPUs as Kubernetes writes them: `500m`, `2`, `1.5`.
fn millicpus(text: &str) -> Option<u32> {
    match text.strip_suffix('m') {
        Some(milli) if milli.bytes().all(|byte| byte.is_ascii_digit()) => milli.parse().ok(),
        Some(_) => None,
        None => milli(text),
    }
}

/// A time in microseconds: `300us`, `2ms`, `1.5ms`, `1s`.
fn time(text: &str) -> Option<u64> {
    let (number, unit) = text.split_at(text.find(|c: char| c.is_ascii_alphabetic())?);
    let thousandths = thousandths(number)?;
    match unit {
        "us" => (thousandths % 1000 == 0).then_some(thousandths / 1000),
        "ms" => Some(thousandths),
        "s" => thousandths.checked_mul(1000),
        _ => None,
    }
}

fn micros(text: &str) -> Option<u32> {
    time(text)?.try_into().ok()
}

/// `40%` (of one CPU, over 10 ms), `150%:20ms`, or `4ms:10ms`.
fn cap(text: &str) -> Option<Cap> {
    let (amount, period) = match text.split_once(':') {
        Some((amount, period)) => (amount, Some(time(period)?)),
        None => (text, None),
    };
    let (quota_us, period_us) = match (amount.strip_suffix('%'), period) {
        (Some(percent), period) => {
            let period_us = period.unwrap_or(CAP_PERIOD_US);
            let quota = u128::from(milli(percent)?) * u128::from(period_us) / 100_000;
            (quota.try_into().ok()?, period_us)
        }
        (None, Some(period_us)) => (time(amount)?, period_us),
        (None, None) => return None,
    };
    Some(Cap {
        quota_us,
        period_us,
        burst_us: 0,
    })
}

fn gang(text: &str) -> Option<Gang> {
    let (kind, quantum_us) = match text.split_once(':') {
        Some((kind, quantum)) => (kind, micros(quantum)?),
        None => (text, QUANTUM_US),
    };
    match kind {
        "off" if !text.contains(':') => Some(Gang::Off),
        "soft" => Some(Gang::Soft { quantum_us }),
        "adaptive" => Some(Gang::Adaptive { quantum_us }),
        _ => None,
    }
}

fn deadline(text: &str) -> Option<Deadline> {
    let times = text.split('/').map(time).collect::<Option<Vec<_>>>()?;
    let (runtime_us, deadline_us, period_us) = match times[..] {
        [runtime, period] => (runtime, period, period),
        [runtime, deadline, period] => (runtime, deadline, period),
        _ => return None,
    };
    Some(Deadline {
        runtime_us,
        deadline_us,
        period_us,
    })
}

/// A time in microseconds, printed in the unit that needs no fraction.
pub(crate) struct Time(pub(crate) u64);

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.write_str("0us"),
            us if us % 1_000_000 == 0 => write!(f, "{}s", us / 1_000_000),
            us if us % 1000 == 0 => write!(f, "{}ms", us / 1000),
            us => write!(f, "{us}us"),
        }
    }
}

/// So many of something: `1 vCPU`, `2 vCPUs`.
pub struct Count<N>(pub N, pub &'static str);

impl<N: fmt::Display + PartialEq + From<u8>> fmt::Display for Count<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(number, what) = self;
        let plural = if *number == N::from(1) { "" } else { "s" };
        write!(f, "{number} {what}{plural}")
    }
}

/// Thousandths, printed as a number with as few decimals as it needs.
pub(crate) struct Milli(pub(crate) u32);

impl fmt::Display for Milli {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 % 1000 {
            0 => write!(f, "{}", self.0 / 1000),
            part => {
                let text = format!("{}.{part:03}", self.0 / 1000);
                f.write_str(text.trim_end_matches('0'))
            }
        }
    }
}

impl fmt::Display for Cap {
    /// Quota and period; the burst is a key of its own.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", Time(self.quota_us), Time(self.period_us))
    }
}

impl fmt::Display for Deadline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/", Time(self.runtime_us))?;
        if self.deadline_us != self.period_us {
            write!(f, "{}/", Time(self.deadline_us))?;
        }
        Time(self.period_us).fmt(f)
    }
}

impl fmt::Display for Slice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Latency => f.write_str("latency"),
            Self::Default => f.write_str("default"),
            Self::Throughput => f.write_str("throughput"),
            Self::Micros(micros) => Time(u64::from(*micros)).fmt(f),
        }
    }
}

impl fmt::Display for Gang {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::Soft { quantum_us } => write!(f, "soft:{}", Time(u64::from(*quantum_us))),
            Self::Adaptive { quantum_us } => write!(f, "adaptive:{}", Time(u64::from(*quantum_us))),
        }
    }
}

impl fmt::Display for Cores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Any => "any",
            Self::Whole => "whole",
            Self::One => "one",
        })
    }
}

impl fmt::Display for SmtIsolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::Vm => "vm",
            Self::Vcpu => "vcpu",
        })
    }
}

impl Placement {
    const NAMES: [&str; 6] = ["shared", "dedicated", "spread", "pack", "numa-local", "map"];

    /// Its name in `--sched placement=`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Shared => "shared",
            Self::Dedicated { .. } => "dedicated",
            Self::Spread => "spread",
            Self::Pack => "pack",
            Self::NumaLocal { .. } => "numa-local",
            Self::Map(_) => "map",
        }
    }
}

impl fmt::Display for Placement {
    /// As in `--sched`, without what is default.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "placement={}", self.name())?;
        match self {
            Self::Dedicated { cores } if *cores != Cores::Any => write!(f, ",cores={cores}"),
            Self::NumaLocal { require, node } => {
                if let Some(node) = node {
                    write!(f, ",node={node}")?;
                }
                if *require {
                    f.write_str(",require=on")
                } else {
                    Ok(())
                }
            }
            Self::Map(map) => write!(f, ",map={}", affinity::Map(map)),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for VmPolicy {
    /// What `--sched` would be; every key that is not at its default.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.placement.fmt(f)?;
        if let Some(weight) = self.weight {
            write!(f, ",weight={weight}")?;
        }
        if let Some(cap) = self.cap {
            write!(f, ",cap={cap}")?;
            if cap.burst_us != 0 {
                write!(f, ",burst={}", Time(cap.burst_us))?;
            }
        }
        if let Some(reserve) = self.reserve_millicpus {
            write!(f, ",reserve={reserve}m")?;
        }
        if let Some(slice) = self.slice {
            write!(f, ",slice={slice}")?;
        }
        if let Some(rotate) = self.rotate_us {
            write!(f, ",rotate={}", Time(u64::from(rotate)))?;
        }
        if !self.gang.is_off() {
            write!(f, ",gang={}", self.gang)?;
        }
        if let Some(deadline) = self.deadline {
            write!(f, ",deadline={deadline}")?;
        }
        if let Some(rt) = self.rt {
            write!(f, ",rt={rt}")?;
        }
        if !self.smt.is_off() {
            write!(f, ",smt={}", self.smt)?;
        }
        if let Helpers::Set(cpus) = &self.helpers {
            write!(f, ",helpers=[{cpus}]")?;
        }
        if self.strict {
            f.write_str(",strict=on")?;
        }
        if let Some(limit) = self.overcommit_milli {
            write!(f, ",overcommit={}", Milli(limit))?;
        }
        Ok(())
    }
}
