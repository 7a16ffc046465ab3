//! What the client asked to see: installed intercepts and registered CPUID results.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

use crate::errno::HvStatus;
use crate::trace;
use crate::vp::can_intercept_cpuid;

/// A CPUID result registered with `HVCALL_REGISTER_INTERCEPT_RESULT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CpuidResult {
    /// Leaf (EAX).
    pub(crate) leaf: u32,
    /// Subleaf (ECX).
    pub(crate) subleaf: u32,
    /// The result holds for every VP, or for this one.
    pub(crate) vp_index: Option<u32>,
    /// The result holds for every subleaf.
    pub(crate) any_subleaf: bool,
    /// EAX, EBX, ECX, EDX.
    pub(crate) values: [u32; 4],
    /// Which bits of the values replace those of the hypervisor.
    pub(crate) masks: [u32; 4],
}

/// Access mask bits of an intercept (`HV_INTERCEPT_ACCESS_MASK_*`).
pub(crate) const ACCESS_READ: u32 = 1;
/// See [`ACCESS_READ`].
pub(crate) const ACCESS_WRITE: u32 = 2;
/// See [`ACCESS_READ`].
pub(crate) const ACCESS_EXECUTE: u32 = 4;

/// What is intercepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Target {
    /// Every MSR without an intercept of its own.
    Msr,
    MsrIndex(u32),
    Cpuid(u32),
}

impl Target {
    /// The accesses that can be intercepted.
    fn allowed(self) -> u32 {
        match self {
            Self::Msr | Self::MsrIndex(_) => ACCESS_READ | ACCESS_WRITE,
            Self::Cpuid(_) => ACCESS_EXECUTE,
        }
    }
}

#[derive(Default)]
struct Installed {
    access: BTreeMap<Target, u32>,
    results: Vec<CpuidResult>,
}

/// The intercepts of one partition. A VP asks before it enters the guest whether [`Intercepts::generation`] has
/// moved.
#[derive(Default)]
pub(crate) struct Intercepts {
    installed: RwLock<Installed>,
    generation: AtomicU64,
}

impl Intercepts {
    /// `HVCALL_INSTALL_INTERCEPT`: `kind` is `HV_INTERCEPT_TYPE_*`, `parameter` belongs to it, an empty `access`
    /// takes the intercept away.
    pub(crate) fn install(&self, access: u32, kind: u32, parameter: u64) -> HvStatus {
        let target = match kind {
            1 => Target::Msr,
            2 if can_intercept_cpuid() => Target::Cpuid(parameter as u32),
            12 => Target::MsrIndex(parameter as u32),
            other => {
                trace::unimplemented(&format!("HVCALL_INSTALL_INTERCEPT type {other}"));
                return HvStatus::INVALID_PARAMETER;
            }
        };
        if access & !target.allowed() != 0 {
            return HvStatus::INVALID_PARAMETER;
        }
        let mut installed = self
            .installed
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if access == 0 {
            installed.access.remove(&target);
        } else {
            installed.access.insert(target, access);
        }
        self.generation.fetch_add(1, Ordering::Release);
        HvStatus::SUCCESS
    }

    /// Registers a CPUID result; it replaces one for the same leaf, subleaf and VP.
    pub(crate) fn register(&self, result: CpuidResult) {
        let mut installed = self
            .installed
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let same = |old: &CpuidResult| {
            old.leaf == result.leaf
                && old.vp_index == result.vp_index
                && old.any_subleaf == result.any_subleaf
                && (result.any_subleaf || old.subleaf == result.subleaf)
        };
        installed.results.retain(|old| !same(old));
        installed.results.push(result);
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Counts changes: a VP re-reads its CPUID table and MSR filter when it differs from what it saw last.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// All registered CPUID results, oldest first.
    pub(crate) fn cpuid_results(&self) -> Vec<CpuidResult> {
        self.installed
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .results
            .clone()
    }

    fn access(&self, target: Target) -> u32 {
        let installed = self
            .installed
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        installed.access.get(&target).copied().unwrap_or(0)
    }

    /// The access mask installed for CPUID leaf `leaf` (0: not intercepted).
    pub(crate) fn cpuid(&self, leaf: u32) -> u32 {
        self.access(Target::Cpuid(leaf))
    }

    /// The access mask installed for all MSRs (0: not intercepted).
    pub(crate) fn msr(&self) -> u32 {
        self.access(Target::Msr)
    }

    /// The access mask installed for MSR `index` (0: not intercepted by index).
    pub(crate) fn msr_index(&self, index: u32) -> u32 {
        self.access(Target::MsrIndex(index))
    }

    /// The MSRs with an intercept of their own, and its access mask.
    pub(crate) fn msr_indices(&self) -> Vec<(u32, u32)> {
        let installed = self
            .installed
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let of_msr = |(target, access): (&Target, &u32)| match target {
            Target::MsrIndex(index) => Some((*index, *access)),
            _ => None,
        };
        installed.access.iter().filter_map(of_msr).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_intercept_is_installed_and_taken_away() {
        let intercepts = Intercepts::default();
        assert_eq!(
            intercepts.install(ACCESS_WRITE, 12, 0x1b),
            HvStatus::SUCCESS
        );
        assert_eq!(intercepts.msr_index(0x1b), ACCESS_WRITE);
        assert_eq!(intercepts.msr_indices(), [(0x1b, ACCESS_WRITE)]);
        assert_eq!(intercepts.generation(), 1);
        assert_eq!(intercepts.install(0, 12, 0x1b), HvStatus::SUCCESS);
        assert_eq!(intercepts.msr_index(0x1b), 0);
        assert_eq!(intercepts.generation(), 2);
    }

    #[test]
    fn an_access_that_cannot_be_intercepted_is_refused() {
        let intercepts = Intercepts::default();
        assert_eq!(
            intercepts.install(ACCESS_EXECUTE, 12, 0x1b),
            HvStatus::INVALID_PARAMETER
        );
        assert_eq!(
            intercepts.install(ACCESS_READ, 2, 1),
            HvStatus::INVALID_PARAMETER
        );
        assert_eq!(
            intercepts.install(ACCESS_EXECUTE, 3, 14),
            HvStatus::INVALID_PARAMETER
        );
        assert_eq!(
            intercepts.install(ACCESS_READ, 99, 0),
            HvStatus::INVALID_PARAMETER
        );
        assert_eq!(intercepts.generation(), 0);
    }

    #[test]
    fn a_later_result_for_the_same_leaf_replaces_the_earlier() {
        let intercepts = Intercepts::default();
        let result = CpuidResult {
            leaf: 0xb,
            subleaf: 1,
            vp_index: Some(0),
            any_subleaf: false,
            values: [1; 4],
            masks: [!0; 4],
        };
        intercepts.register(result);
        intercepts.register(CpuidResult {
            subleaf: 0,
            ..result
        });
        intercepts.register(CpuidResult {
            values: [2; 4],
            ..result
        });
        let results = intercepts.cpuid_results();
        assert_eq!(results.len(), 2);
        assert_eq!(results[1].values, [2; 4]);
    }
}
