//! The partition behind a VM: every ioctl on `/dev/mshv` and on the partition, made here and counted here.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, BorrowedFd, RawFd},
    sync::{Mutex, PoisonError},
};

use mshv_bindings::{
    HVCALL_GET_VP_REGISTERS, MSHV_PT_BIT_CPU_AND_XSAVE_FEATURES, MSHV_PT_BIT_GPA_SUPER_PAGES,
    MSHV_PT_BIT_LAPIC, MSHV_PT_BIT_X2APIC, MSHV_PT_ISOLATION_NONE, MSHV_SET_MEM_BIT_EXECUTABLE,
    MSHV_SET_MEM_BIT_WRITABLE, hv_interrupt_type_HV_X64_INTERRUPT_TYPE_INIT as INIT,
    hv_partition_processor_features, hv_partition_processor_xsave_features,
    hv_partition_property_code_HV_PARTITION_PROPERTY_PROCESSOR_FEATURES0 as PROCESSOR_FEATURES0,
    hv_partition_property_code_HV_PARTITION_PROPERTY_PROCESSOR_FEATURES1 as PROCESSOR_FEATURES1,
    hv_partition_property_code_HV_PARTITION_PROPERTY_SYNTHETIC_PROC_FEATURES as SYNTHETIC_FEATURES,
    hv_partition_property_code_HV_PARTITION_PROPERTY_UNIMPLEMENTED_MSR_ACTION as UNIMPLEMENTED_MSR_ACTION,
    hv_partition_synthetic_processor_features,
    hv_register_name_HV_REGISTER_VP_RUNTIME as VP_RUNTIME,
    hv_unimplemented_msr_action_HV_UNIMPLEMENTED_MSR_ACTION_IGNORE_WRITE_READ_ZERO as READ_ZERO,
    mshv_create_partition_v2, mshv_root_hvcall, mshv_user_irq_entry, mshv_user_irq_table,
    mshv_user_mem_region,
};
use mshv_ioctls::{InterruptRequest, IoEventAddress, Mshv, MshvError, NoDatamatch, VmFd};
use tracing::warn;
use vcpu::{Vp, VpError};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::Piece;

