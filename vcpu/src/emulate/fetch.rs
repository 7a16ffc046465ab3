//! From RIP to a decoded instruction.

use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::cpu::{CS, Cpu};
use super::error::{
    EmulateError, Fault, GENERAL_PROTECTION, INVALID_OPCODE, InstructionBytes, Step,
};
use super::view::{Access, GuestView};

/// The longest instruction the processor accepts.
const MAX_LENGTH: usize = 15;

/// Decodes the instruction at `cpu.rip`, of which the caller already has the first bytes in `known` (perhaps none).
///
/// # Errors
///
/// #UD for an invalid encoding, #GP for one that is too long, the faults of fetching the missing bytes, or code outside of
/// guest memory.
pub(super) fn fetch<M>(
    cpu: &Cpu,
    view: &mut GuestView<'_, M>,
    known: &[u8],
) -> Step<(Instruction, InstructionBytes)>
where
    M: GuestMemoryBackend + ?Sized,
{
    let mut bytes = [0; MAX_LENGTH];
    let mut len = known.len().min(MAX_LENGTH);
    bytes[..len].copy_from_slice(&known[..len]);
    let rip = cpu.rip & cpu.instruction_pointer_mask();
    loop {
        let mut decoder =
            Decoder::with_ip(cpu.code_bits(), &bytes[..len], rip, DecoderOptions::NONE);
        let instruction = decoder.decode();
        match decoder.last_error() {
            DecoderError::None => {
                return Ok((
                    instruction,
                    InstructionBytes::new(&bytes[..instruction.len()]),
                ));
            }
            DecoderError::NoMoreBytes if len < MAX_LENGTH => {
                len += view.fetch(cpu, rip.wrapping_add(len as u64), &mut bytes[len..])?;
            }
            _ if decoder.position() == MAX_LENGTH => {
                return Err(Fault::zero(GENERAL_PROTECTION).into());
            }
            _ => return Err(Fault::plain(INVALID_OPCODE).into()),
        }
    }
}

impl<M: GuestMemoryBackend + ?Sized> GuestView<'_, M> {
    /// Reads code at offset `rip` of CS into `bytes`, at most to the end of the page; returns how many, at least one.
    fn fetch(&mut self, cpu: &Cpu, rip: u64, bytes: &mut [u8]) -> Step<usize> {
        let linear = cpu.linear(CS, rip, 1, Access::Execute)?;
        let gpa = self.translate(linear, Access::Execute)?;
        let room = bytes.len().min(4096 - (linear % 4096) as usize);
        let read = self.memory().read(&mut bytes[..room], GuestAddress(gpa));
        read.map_err(|_| EmulateError::CodeOutsideMemory { rip, gpa }.into())
    }
}
