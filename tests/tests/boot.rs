//! The product boots real kernels: sizes, formats, ends, consoles, signals. In the lab, or on a machine with the real device.

use std::collections::BTreeSet;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Condvar, Mutex, PoisonError};

use rota_tests::child::{self, MARKER, Vmm};
use rota_tests::{require, requires};

const MIB: u64 = 1 << 20;

/// Boots to init, checks what the guest sees, and waits for its power-off.
fn boots(kernel: &str, cpus: u32, memory_mib: u64) {
    let cpus_argument = format!("boot={cpus}");
    let memory_argument = format!("size={memory_mib}M");
    let mut vmm = Vmm::boot_kernel(
        kernel,
        "rota.then=poweroff",
        &["--cpus", &cpus_argument, "--memory", &memory_argument],
    );
    let report = vmm.wait_for_init();
    assert_eq!(report.cpus, cpus, "{report:?}");
    let size = memory_mib * MIB;
    let least = size - (size / 8).max(64 * MIB);
    assert!(
        (least..=size).contains(&report.memory),
        "of {size} bytes the guest has {}",
        report.memory
    );
    assert!(
        report.hypervisor.contains("Microsoft"),
        "the guest runs on {:?}",
        report.hypervisor
    );
    let status = vmm.wait();
    assert_eq!(
        status.code(),
        Some(0),
        "power-off ends with 0; printed:\n{}",
        vmm.printed()
    );
}

/// Tests that boot guests, and how many processors of this machine they want for it. Skipped unless guests can boot here.
macro_rules! boot_tests {
    ($($(#[$attribute:meta])* fn $name:ident($cores:literal) $body:block)*) => {$(
        $(#[$attribute])*
        #[test]
        fn $name() {
            require!(child::bootable());
            let _turn = turn($cores);
            $body
        }
    )*};
}

/// Processors a test's guests keep busy while they boot: a machine of two boots two guests at once, if each has one.
const CORES: u32 = 2;

/// A test's share of the machine, given back when the test ends.
struct Turn(u32);

static FREE: Mutex<u32> = Mutex::new(CORES);
static FREED: Condvar = Condvar::new();

/// Waits until `cores` are free; whoever takes all of them is alone, as the checks for leftovers want it.
fn turn(cores: u32) -> Turn {
    let cores = cores.min(CORES);
    let free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut free = FREED
        .wait_while(free, |free| *free < cores)
        .unwrap_or_else(PoisonError::into_inner);
    *free -= cores;
    Turn(cores)
}

impl Drop for Turn {
    fn drop(&mut self) {
        *FREE.lock().unwrap_or_else(PoisonError::into_inner) += self.0;
        FREED.notify_all();
    }
}

/// A file that goes away with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        Scratch(std::env::temp_dir().join(format!("rota-boot-{}-{name}", std::process::id())))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// What a killed VMM could leave on the machine, besides processes: files, shared memory, control groups.
fn leftovers() -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut folders = vec![
        std::env::temp_dir(),
        "/dev/shm".into(),
        "/run".into(),
        "/sys/fs/cgroup".into(),
    ];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            let cgroup = folder.starts_with("/sys/fs/cgroup");
            let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if cgroup && is_folder {
                folders.push(entry.path());
            }
            if !cgroup || is_folder {
                found.insert(entry.path());
            }
        }
    }
    found
}

/// Processes of a process group that are still there.
fn group_members(group: i32) -> Vec<String> {
    let mut members = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else {
            continue;
        };
        // The fields after the name in parentheses: state, parent, group.
        let fields: Vec<&str> = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .collect();
        if fields.get(2).and_then(|text| text.parse().ok()) == Some(group)
            && fields.first() != Some(&"Z")
        {
            members.push(stat);
        }
    }
    members
}

