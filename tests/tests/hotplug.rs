//! Devices that come and go while a guest runs, and what else is asked for over the API. In the lab, or on a machine with the
//! real device.

use std::{fs, path::PathBuf, process::Command};

use rota_tests::api::Api;
use rota_tests::child::{self, Vmm};
use rota_tests::require;
use serde_json::{Value, json};

/// Waits in the guest, up to half a minute, until `condition` is true.
fn wait_until(vmm: &mut Vmm, condition: &str) {
    let command =
        format!("for i in $(seq 300); do {condition} && break; sleep 0.1; done; {condition}");
    vmm.guest_runs(&command);
}

/// An image, gone at the end of its test.
struct Image(PathBuf);

impl Image {
    fn new(name: &str) -> Self {
        let name = format!("rota-{name}-{}", std::process::id());
        let image = Self(std::env::temp_dir().join(name));
        let bytes: Vec<u8> = (0..8u32 << 20).map(|at| (at ^ at >> 7) as u8).collect();
        fs::write(&image.0, bytes).expect("an image");
        image
    }

    fn checksum(&self) -> String {
        let output = Command::new("sha256sum").arg(&self.0).output();
        let line = String::from_utf8(output.expect("sha256sum").stdout).expect("text");
        line.split_whitespace().next().expect("a sum").to_owned()
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn power_off(mut vmm: Vmm, api: &Api) {
    vmm.type_in("poweroff -f\n");
    assert_eq!(vmm.wait().code(), Some(0), "{}", vmm.printed());
    assert!(!api.path().exists(), "the socket is gone");
}

#[test]
fn a_disk_comes_and_goes_and_comes_again() {
    require!(child::bootable());
    let api = Api::new("hotplug-disk");
    let image = Image::new("hotplug-disk");
    let mut vmm = Vmm::boot_with_drivers(&["--api-socket", &api.option()]);
    // Its own word for being ready: what comes before the drivers is found by them, too.
    vmm.guest_runs("true");
    let before = descriptors(&vmm);
    let disk = json!({ "path": &image.0, "id": "data", "serial": "D-1" });
    for _ in 0..2 {
        let answer = api.put("vm.add-disk", &disk);
        assert_eq!(answer["id"], "data");
        let bdf = answer["bdf"].as_str().expect("an address").to_owned();
        assert_eq!(api.info()["device_tree"]["data"]["pci_bdf"], bdf);
        wait_until(&mut vmm, "[ -b /dev/vda ]");
        assert_eq!(vmm.guest_runs("echo $(cat /sys/block/vda/serial)"), "D-1");
        assert_eq!(
            vmm.guest_runs("sha256sum /dev/vda | cut -c1-64"),
            image.checksum(),
            "{}",
            vmm.printed()
        );
        vmm.guest_runs("dd if=/dev/urandom of=/dev/vda bs=64k count=16 conv=fsync 2>/dev/null");
        vmm.guest_runs("echo 3 > /proc/sys/vm/drop_caches");
        let sum = vmm.guest_runs("sha256sum /dev/vda | cut -c1-64");
        assert_eq!(sum, image.checksum(), "{}", vmm.printed());
        let (status, why) = api.ask("PUT", "vm.add-disk", &disk);
        assert_eq!(status, 409, "{why}");

        api.put("vm.remove-device", &json!({ "id": "data" }));
        wait_until(&mut vmm, &format!("[ ! -e /sys/bus/pci/devices/{bdf} ]"));
        wait_until(&mut vmm, "[ ! -e /sys/block/vda ]");
        let info = api.info();
        assert_eq!(info["device_tree"]["data"], Value::Null);
        assert_eq!(info["config"]["disks"], json!([]));
    }
    // The image, and the events for kicks and interrupts.
    assert_eq!(descriptors(&vmm), before, "something is left open");
    power_off(vmm, &api);
}

/// What the VMM has open, but for connections: the API's may take a moment to end.
fn descriptors(vmm: &Vmm) -> Vec<String> {
    let mut open: Vec<String> = fs::read_dir(format!("/proc/{}/fd", vmm.pid()))
        .expect("descriptors")
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .map(|target| target.display().to_string())
        .filter(|target| !target.starts_with("socket:"))
        .collect();
    open.sort();
    open
}

#[test]
fn a_network_comes_and_goes() {
    require!(child::bootable());
    require!(child::tap_interfaces());
    let api = Api::new("hotplug-net");
    let mut vmm = Vmm::boot_with_drivers(&["--api-socket", &api.option()]);
    vmm.guest_runs("true");
    let net = json!({
        "tap": "rota-hot0", "ip": "192.0.2.1", "mask": "255.255.255.0", "mac": "2e:00:00:00:00:07",
    });
    let answer = api.put("vm.add-net", &net);
    assert_eq!(answer["id"], "_net0");
    wait_until(&mut vmm, "[ -e /sys/class/net/eth0 ]");
    let address = vmm.guest_runs("cat /sys/class/net/eth0/address");
    assert_eq!(address, "2e:00:00:00:00:07", "{}", vmm.printed());
    vmm.guest_runs("ip addr add 192.0.2.2/24 dev eth0 && ip link set eth0 up");
    vmm.guest_runs("ping -c 3 -i 0.1 192.0.2.1");
    api.put("vm.remove-device", &json!({ "id": "_net0" }));
    wait_until(&mut vmm, "[ ! -e /sys/class/net/eth0 ]");
    assert_eq!(api.info()["config"]["net"], json!([]));
    assert!(!fs::exists("/sys/class/net/rota-hot0").expect("the folder"));
    power_off(vmm, &api);
}

#[test]
fn a_folder_comes_and_goes() {
    require!(child::bootable());
    let folder = format!("/tmp/rota-hot-fs-{}", std::process::id());
    let (tree, socket) = (format!("{folder}/tree"), format!("{folder}/socket"));
    fs::create_dir_all(&tree).expect("a folder");
    fs::write(format!("{tree}/from-host"), "hello guest\n").expect("a file");
    let started = child::virtiofsd(&tree, &socket).ok_or("there is no virtiofsd".to_owned());
    require!(&started);
    let api = Api::new("hotplug-fs");
    let mut vmm = Vmm::boot_with_drivers(&[
        "--api-socket",
        &api.option(),
        "--memory",
        "size=256M,shared=on",
    ]);
    vmm.guest_runs("true");
    let before = descriptors(&vmm);
    let device = json!({ "tag": "tree", "socket": &socket, "num_queues": 1, "queue_size": 256 });
    let answer = api.put("vm.add-fs", &device);
    assert_eq!(answer["id"], "_fs0");
    let bdf = answer["bdf"].as_str().expect("an address").to_owned();
    vmm.guest_runs("mkdir /tree");
    wait_until(
        &mut vmm,
        "{ grep -q virtiofs /proc/mounts || mount -t virtiofs tree /tree 2>/dev/null; }",
    );
    assert_eq!(vmm.guest_runs("cat /tree/from-host"), "hello guest");
    vmm.guest_runs("echo hello host >/tree/from-guest && umount /tree");
    let written = fs::read_to_string(format!("{tree}/from-guest")).expect("the guest's file");
    assert_eq!(written, "hello host\n");
    api.put("vm.remove-device", &json!({ "id": "_fs0" }));
    wait_until(&mut vmm, &format!("[ ! -e /sys/bus/pci/devices/{bdf} ]"));
    let info = api.info();
    assert_eq!(info["device_tree"]["_fs0"], Value::Null);
    assert_eq!(info["config"]["fs"], json!([]));
    assert_eq!(descriptors(&vmm), before, "something is left open");
    power_off(vmm, &api);
    let _ = fs::remove_dir_all(folder);
}

#[test]
fn the_machine_is_resized_and_its_buttons_are_pressed() {
    require!(child::bootable());
    let api = Api::new("buttons");
    let image = Image::new("buttons");
    let disk = format!("path={},id=root", image.0.display());
    let mut vmm = Vmm::boot_with_drivers(&[
        "--api-socket",
        &api.option(),
        "--disk",
        &disk,
        "--balloon",
        "size=0",
    ]);
    vmm.guest_runs("true");
    assert_eq!(api.info()["state"], "Running");
    api.put(
        "vm.resize-disk",
        &json!({ "id": "root", "desired_size": 16 << 20 }),
    );
    wait_until(&mut vmm, "[ $(cat /sys/block/vda/size) = 32768 ]");
    api.put("vm.resize", &json!({ "desired_balloon": 64 << 20 }));
    let total = "$(sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo)";
    wait_until(&mut vmm, &format!("[ {total} -le 450000 ]"));

    vmm.guest_runs("(dd if=/dev/input/event0 of=/tmp/event bs=24 count=1 2>/dev/null &)");
    vmm.guest_runs("sleep 1");
    api.put("vm.power-button", &Value::Null);
    wait_until(&mut vmm, "[ -s /tmp/event ]");
    // Behind the time of the event: type EV_KEY (1), code KEY_POWER (116), value 1.
    vmm.guest_runs("dd if=/tmp/event of=/tmp/key bs=8 skip=2 2>/dev/null");
    vmm.guest_runs("printf '\\001\\000\\164\\000\\001\\000\\000\\000' | cmp - /tmp/key");

    api.put("vm.reboot", &Value::Null);
    vmm.wait_for_init();
    vmm.guest_runs("[ -b /dev/vda ]");
    api.put("vm.shutdown", &Value::Null);
    assert_eq!(api.info()["state"], "Shutdown");
    api.put("vm.remove-device", &json!({ "id": "root" }));
    api.put(
        "vm.add-disk",
        &json!({ "path": "/nowhere", "id": "missing" }),
    );
    let (status, why) = api.ask("PUT", "vm.boot", &Value::Null);
    assert_eq!(status, 500, "{why}");
    assert!(why.to_string().contains("/nowhere"), "{why}");
    api.put("vm.remove-device", &json!({ "id": "missing" }));
    api.put("vm.boot", &Value::Null);
    vmm.wait_for_init();
    vmm.guest_runs("[ ! -e /dev/vda ]");
    api.put("vmm.shutdown", &Value::Null);
    assert_eq!(vmm.wait().code(), Some(0), "{}", vmm.printed());
}
