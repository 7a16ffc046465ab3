//! Processor features: the hypervisor's feature banks and the CPUID bits they stand for.
//!
//! A client reads the banks as properties of the host, turns bits off when it creates a partition, and expects
//! CPUID in the guest to follow.

use kvm_bindings::kvm_cpuid_entry2;

/// A register of a CPUID result.
#[derive(Debug, Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

use Register::{Eax, Ebx, Ecx, Edx};

/// One CPUID bit: leaf, subleaf, register, bit.
type Bit = (u32, u32, Register, u8);

/// `HV_PARTITION_PROPERTY_PROCESSOR_FEATURES0`: bits that CPUID shows.
const BANK0: &[(u8, Bit)] = &[
    (0, (1, 0, Ecx, 0)),
    (1, (0x8000_0001, 0, Ecx, 0)),
    (2, (1, 0, Ecx, 9)),
    (3, (1, 0, Ecx, 19)),
    (4, (1, 0, Ecx, 20)),
    (5, (0x8000_0001, 0, Ecx, 6)),
    (6, (0x8000_0001, 0, Ecx, 11)),
    (7, (1, 0, Ecx, 23)),
    (8, (1, 0, Ecx, 13)),
    (9, (0x8000_0001, 0, Ecx, 4)),
    (10, (0x8000_0001, 0, Ecx, 5)),
    (11, (0x8000_0001, 0, Ecx, 7)),
    (12, (0x8000_0001, 0, Edx, 22)),
    (13, (0x8000_0001, 0, Edx, 31)),
    (14, (0x8000_0001, 0, Edx, 30)),
    (15, (0x8000_0001, 0, Edx, 26)),
    (16, (1, 0, Ecx, 25)),
    (17, (1, 0, Ecx, 1)),
    (18, (1, 0, Ecx, 17)),
    (19, (0x8000_0001, 0, Ecx, 16)),
    (20, (1, 0, Ecx, 29)),
    (21, (1, 0, Ecx, 30)),
    (22, (7, 0, Ebx, 0)),
    (23, (7, 0, Ebx, 7)),
    (24, (7, 0, Ebx, 9)),
    (25, (7, 0, Ebx, 3)),
    (26, (7, 0, Ebx, 8)),
    (29, (1, 0, Ecx, 22)),
    (32, (7, 0, Ebx, 18)),
    (33, (7, 0, Ebx, 19)),
    (34, (0x8000_0001, 0, Ecx, 8)),
    (35, (7, 0, Ebx, 20)),
    (36, (7, 0, Ebx, 4)),
    (37, (7, 0, Ebx, 11)),
    (38, (0x8000_0001, 0, Edx, 27)),
    (39, (7, 0, Ebx, 23)),
    (40, (7, 0, Ebx, 24)),
    (41, (7, 0, Ebx, 29)),
    (43, (7, 0, Ebx, 10)),
    (44, (7, 0, Edx, 26)),
    (45, (7, 0, Edx, 27)),
    (49, (7, 0, Edx, 4)),
    (57, (7, 0, Ecx, 22)),
    (58, (7, 0, Ecx, 2)),
    (60, (7, 0, Edx, 10)),
];

/// `HV_PARTITION_PROPERTY_PROCESSOR_FEATURES1`. Nested virtualization is one feature, and SVM or VMX in CPUID.
const BANK1: &[(u8, Bit)] = &[
    (1, (0x8000_0007, 0, Edx, 8)),
    (2, (0x8000_0008, 0, Ebx, 0)),
    (3, (0x8000_0008, 0, Ebx, 4)),
    (4, (7, 0, Ecx, 16)),
    (6, (0x8000_0001, 0, Ecx, 2)),
    (6, (1, 0, Ecx, 5)),
    (8, (7, 0, Ecx, 7)),
    (9, (7, 0, Edx, 20)),
    (12, (7, 0, Ecx, 5)),
    (13, (7, 0, Ecx, 27)),
    (14, (7, 0, Ecx, 28)),
    (15, (7, 0, Ecx, 25)),
    (16, (7, 0, Edx, 14)),
    (17, (1, 0, Ecx, 24)),
];

/// `HV_PARTITION_PROPERTY_PROCESSOR_XSAVE_FEATURES`.
const XSAVE: &[(u8, Bit)] = &[
    (0, (1, 0, Ecx, 26)),
    (1, (0xd, 1, Eax, 0)),
    (2, (1, 0, Ecx, 28)),
    (3, (7, 0, Ebx, 5)),
    (4, (1, 0, Ecx, 12)),
    (5, (7, 0, Ebx, 14)),
    (6, (7, 0, Ebx, 16)),
    (7, (7, 0, Ebx, 17)),
    (8, (7, 0, Ebx, 28)),
    (9, (7, 0, Ebx, 30)),
    (10, (7, 0, Ebx, 31)),
    (11, (0xd, 1, Eax, 1)),
    (12, (0xd, 1, Eax, 3)),
    (13, (0xd, 1, Eax, 2)),
    (14, (7, 0, Ecx, 12)),
    (15, (7, 0, Ebx, 21)),
    (16, (7, 0, Ecx, 1)),
    (17, (7, 0, Ecx, 6)),
    (18, (7, 0, Ecx, 11)),
    (19, (7, 0, Ecx, 8)),
    (20, (7, 0, Ecx, 9)),
    (21, (7, 0, Ecx, 14)),
    (22, (7, 0, Ecx, 10)),
    (23, (7, 1, Eax, 5)),
    (24, (7, 0, Edx, 8)),
    (25, (7, 0, Edx, 23)),
    (26, (0xd, 1, Eax, 4)),
    (27, (7, 0, Edx, 24)),
    (28, (7, 0, Edx, 22)),
    (29, (7, 0, Edx, 25)),
    (30, (7, 1, Eax, 4)),
];

