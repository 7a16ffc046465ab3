//! What cannot work is refused with one line that names the cause, and exit status 1.

use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rota_tests::child::{self, guest};
use rota_tests::require;

/// Runs a command that must refuse: exit status 1, one line on standard error that contains all of `words`, nothing else.
fn refuses(command: &mut Command, words: &[&str]) {
    refuses_with(1, command, words);
}

/// The same with another exit status: 2 is for command lines that are not understood.
fn refuses_with(status: i32, command: &mut Command, words: &[&str]) {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let deadline = Instant::now() + Duration::from_secs(30);
    while child.try_wait().expect("wait").is_none() {
        if Instant::now() > deadline {
            let _ = child.kill();
            panic!("{command:?} still runs after 30 s");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().expect("output");
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(status), "{command:?}: {errors}");
    let lines: Vec<&str> = errors
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    assert_eq!(lines.len(), 1, "one line, not:\n{errors}");
    for word in words {
        assert!(
            lines[0].to_lowercase().contains(&word.to_lowercase()),
            "{word:?} is not in: {}",
            lines[0]
        );
    }
    assert!(!lines[0].contains("panicked"), "{}", lines[0]);
}

struct Scratch(PathBuf);

impl Scratch {
    /// A file with this content, then zeroes up to `size`.
    fn new(name: &str, content: &[u8], size: u64) -> Scratch {
        let path =
            std::env::temp_dir().join(format!("rota-refusals-{}-{name}", std::process::id()));
        std::fs::write(&path, content).expect("a scratch file");
        std::fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .and_then(|file| file.set_len(size))
            .expect("its size");
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A real kernel to go wrong with.
fn kernel() -> Result<(), String> {
    child::programs()?;
    let path = guest("vmlinuz-cloud");
    let found = if path.exists() {
        Ok(())
    } else {
        Err(format!("no guest kernel {}", path.display()))
    };
    rota_tests::requires::demanded("kernel", found)
}

fn run(kernel: &std::path::Path, arguments: &[&str]) -> Command {
    let mut command = child::rota();
    command
        .arg("run")
        .arg("--kernel")
        .arg(kernel)
        .args(["--cpus", "boot=1", "--serial", "off"])
        .args(arguments);
    command
}

#[test]
fn a_kernel_that_is_noise() {
    require!(child::programs());
    let noise: Vec<u8> = (0..0x1_0000u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let file = Scratch::new("noise", &noise, noise.len() as u64);
    refuses(
        &mut run(&file.0, &["--memory", "size=256M"]),
        &["kernel", &file.0.display().to_string()],
    );
}

#[test]
fn a_kernel_that_is_empty() {
    require!(child::programs());
    let file = Scratch::new("empty", &[], 0);
    refuses(
        &mut run(&file.0, &["--memory", "size=256M"]),
        &["kernel", &file.0.display().to_string()],
    );
}

#[test]
fn a_kernel_that_is_cut_off() {
    require!(kernel());
    for name in ["vmlinuz-cloud", "vmlinux-cloud"] {
        let whole = std::fs::read(guest(name)).expect("the kernel");
        let file = Scratch::new(name, &whole[..whole.len() / 3], whole.len() as u64 / 3);
        refuses(
            &mut run(&file.0, &["--memory", "size=256M"]),
            &["kernel", &file.0.display().to_string()],
        );
    }
}

#[test]
fn a_kernel_that_is_not_there() {
    require!(child::programs());
    refuses(
        &mut run("/does/not/exist".as_ref(), &["--memory", "size=256M"]),
        &["kernel", "/does/not/exist", "no such file"],
    );
}

#[test]
fn a_kernel_that_is_a_folder() {
    require!(child::programs());
    refuses(
        &mut run("/proc".as_ref(), &["--memory", "size=256M"]),
        &["kernel", "/proc"],
    );
}

#[test]
fn an_initramfs_larger_than_the_memory() {
    require!(kernel());
    let file = Scratch::new("initramfs", b"070701", 300 << 20);
    let path = file.0.display().to_string();
    refuses(
        &mut run(
            &guest("vmlinuz-cloud"),
            &["--memory", "size=256M", "--initramfs", &path],
        ),
        &["initramfs", &path],
    );
}

#[test]
fn an_initramfs_that_is_not_there() {
    require!(kernel());
    let arguments = ["--memory", "size=256M", "--initramfs", "/does/not/exist"];
    refuses(
        &mut run(&guest("vmlinuz-cloud"), &arguments),
        &["initramfs", "/does/not/exist"],
    );
}

#[test]
fn a_command_line_over_the_limit() {
    require!(kernel());
    let long = "x".repeat(10_000);
    refuses(
        &mut run(
            &guest("vmlinuz-cloud"),
            &["--memory", "size=256M", "--cmdline", &long],
        ),
        &["cmdline", "10000"],
    );
}

#[test]
fn memory_of_no_size_and_of_odd_sizes() {
    require!(child::programs());
    // Judged before the kernel is looked at, so any file will do.
    let file = Scratch::new("memory", b"x", 1);
    for (size, word) in [
        ("size=0", "memory"),
        ("size=0M", "memory"),
        ("size=1000", "memory"),
    ] {
        refuses(&mut run(&file.0, &["--memory", size]), &[word]);
    }
}

#[test]
fn a_size_that_is_no_number() {
    require!(child::programs());
    for size in ["size=9E", "size=-1", "size=", "size=lots"] {
        refuses_with(
            2,
            &mut run("/does/not/exist".as_ref(), &["--memory", size]),
            &["memory"],
        );
    }
}

#[test]
fn memory_too_small_for_the_kernel() {
    require!(kernel());
    refuses(
        &mut run(&guest("vmlinuz-cloud"), &["--memory", "size=4M"]),
        &["memory"],
    );
}

#[test]
fn a_serial_file_in_a_folder_that_is_not_there() {
    require!(kernel());
    let mut command = child::rota();
    command
        .arg("run")
        .arg("--kernel")
        .arg(guest("vmlinuz-cloud"))
        .args(["--memory", "size=256M", "--serial", "file=/does/not/exist"]);
    refuses(&mut command, &["serial", "/does/not/exist"]);
}

#[test]
fn no_device_at_all() {
    require!(child::programs());
    if child::real_device() {
        return rota_tests::requires::print_skip("no_device_at_all", "this machine has the device");
    }
    let kernel = guest("vmlinuz-cloud");
    let file = Scratch::new("device", b"x", 1);
    let kernel = if kernel.exists() { &kernel } else { &file.0 };
    let mut command = child::bare_rota();
    command.arg("run").arg("--kernel").arg(kernel).args([
        "--memory",
        "size=256M",
        "--serial",
        "off",
    ]);
    refuses(&mut command, &["/dev/mshv"]);
}

/// In a mount namespace where `/dev` is empty.
#[test]
fn no_kvm_under_softmshv() {
    require!(child::programs());
    if child::real_device() {
        return rota_tests::requires::print_skip(
            "no_kvm_under_softmshv",
            "this machine has the device",
        );
    }
    // SAFETY: no pointer is involved.
    if unsafe { libc::geteuid() } != 0 {
        return rota_tests::requires::print_skip(
            "no_kvm_under_softmshv",
            "only root can take /dev/kvm away",
        );
    }
    let file = Scratch::new("kvm", b"x", 1);
    let kernel = guest("vmlinuz-cloud");
    let mut command = run(
        if kernel.exists() { &kernel } else { &file.0 },
        &["--memory", "size=256M"],
    );
    // SAFETY: the calls are safe between fork and exec; they involve constant strings only.
    unsafe {
        command.pre_exec(|| {
            let none = std::ptr::null();
            let hidden = libc::unshare(libc::CLONE_NEWNS) == 0
                && libc::mount(
                    none,
                    c"/".as_ptr(),
                    none,
                    libc::MS_REC | libc::MS_PRIVATE,
                    none.cast(),
                ) == 0
                && libc::mount(
                    c"tmpfs".as_ptr(),
                    c"/dev".as_ptr(),
                    c"tmpfs".as_ptr(),
                    0,
                    none.cast(),
                ) == 0;
            if hidden {
                Ok(())
            } else {
                Err(std::io::Error::last_os_error())
            }
        });
    }
    refuses(&mut command, &["/dev/kvm"]);
}
