//! Extended processor state: the compacted XSAVE area of the ABI, and the x87 and SSE registers within KVM's.
//!
//! KVM speaks the standard form, with every component at its fixed place; the ABI the compacted one, with the
//! components of the partition one after the other.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, Xsave, kvm_cpuid_entry2, kvm_fpu, kvm_xsave};

use super::engine::Engine;
use super::state::put;
use crate::errno::Errno;
use crate::property::code;

/// Where a component of extended state lies in KVM's standard form, and what the compacted form asks of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Component {
    offset: usize,
    size: usize,
    aligned: bool,
}

const LEGACY: usize = 512;
const HEADER: usize = 64;
const XSTATE_BV: usize = 512;
const XCOMP_BV: usize = 520;
const COMPACTED: u64 = 1 << 63;

fn component(cpuid: &[kvm_cpuid_entry2], number: u32) -> Option<Component> {
    let entry = cpuid.iter().find(|entry| {
        entry.function == 0xd
            && entry.index == number
            && entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0
    })?;
    (entry.eax != 0).then_some(Component {
        offset: entry.ebx as usize,
        size: entry.eax as usize,
        aligned: entry.ecx & 2 != 0,
    })
}

/// The components of `states` in order, with their places in the compacted form.
fn layout(cpuid: &[kvm_cpuid_entry2], states: u64) -> Vec<(u32, Component, usize)> {
    let mut end = LEGACY + HEADER;
    (2..63)
        .filter(|number| states >> number & 1 != 0)
        .filter_map(|number| Some((number, component(cpuid, number)?)))
        .map(|(number, component)| {
            let start = if component.aligned {
                end.next_multiple_of(64)
            } else {
                end
            };
            end = start + component.size;
            (number, component, start)
        })
        .collect()
}

/// Standard form to compacted form with exactly the components of `states`.
fn compact(
    cpuid: &[kvm_cpuid_entry2],
    states: u64,
    standard: &[u8],
    compacted: &mut [u8],
) -> Result<(), Errno> {
    let too_small = Errno(libc::EINVAL);
    put(compacted, standard.get(..LEGACY + HEADER).ok_or(too_small)?)?;
    let present = word_at(standard, XSTATE_BV)? & states;
    put(&mut compacted[XSTATE_BV..], &present.to_le_bytes())?;
    put(
        &mut compacted[XCOMP_BV..],
        &(COMPACTED | states).to_le_bytes(),
    )?;
    compacted[LEGACY + 16..LEGACY + HEADER].fill(0);
    for (_, component, start) in layout(cpuid, states) {
        let from = standard.get(component.offset..component.offset + component.size);
        put(
            compacted.get_mut(start..).ok_or(too_small)?,
            from.ok_or(too_small)?,
        )?;
    }
    Ok(())
}

/// Compacted form to standard form; components the compacted form lacks keep their values.
fn expand(
    cpuid: &[kvm_cpuid_entry2],
    states: u64,
    compacted: &[u8],
    standard: &mut [u8],
) -> Result<(), Errno> {
    let bad = Errno(libc::EINVAL);
    let (present, layout_of) = (
        word_at(compacted, XSTATE_BV)?,
        word_at(compacted, XCOMP_BV)?,
    );
    // Nobody but a client that starts from zeros leaves the format bit out.
    let contains = if layout_of == 0 {
        states
    } else {
        layout_of & !COMPACTED
    };
    if layout_of != 0 && layout_of & COMPACTED == 0
        || contains & !states != 0
        || present & !contains != 0
    {
        return Err(bad);
    }
    put(standard, compacted.get(..LEGACY).ok_or(bad)?)?;
    let kept = word_at(standard, XSTATE_BV)? & !states;
    put(&mut standard[XSTATE_BV..], &(kept | present).to_le_bytes())?;
    for (number, component, start) in layout(cpuid, contains) {
        if present >> number & 1 == 0 {
            continue;
        }
        let from = compacted.get(start..start + component.size).ok_or(bad)?;
        put(standard.get_mut(component.offset..).ok_or(bad)?, from)?;
    }
    Ok(())
}

fn word_at(area: &[u8], offset: usize) -> Result<u64, Errno> {
    let bytes = area.get(offset..).and_then(|rest| rest.first_chunk::<8>());
    bytes
        .map(|bytes| u64::from_le_bytes(*bytes))
        .ok_or(Errno(libc::EINVAL))
}

