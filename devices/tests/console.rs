//! The console device, driven by a guest's driver.

use std::{
    fs::File,
    io::{Read, Write},
    os::{
        fd::{FromRawFd, OwnedFd},
        unix::{
            fs::OpenOptionsExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use devices::virtio::{
    VirtioDevice,
    console::{Backend, Console},
};
use driver::{Guest, Ring};

const F_SIZE: u64 = 1;

fn guest(backend: Backend) -> Guest<Console> {
    let mut guest = Guest::new(Console::new(backend).expect("a console"));
    guest.activate(F_SIZE);
    guest
}

/// A console on both ends of a socket pair, as a pair of files.
fn piped() -> (Guest<Console>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    let theirs = File::from(OwnedFd::from(theirs));
    let backend = Backend::Files {
        input: Some(theirs.try_clone().expect("a file")),
        output: theirs,
    };
    (guest(backend), ours)
}

fn pty() -> (File, PathBuf) {
    // SAFETY: each call takes an open descriptor, and a buffer of the length given.
    unsafe {
        let master = libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC);
        assert!(master >= 0 && libc::grantpt(master) == 0 && libc::unlockpt(master) == 0);
        let mut name = [0u8; 64];
        assert_eq!(libc::ptsname_r(master, name.as_mut_ptr().cast(), 64), 0);
        let length = name.iter().position(|byte| *byte == 0).expect("an end");
        let path = std::str::from_utf8(&name[..length]).expect("a path").into();
        (File::from_raw_fd(master), path)
    }
}

/// The other side of a pseudo-terminal, without echo and line editing.
fn open_peer(path: &PathBuf) -> File {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open(path)
        .expect("the other side");
    // SAFETY: the structure is one of integers, and the descriptor is open.
    unsafe {
        let mut settings: libc::termios = std::mem::zeroed();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        assert_eq!(libc::tcgetattr(fd, &raw mut settings), 0);
        libc::cfmakeraw(&raw mut settings);
        assert_eq!(libc::tcsetattr(fd, libc::TCSANOW, &raw const settings), 0);
    }
    file
}

/// Prints `text` and waits until the device has taken it.
fn print(guest: &mut Guest<Console>, ring: &mut Ring, text: &[u8]) {
    let at = guest.place(text);
    let head = ring.add(&[(at, text.len() as u32)], &[]);
    ring.kick();
    assert_eq!(ring.wait(), (head, 0));
}

fn expect(from: &mut impl Read, text: &[u8]) {
    let mut bytes = vec![0; text.len()];
    from.read_exact(&mut bytes).expect("the text");
    assert_eq!(
        String::from_utf8_lossy(&bytes),
        String::from_utf8_lossy(text)
    );
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length)
        .map(|index| (index * 7 + index / 251) as u8)
        .collect()
}

/// How much processor time the thread of the console has used.
fn idles(during: Duration) {
    let time = || {
        // SAFETY: the structure is one of integers, which the call fills.
        unsafe {
            let mut usage: libc::rusage = std::mem::zeroed();
            assert_eq!(libc::getrusage(libc::RUSAGE_SELF, &raw mut usage), 0);
            let micros = |time: libc::timeval| time.tv_sec * 1_000_000 + time.tv_usec;
            Duration::from_micros((micros(usage.ru_utime) + micros(usage.ru_stime)) as u64)
        }
    };
    let before = time();
    thread::sleep(during);
    let used = time() - before;
    // Other tests run beside this one, but none of them computes for long.
    assert!(used < during * 3 / 4, "{used:?} of {during:?}");
}

#[test]
fn what_the_guest_prints_comes_out_and_what_is_typed_goes_in() {
    let (mut guest, mut host) = piped();
    let (mut receive, mut transmit) = (guest.ring(0), guest.ring(1));
    print(&mut guest, &mut transmit, b"login: ");
    expect(&mut host, b"login: ");
    let (first, second) = (guest.allocate(4), guest.allocate(4));
    let head = receive.add(&[], &[(first, 4), (second, 4)]);
    receive.kick();
    host.write_all(b"root\n").unwrap();
    assert_eq!(receive.wait(), (head, 5));
    assert_eq!(guest.read(first, 4), b"root");
    assert_eq!(guest.read(second, 2), b"\n\0");
}

#[test]
fn input_waits_for_buffers_and_comes_whole() {
    let (mut guest, mut host) = piped();
    let mut receive = guest.ring(0);
    let text = pattern(100_000);
    let sent = text.clone();
    let sender = thread::spawn(move || {
        host.write_all(&sent).unwrap();
        host
    });
    idles(Duration::from_millis(200));
    let buffer = guest.allocate(4096);
    let mut got = Vec::new();
    while got.len() < text.len() {
        let head = receive.add(&[], &[(buffer, 1000)]);
        receive.kick();
        let (used, length) = receive.wait();
        assert_eq!(used, head);
        got.extend(guest.read(buffer, length as usize));
    }
    assert!(got == text, "not what was typed");
    drop(sender.join().unwrap());
}

#[test]
fn a_terminal_that_takes_nothing_holds_the_guest_up_without_loss() {
    let (mut guest, mut host) = piped();
    let mut transmit = guest.ring(1);
    let text = pattern(2 << 20);
    let at = guest.place(&text);
    for piece in 0..16 {
        transmit.add(&[(at + piece * (128 << 10), 128 << 10)], &[]);
    }
    transmit.kick();
    idles(Duration::from_millis(300));
    let done = transmit.used_index();
    assert!(done < 16, "the guest is held up");
    let mut got = vec![0; text.len()];
    host.read_exact(&mut got).unwrap();
    assert!(got == text, "not what was printed");
    for _ in 0..16 {
        transmit.wait();
    }
}

#[test]
fn what_is_on_its_way_survives_a_reset() {
    let (mut guest, mut host) = piped();
    let mut transmit = guest.ring(1);
    let mut sent = Vec::new();
    // More than a socket takes, so that some of it is still in the device.
    let text = pattern(64 << 10);
    let at = guest.place(&text);
    loop {
        let head = transmit.add(&[(at, text.len() as u32)], &[]);
        transmit.kick();
        let deadline = Instant::now() + Duration::from_millis(300);
        let mut used = None;
        while used.is_none() && Instant::now() < deadline {
            used = transmit.used();
            thread::sleep(Duration::from_millis(1));
        }
        if used.is_none() {
            break;
        }
        assert_eq!(used, Some((head, 0)));
        sent.extend(&text);
    }
    guest.device.reset();
    guest.activate(F_SIZE);
    let mut got = vec![0; sent.len()];
    host.read_exact(&mut got).unwrap();
    assert!(got == sent, "not what was printed");
}

#[test]
fn the_size_of_the_terminal_is_told() {
    let mut guest = Guest::new(Console::new(Backend::Null).unwrap());
    let handle = guest.device.handle();
    handle.resize(80, 25);
    assert_eq!(guest.config(0, 4), [80, 0, 25, 0]);
    assert_eq!(guest.interrupts().config_count(), 0, "nobody to tell");
    guest.activate(F_SIZE);
    handle.resize(132, 300);
    handle.resize(132, 300);
    assert_eq!(guest.config(0, 6), [132, 0, 44, 1, 0, 0]);
    assert_eq!(guest.interrupts().config_count(), 1);
    guest.device.reset();
    handle.resize(1, 1);
    assert_eq!(guest.interrupts().config_count(), 1);
    guest.activate(0);
    handle.resize(2, 2);
    assert_eq!(
        guest.interrupts().config_count(),
        1,
        "the driver does not know sizes"
    );
}

#[test]
fn nobody_at_a_socket_holds_nobody_up_and_the_last_output_is_kept() {
    let directory = tempdir("console-socket");
    let path = directory.join("socket");
    let mut guest = guest(Backend::Socket(UnixListener::bind(&path).unwrap()));
    let (mut receive, mut transmit) = (guest.ring(0), guest.ring(1));
    let text = pattern(100 << 10);
    print(&mut guest, &mut transmit, &text);
    let mut first = UnixStream::connect(&path).unwrap();
    expect(&mut first, &text[36 << 10..]);
    let buffer = guest.allocate(16);
    let head = receive.add(&[], &[(buffer, 16)]);
    receive.kick();
    first.write_all(b"one").unwrap();
    assert_eq!(receive.wait(), (head, 3));

    // The next client takes over.
    let mut second = UnixStream::connect(&path).unwrap();
    assert_eq!(first.read(&mut [0]).unwrap(), 0);
    print(&mut guest, &mut transmit, b"hello");
    expect(&mut second, b"hello");

    // And when it goes, the guest is not held up either.
    drop(second);
    for _ in 0..3 {
        print(&mut guest, &mut transmit, &text);
    }
    let mut third = UnixStream::connect(&path).unwrap();
    expect(&mut third, &text[36 << 10..]);
    idles(Duration::from_millis(200));
}

#[test]
fn a_pseudo_terminal_may_be_opened_late_and_again() {
    let (master, path) = pty();
    let mut guest = guest(Backend::Pty(master));
    let (mut receive, mut transmit) = (guest.ring(0), guest.ring(1));
    let text = pattern(100 << 10);
    print(&mut guest, &mut transmit, &text);
    idles(Duration::from_millis(300));
    let mut peer = open_peer(&path);
    expect(&mut peer, &text[36 << 10..]);
    let buffer = guest.allocate(16);
    let head = receive.add(&[], &[(buffer, 16)]);
    receive.kick();
    peer.write_all(b"typed").unwrap();
    assert_eq!(receive.wait(), (head, 5));
    drop(peer);
    receive.add(&[], &[(buffer, 16)]);
    receive.kick();
    print(&mut guest, &mut transmit, &text);
    idles(Duration::from_millis(300));
    expect(&mut open_peer(&path), &text[36 << 10..]);
}

#[test]
fn ordinary_files_are_input_and_output() {
    let directory = tempdir("console-files");
    let (input, output) = (directory.join("in"), directory.join("out"));
    let text = pattern(20_000);
    std::fs::write(&input, &text).unwrap();
    let mut guest = guest(Backend::Files {
        input: Some(File::open(&input).unwrap()),
        output: File::create(&output).unwrap(),
    });
    let (mut receive, mut transmit) = (guest.ring(0), guest.ring(1));
    let buffer = guest.allocate(4096);
    let mut got = Vec::new();
    while got.len() < text.len() {
        receive.add(&[], &[(buffer, 4096)]);
        receive.kick();
        let (_, length) = receive.wait();
        got.extend(guest.read(buffer, length as usize));
    }
    assert!(got == text);
    print(&mut guest, &mut transmit, &text);
    guest.interrupts().wait_until(
        || (std::fs::read(&output).unwrap() == text).then_some(()),
        |_| "the output is not in the file".to_owned(),
    );
}

#[test]
fn a_reader_that_has_gone_costs_the_guest_nothing() {
    let (mut guest, host) = piped();
    let mut transmit = guest.ring(1);
    drop(host);
    let text = pattern(300 << 10);
    for _ in 0..4 {
        print(&mut guest, &mut transmit, &text);
    }
    idles(Duration::from_millis(200));
}

#[test]
fn empty_and_endless_buffers_are_taken_as_they_are() {
    let mut guest = guest(Backend::Null);
    let (mut receive, mut transmit) = (guest.ring(0), guest.ring(1));
    let buffer = guest.allocate(16);
    receive.add(&[(buffer, 16)], &[]);
    receive.kick();
    let head = transmit.add(&[], &[(buffer, 16)]);
    transmit.kick();
    assert_eq!(transmit.wait(), (head, 0));
    // 60 MiB in one chain, and another request behind it, and a reset in the middle.
    let many: Vec<_> = (0..60).map(|_| (0, 1 << 20)).collect();
    transmit.add(&many, &[]);
    transmit.kick();
    guest.device.reset();
    assert_eq!(guest.interrupts().reset_count(), 0);
}

fn tempdir(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("rota-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&path);
    std::fs::create_dir_all(&path).expect("a directory");
    path
}
