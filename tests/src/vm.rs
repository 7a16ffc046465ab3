//! A tiny client: partition, memory, VP.
//!
//! It does what a VMM does with raw ioctls and nothing more; no retries, no fallbacks, so that a test sees what the device does.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use mshv_bindings::*;

use crate::message::Exit;
use crate::payload;
use crate::raw::{self, Errno, Outcome, Sys, bytes_of, bytes_of_mut};
use crate::reg::value64;

/// Flags of `MSHV_SET_GUEST_MEMORY`: writable and executable.
pub const READ_WRITE_EXECUTE: u8 =
    (1 << MSHV_SET_MEM_BIT_WRITABLE) | (1 << MSHV_SET_MEM_BIT_EXECUTABLE);
/// Flags of `MSHV_SET_GUEST_MEMORY`: executable, not writable.
pub const READ_EXECUTE: u8 = 1 << MSHV_SET_MEM_BIT_EXECUTABLE;
/// Flags of `MSHV_CREATE_PARTITION`: a local APIC, x2APIC capable.
pub const LAPIC_FLAGS: u64 = (1 << MSHV_PT_BIT_LAPIC) | (1 << MSHV_PT_BIT_X2APIC);

/// The early property that says what of the hypervisor a guest sees.
pub const SYNTHETIC_FEATURES: u32 =
    hv_partition_property_code_HV_PARTITION_PROPERTY_SYNTHETIC_PROC_FEATURES;

/// A modest value for [`SYNTHETIC_FEATURES`]: the hypervisor's presence, its hypercall and VP index registers.
#[must_use]
pub fn synthetic_features() -> u64 {
    let mut features = hv_partition_synthetic_processor_features::default();
    // SAFETY: every bit pattern of the union is valid in both views.
    unsafe {
        features.__bindgen_anon_1.set_hypervisor_present(1);
        features.__bindgen_anon_1.set_hv1(1);
        features.__bindgen_anon_1.set_access_hypercall_regs(1);
        features.__bindgen_anon_1.set_access_vp_index(1);
        features.as_uint64[0]
    }
}