fn xsave_states(engine: &Engine) -> u64 {
    engine
        .partition
        .properties
        .get(code::XSAVE_STATES)
        .unwrap_or(0)
        | 0b11
}

/// The whole area of KVM's standard form: its fixed part and what follows.
fn area(xsave: &mut Xsave) -> &mut [u8] {
    let extra = xsave.as_fam_struct_ref().len;
    let size = size_of::<kvm_xsave>() + extra * size_of::<u32>();
    // SAFETY: the wrapper allocated the fixed part and `extra` words after it; its length stays as it is.
    unsafe {
        let start = &raw mut xsave.as_mut_fam_struct().xsave;
        std::slice::from_raw_parts_mut(start.cast::<u8>(), size)
    }
}

fn new_area(engine: &Engine) -> Result<Xsave, Errno> {
    let size = engine
        .partition
        .vm
        .check_extension_int(kvm_ioctls::Cap::Xsave2);
    let fixed = size_of::<kvm_xsave>();
    let extra = usize::try_from(size)
        .unwrap_or(0)
        .saturating_sub(fixed)
        .div_ceil(size_of::<u32>());
    Xsave::new(extra).map_err(|_| Errno(libc::ENOMEM))
}

fn read_area(engine: &Engine) -> Result<Xsave, Errno> {
    let mut xsave = new_area(engine)?;
    // SAFETY: the area has the size KVM asks for (`KVM_CAP_XSAVE2`).
    unsafe { engine.context.vcpu().get_xsave2(&mut xsave) }?;
    Ok(xsave)
}

/// Reads the compacted area of the partition's components.
///
/// # Errors
/// `EINVAL` for a buffer that is too small; what KVM says.
pub(super) fn get(engine: &Engine, data: &mut [u8]) -> Result<(), Errno> {
    let states = xsave_states(engine);
    let mut xsave = read_area(engine)?;
    compact(
        engine.partition.cpuid.as_slice(),
        states,
        area(&mut xsave),
        data,
    )
}

/// Sets what [`get`] reads.
///
/// # Errors
/// `EINVAL` for an area that names components the partition lacks; what KVM says.
pub(super) fn set(engine: &Engine, data: &[u8]) -> Result<(), Errno> {
    let states = xsave_states(engine);
    let mut xsave = read_area(engine)?;
    expand(
        engine.partition.cpuid.as_slice(),
        states,
        data,
        area(&mut xsave),
    )?;
    // SAFETY: as in `read_area`.
    Ok(unsafe { engine.context.vcpu().set_xsave2(&xsave) }?)
}

/// x87 and SSE state. `KVM_GET_FPU` would do, but for state in its initial configuration, which the processor does not
/// store.
///
/// # Errors
/// What KVM says.
pub(super) fn fpu(engine: &Engine) -> Result<kvm_fpu, Errno> {
    let mut xsave = read_area(engine)?;
    Ok(legacy_fpu(area(&mut xsave)))
}

/// Sets what [`fpu`] reads.
///
/// # Errors
/// What KVM says.
pub(super) fn set_fpu(engine: &Engine, fpu: &kvm_fpu) -> Result<(), Errno> {
    let mut xsave = read_area(engine)?;
    put_legacy_fpu(fpu, area(&mut xsave))?;
    // SAFETY: as in `read_area`.
    Ok(unsafe { engine.context.vcpu().set_xsave2(&xsave) }?)
}

/// Places in the legacy area, which is that of FXSAVE.
const FPR: usize = 32;
const XMM: usize = 160;
const X87_AND_SSE: u8 = 0b11;

fn legacy_fpu(area: &[u8]) -> kvm_fpu {
    let field = |offset: usize| word_at(area, offset).unwrap_or(0);
    let register = |offset: usize| {
        let bytes = area.get(offset..).and_then(|rest| rest.first_chunk::<16>());
        bytes.copied().unwrap_or_default()
    };
    kvm_fpu {
        fcw: field(0) as u16,
        fsw: field(2) as u16,
        ftwx: field(4) as u8,
        last_opcode: field(6) as u16,
        last_ip: field(8),
        last_dp: field(16),
        mxcsr: field(24) as u32,
        fpr: std::array::from_fn(|i| register(FPR + 16 * i)),
        xmm: std::array::from_fn(|i| register(XMM + 16 * i)),
        ..Default::default()
    }
}

