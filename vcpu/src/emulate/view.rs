//! Guest memory as the guest sees it: linear addresses of the current paging mode, backed by RAM or by devices.
//!
//! An access has two halves. [`GuestView::span`] translates and checks, and is the only half that can fault;
//! [`load`](GuestView::load), [`store`](GuestView::store) and [`update`](GuestView::update) then move the bytes and cannot fail.
//! An instruction that resolves all its spans first has no side effect when it faults.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::cpu::Cpu;
use super::error::Step;
use super::paging::Paging;
use super::ram;
use crate::bus::Bus;

const PAGE: u64 = 4096;

/// What a memory access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Data is read.
    Read,
    /// Data is written, or read and written.
    Write,
    /// An instruction is fetched.
    Execute,
}

/// A translation that the hypervisor made for the intercepted access, so that we need not walk for it again.
#[derive(Clone, Copy, Debug)]
pub struct Hint {
    /// A linear address of the access.
    pub gva: u64,
    /// The guest physical address it translates to.
    pub gpa: u64,
    /// The access was a write (so the page may be written and is marked dirty); otherwise it serves reads only.
    pub write: bool,
}

/// A resolved memory operand: one piece, or two where it crosses a page border.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    gpas: [u64; 2],
    /// Bytes in the first piece.
    first: usize,
    len: usize,
}

impl Span {
    /// The pieces as guest physical address and byte range of the operand.
    fn pieces(&self) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
        let both = [
            (self.gpas[0], 0..self.first),
            (self.gpas[1], self.first..self.len),
        ];
        both.into_iter()
            .take(if self.first == self.len { 1 } else { 2 })
    }
}

/// Page and frame number of a translation made earlier for the same instruction.
type Cached = Option<(u64, u64)>;

/// The guest's memory through the eyes of one VP at one instruction.
pub(crate) struct GuestView<'a, M: ?Sized> {
    memory: &'a M,
    bus: &'a dyn Bus,
    paging: Paging,
    linear_mask: u64,
    readable: Cached,
    writable: Cached,
}

impl<'a, M: GuestMemoryBackend + ?Sized> GuestView<'a, M> {
    /// Looks at `memory` and `bus` with the paging mode and privilege of `cpu`.
    pub(crate) fn new(cpu: &Cpu, memory: &'a M, bus: &'a dyn Bus) -> Self {
        let linear_mask = if cpu.code_bits() == 64 {
            u64::MAX
        } else {
            0xffff_ffff
        };
        Self {
            memory,
            bus,
            paging: Paging::new(cpu),
            linear_mask,
            readable: None,
            writable: None,
        }
    }

    /// Uses a translation that the hypervisor has already made.
    #[must_use]
    pub(crate) fn with_hint(mut self, hint: Option<Hint>) -> Self {
        if let Some(hint) = hint {
            let cached = Some((hint.gva / PAGE, hint.gpa / PAGE));
            self.readable = cached;
            self.writable = if hint.write { cached } else { None };
        }
        self
    }

    /// Guest memory by physical address.
    pub(crate) fn memory(&self) -> &'a M {
        self.memory
    }

    /// The bus behind everything that is not memory.
    pub(crate) fn bus(&self) -> &'a dyn Bus {
        self.bus
    }

    /// Translates one linear address.
    ///
    /// # Errors
    ///
    /// The guest's page fault, or page tables outside of guest memory.
    pub(crate) fn translate(&mut self, linear: u64, access: Access) -> Step<u64> {
        let page = linear / PAGE;
        let cached = match access {
            Access::Read => &mut self.readable,
            Access::Write => &mut self.writable,
            Access::Execute => return self.paging.translate(self.memory, linear, access),
        };
        if let Some((cached_page, frame)) = *cached
            && cached_page == page
        {
            return Ok(frame * PAGE + linear % PAGE);
        }
        let gpa = self.paging.translate(self.memory, linear, access)?;
        *cached = Some((page, gpa / PAGE));
        Ok(gpa)
    }

    /// Translates the `len` bytes (1 to 64) at `linear`.
    ///
    /// # Errors
    ///
    /// As for [`translate`](Self::translate), for either page.
    pub(crate) fn span(&mut self, linear: u64, len: usize, access: Access) -> Step<Span> {
        let gpa = self.translate(linear, access)?;
        let first = len.min((PAGE - linear % PAGE) as usize);
        let mut gpas = [gpa, gpa];
        if first < len {
            let second = linear.wrapping_add(first as u64) & self.linear_mask;
            gpas[1] = self.translate(second, access)?;
        }
        Ok(Span { gpas, first, len })
    }

    /// Reads `span` into the bytes of `data`, which is as long.
    pub(crate) fn load(&self, span: &Span, data: &mut [u8]) {
        for (gpa, range) in span.pieces() {
            let part = &mut data[range];
            if self.memory.read_slice(part, GuestAddress(gpa)).is_err() {
                self.bus.mmio_read(gpa, part);
            }
        }
    }

    /// Writes `data` to `span`, which is as long.
    pub(crate) fn store(&self, span: &Span, data: &[u8]) {
        for (gpa, range) in span.pieces() {
            let part = &data[range];
            if self.memory.write_slice(part, GuestAddress(gpa)).is_err() {
                self.bus.mmio_write(gpa, part);
            }
        }
    }

    /// Replaces the integer in `span` (at most 8 bytes) by what `change` makes of it and returns the old one.
    ///
    /// Atomic towards other processors where the operand is naturally aligned RAM. Devices see a read and a write, and so does
    /// RAM under an unaligned operand.
    pub(crate) fn update(&self, span: &Span, change: impl Fn(u64) -> u64) -> u64 {
        if span.first == span.len {
            let gpa = span.gpas[0];
            while let Some(old) = ram::load(self.memory, gpa, span.len) {
                if ram::compare_exchange(self.memory, gpa, span.len, old, change(old)) == Some(true)
                {
                    return old;
                }
            }
        }
        let mut bytes = [0; 8];
        self.load(span, &mut bytes[..span.len]);
        let old = u64::from_le_bytes(bytes);
        self.store(span, &change(old).to_le_bytes()[..span.len]);
        old
    }
}
