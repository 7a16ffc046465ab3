//! Where vCPUs go when some of their CPUs are gone. Pure.

use crate::{CpuSet, VcpuPlan};

/// Where one vCPU is to run now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) cpus: CpuSet,
    /// None of its planned CPUs is left.
    pub(super) displaced: bool,
}

/// Each vCPU keeps what is left of its CPUs. One that has nothing left gets one of `available` that fewest of its siblings are on,
/// in the order of their numbers; CPUs that are somebody's own only if there are no others.
pub(super) fn remap(vcpus: &[VcpuPlan], available: &CpuSet, taken: &CpuSet) -> Vec<Place> {
    let mut places: Vec<Place> = vcpus
        .iter()
        .map(|vcpu| {
            let cpus = &vcpu.cpus & available;
            Place {
                displaced: cpus.is_empty(),
                cpus,
            }
        })
        .collect();
    let free = available - taken;
    let pool = if free.is_empty() { available } else { &free };
    let mut load: Vec<(usize, u32)> = pool
        .iter()
        .map(|cpu| {
            let siblings = places.iter().filter(|place| place.cpus.contains(cpu));
            (siblings.count(), cpu)
        })
        .collect();
    for place in places.iter_mut().filter(|place| place.displaced) {
        if let Some(least) = load
            .iter_mut()
            .min_by_key(|(siblings, cpu)| (*siblings, *cpu))
        {
            least.0 += 1;
            place.cpus = CpuSet::one(least.1);
        }
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vcpus(cpus: &[&str]) -> Vec<VcpuPlan> {
        (0..)
            .zip(cpus)
            .map(|(vcpu, cpus)| VcpuPlan {
                vcpu,
                cpus: cpus.parse().unwrap(),
                exclusive: false,
                why: String::new(),
            })
            .collect()
    }

    fn remapped(cpus: &[&str], available: &str, taken: &str) -> Vec<String> {
        remap(
            &vcpus(cpus),
            &available.parse().unwrap(),
            &taken.parse().unwrap(),
        )
        .into_iter()
        .map(|place| place.cpus.to_string())
        .collect()
    }

    #[test]
    fn what_is_left_is_kept() {
        assert_eq!(remapped(&["0-3", "2-3"], "0-2", ""), ["0-2", "2"]);
    }

    #[test]
    fn the_displaced_go_where_fewest_siblings_are() {
        assert_eq!(
            remapped(&["0", "1", "2", "3"], "0-1", ""),
            ["0", "1", "0", "1"]
        );
        assert_eq!(remapped(&["0", "7"], "0-2", "1"), ["0", "2"]);
        assert_eq!(remapped(&["7"], "1", "1"), ["1"]);
    }
}
