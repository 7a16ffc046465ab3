//! softmshv: the `/dev/mshv` ABI in user space.
//!
//! This library is preloaded under an unmodified client of the Microsoft Hypervisor's Linux driver. It answers
//! `open("/dev/mshv")` and what follows, over `/dev/kvm`, in the client's own process.
//!
//! ```text
//!   client           open, ioctl, mmap, close …
//!   ───────────────────────────────────────────────────────────────
//!   preload          is this /dev/mshv, or one of our descriptors?
//!   fds              descriptor → device, partition or VP
//!   device, partition, vp_file      the driver: ioctls, checks, errnos
//!   hvcall, property, intercepts    the hypervisor: hypercalls, state
//!   memory, interrupts, ioeventfd   … on top of KVM
//!   vp               a virtual processor: runs, reports intercepts
//!   lps              … on logical processors, where the hypervisor schedules
//!   ───────────────────────────────────────────────────────────────
//!   /dev/kvm
//! ```
//!
//! One exit, from top to bottom and back: `ioctl(vp, MSHV_RUN_VP)` → [`preload`] → [`device::ioctl`] →
//! [`vp_file`] → [`vp`] → `KVM_RUN` → an intercept message in the client's buffer and in the mapped pages.

#![cfg_attr(
    test,
    allow(
        dead_code,
        reason = "`preload`, where everything starts, stays out of tests: it would sit under them"
    )
)]

mod config;
mod cpu_list;
mod device;
mod errno;
mod eventfd;
mod fds;
mod features;
mod hvcall;
mod intercepts;
mod interrupts;
mod ioeventfd;
mod lps;
mod memory;
mod partition;
#[cfg(not(test))]
mod preload;
mod property;
mod trace;
mod user;
mod vp;
mod vp_file;
