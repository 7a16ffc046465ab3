//! Disks on qcow2 images that `qemu-img` has made, and that it has to find in order afterwards.

mod disk;

use std::{
    fs,
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use devices::virtio::block::{
    backend::Access,
    image::{Backing, Cache, Format, ImageOptions, open},
};
use disk::*;

const SIZE: usize = 4 << 20;

/// Runs `qemu-img`; `None`, and a line, where there is none.
fn qemu_img(test: &str, folder: &Folder, command: &str) -> Option<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let output = Command::new("qemu-img")
            .args(command.split(' '))
            .current_dir(folder.path(""))
            .output();
        let Ok(output) = output else {
            eprintln!("SKIP {test}: there is no qemu-img (Debian: qemu-utils)");
            return None;
        };
        if output.status.success() {
            return Some(());
        }
        let error = String::from_utf8_lossy(&output.stderr);
        // A process that another test starts has the images of this one, with their locks, until it is another program.
        let locked = error.contains("Failed to lock");
        assert!(
            locked && Instant::now() < deadline,
            "qemu-img {command}: {error}"
        );
        thread::sleep(Duration::from_millis(10));
    }
}

fn qcow2(path: &Path) -> ImageOptions {
    ImageOptions {
        format: Some(Format::Qcow2),
        ..ImageOptions::new(path)
    }
}

fn with_backing(path: &Path) -> ImageOptions {
    ImageOptions {
        backing: Backing::Open,
        ..qcow2(path)
    }
}

fn refusal(options: &ImageOptions) -> String {
    let Err(error) = open(options) else {
        panic!("{} was opened", options.path.display())
    };
    let text = error.to_string();
    assert_eq!(text.lines().count(), 1);
    text
}

/// Reads all of the disk.
fn contents(disk: &mut Disk) -> Vec<u8> {
    (0..SIZE >> 20)
        .flat_map(|part| disk.read((part << 11) as u64, 1 << 20))
        .collect()
}

/// Does the same to a disk and to a model of it.
fn exercise(disk: &mut Disk, model: &mut [u8]) {
    for (sector, length) in [
        (0, 512),
        (1, 512),
        (7, 100 << 10),
        (3000, 1 << 20),
        (SIZE / 512 - 1, 512),
    ] {
        let bytes = pattern(length, sector as u64);
        disk.write(sector as u64, &bytes);
        model[512 * sector..][..length].copy_from_slice(&bytes);
    }
    assert_eq!(disk.clear(DISCARD, &[(3072, 512, 0)]), OK);
    assert_eq!(disk.clear(WRITE_ZEROES, &[(5, 3, 0), (4000, 1000, 1)]), OK);
    for (sector, sectors) in [(3072, 512), (5, 3), (4000, 1000)] {
        model[512 * sector..][..512 * sectors].fill(0);
    }
    disk.flush();
}

#[test]
fn an_image_reads_and_writes_like_a_raw_one() {
    const TEST: &str = "an_image_reads_and_writes_like_a_raw_one";
    for kind in [
        "-o cluster_size=65536",
        "-o cluster_size=4096",
        "-o compat=v2",
        "-o refcount_bits=1",
        "-c",
    ] {
        for cache in [Cache::Buffered, Cache::Direct] {
            let folder = Folder::new();
            let mut model = pattern(SIZE, 1);
            model[1 << 20..2 << 20].fill(0);
            folder.file("raw", &model);
            let convert = format!("convert -f raw -O qcow2 {kind} raw image");
            if qemu_img(TEST, &folder, &convert).is_none() {
                return;
            }
            let mut disk = Disk::open(&ImageOptions {
                cache,
                ..ImageOptions::new(&folder.path("image"))
            });
            assert_eq!(disk.guest.config(0, 8), (SIZE as u64 / 512).to_le_bytes());
            assert!(contents(&mut disk) == model, "{kind}");
            if kind == "-o compat=v2" {
                // These know no zero clusters: a discard is not offered.
                disk.write(100, &[1; 512]);
                model[51200..51712].fill(1);
            } else {
                exercise(&mut disk, &mut model);
            }
            assert!(contents(&mut disk) == model, "{kind}, {cache:?}");
            drop(disk);
            qemu_img(TEST, &folder, "check -q -f qcow2 image").unwrap();
            qemu_img(TEST, &folder, "convert -f qcow2 -O raw image back").unwrap();
            assert!(fs::read(folder.path("back")).unwrap() == model, "{kind}");
        }
    }
}

