//! What CPUID answers on one VP.
//!
//! The base is what KVM supports without the features the client turned off. On top of it come the VP's own APIC id,
//! the leaves of the Microsoft Hypervisor, and last the results the client registered for itself. KVM gets the table once
//! (`KVM_SET_CPUID2`); KVM's own paravirtual leaves are not in it.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;
use vmm_sys_util::ioctl::ioctl_with_mut_ptr;

use super::walk::bits::{CR4_OSXSAVE, CR4_PKE};
use crate::intercepts::CpuidResult;
use crate::partition::Partition;
use crate::property::code;

/// First leaf of the hypervisor: the highest one, and the vendor.
const VENDOR: u32 = 0x4000_0000;
const INTERFACE: u32 = 0x4000_0001;
/// Leaf of the hypervisor's version.
pub(super) const VERSION: u32 = 0x4000_0002;
/// Leaf of the partition's privileges and the hypervisor's features.
pub(super) const FEATURES: u32 = 0x4000_0003;
const RECOMMENDATIONS: u32 = 0x4000_0004;
const LIMITS: u32 = 0x4000_0005;
const HARDWARE: u32 = 0x4000_0006;
const HYPERVISOR_LEAVES: std::ops::Range<u32> = 0x4000_0000..0x4001_0000;

/// `KVM_GET_SUPPORTED_HV_CPUID`: `_IOWR(KVMIO, 0xc1, struct kvm_cpuid2)`.
const KVM_GET_SUPPORTED_HV_CPUID: libc::c_ulong = 0xc008_aec1;
const HV_ENTRIES: usize = 32;

const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_ECX_OSXSAVE: u32 = 1 << 27;
const LEAF7_ECX_PKU: u32 = 1 << 3;
const LEAF7_ECX_OSPKE: u32 = 1 << 4;
const X2APIC_TOPOLOGY: [u32; 2] = [0xb, 0x1f];
const CORE: u32 = 2;
const SMT: u32 = 1;

/// Bits of `SYNTHETIC_PROC_FEATURES`.
mod synthetic {
    pub(super) const HYPERVISOR_PRESENT: u64 = 1 << 0;
    pub(super) const HV1: u64 = 1 << 1;
    /// Bits 2 to 11: what the partition may access.
    pub(super) const ACCESS: [(u8, u8); 10] = [
        (2, 0),
        (3, 1),
        (4, 2),
        (5, 3),
        (6, 4),
        (7, 5),
        (8, 6),
        (9, 9),
        (10, 10),
        (11, 11),
    ];
    /// Features, and their bits in EDX of the feature leaf.
    pub(super) const FEATURES: [(u8, u8); 3] = [(11, 8), (18, 15), (22, 19)];
    /// Features, and their bits among the recommendations.
    pub(super) const RECOMMENDED: [(u8, u8); 3] = [(25, 2), (26, 10), (6, 3)];
}

/// The CPUID table of one VP.
pub(super) struct Table {
    entries: Vec<kvm_cpuid_entry2>,
}

impl Table {
    /// The table of VP `vp_index` as things stand in its partition.
    pub(super) fn new(partition: &Partition, vp_index: u32) -> Self {
        let mut entries: Vec<_> = partition
            .cpuid
            .as_slice()
            .iter()
            .filter(|entry| !HYPERVISOR_LEAVES.contains(&entry.function))
            .copied()
            .collect();
        let property = |code| partition.properties.get(code).unwrap_or(0);
        identify(
            &mut entries,
            vp_index,
            property(code::PROCESSORS_PER_SOCKET) as u32,
        );
        let features = property(code::SYNTHETIC_PROC_FEATURES);
        if features & synthetic::HYPERVISOR_PRESENT != 0 {
            entries.extend(hypervisor(&supported(&partition.kvm), features));
        }
        for entry in entries.iter_mut().filter(|entry| entry.function == 1) {
            set(
                &mut entry.ecx,
                LEAF1_ECX_HYPERVISOR,
                features & synthetic::HYPERVISOR_PRESENT != 0,
            );
        }
        for result in partition.intercepts.cpuid_results() {
            if result.vp_index.is_none_or(|index| index == vp_index) {
                apply(&mut entries, &result);
            }
        }
        Self { entries }
    }

