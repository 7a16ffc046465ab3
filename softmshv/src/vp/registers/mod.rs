//! The registers of a VP by their hypervisor names, as the register hypercalls read and write them.
//!
//! Each file is one group; [`get`] and [`set`] ask them in turn. A name nobody knows is an invalid parameter, and is
//! named in the trace.

pub(super) mod control;
pub(super) mod event;
pub(super) mod fpu;
mod general;
mod msr;
pub(super) mod segment;
mod synthetic;

use kvm_bindings::{KVM_VCPUEVENT_VALID_SHADOW, Msrs, kvm_mp_state, kvm_msr_entry};
use mshv_bindings::{self as hv, hv_register_assoc, hv_register_value, hv_u128};

pub(super) use synthetic::NOTIFY_INTERRUPT;

use super::engine::Engine;
use super::xsave;
use crate::errno::{Errno, HvStatus};
use crate::trace;

/// `HV_STATUS_PROCESSOR_FEATURE_NOT_SUPPORTED`.
const FEATURE_NOT_SUPPORTED: HvStatus =
    HvStatus(hv::HV_STATUS_PROCESSOR_FEATURE_NOT_SUPPORTED as u16);
/// `HV_STATUS_OPERATION_FAILED`.
const OPERATION_FAILED: HvStatus = HvStatus(hv::HV_STATUS_OPERATION_FAILED as u16);

/// Why a register could not be read or written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failure {
    /// The processor cannot hold the value.
    BadValue,
    /// The processor or KVM has no such register.
    Absent,
    /// KVM refused altogether.
    Kvm(Errno),
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Self::Kvm(errno)
    }
}

impl From<kvm_ioctls::Error> for Failure {
    fn from(error: kvm_ioctls::Error) -> Self {
        Self::Kvm(error.into())
    }
}

impl Failure {
    fn status(self, name: u32) -> HvStatus {
        match self {
            Self::BadValue => HvStatus::INVALID_REGISTER_VALUE,
            Self::Absent => {
                trace::unimplemented(&format!("register {name:#x} of this processor"));
                FEATURE_NOT_SUPPORTED
            }
            Self::Kvm(errno) => {
                trace::unimplemented(&format!("register {name:#x}: KVM says {errno:?}"));
                OPERATION_FAILED
            }
        }
    }
}

/// A register value of up to 64 bits.
pub(super) fn word(value: u64) -> hv_register_value {
    hv_register_value {
        reg128: hv_u128 {
            low_part: value,
            high_part: 0,
        },
    }
}

fn wide([low_part, high_part]: [u64; 2]) -> hv_register_value {
    hv_register_value {
        reg128: hv_u128 {
            low_part,
            high_part,
        },
    }
}

/// Reads register `name`.
///
/// # Errors
/// `INVALID_PARAMETER` for a name that does not exist.
pub(super) fn get(engine: &mut Engine, name: u32) -> Result<hv_register_value, HvStatus> {
    match read(engine, name) {
        Ok(Some(value)) => Ok(value),
        Ok(None) => Err(unknown(name)),
        // A register of a feature the processor lacks reads as zero.
        Err(Failure::Absent) => {
            Failure::Absent.status(name);
            Ok(word(0))
        }
        Err(failure) => Err(failure.status(name)),
    }
}

/// Writes a register.
///
/// # Errors
/// `INVALID_PARAMETER` for a name that does not exist, `INVALID_REGISTER_VALUE` for a value the processor cannot
/// hold.
pub(super) fn set(engine: &mut Engine, assoc: &hv_register_assoc) -> Result<(), HvStatus> {
    let name = assoc.name;
    match write(engine, name, &{ assoc.value }) {
        Ok(true) => Ok(()),
        Ok(false) => Err(unknown(name)),
        Err(failure) => Err(failure.status(name)),
    }
}

fn unknown(name: u32) -> HvStatus {
    trace::unimplemented(&format!("register {name:#x}"));
    HvStatus::INVALID_PARAMETER
}

fn read(engine: &mut Engine, name: u32) -> Result<Option<hv_register_value>, Failure> {
    let mut regs = *engine.context.regs();
    if let Some(register) = general::slot(&mut regs, name) {
        return Ok(Some(word(*register)));
    }
    if let Some(value) = control::get(&engine.context, name)? {
        return Ok(Some(value));
    }
    if fpu::contains(name) {
        return Ok(Some(fpu::get(&xsave::fpu(engine)?, name)));
    }
    if let Some(index) = msr::index(name) {
        return read_msr(engine, index).map(|value| Some(word(value)));
    }
    let events = engine.context.events();
    Ok(Some(match name {
        hv::hv_register_name_HV_REGISTER_PENDING_INTERRUPTION => {
            word(event::pending_interruption(events))
        }
        hv::hv_register_name_HV_REGISTER_INTERRUPT_STATE => word(event::interrupt_state(events)),
        hv::hv_register_name_HV_REGISTER_PENDING_EVENT0 => wide(event::pending_event(events)),
        hv::hv_register_name_HV_REGISTER_PENDING_EVENT1 => wide([0, 0]),
        hv::hv_register_name_HV_REGISTER_INTERNAL_ACTIVITY_STATE => {
            // Asking may take an INIT or SIPI in, which changes registers.
            let state = engine.context.vcpu().get_mp_state()?;
            engine.context.refresh()?;
            word(event::activity(state.mp_state))
        }
        _ => return Ok(synthetic::get(engine, name)),
    }))
}

