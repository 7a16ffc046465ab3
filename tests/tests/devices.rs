//! Devices as a real guest's drivers find and use them. In the lab, or on a machine with the real device.

use std::{
    io::{Read, Write},
    net::TcpListener,
    thread,
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
