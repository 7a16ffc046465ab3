//! What no host takes: values the kernel refuses and requests that contradict each other, each with the key, the value and
//! what is allowed, and the nearest policy that is sound.

use serde::{Deserialize, Serialize};

use super::{Cap, Deadline, Gang, Helpers, Placement, Slice, SmtIsolation, VmPolicy};
use crate::Cores;

/// One thing that is wrong with a policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{key}={value}: {allowed}")]
pub struct PolicyError {
    /// The key, as in `--sched`.
    pub key: String,
    /// What it was set to.
    pub value: String,
    /// What is allowed.
    pub allowed: String,
}

/// The least and the most of a value.
type Range<T> = std::ops::RangeInclusive<T>;

/// Shares, as `cpu.weight` takes them.
pub(crate) const WEIGHT: Range<u32> = 1..=10_000;
/// Bandwidth periods the kernel takes, in microseconds.
pub(crate) const CAP_PERIOD_US: Range<u64> = 1_000..=1_000_000;
/// The least quota the kernel takes, in microseconds.
pub(crate) const CAP_QUOTA_US: u64 = 1_000;
/// Slices the kernel takes, in microseconds.
pub(crate) const SLICE_US: Range<u32> = 100..=100_000;
/// Turns: shorter ones cost more than they give, longer ones stop a guest for too long.
pub(crate) const QUANTUM_US: Range<u32> = 1_000..=1_000_000;
/// Deadline periods the kernel takes, in microseconds.
pub(crate) const DEADLINE_PERIOD_US: Range<u64> = 100..=4_000_000;
/// The shortest runtime the kernel takes, in microseconds.
pub(crate) const DEADLINE_RUNTIME_US: u64 = 2;
/// Part of a CPU that may be promised, in thousandths; the rest is the host's.
pub(crate) const PROMISE_MILLI: u32 = 950;
/// Overcommit limits, in thousandths of a vCPU per CPU.
pub(crate) const OVERCOMMIT: Range<u32> = 1_000..=100_000;

impl VmPolicy {
    /// Everything that is wrong with this policy for a VM of `vcpus` vCPUs on any host; empty if nothing is.
    #[must_use]
    pub fn check(&self, vcpus: u32) -> Vec<PolicyError> {
        let mut wrong = Vec::new();
        let mut complain = |key: &str, value: String, allowed: String| {
            wrong.push(PolicyError {
                key: key.to_owned(),
                value,
                allowed,
            });
        };
        if let Some(weight) = self.weight.filter(|weight| !WEIGHT.contains(weight)) {
            complain(
                "weight",
                weight.to_string(),
                "allowed is 1 to 10000".to_owned(),
            );
        }
        if let Some(cap) = self.cap
            && let Some(why) = cap.unsound()
        {
            complain("cap", cap.to_string(), why);
        }
        if let Some(reserve) = self.reserve_millicpus {
            let most = self.most_reserve(vcpus);
            if reserve == 0 || reserve > most {
                complain(
                    "reserve",
                    format!("{reserve}m"),
                    format!(
                        "allowed is 1m to {most}m: {PROMISE_MILLI}m for each vCPU, and no more than the cap"
                    ),
                );
            }
        }
        if let Some(Slice::Micros(micros)) = self.slice
            && !SLICE_US.contains(&micros)
        {
            complain(
                "slice",
                format!("{micros}us"),
                "the kernel takes 100us to 100ms".to_owned(),
            );
        }
        if let Some(rotate) = self.rotate_us.filter(|rotate| !QUANTUM_US.contains(rotate)) {
            complain(
                "rotate",
                format!("{rotate}us"),
                "allowed is 1ms to 1s".to_owned(),
            );
        }
        if let Gang::Soft { quantum_us } | Gang::Adaptive { quantum_us } = self.gang
            && !QUANTUM_US.contains(&quantum_us)
        {
            complain(
                "gang",
                format!("{quantum_us}us"),
                "a turn of 1ms to 1s is allowed".to_owned(),
            );
        }
        if let Some(deadline) = self.deadline
            && let Some(why) = deadline.unsound()
        {
            complain("deadline", deadline.to_string(), why);
        }
        if let Some(rt) = self.rt.filter(|rt| !(1..=99).contains(rt)) {
            complain("rt", rt.to_string(), "allowed is 1 to 99".to_owned());
        }
        if let Some(limit) = self
            .overcommit_milli
            .filter(|limit| !OVERCOMMIT.contains(limit))
        {
            complain(
                "overcommit",
                super::syntax::Milli(limit).to_string(),
                "allowed is 1 to 100".to_owned(),
            );
        }
        if let Helpers::Set(cpus) = &self.helpers
            && cpus.is_empty()
        {
            complain(
                "helpers",
                String::new(),
                "name at least one CPU, or auto".to_owned(),
            );
        }
        if let Placement::Map(map) = &self.placement {
            if map.is_empty() {
                complain("map", "[]".to_owned(), "name at least one vCPU".to_owned());
            }
            let mut named = std::collections::BTreeSet::new();
            for (vcpu, cpus) in map {
                if *vcpu >= vcpus {
                    let last = vcpus.saturating_sub(1);
                    complain(
                        "map",
                        format!("{vcpu}@[{cpus}]"),
                        match last {
                            0 => "this VM has vCPU 0 alone".to_owned(),
                            _ => format!("this VM has vCPUs 0 to {last}"),
                        },
                    );
                }
                if cpus.is_empty() {
                    complain(
                        "map",
                        format!("{vcpu}@[]"),
                        "name at least one CPU".to_owned(),
                    );
                }
                if !named.insert(*vcpu) {
                    complain(
                        "map",
                        format!("{vcpu}@[{cpus}]"),
                        format!("vCPU {vcpu} is named twice"),
                    );
                }
            }
        }
        for (key, value, with) in self.contradictions() {
            complain(key, value, format!("cannot be had together with {with}"));
        }
        wrong
    }

