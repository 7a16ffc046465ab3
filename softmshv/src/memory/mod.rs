//! Guest-physical memory: what the client mapped, and the KVM memory slots that make it so.
//!
//! Every region of the client is a memory slot. On KVM with hardware virtualization the guest-physical space
//! around them is covered by *background* slots over memory nobody may touch: an access there ends `KVM_RUN` with
//! `EFAULT` before the instruction ran. That is what an unmapped-GPA intercept is on the hypervisor, whereas a
//! plain KVM MMIO exit comes after KVM has emulated the instruction. Background slots are laid out lazily, when a VP is
//! about to run.

mod alias;
mod background;
mod dirty;
mod kick;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use mshv_bindings::mshv_user_mem_region;

use crate::errno::Errno;
use alias::ReadOnlyAlias;
use dirty::PageBits;

pub(crate) use dirty::AccessOp;
pub(crate) use kick::{Kick, signal as kick_signal};

const PAGE: u64 = 4096;

const WRITABLE: u8 = 1 << 0;
const EXECUTABLE: u8 = 1 << 1;
const UNMAP: u8 = 1 << 2;

/// User space ends here: what the kernel's `access_ok` accepts.
const USER_END: u64 = (1 << 47) - PAGE;

/// An access touched a guest-physical address no region covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Unmapped;

/// What lies at a guest-physical address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mapping {
    /// Nothing: an access is an unmapped-GPA intercept.
    Unmapped,
    /// A region of the client; an access its flags forbid is a GPA intercept.
    Mapped {
        /// The guest may write.
        writable: bool,
        /// The guest may fetch instructions.
        executable: bool,
    },
}

/// One region of the client, in bytes.
struct Region {
    gpa: u64,
    size: u64,
    host: u64,
    flags: u8,
    slot: u32,
    /// What the slot shows instead of `host`, so that a store is stopped before it happens.
    alias: Option<ReadOnlyAlias>,
    /// Pages written since their bit was cleared, while tracking is on.
    dirty: Option<PageBits>,
}

impl Region {
    fn end(&self) -> u64 {
        self.gpa + self.size
    }

    /// Where the slot's memory is, and its flags.
    fn backing(&self, tracking: bool) -> (u64, u32) {
        let log = if tracking { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        match &self.alias {
            Some(alias) => (alias.host(), log),
            None if self.flags & WRITABLE == 0 => (self.host, log | KVM_MEM_READONLY),
            None => (self.host, log),
        }
    }

    fn contains(&self, gpa: u64) -> bool {
        (self.gpa..self.end()).contains(&gpa)
    }
}

/// The regions, in order of address, and the slots that stand for everything else.
#[derive(Default)]
struct Layout {
    regions: Vec<Region>,
    background: Vec<background::Piece>,
    /// Slot numbers given back.
    free_slots: Vec<u32>,
    /// The next slot number never used.
    next_slot: u32,
    tracking: bool,
}

impl Layout {
    fn take_slot(&mut self) -> u32 {
        self.free_slots.pop().unwrap_or_else(|| {
            self.next_slot += 1;
            self.next_slot - 1
        })
    }

    fn at(&self, gpa: u64) -> Option<&Region> {
        let after = self.regions.partition_point(|region| region.gpa <= gpa);
        self.regions[..after]
            .last()
            .filter(|region| region.contains(gpa))
    }
}

/// The guest-physical address space of one partition.
pub(crate) struct Memory {
    vm: Arc<VmFd>,
    /// One past the last address background slots cover; none where there are no background slots.
    background_end: Option<u64>,
    /// Held shared by VPs that run, exclusively by changes.
    gate: RwLock<()>,
    /// Held by the one who changes memory, so that VPs on their way back in wait for it.
    turnstile: Mutex<()>,
    /// Somebody holds the turnstile.
    changing: AtomicBool,
    layout: RwLock<Layout>,
    /// Background slots have holes, or were never laid out.
    stale: AtomicBool,
    vps: Mutex<Vec<Arc<Kick>>>,
}

impl Memory {
    /// An empty address space. `physical_bits` is the width of a guest-physical address, `background` whether
    /// KVM can afford background slots.
    pub(crate) fn new(vm: Arc<VmFd>, physical_bits: u8, background: bool) -> Self {
        Self {
            vm,
            background_end: background.then(|| background::end(physical_bits)),
            gate: RwLock::default(),
            turnstile: Mutex::default(),
            changing: AtomicBool::new(false),
            layout: RwLock::new(Layout::default()),
            stale: AtomicBool::new(background),
            vps: Mutex::new(Vec::new()),
        }
    }