    /// The form `KVM_SET_CPUID2` takes; `None` when there are more entries than it allows.
    pub(super) fn for_kvm(&self) -> Option<CpuId> {
        CpuId::from_entries(&self.entries).ok()
    }

    /// EAX, EBX, ECX, EDX of CPUID on a VP with these control registers.
    pub(super) fn values(&self, leaf: u32, subleaf: u32, cr4: u64, xfem: u64) -> [u32; 4] {
        let Some(entry) = self.find(leaf, subleaf) else {
            return self.beyond(leaf, subleaf);
        };
        let mut values = [entry.eax, entry.ebx, entry.ecx, entry.edx];
        match (leaf, subleaf) {
            (1, _) => set(&mut values[2], LEAF1_ECX_OSXSAVE, cr4 & CR4_OSXSAVE != 0),
            (7, 0) => {
                let protection_keys = cr4 & CR4_PKE != 0 && values[2] & LEAF7_ECX_PKU != 0;
                set(&mut values[2], LEAF7_ECX_OSPKE, protection_keys);
            }
            (0xd, 0) => values[1] = self.xsave_size(xfem),
            _ => {}
        }
        values
    }

    fn find(&self, leaf: u32, subleaf: u32) -> Option<&kvm_cpuid_entry2> {
        self.entries.iter().find(|entry| {
            entry.function == leaf
                && (entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX == 0 || entry.index == subleaf)
        })
    }

    /// A leaf that does not exist: zeros, but topology keeps its x2APIC id in every subleaf.
    fn beyond(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        match self.find(leaf, 0) {
            Some(entry) if X2APIC_TOPOLOGY.contains(&leaf) => [0, 0, subleaf & 0xff, entry.edx],
            _ => [0; 4],
        }
    }

    /// Bytes of the standard XSAVE area for the components in `xfem`.
    fn xsave_size(&self, xfem: u64) -> u32 {
        const LEGACY_AND_HEADER: u32 = 512 + 64;
        (2..63)
            .filter(|component| xfem >> component & 1 != 0)
            .filter_map(|component| self.find(0xd, component))
            .map(|entry| entry.ebx + entry.eax)
            .fold(LEGACY_AND_HEADER, u32::max)
    }
}

fn set(register: &mut u32, bits: u32, on: bool) {
    *register = *register & !bits | if on { bits } else { 0 };
}

