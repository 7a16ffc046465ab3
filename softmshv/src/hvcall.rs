//! `MSHV_ROOT_HVCALL`: hypercalls a client makes through the driver.
//!
//! The driver lets a short list pass, fills in the partition and reports the hypervisor's status. Behind it, this
//! is the hypervisor: each hypercall reads its input page and writes its output page.

use std::sync::Arc;

use mshv_bindings::{hv_register_assoc, hv_register_value, mshv_root_hvcall};

use crate::device::Device;
use crate::errno::{Errno, HvStatus};
use crate::intercepts::CpuidResult;
use crate::memory::AccessOp;
use crate::partition::PartitionFile;
use crate::vp::Vp;
use crate::{property, trace, user};

const PAGE: usize = 1 << PAGE_SHIFT;
const PAGE_SHIFT: u32 = 12;

const GET_PARTITION_PROPERTY: u16 = 0x44;
const SET_PARTITION_PROPERTY: u16 = 0x45;
const INSTALL_INTERCEPT: u16 = 0x4d;
const GET_VP_REGISTERS: u16 = 0x50;
const SET_VP_REGISTERS: u16 = 0x51;
const TRANSLATE_VIRTUAL_ADDRESS: u16 = 0x52;
const CLEAR_VIRTUAL_INTERRUPT: u16 = 0x56;
const SCRUB_PARTITION: u16 = 0x8d;
const REGISTER_INTERCEPT_RESULT: u16 = 0x91;
const ASSERT_VIRTUAL_INTERRUPT: u16 = 0x94;
const SIGNAL_EVENT_DIRECT: u16 = 0xc0;
const POST_MESSAGE_DIRECT: u16 = 0xc1;
const GET_GPA_PAGES_ACCESS_STATES: u16 = 0xc9;
const GET_VP_CPUID_VALUES: u16 = 0xf4;
const GET_PARTITION_PROPERTY_EX: u16 = 0x101;

/// What the driver lets pass to a partition.
const ALLOWED: [u16; 15] = [
    GET_PARTITION_PROPERTY,
    SET_PARTITION_PROPERTY,
    INSTALL_INTERCEPT,
    GET_VP_REGISTERS,
    SET_VP_REGISTERS,
    TRANSLATE_VIRTUAL_ADDRESS,
    CLEAR_VIRTUAL_INTERRUPT,
    SCRUB_PARTITION,
    REGISTER_INTERCEPT_RESULT,
    ASSERT_VIRTUAL_INTERRUPT,
    SIGNAL_EVENT_DIRECT,
    POST_MESSAGE_DIRECT,
    GET_GPA_PAGES_ACCESS_STATES,
    GET_VP_CPUID_VALUES,
    GET_PARTITION_PROPERTY_EX,
];

/// What the driver lets pass to the host itself.
const ALLOWED_ON_SELF: [u16; 2] = [GET_PARTITION_PROPERTY, GET_PARTITION_PROPERTY_EX];

/// `HV_ANY_VP`.
const ANY_VP: u32 = u32::MAX;