/// Why a partition cannot be had, or refuses something.
#[derive(Debug, thiserror::Error)]
pub enum PartitionError {
    /// There is no device.
    #[error("no /dev/mshv")]
    NoDevice,
    /// The device cannot be opened.
    #[error("cannot open /dev/mshv")]
    Open(#[source] io::Error),
    /// An ioctl failed.
    #[error("{what} failed")]
    Refused {
        /// What was asked for.
        what: &'static str,
        /// The answer.
        source: MshvError,
    },
    /// A guest's memory region cannot be given to the hypervisor.
    #[error("cannot map {mib} MiB of guest memory at {gpa:#x}")]
    MapMemory {
        /// MiB in the region.
        mib: u64,
        /// Where the guest sees it.
        gpa: u64,
        /// The answer.
        source: MshvError,
    },
    /// A VP.
    #[error(transparent)]
    Vp(#[from] VpError),
}

/// Ioctls by name, for those that are too rare to need more than a lock.
#[derive(Debug, Default)]
pub struct IoctlCounts(Mutex<BTreeMap<&'static str, u64>>);

impl IoctlCounts {
    fn add(&self, name: &'static str, count: u64) {
        *self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(name)
            .or_default() += count;
    }

    /// What has been counted so far.
    #[must_use]
    pub fn snapshot(&self) -> BTreeMap<&'static str, u64> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// An open `/dev/mshv`.
pub struct Device {
    fd: RawFd,
    /// Owns `fd`.
    mshv: Mshv,
    /// Ioctls made on the device.
    pub ioctls: IoctlCounts,
}

impl Device {
    /// Opens `/dev/mshv`.
    ///
    /// # Errors
    /// When there is none, or it may not be opened.
    pub fn open() -> Result<Self, PartitionError> {
        let fd = Mshv::open_with_cloexec(true).map_err(|error| match error.errno() {
            libc::ENOENT | libc::ENXIO | libc::ENODEV => PartitionError::NoDevice,
            errno => PartitionError::Open(io::Error::from_raw_os_error(errno)),
        })?;
        // SAFETY: a descriptor of `/dev/mshv` that was just opened and that nothing else owns.
        let mshv = unsafe { Mshv::new_with_fd_number(fd) };
        Ok(Self {
            fd,
            mshv,
            ioctls: IoctlCounts::default(),
        })
    }

    /// Finds out who schedules VPs here; also by looking at how they behave, where much depends on it.
    #[must_use]
    pub fn detect_scheduler(&self, closely: bool) -> scheduler::Detection {
        let detection = if closely {
            scheduler::examine(Ok(self.as_fd()), scheduler::BUDGET)
        } else {
            scheduler::detect(self)
        };
        self.ioctls
            .add("hvcall_get_partition_property_ex", detection.hypercalls);
        detection
    }

    /// Creates a partition, ready for memory and VPs. `capabilities` are the VMM capabilities of this partition.
    ///
    /// # Errors
    /// What the driver or hypervisor refuses.
    pub fn create_partition(&self, capabilities: Option<u64>) -> Result<Partition, PartitionError> {
        let arguments = self.create_arguments();
        self.ioctls.add("create_partition", 1);
        let fd = self
            .mshv
            .create_vm_with_args(&arguments)
            .map_err(|source| PartitionError::Refused {
                what: "creating a partition",
                source,
            })?;
        let partition = Partition {
            fd,
            ioctls: IoctlCounts::default(),
        };
        partition.set_property(
            "setting synthetic features",
            SYNTHETIC_FEATURES,
            self.synthetic_features(capabilities),
        )?;
        partition.ioctls.add("initialize_partition", 1);
        partition
            .fd
            .initialize()
            .map_err(|source| PartitionError::Refused {
                what: "initializing the partition",
                source,
            })?;
        partition.set_property(
            "choosing what unknown MSRs do",
            UNIMPLEMENTED_MSR_ACTION,
            READ_ZERO.into(),
        )?;
        Ok(partition)
    }

    /// The processor features the guest gets: the host's, less nested virtualization and what is too new to be known. A
    /// driver that cannot be asked for the host's features takes the older, shorter arguments and decides itself.
    fn create_arguments(&self) -> mshv_create_partition_v2 {
        let mut arguments = mshv_create_partition_v2 {
            pt_flags: 1 << MSHV_PT_BIT_LAPIC
                | 1 << MSHV_PT_BIT_X2APIC
                | 1 << MSHV_PT_BIT_GPA_SUPER_PAGES,
            pt_isolation: MSHV_PT_ISOLATION_NONE.into(),
            ..Default::default()
        };
        self.ioctls.add("hvcall_get_partition_property", 1);
        let Ok(host0) = self.mshv.get_host_partition_property(PROCESSOR_FEATURES0) else {
            return arguments;
        };
        self.ioctls.add("hvcall_get_partition_property", 1);
        let Ok(host1) = self.mshv.get_host_partition_property(PROCESSOR_FEATURES1) else {
            return arguments;
        };
        // What is asked for are features to be disabled.
        let mut disabled = hv_partition_processor_features {
            as_uint64: [!host0, !host1],
        };
        // SAFETY: the bit fields cover the same two words.
        unsafe {
            disabled.__bindgen_anon_1.set_nested_virt_support(1);
            disabled.__bindgen_anon_1.set_reserved_bank0(1);
        }
        let mut xsave = hv_partition_processor_xsave_features {
            as_uint64: u64::MAX,
        };
        // SAFETY: the bit fields cover the same word.
        unsafe {
            xsave.__bindgen_anon_1.set_xsave_support(0);
            xsave.__bindgen_anon_1.set_xsaveopt_support(0);
            xsave.__bindgen_anon_1.set_xsave_comp_support(0);
            xsave.__bindgen_anon_1.set_xsave_supervisor_support(0);
            xsave.__bindgen_anon_1.set_avx_support(0);
            xsave.__bindgen_anon_1.set_avx2_support(0);
            xsave.__bindgen_anon_1.set_fma_support(0);
        }
        arguments.pt_flags |= 1 << MSHV_PT_BIT_CPU_AND_XSAVE_FEATURES;
        arguments.pt_num_cpu_fbanks = 2;
        // SAFETY: both variants of the unions are plain words.
        unsafe {
            arguments.pt_cpu_fbanks = disabled.as_uint64;
            arguments.pt_disabled_xsave = xsave.as_uint64;
        }
        arguments
    }

    /// What the guest may use of the hypervisor's own interface.
    fn synthetic_features(&self, capabilities: Option<u64>) -> u64 {
        let mut features = hv_partition_synthetic_processor_features { as_uint64: [0] };
        // SAFETY: the bit fields cover the same word.
        unsafe {
            let bits = &mut features.__bindgen_anon_1;
            bits.set_hypervisor_present(1);
            bits.set_hv1(1);
            bits.set_access_partition_reference_counter(1);
            bits.set_access_synic_regs(1);
            bits.set_access_synthetic_timer_regs(1);
            bits.set_access_intr_ctrl_regs(1);
            bits.set_access_hypercall_regs(1);
            bits.set_access_vp_index(1);
            bits.set_access_partition_reference_tsc(1);
            bits.set_access_guest_idle_reg(1);
            bits.set_access_frequency_regs(1);
            bits.set_direct_synthetic_timers(1);
            bits.set_tb_flush_hypercalls(1);
            bits.set_synthetic_cluster_ipi(1);
            bits.set_access_vp_regs(1);
        }
        // SAFETY: both variants of the union are plain words.
        let wanted = unsafe { features.as_uint64 }[0];
        let assignable =
            capabilities.is_some_and(|bits| bits & ASSIGNABLE_FEATURES_CAPABILITY != 0);
        if !assignable {
            return wanted;
        }
        self.ioctls.add("hvcall_get_partition_property_ex", 1);
        // Behind the header is one word: what may be asked for.
        scheduler::partition_property(self, ASSIGNABLE_SYNTHETIC_FEATURES)
            .map_or(wanted, |words| wanted & words[1])
    }
}

/// VMM capability: property [`ASSIGNABLE_SYNTHETIC_FEATURES`] says what a guest may be given.
const ASSIGNABLE_FEATURES_CAPABILITY: u64 = 1 << 4;
const ASSIGNABLE_SYNTHETIC_FEATURES: u32 =
    mshv_bindings::hv_partition_property_code_HV_PARTITION_PROPERTY_ASSIGNABLE_SYNTHETIC_PROC_FEATURES;

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: `mshv` keeps the descriptor open for as long as `self` lives.
        unsafe { BorrowedFd::borrow_raw(self.fd) }
    }
}

/// The hypervisor's answer, in words.
fn refusal(error: MshvError) -> io::Error {
    io::Error::other(error.to_string())
}

fn memory_region(piece: Piece, flags: u8) -> mshv_user_mem_region {
    mshv_user_mem_region {
        size: piece.length(),
        guest_pfn: piece.gpa() >> 12,
        userspace_addr: piece.host(),
        flags,
        ..Default::default()
    }
}

/// A partition of the hypervisor.
pub struct Partition {
    fd: VmFd,
    /// Ioctls made on the partition.
    pub ioctls: IoctlCounts,
}

impl Partition {
    fn set_property(
        &self,
        what: &'static str,
        code: u32,
        value: u64,
    ) -> Result<(), PartitionError> {
        self.ioctls.add("hvcall_set_partition_property", 1);
        self.fd
            .set_partition_property(code, value)
            .map_err(|source| PartitionError::Refused { what, source })
    }

    /// Reads a property of the partition.
    ///
    /// # Errors
    /// What the hypervisor refuses.
    pub fn get_property(&self, code: u32) -> io::Result<u64> {
        self.ioctls.add("hvcall_get_partition_property", 1);
        self.fd.get_partition_property(code).map_err(refusal)
    }

    /// Sets a property of the partition.
    ///
    /// # Errors
    /// What the hypervisor refuses.
    pub fn put_property(&self, code: u32, value: u64) -> io::Result<()> {
        self.ioctls.add("hvcall_set_partition_property", 1);
        self.fd.set_partition_property(code, value).map_err(refusal)
    }

    /// Reads register VP_RUNTIME of VP `index`, in units of 100 ns. Through the partition's descriptor: that of the VP is busy for as
    /// long as the VP runs.
    ///
    /// # Errors
    /// What the hypervisor refuses.
    pub fn vp_run_time(&self, index: u32) -> io::Result<u64> {
        // The partition's id, which the kernel fills in; the VP, VTL 0; and the register's name.
        let input = [0, 0, index, 0, VP_RUNTIME];
        let mut output = [0u64; 2];
        let mut call = mshv_root_hvcall {
            code: HVCALL_GET_VP_REGISTERS as u16,
            reps: 1,
            in_sz: size_of_val(&input) as u16,
            out_sz: size_of_val(&output) as u16,
            in_ptr: input.as_ptr() as u64,
            out_ptr: output.as_mut_ptr() as u64,
            ..Default::default()
        };
        self.ioctls.add("hvcall_get_vp_registers", 1);
        self.fd.hvcall(&mut call).map_err(refusal)?;
        match call.reps {
            1 => Ok(output[0]),
            _ => Err(io::Error::other("the hypervisor has not read it")),
        }
    }

    /// Gives the guest `piece` of its memory, which must stay mapped in this process for as long as the guest has it.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn map_memory(&self, piece: Piece) -> Result<(), PartitionError> {
        self.ioctls.add("set_guest_memory", 1);
        let flags = 1 << MSHV_SET_MEM_BIT_WRITABLE | 1 << MSHV_SET_MEM_BIT_EXECUTABLE;
        self.fd
            .map_user_memory(memory_region(piece, flags))
            .map_err(|source| PartitionError::MapMemory {
                mib: piece.length() >> 20,
                gpa: piece.gpa(),
                source,
            })
    }

    /// Takes a piece from the guest that was given to it just like that.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn unmap_memory(&self, piece: Piece) -> Result<(), PartitionError> {
        self.ioctls.add("set_guest_memory", 1);
        self.fd
            .unmap_user_memory(memory_region(piece, 0))
            .map_err(|source| PartitionError::Refused {
                what: "taking memory from the guest",
                source,
            })
    }

