//! A partition: one KVM virtual machine and the hypervisor state around it.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use kvm_bindings::{
    CpuId, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_X2APIC_API_USE_32BIT_IDS, kvm_enable_cap,
};
use kvm_ioctls::{Kvm, VmFd};
use mshv_bindings::{
    mshv_create_partition, mshv_create_partition_v2, mshv_create_vp, mshv_gpap_access_bitmap,
    mshv_user_ioeventfd, mshv_user_irq_entry, mshv_user_irqfd, mshv_user_mem_region,
};

use crate::device::Device;
use crate::errno::Errno;
use crate::fds::{self, Object};
use crate::features::Features;
use crate::intercepts::Intercepts;
use crate::interrupts::{self, Interrupts};
use crate::ioeventfd::IoEventFds;
use crate::memory::{AccessOp, Memory};
use crate::property::Properties;
use crate::trace::{self, Ioctl};
use crate::vp::Vp;
use crate::vp_file::VpFile;
use crate::{hvcall, user, vp};

/// As many as the driver allows.
const MAX_VPS: u32 = 256;

const PT_LAPIC: u64 = 1 << 0;
const PT_X2APIC: u64 = 1 << 1;
const PT_CPU_AND_XSAVE_FEATURES: u64 = 1 << 3;
const PT_NESTED_VIRTUALIZATION: u64 = 1 << 4;
const PT_FLAGS: u64 = (1 << 6) - 1;

const CPU_FEATURES_BANKS: u16 = 2;

/// Bank 1: nested virtualization.
const NESTED_VIRT_SUPPORT: u64 = 1 << 6;

/// What the VPs of a partition share.
///
/// A [`Vp`] holds an `Arc<Partition>`, never the other way round: the VPs belong to the [`PartitionFile`].
pub(crate) struct Partition {
    /// The partition id the hypervisor would have given.
    pub(crate) id: u64,
    /// The KVM virtual machine.
    pub(crate) vm: Arc<VmFd>,
    /// `/dev/kvm`, for what is asked of the system (supported CPUID, MSR lists).
    pub(crate) kvm: Arc<Kvm>,
    /// What KVM supports, without the features the client turned off.
    pub(crate) cpuid: CpuId,
    /// Guest-physical memory.
    pub(crate) memory: Memory,
    /// Interrupts asserted by the client, MSI routes and irqfds.
    pub(crate) interrupts: Interrupts,
    /// Doorbells.
    pub(crate) ioeventfds: IoEventFds,
    /// Partition properties.
    pub(crate) properties: Properties,
    /// Intercepts installed and CPUID results registered by the client.
    pub(crate) intercepts: Intercepts,
}

/// What partition and VP descriptors have in common; it lives until the last of them is closed.
pub(crate) struct PartitionFile {
    /// The shared state.
    pub(crate) partition: Arc<Partition>,
    /// VPs by index.
    pub(crate) vps: Box<[OnceLock<Arc<Vp>>]>,
    /// One ioctl at a time, as in the driver.
    lock: Mutex<()>,
}

/// What the descriptors of a partition itself refer to: with the last of them its eventfds end, while the VPs
/// still open keep the rest.
pub(crate) struct PartitionHandle(pub(crate) Arc<PartitionFile>);

impl Drop for PartitionHandle {
    fn drop(&mut self) {
        self.0.partition.interrupts.release();
        self.0.partition.ioeventfds.release();
    }
}

/// Puts the LAPICs into KVM and leaves the IOAPIC to the client.
///
/// # Errors
/// What KVM says.
pub(crate) fn enable_irqchip(vm: &VmFd) -> Result<(), Errno> {
    let mut cap = kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        ..Default::default()
    };
    cap.args[0] = interrupts::PINS.into();
    vm.enable_cap(&cap)?;
    let mut cap = kvm_enable_cap {
        cap: KVM_CAP_X2APIC_API,
        ..Default::default()
    };
    cap.args[0] = KVM_X2APIC_API_USE_32BIT_IDS.into();
    Ok(vm.enable_cap(&cap)?)
}

