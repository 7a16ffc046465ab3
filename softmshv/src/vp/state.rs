//! Parts of a VP's state that are no registers: the LAPIC, the SynIC's pages and timers, and (in [`xsave`]) extended
//! processor state.

use kvm_bindings::kvm_lapic_state;
use mshv_bindings::{
    hv_local_interrupt_controller_state, hv_stimer_state, hv_synthetic_timers_state,
};

use super::engine::Engine;
use super::registers::{read_msr, write_msr};
use super::xsave;
use crate::errno::Errno;
use crate::partition::Partition;
use crate::property::code;
use crate::trace;

/// `MSHV_VP_STATE_*`.
const LAPIC: u8 = 0;
const XSAVE: u8 = 1;
const SIMP: u8 = 2;
const SIEFP: u8 = 3;
const SYNTHETIC_TIMERS: u8 = 4;

const PAGE: usize = 4096;

const MSR_SIEFP: u32 = 0x4000_0082;
const MSR_SIMP: u32 = 0x4000_0083;
const MSR_STIMER0_CONFIG: u32 = 0x4000_00b0;
const OVERLAY_ENABLED: u64 = 1;
const PAGE_MASK: u64 = !0xfff;

/// How many bytes a kind of state is.
///
/// # Errors
/// `EINVAL` for a kind that does not exist.
pub(super) fn size(partition: &Partition, kind: u8) -> Result<usize, Errno> {
    match kind {
        LAPIC | SIMP | SIEFP => Ok(PAGE),
        SYNTHETIC_TIMERS => Ok(size_of::<hv_synthetic_timers_state>()),
        XSAVE => {
            let size = partition.properties.get(code::MAX_XSAVE_DATA_SIZE);
            size.map(|size| size as usize).map_err(|_| Errno(libc::EIO))
        }
        _ => Err(Errno(libc::EINVAL)),
    }
}

/// Reads a kind of state into `data`.
///
/// # Errors
/// `EINVAL` for a kind that does not exist or a buffer that is too small; what KVM says.
pub(super) fn get(engine: &mut Engine, kind: u8, data: &mut [u8]) -> Result<(), Errno> {
    match kind {
        LAPIC => {
            let state = lapic_to_hv(&engine.context.vcpu().get_lapic()?);
            put(data, &plain_bytes::<176, _>(&state))
        }
        XSAVE => xsave::get(engine, data),
        SIMP => get_overlay(engine, MSR_SIMP, data),
        SIEFP => get_overlay(engine, MSR_SIEFP, data),
        SYNTHETIC_TIMERS => {
            let state = timers(engine);
            put(data, &plain_bytes::<200, _>(&state))
        }
        _ => Err(Errno(libc::EINVAL)),
    }
}

/// Writes a kind of state from `data`.
///
/// # Errors
/// As [`get`].
pub(super) fn set(engine: &mut Engine, kind: u8, data: &[u8]) -> Result<(), Errno> {
    match kind {
        LAPIC => {
            let bytes: &[u8; 176] = data.first_chunk().ok_or(Errno(libc::EINVAL))?;
            // SAFETY: a packed structure of integers of this size.
            let state: hv_local_interrupt_controller_state = unsafe { std::mem::transmute(*bytes) };
            let mut lapic = engine.context.vcpu().get_lapic()?;
            lapic_from_hv(&state, &mut lapic);
            engine.context.vcpu().set_lapic(&lapic)?;
            // The task priority is in the LAPIC and in CR8.
            engine.context.refresh()
        }
        XSAVE => xsave::set(engine, data),
        SIMP => set_overlay(engine, MSR_SIMP, data),
        SIEFP => set_overlay(engine, MSR_SIEFP, data),
        SYNTHETIC_TIMERS => {
            let bytes: &[u8; 200] = data.first_chunk().ok_or(Errno(libc::EINVAL))?;
            // SAFETY: a packed structure of integers of this size.
            set_timers(engine, &unsafe {
                std::mem::transmute::<[u8; 200], hv_synthetic_timers_state>(*bytes)
            })
        }
        _ => Err(Errno(libc::EINVAL)),
    }
}

/// Copies `state` to the start of `data`.
pub(super) fn put(data: &mut [u8], state: &[u8]) -> Result<(), Errno> {
    data.get_mut(..state.len())
        .ok_or(Errno(libc::EINVAL))?
        .copy_from_slice(state);
    Ok(())
}

/// The bytes of a packed structure of integers.
fn plain_bytes<const N: usize, T: Copy>(state: &T) -> [u8; N] {
    const { assert!(size_of::<T>() == N) };
    // SAFETY: the sizes agree, and callers pass packed structures of integers, which have no padding.
    unsafe { std::mem::transmute_copy(state) }
}

