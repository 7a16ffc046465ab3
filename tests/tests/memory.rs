//! Memory beyond RAM: files as persistent memory, and memory that comes and goes. In the lab, or on a machine with the real
//! device.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use rota_tests::api::Api;
use rota_tests::child::{self, Vmm};
use rota_tests::image::Image;
use rota_tests::require;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// Prints how much memory the guest has, in KiB.
const TOTAL: &str = "sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo";

/// Waits in the guest, up to a minute, until `condition` is true.
fn wait_until(vmm: &mut Vmm, condition: &str) {
    vmm.guest_waits_until(condition, Duration::from_secs(60));
}

fn checksum_in_guest(vmm: &mut Vmm, device: &str) -> String {
    vmm.guest_runs("echo 3 > /proc/sys/vm/drop_caches");
    vmm.guest_runs(&format!("sha256sum {device} | cut -c1-64"))
}

fn scribble(vmm: &mut Vmm, device: &str) {
    vmm.guest_runs(&format!(
        "dd if=/dev/urandom of={device} bs=4k count=100 seek=77 conv=fsync,notrunc 2>/dev/null"
    ));
}

fn power_off(mut vmm: Vmm) {
    vmm.type_in("poweroff -f\n");
    assert_eq!(vmm.wait().code(), Some(0), "{}", vmm.printed());
}

#[test]
fn files_are_persistent_memory() {
    require!(child::bootable());
    let (kept, discarded) = (Image::new("pmem-kept"), Image::new("pmem-discarded"));
    let original = discarded.checksum();
    let mut vmm = Vmm::boot_with_drivers(&[
        "--pmem",
        &format!("file={}", kept.path().display()),
        "--pmem",
        &format!(
            "file={},size=4M,discard_writes=on",
            discarded.path().display()
        ),
    ]);
    wait_until(&mut vmm, "[ -b /dev/pmem0 -a -b /dev/pmem1 ]");
    assert_eq!(vmm.guest_runs("cat /sys/block/pmem0/size"), "16384");
    assert_eq!(vmm.guest_runs("cat /sys/block/pmem1/size"), "8192");
    let sum = checksum_in_guest(&mut vmm, "/dev/pmem0");
    assert_eq!(sum, kept.checksum(), "{}", vmm.printed());
    scribble(&mut vmm, "/dev/pmem0");
    let changed = checksum_in_guest(&mut vmm, "/dev/pmem0");
    assert_ne!(changed, sum);
    assert_eq!(changed, kept.checksum(), "{}", vmm.printed());

    let sum = checksum_in_guest(&mut vmm, "/dev/pmem1");
    scribble(&mut vmm, "/dev/pmem1");
    assert_ne!(checksum_in_guest(&mut vmm, "/dev/pmem1"), sum);
    assert_eq!(discarded.checksum(), original);

    // A file system that programs map without a copy in the guest.
    vmm.guest_runs("mke2fs -b 4096 /dev/pmem0 >/dev/null 2>&1 && mkdir /data");
    vmm.guest_runs(
        "mount -t ext4 -o dax /dev/pmem0 /data && grep -q 'dax.* /data\\|/data .*dax' /proc/mounts",
    );
    vmm.guest_runs("echo kept >/data/file && umount /data");
    let sum = checksum_in_guest(&mut vmm, "/dev/pmem0");
    assert_eq!(sum, kept.checksum(), "{}", vmm.printed());
    power_off(vmm);
}

#[test]
fn persistent_memory_comes_and_goes() {
    require!(child::bootable());
    let api = Api::new("hotplug-pmem");
    let image = Image::new("hotplug-pmem");
    let mut vmm = Vmm::boot_with_drivers(&["--api-socket", &api.option()]);
    vmm.guest_runs("true");
    let before = open_and_mapped(&vmm);
    let pmem = json!({ "file": image.path(), "id": "data" });
    for _ in 0..2 {
        let answer = api.put("vm.add-pmem", &pmem);
        let bdf = answer["bdf"].as_str().expect("an address").to_owned();
        wait_until(&mut vmm, "[ -b /dev/pmem0 ]");
        let sum = checksum_in_guest(&mut vmm, "/dev/pmem0");
        assert_eq!(sum, image.checksum(), "{}", vmm.printed());
        scribble(&mut vmm, "/dev/pmem0");
        let sum = checksum_in_guest(&mut vmm, "/dev/pmem0");
        assert_eq!(sum, image.checksum(), "{}", vmm.printed());
        let (status, why) = api.ask("PUT", "vm.add-pmem", &json!({ "file": image.path() }));
        assert_eq!(status, 500, "{why}");
        assert!(why.to_string().contains("in use elsewhere"), "{why}");

        api.put("vm.remove-device", &json!({ "id": "data" }));
        wait_until(&mut vmm, &format!("[ ! -e /sys/bus/pci/devices/{bdf} ]"));
        wait_until(&mut vmm, "[ ! -e /dev/pmem0 ]");
        let info = api.info();
        assert_eq!(info["device_tree"]["data"], Value::Null);
        assert_eq!(info["config"]["pmem"], json!([]));
    }
    assert_eq!(open_and_mapped(&vmm), before, "something is left");
    power_off(vmm);
}

/// How many descriptors the VMM has that are no connections, and whether it has the test's file mapped.
fn open_and_mapped(vmm: &Vmm) -> (usize, bool) {
    let process = format!("/proc/{}", vmm.pid());
    let open = fs::read_dir(format!("{process}/fd"))
        .expect("descriptors")
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .filter(|target| !target.to_string_lossy().starts_with("socket:"))
        .count();
    let maps = fs::read_to_string(format!("{process}/maps")).expect("mappings");
    (open, maps.contains("rota-hotplug-pmem"))
}