boot_tests! {
    fn one_processor_and_128_mib(1) { boots("vmlinuz-cloud", 1, 128); }
    fn two_processors_and_512_mib(2) { boots("vmlinuz-cloud", 2, 512); }
    fn four_processors_and_512_mib(2) { boots("vmlinuz-cloud", 4, 512); }
    fn three_and_a_half_gib(2) { boots("vmlinuz-cloud", 1, 3584); }
    /// Half of it lies above the hole below 4 GiB.
    fn six_gib(2) { boots("vmlinuz-cloud", 2, 6144); }
    fn an_elf_kernel_by_its_pvh_entry(1) { boots("vmlinux-cloud", 1, 512); }
    fn an_elf_kernel_on_four_processors(2) { boots("vmlinux-cloud", 4, 512); }
    fn debians_big_kernel(2) { boots("vmlinuz-amd64", 2, 512); }

    fn shared_memory_boots(1) {
        let mut vmm = Vmm::boot("rota.then=poweroff", &["--memory", "size=256M,shared=on"]);
        vmm.wait_for_init();
        assert_eq!(vmm.wait().code(), Some(0), "{}", vmm.printed());
    }

    fn reboot_boots_again(1) {
        let mut vmm = Vmm::boot("rota.then=reboot", &["--memory", "size=256M"]);
        let first = vmm.wait_for_init();
        let second = vmm.wait_for_init();
        assert_eq!(first.kernel, second.kernel);
        vmm.signal(libc::SIGTERM);
        assert_eq!(vmm.wait().signal(), None, "{}", vmm.printed());
    }

    /// `reboot=t` makes Linux load an empty IDT and fault.
    fn a_triple_fault_ends_with_a_report(1) {
        let mut vmm = Vmm::boot("rota.then=reboot reboot=t", &["--memory", "size=256M"]);
        vmm.wait_for_init();
        let status = vmm.wait();
        let printed = vmm.printed().to_lowercase();
        assert!(status.code().is_some_and(|code| code != 0), "{status:?}\n{printed}");
        assert!(printed.contains("triple fault"), "names what happened:\n{printed}");
        assert!(printed.contains("rip"), "shows registers:\n{printed}");
    }

    /// A panic with `panic=-1` is a reboot, as on a machine.
    fn a_panic_reboots_when_the_kernel_is_told_to(1) {
        let mut vmm = Vmm::boot("rota.then=panic panic=-1", &["--memory", "size=256M"]);
        vmm.wait_for_init();
        vmm.wait_for_init();
    }

    fn the_shell_hears_what_is_typed(1) {
        let mut vmm = Vmm::boot("rota.then=shell", &["--memory", "size=256M"]);
        vmm.wait_for_init();
        vmm.type_in("echo answer $((6 * 7))\n");
        vmm.wait_for("answer 42");
        vmm.type_in("poweroff -f\n");
        assert_eq!(vmm.wait().code(), Some(0), "{}", vmm.printed());
    }

    fn sigterm_and_sigint_shut_down_cleanly(2) {
        for signal in [libc::SIGTERM, libc::SIGINT] {
            let before = leftovers();
            let mut vmm = Vmm::boot("rota.then=shell", &["--memory", "size=256M"]);
            vmm.wait_for_init();
            vmm.signal(signal);
            let status = vmm.wait();
            assert_eq!((status.signal(), status.code()), (None, Some(0)), "signal {signal}:\n{}", vmm.printed());
            assert_eq!(group_members(vmm.group()), Vec::<String>::new());
            assert_eq!(leftovers().difference(&before).collect::<Vec<_>>(), Vec::<&PathBuf>::new());
        }
    }

    fn a_signal_during_the_boot_ends_it_too(1) {
        let mut vmm = Vmm::boot("rota.then=shell", &["--memory", "size=256M"]);
        // Any output at all: the VMM says who schedules before the guest starts.
        vmm.wait_for("");
        vmm.signal(libc::SIGTERM);
        assert_eq!(vmm.wait().signal(), None, "{}", vmm.printed());
    }

    fn a_kill_leaves_nothing_behind(2) {
        let before = leftovers();
        let mut vmm = Vmm::boot("rota.then=shell", &["--cpus", "boot=2", "--memory", "size=256M,shared=on"]);
        vmm.wait_for_init();
        vmm.signal(libc::SIGKILL);
        let status = vmm.wait();
        assert_ne!(status.code(), Some(0), "the launcher does not call that a success");
        assert_eq!(group_members(vmm.group()), Vec::<String>::new(), "no process");
        assert_eq!(leftovers().difference(&before).collect::<Vec<_>>(), Vec::<&PathBuf>::new(), "no file, no control group");
        boots("vmlinuz-cloud", 1, 256);
    }

    fn the_console_can_be_a_file(1) {
        let log = Scratch::new("serial");
        let serial = format!("file={}", log.0.display());
        let mut vmm = Vmm::boot("rota.then=poweroff", &["--memory", "size=256M", "--serial", &serial]);
        assert_eq!(vmm.wait().code(), Some(0), "{}", vmm.printed());
        let written = std::fs::read_to_string(&log.0).expect("the serial file");
        assert!(written.contains(MARKER), "{written}");
        assert!(!vmm.printed().contains(MARKER), "and not on standard output");
    }

    fn the_console_can_be_off(1) {
        let mut vmm = Vmm::boot("rota.then=poweroff", &["--memory", "size=256M", "--serial", "off"]);
        assert_eq!(vmm.wait().code(), Some(0), "{}", vmm.printed());
        assert!(!vmm.printed().contains(MARKER));
    }

    fn the_console_can_be_a_new_terminal(1) {
        let mut vmm = Vmm::boot("rota.then=shell", &["--memory", "size=256M", "--serial", "pty"]);
        let line = vmm.wait_for("/dev/pts/");
        let path = line.split(|c: char| c.is_whitespace() || c == '\'' || c == '"').find(|word| word.starts_with("/dev/pts/")).expect("a path");
        let mut pty = std::fs::OpenOptions::new().read(true).write(true).open(path).expect("the pseudo-terminal");
        use std::io::Write as _;
        let mut seen = String::new();
        // The marker may have gone by before this end was opened; an echo of our own cannot.
        let deadline = std::time::Instant::now() + child::patience();
        while !seen.contains("answer 42") {
            assert!(std::time::Instant::now() < deadline, "no answer from the shell; it printed:\n{seen}");
            pty.write_all(b"echo answer $((6 * 7))\n").expect("typing");
            let mut poll = libc::pollfd { fd: pty.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one valid pollfd.
            while unsafe { libc::poll(&raw mut poll, 1, 1000) } == 1 {
                let mut chunk = [0u8; 4096];
                let count = pty.read(&mut chunk).expect("reading");
                seen.push_str(&String::from_utf8_lossy(&chunk[..count]));
            }
        }
        pty.write_all(b"poweroff -f\n").expect("typing");
        assert_eq!(vmm.wait().code(), Some(0), "{}", vmm.printed());
    }

    /// On a terminal of its own: raw while the guest runs, and afterwards exactly as it was, however the end comes.
    fn the_terminal_is_restored(1) {
        for (cmdline, signal) in [("rota.then=poweroff", None), ("rota.then=shell", Some(libc::SIGTERM)), ("rota.then=reboot reboot=t", None)] {
            let (terminal, ours) = open_terminal();
            let before = settings(&terminal);
            let mut command = child::run(child::rota(), "vmlinuz-cloud", cmdline);
            let end = || Stdio::from(ours.try_clone().expect("the terminal's other end"));
            command.args(["--memory", "size=256M", "--serial", "tty"]).stdin(end()).stdout(end()).stderr(end());
            // SAFETY: both calls are safe between fork and exec and involve no memory of the parent's.
            unsafe {
                command.pre_exec(|| {
                    libc::setsid();
                    libc::ioctl(0, libc::TIOCSCTTY, 0);
                    Ok(())
                });
            }
            let mut child = command.spawn().expect("start");
            // Only the child has the terminal now: reading from it ends with the child.
            drop((command, ours));
            let mut seen = String::new();
            while !seen.contains(MARKER) {
                seen.push_str(&read_some(&terminal).unwrap_or_else(|| panic!("{cmdline}: ended before the marker:\n{seen}")));
            }
            if let Some(signal) = signal {
                assert_eq!(settings(&terminal).0 & libc::ICANON, 0, "raw while the guest runs");
                let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).unwrap_or_default();
                let pid = children.split_whitespace().next().and_then(|pid| pid.parse().ok()).unwrap_or(child.id() as i32);
                // SAFETY: no pointer is involved; the process is a child that is not yet waited for.
                unsafe { libc::kill(pid, signal) };
            }
            while read_some(&terminal).is_some() {}
            child.wait().expect("wait");
            assert_eq!(settings(&terminal), before, "{cmdline}");
        }
    }

    fn a_start_says_who_schedules(1) {
        let mut vmm = Vmm::boot("rota.then=poweroff", &["--memory", "size=256M"]);
        let line = vmm.wait_for("cheduler");
        assert!(["integrated", "root", "core"].iter().any(|word| line.to_lowercase().contains(word)), "{line}");
        vmm.wait();
    }

    fn a_report_file_is_json(1) {
        let file = Scratch::new("report");
        let mut vmm = Vmm::boot("rota.then=poweroff", &["--memory", "size=256M", "--report", &file.0.display().to_string()]);
        assert_eq!(vmm.wait().code(), Some(0), "{}", vmm.printed());
        let text = std::fs::read_to_string(&file.0).expect("the report");
        let report: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        assert!(report.is_object(), "{text}");
    }

    fn two_guests_run_side_by_side(2) {
        let arguments = ["--memory", "size=256M"];
        let mut guests = [Vmm::boot("rota.then=poweroff", &arguments), Vmm::boot("rota.then=poweroff", &arguments)];
        for guest in &mut guests {
            guest.wait_for_init();
            assert_eq!(guest.wait().code(), Some(0), "{}", guest.printed());
        }
    }
}