    /// The most that can be reserved for `vcpus` vCPUs under this policy's cap, in thousandths of a CPU.
    pub(crate) fn most_reserve(&self, vcpus: u32) -> u32 {
        let most = PROMISE_MILLI.saturating_mul(vcpus);
        match self.cap {
            Some(cap) => most.min(cap.millicpus()),
            None => most,
        }
    }

    /// Requests that exclude each other: the key to give up, its value, and what it contradicts.
    fn contradictions(&self) -> Vec<(&'static str, String, &'static str)> {
        let mut found = Vec::new();
        if let Some(rt) = self.rt
            && self.deadline.is_some()
        {
            found.push(("rt", rt.to_string(), "deadline (two classes)"));
        }
        if let Some(slice) = self.slice.filter(|slice| *slice != Slice::Default) {
            if self.rt.is_some() {
                found.push((
                    "slice",
                    slice.to_string(),
                    "rt (slices are of the fair class)",
                ));
            } else if self.deadline.is_some() {
                found.push((
                    "slice",
                    slice.to_string(),
                    "deadline (slices are of the fair class)",
                ));
            }
        }
        if !self.gang.is_off() {
            if self.rt.is_some() {
                found.push((
                    "gang",
                    self.gang.to_string(),
                    "rt (turns are taken in the fair class)",
                ));
            } else if self.deadline.is_some() {
                found.push((
                    "gang",
                    self.gang.to_string(),
                    "deadline (turns are taken in the fair class)",
                ));
            }
        }
        if let Some(rotate) = self.rotate_us {
            let with = match (self.gang.is_off(), self.rt, self.deadline) {
                (false, _, _) => Some("gang (a gang takes turns already)"),
                (_, Some(_), _) => Some("rt (turns are taken in the fair class)"),
                (_, _, Some(_)) => Some("deadline (turns are taken in the fair class)"),
                _ => None,
            };
            found.extend(with.map(|with| ("rotate", format!("{rotate}us"), with)));
        }
        if let Some(deadline) = self.deadline
            && matches!(
                self.placement,
                Placement::Map(_)
                    | Placement::Spread
                    | Placement::Pack
                    | Placement::NumaLocal { .. }
            )
        {
            found.push((
                "deadline",
                deadline.to_string(),
                "pinned vCPUs: the kernel takes deadlines only for placement=shared, or dedicated",
            ));
        }
        if self.smt == SmtIsolation::Vcpu
            && let Placement::Dedicated {
                cores: Cores::Whole,
            } = self.placement
        {
            found.push((
                "smt",
                "vcpu".to_owned(),
                "cores=whole, which fills the threads of a core with vCPUs (cores=one does not)",
            ));
        }
        found
    }

    /// This policy with every value moved to the nearest that is allowed and every contradiction resolved: a policy
    /// [`Self::check`] finds nothing wrong with.
    #[must_use]
    pub fn clamped(&self, vcpus: u32) -> Self {
        let into = |value: u32, range: &Range<u32>| value.clamp(*range.start(), *range.end());
        let mut policy = self.clone();
        policy.weight = self.weight.map(|weight| into(weight, &WEIGHT));
        policy.cap = self.cap.map(Cap::clamped);
        policy.slice = self.slice.map(|slice| match slice {
            Slice::Micros(micros) => Slice::Micros(into(micros, &SLICE_US)),
            preset => preset,
        });
        policy.rotate_us = self.rotate_us.map(|rotate| into(rotate, &QUANTUM_US));
        policy.gang = match self.gang {
            Gang::Off => Gang::Off,
            Gang::Soft { quantum_us } => Gang::Soft {
                quantum_us: into(quantum_us, &QUANTUM_US),
            },
            Gang::Adaptive { quantum_us } => Gang::Adaptive {
                quantum_us: into(quantum_us, &QUANTUM_US),
            },
        };
        policy.deadline = self.deadline.map(Deadline::clamped);
        policy.rt = self.rt.map(|rt| rt.clamp(1, 99));
        policy.overcommit_milli = self.overcommit_milli.map(|limit| into(limit, &OVERCOMMIT));
        if matches!(&policy.helpers, Helpers::Set(cpus) if cpus.is_empty()) {
            policy.helpers = Helpers::Auto;
        }
        if let Placement::Map(map) = &mut policy.placement {
            let mut named = std::collections::BTreeSet::new();
            map.retain(|(vcpu, cpus)| *vcpu < vcpus && !cpus.is_empty() && named.insert(*vcpu));
            if map.is_empty() {
                policy.placement = Placement::Shared;
            }
        }
        policy.reserve_millicpus = policy
            .reserve_millicpus
            .map(|reserve| reserve.clamp(1, policy.most_reserve(vcpus).max(1)));
        for (key, ..) in policy.contradictions() {
            match key {
                "rt" => policy.rt = None,
                "slice" => policy.slice = None,
                "gang" => policy.gang = Gang::Off,
                "rotate" => policy.rotate_us = None,
                "deadline" => policy.deadline = None,
                _ => policy.smt = SmtIsolation::Vm,
            }
        }
        policy
    }
}