/// Bytes of the VMM that are in the host's memory, the guest's among them.
fn resident(vmm: &Vmm) -> u64 {
    let text = fs::read_to_string(format!("/proc/{}/statm", vmm.pid())).expect("statm");
    let pages = text.split(' ').nth(1).expect("a number");
    pages.parse::<u64>().expect("a number") * 4096
}

/// Has the guest keep `mib` MiB in its memory, as a file in /more, and checks that they are what was written.
fn fill(vmm: &mut Vmm, mib: u32) {
    let room = mib + 100;
    vmm.guest_runs("dd if=/dev/urandom of=/part bs=1M count=1 2>/dev/null");
    vmm.guest_runs(&format!(
        "mkdir /more && mount -t tmpfs -o size={room}m tmpfs /more"
    ));
    let parts = format!("(for i in $(seq {mib}); do cat /part; done)");
    vmm.guest_runs(&format!("{parts} >/more/data"));
    let sum = vmm.guest_runs("md5sum </more/data");
    assert_eq!(sum, vmm.guest_runs(&format!("{parts} | md5sum")));
}

#[test]
fn memory_comes_and_goes() {
    require!(child::bootable());
    let api = Api::new("hotplug-memory");
    let image = Image::new("hotplug-memory");
    let mut vmm = Vmm::boot_with_drivers(&[
        "--api-socket",
        &api.option(),
        "--disk",
        &format!("path={}", image.path().display()),
        "--memory",
        "size=256M,hotplug_method=virtio-mem,hotplug_size=512M",
    ]);
    vmm.guest_runs("echo online_movable >/sys/devices/system/memory/auto_online_blocks");
    let at_start: u64 = vmm.guest_runs(TOTAL).parse().expect("a number");
    assert_eq!(api.info()["memory_actual_size"], 256 * MIB);

    api.put("vm.resize", &json!({ "desired_ram": 512 * MIB }));
    let more = at_start + (256 << 10);
    wait_until(&mut vmm, &format!("[ $({TOTAL}) -ge {more} ]"));
    assert_eq!(api.info()["memory_actual_size"], 512 * MIB);
    let before = resident(&vmm);
    // Linux prefers memory that can go for what can be moved.
    fill(&mut vmm, 120);
    let full = resident(&vmm);
    assert!(full > before + 100 * MIB, "{before} bytes, then {full}");
    vmm.guest_runs("rm /more/data");
    // Devices reach it, too: what is read ends up there.
    let sum = checksum_in_guest(&mut vmm, "/dev/vda");
    assert_eq!(sum, image.checksum(), "{}", vmm.printed());

    api.put("vm.resize", &json!({ "desired_ram": 256 * MIB }));
    wait_until(&mut vmm, &format!("[ $({TOTAL}) -le {at_start} ]"));
    assert_eq!(api.info()["memory_actual_size"], 256 * MIB);
    let left = resident(&vmm);
    assert!(left + 100 * MIB < full, "{full} bytes, then {left}");

    // What was asked for last is asked for again.
    api.put("vm.resize", &json!({ "desired_ram": 320 * MIB }));
    api.put("vm.reboot", &Value::Null);
    vmm.wait_for_init();
    let deadline = Instant::now() + child::patience();
    while api.info()["memory_actual_size"] != 320 * MIB {
        assert!(Instant::now() < deadline, "{}", vmm.printed());
        thread::sleep(Duration::from_millis(200));
    }
    vmm.guest_runs("true");
    power_off(vmm);
}

#[test]
fn memory_modules_come_and_stay() {
    require!(child::bootable());
    let api = Api::new("hotplug-modules");
    let mut vmm = Vmm::boot_with_drivers(&[
        "--api-socket",
        &api.option(),
        "--memory",
        "size=256M,hotplug_size=1G",
    ]);
    let online = "echo online >/sys/devices/system/memory/auto_online_blocks";
    vmm.guest_runs(online);
    let at_start: u64 = vmm.guest_runs(TOTAL).parse().expect("a number");
    let has = |mib: u64| format!("[ $({TOTAL}) -ge {} ]", at_start + (mib << 10) - 4096);
    for (mib, more) in [(384, 128), (640, 384)] {
        api.put("vm.resize", &json!({ "desired_ram": mib * MIB }));
        assert_eq!(api.info()["memory_actual_size"], mib * MIB);
        wait_until(&mut vmm, &has(more));
    }
    let before = resident(&vmm);
    fill(&mut vmm, 300);
    let full = resident(&vmm);
    assert!(full > before + 200 * MIB, "{before} bytes, then {full}");

    let (status, why) = api.ask("PUT", "vm.resize", &json!({ "desired_ram": 256 * MIB }));
    assert_eq!(status, 501, "{why}");
    let (status, why) = api.ask("PUT", "vm.resize", &json!({ "desired_ram": 1408 * MIB }));
    assert_eq!(status, 400, "{why}");

    api.put("vm.reboot", &Value::Null);
    vmm.wait_for_init();
    assert_eq!(api.info()["memory_actual_size"], 640 * MIB);
    // What is there when the guest starts is offline until somebody says so.
    vmm.guest_runs("for block in /sys/devices/system/memory/memory*; do echo online >$block/state; done 2>/dev/null; true");
    wait_until(&mut vmm, &has(384));
    power_off(vmm);
}