/// The descriptor the call came through.
#[derive(Clone, Copy)]
pub(crate) enum Target<'a> {
    /// The host's own partition.
    Device(&'a Device),
    /// A partition.
    Partition(&'a Arc<PartitionFile>),
    /// A partition, through one of its VPs.
    Vp(&'a Arc<PartitionFile>),
}

/// One page of hypercall input or output.
struct Page(Box<[u8; PAGE]>);

impl Page {
    fn new() -> Self {
        Self(Box::new([0; PAGE]))
    }

    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.0[at..at + N]);
        bytes
    }

    fn u8(&self, at: usize) -> u8 {
        self.0[at]
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes(at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes(at))
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

/// How a hypercall ended, and how many repetitions it did.
type Outcome = (HvStatus, u16);

fn simple(status: HvStatus) -> Outcome {
    (status, 0)
}

fn result(result: Result<(), HvStatus>) -> Outcome {
    simple(result.err().unwrap_or(HvStatus::SUCCESS))
}

/// `MSHV_ROOT_HVCALL` with its argument at `arg`.
///
/// # Errors
/// `EFAULT` and `EINVAL` as the driver, then the errno of the hypervisor's status, which is in the argument too.
pub(crate) fn passthrough(target: Target<'_>, arg: u64) -> Result<(), Errno> {
    let mut args: mshv_root_hvcall = user::read(arg)?;
    let bad_input = args.status != 0
        || args.in_ptr == 0
        || usize::from(args.in_sz) < size_of::<u64>()
        || usize::from(args.in_sz) > PAGE
        || args.rsvd != [0; 6];
    let bad_output = args.out_ptr != 0 && (args.out_sz == 0 || usize::from(args.out_sz) > PAGE);
    if bad_input || bad_output {
        return Err(Errno(libc::EINVAL));
    }
    let allowed: &[u16] = if matches!(target, Target::Device(_)) {
        &ALLOWED_ON_SELF
    } else {
        &ALLOWED
    };
    let code = args.code;
    if !allowed.contains(&code) {
        trace::unimplemented(&format!(
            "{} (the driver does not pass it)",
            trace::hypercall_name(code)
        ));
        return Err(Errno(libc::EINVAL));
    }
    // It may complete later, and the driver waits for that on the partition descriptor alone.
    if code == SET_PARTITION_PROPERTY && !matches!(target, Target::Partition(_)) {
        return Err(Errno(libc::EINVAL));
    }
    trace::hypercall(code);

    let (mut input, mut output) = (Page::new(), Page::new());
    user::copy_in(args.in_ptr, &mut input.0[..args.in_sz.into()])?;
    let call = Call {
        code,
        reps: args.reps,
        has_output: args.out_ptr != 0,
    };
    let (status, done) = match target {
        Target::Device(device) => on_host(device, &call, &input, &mut output),
        Target::Partition(file) | Target::Vp(file) => {
            on_partition(file, &call, &input, &mut output)
        }
    };
    args.status = status.0;
    args.reps = if args.reps == 0 { 0 } else { done };
    user::write(arg, &args)?;
    status.to_errno()?;
    if args.out_ptr != 0 {
        user::copy_out(args.out_ptr, &output.0[..args.out_sz.into()])?;
    }
    Ok(())
}

/// A hypercall and its control word.
struct Call {
    code: u16,
    reps: u16,
    has_output: bool,
}

impl Call {
    /// Whether the call has the form its code asks for: repetitions of `element` bytes behind `header` bytes of input,
    /// or none; `result` bytes of output for each.
    fn is_well_formed(&self) -> bool {
        let fits = |header: usize, element: usize, result: usize| {
            let reps = usize::from(self.reps);
            reps != 0
                && header + reps * element <= PAGE
                && reps * result <= PAGE
                && (result == 0 || self.has_output)
        };
        match self.code {
            GET_VP_REGISTERS => fits(16, 4, 16),
            SET_VP_REGISTERS => fits(16, 32, 0),
            GET_VP_CPUID_VALUES => fits(24, 24, 16),
            GET_GPA_PAGES_ACCESS_STATES => fits(24, 0, 1),
            GET_PARTITION_PROPERTY | GET_PARTITION_PROPERTY_EX | TRANSLATE_VIRTUAL_ADDRESS => {
                self.reps == 0 && self.has_output
            }
            _ => self.reps == 0,
        }
    }
}

fn on_host(device: &Device, call: &Call, input: &Page, output: &mut Page) -> Outcome {
    if !call.is_well_formed() {
        return simple(HvStatus::INVALID_HYPERCALL_INPUT);
    }
    let code = input.u32(8);
    if call.code == GET_PARTITION_PROPERTY_EX {
        return result(property::host_property_ex(code).map(|payload| output.put(0, &payload)));
    }
    match device.processor.property(code) {
        Some(value) => {
            output.put(0, &value.to_le_bytes());
            simple(HvStatus::SUCCESS)
        }
        None => {
            property::missing("GET", code);
            simple(HvStatus::UNKNOWN_PROPERTY)
        }
    }
}

fn on_partition(
    file: &Arc<PartitionFile>,
    call: &Call,
    input: &Page,
    output: &mut Page,
) -> Outcome {
    if !call.is_well_formed() {
        return simple(HvStatus::INVALID_HYPERCALL_INPUT);
    }
    let partition = &*file.partition;
    match call.code {
        GET_PARTITION_PROPERTY => result(
            partition
                .property(input.u32(8))
                .map(|value| output.put(0, &value.to_le_bytes())),
        ),
        GET_PARTITION_PROPERTY_EX => {
            property::missing("GET", input.u32(8));
            simple(HvStatus::UNKNOWN_PROPERTY)
        }
        SET_PARTITION_PROPERTY => result(partition.set_property(input.u32(8), input.u64(16))),
        INSTALL_INTERCEPT => simple(partition.intercepts.install(
            input.u32(8),
            input.u32(12),
            input.u64(16),
        )),
        REGISTER_INTERCEPT_RESULT => simple(register_result(file, input)),
        ASSERT_VIRTUAL_INTERRUPT if !partition.properties.is_initialized() => {
            simple(HvStatus::INVALID_PARTITION_STATE)
        }
        ASSERT_VIRTUAL_INTERRUPT if !is_vtl0(input.u8(28)) => simple(HvStatus::INVALID_PARAMETER),
        ASSERT_VIRTUAL_INTERRUPT => simple(partition.interrupts.assert(
            input.u64(8),
            input.u64(16),
            input.u32(24),
        )),
        GET_GPA_PAGES_ACCESS_STATES => access_states(file, call.reps, input, output),
        GET_VP_REGISTERS | SET_VP_REGISTERS | TRANSLATE_VIRTUAL_ADDRESS | GET_VP_CPUID_VALUES => {
            match file.vp(input.u32(8)) {
                Some(vp) => on_vp(vp, call, input, output),
                None => simple(HvStatus::INVALID_VP_INDEX),
            }
        }
        other => {
            trace::unimplemented(&trace::hypercall_name(other));
            simple(HvStatus::INVALID_HYPERCALL_CODE)
        }
    }
}

/// Whether a VTL field means VTL 0: unused, or used and naming it.
fn is_vtl0(input_vtl: u8) -> bool {
    input_vtl & 0xf == 0
}

fn on_vp(vp: &Vp, call: &Call, input: &Page, output: &mut Page) -> Outcome {
    let reps = usize::from(call.reps);
    let done =
        |(status, done): (HvStatus, usize)| (status, u16::try_from(done).unwrap_or(call.reps));
    match call.code {
        GET_VP_REGISTERS | SET_VP_REGISTERS if !is_vtl0(input.u8(12)) => {
            simple(HvStatus::INVALID_PARAMETER)
        }
        GET_VP_REGISTERS => {
            let names: Vec<u32> = (0..reps).map(|rep| input.u32(16 + 4 * rep)).collect();
            let mut values = vec![hv_register_value::default(); reps];
            let outcome = vp.get_registers(&names, &mut values);
            for (rep, value) in values.iter().enumerate() {
                // SAFETY: every view of a register value is sixteen bytes of plain data.
                output.put(16 * rep, &unsafe {
                    std::mem::transmute::<hv_register_value, [u8; 16]>(*value)
                });
            }
            done(outcome)
        }
        SET_VP_REGISTERS => {
            let assocs: Vec<hv_register_assoc> = (0..reps)
                // SAFETY: 32 bytes of plain data.
                .map(|rep| unsafe {
                    std::mem::transmute::<[u8; 32], hv_register_assoc>(input.bytes(16 + 32 * rep))
                })
                .collect();
            done(vp.set_registers(&assocs))
        }
        GET_VP_CPUID_VALUES => {
            for rep in 0..reps {
                let at = 24 + 24 * rep;
                let values = vp.cpuid_values(
                    input.u32(at),
                    input.u32(at + 4),
                    input.u64(at + 8),
                    input.u64(at + 16),
                );
                for (index, value) in values.into_iter().enumerate() {
                    output.put(16 * rep + 4 * index, &value.to_le_bytes());
                }
            }
            (HvStatus::SUCCESS, call.reps)
        }
        _ => {
            let (flags, page) = (input.u64(16), input.u64(24));
            let (translation, gpa) = vp.translate(flags, page << PAGE_SHIFT);
            output.put(0, &u64::from(translation).to_le_bytes());
            output.put(8, &(gpa >> PAGE_SHIFT).to_le_bytes());
            simple(HvStatus::SUCCESS)
        }
    }
}

/// `HVCALL_REGISTER_INTERCEPT_RESULT`: what CPUID answers in the guest.
fn register_result(file: &PartitionFile, input: &Page) -> HvStatus {
    const CPUID: u32 = 2;
    let (vp_index, kind) = (input.u32(8), input.u32(12));
    if kind != CPUID {
        trace::unimplemented(&format!("HVCALL_REGISTER_INTERCEPT_RESULT type {kind}"));
        return HvStatus::INVALID_PARAMETER;
    }
    let vp_index = match vp_index {
        ANY_VP => None,
        index if file.vp(index).is_some() => Some(index),
        _ => return HvStatus::INVALID_VP_INDEX,
    };
    let pair = |index: usize| (input.u32(28 + 8 * index), input.u32(32 + 8 * index));
    let pairs = [pair(0), pair(1), pair(2), pair(3)];
    file.partition.intercepts.register(CpuidResult {
        leaf: input.u32(16),
        subleaf: input.u32(20),
        vp_index,
        any_subleaf: input.u8(24) == 0,
        values: pairs.map(|(value, _)| value),
        masks: pairs.map(|(_, mask)| mask),
    });
    HvStatus::SUCCESS
}

/// `HVCALL_GET_GPA_PAGES_ACCESS_STATES`: one byte per page, bit 0 accessed, bit 1 dirty.
fn access_states(file: &PartitionFile, reps: u16, input: &Page, output: &mut Page) -> Outcome {
    const CLEAR_DIRTY: u64 = 1 << 2;
    const SET_DIRTY: u64 = 1 << 3;
    let (flags, base) = (input.u64(8), input.u64(16));
    let op = match (flags & CLEAR_DIRTY != 0, flags & SET_DIRTY != 0) {
        (true, true) => return simple(HvStatus::INVALID_PARAMETER),
        (true, false) => AccessOp::Clear,
        (false, true) => AccessOp::Set,
        (false, false) => AccessOp::Keep,
    };
    match file.partition.memory.dirty_bitmap(base, reps.into(), op) {
        Ok(bitmap) => {
            for page in 0..usize::from(reps) {
                // A written page was accessed; of others it is not known, and "accessed" is the safe answer.
                let dirty = bitmap[page / 8] >> (page % 8) & 1;
                output.put(page, &[1 | dirty << 1]);
            }
            (HvStatus::SUCCESS, reps)
        }
        Err(Errno(libc::EINVAL)) => simple(HvStatus::INVALID_PARAMETER),
        Err(_) => simple(HvStatus::INVALID_PARTITION_STATE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(code: u16, reps: u16) -> Call {
        Call {
            code,
            reps,
            has_output: true,
        }
    }

    #[test]
    fn repetitions_must_fit_the_pages() {
        assert!(call(GET_VP_REGISTERS, 128).is_well_formed());
        assert!(call(GET_VP_REGISTERS, 256).is_well_formed());
        assert!(!call(GET_VP_REGISTERS, 257).is_well_formed());
        assert!(call(SET_VP_REGISTERS, 127).is_well_formed());
        assert!(!call(SET_VP_REGISTERS, 128).is_well_formed());
        assert!(!call(GET_VP_REGISTERS, 0).is_well_formed());
        assert!(!call(GET_PARTITION_PROPERTY, 1).is_well_formed());
        assert!(
            !Call {
                has_output: false,
                ..call(GET_VP_REGISTERS, 1)
            }
            .is_well_formed()
        );
    }
}
