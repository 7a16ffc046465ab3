//! A VM of one real VP, which counts for ever, through mshv-ioctls.

use std::{
    io, ptr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    thread,
};

use mshv_bindings::{
    HV_PAGE_SIZE, MSHV_PT_BIT_LAPIC, MSHV_PT_ISOLATION_NONE, MSHV_SET_MEM_BIT_EXECUTABLE,
    MSHV_SET_MEM_BIT_WRITABLE, hv_register_assoc, hv_register_name,
    hv_register_name_HV_X64_REGISTER_CS as CS, hv_register_name_HV_X64_REGISTER_DS as DS,
    hv_register_name_HV_X64_REGISTER_RBX as RBX, hv_register_name_HV_X64_REGISTER_RFLAGS as RFLAGS,
    hv_register_name_HV_X64_REGISTER_RIP as RIP, hv_register_value, hv_x64_segment_register,
    mshv_create_partition_v2, mshv_user_mem_region,
};
use mshv_ioctls::{Mshv, MshvError, VcpuFd, VmFd};
use scheduler::{PartitionProperties, Tid};

use crate::Result;

/// Guest-physical address of the code.
const BASE: u64 = 0x1000;
const SIZE: usize = 2 * HV_PAGE_SIZE;
/// `inc dword [bx]`, and again.
const COUNT_FOR_EVER: [u8; 5] = [0x66, 0xff, 0x07, 0xeb, 0xfb];

/// A partition with one VP.
pub(super) struct Machine {
    partition: VmFd,
    count: Arc<Count>,
}

/// Where the VP counts. The memory stays the guest's until the process ends.
struct Count(*mut u8);

// SAFETY: only ever accessed as an atomic.
unsafe impl Send for Count {}
// SAFETY: the same.
unsafe impl Sync for Count {}

impl Count {
    fn read(&self) -> u32 {
        // SAFETY: at the start of the second page of a mapping that is never taken back.
        unsafe { AtomicU32::from_ptr(self.0.add(HV_PAGE_SIZE).cast()) }.load(Relaxed)
    }
}

/// A [`Machine`] whose VP runs.
pub(super) struct Running {
    pub(super) partition: Properties,
    pub(super) tid: Tid,
    count: Arc<Count>,
}

impl Running {
    pub(super) fn count(&self) -> u32 {
        self.count.read()
    }
}

/// What Rota's enforcer sees of a partition.
pub(super) struct Properties(VmFd);

impl PartitionProperties for Properties {
    fn property(&self, code: u32) -> io::Result<u64> {
        self.0.get_partition_property(code).map_err(system_error)
    }

    fn set_property(&self, code: u32, value: u64) -> io::Result<()> {
        self.0
            .set_partition_property(code, value)
            .map_err(system_error)
    }

    fn is_shown_threads(&self) -> bool {
        false
    }
}

fn system_error(error: MshvError) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

impl Machine {
    pub(super) fn new(device: &Mshv) -> Result<(Self, VcpuFd)> {
        let partition = device.create_vm_with_args(&mshv_create_partition_v2 {
            pt_flags: 1 << MSHV_PT_BIT_LAPIC,
            pt_isolation: MSHV_PT_ISOLATION_NONE.into(),
            ..Default::default()
        })?;
        partition.initialize()?;
        let count = memory()?;
        partition.map_user_memory(mshv_user_mem_region {
            size: SIZE as u64,
            guest_pfn: BASE / HV_PAGE_SIZE as u64,
            userspace_addr: count.0 as u64,
            flags: 1 << MSHV_SET_MEM_BIT_WRITABLE | 1 << MSHV_SET_MEM_BIT_EXECUTABLE,
            ..Default::default()
        })?;
        let vp = partition.create_vcpu(0)?;
        vp.set_reg(&start())?;
        let machine = Self {
            partition,
            count: Arc::new(count),
        };
        Ok((machine, vp))
    }

    /// Runs the VP on a thread of its own until the process ends.
    pub(super) fn run(self, vp: VcpuFd) -> Result<Running> {
        let (tell, told) = std::sync::mpsc::channel();
        thread::Builder::new().name("vcpu0".into()).spawn(move || {
            let _ = tell.send(Tid::current());
            // A count has no end; whatever else comes back ends this VP, and shows in its count.
            while match vp.run() {
                Err(error) => matches!(error.errno(), libc::EINTR | libc::EAGAIN),
                Ok(_) => false,
            } {}
        })?;
        Ok(Running {
            partition: Properties(self.partition),
            tid: told.recv()?,
            count: self.count,
        })
    }
}

fn memory() -> Result<Count> {
    // SAFETY: a new anonymous mapping, into whose first page the code is written.
    unsafe {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let start = libc::mmap(ptr::null_mut(), SIZE, protection, flags, -1, 0);
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error().into());
        }
        let start = start.cast::<u8>();
        ptr::copy_nonoverlapping(COUNT_FOR_EVER.as_ptr(), start, COUNT_FOR_EVER.len());
        Ok(Count(start))
    }
}

/// Real mode, at the code, with BX at the count.
fn start() -> [hv_register_assoc; 5] {
    let register = |name: hv_register_name, value| hv_register_assoc {
        name,
        value,
        ..Default::default()
    };
    let segment = |attributes| {
        let mut segment = hv_x64_segment_register {
            limit: 0xffff,
            ..Default::default()
        };
        segment.__bindgen_anon_1.attributes = attributes;
        hv_register_value { segment }
    };
    let word = |reg64| hv_register_value { reg64 };
    [
        register(CS, segment(0x9b)),
        register(DS, segment(0x93)),
        register(RIP, word(BASE)),
        register(RBX, word(BASE + HV_PAGE_SIZE as u64)),
        register(RFLAGS, word(2)),
    ]
}