    /// Whether guest-physical space without memory is covered by background slots, so that touching it ends
    /// `KVM_RUN` with `EFAULT` before the instruction ran. If not, such accesses arrive as `KVM_EXIT_MMIO`.
    pub(crate) fn has_background(&self) -> bool {
        self.background_end.is_some()
    }

    fn set_slot(&self, slot: u32, flags: u32, gpa: u64, size: u64, host: u64) -> Result<(), Errno> {
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: gpa,
            memory_size: size,
            userspace_addr: host,
        };
        // SAFETY: the client vouches for its memory, as with the driver; background slots point at a
        // reservation that is never unmapped.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(Errno::from)
    }

    /// `MSHV_SET_GUEST_MEMORY`. The partition must be initialized for it to succeed.
    ///
    /// # Errors
    /// As the driver: `EINVAL` for a bad size, address or flag and for an unmap that does not match, `EEXIST`
    /// for overlap in the guest (older drivers refuse overlap in user space, too), `EIO` for an uninitialized
    /// partition.
    pub(crate) fn set(&self, args: &mshv_user_mem_region, initialized: bool) -> Result<(), Errno> {
        let (size, pfn, host, flags) = (args.size, args.guest_pfn, args.userspace_addr, args.flags);
        if size == 0
            || !size.is_multiple_of(PAGE)
            || !host.is_multiple_of(PAGE)
            || flags & !(WRITABLE | EXECUTABLE | UNMAP) != 0
            || args.rsvd != [0; 7]
        {
            return Err(Errno(libc::EINVAL));
        }
        if flags & UNMAP != 0 {
            return self.unmap(pfn, size, host);
        }
        if host.checked_add(size).is_none_or(|end| end > USER_END) || !is_mapped(host) {
            return Err(Errno(libc::EINVAL));
        }
        let gpa = pfn.checked_mul(PAGE).ok_or(Errno(libc::EINVAL))?;
        let end = gpa.checked_add(size).ok_or(Errno(libc::EINVAL))?;
        let overlaps = |r: &Region| gpa < r.end() && r.gpa < end;
        let layout = self.layout.read().unwrap_or_else(PoisonError::into_inner);
        if layout.regions.iter().any(overlaps) {
            return Err(Errno(libc::EEXIST));
        }
        drop(layout);
        if !initialized {
            return Err(Errno(libc::EIO));
        }
        self.map(gpa, size, host, flags)
    }

    fn map(&self, gpa: u64, size: u64, host: u64, flags: u8) -> Result<(), Errno> {
        let _stopped = self.stop_vps();
        let mut layout = self.layout.write().unwrap_or_else(PoisonError::into_inner);
        self.remove_background(&mut layout, gpa, gpa + size)?;
        let alias = if flags & WRITABLE == 0 && self.has_background() {
            ReadOnlyAlias::new(host, size)
        } else {
            None
        };
        let dirty = layout.tracking.then(|| PageBits::new(size / PAGE));
        let slot = layout.take_slot();
        let region = Region {
            gpa,
            size,
            host,
            flags,
            slot,
            alias,
            dirty,
        };
        let (backing, slot_flags) = region.backing(layout.tracking);
        if let Err(errno) = self.set_slot(slot, slot_flags, gpa, size, backing) {
            layout.free_slots.push(slot);
            return Err(errno);
        }
        let index = layout.regions.partition_point(|region| region.gpa < gpa);
        layout.regions.insert(index, region);
        Ok(())
    }

