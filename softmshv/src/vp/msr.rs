//! MSR accesses KVM leaves to userspace: unknown registers, values it refuses, and what the client intercepts.
//!
//! An access to a register the hypervisor does not have is answered by a property of the partition: a general
//! protection fault, or zero for reads and nothing for writes. With an MSR intercept installed the client decides.

use kvm_bindings::{KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_EXIT_REASON_INVAL};
use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};

use super::engine::Engine;
use super::registers::{read_msr, write_msr};
use crate::errno::Errno;
use crate::intercepts::{ACCESS_READ, ACCESS_WRITE, Intercepts};
use crate::partition::Partition;
use crate::property::code;
use crate::trace;

/// `HV_UNIMPLEMENTED_MSR_ACTION_IGNORE_WRITE_READ_ZERO`.
const IGNORE_WRITE_READ_ZERO: u64 = 1;
/// KVM's filter has this many ranges.
const MAX_RANGES: usize = 16;

/// The bits of one MSR; KVM reads whole words.
static DENIED: [u8; 8] = [0; 8];

/// What becomes of an access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decision {
    /// The value read, or a general protection fault.
    Answer(Option<u64>),
    /// KVM does it, as if it had not asked.
    PassOn,
    /// The client is told.
    Intercept,
}

/// Decides about one access.
pub(super) fn decide(partition: &Partition, index: u32, reason: u32, write: bool) -> Decision {
    let access = if write { ACCESS_WRITE } else { ACCESS_READ };
    let intercepts = &partition.intercepts;
    if intercepts.msr_index(index) & access != 0 {
        return Decision::Intercept;
    }
    match reason {
        KVM_MSR_EXIT_REASON_FILTER => Decision::PassOn,
        KVM_MSR_EXIT_REASON_INVAL => Decision::Answer(None),
        _ if intercepts.msr() & access != 0 => Decision::Intercept,
        _ => {
            let action = partition.properties.get(code::UNIMPLEMENTED_MSR_ACTION);
            Decision::Answer((action == Ok(IGNORE_WRITE_READ_ZERO)).then_some(0))
        }
    }
}

/// Does an access the filter caught for another's sake.
pub(super) fn pass_on(engine: &Engine, index: u32, data: Option<u64>) -> Option<u64> {
    match data {
        None => read_msr(engine, index).ok(),
        Some(value) => write_msr(engine, index, value).ok().map(|()| value),
    }
}

/// Makes KVM ask about every MSR the client intercepts by its index.
///
/// # Errors
/// What KVM says.
pub(super) fn install_filter(vm: &VmFd, intercepts: &Intercepts) -> Result<(), Errno> {
    let indices = intercepts.msr_indices();
    if indices.len() > MAX_RANGES {
        trace::unimplemented("more than 16 MSRs intercepted by index");
    }
    // A clear bit denies the access, and a denied access is asked about.
    let ranges: Vec<MsrFilterRange<'_>> = indices
        .iter()
        .take(MAX_RANGES)
        .map(|(index, access)| {
            let mut flags = MsrFilterRangeFlags::empty();
            flags.set(MsrFilterRangeFlags::READ, access & ACCESS_READ != 0);
            flags.set(MsrFilterRangeFlags::WRITE, access & ACCESS_WRITE != 0);
            MsrFilterRange {
                flags,
                base: *index,
                msr_count: 1,
                bitmap: &DENIED,
            }
        })
        .collect();
    Ok(vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges)?)
}
