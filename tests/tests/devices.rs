//! Devices as a real guest's drivers find and use them. In the lab, or on a machine with the real device.

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
