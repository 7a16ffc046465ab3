//! From a segment and an offset to a linear address, with the checks of the current mode.
//!
//! Not modelled: linear address masking, which would let pointers carry metadata in their upper bits.

use super::cpu::{CS, Cpu, FS, SS};
use super::error::{Fault, GENERAL_PROTECTION, STACK_FAULT};
use super::view::Access;

impl Cpu {
    /// The linear address of `len` bytes at `offset` in segment `index`, checked for `access`.
    ///
    /// # Errors
    ///
    /// #SS for the stack segment and #GP for the others, where the address is not canonical (64-bit code), outside the limit,
    /// or the segment does not allow the access.
    pub(crate) fn linear(
        &self,
        index: usize,
        offset: u64,
        len: u64,
        access: Access,
    ) -> Result<u64, Fault> {
        let fault = Fault::zero(if index == SS {
            STACK_FAULT
        } else {
            GENERAL_PROTECTION
        });
        let segment = &self.segments[index];
        if self.code_bits() == 64 {
            let base = if index >= FS { segment.base } else { 0 };
            let linear = base.wrapping_add(offset);
            let last = linear.wrapping_add(len - 1);
            return if self.is_canonical(linear) && self.is_canonical(last) {
                Ok(linear)
            } else {
                Err(fault)
            };
        }
        if !self.is_real_mode() && !self.is_virtual_8086() {
            let allowed = match access {
                Access::Read => !segment.is_code() || segment.is_writable_or_readable(),
                Access::Write => !segment.is_code() && segment.is_writable_or_readable(),
                Access::Execute => true,
            };
            if !segment.is_present() || !allowed {
                return Err(fault);
            }
        }
        let offset = offset & 0xffff_ffff;
        let limit = u64::from(segment.limit);
        let last = offset + (len - 1);
        let inside = if segment.is_expand_down() && index != CS && !self.is_virtual_8086() {
            let upper = if segment.is_big() {
                0xffff_ffff
            } else {
                0xffff
            };
            offset > limit && last <= upper
        } else {
            // A 4 GiB segment has no end to run over: addresses wrap.
            last <= limit || limit == 0xffff_ffff
        };
        if inside {
            Ok(segment.base.wrapping_add(offset) & 0xffff_ffff)
        } else {
            Err(fault)
        }
    }

    /// Checks that execution may continue at offset `target` of CS.
    ///
    /// # Errors
    ///
    /// #GP where it is not canonical or outside the limit.
    pub(crate) fn check_branch(&self, target: u64) -> Result<(), Fault> {
        self.linear(CS, target, 1, Access::Execute).map(|_| ())
    }
}
