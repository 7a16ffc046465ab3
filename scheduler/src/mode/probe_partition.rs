//! A partition that is only there to find things out.

use std::{
    io,
    os::fd::{BorrowedFd, IntoRawFd},
};

use mshv_bindings::{
    MSHV_NUM_CPU_FEATURES_BANKS, MSHV_PT_BIT_CPU_AND_XSAVE_FEATURES, MSHV_PT_BIT_LAPIC,
    MSHV_PT_ISOLATION_NONE,
    hv_partition_property_code_HV_PARTITION_PROPERTY_PROCESSOR_FEATURES0 as PROCESSOR_FEATURES0,
    hv_partition_property_code_HV_PARTITION_PROPERTY_PROCESSOR_FEATURES1 as PROCESSOR_FEATURES1,
    mshv_create_partition_v2,
};
use mshv_ioctls::{Mshv, MshvError, VmFd};

use crate::PartitionProperties;

/// What could not be done with a partition, and why.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {why}")]
pub struct ProbeError {
    what: &'static str,
    why: io::Error,
}

impl ProbeError {
    /// The system has refused.
    pub(super) fn system(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |why| Self { what, why }
    }

    /// The driver or the hypervisor has refused.
    pub(super) fn refused(what: &'static str) -> impl FnOnce(MshvError) -> Self {
        move |error| Self {
            what,
            why: system_error(&error),
        }
    }
}

fn system_error(error: &MshvError) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

/// A partition without memory and VPs, for asking the hypervisor what it takes.
pub struct ProbePartition(VmFd);

impl ProbePartition {
    /// Makes one; it is gone when this is dropped.
    ///
    /// # Errors
    /// What the driver or the hypervisor says.
    pub fn create(device: BorrowedFd<'_>) -> Result<Self, ProbeError> {
        let fd = device
            .try_clone_to_owned()
            .map_err(ProbeError::system("another descriptor of the device"))?;
        // SAFETY: a descriptor of the device that nobody else owns.
        let mshv = unsafe { Mshv::new_with_fd_number(fd.into_raw_fd()) };
        let partition = mshv
            .create_vm_with_args(&arguments(&mshv))
            .map_err(ProbeError::refused("creating a partition"))?;
        partition
            .initialize()
            .map_err(ProbeError::refused("initializing a partition"))?;
        Ok(Self(partition))
    }

    /// The partition's descriptor.
    pub(super) fn fd(&self) -> &VmFd {
        &self.0
    }
}

impl PartitionProperties for ProbePartition {
    fn property(&self, code: u32) -> io::Result<u64> {
        self.0
            .get_partition_property(code)
            .map_err(|error| system_error(&error))
    }

    fn set_property(&self, code: u32, value: u64) -> io::Result<()> {
        self.0
            .set_partition_property(code, value)
            .map_err(|error| system_error(&error))
    }

    fn is_shown_threads(&self) -> bool {
        false
    }
}

/// Every processor feature the host has, or, where a driver cannot be asked for them, those it chooses.
fn arguments(mshv: &Mshv) -> mshv_create_partition_v2 {
    let plain = mshv_create_partition_v2 {
        pt_flags: 1 << MSHV_PT_BIT_LAPIC,
        pt_isolation: MSHV_PT_ISOLATION_NONE.into(),
        ..Default::default()
    };
    let features = |code| mshv.get_host_partition_property(code);
    let (Ok(bank0), Ok(bank1)) = (features(PROCESSOR_FEATURES0), features(PROCESSOR_FEATURES1))
    else {
        return plain;
    };
    // What is asked for are features to be disabled; extended state is not needed.
    mshv_create_partition_v2 {
        pt_flags: plain.pt_flags | 1 << MSHV_PT_BIT_CPU_AND_XSAVE_FEATURES,
        pt_num_cpu_fbanks: MSHV_NUM_CPU_FEATURES_BANKS as u16,
        pt_cpu_fbanks: [!bank0, !bank1],
        pt_disabled_xsave: u64::MAX,
        ..plain
    }
}
