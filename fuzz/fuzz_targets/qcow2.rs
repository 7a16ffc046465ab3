//! A disk image that claims to be qcow2, opened and read.

#![no_main]

use std::{fs, path::PathBuf, sync::LazyLock};

use devices::virtio::{
    block::{
        Block, BlockConfig,
        backend::Unmap,
        image::{Format, ImageOptions, open},
    },
    rate_limiter::RateLimiter,
};
use libfuzzer_sys::fuzz_target;

static PATH: LazyLock<PathBuf> =
    LazyLock::new(|| PathBuf::from(format!("/dev/shm/rota-fuzz-{}.qcow2", std::process::id())));

/// Where the program for the driver begins in the input, and the image ends.
const PROGRAM: usize = 64;

/// How a version 3 image begins; others are refused at once.
const MAGIC: &[u8] = b"QFI\xfb\0\0\0\x03";

fuzz_target!(|input: &[u8]| {
    let (program, rest) = input.split_at(input.len().min(PROGRAM));
    let image = [MAGIC, rest].concat();
    fs::write(&*PATH, image).expect("a file");
    let options = ImageOptions {
        format: Some(Format::Qcow2),
        ..ImageOptions::new(&PATH)
    };
    let Ok(image) = open(&options) else {
        return;
    };
    let config = BlockConfig {
        name: "blk0".to_owned(),
        queues: 1,
        queue_size: 64,
        serial: String::new(),
        unmap: Unmap::Allowed,
        limits: RateLimiter::default(),
    };
    if let Ok(device) = Block::new(image, config) {
        driver::drive(device, program);
    }
});
