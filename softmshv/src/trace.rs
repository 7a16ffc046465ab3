//! Counts of everything that passed: ioctls, hypercalls, intercepts, and what was asked for and is missing.
//!
//! Counting is one relaxed atomic addition. The counts are written as JSON when the process ends, and once a
//! second on the way out of an ioctl, so that a killed process leaves a recent file.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, Once, PoisonError};

use serde::Serialize;

use crate::config::config;

/// The ioctls of the ABI.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum Ioctl {
    CreatePartition,
    InitializePartition,
    CreateVp,
    SetGuestMemory,
    Irqfd,
    Ioeventfd,
    SetMsiRouting,
    GetGpapAccessBitmap,
    RootHvcall,
    RunVp,
    GetVpState,
    SetVpState,
}

const IOCTLS: [&str; 12] = [
    "MSHV_CREATE_PARTITION",
    "MSHV_INITIALIZE_PARTITION",
    "MSHV_CREATE_VP",
    "MSHV_SET_GUEST_MEMORY",
    "MSHV_IRQFD",
    "MSHV_IOEVENTFD",
    "MSHV_SET_MSI_ROUTING",
    "MSHV_GET_GPAP_ACCESS_BITMAP",
    "MSHV_ROOT_HVCALL",
    "MSHV_RUN_VP",
    "MSHV_GET_VP_STATE",
    "MSHV_SET_VP_STATE",
];

/// Hypercalls by code.
const HYPERCALLS: [(u16, &str); 18] = [
    (0x44, "HVCALL_GET_PARTITION_PROPERTY"),
    (0x45, "HVCALL_SET_PARTITION_PROPERTY"),
    (0x4d, "HVCALL_INSTALL_INTERCEPT"),
    (0x50, "HVCALL_GET_VP_REGISTERS"),
    (0x51, "HVCALL_SET_VP_REGISTERS"),
    (0x52, "HVCALL_TRANSLATE_VIRTUAL_ADDRESS"),
    (0x53, "HVCALL_READ_GPA"),
    (0x54, "HVCALL_WRITE_GPA"),
    (0x56, "HVCALL_CLEAR_VIRTUAL_INTERRUPT"),
    (0x91, "HVCALL_REGISTER_INTERCEPT_RESULT"),
    (0x94, "HVCALL_ASSERT_VIRTUAL_INTERRUPT"),
    (0xc0, "HVCALL_SIGNAL_EVENT_DIRECT"),
    (0xc1, "HVCALL_POST_MESSAGE_DIRECT"),
    (0xc9, "HVCALL_GET_GPA_PAGES_ACCESS_STATES"),
    (0xef, "HVCALL_IMPORT_ISOLATED_PAGES"),
    (0xf2, "HVCALL_ISSUE_SNP_PSP_GUEST_REQUEST"),
    (0xf4, "HVCALL_GET_VP_CPUID_VALUES"),
    (0x101, "HVCALL_GET_PARTITION_PROPERTY_EX"),
];

/// Intercepts by message type.
const INTERCEPTS: [(u32, &str); 13] = [
    (0x8000_0000, "UNMAPPED_GPA"),
    (0x8000_0001, "GPA_INTERCEPT"),
    (0x8000_0020, "INVALID_VP_REGISTER_VALUE"),
    (0x8000_0021, "UNRECOVERABLE_EXCEPTION"),
    (0x8000_0022, "UNSUPPORTED_FEATURE"),
    (0x8000_0062, "SYNIC_SINT_DELIVERABLE"),
    (0x8001_0000, "IO_PORT"),
    (0x8001_0001, "MSR"),
    (0x8001_0002, "CPUID"),
    (0x8001_0003, "EXCEPTION"),
    (0x8001_0004, "APIC_EOI"),
    (0x8001_0007, "HALT"),
    (0x8001_0008, "INTERRUPTION_DELIVERABLE"),
];

struct Counts {
    ioctls: [AtomicU64; IOCTLS.len()],
    hypercalls: [AtomicU64; HYPERCALLS.len()],
    intercepts: [AtomicU64; INTERCEPTS.len()],
    unimplemented: Mutex<BTreeMap<String, u64>>,
}

static COUNTS: Counts = Counts {
    ioctls: [const { AtomicU64::new(0) }; IOCTLS.len()],
    hypercalls: [const { AtomicU64::new(0) }; HYPERCALLS.len()],
    intercepts: [const { AtomicU64::new(0) }; INTERCEPTS.len()],
    unimplemented: Mutex::new(BTreeMap::new()),
};

/// Counting is on (`--trace`, and the device was opened).
static ON: AtomicBool = AtomicBool::new(false);

/// The second (of the coarse monotonic clock) the file was last written in.
static WRITTEN: AtomicU64 = AtomicU64::new(0);

/// Starts counting, if asked to; called when the device is opened, so that a process that never does (a shell in
/// between) leaves no file.
pub(crate) fn start() {
    static ONCE: Once = Once::new();
    if config().trace.is_none() {
        return;
    }
    ONCE.call_once(|| {
        WRITTEN.store(now(), Ordering::Relaxed);
        ON.store(true, Ordering::Relaxed);
        // SAFETY: the handler takes nothing and does not unwind.
        unsafe { libc::atexit(at_exit) };
        finish();
    });
}

