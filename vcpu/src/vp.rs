//! A VP of a partition: its descriptor, its register page, and every ioctl made on it, counted.

use std::{ptr::NonNull, sync::Arc};

use mshv_bindings::{
    hv_message, hv_register_assoc, hv_register_name_HV_REGISTER_PENDING_EVENT0 as PENDING_EVENT0,
    hv_register_value, hv_x64_pending_exception_event,
    hv_x64_pending_exception_event__bindgen_ty_1,
};
use mshv_ioctls::{MshvError, VcpuFd, VmFd};

use crate::{
    counters::Counters, emulate::Fault, history::History, registers::RegisterPage,
    request::Requests,
};

/// A register by name, with a value.
pub type Register = hv_register_assoc;

/// What the driver or the hypervisor refused.
#[derive(Debug, thiserror::Error)]
pub enum VpError {
    /// The VP cannot be created.
    #[error("cannot create VP {index}")]
    Create {
        /// Its index.
        index: u32,
        /// The driver's answer.
        source: MshvError,
    },
    /// There is no such VP index.
    #[error("VP index {0} is too large")]
    Index(u32),
    /// The VP cannot be run.
    #[error("cannot run VP {index}")]
    Run {
        /// Its index.
        index: u32,
        /// The driver's answer.
        source: MshvError,
    },
    /// Registers cannot be read.
    #[error("cannot read registers of VP {index}")]
    GetRegisters {
        /// The VP's index.
        index: u32,
        /// The hypervisor's answer.
        source: MshvError,
    },
    /// Registers cannot be written.
    #[error("cannot write registers of VP {index}")]
    SetRegisters {
        /// The VP's index.
        index: u32,
        /// The hypervisor's answer.
        source: MshvError,
    },
}

/// One virtual processor.
pub struct Vp {
    index: u32,
    fd: VcpuFd,
    page: Option<RegisterPage>,
    pub(crate) history: History,
    pub(crate) counters: Arc<Counters>,
    pub(crate) requests: Arc<Requests>,
}

impl Vp {
    /// Creates VP `index` of a partition, and maps its register page where the hypervisor offers one.
    ///
    /// # Errors
    /// What the driver says.
    pub fn create(partition: &VmFd, index: u32) -> Result<Self, VpError> {
        let id = u8::try_from(index).map_err(|_| VpError::Index(index))?;
        let fd = partition
            .create_vcpu(id)
            .map_err(|source| VpError::Create { index, source })?;
        let page = fd.get_vp_reg_page().and_then(|page| NonNull::new(page.0));
        // SAFETY: `create_vcpu` has just mapped the page; `fd` unmaps it when it is dropped, with `page`, and in the calls
        // used here does not touch it.
        let page = page.map(|page| unsafe { RegisterPage::new(page) });
        Ok(Self {
            index,
            fd,
            page,
            history: History::default(),
            counters: Arc::default(),
            requests: Arc::default(),
        })
    }

    /// The VP's index.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Whether the hypervisor offers a register page for this VP; without one, exits cost further hypercalls.
    #[must_use]
    pub fn has_register_page(&self) -> bool {
        self.page.is_some()
    }

    /// What this VP has done.
    #[must_use]
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// The way to pause or stop this VP from another thread.
    #[must_use]
    pub fn requests(&self) -> Arc<Requests> {
        Arc::clone(&self.requests)
    }

    /// Lets this VP be run again after it was stopped, on another thread. Returns the way to stop it then.
    pub fn renew(&mut self) -> Arc<Requests> {
        self.requests = Arc::default();
        self.requests()
    }

    /// Writes registers, all in one hypercall.
    ///
    /// # Errors
    /// What the hypervisor says.
    pub fn set_registers(&self, registers: &[Register]) -> Result<(), VpError> {
        self.counters.set_vp_registers.bump();
        self.fd
            .set_reg(registers)
            .map_err(|source| VpError::SetRegisters {
                index: self.index,
                source,
            })
    }

    /// Reads the registers named in `registers`, all in one hypercall.
    ///
    /// # Errors
    /// What the hypervisor says.
    pub fn get_registers(&self, registers: &mut [Register]) -> Result<(), VpError> {
        self.counters.get_vp_registers.bump();
        self.fd
            .get_reg(registers)
            .map_err(|source| VpError::GetRegisters {
                index: self.index,
                source,
            })
    }

    /// Runs the guest until it does something, which the message tells, or a signal comes first.
    pub(crate) fn run_once(&mut self) -> Result<Option<hv_message>, VpError> {
        self.counters.run_vp.bump();
        match self.fd.run() {
            Ok(message) => Ok(Some(message)),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Ok(None),
            Err(source) => Err(VpError::Run {
                index: self.index,
                source,
            }),
        }
    }

    /// Makes the guest take `fault` before its next instruction.
    pub(crate) fn inject(&self, fault: Fault) -> Result<(), VpError> {
        let mut event = hv_x64_pending_exception_event__bindgen_ty_1 {
            error_code: fault.error_code.unwrap_or(0),
            exception_parameter: fault.cr2.unwrap_or(0),
            ..Default::default()
        };
        // Event type 0 is an exception.
        event.set_event_pending(1);
        event.set_deliver_error_code(fault.error_code.is_some().into());
        event.set_vector(fault.vector.into());
        let pending_exception_event = hv_x64_pending_exception_event {
            __bindgen_anon_1: event,
        };
        let value = hv_register_value {
            pending_exception_event,
        };
        self.set_registers(&[Register {
            name: PENDING_EVENT0,
            value,
            ..Default::default()
        }])
    }

    pub(crate) fn valid_page(&self) -> Option<&RegisterPage> {
        self.page.as_ref().filter(|page| page.is_valid())
    }

    pub(crate) fn valid_page_mut(&mut self) -> Option<&mut RegisterPage> {
        self.page.as_mut().filter(|page| page.is_valid())
    }
}