fn own(fd: i32) -> OwnedFd {
    // SAFETY: each caller passes a descriptor that a system call just returned to it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// The open device.
#[derive(Debug)]
pub struct Device(pub OwnedFd);

impl Device {
    /// Opens `/dev/mshv` as every client does.
    ///
    /// # Errors
    /// Of `open`.
    pub fn open() -> Sys<Device> {
        let path: &CStr = c"/dev/mshv";
        // SAFETY: a NUL-terminated path.
        raw::checked(unsafe { libc::open(path.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) })
            .map(|fd| Device(own(fd)))
    }

    /// The descriptor.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// A partition with a local APIC, not yet initialised.
    ///
    /// # Errors
    /// Of `MSHV_CREATE_PARTITION`.
    pub fn create_partition(&self) -> Sys<Partition> {
        let mut args = mshv_create_partition {
            pt_flags: LAPIC_FLAGS,
            pt_isolation: u64::from(MSHV_PT_ISOLATION_NONE),
        };
        raw::ioctl(self.fd(), raw::CREATE_PARTITION, &mut args).map(|fd| Partition(own(fd)))
    }

    /// A partition ready for memory and VPs, with the synthetic features that every VMM asks for.
    ///
    /// # Panics
    /// When the device refuses.
    #[must_use]
    pub fn partition(&self) -> Partition {
        let partition = self.create_partition().expect("MSHV_CREATE_PARTITION");
        let early = partition.set_property(SYNTHETIC_FEATURES, synthetic_features());
        assert_eq!(
            (early.result, early.status),
            (Ok(()), 0),
            "the synthetic features, an early property"
        );
        partition.initialize().expect("MSHV_INITIALIZE_PARTITION");
        partition
    }
}

/// A partition's descriptor.
#[derive(Debug)]
pub struct Partition(pub OwnedFd);

impl Partition {
    /// The descriptor.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// `MSHV_INITIALIZE_PARTITION`.
    ///
    /// # Errors
    /// Of the ioctl.
    pub fn initialize(&self) -> Sys<()> {
        raw::ioctl_value(self.fd(), raw::INITIALIZE_PARTITION, 0).map(drop)
    }

    /// `MSHV_CREATE_VP`.
    ///
    /// # Errors
    /// Of the ioctl.
    pub fn create_vp(&self, index: u32) -> Sys<Vp> {
        let mut args = mshv_create_vp { vp_index: index };
        raw::ioctl(self.fd(), raw::CREATE_VP, &mut args).map(|fd| Vp { fd: own(fd), index })
    }

    /// `MSHV_SET_GUEST_MEMORY` with exactly these fields.
    ///
    /// # Errors
    /// Of the ioctl.
    pub fn set_memory(&self, mut region: mshv_user_mem_region) -> Sys<()> {
        raw::ioctl(self.fd(), raw::SET_GUEST_MEMORY, &mut region).map(drop)
    }

    /// Maps the whole of `memory` at a guest-physical address.
    ///
    /// # Errors
    /// Of `MSHV_SET_GUEST_MEMORY`.
    pub fn map(&self, memory: &Memory, gpa: u64, flags: u8) -> Sys<()> {
        self.set_memory(memory.region(gpa, flags))
    }

    /// Takes the mapping of `memory` away again.
    ///
    /// # Errors
    /// Of `MSHV_SET_GUEST_MEMORY`.
    pub fn unmap(&self, memory: &Memory, gpa: u64) -> Sys<()> {
        self.set_memory(memory.region(gpa, 1 << MSHV_SET_MEM_BIT_UNMAP))
    }

    /// A hypercall without output and without repetitions.
    pub fn call<T: Copy>(&self, code: u32, input: &T) -> Outcome {
        raw::hypercall(self.fd(), code, 0, bytes_of(input), &mut [])
    }

    /// `HvCallSetPartitionProperty`.
    pub fn set_property(&self, code: u32, value: u64) -> Outcome {
        let input = hv_input_set_partition_property {
            property_code: code,
            property_value: value,
            ..Default::default()
        };
        self.call(HVCALL_SET_PARTITION_PROPERTY, &input)
    }

    /// `HvCallGetPartitionProperty`.
    pub fn property(&self, code: u32) -> (Outcome, u64) {
        let input = hv_input_get_partition_property {
            property_code: code,
            ..Default::default()
        };
        let mut output = 0u64;
        let outcome = raw::hypercall(
            self.fd(),
            HVCALL_GET_PARTITION_PROPERTY,
            0,
            bytes_of(&input),
            bytes_of_mut(&mut output),
        );
        (outcome, output)
    }

    /// `HvCallInstallIntercept`: access mask (1 read, 2 write, 4 execute), `hv_intercept_type`, its parameter.
    pub fn install_intercept(&self, access: u32, kind: u32, parameter: u64) -> Outcome {
        let input = hv_input_install_intercept {
            access_type: access,
            intercept_type: kind,
            intercept_parameter: hv_intercept_parameters {
                as_uint64: parameter,
            },
            ..Default::default()
        };
        self.call(HVCALL_INSTALL_INTERCEPT, &input)
    }

    /// `HvCallAssertVirtualInterrupt` to a physical APIC id.
    pub fn assert_interrupt(&self, kind: u32, apic: u64, vector: u32, level: bool) -> Outcome {
        let control = u64::from(kind) | (u64::from(level) << 32);
        let input = hv_input_assert_virtual_interrupt {
            control: hv_interrupt_control { as_uint64: control },
            dest_addr: apic,
            vector,
            ..Default::default()
        };
        self.call(HVCALL_ASSERT_VIRTUAL_INTERRUPT, &input)
    }

    /// `MSHV_SET_MSI_ROUTING` with these entries.
    ///
    /// # Errors
    /// Of the ioctl.
    pub fn route(&self, entries: &[mshv_user_irq_entry]) -> Sys<()> {
        let mut table = vec![0u32; 2 + entries.len() * 4];
        table[0] = entries.len() as u32;
        for (words, entry) in table[2..].chunks_exact_mut(4).zip(entries) {
            words.copy_from_slice(&[entry.gsi, entry.address_lo, entry.address_hi, entry.data]);
        }
        raw::ioctl(self.fd(), raw::SET_MSI_ROUTING, &mut table[0]).map(drop)
    }

    /// `MSHV_IRQFD`.
    ///
    /// # Errors
    /// Of the ioctl.
    pub fn irqfd(&self, fd: RawFd, resample: RawFd, gsi: u32, flags: u32) -> Sys<()> {
        let mut args = mshv_user_irqfd {
            fd,
            resamplefd: resample,
            gsi,
            flags,
        };
        raw::ioctl(self.fd(), raw::IRQFD, &mut args).map(drop)
    }

    /// `MSHV_IOEVENTFD`.
    ///
    /// # Errors
    /// Of the ioctl.
    pub fn ioeventfd(&self, mut args: mshv_user_ioeventfd) -> Sys<()> {
        raw::ioctl(self.fd(), raw::IOEVENTFD, &mut args).map(drop)
    }
}

/// A route that delivers `vector` to APIC id 0, edge triggered.
#[must_use]
pub fn msi(gsi: u32, vector: u32) -> mshv_user_irq_entry {
    mshv_user_irq_entry {
        gsi,
        address_lo: payload::LAPIC,
        address_hi: 0,
        data: vector,
    }
}

/// Anonymous shared memory of this process.
#[derive(Debug)]
pub struct Memory {
    address: *mut u8,
    size: usize,
}

// SAFETY: the memory is reached by raw accesses of whole bytes only, and lives as long as the value.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// `size` bytes of zeroes.
    ///
    /// # Panics
    /// When the system has no memory.
    #[must_use]
    pub fn new(size: usize) -> Memory {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping touches no existing memory.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                -1,
                0,
            )
        };
        assert_ne!(address, libc::MAP_FAILED, "mmap of {size} bytes");
        Memory {
            address: address.cast(),
            size,
        }
    }

    /// The region argument for the whole of it.
    #[must_use]
    pub fn region(&self, gpa: u64, flags: u8) -> mshv_user_mem_region {
        mshv_user_mem_region {
            size: self.size as u64,
            guest_pfn: gpa >> 12,
            userspace_addr: self.address as u64,
            flags,
            rsvd: [0; 7],
        }
    }

    /// Takes all access away: every later use, the kernel's included, is a fault.
    pub fn forbid(&self) {
        // SAFETY: the mapping made in `new`; nothing in this process uses it after this but calls that expect `EFAULT`.
        let changed = unsafe { libc::mprotect(self.address.cast(), self.size, libc::PROT_NONE) };
        assert_eq!(changed, 0, "mprotect");
    }

    /// Puts bytes at an offset.
    ///
    /// # Panics
    /// When they do not fit.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        assert!(offset as usize + bytes.len() <= self.size);
        for (i, byte) in bytes.iter().enumerate() {
            // SAFETY: in bounds by the assertion; volatile since the guest may look at the same time.
            unsafe { self.address.add(offset as usize + i).write_volatile(*byte) };
        }
    }

    /// Bytes from an offset.
    ///
    /// # Panics
    /// When the range is not inside.
    #[must_use]
    pub fn read(&self, offset: u64, count: usize) -> Vec<u8> {
        assert!(offset as usize + count <= self.size);
        // SAFETY: in bounds by the assertion; volatile since the guest may write at the same time.
        (0..count)
            .map(|i| unsafe { self.address.add(offset as usize + i).read_volatile() })
            .collect()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, not used after this.
        unsafe { libc::munmap(self.address.cast(), self.size) };
    }
}