#[test]
fn images_build_on_others_only_if_that_is_wanted() {
    const TEST: &str = "images_build_on_others_only_if_that_is_wanted";
    let folder = Folder::new();
    let mut model = pattern(SIZE, 2);
    folder.file("base", &model);
    let chain = [
        "create -q -f qcow2 -F raw -b base middle",
        "create -q -f qcow2 -F qcow2 -b middle top",
    ];
    for command in chain {
        if qemu_img(TEST, &folder, command).is_none() {
            return;
        }
    }
    let top = folder.path("top");
    let text = refusal(&qcow2(&top));
    assert!(text.contains("builds on another file"), "{text}");
    // Nor is it opened because it looks like one.
    assert_eq!(refusal(&ImageOptions::new(&top)), text);
    let mut disk = Disk::open(&with_backing(&top));
    assert!(contents(&mut disk) == model);
    exercise(&mut disk, &mut model);
    assert!(contents(&mut disk) == model);
    assert!(refusal(&ImageOptions::new(&folder.path("base"))).contains("in use"));
    assert!(refusal(&with_backing(&folder.path("middle"))).contains("in use"));
    drop(disk);
    assert!(fs::read(folder.path("base")).unwrap() == pattern(SIZE, 2));
    qemu_img(TEST, &folder, "check -q -f qcow2 top").unwrap();
    qemu_img(TEST, &folder, "convert -f qcow2 -O raw top back").unwrap();
    assert!(fs::read(folder.path("back")).unwrap() == model);
}

#[test]
fn chains_of_images_that_cannot_be_followed_are_refused() {
    const TEST: &str = "chains_of_images_that_cannot_be_followed_are_refused";
    let folder = Folder::new();
    folder.file("base", &pattern(SIZE, 2));
    for command in [
        "create -q -f qcow2 -u -F qcow2 -b loop pool 8M",
        "create -q -f qcow2 -u -F vmdk -b base other 8M",
        "create -q -f qcow2 -u -F raw -b missing lost 8M",
    ] {
        if qemu_img(TEST, &folder, command).is_none() {
            return;
        }
    }
    let read_only = |name: &str| ImageOptions {
        access: Access::ReadOnly,
        ..with_backing(&folder.path(name))
    };
    fs::rename(folder.path("pool"), folder.path("loop")).unwrap();
    let text = refusal(&read_only("loop"));
    assert!(text.contains("or on itself"), "{text}");
    // It is locked for itself already.
    assert!(refusal(&with_backing(&folder.path("loop"))).contains("in use"));
    assert!(refusal(&read_only("other")).contains("\"vmdk\""));
    assert!(refusal(&read_only("lost")).contains("missing"));
}

#[test]
fn images_that_cannot_be_used_safely_are_refused() {
    const TEST: &str = "images_that_cannot_be_used_safely_are_refused";
    let folder = Folder::new();
    for (command, expected) in [
        (
            "create -q -f qcow2 -o data_file=data split 8M",
            "in another file",
        ),
        (
            "create -q -f qcow2 -o extended_l2=on subclusters 8M",
            "subclusters",
        ),
        (
            "create -q -f qcow2 -o compression_type=zstd zstd 8M",
            "other than zlib",
        ),
    ] {
        if qemu_img(TEST, &folder, command).is_none() {
            return;
        }
        let name = command.split(' ').rev().nth(1).unwrap();
        let text = refusal(&ImageOptions::new(&folder.path(name)));
        assert!(text.contains(expected), "{text}");
    }
    qemu_img(TEST, &folder, "create -q -f qcow2 image 8M").unwrap();
    let path = folder.path("image");
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    for (at, byte, expected) in [
        (79, 1, "not closed properly"),
        (79, 2, "corrupt"),
        (79, 32, "bit 5"),
        (35, 2, "is encrypted"),
    ] {
        file.write_all_at(&[byte], at).unwrap();
        assert!(refusal(&ImageOptions::new(&path)).contains(expected));
        file.write_all_at(&[0], at).unwrap();
    }
    qemu_img(TEST, &folder, "snapshot -c one image").unwrap();
    assert!(refusal(&ImageOptions::new(&path)).contains("snapshots"));
    open(&ImageOptions {
        access: Access::ReadOnly,
        ..ImageOptions::new(&path)
    })
    .unwrap();
}