fn put_legacy_fpu(fpu: &kvm_fpu, area: &mut [u8]) -> Result<(), Errno> {
    put(area, &fpu.fcw.to_le_bytes())?;
    put(&mut area[2..], &fpu.fsw.to_le_bytes())?;
    put(&mut area[4..], &[fpu.ftwx])?;
    put(&mut area[6..], &fpu.last_opcode.to_le_bytes())?;
    put(&mut area[8..], &fpu.last_ip.to_le_bytes())?;
    put(&mut area[16..], &fpu.last_dp.to_le_bytes())?;
    put(&mut area[24..], &fpu.mxcsr.to_le_bytes())?;
    put(&mut area[FPR..], fpu.fpr.as_flattened())?;
    put(&mut area[XMM..], fpu.xmm.as_flattened())?;
    area[XSTATE_BV] |= X87_AND_SSE;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(index: u32, [eax, ebx, ecx]: [u32; 3]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function: 0xd,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax,
            ebx,
            ecx,
            ..Default::default()
        }
    }

    /// AVX, the opmasks and PKRU, where real processors have them.
    fn cpuid() -> Vec<kvm_cpuid_entry2> {
        vec![
            entry(2, [256, 576, 0]),
            entry(5, [64, 1088, 0]),
            entry(9, [8, 2688, 2]),
        ]
    }

    const STATES: u64 = 0b10_0010_0111;

    #[test]
    fn components_move_to_their_compacted_places() {
        let places: Vec<_> = layout(&cpuid(), STATES)
            .into_iter()
            .map(|(n, _, at)| (n, at))
            .collect();
        assert_eq!(places, [(2, 576), (5, 832), (9, 896)]);
        let without_opmasks: Vec<_> = layout(&cpuid(), STATES & !(1 << 5))
            .into_iter()
            .map(|(n, _, at)| (n, at))
            .collect();
        assert_eq!(without_opmasks, [(2, 576), (9, 832)]);
    }

    #[test]
    fn an_area_survives_both_ways() {
        let mut standard = vec![0; 4096];
        for (i, byte) in standard.iter_mut().enumerate() {
            *byte = (i % 251) as u8;
        }
        standard[LEGACY..LEGACY + HEADER].fill(0);
        standard[XSTATE_BV] = 0b0010_0111;
        standard[XSTATE_BV + 1] = 0b10;
        let mut compacted = vec![0; 904];
        compact(&cpuid(), STATES, &standard, &mut compacted).unwrap();
        assert_eq!(compacted[..LEGACY], standard[..LEGACY]);
        assert_eq!(word_at(&compacted, XCOMP_BV), Ok(COMPACTED | STATES));
        assert_eq!(compacted[896..904], standard[2688..2696]);
        let mut back = vec![0; 4096];
        expand(&cpuid(), STATES, &compacted, &mut back).unwrap();
        for range in [
            0..LEGACY,
            576..832,
            1088..1152,
            2688..2696,
            XSTATE_BV..XSTATE_BV + 8,
        ] {
            assert_eq!(back[range.clone()], standard[range]);
        }
    }

    #[test]
    fn a_compacted_area_may_not_name_what_is_not_there() {
        let mut compacted = vec![0; 904];
        compacted[XCOMP_BV..XCOMP_BV + 8].copy_from_slice(&(COMPACTED | 1 << 18).to_le_bytes());
        let mut back = vec![0; 4096];
        assert_eq!(
            expand(&cpuid(), STATES, &compacted, &mut back),
            Err(Errno(libc::EINVAL))
        );
        assert_eq!(
            compact(&cpuid(), STATES, &back, &mut compacted[..600]),
            Err(Errno(libc::EINVAL))
        );
    }

    #[test]
    fn x87_and_sse_survive_both_ways() {
        let mut fpu = kvm_fpu {
            fcw: 0x37f,
            fsw: 0x1234,
            ftwx: 0x81,
            last_opcode: 0x7ff,
            last_ip: 0x1122_3344_5566_7788,
            last_dp: 0x99aa_bbcc_ddee_ff00,
            mxcsr: 0x1f80,
            ..Default::default()
        };
        fpu.fpr[7] = [7; 16];
        fpu.xmm[15] = [15; 16];
        let mut area = vec![0; 4096];
        put_legacy_fpu(&fpu, &mut area).unwrap();
        assert_eq!(legacy_fpu(&area), fpu);
        assert_eq!(area[XSTATE_BV], X87_AND_SSE);
    }
}
