//! The feature bits of a network device (virtio 1.3, section 5.1.3), in groups.

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS,
};

/// The features with these bit numbers.
const fn mask(bits: &[u32]) -> u64 {
    let (mut mask, mut index) = (0, 0);
    while index < bits.len() {
        mask |= 1 << bits[index];
        index += 1;
    }
    mask
}

/// What each device offers.
pub(super) const ALWAYS: u64 = mask(&[
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_CTRL_MAC_ADDR,
]);

/// What the device can do where it sees the frames.
pub(super) const FILTERS: u64 = mask(&[
    VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA,
    VIRTIO_NET_F_CTRL_VLAN,
]);

/// Checksums, both ways.
pub const CHECKSUM: u64 = mask(&[VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM]);

/// TCP segmentation, both ways. Needs checksums.
pub const TSO: u64 = mask(&[
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
]);

/// UDP fragmentation, both ways. Needs checksums.
pub const UFO: u64 = mask(&[VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_GUEST_UFO]);

/// UDP segmentation, both ways. Needs checksums.
pub const USO: u64 = mask(&[
    VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
]);

/// What makes frames for the guest larger than the wire's.
pub(super) const GUEST_SEGMENTS: u64 = mask(&[
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
]);

/// What the driver can turn on and off through the control queue.
pub(super) const GUEST_OFFLOADS: u64 = GUEST_SEGMENTS | mask(&[VIRTIO_NET_F_GUEST_CSUM]);

/// That it can.
pub(super) const SWITCHES_OFFLOADS: u64 = mask(&[VIRTIO_NET_F_CTRL_GUEST_OFFLOADS]);
