//! A disk under random requests, beside a model of it: whatever the driver does within the rules, the data is what it
//! would be in memory, in every kind of image.

mod disk;

use std::{fs, sync::Arc};

use devices::virtio::block::{
    backend::Image,
    image::{Cache, Engine, ImageOptions, open},
};
use disk::*;
use proptest::{collection::vec, prelude::*};

const SECTORS: u64 = 2048;

#[derive(Clone, Debug)]
enum Step {
    Read(u64, u64),
    Write(u64, u64, u64),
    Zero(u64, u32, u32),
    Flush,
}

fn step() -> impl Strategy<Value = Step> {
    let place = 0..SECTORS;
    prop_oneof![
        (place.clone(), 1..200u64).prop_map(|(sector, count)| Step::Read(sector, count)),
        (place.clone(), 1..200u64, any::<u64>())
            .prop_map(|(sector, count, seed)| Step::Write(sector, count, seed)),
        (place, 0..300u32, 0..2u32)
            .prop_map(|(sector, count, unmap)| Step::Zero(sector, count, unmap)),
        Just(Step::Flush),
    ]
}

fn follow(image: Arc<dyn Image>, mut model: Vec<u8>, steps: &[Step]) -> Result<(), TestCaseError> {
    let block = u64::from(image.geometry().block_size) / 512;
    let mut disk = Disk::new(image);
    let range = |sector: u64, count: u64| {
        let sector = sector / block * block;
        let count = count.next_multiple_of(block).min(SECTORS - sector);
        let start = 512 * sector as usize;
        (sector, start..start + 512 * count as usize)
    };
    for step in steps {
        match step {
            Step::Read(sector, count) => {
                let (sector, range) = range(*sector, *count);
                prop_assert!(disk.read(sector, range.len()) == model[range]);
            }
            Step::Write(sector, count, seed) => {
                let (sector, range) = range(*sector, *count);
                let bytes = pattern(range.len(), *seed);
                disk.write(sector, &bytes);
                model[range].copy_from_slice(&bytes);
            }
            Step::Zero(sector, count, unmap) => {
                let (sector, range) = range(*sector, u64::from(*count));
                let sectors = (range.len() / 512) as u32;
                prop_assert_eq!(disk.clear(WRITE_ZEROES, &[(sector, sectors, *unmap)]), OK);
                model[range].fill(0);
            }
            Step::Flush => disk.flush(),
        }
    }
    prop_assert!(disk.read(0, model.len()) == model);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn an_image_in_memory(most in 0..5000usize, steps in vec(step(), 1..40)) {
        let image = MemoryImage::new(512 * SECTORS as usize);
        image.state().most = most;
        let model = image.state().bytes.clone();
        follow(Arc::new(Shared(image)), model, &steps)?;
    }

    #[test]
    fn a_file(direct in any::<bool>(), threads in any::<bool>(), steps in vec(step(), 1..40)) {
        let folder = Folder::new();
        let model = pattern(512 * SECTORS as usize, 4);
        let path = folder.file("image", &model);
        let options = ImageOptions {
            cache: if direct { Cache::Direct } else { Cache::Buffered },
            engine: if threads { Engine::Threads } else { Engine::Best },
            ..ImageOptions::new(&path)
        };
        follow(open(&options).unwrap(), model, &steps)?;
    }

    #[test]
    fn a_qcow2_image(steps in vec(step(), 1..40)) {
        let folder = Folder::new();
        let path = folder.path("image");
        let made = std::process::Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-o", "cluster_size=4096"])
            .arg(&path)
            .arg((512 * SECTORS).to_string())
            .status();
        if made.is_err() {
            eprintln!("SKIP a_qcow2_image: there is no qemu-img (Debian: qemu-utils)");
            return Ok(());
        }
        let model = vec![0; 512 * SECTORS as usize];
        follow(open(&ImageOptions::new(&path)).unwrap(), model, &steps)?;
        prop_assert!(fs::metadata(&path).is_ok());
    }
}