    fn unmap(&self, pfn: u64, size: u64, host: u64) -> Result<(), Errno> {
        let _stopped = self.stop_vps();
        let mut layout = self.layout.write().unwrap_or_else(PoisonError::into_inner);
        let gpa = pfn.checked_mul(PAGE).ok_or(Errno(libc::EINVAL))?;
        let index = layout
            .regions
            .iter()
            .position(|r| r.contains(gpa))
            .ok_or(Errno(libc::EINVAL))?;
        let region = &layout.regions[index];
        if region.gpa != gpa || region.size != size || region.host != host {
            return Err(Errno(libc::EINVAL));
        }
        self.set_slot(region.slot, 0, gpa, 0, host)?;
        let region = layout.regions.remove(index);
        layout.free_slots.push(region.slot);
        self.stale.store(self.has_background(), Ordering::Release);
        Ok(())
    }

    /// What lies at `gpa`.
    pub(crate) fn lookup(&self, gpa: u64) -> Mapping {
        let layout = self.layout.read().unwrap_or_else(PoisonError::into_inner);
        layout
            .at(gpa)
            .map_or(Mapping::Unmapped, |region| Mapping::Mapped {
                writable: region.flags & WRITABLE != 0,
                executable: region.flags & EXECUTABLE != 0,
            })
    }

    /// Calls `each` with the host address, length and offset in the whole of every piece of `len` bytes at `gpa`,
    /// after making sure that all of it is mapped.
    fn pieces(
        layout: &Layout,
        gpa: u64,
        len: usize,
        mut each: impl FnMut(u64, usize, usize),
    ) -> Result<(), Unmapped> {
        let piece = |done: usize| {
            let at = gpa.checked_add(done as u64).ok_or(Unmapped)?;
            let region = layout.at(at).ok_or(Unmapped)?;
            let count = usize::try_from(region.end() - at)
                .unwrap_or(usize::MAX)
                .min(len - done);
            Ok((region.host + (at - region.gpa), count))
        };
        let mut done = 0;
        while done < len {
            done += piece(done)?.1;
        }
        done = 0;
        while done < len {
            let (host, count) = piece(done)?;
            each(host, count, done);
            done += count;
        }
        Ok(())
    }

    /// Copies guest memory out; may cross regions, nothing is copied when a part is unmapped.
    pub(crate) fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), Unmapped> {
        let layout = self.layout.read().unwrap_or_else(PoisonError::into_inner);
        Self::pieces(&layout, gpa, buf.len(), |host, count, done| {
            // SAFETY: the client mapped `count` bytes at `host`, and the guest writes there at any time: a racy copy
            // of bytes is what it asked for. `buf` has room from `done` on.
            unsafe {
                std::ptr::copy_nonoverlapping(host as *const u8, buf[done..].as_mut_ptr(), count);
            };
        })
    }

    /// Copies into guest memory, whether the guest itself may write there or not.
    pub(crate) fn write(&self, gpa: u64, data: &[u8]) -> Result<(), Unmapped> {
        let layout = self.layout.read().unwrap_or_else(PoisonError::into_inner);
        Self::pieces(&layout, gpa, data.len(), |host, count, done| {
            // SAFETY: as in `read`.
            unsafe { std::ptr::copy_nonoverlapping(data[done..].as_ptr(), host as *mut u8, count) };
        })?;
        if layout.tracking {
            for region in &layout.regions {
                if let Some(dirty) = &region.dirty {
                    dirty.mark(region.gpa, gpa, data.len() as u64);
                }
            }
        }
        Ok(())
    }
}

/// Whether `address` lies in a mapping of this process.
fn is_mapped(address: u64) -> bool {
    let mut residency = 0u8;
    // SAFETY: `mincore` on one page writes one byte.
    unsafe {
        libc::mincore(
            address as *mut libc::c_void,
            PAGE as usize,
            &raw mut residency,
        ) == 0
    }
}

#[cfg(test)]
mod tests;