extern "C" fn at_exit() {
    finish();
}

fn on() -> bool {
    ON.load(Ordering::Relaxed)
}

/// Counts one ioctl.
pub(crate) fn ioctl(which: Ioctl) {
    if on() {
        COUNTS.ioctls[which as usize].fetch_add(1, Ordering::Relaxed);
    }
}

/// The name of hypercall `code`.
pub(crate) fn hypercall_name(code: u16) -> String {
    HYPERCALLS
        .iter()
        .find(|(known, _)| *known == code)
        .map_or_else(
            || format!("hypercall {code:#x}"),
            |(_, name)| (*name).to_owned(),
        )
}

/// Counts one hypercall by its code.
pub(crate) fn hypercall(code: u16) {
    if on()
        && let Some(index) = HYPERCALLS.iter().position(|(known, _)| *known == code)
    {
        COUNTS.hypercalls[index].fetch_add(1, Ordering::Relaxed);
    }
}

/// Counts one intercept message by its type (`HVMSG_*`).
pub(crate) fn intercept(message_type: u32) {
    if on()
        && let Some(index) = INTERCEPTS
            .iter()
            .position(|(known, _)| *known == message_type)
    {
        COUNTS.intercepts[index].fetch_add(1, Ordering::Relaxed);
    }
}

/// Names something the client or guest asked for that is not implemented, e.g. `register 0x90010`.
pub(crate) fn unimplemented(name: &str) {
    if on() {
        let mut names = COUNTS
            .unimplemented
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *names.entry(name.to_owned()).or_default() += 1;
    }
}

/// Seconds of the coarse monotonic clock.
fn now() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes the structure it is given.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut time) };
    time.tv_sec as u64
}

/// Rewrites the file if a second has passed.
pub(crate) fn tick() {
    if !on() {
        return;
    }
    let (last, now) = (WRITTEN.load(Ordering::Relaxed), now());
    if now != last
        && WRITTEN
            .compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed)
            .is_ok()
    {
        finish();
    }
}

#[derive(Serialize)]
struct Report {
    ioctls: BTreeMap<&'static str, u64>,
    hypercalls: BTreeMap<&'static str, u64>,
    intercepts: BTreeMap<&'static str, u64>,
    unimplemented: BTreeMap<String, u64>,
}

/// Names with a count.
fn named<'a>(
    names: impl Iterator<Item = &'static str>,
    counts: impl Iterator<Item = &'a AtomicU64>,
) -> BTreeMap<&'static str, u64> {
    names
        .zip(counts.map(|count| count.load(Ordering::Relaxed)))
        .filter(|(_, count)| *count != 0)
        .collect()
}

fn report() -> Report {
    Report {
        ioctls: named(IOCTLS.into_iter(), COUNTS.ioctls.iter()),
        hypercalls: named(
            HYPERCALLS.into_iter().map(|(_, name)| name),
            COUNTS.hypercalls.iter(),
        ),
        intercepts: named(
            INTERCEPTS.into_iter().map(|(_, name)| name),
            COUNTS.intercepts.iter(),
        ),
        unimplemented: COUNTS
            .unimplemented
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone(),
    }
}

/// Replaces the file whole, so that a reader never sees half of it.
fn write(path: &Path, report: &Report) -> std::io::Result<()> {
    let mut staging = path.as_os_str().to_owned();
    staging.push(".new");
    std::fs::write(&staging, serde_json::to_vec(report)?)?;
    std::fs::rename(&staging, path)
}

/// Writes the counts now, if counting is on.
pub(crate) fn finish() {
    static COMPLAINED: Once = Once::new();
    if !on() {
        return;
    }
    if let Some(path) = &config().trace
        && let Err(error) = write(path, &report())
    {
        COMPLAINED.call_once(|| {
            eprintln!(
                "softmshv: cannot write the trace {}: {error}",
                path.display()
            );
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_ioctl_has_its_name() {
        assert_eq!(IOCTLS[Ioctl::SetVpState as usize], "MSHV_SET_VP_STATE");
        assert_eq!(IOCTLS[Ioctl::RootHvcall as usize], "MSHV_ROOT_HVCALL");
    }

    #[test]
    fn the_report_names_what_was_counted_and_nothing_else() {
        ON.store(true, Ordering::Relaxed);
        ioctl(Ioctl::RunVp);
        hypercall(0x51);
        intercept(0x8001_0000);
        unimplemented("register 0x1");
        ON.store(false, Ordering::Relaxed);
        ioctl(Ioctl::CreateVp);
        let value = serde_json::to_value(report()).unwrap();
        assert_eq!(value["ioctls"]["MSHV_RUN_VP"], 1);
        assert_eq!(value["ioctls"].get("MSHV_CREATE_VP"), None);
        assert_eq!(value["hypercalls"]["HVCALL_SET_VP_REGISTERS"], 1);
        assert_eq!(value["intercepts"]["IO_PORT"], 1);
        assert_eq!(value["unimplemented"]["register 0x1"], 1);
    }
}