fn write(engine: &mut Engine, name: u32, value: &hv_register_value) -> Result<bool, Failure> {
    // SAFETY: every variant of the union is plain integers.
    let hv_u128 {
        low_part,
        high_part,
    } = unsafe { value.reg128 };
    let mut regs = *engine.context.regs();
    if let Some(register) = general::slot(&mut regs, name) {
        *register = general::checked(name, low_part).ok_or(Failure::BadValue)?;
        *engine.context.regs_mut() = regs;
        return Ok(true);
    }
    if control::set(&mut engine.context, name, value)? {
        return Ok(true);
    }
    if fpu::contains(name) {
        let mut fpu = xsave::fpu(engine)?;
        if !fpu::set(&mut fpu, name, value) {
            return Err(Failure::BadValue);
        }
        xsave::set_fpu(engine, &fpu)?;
        return Ok(true);
    }
    if let Some(index) = msr::index(name) {
        write_msr(engine, index, low_part)?;
        return Ok(true);
    }
    let taken = match name {
        hv::hv_register_name_HV_REGISTER_PENDING_INTERRUPTION => {
            event::set_pending_interruption(engine.context.events_mut(), low_part)
        }
        hv::hv_register_name_HV_REGISTER_INTERRUPT_STATE => {
            event::set_interrupt_state(engine.context.events_mut(), low_part)
        }
        hv::hv_register_name_HV_REGISTER_PENDING_EVENT0
        | hv::hv_register_name_HV_REGISTER_PENDING_EVENT1 => {
            set_event(engine, name, [low_part, high_part])
        }
        hv::hv_register_name_HV_REGISTER_INTERNAL_ACTIVITY_STATE => {
            let mp_state = event::mp_state(low_part).ok_or(Failure::BadValue)?;
            engine
                .context
                .vcpu()
                .set_mp_state(kvm_mp_state { mp_state })?;
            true
        }
        _ => return Ok(synthetic::set(engine, name, low_part)),
    };
    if taken {
        Ok(true)
    } else {
        Err(Failure::BadValue)
    }
}

fn set_event(engine: &mut Engine, name: u32, value: [u64; 2]) -> bool {
    if name == hv::hv_register_name_HV_REGISTER_PENDING_EVENT1 && value[0] & 1 == 0 {
        return true;
    }
    // No event there already, and none wanted: nothing to take back.
    if value[0] & 1 == 0 && engine.context.events().exception.pending == 0 {
        return true;
    }
    let mut sregs = *engine.context.sregs();
    let cr2 = sregs.cr2;
    if !event::set_pending_event(engine.context.events_mut(), &mut sregs, value) {
        return false;
    }
    if sregs.cr2 != cr2 {
        engine.context.sregs_mut().cr2 = sregs.cr2;
    }
    engine.context.events_mut().flags |= KVM_VCPUEVENT_VALID_SHADOW;
    true
}

/// Reads MSR `index` as the host does, without the guest's privileges.
pub(super) fn read_msr(engine: &Engine, index: u32) -> Result<u64, Failure> {
    let mut msrs = entries(index, 0)?;
    match engine.context.vcpu().get_msrs(&mut msrs) {
        Ok(1) => Ok(msrs.as_slice()[0].data),
        Ok(_) => Err(Failure::Absent),
        Err(error) => Err(error.into()),
    }
}

/// Writes MSR `index` as the host does. A register the processor lacks takes its only value, zero.
pub(super) fn write_msr(engine: &Engine, index: u32, value: u64) -> Result<(), Failure> {
    let accepted = engine.context.vcpu().set_msrs(&entries(index, value)?)? == 1;
    if accepted {
        return Ok(());
    }
    match read_msr(engine, index) {
        Ok(current) if current == value => Ok(()),
        Ok(_) => Err(Failure::BadValue),
        Err(Failure::Absent) if value == 0 => Ok(()),
        Err(failure) => Err(failure),
    }
}

fn entries(index: u32, data: u64) -> Result<Msrs, Failure> {
    let entry = kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    Msrs::from_entries(&[entry]).map_err(|_| Failure::Kvm(Errno(libc::ENOMEM)))
}