impl Cap {
    /// What the cap comes to, in thousandths of a CPU, rounded down.
    #[must_use]
    pub fn millicpus(self) -> u32 {
        let milli = u128::from(self.quota_us) * 1000 / u128::from(self.period_us.max(1));
        u32::try_from(milli).unwrap_or(u32::MAX)
    }

    /// The longest the VM can be stopped when `busy` of its vCPUs run at once, in microseconds: the quota is gone after
    /// `quota / busy` and the rest of the period is dark.
    #[must_use]
    pub fn blackout_us(self, busy: u32) -> u64 {
        self.period_us
            .saturating_sub(self.quota_us / u64::from(busy.max(1)))
    }

    fn unsound(self) -> Option<String> {
        if !CAP_PERIOD_US.contains(&self.period_us) {
            return Some("the kernel takes periods of 1ms to 1s".to_owned());
        }
        if self.quota_us > Self::most_quota(self.period_us) {
            return Some(format!(
                "a quota is at most that of {} CPUs, the most a host can have",
                crate::CpuSet::LIMIT
            ));
        }
        if self.quota_us < CAP_QUOTA_US {
            let percent = (CAP_QUOTA_US * 100).div_ceil(self.period_us);
            return Some(format!(
                "the kernel takes quotas of 1ms and more: {percent}% of this period, or a longer period"
            ));
        }
        (self.burst_us > self.quota_us)
            .then(|| format!("burst is at most the quota, {}us", self.quota_us))
    }

    /// Every CPU there can be, all the time.
    fn most_quota(period_us: u64) -> u64 {
        period_us.saturating_mul(u64::from(crate::CpuSet::LIMIT))
    }

    /// The nearest cap the kernel takes; the share of a CPU is kept where a longer period makes that possible.
    fn clamped(self) -> Self {
        let period = self
            .period_us
            .clamp(*CAP_PERIOD_US.start(), *CAP_PERIOD_US.end());
        let scale = |value: u64| {
            let scaled = u128::from(value) * u128::from(period) / u128::from(self.period_us.max(1));
            u64::try_from(scaled).unwrap_or(u64::MAX)
        };
        let (mut quota, mut period_us) = (scale(self.quota_us), period);
        if quota < CAP_QUOTA_US {
            if let Some(longer) = (CAP_QUOTA_US * period)
                .checked_div(quota)
                .filter(|longer| CAP_PERIOD_US.contains(longer))
            {
                period_us = longer;
            }
            quota = CAP_QUOTA_US;
        }
        quota = quota.min(Self::most_quota(period_us));
        Self {
            quota_us: quota,
            period_us,
            burst_us: self.burst_us.min(quota),
        }
    }
}

impl Deadline {
    /// What one vCPU takes, in thousandths of a CPU, rounded up.
    #[must_use]
    pub fn millicpus(self) -> u32 {
        let milli =
            (u128::from(self.runtime_us) * 1000).div_ceil(u128::from(self.period_us.max(1)));
        u32::try_from(milli).unwrap_or(u32::MAX)
    }

    fn unsound(self) -> Option<String> {
        if !DEADLINE_PERIOD_US.contains(&self.period_us) {
            return Some("the kernel takes periods of 100us to 4s".to_owned());
        }
        if self.runtime_us < DEADLINE_RUNTIME_US {
            return Some("the kernel takes runtimes of 2us and more".to_owned());
        }
        if self.runtime_us > self.deadline_us || self.deadline_us > self.period_us {
            return Some(
                "runtime is at most the deadline, the deadline at most the period".to_owned(),
            );
        }
        (self.millicpus() > PROMISE_MILLI).then(|| "a vCPU gets at most 95% of a CPU".to_owned())
    }

    fn clamped(self) -> Self {
        let period_us = self
            .period_us
            .clamp(*DEADLINE_PERIOD_US.start(), *DEADLINE_PERIOD_US.end());
        let most = period_us * u64::from(PROMISE_MILLI) / 1000;
        let runtime_us = self.runtime_us.clamp(DEADLINE_RUNTIME_US, most);
        Self {
            runtime_us,
            deadline_us: self.deadline_us.clamp(runtime_us, period_us),
            period_us,
        }
    }
}
