//! What the hypervisor declares to this partition about scheduling: two extended partition properties.
//!
//! The VMM capabilities (property 0x00090007) say in bit 6 whether the integrated scheduler exists at all; property
//! 0x00020005 says whether it is on. Both are read with a pass-through hypercall that targets the caller's own partition,
//! on the descriptor of the device itself. Drivers before that pass-through answer ENOTTY.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use mshv_bindings::{
    HV_STATUS_SUCCESS, HVCALL_GET_PARTITION_PROPERTY_EX, hv_input_get_partition_property_ex,
    mshv_root_hvcall,
};

use super::{Evidence, Says, partition::PartitionKind};

const VMM_CAPABILITIES: u32 = 0x0009_0007;
const INTEGRATED_SCHEDULER: u32 = 0x0002_0005;
const INTEGRATED_SCHEDULER_CAPABILITY: u64 = 1 << 6;
/// `_IOWR(0xB8, 0x07, struct mshv_root_hvcall)`.
const MSHV_ROOT_HVCALL: libc::Ioctl =
    3 << 30 | (size_of::<mshv_root_hvcall>() as libc::Ioctl) << 16 | 0xB8 << 8 | 0x07;

/// What the hypervisor declares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Declared {
    /// The integrated scheduler is there and on.
    Integrated,
    /// The integrated scheduler is there and off.
    Off,
    /// There is no integrated scheduler: a root partition, or a hypervisor without it.
    Absent,
    /// The question could not be asked.
    Unknown,
}

/// What came of asking.
#[derive(Debug)]
pub(super) struct Declaration {
    pub(super) declared: Declared,
    pub(super) evidence: Evidence,
    /// The first bank of the VMM capabilities, if the hypervisor told them.
    pub(super) capabilities: Option<u64>,
    /// Hypercalls made.
    pub(super) hypercalls: u64,
}

/// Asks, if there is a device. In a partition of some kinds the answer means nothing.
pub(super) fn read(device: Result<BorrowedFd<'_>, &io::Error>, kind: PartitionKind) -> Declaration {
    let mut hypercalls = 0;
    let mut ask = |code| {
        let device = device.map_err(|error| PropertyError::Device(error.to_string()))?;
        hypercalls += 1;
        property(device, code)
    };
    let answer = ask(VMM_CAPABILITIES);
    // 64-bit header (number of banks), then the first bank.
    let capabilities = answer.as_ref().ok().map(|words| words[1]);
    let (declared, value) = match answer {
        Ok([_, bits]) if bits & INTEGRATED_SCHEDULER_CAPABILITY == 0 => {
            (Declared::Absent, format!("capabilities {bits:#x}"))
        }
        Ok([_, bits]) => match ask(INTEGRATED_SCHEDULER) {
            Ok([value, ..]) => {
                let declared = if value == 0 {
                    Declared::Off
                } else {
                    Declared::Integrated
                };
                let value = format!("capabilities {bits:#x}, integrated scheduler {value}");
                (declared, value)
            }
            Err(error) => (Declared::Unknown, format!("property 0x20005: {error}")),
        },
        Err(error) => (Declared::Unknown, error.to_string()),
    };
    let (says, meaning) = match (declared, kind) {
        (Declared::Unknown, _) => (Says::Nothing, "the hypervisor's declaration is not known"),
        (_, PartitionKind::Root) => (
            Says::Nothing,
            "no matter: in a root partition the integrated scheduler has no part",
        ),
        (Declared::Integrated, _) => (
            Says::Linux,
            "the hypervisor lets this partition schedule its guests' VPs",
        ),
        (Declared::Off, _) => (
            Says::Hypervisor,
            "the hypervisor keeps the scheduling of this partition's guests to itself",
        ),
        (Declared::Absent, PartitionKind::L1vh) => (
            Says::Hypervisor,
            "the hypervisor has no integrated scheduler to offer an L1VH",
        ),
        (Declared::Absent, _) => (
            Says::Nothing,
            "the hypervisor offers no integrated scheduler",
        ),
    };
    Declaration {
        declared,
        evidence: Evidence::new("declared property", says, value, meaning),
        capabilities,
        hypercalls,
    }
}

/// Why a property cannot be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum PropertyError {
    /// The hypervisor said no.
    #[error("hypercall status {0:#x}")]
    Status(u16),
    /// The driver said no.
    #[error("{0}")]
    Driver(#[from] io::Error),
    /// There is no device to ask.
    #[error("no /dev/mshv to ask: {0}")]
    Device(String),
}

/// The first two words of an extended property of this partition.
pub(super) fn property(device: BorrowedFd<'_>, code: u32) -> Result<[u64; 2], PropertyError> {
    // The kernel fills in the partition.
    let input = hv_input_get_partition_property_ex {
        property_code: code,
        ..Default::default()
    };
    // Properties are up to a page long; the output buffer of the hypercall is the whole of it.
    let mut output = [0u64; 509];
    let mut call = mshv_root_hvcall {
        code: HVCALL_GET_PARTITION_PROPERTY_EX as u16,
        in_sz: size_of_val(&input) as u16,
        out_sz: size_of_val(&output) as u16,
        in_ptr: &raw const input as u64,
        out_ptr: &raw mut output as u64,
        ..Default::default()
    };
    // SAFETY: `call` and the two buffers it points to are of the sizes it states and outlive the call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), MSHV_ROOT_HVCALL, &raw mut call) };
    if result == 0 {
        return Ok([output[0], output[1]]);
    }
    let error = io::Error::last_os_error();
    match call.status {
        status if u32::from(status) != HV_STATUS_SUCCESS => Err(PropertyError::Status(status)),
        _ => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_device_that_knows_no_such_ioctl_declares_nothing() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let declaration = read(Ok(null.as_fd()), PartitionKind::Elsewhere);
        assert_eq!(
            (declaration.declared, declaration.hypercalls),
            (Declared::Unknown, 1)
        );
        assert_eq!(declaration.capabilities, None);
        assert!(
            declaration.evidence.value.contains("Inappropriate ioctl"),
            "{declaration:?}"
        );
    }

    #[test]
    fn without_a_device_nobody_is_asked() {
        let denied = io::Error::from_raw_os_error(libc::EPERM);
        let declaration = read(Err(&denied), PartitionKind::L1vh);
        assert_eq!(declaration.hypercalls, 0);
        assert!(declaration.evidence.value.contains("not permitted"));
    }
}