/// Gives the VP its own APIC id and a topology of single-threaded cores.
fn identify(entries: &mut Vec<kvm_cpuid_entry2>, vp_index: u32, per_socket: u32) {
    let per_socket = per_socket.max(1);
    let shift = per_socket.next_power_of_two().trailing_zeros();
    for entry in entries.iter_mut() {
        match entry.function {
            1 => {
                entry.ebx =
                    entry.ebx & 0xffff | per_socket.min(0xff) << 16 | (vp_index & 0xff) << 24;
                set(&mut entry.edx, 1 << 28, per_socket > 1);
            }
            // Bits 31 to 26: cores of a socket, 25 to 14: threads that share the cache.
            4 => entry.eax &= 0x3fff,
            0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | (per_socket - 1).min(0xff),
            0x8000_001d => entry.eax &= 0x3fff,
            0x8000_001e => {
                entry.eax = vp_index;
                entry.ebx = vp_index & 0xff;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    let highest = entries
        .iter()
        .find(|entry| entry.function == 0)
        .map_or(0, |entry| entry.eax);
    entries.retain(|entry| !X2APIC_TOPOLOGY.contains(&entry.function));
    for leaf in X2APIC_TOPOLOGY.into_iter().filter(|leaf| *leaf <= highest) {
        for (index, level, width, count) in
            [(0, SMT, 0, 1), (1, CORE, shift, per_socket), (2, 0, 0, 0)]
        {
            entries.push(kvm_cpuid_entry2 {
                function: leaf,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: width,
                ebx: count,
                ecx: index | level << 8,
                edx: vp_index,
                ..Default::default()
            });
        }
    }
}

/// The Hyper-V leaves KVM can serve; none when it is built without them.
fn supported(kvm: &Kvm) -> Vec<kvm_cpuid_entry2> {
    let Ok(mut list) = CpuId::new(HV_ENTRIES) else {
        return Vec::new();
    };
    // SAFETY: KVM fills in at most as many entries as the list says it has room for, and the number it wrote.
    let result = unsafe {
        ioctl_with_mut_ptr(
            kvm,
            KVM_GET_SUPPORTED_HV_CPUID,
            list.as_mut_fam_struct_ptr(),
        )
    };
    if result < 0 {
        Vec::new()
    } else {
        list.as_slice().to_vec()
    }
}

/// The leaves of the Microsoft Hypervisor: what KVM serves of what the partition was given.
fn hypervisor(supported: &[kvm_cpuid_entry2], features: u64) -> Vec<kvm_cpuid_entry2> {
    let from_kvm = |leaf: u32| {
        supported
            .iter()
            .find(|entry| entry.function == leaf)
            .copied()
            .unwrap_or(kvm_cpuid_entry2 {
                function: leaf,
                ..Default::default()
            })
    };
    // Bits that stand for a feature the partition was not given.
    let refused = |table: &[(u8, u8)]| {
        table
            .iter()
            .filter(|(feature, _)| features >> feature & 1 == 0)
            .fold(0u32, |bits, (_, bit)| bits | 1 << bit)
    };
    let known = |table: &[(u8, u8)]| table.iter().fold(0u32, |bits, (_, bit)| bits | 1 << bit);
    let mut leaves = Vec::new();
    let text = |bytes: &[u8; 4]| u32::from_le_bytes(*bytes);
    leaves.push(kvm_cpuid_entry2 {
        function: VENDOR,
        eax: HARDWARE,
        ebx: text(b"Micr"),
        ecx: text(b"osof"),
        edx: text(b"t Hv"),
        ..Default::default()
    });
    if features & synthetic::HV1 == 0 {
        leaves[0].eax = INTERFACE;
    }
    leaves.push(kvm_cpuid_entry2 {
        function: INTERFACE,
        eax: text(b"Hv#1"),
        ..Default::default()
    });
    if features & synthetic::HV1 == 0 {
        return leaves;
    }
    leaves.push(from_kvm(VERSION));
    let mut entry = from_kvm(FEATURES);
    entry.eax &= known(&synthetic::ACCESS) & !refused(&synthetic::ACCESS);
    // Privileges to post messages and signal events go with the SynIC.
    if features >> 4 & 1 == 0 {
        entry.ebx = 0;
    }
    entry.edx &= !refused(&synthetic::FEATURES);
    leaves.push(entry);
    let mut entry = from_kvm(RECOMMENDATIONS);
    entry.eax &= !refused(&synthetic::RECOMMENDED);
    leaves.push(entry);
    leaves.push(from_kvm(LIMITS));
    leaves.push(from_kvm(HARDWARE));
    leaves
}

/// Puts a result the client registered into the table.
fn apply(entries: &mut Vec<kvm_cpuid_entry2>, result: &CpuidResult) {
    let matches = |entry: &kvm_cpuid_entry2| {
        entry.function == result.leaf && (result.any_subleaf || entry.index == result.subleaf)
    };
    if !entries.iter().any(matches) {
        let flags = if result.any_subleaf {
            0
        } else {
            KVM_CPUID_FLAG_SIGNIFCANT_INDEX
        };
        entries.push(kvm_cpuid_entry2 {
            function: result.leaf,
            index: if result.any_subleaf {
                0
            } else {
                result.subleaf
            },
            flags,
            ..Default::default()
        });
    }
    for entry in entries.iter_mut().filter(|entry| matches(entry)) {
        let registers = [
            &mut entry.eax,
            &mut entry.ebx,
            &mut entry.ecx,
            &mut entry.edx,
        ];
        for (register, (value, mask)) in registers
            .into_iter()
            .zip(result.values.iter().zip(result.masks))
        {
            *register = *register & !mask | value & mask;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, values: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            flags: if function == 0xd {
                KVM_CPUID_FLAG_SIGNIFCANT_INDEX
            } else {
                0
            },
            eax: values[0],
            ebx: values[1],
            ecx: values[2],
            edx: values[3],
            ..Default::default()
        }
    }

    #[test]
    fn each_vp_has_its_apic_id() {
        let mut entries = vec![
            leaf(0, 0, [0xd, 0, 0, 0]),
            leaf(1, 0, [0x600f12, 0x0102_0800, 0, 0]),
        ];
        identify(&mut entries, 3, 4);
        let table = Table { entries };
        assert_eq!(table.values(1, 0, 0, 1)[1], 0x0304_0800);
        assert_eq!(table.values(0xb, 0, 0, 1), [0, 1, 0x100, 3]);
        assert_eq!(table.values(0xb, 1, 0, 1), [2, 4, 0x201, 3]);
        assert_eq!(table.values(0xb, 7, 0, 1), [0, 0, 7, 3]);
        // Above the highest leaf.
        assert_eq!(table.values(0x1f, 0, 0, 1), [0; 4]);
    }

    #[test]
    fn the_guest_sees_the_microsoft_hypervisor() {
        let all = u64::MAX;
        let features = [leaf(FEATURES, 0, [0x2fff, 0x30, 0, 0x0008_8510])];
        let table = Table {
            entries: hypervisor(&features, all),
        };
        let [highest, b, c, d] = table.values(VENDOR, 0, 0, 1);
        let name: Vec<u8> = [b, c, d].into_iter().flat_map(u32::to_le_bytes).collect();
        assert_eq!(
            (name.as_slice(), highest),
            (b"Microsoft Hv".as_slice(), HARDWARE)
        );
        assert_eq!(table.values(FEATURES, 0, 0, 1)[0], 0xe7f);
    }

    #[test]
    fn a_feature_not_given_is_not_shown() {
        let features = [leaf(FEATURES, 0, [0x2fff, 0x30, 0, 0x0008_8510])];
        let only_time = synthetic::HYPERVISOR_PRESENT | synthetic::HV1 | 1 << 3;
        let table = Table {
            entries: hypervisor(&features, only_time),
        };
        assert_eq!(table.values(FEATURES, 0, 0, 1), [1 << 1, 0, 0, 0x410]);
    }

    #[test]
    fn dynamic_bits_follow_the_registers() {
        let entries = vec![
            leaf(1, 0, [0, 0, 0, 0]),
            leaf(0xd, 0, [7, 0, 832, 0]),
            leaf(0xd, 2, [256, 576, 0, 0]),
        ];
        let table = Table { entries };
        assert_eq!(table.values(1, 0, CR4_OSXSAVE, 1)[2], LEAF1_ECX_OSXSAVE);
        assert_eq!(table.values(0xd, 0, 0, 7)[1], 832);
        assert_eq!(table.values(0xd, 0, 0, 3)[1], 576);
    }

    #[test]
    fn registered_results_replace_the_bits_of_their_mask() {
        let mut entries = vec![leaf(1, 0, [1, 2, 0xf0, 4])];
        let result = CpuidResult {
            leaf: 1,
            subleaf: 0,
            vp_index: None,
            any_subleaf: true,
            values: [9, 9, 0x0f, 9],
            masks: [0, 0, 0xff, u32::MAX],
        };
        apply(&mut entries, &result);
        apply(
            &mut entries,
            &CpuidResult {
                leaf: 0x4000_00ff,
                ..result
            },
        );
        let table = Table { entries };
        assert_eq!(table.values(1, 0, 0, 1), [1, 2, 0x0f, 9]);
        assert_eq!(table.values(0x4000_00ff, 5, 0, 1), [0, 0, 0x0f, 9]);
    }
}
