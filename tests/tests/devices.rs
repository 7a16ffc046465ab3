//! Devices as a real guest's drivers find and use them. In the lab, or on a machine with the real device.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpListener,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use rota_tests::child::{self, Vmm};
use rota_tests::require;

fn power_off(mut vmm: Vmm) {
    vmm.type_in("poweroff -f\n");
    assert_eq!(vmm.wait().code(), Some(0), "{}", vmm.printed());
}

#[test]
fn the_entropy_device_is_found_and_read() {
    require!(child::bootable());
    let mut vmm = Vmm::boot_with_drivers(&["--rng", "src=/dev/urandom"]);
    let name = vmm.guest_runs("cat /sys/class/misc/hw_random/rng_current");
    assert_eq!(name, "virtio_rng.0", "{}", vmm.printed());
    let count = vmm.guest_runs("dd if=/dev/hwrng bs=1 count=100 2>/dev/null | wc -c");
    assert_eq!(count, "100", "{}", vmm.printed());
    power_off(vmm);
}

/// What is sent through a network, longer than any segment.
fn data() -> Vec<u8> {
    (0..4u32 << 20).map(|at| (at ^ at >> 9) as u8).collect()
}

/// Has the guest fetch data from the host at `address` and send it back, and compares.
fn carries_data(vmm: &mut Vmm, address: &str) {
    let listen = || TcpListener::bind((address, 0)).expect("a listener");
    let (down, up) = (listen(), listen());
    let ports = [&down, &up].map(|listener| listener.local_addr().expect("an address").port());
    let sending = thread::spawn(move || {
        let (mut guest, _) = down.accept().expect("the guest");
        guest.write_all(&data()).expect("all is sent");
    });
    let receiving = thread::spawn(move || {
        let (mut guest, _) = up.accept().expect("the guest");
        let mut received = vec![0; data().len()];
        guest.read_exact(&mut received).expect("all comes back");
        received
    });
    vmm.guest_runs(&format!("nc {address} {} </dev/null >/tmp/data", ports[0]));
    vmm.guest_runs(&format!("nc {address} {} </tmp/data", ports[1]));
    sending.join().expect("a sender");
    assert!(receiving.join().expect("a receiver") == data(), "damaged");
}

#[test]
fn a_guest_talks_over_tap_interfaces() {
    require!(child::bootable());
    require!(child::tap_interfaces());
    let mut arguments = vec![
        "--cpus",
        "boot=2",
        "--net",
        "tap=rota-test0,ip=192.0.2.1,mac=2e:00:00:00:00:01,num_queues=4,mtu=1400",
    ];
    // The same again, with the host's kernel at work on the queues.
    let has_vhost = child::vhost_net().is_ok();
    if has_vhost {
        arguments.extend([
            "--net",
            "tap=rota-test1,ip=198.51.100.1,mac=2e:00:00:00:00:02,num_queues=4,vhost=on",
        ]);
    }
    let mut vmm = Vmm::boot_with_drivers(&arguments);
    let address = vmm.guest_runs("cat /sys/class/net/eth0/address");
    assert_eq!(address, "2e:00:00:00:00:01", "{}", vmm.printed());
    assert_eq!(vmm.guest_runs("cat /sys/class/net/eth0/mtu"), "1400");
    let queues = vmm.guest_runs("ls -d /sys/class/net/eth0/queues/rx-* | wc -l");
    assert_eq!(queues, "2", "{}", vmm.printed());
    vmm.guest_runs("ip addr add 192.0.2.2/24 dev eth0 && ip link set eth0 up");
    assert_eq!(vmm.guest_runs("cat /sys/class/net/eth0/carrier"), "1");
    vmm.guest_runs("ping -c 3 -i 0.1 192.0.2.1");
    carries_data(&mut vmm, "192.0.2.1");
    if has_vhost {
        vmm.guest_runs("ip addr add 198.51.100.2/24 dev eth1 && ip link set eth1 up");
        vmm.guest_runs("ping -c 3 -i 0.1 198.51.100.1");
        carries_data(&mut vmm, "198.51.100.1");
    }
    power_off(vmm);
    assert!(
        !std::path::Path::new("/sys/class/net/rota-test0").exists(),
        "what was made is gone"
    );
}

/// A path for a file or socket of this test's.
fn path(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("rota-{name}-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    path
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).expect("a connection");
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .expect("a timeout");
    stream
}

