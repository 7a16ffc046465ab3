//! Devices that come and go while a guest runs, and what else is asked for over the API. In the lab, or on a machine with the
//! real device.

use std::{
    fs,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use rota_tests::api::Api;
use rota_tests::child::{self, Vmm};
use rota_tests::image::Image;
use rota_tests::require;
use serde_json::{Map, Value, json};

/// Waits in the guest, up to half a minute, until `condition` is true.
fn wait_until(vmm: &mut Vmm, condition: &str) {
    vmm.guest_waits_until(condition, Duration::from_secs(30));
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
    let disk = json!({ "path": image.path(), "id": "data", "serial": "D-1" });
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
        let (_, counters) = api.ask("GET", "vm.counters", &Value::Null);
        let counted = &counters["data"];
        assert!(
            counted["read_bytes"].as_u64() >= Some(1 << 20),
            "{counters}"
        );
        assert_eq!(counted["write_bytes"], 1 << 20, "{counters}");
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

#[test]
fn the_bus_is_filled_and_emptied() {
    require!(child::bootable());
    let api = Api::new("hotplug-full");
    let image = Image::new("hotplug-full");
    let mut vmm = Vmm::boot_with_drivers(&["--api-socket", &api.option()]);
    vmm.guest_runs("true");
    let before = descriptors(&vmm);
    let there = api.info()["device_tree"].as_object().map_or(0, Map::len);
    // One of the bus's 32 slots is the host bridge's.
    let room = 31 - there;
    let disk =
        |number| json!({ "path": image.path(), "readonly": true, "id": format!("d{number}") });
    for number in 0..room {
        api.put("vm.add-disk", &disk(number));
    }
    let (status, why) = api.ask("PUT", "vm.add-disk", &disk(room));
    assert_eq!(status, 500, "{why}");
    wait_until(
        &mut vmm,
        &format!("[ $(ls -d /sys/block/vd* | wc -l) = {room} ]"),
    );
    let last = "sha256sum /dev/$(ls /sys/block | grep vd | tail -n 1) | cut -c1-64";
    assert_eq!(vmm.guest_runs(last), image.checksum());
    for number in 0..room {
        api.put("vm.remove-device", &json!({ "id": format!("d{number}") }));
    }
    wait_until(&mut vmm, "[ $(ls /sys/block | grep -c vd) = 0 ]");
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
    let disk = format!("path={},id=root", image.path().display());
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

/// The VMM's threads that run vCPUs, with the CPUs they may run on.
fn vcpu_threads(vmm: &Vmm) -> Vec<(String, String)> {
    let tasks = fs::read_dir(format!("/proc/{}/task", vmm.pid())).expect("threads");
    let mut found: Vec<(String, String)> = tasks
        .filter_map(|task| {
            let path = task.ok()?.path();
            let name = fs::read_to_string(path.join("comm")).ok()?;
            let status = fs::read_to_string(path.join("status")).ok()?;
            let mut lines = status.lines();
            let cpus = lines.find_map(|line| line.strip_prefix("Cpus_allowed_list:\t"))?;
            Some((name.trim().to_owned(), cpus.to_owned()))
        })
        .filter(|(name, _)| name.starts_with("vcpu"))
        .collect();
    found.sort();
    found
}

/// Waits, here, until `condition` is true.
fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + child::patience();
    while !condition() {
        assert!(Instant::now() < deadline, "it does not come to {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn resize(api: &Api, vcpus: u32) {
    api.put("vm.resize", &json!({ "desired_vcpus": vcpus }));
}

/// Brings a processor up that has come, and has something run there.
fn runs_on(vmm: &mut Vmm, cpu: u32) {
    let online = format!("/sys/devices/system/cpu/cpu{cpu}/online");
    wait_until(vmm, &format!("[ -e {online} ]"));
    vmm.guest_runs(&format!("echo 1 > {online} && [ $(cat {online}) = 1 ]"));
    // Behind the name in parentheses, field 37 is the processor that the process ran on last.
    let mask = 1 << cpu;
    let there = "read -r all </proc/self/stat; set -- ${all##*) }; echo ${37}";
    let command = format!("taskset {mask:x} sh -c '{there}'");
    assert_eq!(vmm.guest_runs(&command), cpu.to_string());
}

fn is_gone(vmm: &mut Vmm, cpu: u32) {
    wait_until(vmm, &format!("[ ! -e /sys/devices/system/cpu/cpu{cpu} ]"));
}

#[test]
fn vcpus_come_and_go_and_come_again() {
    require!(child::bootable());
    let api = Api::new("hotplug-vcpus");
    let cpus = ["--cpus", "boot=1,max=3"];
    let mut vmm =
        Vmm::boot_with_drivers(&[&["--api-socket", api.option().as_str()], &cpus[..]].concat());
    vmm.guest_runs("true");
    for (asked, why) in [(4, "1 to 3"), (0, "1 to 3")] {
        let (status, answer) = api.ask("PUT", "vm.resize", &json!({ "desired_vcpus": asked }));
        assert_eq!(status, 400, "{answer}");
        assert!(answer.to_string().contains(why), "{answer}");
    }
    let mut settled = None;
    for _ in 0..2 {
        resize(&api, 3);
        until("three threads", || vcpu_threads(&vmm).len() == 3);
        let cpus = json!({ "boot_vcpus": 3, "max_vcpus": 3 });
        assert_eq!(api.info()["config"]["cpus"], cpus);
        runs_on(&mut vmm, 1);
        runs_on(&mut vmm, 2);
        assert_eq!(
            vmm.guest_runs("cat /sys/devices/system/cpu/online"),
            "0-2",
            "{}",
            vmm.printed()
        );
        resize(&api, 1);
        is_gone(&mut vmm, 2);
        is_gone(&mut vmm, 1);
        until("one thread", || vcpu_threads(&vmm).len() == 1);
        // Their VPs rest: nothing takes one out of a partition.
        let open = descriptors(&vmm);
        assert_eq!(*settled.get_or_insert(open.clone()), open);
    }
    // A start anew finds as many as were asked for last.
    resize(&api, 2);
    api.put("vm.reboot", &Value::Null);
    assert_eq!(vmm.wait_for_init().cpus, 2);
    vmm.guest_runs("true");
    resize(&api, 3);
    runs_on(&mut vmm, 2);
    power_off(vmm, &api);
}

/// What is asked for before the guest has a driver, it finds, or is told when it has one.
#[test]
fn vcpus_can_be_asked_for_while_the_guest_boots() {
    require!(child::bootable());
    let api = Api::new("vcpus-boot");
    let mut command = child::run(child::rota(), "vmlinuz-cloud", "rota.then=shell");
    command.args(["--cpus", "boot=1,max=3", "--api-socket", &api.option()]);
    let mut vmm = Vmm::start(&mut command);
    until("a socket", || api.path().exists());
    resize(&api, 3);
    resize(&api, 2);
    vmm.wait_for_init();
    vmm.guest_runs("true");
    runs_on(&mut vmm, 1);
    is_gone(&mut vmm, 2);
    until("two threads", || vcpu_threads(&vmm).len() == 2);
    power_off(vmm, &api);
}

/// A folder of the test's own for ledger, report and metrics.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("rota-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        Self(folder)
    }

    fn path(&self, file: &str) -> String {
        self.0.join(file).display().to_string()
    }

    fn json(&self, file: &str) -> Value {
        let text = fs::read_to_string(self.0.join(file)).unwrap_or_default();
        serde_json::from_str(&text).unwrap_or_default()
    }

    /// What the ledger has of the only machine in it.
    fn plan(&self) -> Value {
        let entries = self.json("ledger.json")["entries"].clone();
        assert_eq!(entries.as_array().map(Vec::len), Some(1), "{entries}");
        entries[0]["plan"].clone()
    }

    fn planned_cpus(&self) -> Vec<String> {
        let plan = self.plan();
        let vcpus = plan["vcpus"].as_array().expect("vCPUs");
        vcpus
            .iter()
            .map(|vcpu| vcpu["cpus"].as_str().expect("CPUs").to_owned())
            .collect()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A guest under `launcher` with up to three vCPUs, its shell waiting, whose scheduling is asked for.
fn scheduled(launcher: Command, api: &Api, folder: &Folder, sched: &str) -> Vmm {
    let mut command = child::run(launcher, "vmlinuz-cloud", "rota.then=shell");
    command
        .args(["--cpus", "boot=1,max=3", "--memory", "size=256M"])
        .args(["--api-socket", &api.option(), "--sched", sched])
        .args(["--ledger", &folder.path("ledger.json")])
        .args(["--metrics", &folder.path("metrics.json")])
        .args(["--report", &folder.path("report.json")]);
    let mut vmm = Vmm::start(&mut command);
    vmm.wait_for_init();
    vmm.guest_runs("true");
    vmm
}

fn ends_with_a_report(mut vmm: Vmm, folder: &Folder) -> Value {
    vmm.signal(libc::SIGTERM);
    assert_eq!(vmm.wait().code(), Some(0), "{}", vmm.printed());
    let report = folder.json("report.json");
    let metered = report["metering"]["vcpus"].as_array().expect("vCPUs");
    assert_eq!(
        metered.len(),
        3,
        "those that have gone are counted: {report}"
    );
    for vcpu in metered {
        let ran = vcpu["run_ns"].as_u64();
        assert!(ran.is_some_and(|ns| ns > 0), "{vcpu}");
    }
    report
}

/// Where Linux schedules, a vCPU that comes is planned, placed, written down, watched and metered as one that was there.
#[test]
fn vcpus_that_come_are_scheduled_like_the_others() {
    require!(child::bootable());
    if std::thread::available_parallelism().map_or(1, usize::from) != 2 {
        return rota_tests::requires::skip("takes two processors");
    }
    let (api, folder) = (Api::new("vcpus-sched"), Folder::new("vcpus-sched"));
    let sched = "placement=map,map=[1@[1]],weight=200";
    let mut vmm = scheduled(child::rota(), &api, &folder, sched);
    assert_eq!(
        folder.planned_cpus(),
        ["0-1"],
        "shared: nothing is said of vCPU 0"
    );
    resize(&api, 3);
    runs_on(&mut vmm, 1);
    runs_on(&mut vmm, 2);
    let planned = folder.planned_cpus();
    assert_eq!(planned, ["0-1", "1", "0-1"]);
    let placed: Vec<String> = vcpu_threads(&vmm)
        .into_iter()
        .map(|(_, cpus)| cpus)
        .collect();
    assert_eq!(placed, planned);
    // Somebody moves vCPU 1, and it is moved back.
    let thread = thread_of(&vmm, "vcpu1");
    // SAFETY: a set on the stack with one CPU, and its size.
    let moved = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(0, &mut set);
        libc::sched_setaffinity(thread, size_of_val(&set), &raw const set)
    };
    assert_eq!(moved, 0);
    until("vCPU 1 being back", || vcpu_threads(&vmm)[1].1 == "1");
    until("three metered", || {
        let metered = folder.json("metrics.json")["vcpus"].clone();
        (0..3).all(|vcpu| metered[vcpu]["run_ns"].as_u64().is_some_and(|ns| ns > 0))
    });
    resize(&api, 1);
    until("one planned", || folder.plan()["request"]["vcpus"] == 1);
    assert_eq!(vcpu_threads(&vmm).len(), 1);
    let report = ends_with_a_report(vmm, &folder);
    assert_eq!(report["vcpus"], 1);
    assert_eq!(report["plan"]["request"]["vcpus"], 1);
}

fn thread_of(vmm: &Vmm, name: &str) -> i32 {
    let tasks = fs::read_dir(format!("/proc/{}/task", vmm.pid())).expect("threads");
    let found = tasks.filter_map(Result::ok).find(|task| {
        fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim() == name)
    });
    let task = found.expect("a thread of that name").file_name();
    let number = task.to_str().and_then(|number| number.parse().ok());
    number.expect("a number")
}

/// What there is no place for does not come, and changes nothing.
#[test]
fn vcpus_that_cannot_be_placed_are_refused() {
    require!(child::bootable());
    let (api, folder) = (Api::new("vcpus-refused"), Folder::new("vcpus-refused"));
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    if processors > 2 {
        return rota_tests::requires::skip("takes at most two processors");
    }
    let mut vmm = scheduled(child::rota(), &api, &folder, "overcommit=1");
    let (before, threads) = (folder.plan(), vcpu_threads(&vmm));
    let (status, why) = api.ask("PUT", "vm.resize", &json!({ "desired_vcpus": 3 }));
    assert_eq!(status, 409, "{why}");
    assert!(why.to_string().contains("keeps its 1 vCPUs"), "{why}");
    assert_eq!(folder.plan(), before);
    assert_eq!(vcpu_threads(&vmm), threads);
    assert_eq!(api.info()["config"]["cpus"]["boot_vcpus"], 1);
    is_gone(&mut vmm, 1);
}

/// Where the hypervisor schedules, what it takes is told it anew: it caps each VP, not the VM.
#[test]
fn vcpus_that_come_share_what_the_hypervisor_was_told() {
    require!(child::bootable());
    require!(child::softmshv());
    let (api, folder) = (Api::new("vcpus-core"), Folder::new("vcpus-core"));
    let launcher = child::under_softmshv(&["--scheduler", "core"], child::rota_program());
    let mut vmm = scheduled(launcher, &api, &folder, "weight=200,cap=90%,reserve=300m");
    resize(&api, 3);
    runs_on(&mut vmm, 1);
    runs_on(&mut vmm, 2);
    assert_eq!(folder.plan()["request"]["vcpus"], 3);
    let report = ends_with_a_report(vmm, &folder);
    let effects = report["effects"].to_string();
    for property in ["CpuWeight = 200", "CpuCap = 19661", "CpuReserve = 6554"] {
        assert!(effects.contains(property), "{property}: {effects}");
    }
}
