//! A Debian with systemd on a disk, made from Debian's packages, worked with by its own programs: what most guests are. In the lab,
//! or on a machine with the real device.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use rota_tests::api::Api;
use rota_tests::child::{self, Background, Vmm};
use rota_tests::require;
use serde_json::json;

/// What systemd gets to start a Debian in the lab, where everything is emulated twice.
const BOOT: Duration = Duration::from_secs(300);

/// An image, gone at the end of its test.
struct Image(PathBuf);

impl Image {
    fn path(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("rota-{}-{name}", std::process::id()))
    }

    /// A copy of what all tests boot, without room for what is zero.
    fn copy_of(name: &str) -> Self {
        let path = Self::path(name);
        let mut from = File::open(child::guest(name)).expect("an image");
        let mut to = File::create(&path).expect("an image");
        let mut piece = vec![0; 1 << 20];
        let mut length = 0;
        while let count @ 1.. = from.read(&mut piece).expect("an image") {
            if piece[..count].iter().any(|byte| *byte != 0) {
                to.seek(SeekFrom::Start(length)).expect("a place");
                to.write_all(&piece[..count]).expect("room");
            }
            length += count as u64;
        }
        to.set_len(length).expect("a size");
        Self(path)
    }

    /// Nothing yet.
    fn empty(name: &str, size: u64) -> Self {
        let path = Self::path(name);
        let image = File::create(&path).expect("an image");
        image.set_len(size).expect("a size");
        Self(path)
    }

    fn as_path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Boots Debian from a disk.
fn debian(image: &Image, kind: &str, arguments: &[&str]) -> Vmm {
    let disk = format!("path={},image_type={kind}", image.as_path().display());
    let mut vmm = Vmm::boot_from_disk(&disk, arguments);
    log_in(&mut vmm);
    vmm
}

/// Logs in on the console, when systemd has come so far.
fn log_in(vmm: &mut Vmm) {
    vmm.wait_longer_for("Debian GNU/Linux", BOOT);
    vmm.wait_for_prompt("login: ");
    vmm.type_in("root\n");
    vmm.wait_for_prompt("Password: ");
    vmm.type_in("rota\n");
    vmm.wait_for_prompt(":~# ");
    // A shell that adds nothing to what is typed.
    vmm.type_in("exec env PS1= sh\n");
    // What the one before tells the terminal stands in front of the first line.
    vmm.guest_runs("echo");
    let state = vmm.guest_runs("systemctl is-system-running --wait");
    assert_eq!(state, "running", "{}", vmm.printed());
}

fn power_off(mut vmm: Vmm) {
    vmm.type_in("poweroff\n");
    assert_eq!(vmm.wait().code(), Some(0), "{}", vmm.printed());
}

/// Has fio write a file or device in no order and compare what it reads with what it has written.
fn fio_verifies(vmm: &mut Vmm, file: &str) {
    vmm.guest_runs(&format!(
        "fio --name=verify --filename={file} --size=6M --rw=randwrite --bs=4k --iodepth=16 --ioengine=libaio --direct=1 \
         --verify=crc32c --verify_fatal=1 --minimal >/dev/null"
    ));
}

/// Debian's iperf3, run by this machine.
fn iperf3_server() -> Background {
    let folder = child::guest("iperf3");
    let loader = fs::read_dir(&folder)
        .expect("iperf3")
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.to_string_lossy().contains("/ld-linux"))
        .expect("a dynamic loader");
    let server = Background::start(
        Command::new(loader)
            .arg("--library-path")
            .arg(&folder)
            .arg(folder.join("iperf3"))
            .arg("--server"),
    );
    server.expect("iperf3")
}