/// The arguments of `MSHV_CREATE_PARTITION` in either version: flags, and features turned off.
fn creation_arguments(arg: u64) -> Result<(u64, Features), Errno> {
    let valid = |flags: u64, isolation: u64| {
        // Of the kinds of isolation the driver knows only "none".
        if flags & !PT_FLAGS != 0 || isolation != 0 {
            Err(Errno(libc::EINVAL))
        } else {
            Ok(())
        }
    };
    let v1: mshv_create_partition = user::read(arg)?;
    valid(v1.pt_flags, v1.pt_isolation)?;
    if v1.pt_flags & PT_CPU_AND_XSAVE_FEATURES == 0 {
        return Ok((
            v1.pt_flags,
            Features {
                banks: [0; 2],
                xsave: 0,
            },
        ));
    }
    let v2: mshv_create_partition_v2 = user::read(arg)?;
    valid(v2.pt_flags, v2.pt_isolation)?;
    let (banks, rsvd, rsvd1) = (v2.pt_num_cpu_fbanks, v2.pt_rsvd, v2.pt_rsvd1);
    if banks != CPU_FEATURES_BANKS || rsvd != [0; 6] || rsvd1 != [0; 2] {
        return Err(Errno(libc::EINVAL));
    }
    Ok((
        v2.pt_flags,
        Features {
            banks: v2.pt_cpu_fbanks,
            xsave: v2.pt_disabled_xsave,
        },
    ))
}

impl PartitionFile {
    /// `MSHV_CREATE_PARTITION`: makes the partition and its descriptor.
    ///
    /// # Errors
    /// `EFAULT` and `EINVAL` as the driver, `EMFILE`, or what KVM says.
    pub(crate) fn create(device: &Device, arg: u64) -> Result<RawFd, Errno> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(2);
        let (flags, mut disabled) = creation_arguments(arg)?;
        if flags & PT_LAPIC == 0 {
            trace::unimplemented(
                "MSHV_CREATE_PARTITION without MSHV_PT_BIT_LAPIC (the LAPIC stays)",
            );
        }
        if flags & PT_NESTED_VIRTUALIZATION == 0 {
            disabled.banks[1] |= NESTED_VIRT_SUPPORT;
        }
        let vm = Arc::new(device.kvm.create_vm()?);
        enable_irqchip(&vm)?;

