//! What a VP has done so far: exits by kind, ioctls by name, instructions emulated, odd registers and ports touched.
//!
//! The VP thread alone writes; any thread may read. Relaxed stores of a value the writer already holds cost no more than
//! plain ones, so counting is free on the path of an exit.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::intercept::Intercept;

/// One number with one writer.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds one. Only the owning thread may call it.
    pub fn bump(&self) {
        self.0.store(self.0.load(Relaxed).wrapping_add(1), Relaxed);
    }

    /// The value now.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

macro_rules! exit_kinds {
    ($($(#[$doc:meta])* $kind:ident = $name:literal,)*) => {
        /// The kinds of exit that are told apart in counts and in the history of a VP.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum ExitKind { $($(#[$doc])* $kind,)* }

        impl ExitKind {
            /// All kinds, in the order of their values.
            pub const ALL: [Self; [$($name),*].len()] = [$(Self::$kind),*];

            /// The names of all kinds, likewise.
            pub const NAMES: &'static [&'static str] = &[$($name),*];

            /// The name used in reports.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$kind => $name,)* }
            }
        }
    };
}

exit_kinds! {
    /// `in` or `ins`.
    PortRead = "port_read",
    /// `out` or `outs`.
    PortWrite = "port_write",
    /// A read of unmapped memory.
    MmioRead = "mmio_read",
    /// A write to unmapped memory.
    MmioWrite = "mmio_write",
    /// `rdmsr`.
    MsrRead = "msr_read",
    /// `wrmsr`.
    MsrWrite = "msr_write",
    /// `cpuid`.
    Cpuid = "cpuid",
    /// An intercepted exception.
    Exception = "exception",
    /// End of a level-triggered interrupt.
    Eoi = "apic_eoi",
    /// A halt nothing can end.
    Halt = "halt",
    /// A triple fault.
    Unrecoverable = "unrecoverable_exception",
    /// A notification.
    Notification = "notification",
    /// Everything else.
    Other = "other",
    /// A signal ended `RUN_VP` before the guest did anything to be told of.
    Interrupted = "interrupted",
}

impl ExitKind {
    /// The kind of `intercept`.
    #[must_use]
    pub fn of(intercept: Intercept<'_>) -> Self {
        match intercept {
            Intercept::Port(access) if access.is_write() => Self::PortWrite,
            Intercept::Port(_) => Self::PortRead,
            Intercept::Memory(access) if access.is_write() => Self::MmioWrite,
            Intercept::Memory(_) => Self::MmioRead,
            Intercept::Msr(access) if access.is_write() => Self::MsrWrite,
            Intercept::Msr(_) => Self::MsrRead,
            Intercept::Cpuid(_) => Self::Cpuid,
            Intercept::Exception(_) => Self::Exception,
            Intercept::Eoi { .. } => Self::Eoi,
            Intercept::Halt(_) => Self::Halt,
            Intercept::Unrecoverable(_) => Self::Unrecoverable,
            Intercept::Notification => Self::Notification,
            Intercept::InvalidRegister | Intercept::UnsupportedFeature | Intercept::Unknown(_) => {
                Self::Other
            }
        }
    }
}

/// The counters of one VP.
#[derive(Debug, Default)]
pub struct Counters {
    exits: [Counter; ExitKind::ALL.len()],
    /// `MSHV_RUN_VP`.
    pub run_vp: Counter,
    /// `MSHV_ROOT_HVCALL` with `HVCALL_GET_VP_REGISTERS`.
    pub get_vp_registers: Counter,
    /// `MSHV_ROOT_HVCALL` with `HVCALL_SET_VP_REGISTERS`.
    pub set_vp_registers: Counter,
    /// Instructions the emulator has run in the guest's stead.
    pub emulated: Counter,
    /// Accesses to MSRs nobody implements.
    pub unknown_msrs: Counter,
}

impl Counters {
    /// The counter of one kind of exit.
    #[must_use]
    pub fn exits(&self, kind: ExitKind) -> &Counter {
        &self.exits[kind as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_index_their_own_counter() {
        let counters = Counters::default();
        counters.exits(ExitKind::Interrupted).bump();
        counters.exits(ExitKind::PortRead).bump();
        counters.exits(ExitKind::PortRead).bump();
        let seen: Vec<_> = ExitKind::ALL
            .iter()
            .filter(|kind| counters.exits(**kind).get() > 0)
            .map(|kind| (kind.name(), counters.exits(*kind).get()))
            .collect();
        assert_eq!(seen, [("port_read", 2), ("interrupted", 1)]);
    }
}