#[test]
fn debian_on_a_raw_disk_works_on_it_and_over_a_network() {
    require!(child::bootable());
    require!(child::tap_interfaces());
    let image = Image::copy_of("debian.raw");
    let net = "tap=rota-debian,ip=203.0.113.1,mask=255.255.255.0,num_queues=4";
    let mut vmm = debian(
        &image,
        "raw",
        &["--cpus", "boot=2", "--memory", "size=512M", "--net", net],
    );
    assert_eq!(vmm.guest_runs("nproc"), "2");
    let root = vmm.guest_runs("echo $(findmnt -no SOURCE,FSTYPE /)");
    assert_eq!(root, "/dev/vda ext4", "{}", vmm.printed());
    fio_verifies(&mut vmm, "/root/fio");

    vmm.guest_runs(
        "dev=$(ls /sys/class/net | grep -v lo); ip addr add 203.0.113.2/24 dev $dev && ip link set $dev up && \
         ping -c 2 -i 0.2 203.0.113.1",
    );
    let server = iperf3_server();
    vmm.guest_runs("for i in $(seq 50); do iperf3 -c 203.0.113.1 -n 16M && break; sleep 0.2; done");
    vmm.guest_runs("iperf3 -c 203.0.113.1 -n 16M -R");
    drop(server);

    // There, and back again.
    let data: Vec<u8> = (0..6u32 << 20).map(|at| (at ^ at >> 11) as u8).collect();
    let listen = || TcpListener::bind(("203.0.113.1", 0)).expect("a listener");
    let (down, up) = (listen(), listen());
    let ports = [&down, &up].map(|it| it.local_addr().expect("an address").port());
    let sent = data.clone();
    let sending = thread::spawn(move || down.accept().expect("the guest").0.write_all(&sent));
    let receiving = thread::spawn(move || {
        let mut received = Vec::new();
        up.accept()
            .expect("the guest")
            .0
            .read_to_end(&mut received)
            .map(|_| received)
    });
    vmm.guest_runs(&format!(
        "bash -c 'cat </dev/tcp/203.0.113.1/{} >/root/data'",
        ports[0]
    ));
    vmm.guest_runs("sync; echo 3 >/proc/sys/vm/drop_caches");
    vmm.guest_runs(&format!(
        "bash -c 'cat /root/data >/dev/tcp/203.0.113.1/{}'",
        ports[1]
    ));
    sending.join().expect("a sender").expect("all is sent");
    let received = receiving
        .join()
        .expect("a receiver")
        .expect("all comes back");
    assert!(received == data, "damaged");
    power_off(vmm);
}

#[test]
fn debian_on_a_qcow2_disk_keeps_what_it_writes() {
    require!(child::bootable());
    let image = Image::copy_of("debian.qcow2");
    let extra = Image::empty("extra.raw", 32 << 20);
    let api = Api::new("debian");
    let mut vmm = debian(
        &image,
        "qcow2",
        &["--memory", "size=512M", "--api-socket", &api.option()],
    );
    fio_verifies(&mut vmm, "/root/fio");
    vmm.guest_runs("head -c 8M /dev/urandom >/root/data");
    let sum = vmm.guest_runs("sha256sum </root/data");

    // A disk that comes, gets a file system and a copy, goes, and comes again.
    let disk = json!({ "path": extra.as_path(), "id": "extra", "image_type": "Raw" });
    let present =
        "for i in $(seq 300); do [ -b /dev/vdb ] && break; sleep 0.1; done; [ -b /dev/vdb ]";
    api.put("vm.add-disk", &disk);
    vmm.guest_runs(present);
    vmm.guest_runs(
        "mkfs.ext4 -q /dev/vdb && mount /dev/vdb /mnt && cp /root/data /mnt && umount /mnt",
    );
    api.put("vm.remove-device", &json!({ "id": "extra" }));
    for _ in 0..300 {
        if api.info()["device_tree"]["extra"].is_null() {
            break;
        }
        thread::sleep(Duration::from_millis(100));
    }
    api.put("vm.add-disk", &disk);
    vmm.guest_runs(present);
    vmm.guest_runs("e2fsck -fn /dev/vdb && mount -o ro /dev/vdb /mnt");
    assert_eq!(
        vmm.guest_runs("sha256sum </mnt/data"),
        sum,
        "{}",
        vmm.printed()
    );
    vmm.guest_runs("umount /mnt");

    vmm.type_in("reboot\n");
    log_in(&mut vmm);
    assert_eq!(
        vmm.guest_runs("sha256sum </root/data"),
        sum,
        "{}",
        vmm.printed()
    );
    power_off(vmm);
}
