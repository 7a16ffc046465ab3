//! Whether a VP is asleep in KVM: from KVM's own statistics, which can be read while the VP is in the guest.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl;

/// `KVM_GET_STATS_FD`: `_IO(KVMIO, 0xce)`.
const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;
/// The statistic: 1 while the VP waits for something to happen.
const NAME: &[u8] = b"blocking";
/// Bytes of a description before the name.
const DESCRIPTION: usize = 16;

/// The statistics of one virtual CPU.
pub(crate) struct HaltStat {
    file: File,
    offset: u64,
}

impl HaltStat {
    /// Finds the statistic; `None` where KVM has none (before Linux 5.17).
    pub(super) fn of(vcpu: &VcpuFd) -> Option<Self> {
        // SAFETY: an ioctl without argument.
        let fd = unsafe { ioctl(&vcpu.as_raw_fd(), KVM_GET_STATS_FD) };
        if fd < 0 {
            return None;
        }
        // SAFETY: a descriptor just made, that nobody else owns.
        let file = unsafe { File::from_raw_fd(fd) };
        // Flags, length of a name, how many, and where are: id, descriptions, data.
        let mut header = [0; 24];
        file.read_exact_at(&mut header, 0).ok()?;
        let word = |at: usize| {
            let bytes = [header[at], header[at + 1], header[at + 2], header[at + 3]];
            u32::from_le_bytes(bytes)
        };
        let (name, count) = (word(4) as usize, word(8) as usize);
        let (descriptions, data) = (u64::from(word(16)), u64::from(word(20)));
        let size = DESCRIPTION + name;
        let mut all = vec![0; size.checked_mul(count)?];
        file.read_exact_at(&mut all, descriptions).ok()?;
        let found = all.chunks_exact(size).find(|description| {
            description[DESCRIPTION..].split(|byte| *byte == 0).next() == Some(NAME)
        })?;
        let offset = u32::from_le_bytes([found[8], found[9], found[10], found[11]]);
        Some(Self {
            file,
            offset: data + u64::from(offset),
        })
    }

    /// Whether the VP is halted, or waits for a startup IPI, at this moment.
    pub(crate) fn is_halted(&self) -> bool {
        let mut value = [0; 8];
        self.file.read_exact_at(&mut value, self.offset).is_ok() && value != [0; 8]
    }
}
