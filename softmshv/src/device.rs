//! `/dev/mshv` itself: opening it, and the ioctls by number.

use std::os::fd::RawFd;
use std::sync::{Arc, OnceLock};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::Kvm;
use mshv_bindings as mshv;

use crate::config::config;
use crate::errno::Errno;
use crate::fds::{self, Object};
use crate::hvcall;
use crate::partition::PartitionFile;
use crate::property::Processor;
use crate::trace::{self, Ioctl};

/// The device the client opens.
pub(crate) const PATH: &std::ffi::CStr = c"/dev/mshv";

const NONE: u32 = 0;
const WRITE: u32 = 1;
const READ: u32 = 2;

/// An ioctl number of the ABI, as `_IOC` composes it.
const fn number(direction: u32, nr: u32, size: usize) -> u32 {
    const TYPE: u32 = 0xb8;
    direction << 30 | (size as u32) << 16 | TYPE << 8 | nr
}

/// Device.
pub(crate) const CREATE_PARTITION: u32 = number(WRITE, 0, size_of::<mshv::mshv_create_partition>());
/// Device, partition and VP.
pub(crate) const ROOT_HVCALL: u32 = number(READ | WRITE, 7, size_of::<mshv::mshv_root_hvcall>());
/// Partition.
pub(crate) const INITIALIZE_PARTITION: u32 = number(NONE, 0, 0);
/// Partition.
pub(crate) const CREATE_VP: u32 = number(WRITE, 1, size_of::<mshv::mshv_create_vp>());
/// Partition.
pub(crate) const SET_GUEST_MEMORY: u32 = number(WRITE, 2, size_of::<mshv::mshv_user_mem_region>());
/// Partition.
pub(crate) const IRQFD: u32 = number(WRITE, 3, size_of::<mshv::mshv_user_irqfd>());
/// Partition.
pub(crate) const IOEVENTFD: u32 = number(WRITE, 4, size_of::<mshv::mshv_user_ioeventfd>());
/// Partition.
pub(crate) const SET_MSI_ROUTING: u32 = number(WRITE, 5, size_of::<mshv::mshv_user_irq_table>());
/// Partition.
pub(crate) const GET_GPAP_ACCESS_BITMAP: u32 =
    number(READ | WRITE, 6, size_of::<mshv::mshv_gpap_access_bitmap>());
/// VP.
pub(crate) const RUN_VP: u32 = number(READ, 0, size_of::<mshv::mshv_run_vp>());
/// VP.
pub(crate) const GET_VP_STATE: u32 =
    number(READ | WRITE, 1, size_of::<mshv::mshv_get_set_vp_state>());
/// VP.
pub(crate) const SET_VP_STATE: u32 =
    number(READ | WRITE, 2, size_of::<mshv::mshv_get_set_vp_state>());

/// What an open `/dev/mshv` stands for.
pub(crate) struct Device {
    /// The engine.
    pub(crate) kvm: Arc<Kvm>,
    /// What KVM supports.
    pub(crate) cpuid: CpuId,
    /// The same as properties of the host.
    pub(crate) processor: Processor,
}

/// Frequency of the time stamp counter guests see, in Hz; 0 where KVM does not say. Found out once, when first asked
/// for, since it takes a virtual machine.
pub(crate) fn tsc_hz() -> u64 {
    static HZ: OnceLock<u64> = OnceLock::new();
    *HZ.get_or_init(|| {
        let khz = Kvm::new()
            .and_then(|kvm| kvm.create_vm())
            .and_then(|vm| vm.create_vcpu(0))
            .and_then(|vcpu| vcpu.get_tsc_khz());
        khz.map_or(0, |khz| u64::from(khz) * 1000)
    })
}

impl Device {
    fn new() -> Result<Self, Errno> {
        let kvm = Kvm::new()?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        let processor = Processor::of(&cpuid);
        Ok(Self {
            kvm: Arc::new(kvm),
            cpuid,
            processor,
        })
    }

    /// An ioctl on the device descriptor.
    fn ioctl(&self, request: u32, arg: u64) -> Result<i32, Errno> {
        match request {
            CREATE_PARTITION => {
                trace::ioctl(Ioctl::CreatePartition);
                PartitionFile::create(self, arg)
            }
            ROOT_HVCALL if config().passthrough => {
                trace::ioctl(Ioctl::RootHvcall);
                hvcall::passthrough(hvcall::Target::Device(self), arg)?;
                Ok(0)
            }
            other => {
                trace::unimplemented(&format!("ioctl {other:#010x} on the device"));
                Err(Errno(libc::ENOTTY))
            }
        }
    }
}

/// Opens the device.
///
/// # Errors
/// Those of opening `/dev/kvm` and asking it, told on stderr in one line.
pub(crate) fn open(flags: i32) -> Result<RawFd, Errno> {
    trace::start();
    let device = Device::new().inspect_err(|errno| {
        eprintln!("softmshv: cannot provide /dev/mshv: /dev/kvm is unusable: {errno:?}");
    })?;
    let fd = fds::placeholder(flags & libc::O_CLOEXEC != 0)?;
    fds::adopt(fd, Object::Device(Arc::new(device)))
}

/// An ioctl on one of our descriptors.
///
/// # Errors
/// As the driver.
pub(crate) fn ioctl(fd: RawFd, request: u32, arg: u64) -> Result<i32, Errno> {
    let result = match fds::get(fd)? {
        Object::Device(device) => device.ioctl(request, arg),
        Object::Partition(partition) => partition.0.ioctl(request, arg),
        Object::Vp(vp) => vp.ioctl(request, arg),
    };
    trace::tick();
    result
}

/// Whether `mmap` of page `offset / 4096` of one of our descriptors is allowed.
///
/// # Errors
/// As the driver: `ENODEV` for a page that is not there or a descriptor without pages, `EINVAL` beyond them.
pub(crate) fn check_mmap(fd: RawFd, offset: i64) -> Result<(), Errno> {
    let Object::Vp(_) = fds::get(fd)? else {
        return Err(Errno(libc::ENODEV));
    };
    match offset / 4096 {
        0 if !config().register_page => Err(Errno(libc::ENODEV)),
        0 | 1 => Ok(()),
        // The GHCB belongs to encrypted partitions.
        2 => Err(Errno(libc::ENODEV)),
        _ => Err(Errno(libc::EINVAL)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_those_of_the_header() {
        assert_eq!(CREATE_PARTITION, 0x4010_b800);
        assert_eq!(INITIALIZE_PARTITION, 0x0000_b800);
        assert_eq!(SET_GUEST_MEMORY, 0x4020_b802);
        assert_eq!(SET_MSI_ROUTING, 0x4008_b805);
        assert_eq!(ROOT_HVCALL, 0xc020_b807);
        assert_eq!(RUN_VP, 0x8100_b800);
        assert_eq!(GET_VP_STATE, 0xc010_b801);
    }
}
