//! The two kinds of failure of the ABI: Linux error numbers, which an ioctl returns, and hypervisor status
//! codes, which a hypercall returns. The driver turns the second into the first; [`HvStatus::to_errno`] is
//! that table.

use std::fmt;

/// A Linux error number, as an ioctl returns it (positive, e.g. `libc::EINVAL`).
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Errno(pub(crate) i32);

impl Errno {
    /// The error number of the calling thread's last failed libc call.
    pub(crate) fn last() -> Self {
        Self(
            std::io::Error::last_os_error()
                .raw_os_error()
                .unwrap_or(libc::EIO),
        )
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", std::io::Error::from_raw_os_error(self.0))
    }
}

impl From<kvm_ioctls::Error> for Errno {
    fn from(error: kvm_ioctls::Error) -> Self {
        Self(error.errno())
    }
}

impl From<std::io::Error> for Errno {
    fn from(error: std::io::Error) -> Self {
        Self(error.raw_os_error().unwrap_or(libc::EIO))
    }
}

/// A hypervisor status code (`HV_STATUS_*`), the result of a hypercall.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct HvStatus(pub(crate) u16);

impl HvStatus {
    pub(crate) const SUCCESS: Self = Self(0);
    pub(crate) const INVALID_HYPERCALL_CODE: Self = Self(2);
    pub(crate) const INVALID_HYPERCALL_INPUT: Self = Self(3);
    pub(crate) const INVALID_PARAMETER: Self = Self(5);
    pub(crate) const ACCESS_DENIED: Self = Self(6);
    pub(crate) const INVALID_PARTITION_STATE: Self = Self(7);
    pub(crate) const OPERATION_DENIED: Self = Self(8);
    pub(crate) const UNKNOWN_PROPERTY: Self = Self(9);
    pub(crate) const PROPERTY_VALUE_OUT_OF_RANGE: Self = Self(10);
    pub(crate) const INVALID_VP_INDEX: Self = Self(14);
    pub(crate) const INVALID_VP_STATE: Self = Self(21);
    pub(crate) const INVALID_REGISTER_VALUE: Self = Self(80);

    /// The error number the driver returns for this status; `Ok` for success.
    pub(crate) fn to_errno(self) -> Result<(), Errno> {
        match self.0 {
            0 => Ok(()),
            // Invalid: hypercall code, hypercall input, parameter, partition id, VP index, port id, connection
            // id, LP index, register value.
            2 | 3 | 5 | 13 | 14 | 17 | 18 | 65 | 80 => Err(Errno(libc::EINVAL)),
            // Insufficient memory.
            11 => Err(Errno(libc::ENOMEM)),
            _ => Err(Errno(libc::EIO)),
        }
    }
}
