//! A network card under a hostile driver, with frames coming in.

#![no_main]

use driver::{drive, specimen};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|program: &[u8]| {
    let (card, _peer) = specimen::net();
    drive(card, program);
});