/// A VP's descriptor.
#[derive(Debug)]
pub struct Vp {
    /// The descriptor.
    pub fd: OwnedFd,
    /// Its index in the partition.
    pub index: u32,
}

/// A page of a VP mapped into this process.
#[derive(Debug)]
pub struct Page(pub *mut u8);

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `map_page`, not used after this.
        unsafe { libc::munmap(self.0.cast(), 0x1000) };
    }
}

impl Vp {
    /// The descriptor.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// `MSHV_RUN_VP`, once.
    ///
    /// # Errors
    /// Of the ioctl.
    pub fn run(&self) -> Sys<Exit> {
        let mut message = hv_message::default();
        raw::ioctl(self.fd(), raw::RUN_VP, &mut message)?;
        Ok(Exit::from(&message))
    }

    /// Maps one of the VP's pages: 0 registers, 1 intercept message, 2 GHCB.
    ///
    /// # Errors
    /// Of `mmap`.
    pub fn map_page(&self, index: i64) -> Sys<Page> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                0x1000,
                protection,
                libc::MAP_SHARED,
                self.fd(),
                index * 0x1000,
            )
        };
        if page == libc::MAP_FAILED {
            Err(raw::last_errno())
        } else {
            Ok(Page(page.cast()))
        }
    }

    /// What the register hypercalls' inputs begin with: partition id (the kernel fills it in), VP index, VTL and reserved bytes.
    fn header(&self) -> Vec<u8> {
        [[0; 8].as_slice(), &self.index.to_le_bytes(), &[0; 4]].concat()
    }

    /// `HvCallGetVpRegisters` for all of `names`, in order, on the descriptor `fd` (the VP's or its partition's).
    pub fn get_on(&self, fd: RawFd, names: &[u32]) -> (Outcome, Vec<hv_register_value>) {
        let mut input = self.header();
        input.extend(names.iter().flat_map(|name| name.to_le_bytes()));
        let mut output = vec![0u8; names.len() * 16];
        let outcome = raw::hypercall(
            fd,
            HVCALL_GET_VP_REGISTERS,
            names.len(),
            &input,
            &mut output,
        );
        let value = |chunk: &[u8]| {
            let mut value = hv_register_value {
                reg128: hv_u128::default(),
            };
            bytes_of_mut(&mut value).copy_from_slice(chunk);
            value
        };
        (outcome, output.chunks_exact(16).map(value).collect())
    }

    /// Registers by the VP's own descriptor.
    ///
    /// # Panics
    /// When the hypercall fails.
    #[must_use]
    pub fn get(&self, names: &[u32]) -> Vec<hv_register_value> {
        let (outcome, values) = self.get_on(self.fd(), names);
        assert_eq!(
            outcome,
            Outcome {
                result: Ok(()),
                status: 0,
                reps: names.len() as u16
            },
            "registers {names:x?}"
        );
        values
    }

    /// One 64-bit register.
    #[must_use]
    pub fn get64(&self, name: u32) -> u64 {
        // SAFETY: every bit pattern is a number.
        unsafe { self.get(&[name])[0].reg64 }
    }

    /// `HvCallSetVpRegisters` for all of `registers`, in order.
    pub fn try_set(&self, registers: &[(u32, hv_register_value)]) -> Outcome {
        let mut input = self.header();
        for (name, value) in registers {
            input.extend(bytes_of(&hv_register_assoc {
                name: *name,
                value: *value,
                ..Default::default()
            }));
        }
        raw::hypercall(
            self.fd(),
            HVCALL_SET_VP_REGISTERS,
            registers.len(),
            &input,
            &mut [],
        )
    }

    /// Sets registers of any kind.
    ///
    /// # Panics
    /// When the hypercall fails.
    pub fn set(&self, registers: &[(u32, hv_register_value)]) {
        let outcome = self.try_set(registers);
        let names: Vec<u32> = registers.iter().map(|(name, _)| *name).collect();
        assert_eq!(
            outcome,
            Outcome {
                result: Ok(()),
                status: 0,
                reps: registers.len() as u16
            },
            "registers {names:x?}"
        );
    }

    /// Sets 64-bit registers.
    pub fn set64(&self, registers: &[(u32, u64)]) {
        let values: Vec<_> = registers
            .iter()
            .map(|(name, value)| (*name, value64(*value)))
            .collect();
        self.set(&values);
    }
}

/// The error `EINVAL`, which most refusals of the driver are.
pub const EINVAL: Errno = Errno(libc::EINVAL);
/// The error `EFAULT`.
pub const EFAULT: Errno = Errno(libc::EFAULT);
/// The error `ENOTTY`.
pub const ENOTTY: Errno = Errno(libc::ENOTTY);
/// The error `EBADF`.
pub const EBADF: Errno = Errno(libc::EBADF);
/// The error `EIO`, the driver's word for most hypervisor statuses.
pub const EIO: Errno = Errno(libc::EIO);
