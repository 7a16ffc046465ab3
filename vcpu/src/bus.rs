//! Where exits go: the guest's port and memory-mapped I/O space, as the run loop and the instruction emulator see it.
//!
//! The vcpu crate knows no devices. Whoever creates a VP gives it a [`Bus`], and every access that neither guest memory nor
//! the hypervisor answers ends in one of these four calls.

/// The I/O side of a virtual machine.
///
/// All VPs of a machine call into one bus at the same time. An access that no device claims is not an error: a read leaves
/// what the implementor decides (all ones, as real buses float), a write is dropped.
pub trait Bus: Send + Sync {
    /// Reads `data.len()` bytes (1 to 64, never across a page border) at guest physical address `gpa`.
    fn mmio_read(&self, gpa: u64, data: &mut [u8]);

    /// Writes `data` (1 to 64 bytes, never across a page border) at guest physical address `gpa`.
    fn mmio_write(&self, gpa: u64, data: &[u8]);

    /// Reads `data.len()` bytes (1, 2 or 4) from I/O port `port`.
    fn port_read(&self, port: u16, data: &mut [u8]);

    /// Writes `data` (1, 2 or 4 bytes) to I/O port `port`.
    fn port_write(&self, port: u16, data: &[u8]);
}