    /// Creates VP `index`.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn create_vp(&self, index: u32) -> Result<Vp, PartitionError> {
        self.ioctls.add("create_vp", 1);
        Ok(Vp::create(&self.fd, index)?)
    }

    /// Lets `event` raise the interrupt that is routed to `gsi`.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), PartitionError> {
        self.ioctls.add("irqfd", 1);
        self.fd
            .register_irqfd(event, gsi)
            .map_err(|source| PartitionError::Refused {
                what: "registering an irqfd",
                source,
            })
    }

    /// Takes [`Partition::register_irqfd`] back.
    pub fn unregister_irqfd(&self, event: &EventFd, gsi: u32) {
        self.ioctls.add("irqfd", 1);
        if let Err(error) = self.fd.unregister_irqfd(event, gsi) {
            warn!("irqfd for interrupt {gsi} does not go: {error}");
        }
    }

    /// Makes a write of any length to `address` an event, in place of an exit.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn register_ioeventfd(&self, event: &EventFd, address: u64) -> io::Result<()> {
        self.ioctls.add("ioeventfd", 1);
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(io::Error::from)
    }

    /// Takes [`Partition::register_ioeventfd`] back.
    pub fn unregister_ioeventfd(&self, event: &EventFd, address: u64) {
        self.ioctls.add("ioeventfd", 1);
        let address = IoEventAddress::Mmio(address);
        if let Err(error) = self.fd.unregister_ioevent(event, &address, NoDatamatch) {
            warn!("ioeventfd at {address:?} does not go: {error}");
        }
    }

    /// Replaces the table that says which MSI a GSI raises.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn set_msi_routing(&self, entries: &[mshv_user_irq_entry]) -> io::Result<()> {
        const WORDS_PER_ENTRY: usize = size_of::<mshv_user_irq_entry>() / 4;
        // The table ends in an array of unknown length: header (count, reserved), then four words an entry.
        let count =
            u32::try_from(entries.len()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        let mut words = Vec::with_capacity(2 + entries.len() * WORDS_PER_ENTRY);
        words.extend([count, 0]);
        for entry in entries {
            words.extend([entry.gsi, entry.address_lo, entry.address_hi, entry.data]);
        }
        self.ioctls.add("set_msi_routing", 1);
        // SAFETY: `words` is laid out as the table, is at least as long as its fixed part, and outlives the call.
        let table = unsafe { &*words.as_ptr().cast::<mshv_user_irq_table>() };
        self.fd.set_msi_routing(table).map_err(io::Error::from)
    }

    /// Puts VP `index` back where a new one is: it waits for the guest to start it. (An INIT, which its local APIC obeys.)
    ///
    /// # Errors
    /// What the hypervisor refuses.
    pub fn reset_vp(&self, index: u32) -> io::Result<()> {
        self.interrupt(&InterruptRequest {
            interrupt_type: INIT,
            apic_id: index.into(),
            vector: 0,
            level_triggered: false,
            logical_destination_mode: false,
            long_mode: false,
        })
    }

    /// Raises (or, with `assert` false, withdraws) an interrupt by hypercall.
    ///
    /// # Errors
    /// What the hypervisor refuses.
    pub fn interrupt(&self, request: &InterruptRequest) -> io::Result<()> {
        self.ioctls.add("hvcall_assert_virtual_interrupt", 1);
        self.fd
            .request_virtual_interrupt(request)
            .map_err(io::Error::from)
    }
}
