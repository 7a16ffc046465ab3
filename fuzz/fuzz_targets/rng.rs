//! The entropy device under a hostile driver.

#![no_main]

use devices::virtio::rng::Rng;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|program: &[u8]| {
    let device = Rng::open("/dev/zero".as_ref()).expect("/dev/zero");
    driver::drive(device, program);
});
