//! What kind of partition this is, by the privileges its CPUID leaves show.

use std::arch::x86_64::__cpuid;

use serde::Serialize;

use super::{Evidence, Says};

const HYPERVISOR_PRESENT: u32 = 1 << 31;
const SIGNATURE_LEAF: u32 = 0x4000_0000;
const PRIVILEGES_LEAF: u32 = 0x4000_0003;
/// "Microsoft Hv" in EBX, ECX, EDX.
const MICROSOFT_HV: [u32; 3] = [0x7263_694d, 0x666f_736f, 0x7648_2074];
/// Privileges in the upper half, which EBX holds.
const CREATE_PARTITIONS: u32 = 1;
const CPU_MANAGEMENT: u32 = 1 << 12;

/// The kind of partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PartitionKind {
    /// The root partition: it manages the host's processors.
    Root,
    /// An L1VH: it may create partitions but not manage processors.
    L1vh,
    /// A guest of the Microsoft Hypervisor that may not create partitions.
    Guest,
    /// Not on the Microsoft Hypervisor, as far as CPUID shows.
    Elsewhere,
}

impl PartitionKind {
    /// The kind in a few words.
    #[must_use]
    pub fn meaning(self) -> &'static str {
        match self {
            Self::Root => "this is the root partition",
            Self::L1vh => "this is an L1VH",
            Self::Guest => "this is a guest that may not create partitions",
            Self::Elsewhere => "the kind of partition is not known",
        }
    }
}

pub(super) fn read() -> (PartitionKind, Evidence) {
    let (kind, value) = if __cpuid(1).ecx & HYPERVISOR_PRESENT == 0 {
        (
            PartitionKind::Elsewhere,
            "no hypervisor in CPUID".to_owned(),
        )
    } else {
        let leaf = __cpuid(SIGNATURE_LEAF);
        if [leaf.ebx, leaf.ecx, leaf.edx] == MICROSOFT_HV && leaf.eax >= PRIVILEGES_LEAF {
            let privileges = __cpuid(PRIVILEGES_LEAF).ebx;
            (kind(privileges), format!("privileges {privileges:#x}"))
        } else {
            (
                PartitionKind::Elsewhere,
                "not the Microsoft Hypervisor in CPUID".to_owned(),
            )
        }
    };
    let evidence = Evidence::new("partition", Says::Nothing, value, kind.meaning());
    (kind, evidence)
}

fn kind(privileges: u32) -> PartitionKind {
    if privileges & CPU_MANAGEMENT != 0 {
        PartitionKind::Root
    } else if privileges & CREATE_PARTITIONS != 0 {
        PartitionKind::L1vh
    } else {
        PartitionKind::Guest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn privileges_tell_root_from_l1vh() {
        let root = CPU_MANAGEMENT | CREATE_PARTITIONS;
        assert_eq!(kind(root), PartitionKind::Root);
        assert_eq!(kind(CREATE_PARTITIONS), PartitionKind::L1vh);
        assert_eq!(kind(0), PartitionKind::Guest);
    }
}