#[test]
fn the_console_goes_both_ways() {
    require!(child::bootable());
    let socket = path("console");
    let mut vmm = Vmm::boot_with_drivers(&["--console", &format!("socket={}", socket.display())]);
    let mut host = BufReader::new(connect(&socket));
    // Kept open: the settings of a terminal that nobody has open are forgotten.
    vmm.guest_runs("exec 3<>/dev/hvc0; stty raw -echo <&3; echo to the host >&3");
    let mut line = String::new();
    host.read_line(&mut line).expect("a line");
    assert_eq!(line.trim_end(), "to the host");
    host.get_mut().write_all(b"to the guest\n").unwrap();
    let line = vmm.guest_runs("head -n 1 <&3");
    assert_eq!(line, "to the guest", "{}", vmm.printed());
    // In order and whole. Linux gives its console sixteen bytes at a time, so much more would take long.
    vmm.type_in("seq 2000 >&3\n");
    let mut lines = host.lines();
    for number in 1..=2000 {
        let line = lines.next().expect("a line").expect("a line");
        assert_eq!(line.trim_end(), number.to_string());
    }
    power_off(vmm);
}

#[test]
fn the_balloon_takes_memory_and_tells_of_it() {
    require!(child::bootable());
    let mut vmm = Vmm::boot_with_drivers(&[
        "--memory",
        "size=512M",
        "--balloon",
        "size=256M,free_page_reporting=on",
    ]);
    // The driver inflates in its own time. With `deflate_on_oom`, Linux would not count what it can take back any time.
    let total = "sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo";
    let command = format!(
        "for i in $(seq 60); do t=$({total}); [ $t -lt 262144 ] && break; sleep 1; done; echo $t"
    );
    let left: u64 = vmm.guest_runs(&command).parse().expect("a number");
    assert!(left < 256 << 10, "{left} kB left; {}", vmm.printed());
    power_off(vmm);
}

#[test]
fn a_guest_without_a_listener_refuses_a_connection_from_the_host() {
    require!(child::bootable());
    let socket = path("vsock");
    let option = format!("cid=3,socket={}", socket.display());
    let mut vmm = Vmm::boot_with_drivers(&["--vsock", &option]);
    let bound = vmm.guest_runs("ls /sys/bus/virtio/drivers/vmw_vsock_virtio_transport");
    assert!(!bound.is_empty(), "{}", vmm.printed());
    let mut stream = connect(&socket);
    let start = Instant::now();
    stream.write_all(b"CONNECT 1000\n").unwrap();
    assert_eq!(stream.read(&mut [0]).expect("an end"), 0);
    // Without an answer of the guest's, the device would give up after ten seconds.
    assert!(start.elapsed() < Duration::from_secs(9));
    power_off(vmm);
}

#[test]
fn a_panic_is_told() {
    require!(child::bootable());
    let mut vmm = Vmm::boot_with_drivers(&["--pvpanic"]);
    vmm.guest_runs("echo 0 >/proc/sys/kernel/panic");
    vmm.type_in("echo c >/proc/sysrq-trigger\n");
    vmm.wait_for("the guest's kernel has panicked");
}

#[test]
fn a_folder_of_the_host_is_mounted() {
    require!(child::bootable());
    let folder = format!("/tmp/rota-fs-{}", std::process::id());
    let (tree, socket) = (format!("{folder}/tree"), format!("{folder}/socket"));
    fs::create_dir_all(&tree).expect("a folder");
    fs::write(format!("{tree}/from-host"), "hello guest\n").expect("a file");
    let started = child::virtiofsd(&tree, &socket).ok_or("there is no virtiofsd".to_owned());
    require!(&started);
    let mut vmm = Vmm::boot_with_drivers(&[
        "--memory",
        "size=256M,shared=on",
        "--fs",
        &format!("tag=tree,socket={socket}"),
    ]);
    vmm.guest_runs("mkdir /tree && mount -t virtiofs tree /tree");
    assert_eq!(vmm.guest_runs("cat /tree/from-host"), "hello guest");
    vmm.guest_runs("dd if=/dev/zero of=/tree/from-guest bs=64k count=16 && sync");
    let written = fs::read(format!("{tree}/from-guest")).expect("the guest's file");
    assert_eq!(written, vec![0; 1 << 20]);
    vmm.guest_runs("umount /tree && mount -t virtiofs tree /tree && rm /tree/from-guest");
    assert!(!fs::exists(format!("{tree}/from-guest")).expect("the folder"));
    power_off(vmm);
    let _ = fs::remove_dir_all(folder);
}