/// Features of the host, or of a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Features {
    /// The two banks of processor features.
    pub(crate) banks: [u64; 2],
    /// The features tied to extended state.
    pub(crate) xsave: u64,
}

fn register(entry: &mut kvm_cpuid_entry2, register: Register) -> &mut u32 {
    match register {
        Eax => &mut entry.eax,
        Ebx => &mut entry.ebx,
        Ecx => &mut entry.ecx,
        Edx => &mut entry.edx,
    }
}

fn find(cpuid: &mut [kvm_cpuid_entry2], (leaf, subleaf, reg, bit): Bit) -> Option<(&mut u32, u32)> {
    let entry = cpuid
        .iter_mut()
        .find(|entry| entry.function == leaf && entry.index == subleaf)?;
    Some((register(entry, reg), 1 << bit))
}

impl Features {
    /// What `cpuid` shows.
    pub(crate) fn of(cpuid: &[kvm_cpuid_entry2]) -> Self {
        let mut cpuid = cpuid.to_vec();
        let mut bank = |table: &[(u8, Bit)]| {
            table.iter().fold(0, |bits, (feature, place)| {
                let set = find(&mut cpuid, *place).is_some_and(|(value, mask)| *value & mask != 0);
                bits | u64::from(set) << feature
            })
        };
        Self {
            banks: [bank(BANK0), bank(BANK1)],
            xsave: bank(XSAVE),
        }
    }

    /// These without those.
    pub(crate) fn without(self, disabled: Self) -> Self {
        Self {
            banks: [
                self.banks[0] & !disabled.banks[0],
                self.banks[1] & !disabled.banks[1],
            ],
            xsave: self.xsave & !disabled.xsave,
        }
    }

    /// Takes out of `cpuid` the bits whose feature is off, and the components of extended state that go with them.
    pub(crate) fn filter(self, cpuid: &mut [kvm_cpuid_entry2]) {
        for (table, bits) in [
            (BANK0, self.banks[0]),
            (BANK1, self.banks[1]),
            (XSAVE, self.xsave),
        ] {
            for (feature, place) in table {
                if bits >> feature & 1 == 0
                    && let Some((value, mask)) = find(cpuid, *place)
                {
                    *value &= !mask;
                }
            }
        }
        let states = self.xsave_states();
        for entry in cpuid.iter_mut().filter(|entry| entry.function == 0xd) {
            match entry.index {
                0 => {
                    entry.eax &= states as u32;
                    entry.edx &= (states >> 32) as u32;
                }
                1 if self.xsave >> 12 & 1 == 0 => (entry.ecx, entry.edx) = (0, 0),
                // A supervisor component (bit 0 of ECX) follows its own feature.
                component @ 2..64
                    if states >> component & 1 == 0
                        && (entry.ecx & 1 == 0 || self.xsave >> 12 & 1 == 0) =>
                {
                    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
                }
                _ => {}
            }
        }
    }

    /// The components of extended state (XCR0 bits) the features allow.
    pub(crate) fn xsave_states(self) -> u64 {
        let on = |feature: u8| self.xsave >> feature & 1 != 0;
        let part = |feature: u8, bits: u64| if on(feature) { bits } else { 0 };
        // x87 and SSE always; AVX; MPX; AVX-512; PKRU has no bit of its own and goes with XSAVE; AMX tiles.
        0b11 | part(2, 1 << 2)
            | part(5, 0b11 << 3)
            | part(6, 0b111 << 5)
            | part(0, 1 << 9)
            | part(27, 0b11 << 17)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, regs: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = regs;
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    #[test]
    fn features_are_read_from_cpuid_and_filtered_out_of_it() {
        let mut cpuid = vec![
            leaf(1, 0, [0, 0, 1 << 26 | 1 << 28 | 1, 0]),
            leaf(7, 0, [0, 1 << 16, 0, 0]),
            leaf(0xd, 0, [0xe7, 0, 0, 0]),
        ];
        let all = Features::of(&cpuid);
        assert_eq!(all.banks[0], 1);
        assert_eq!(all.xsave, 1 << 0 | 1 << 2 | 1 << 6);
        assert_eq!(all.xsave_states(), 0x2e7);
        let less = all.without(Features {
            banks: [1, 0],
            xsave: 1 << 6,
        });
        less.filter(&mut cpuid);
        assert_eq!(cpuid[0].ecx, 1 << 26 | 1 << 28);
        assert_eq!(cpuid[1].ebx, 0);
        assert_eq!(cpuid[2].eax, 7);
    }

    #[test]
    fn the_tables_are_in_order() {
        for table in [BANK0, BANK1, XSAVE] {
            assert!(table.is_sorted_by_key(|(bit, _)| *bit));
        }
    }
}
