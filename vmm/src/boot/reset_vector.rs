//! What stands at the reset vector below 1 MiB: code that resets the machine.
//!
//! A kernel that knows no better way to reboot goes back to real mode and jumps to F000:FFF0, where firmware would be. On a
//! hardware-reduced platform Linux even tries this before the registers of ACPI, because it expects EFI there.

use devices::power::{RESET, RESET_VALUE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::layout::{ACPI_POWER_PORT, RESET_VECTOR};

/// `mov dx, PORT; mov al, VALUE; out dx, al; hlt; jmp` back to the `hlt`.
const CODE: [u8; 9] = {
    let [low, high, ..] = (ACPI_POWER_PORT + RESET).to_le_bytes();
    [0xba, low, high, 0xb0, RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd]
};

/// Puts it there.
///
/// # Errors
/// When there is no memory.
pub(super) fn write(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    memory.write_slice(&CODE, GuestAddress(RESET_VECTOR))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_is_within_the_last_16_bytes_below_1_mib() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        write(&memory).unwrap();
        let mut read = [0; 16];
        memory
            .read_slice(&mut read, GuestAddress(0xf_fff0))
            .unwrap();
        assert_eq!(read[..CODE.len()], CODE);
        assert_eq!(read[..3], [0xba, 0x02, 0x06], "the reset register of ACPI");
    }
}