/// LAPIC registers in both forms: offset in the register page, field of the hypervisor's structure.
macro_rules! lapic_registers {
    ($action:ident, $hv:expr, $page:expr) => {
        $action!($hv.apic_id, $page, 0x20);
        $action!($hv.apic_version, $page, 0x30);
        $action!($hv.apic_remote_read, $page, 0xc0);
        $action!($hv.apic_ldr, $page, 0xd0);
        $action!($hv.apic_dfr, $page, 0xe0);
        $action!($hv.apic_spurious, $page, 0xf0);
        $action!($hv.apic_esr, $page, 0x280);
        $action!($hv.apic_lvt_cmci, $page, 0x2f0);
        $action!($hv.apic_icr_low, $page, 0x300);
        $action!($hv.apic_icr_high, $page, 0x310);
        $action!($hv.apic_lvt_timer, $page, 0x320);
        $action!($hv.apic_lvt_thermal, $page, 0x330);
        $action!($hv.apic_lvt_perfmon, $page, 0x340);
        $action!($hv.apic_lvt_lint0, $page, 0x350);
        $action!($hv.apic_lvt_lint1, $page, 0x360);
        $action!($hv.apic_lvt_error, $page, 0x370);
        $action!($hv.apic_initial_count, $page, 0x380);
        $action!($hv.apic_counter_value, $page, 0x390);
        $action!($hv.apic_divide_configuration, $page, 0x3e0);
        for i in 0..8 {
            $action!($hv.apic_isr[i], $page, 0x100 + 0x10 * i);
            $action!($hv.apic_tmr[i], $page, 0x180 + 0x10 * i);
            $action!($hv.apic_irr[i], $page, 0x200 + 0x10 * i);
        }
    };
}

fn lapic_to_hv(lapic: &kvm_lapic_state) -> hv_local_interrupt_controller_state {
    let read = |offset: usize| {
        let bytes = [0, 1, 2, 3].map(|i| lapic.regs[offset + i] as u8);
        u32::from_le_bytes(bytes)
    };
    let mut state = hv_local_interrupt_controller_state::default();
    macro_rules! load {
        ($field:expr, $read:expr, $offset:expr) => {
            $field = $read($offset)
        };
    }
    lapic_registers!(load, state, read);
    state
}

fn lapic_from_hv(state: &hv_local_interrupt_controller_state, lapic: &mut kvm_lapic_state) {
    let mut write = |offset: usize, value: u32| {
        for (register, byte) in lapic.regs[offset..].iter_mut().zip(value.to_le_bytes()) {
            *register = byte as std::ffi::c_char;
        }
    };
    macro_rules! store {
        ($field:expr, $write:expr, $offset:expr) => {
            $write($offset, $field)
        };
    }
    lapic_registers!(store, state, write);
}

/// The page a SynIC register points at. In KVM it is the guest's own memory; while the guest has it off the hypervisor
/// keeps a page of its own, and so does [`Engine`].
fn overlay(engine: &Engine, msr: u32) -> Option<u64> {
    let value = read_msr(engine, msr).unwrap_or(0);
    (value & OVERLAY_ENABLED != 0).then_some(value & PAGE_MASK)
}

fn hidden(engine: &mut Engine, msr: u32) -> &mut [u8; PAGE] {
    &mut engine.synic_pages[usize::from(msr == MSR_SIEFP)]
}

fn get_overlay(engine: &mut Engine, msr: u32, data: &mut [u8]) -> Result<(), Errno> {
    let page = data.first_chunk_mut::<PAGE>().ok_or(Errno(libc::EINVAL))?;
    match overlay(engine, msr) {
        Some(gpa) if engine.partition.memory.read(gpa, page).is_ok() => {}
        _ => page.copy_from_slice(hidden(engine, msr)),
    }
    Ok(())
}

fn set_overlay(engine: &mut Engine, msr: u32, data: &[u8]) -> Result<(), Errno> {
    let page = data.first_chunk::<PAGE>().ok_or(Errno(libc::EINVAL))?;
    match overlay(engine, msr) {
        Some(gpa) if engine.partition.memory.write(gpa, page).is_ok() => {}
        _ => hidden(engine, msr).copy_from_slice(page),
    }
    Ok(())
}

fn timers(engine: &Engine) -> hv_synthetic_timers_state {
    let mut state = hv_synthetic_timers_state::default();
    for (timer, msr) in (0..4).zip((MSR_STIMER0_CONFIG..).step_by(2)) {
        state.timers[timer] = hv_stimer_state {
            config: read_msr(engine, msr).unwrap_or(0),
            count: read_msr(engine, msr + 1).unwrap_or(0),
            ..Default::default()
        };
    }
    state
}

fn set_timers(engine: &Engine, state: &hv_synthetic_timers_state) -> Result<(), Errno> {
    for (timer, msr) in (0..4).zip((MSR_STIMER0_CONFIG..).step_by(2)) {
        let timer: hv_stimer_state = state.timers[timer];
        // The count starts a timer that is configured to start by itself, so it goes first.
        for (msr, value) in [(msr + 1, timer.count), (msr, timer.config)] {
            if write_msr(engine, msr, value).is_err() {
                trace::unimplemented("synthetic timer state without KVM's Hyper-V timers");
                return Err(Errno(libc::EINVAL));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lapic_survives_both_ways() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[0x80] = 0x20;
        let mut state = hv_local_interrupt_controller_state {
            apic_id: 0x0300_0000,
            apic_spurious: 0x1ff,
            apic_lvt_lint1: 0x400,
            apic_icr_high: 0x8000_0000,
            apic_divide_configuration: 0xb,
            ..Default::default()
        };
        state.apic_irr[7] = 0x8000_0001;
        lapic_from_hv(&state, &mut lapic);
        assert_eq!(lapic.regs[0x80], 0x20);
        let back = lapic_to_hv(&lapic);
        assert_eq!(plain_bytes::<176, _>(&back), plain_bytes::<176, _>(&state));
    }
}
