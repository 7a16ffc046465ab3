//! A second, read-only view of shared memory of the client.
//!
//! A store of the guest to a read-only memory slot is emulated by KVM before it tells anybody. A slot over memory that
//! is read-only in this process ends `KVM_RUN` with `EFAULT` instead, before the instruction, as a hole does.

/// The view; it goes when dropped.
pub(super) struct ReadOnlyAlias {
    address: *mut libc::c_void,
    len: usize,
}

// SAFETY: an address range nobody in this process accesses.
unsafe impl Send for ReadOnlyAlias {}
// SAFETY: the same.
unsafe impl Sync for ReadOnlyAlias {}

impl ReadOnlyAlias {
    /// A view of `len` bytes at `host`; none if they are not one shared mapping.
    pub(super) fn new(host: u64, len: u64) -> Option<Self> {
        let len = usize::try_from(len).ok()?;
        // SAFETY: with an old size of zero `mremap` leaves the mapping as it is and makes another of its pages, at an
        // address of the kernel's choice. It refuses private mappings.
        let address =
            unsafe { libc::mremap(host as *mut libc::c_void, 0, len, libc::MREMAP_MAYMOVE) };
        if address == libc::MAP_FAILED {
            return None;
        }
        let alias = Self { address, len };
        // SAFETY: the mapping just made.
        let protected = unsafe { libc::mprotect(address, len, libc::PROT_READ) } == 0;
        protected.then_some(alias)
    }

    /// Where the view is.
    pub(super) fn host(&self) -> u64 {
        self.address as u64
    }
}

impl Drop for ReadOnlyAlias {
    fn drop(&mut self) {
        // SAFETY: made by `new`; the slot over it is gone.
        unsafe { libc::munmap(self.address, self.len) };
    }
}
