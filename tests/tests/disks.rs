//! Disks as a real guest uses them: what it reads is what is in the image, and what it has written and flushed is, too. In
//! the lab, or on a machine with the real device.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use imago::{
    FormatAccess, FormatCreateBuilder, FormatDriverBuilder, Storage, StorageCreateOptions,
    file::File, qcow2::Qcow2,
};
use rota_tests::child::{self, Background, Vmm};
use rota_tests::require;

const SIZE: usize = 8 << 20;

/// Images of a test, gone at its end.
struct Images(PathBuf);

impl Images {
    fn new(test: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("rota-{test}-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A raw image with bytes that differ from place to place.
    fn raw(&self, name: &str) -> Vec<u8> {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let bytes: Vec<u8> = (0..SIZE / 8)
            .flat_map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_le_bytes()
            })
            .collect();
        fs::write(self.path(name), &bytes).expect("an image");
        bytes
    }

    /// An empty qcow2 image.
    fn qcow2(&self, name: &str) {
        let options = StorageCreateOptions::new().filename(self.path(name));
        let file = File::create_open(options).expect("a file");
        Qcow2::<File>::create_builder(file)
            .size(SIZE as u64)
            .create()
            .expect("an image");
    }

    fn qcow2_contents(&self, name: &str) -> Vec<u8> {
        let image = Qcow2::<File>::builder_path(self.path(name))
            .open(imago::PermissiveImplicitOpenGate::default())
            .expect("an image");
        let mut bytes = vec![0; SIZE];
        FormatAccess::new(image)
            .read(&mut bytes[..], 0)
            .expect("its data");
        bytes
    }

    fn checksum(&self, name: &str) -> String {
        let output = Command::new("sha256sum")
            .arg(self.path(name))
            .output()
            .expect("sha256sum");
        let line = String::from_utf8(output.stdout).expect("text");
        line.split_whitespace().next().expect("a sum").to_owned()
    }

    fn disk(&self, name: &str, options: &str) -> String {
        format!("path={}{options}", self.path(name).display())
    }
}