/// A pseudo-terminal: our end of it, and the one for the child.
fn open_terminal() -> (OwnedFd, OwnedFd) {
    let (mut ours, mut theirs) = (0, 0);
    // SAFETY: two valid places for descriptors; null for name, settings and size is allowed.
    let opened = unsafe {
        libc::openpty(
            &mut ours,
            &mut theirs,
            std::ptr::null_mut(),
            std::ptr::null(),
            std::ptr::null(),
        )
    };
    assert_eq!(opened, 0, "openpty");
    // SAFETY: the call just returned both and nothing else owns them.
    unsafe { (OwnedFd::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs)) }
}

/// Local, input, output and control modes of a terminal.
fn settings(terminal: &OwnedFd) -> (u32, u32, u32, u32) {
    // SAFETY: a zeroed termios is a valid one, and the call fills it.
    let termios = unsafe {
        let mut termios: libc::termios = std::mem::zeroed();
        assert_eq!(libc::tcgetattr(terminal.as_raw_fd(), &raw mut termios), 0);
        termios
    };
    (
        termios.c_lflag,
        termios.c_iflag,
        termios.c_oflag,
        termios.c_cflag,
    )
}

/// Some output of a terminal; none when its other end is closed.
fn read_some(terminal: &OwnedFd) -> Option<String> {
    let mut poll = libc::pollfd {
        fd: terminal.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let patience = i32::try_from(child::patience().as_millis()).unwrap_or(i32::MAX);
    // SAFETY: one valid pollfd.
    let ready = unsafe { libc::poll(&raw mut poll, 1, patience) };
    assert_eq!(ready, 1, "nothing comes from the terminal");
    let mut chunk = [0u8; 4096];
    // SAFETY: the buffer is as long as said.
    let count = unsafe { libc::read(terminal.as_raw_fd(), chunk.as_mut_ptr().cast(), chunk.len()) };
    (count > 0).then(|| String::from_utf8_lossy(&chunk[..count as usize]).into_owned())
}

/// The name of the requirement, for those who demand it.
#[test]
fn booting_is_demanded_where_it_is_said_to_be() {
    if std::env::var("ROTA_REQUIRE").is_ok_and(|demands| demands == "all") {
        child::bootable().expect("bootable");
    } else {
        requires::demanded("boot", Ok(())).expect("nothing is missing");
    }
}
