//! The ioctls of a VP descriptor.

use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};

use mshv_bindings::{MSHV_RUN_VP_BUF_SZ, mshv_get_set_vp_state};

use crate::errno::Errno;
use crate::partition::PartitionFile;
use crate::trace::{self, Ioctl};
use crate::vp::Vp;
use crate::{device, hvcall, user};

const PAGE: u64 = 4096;

/// Where the intercept message page is in the VP's pages.
const MESSAGE_PAGE: i64 = 4096;

/// Where user space ends.
const USER_END: u64 = 1 << 47;

/// `MSHV_VP_STATE_*`.
const LAPIC: u8 = 0;
const SYNTHETIC_TIMERS: u8 = 4;

/// What a VP descriptor stands for: the VP, and the partition that must outlive it.
pub(crate) struct VpFile {
    owner: Arc<PartitionFile>,
    vp: Arc<Vp>,
    /// One ioctl at a time, as in the driver: a second thread waits.
    lock: Mutex<()>,
}

impl VpFile {
    /// The descriptor of `vp`, a VP of `owner`.
    pub(crate) fn new(owner: Arc<PartitionFile>, vp: Arc<Vp>) -> Self {
        Self {
            owner,
            vp,
            lock: Mutex::default(),
        }
    }

    /// An ioctl on the VP descriptor.
    ///
    /// # Errors
    /// As the driver; `ENOTTY` for what it does not know.
    pub(crate) fn ioctl(&self, request: u32, arg: u64) -> Result<i32, Errno> {
        let _locked = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        match request {
            device::RUN_VP => {
                trace::ioctl(Ioctl::RunVp);
                self.run(arg)?;
            }
            device::GET_VP_STATE => {
                trace::ioctl(Ioctl::GetVpState);
                self.state(arg, false)?;
            }
            device::SET_VP_STATE => {
                trace::ioctl(Ioctl::SetVpState);
                self.state(arg, true)?;
            }
            device::ROOT_HVCALL => {
                trace::ioctl(Ioctl::RootHvcall);
                hvcall::passthrough(hvcall::Target::Vp(&self.owner), arg)?;
            }
            other => {
                trace::unimplemented(&format!("ioctl {other:#010x} on a VP"));
                return Err(Errno(libc::ENOTTY));
            }
        }
        Ok(0)
    }

    /// `MSHV_RUN_VP`. As in the driver, the message is copied from the intercept message page, and a bad address is
    /// found out only then.
    fn run(&self, arg: u64) -> Result<(), Errno> {
        const MESSAGE: usize = MSHV_RUN_VP_BUF_SZ as usize;
        self.vp.run()?;
        // SAFETY: the kernel checks the client's address.
        let copied = unsafe {
            let page = self.vp.memfd().as_raw_fd();
            libc::pread(page, arg as *mut libc::c_void, MESSAGE, MESSAGE_PAGE)
        };
        if copied == MESSAGE as isize {
            Ok(())
        } else {
            Err(Errno(libc::EFAULT))
        }
    }

    /// `MSHV_GET_VP_STATE` and `MSHV_SET_VP_STATE`.
    fn state(&self, arg: u64, set: bool) -> Result<(), Errno> {
        let mut args: mshv_get_set_vp_state = user::read(arg)?;
        let (kind, room, address) = (args.type_, args.buf_sz, args.buf_ptr);
        if !(LAPIC..=SYNTHETIC_TIMERS).contains(&kind)
            || args.rsvd != [0; 3]
            || room == 0
            || !u64::from(room).is_multiple_of(PAGE)
            || !address.is_multiple_of(PAGE)
        {
            return Err(Errno(libc::EINVAL));
        }
        if address
            .checked_add(room.into())
            .is_none_or(|end| end > USER_END)
        {
            return Err(Errno(libc::EFAULT));
        }
        let size = self.vp.state_size(kind)?;
        args.buf_sz = u32::try_from(size).map_err(|_| Errno(libc::EINVAL))?;
        user::write(arg, &args)?;
        if size > room as usize {
            return Err(Errno(libc::EINVAL));
        }
        let mut data = vec![0; size];
        if set {
            user::copy_in(address, &mut data)?;
            self.vp.set_state(kind, &data)
        } else {
            self.vp.get_state(kind, &mut data)?;
            user::copy_out(address, &data)
        }
    }
}