impl Drop for Images {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn power_off(mut vmm: Vmm) {
    vmm.type_in("poweroff -f\n");
    assert_eq!(vmm.wait().code(), Some(0), "{}", vmm.printed());
}

#[test]
fn what_a_guest_reads_and_writes_is_in_the_images() {
    require!(child::bootable());
    let images = Images::new("disks");
    let original = images.raw("raw");
    images.raw("read-only");
    images.qcow2("qcow2");
    let mut vmm = Vmm::boot_with_drivers(&[
        "--cpus",
        "boot=2",
        "--disk",
        &images.disk("raw", ",num_queues=2,serial=R-1,image_type=raw"),
        "--disk",
        &images.disk("qcow2", ",id=second"),
        "--disk",
        &images.disk(
            "read-only",
            ",readonly=on,ops_size=1000,ops_refill_time=100",
        ),
    ]);
    assert_eq!(vmm.guest_runs("cat /sys/block/vda/size"), "16384");
    assert_eq!(vmm.guest_runs("echo $(cat /sys/block/vda/serial)"), "R-1");
    assert_eq!(
        vmm.guest_runs("echo $(cat /sys/block/vdb/serial)"),
        "second"
    );
    assert_eq!(vmm.guest_runs("ls /sys/block/vda/mq | wc -l"), "2");
    assert_eq!(vmm.guest_runs("cat /sys/block/vda/ro"), "0");
    assert_eq!(vmm.guest_runs("cat /sys/block/vdc/ro"), "1");
    assert_eq!(
        vmm.guest_runs("cat /sys/block/vda/queue/write_cache"),
        "write back"
    );
    let sum = vmm.guest_runs("sha256sum /dev/vda | cut -c1-64");
    assert_eq!(sum, images.checksum("raw"), "{}", vmm.printed());
    assert_eq!(vmm.guest_runs("sha256sum /dev/vdc | cut -c1-64"), sum);
    vmm.guest_runs("dd if=/dev/vda of=/dev/vdb bs=96k conv=fsync 2>/dev/null");
    vmm.guest_runs(
        "dd if=/dev/urandom of=/dev/vda bs=4k count=300 seek=77 conv=fsync,notrunc 2>/dev/null",
    );
    vmm.guest_runs("echo 3 > /proc/sys/vm/drop_caches");
    let sum = vmm.guest_runs("sha256sum /dev/vda | cut -c1-64");
    let copied = vmm.guest_runs("cmp /dev/vdb /dev/vdc && echo same");
    assert_eq!(copied, "same", "{}", vmm.printed());
    // While the guest runs: what it has flushed is there already.
    assert_eq!(images.checksum("raw"), sum);
    let raw = fs::read(images.path("raw")).expect("the image");
    assert!(raw[..77 * 4096] == original[..77 * 4096]);
    assert!(raw[377 * 4096..] == original[377 * 4096..]);
    assert!(raw != original);
    power_off(vmm);
    assert!(images.qcow2_contents("qcow2") == original);
}

#[test]
fn disks_of_a_group_have_their_limits_in_common() {
    require!(child::bootable());
    let images = Images::new("group");
    images.raw("first");
    images.raw("second");
    let mut vmm = Vmm::boot_with_drivers(&[
        "--rate-limit-group",
        "id=slow,bw_size=1048576,bw_refill_time=1000",
        "--disk",
        &images.disk("first", ",rate_limit_group=slow"),
        "--disk",
        &images.disk("second", ",rate_limit_group=slow"),
    ]);
    // 8 MiB, of which one may be there from the start. With limits of their own, the disks would take half as long.
    let read = |disk: &str| {
        format!("dd if=/dev/{disk} of=/dev/null bs=64k count=64 iflag=direct 2>/dev/null &")
    };
    let uptime = "$(cut -d. -f1 /proc/uptime)";
    let (first, second) = (read("vda"), read("vdb"));
    let command = format!("s={uptime}; {first} {second} wait; echo $(({uptime} - s))");
    let seconds: u64 = vmm.guest_runs(&command).parse().expect("a number");
    assert!((6..60).contains(&seconds), "{seconds} s");
    power_off(vmm);
}

#[test]
fn an_image_that_another_machine_writes_is_refused() {
    require!(child::bootable());
    let images = Images::new("locks");
    images.raw("raw");
    let disk = images.disk("raw", "");
    let first = Vmm::boot_with_drivers(&["--disk", &disk]);
    let mut second = Vmm::boot("rota.then=poweroff", &["--disk", &disk]);
    assert_eq!(second.wait().code(), Some(1), "{}", second.printed());
    let printed = second.printed();
    assert!(printed.contains("rota: _disk0: disk image "), "{printed}");
    assert!(printed.contains("is in use elsewhere"), "{printed}");
    power_off(first);
}

/// QEMU's program that serves a raw image to other processes, at `socket`; `None` where there is none.
fn storage_daemon(image: &Path, socket: &Path) -> Option<Background> {
    let (image, socket) = (image.display(), socket.display());
    Background::start(
        Command::new("qemu-storage-daemon")
            .args(["--blockdev", &format!("driver=file,node-name=disk,filename={image}")])
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=export,addr.type=unix,addr.path={socket},node-name=disk,writable=on"
            )),
    )
}

#[test]
fn a_disk_that_another_process_serves() {
    require!(child::bootable());
    let images = Images::new("served");
    images.raw("raw");
    let socket = images.path("socket");
    let daemon = storage_daemon(&images.path("raw"), &socket);
    let daemon = daemon.ok_or("there is no qemu-storage-daemon".to_owned());
    require!(&daemon);
    let mut vmm = Vmm::boot_with_drivers(&[
        "--memory",
        "size=256M,shared=on",
        "--disk",
        &format!("vhost_user=on,socket={}", socket.display()),
    ]);
    assert_eq!(vmm.guest_runs("cat /sys/block/vda/size"), "16384");
    let sum = vmm.guest_runs("sha256sum /dev/vda | cut -c1-64");
    assert_eq!(sum, images.checksum("raw"), "{}", vmm.printed());
    vmm.guest_runs(
        "dd if=/dev/urandom of=/dev/vda bs=4k count=300 seek=77 conv=fsync,notrunc 2>/dev/null",
    );
    vmm.guest_runs("echo 3 > /proc/sys/vm/drop_caches");
    let sum = vmm.guest_runs("sha256sum /dev/vda | cut -c1-64");
    assert_eq!(images.checksum("raw"), sum);
    power_off(vmm);
}
