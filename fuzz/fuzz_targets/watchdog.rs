//! The watchdog under a hostile driver.

#![no_main]

use driver::{drive, specimen};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|program: &[u8]| drive(specimen::watchdog(), program));
