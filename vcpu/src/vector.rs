//! Vector registers for the emulator: fetched by hypercall, because the register page holds six of them only.

use std::io;

use mshv_bindings::{hv_register_name_HV_X64_REGISTER_XMM0 as XMM0, hv_register_value, hv_u128};

use crate::{
    Vp,
    emulate::VectorRegisters,
    vp::{Register, VpError},
};

/// The XMM registers of a stopped VP. The upper halves of YMM registers are not reachable as registers.
pub(crate) struct Vectors<'a>(pub(crate) &'a Vp);

impl VectorRegisters for Vectors<'_> {
    fn read(&mut self, index: usize, value: &mut [u8]) -> io::Result<()> {
        let value: &mut [u8; 16] = value.try_into().map_err(|_| too_wide())?;
        let mut register = [Register {
            name: name(index),
            ..Default::default()
        }];
        self.0.get_registers(&mut register).map_err(hypercall)?;
        // SAFETY: all variants of the union are plain integers.
        let bits = unsafe { register[0].value.reg128 };
        value[..8].copy_from_slice(&{ bits.low_part }.to_le_bytes());
        value[8..].copy_from_slice(&{ bits.high_part }.to_le_bytes());
        Ok(())
    }

    fn write(&mut self, index: usize, value: &[u8]) -> io::Result<()> {
        let value: &[u8; 16] = value.try_into().map_err(|_| too_wide())?;
        let bits = u128::from_le_bytes(*value);
        // The two halves of it.
        #[expect(clippy::cast_possible_truncation)]
        let reg128 = hv_u128 {
            low_part: bits as u64,
            high_part: (bits >> 64) as u64,
        };
        let value = hv_register_value { reg128 };
        let register = Register {
            name: name(index),
            value,
            ..Default::default()
        };
        self.0.set_registers(&[register]).map_err(hypercall)
    }
}

fn name(index: usize) -> u32 {
    XMM0 + index as u32
}

fn too_wide() -> io::Error {
    io::Error::new(
        io::ErrorKind::Unsupported,
        "only 16-byte vector registers can be reached",
    )
}

fn hypercall(error: VpError) -> io::Error {
    io::Error::other(error)
}
