//! Segment and table registers: the hypervisor's form and KVM's.

use kvm_bindings::{kvm_dtable, kvm_segment};
use mshv_bindings::{
    hv_x64_segment_register, hv_x64_segment_register__bindgen_ty_1, hv_x64_table_register,
};

/// KVM's form of a segment. A register that is not present cannot be used; KVM says so with a flag of its own.
pub(crate) fn from_hv(segment: &hv_x64_segment_register) -> kvm_segment {
    // SAFETY: both variants of the union are the same sixteen bits.
    let attributes = unsafe { segment.__bindgen_anon_1.attributes };
    let bit = |n: u32| (attributes >> n & 1) as u8;
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: (attributes & 0xf) as u8,
        s: bit(4),
        dpl: (attributes >> 5 & 3) as u8,
        present: bit(7),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        unusable: u8::from(bit(7) == 0),
        padding: 0,
    }
}

/// The hypervisor's form of a segment.
pub(crate) fn to_hv(segment: &kvm_segment) -> hv_x64_segment_register {
    let attributes = u16::from(segment.type_ & 0xf)
        | u16::from(segment.s & 1) << 4
        | u16::from(segment.dpl & 3) << 5
        | u16::from(segment.present & 1 & !segment.unusable) << 7
        | u16::from(segment.avl & 1) << 12
        | u16::from(segment.l & 1) << 13
        | u16::from(segment.db & 1) << 14
        | u16::from(segment.g & 1) << 15;
    hv_x64_segment_register {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        __bindgen_anon_1: hv_x64_segment_register__bindgen_ty_1 { attributes },
    }
}

/// KVM's form of GDTR or IDTR.
pub(crate) fn table_from_hv(table: &hv_x64_table_register) -> kvm_dtable {
    kvm_dtable {
        base: table.base,
        limit: table.limit,
        padding: [0; 3],
    }
}

/// The hypervisor's form of GDTR or IDTR.
pub(crate) fn table_to_hv(table: &kvm_dtable) -> hv_x64_table_register {
    hv_x64_table_register {
        pad: [0; 3],
        limit: table.limit,
        base: table.base,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_survives_both_ways() {
        let code = kvm_segment {
            base: 0x1234_5678,
            limit: 0xffff_ffff,
            selector: 0x10,
            type_: 0xb,
            present: 1,
            dpl: 3,
            db: 0,
            s: 1,
            l: 1,
            g: 1,
            avl: 1,
            unusable: 0,
            padding: 0,
        };
        assert_eq!(from_hv(&to_hv(&code)), code);
        let hv = to_hv(&code);
        // SAFETY: the variant just written.
        assert_eq!(unsafe { hv.__bindgen_anon_1.attributes }, 0xb0fb);
    }

    #[test]
    fn what_is_not_present_is_unusable() {
        assert_eq!(from_hv(&hv_x64_segment_register::default()).unusable, 1);
    }

    #[test]
    fn a_table_survives_both_ways() {
        let table = kvm_dtable {
            base: 0xffff_8000_0000_0000,
            limit: 0x7f,
            padding: [0; 3],
        };
        assert_eq!(table_from_hv(&table_to_hv(&table)), table);
    }
}
