//! Disks on files and block devices of the host, both by io_uring and by threads.

mod disk;

use std::{
    fs::{self, OpenOptions},
    io::{BufRead, BufReader},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use devices::virtio::{
    VirtioDevice,
    block::{
        BlockConfig,
        backend::Access,
        image::{Backing, Cache, Engine, Format, ImageError, ImageOptions, open},
    },
};
use disk::*;

const SIZE: usize = 4 << 20;
const ENGINES: [Engine; 2] = [Engine::Best, Engine::Threads];

fn options(path: &Path, engine: Engine, cache: Cache) -> ImageOptions {
    ImageOptions {
        engine,
        cache,
        ..ImageOptions::new(path)
    }
}

/// Writes, reads, discards and zeroes, and compares with the file.
fn exercise(disk: &mut Disk, path: &Path) {
    let mut model = fs::read(path).unwrap();
    assert!(disk.read(0, 1 << 20) == model[..1 << 20]);
    for (block, length) in [(0, 4096), (3, 40960), (100, 1 << 20), (1000, 8192)] {
        let bytes = pattern(length, block as u64);
        disk.write(8 * block as u64, &bytes);
        model[4096 * block..][..length].copy_from_slice(&bytes);
    }
    assert_eq!(disk.clear(DISCARD, &[(8, 16, 0), (4096, 256, 0)]), OK);
    assert_eq!(disk.clear(WRITE_ZEROES, &[(160, 8, 0), (2048, 512, 1)]), OK);
    for (sector, sectors) in [(8, 16), (4096, 256), (160, 8), (2048, 512)] {
        model[512 * sector..][..512 * sectors].fill(0);
    }
    disk.flush();
    assert!(fs::read(path).unwrap() == model, "in the file");
    assert!(disk.read(0, 2 << 20) == model[..2 << 20], "on the disk");
    assert!(disk.read(4096, 2 << 20) == model[2 << 20..], "on the disk");
}

#[test]
fn a_file_is_a_disk_with_every_engine_and_cache() {
    for engine in ENGINES {
        for cache in [Cache::Buffered, Cache::Direct] {
            let folder = Folder::new();
            let path = folder.file("image", &pattern(SIZE, 1));
            let mut disk = Disk::open(&options(&path, engine, cache));
            assert_eq!(disk.guest.config(0, 8), (SIZE as u64 / 512).to_le_bytes());
            exercise(&mut disk, &path);
        }
    }
}

/// Whether this process has a thread of this name.
fn has_thread(name: &str) -> bool {
    fs::read_dir("/proc/self/task").unwrap().any(|task| {
        let comm = task.unwrap().path().join("comm");
        fs::read_to_string(comm).is_ok_and(|comm| comm.trim() == name)
    })
}

/// Waits for a thread of this name: a thread that was started names itself when it first runs.
fn gets_thread(name: &str) -> bool {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !has_thread(name) {
        if Instant::now() > deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(1));
    }
    true
}

fn named(name: &str) -> BlockConfig {
    BlockConfig {
        name: name.to_owned(),
        queues: 2,
        ..config()
    }
}

#[test]
fn a_host_without_io_uring_has_threads() {
    let folder = Folder::new();
    let path = folder.file("image", &pattern(SIZE, 1));
    // In a thread of its own, as the filter is for this thread and those it starts.
    let test = thread::spawn(move || {
        forbid_io_uring();
        let mut disk = Disk::with(open(&ImageOptions::new(&path)).unwrap(), named("nor"), ALL);
        assert!(gets_thread("nor-q0") && gets_thread("nor-q1"));
        assert!(gets_thread("nor-q0-io0"));
        exercise(&mut disk, &path);
        disk.guest.device.reset();
        assert!(!has_thread("nor-q0") && !has_thread("nor-q0-io0"));
    });
    test.join().unwrap();
}

#[test]
fn io_uring_needs_no_threads() {
    let folder = Folder::new();
    let path = folder.file("image", &pattern(SIZE, 1));
    if io_uring::IoUring::new(8).is_err() {
        eprintln!("SKIP io_uring_needs_no_threads: this host has no io_uring");
        return;
    }
    let image = open(&ImageOptions::new(&path)).unwrap();
    let mut disk = Disk::with(image, named("ring"), ALL);
    exercise(&mut disk, &path);
    assert!(has_thread("ring-q0") && !has_thread("ring-q0-io0"));
}