        let processor = device.processor.restricted(&device.cpuid, disabled);
        let mut cpuid = device.cpuid.clone();
        processor.features.filter(cpuid.as_mut_slice());
        if flags & PT_X2APIC == 0 {
            for entry in cpuid
                .as_mut_slice()
                .iter_mut()
                .filter(|entry| entry.function == 1)
            {
                entry.ecx &= !(1 << 21);
            }
        }
        let partition = Arc::new(Partition {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            kvm: Arc::clone(&device.kvm),
            cpuid,
            memory: Memory::new(Arc::clone(&vm), processor.physical_bits, vp::precise()),
            interrupts: Interrupts::new(Arc::clone(&vm)),
            ioeventfds: IoEventFds::default(),
            properties: Properties::new(processor),
            intercepts: Intercepts::default(),
            vm,
        });
        let file = Self {
            partition,
            vps: (0..MAX_VPS).map(|_| OnceLock::new()).collect(),
            lock: Mutex::default(),
        };
        fds::adopt(
            fds::placeholder(true)?,
            Object::Partition(Arc::new(PartitionHandle(Arc::new(file)))),
        )
    }

    /// The VP of `index`, as a hypercall names it.
    pub(crate) fn vp(&self, index: u32) -> Option<&Arc<Vp>> {
        self.vps.get(usize::try_from(index).ok()?)?.get()
    }

    /// An ioctl on the partition descriptor.
    ///
    /// # Errors
    /// As the driver; `ENOTTY` for what it does not know.
    pub(crate) fn ioctl(self: &Arc<Self>, request: u32, arg: u64) -> Result<i32, Errno> {
        let _locked = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        let partition = &*self.partition;
        match request {
            crate::device::INITIALIZE_PARTITION => {
                trace::ioctl(Ioctl::InitializePartition);
                partition.properties.initialize();
            }
            crate::device::CREATE_VP => {
                trace::ioctl(Ioctl::CreateVp);
                let args: mshv_create_vp = user::read(arg)?;
                return self.create_vp(args.vp_index);
            }
            crate::device::SET_GUEST_MEMORY => {
                trace::ioctl(Ioctl::SetGuestMemory);
                let args: mshv_user_mem_region = user::read(arg)?;
                partition
                    .memory
                    .set(&args, partition.properties.is_initialized())?;
            }
            crate::device::IRQFD => {
                trace::ioctl(Ioctl::Irqfd);
                let args: mshv_user_irqfd = user::read(arg)?;
                partition.interrupts.set_irqfd(&args)?;
            }
            crate::device::IOEVENTFD => {
                trace::ioctl(Ioctl::Ioeventfd);
                let args: mshv_user_ioeventfd = user::read(arg)?;
                partition.ioeventfds.set(&args)?;
            }
            crate::device::SET_MSI_ROUTING => {
                trace::ioctl(Ioctl::SetMsiRouting);
                self.set_msi_routing(arg)?;
            }
            crate::device::GET_GPAP_ACCESS_BITMAP => {
                trace::ioctl(Ioctl::GetGpapAccessBitmap);
                self.access_bitmap(arg)?;
            }
            crate::device::ROOT_HVCALL => {
                trace::ioctl(Ioctl::RootHvcall);
                hvcall::passthrough(hvcall::Target::Partition(self), arg)?;
            }
            other => {
                trace::unimplemented(&format!("ioctl {other:#010x} on a partition"));
                return Err(Errno(libc::ENOTTY));
            }
        }
        Ok(0)
    }

    fn create_vp(self: &Arc<Self>, index: u32) -> Result<RawFd, Errno> {
        if index >= MAX_VPS {
            return Err(Errno(libc::EINVAL));
        }
        let place = &self.vps[index as usize];
        if place.get().is_some() {
            return Err(Errno(libc::EEXIST));
        }
        if !self.partition.properties.is_initialized() {
            // The hypervisor says INVALID_PARTITION_STATE.
            return Err(Errno(libc::EIO));
        }
        let vp = Arc::new(Vp::new(&self.partition, index)?);
        // SAFETY: duplicating a descriptor touches no memory.
        let fd = unsafe { libc::fcntl(vp.memfd().as_raw_fd(), libc::F_DUPFD_CLOEXEC, 0) };
        if fd < 0 {
            return Err(Errno::last());
        }
        let file = VpFile::new(Arc::clone(self), Arc::clone(&vp));
        let fd = fds::adopt(fd, Object::Vp(Arc::new(file)))?;
        // One ioctl at a time: nobody else has put a VP here.
        let _ = place.set(vp);
        Ok(fd)
    }

    fn set_msi_routing(&self, arg: u64) -> Result<(), Errno> {
        const HEADER: u64 = 8;
        let [nr, rsvd]: [u32; 2] = user::read(arg)?;
        if nr > interrupts::MAX_GUEST_IRQS || rsvd != 0 {
            return Err(Errno(libc::EINVAL));
        }
        let size = size_of::<mshv_user_irq_entry>() as u64;
        let entries: Vec<mshv_user_irq_entry> = (0..u64::from(nr))
            .map(|index| user::read(arg + HEADER + index * size))
            .collect::<Result<_, _>>()?;
        self.partition.interrupts.set_routes(&entries)
    }

    fn access_bitmap(&self, arg: u64) -> Result<(), Errno> {
        const DIRTY: u8 = 1;
        let args: mshv_gpap_access_bitmap = user::read(arg)?;
        let op = match args.access_op {
            0 => AccessOp::Keep,
            1 => AccessOp::Clear,
            2 => AccessOp::Set,
            _ => return Err(Errno(libc::EINVAL)),
        };
        if args.access_type > DIRTY
            || args.rsvd != [0; 6]
            || args.page_count == 0
            || args.bitmap_ptr == 0
        {
            return Err(Errno(libc::EINVAL));
        }
        if args.access_type != DIRTY {
            trace::unimplemented("MSHV_GET_GPAP_ACCESS_BITMAP of accessed pages");
            return Err(Errno(libc::EIO));
        }
        let bitmap = self
            .partition
            .memory
            .dirty_bitmap(args.gpap_base, args.page_count, op)?;
        user::copy_out(args.bitmap_ptr, &bitmap)
    }
}