#[test]
fn what_a_guest_writes_to_a_raw_disk_opens_no_file_of_the_host() {
    const TEST: &str = "what_a_guest_writes_to_a_raw_disk_opens_no_file_of_the_host";
    let folder = Folder::new();
    folder.file("secret", &pattern(SIZE, 3));
    let evil = "create -q -f qcow2 -F raw -b secret evil";
    if qemu_img(TEST, &folder, evil).is_none() {
        return;
    }
    let evil = fs::read(folder.path("evil")).unwrap();
    let raw = folder.file("raw", &vec![0; SIZE]);
    let mut disk = Disk::open(&ImageOptions::new(&raw));
    let whole = evil.len().next_multiple_of(512);
    let mut bytes = evil;
    bytes.resize(whole, 0);
    disk.write(0, &bytes);
    drop(disk);
    // At the next start.
    assert!(refusal(&ImageOptions::new(&raw)).contains("builds on another file"));
    let mut disk = Disk::open(&ImageOptions {
        format: Some(Format::Raw),
        ..ImageOptions::new(&raw)
    });
    assert!(disk.read(0, whole) == bytes);
}

#[test]
fn an_image_grows_under_its_disk() {
    const TEST: &str = "an_image_grows_under_its_disk";
    let folder = Folder::new();
    if qemu_img(TEST, &folder, "create -q -f qcow2 image 2M").is_none() {
        return;
    }
    let mut disk = Disk::open(&ImageOptions::new(&folder.path("image")));
    let resizer = disk.guest.device.resizer();
    assert_eq!(resizer.resize(SIZE as u64).unwrap(), SIZE as u64);
    assert_eq!(disk.guest.interrupts().config_count(), 1);
    disk.write(SIZE as u64 / 512 - 1, &[5; 512]);
    disk.flush();
    drop(disk);
    qemu_img(TEST, &folder, "check -q -f qcow2 image").unwrap();
    qemu_img(TEST, &folder, "convert -f qcow2 -O raw image back").unwrap();
    let back = fs::read(folder.path("back")).unwrap();
    assert_eq!((back.len(), back[SIZE - 1]), (SIZE, 5));
}

#[test]
fn what_was_discarded_makes_room_for_other_data() {
    const TEST: &str = "what_was_discarded_makes_room_for_other_data";
    let folder = Folder::new();
    if qemu_img(TEST, &folder, "create -q -f qcow2 image 64M").is_none() {
        return;
    }
    let path = folder.path("image");
    let blocks = || fs::metadata(&path).unwrap().blocks();
    let mut disk = Disk::open(&ImageOptions::new(&path));
    let fill = |disk: &mut Disk, mebibyte: u64| {
        disk.write(mebibyte << 11, &pattern(1 << 20, mebibyte));
        disk.flush();
    };
    fill(&mut disk, 0);
    let before = blocks();
    for mebibyte in 1..8 {
        assert_eq!(disk.clear(DISCARD, &[((mebibyte - 1) << 11, 2048, 0)]), OK);
        disk.flush();
        fill(&mut disk, mebibyte);
    }
    assert!(disk.read(0, 1 << 20) == vec![0; 1 << 20]);
    assert!(disk.read(7 << 11, 1 << 20) == pattern(1 << 20, 7));
    let after = blocks();
    assert!(after < before + 2048, "{before} blocks, then {after}");
}