fn forbid_io_uring() {
    const LOAD_NUMBER: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const IS_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let step = |code, jt, k| libc::sock_filter {
        code,
        jt,
        jf: u8::from(code == IS_EQUAL),
        k,
    };
    let mut filter = [
        step(LOAD_NUMBER, 0, 0),
        step(IS_EQUAL, 0, libc::SYS_io_uring_setup as u32),
        step(RETURN, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        step(RETURN, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the program lives for the call, which copies it.
    let result = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            | libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program,
            )
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn a_disk_that_is_read_only_needs_no_writable_file() {
    let folder = Folder::new();
    let path = folder.file("image", &pattern(SIZE, 1));
    let options = ImageOptions {
        access: Access::ReadOnly,
        ..ImageOptions::new(&path)
    };
    let mut disk = Disk::open(&options);
    let offered = disk.guest.device.features();
    assert_eq!(offered & (F_RO | F_DISCARD | F_WRITE_ZEROES), F_RO);
    assert_eq!(disk.read(0, 512), pattern(SIZE, 1)[..512]);
    assert_eq!(disk.request(OUT, 0, &[1; 512], 0).0, IOERR);
}

#[test]
fn an_image_is_written_by_one_machine_or_read_by_many() {
    let folder = Folder::new();
    let path = folder.file("image", &pattern(SIZE, 1));
    let write = ImageOptions::new(&path);
    let read = ImageOptions {
        access: Access::ReadOnly,
        ..write.clone()
    };
    let in_use = |options: &ImageOptions| match open(options) {
        Err(error @ ImageError::InUse { .. }) => error.to_string(),
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("the image was free"),
    };
    let writer = Disk::open(&write);
    assert!(in_use(&write).ends_with("is in use elsewhere"));
    assert!(in_use(&read).ends_with("is in use elsewhere and written to"));
    drop(writer);
    let readers = [open(&read).unwrap(), open(&read).unwrap()];
    in_use(&write);
    drop(readers);
    open(&write).unwrap();
}

#[test]
fn a_discard_gives_space_back() {
    for engine in ENGINES {
        let folder = Folder::new();
        let path = folder.file("image", &pattern(SIZE, 1));
        let blocks = || fs::metadata(&path).unwrap().blocks();
        let mut disk = Disk::open(&options(&path, engine, Cache::Buffered));
        disk.flush();
        let before = blocks();
        assert_eq!(disk.clear(DISCARD, &[(0, 4096, 0)]), OK);
        assert!(blocks() <= before - 4096, "{} of {before}", blocks());
        assert_eq!(fs::metadata(&path).unwrap().len(), SIZE as u64);
        assert_eq!(disk.clear(WRITE_ZEROES, &[(4096, 2048, 1)]), OK);
        assert!(blocks() <= before - 4096 - 2048);
        let before = blocks();
        assert_eq!(disk.clear(WRITE_ZEROES, &[(6144, 2048, 0)]), OK);
        assert_eq!(blocks(), before, "the space stays");
        assert_eq!(disk.read(6144, 1 << 20), vec![0; 1 << 20]);
    }
}

#[test]
fn a_file_grows_and_shrinks_under_its_disk() {
    let folder = Folder::new();
    let path = folder.file("image", &pattern(SIZE, 1));
    let mut disk = Disk::open(&ImageOptions::new(&path));
    let resizer = disk.guest.device.resizer();
    resizer.resize(2 * SIZE as u64).unwrap();
    disk.write(SIZE as u64 / 512, &[5; 512]);
    assert_eq!(fs::metadata(&path).unwrap().len(), 2 * SIZE as u64);
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(SIZE as u64 / 2).unwrap();
    assert_eq!(resizer.refresh().unwrap(), SIZE as u64 / 2);
    assert_eq!(disk.request(IN, SIZE as u64 / 512, &[], 512).0, IOERR);
}

#[test]
fn what_is_no_image_is_refused_in_one_line() {
    let folder = Folder::new();
    let refused = |options: &ImageOptions| {
        let Err(error) = open(options) else {
            panic!("it was opened")
        };
        let text = error.to_string();
        assert_eq!(text.lines().count(), 1);
        text
    };
    let missing = refused(&ImageOptions::new(&folder.path("missing")));
    assert!(missing.starts_with("cannot open disk image"), "{missing}");
    let no_file = refused(&ImageOptions::new("/dev/null".as_ref()));
    assert!(no_file.contains("neither a file nor"), "{no_file}");
    let path = folder.file("vhdx", b"vhdxfile and so on");
    assert!(refused(&ImageOptions::new(&path)).contains("a VHDX image"));
    let mut fixed = vec![0; 2048];
    fixed[1536..1544].copy_from_slice(b"conectix");
    let path = folder.file("vhd", &fixed);
    let mut options = ImageOptions::new(&path);
    assert!(refused(&options).contains("a VHD image"));
    options.format = Some(Format::Raw);
    assert!(open(&options).is_ok());
    let path = folder.file("dynamic-vhd", b"conectix and so on");
    assert!(refused(&ImageOptions::new(&path)).contains("a VHD image"));
    let raw = folder.file("raw", &pattern(SIZE, 1));
    let text = refused(&ImageOptions {
        backing: Backing::Open,
        ..ImageOptions::new(&raw)
    });
    assert!(text.contains("no backing files"), "{text}");
    let text = refused(&ImageOptions {
        format: Some(Format::Qcow2),
        ..ImageOptions::new(&raw)
    });
    assert!(text.contains("is no qcow2 image"), "{text}");
}

/// Set in the process that will be killed: its image.
const VICTIM: &str = "ROTA_BLOCK_VICTIM";

#[test]
fn what_was_flushed_is_there_after_kill_9() {
    if let Some(path) = std::env::var_os(VICTIM) {
        return write_until_killed(&PathBuf::from(path));
    }
    let folder = Folder::new();
    let raw = folder.file("raw", &vec![0; SIZE]);
    let mut images = vec![raw];
    let qcow2 = folder.path("qcow2");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&qcow2)
        .arg("4M")
        .status();
    match made {
        Ok(status) if status.success() => images.push(qcow2),
        _ => eprintln!("SKIP what_was_flushed_is_there_after_kill_9: no qemu-img for qcow2"),
    }
    for path in images {
        let mut victim = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "what_was_flushed_is_there_after_kill_9",
                "--nocapture",
            ])
            .env(VICTIM, &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(victim.stdout.take().unwrap()).lines();
        let told = lines
            .map_while(Result::ok)
            .filter(|line| line.contains("flushed"))
            .take(3)
            .count();
        assert_eq!(told, 3);
        victim.kill().unwrap();
        victim.wait().unwrap();
        let image = (0..20)
            .find_map(|_| match open(&ImageOptions::new(&path)) {
                // On a busy machine the kernel may take its time to take the victim's files away.
                Err(ImageError::InUse { .. }) => None,
                image => Some(image.unwrap()),
            })
            .expect("the victim's lock is gone");
        let mut disk = Disk::new(image);
        for round in 0..3 {
            let bytes = pattern(64 << 10, round);
            assert!(disk.read(1000 * round, bytes.len()) == bytes);
        }
    }
}

fn write_until_killed(path: &Path) {
    let mut disk = Disk::open(&ImageOptions::new(path));
    for round in 0..3 {
        disk.write(1000 * round, &pattern(64 << 10, round));
        disk.flush();
        println!("flushed");
    }
    loop {
        // Writes without a flush, elsewhere.
        disk.write(4096, &[1; 4096]);
    }
}

/// A loop device, detached at the end.
struct Loop(PathBuf);

impl Loop {
    fn attach(file: &Path) -> Option<Self> {
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file)
            .output()
            .ok()
            .filter(|output| output.status.success())?;
        let path = String::from_utf8(output.stdout).ok()?;
        Some(Self(path.trim().into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

#[test]
fn a_block_device_is_a_disk() {
    let folder = Folder::new();
    for engine in ENGINES {
        for cache in [Cache::Buffered, Cache::Direct] {
            let file = folder.file("image", &pattern(SIZE, 1));
            let Some(device) = Loop::attach(&file) else {
                eprintln!("SKIP a_block_device_is_a_disk: cannot attach a loop device");
                return;
            };
            let mut disk = Disk::open(&options(&device.0, engine, cache));
            assert_eq!(disk.guest.config(0, 8), (SIZE as u64 / 512).to_le_bytes());
            exercise(&mut disk, &device.0);
            assert!(
                open(&ImageOptions::new(&device.0)).is_err(),
                "it is locked, too"
            );
            let resizer = disk.guest.device.resizer();
            assert!(resizer.resize(SIZE as u64).is_err());
            let grown = OpenOptions::new().write(true).open(&file).unwrap();
            grown.set_len(2 * SIZE as u64).unwrap();
            let told = Command::new("losetup").arg("-c").arg(&device.0).status();
            assert!(told.unwrap().success());
            assert_eq!(resizer.refresh().unwrap(), 2 * SIZE as u64);
            drop(disk);
        }
    }
}
