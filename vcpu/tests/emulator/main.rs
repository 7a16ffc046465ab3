//! Tests of the instruction emulator: against the real CPU, and against the manual where no program can go.

mod fuzz;
mod guest;
mod modes;
mod paging;
mod strings;

#[cfg(all(target_arch = "x86_64", target_os = "linux", not(miri)))]
mod case;
#[cfg(all(target_arch = "x86_64", target_os = "linux", not(miri)))]
mod draft;
#[cfg(all(target_arch = "x86_64", target_os = "linux", not(miri)))]
mod encoding;
#[cfg(all(target_arch = "x86_64", target_os = "linux", not(miri)))]
mod native;
#[cfg(all(target_arch = "x86_64", target_os = "linux", not(miri)))]
mod real_cpu;
