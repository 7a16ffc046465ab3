//! Which of the frames on the wire are for the guest: its address, and what its driver has asked for through the control
//! queue (virtio 1.3, sections 5.1.6.5.1 to 5.1.6.5.3).

use super::mac::MacAddr;

/// The most addresses of a kind that are told apart; a driver that asks for more gets all of the kind.
const MOST_ADDRESSES: usize = 64;
/// VLANs there are.
const VLANS: u16 = 4096;
/// The type of a frame with a VLAN tag.
const TAGGED: [u8; 2] = [0x81, 0x00];

/// A mode of receiving that the driver can turn on and off, by the number of its command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Mode {
    /// All frames.
    Promiscuous,
    /// All frames for groups.
    AllMulticast,
    /// All frames for single stations.
    AllUnicast,
    /// No frames for groups.
    NoMulticast,
    /// No frames for single stations.
    NoUnicast,
    /// No frames for all stations.
    NoBroadcast,
}

impl Mode {
    pub(super) fn from_command(command: u8) -> Option<Self> {
        Some(match command {
            0 => Self::Promiscuous,
            1 => Self::AllMulticast,
            2 => Self::AllUnicast,
            3 => Self::NoMulticast,
            4 => Self::NoUnicast,
            5 => Self::NoBroadcast,
            _ => return None,
        })
    }
}

/// Addresses the driver has asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Addresses {
    /// Just these.
    These(Vec<MacAddr>),
    /// So many that no list is kept.
    All,
}

impl Addresses {
    /// Room for `count` addresses.
    pub(super) fn with_capacity(count: usize) -> Self {
        if count > MOST_ADDRESSES {
            Self::All
        } else {
            Self::These(Vec::with_capacity(count))
        }
    }

    pub(super) fn add(&mut self, address: MacAddr) {
        if let Self::These(list) = self {
            list.push(address);
        }
    }

    fn has(&self, address: MacAddr) -> bool {
        match self {
            Self::These(list) => list.contains(&address),
            Self::All => true,
        }
    }
}

/// What is let through to the guest.
#[derive(Clone, Debug)]
pub struct Filter {
    address: MacAddr,
    modes: u8,
    unicast: Addresses,
    multicast: Addresses,
    /// A bit for each VLAN; `None` where the driver leaves them alone.
    vlans: Option<Box<[u64; VLANS as usize / 64]>>,
}

impl Filter {
    /// A filter that lets everything through until the driver says otherwise.
    #[must_use]
    pub fn open(address: MacAddr) -> Self {
        Self {
            address,
            modes: 1 << Mode::Promiscuous as u8,
            unicast: Addresses::These(Vec::new()),
            multicast: Addresses::These(Vec::new()),
            vlans: None,
        }
    }

    /// Lets only those VLANs through that the driver names.
    pub(super) fn name_vlans(&mut self) {
        self.vlans = Some(Box::new([0; VLANS as usize / 64]));
    }

    pub(super) fn set_address(&mut self, address: MacAddr) {
        self.address = address;
    }

    pub(super) fn set_mode(&mut self, mode: Mode, on: bool) {
        self.modes &= !(1 << mode as u8);
        self.modes |= u8::from(on) << mode as u8;
    }

    pub(super) fn set_addresses(&mut self, unicast: Addresses, multicast: Addresses) {
        self.unicast = unicast;
        self.multicast = multicast;
    }

    /// Names a VLAN, or no longer. Returns whether there is such a VLAN.
    pub(super) fn set_vlan(&mut self, vlan: u16, on: bool) -> bool {
        let Some(vlans) = self.vlans.as_mut().filter(|_| vlan < VLANS) else {
            return false;
        };
        let (word, bit) = (&mut vlans[usize::from(vlan / 64)], vlan % 64);
        *word &= !(1 << bit);
        *word |= u64::from(on) << bit;
        true
    }

    /// Whether there is no need to look at frames at all.
    pub(super) fn is_open(&self) -> bool {
        self.has(Mode::Promiscuous)
    }

    /// Whether a frame that begins like this is for the guest.
    pub(super) fn passes(&self, frame: &[u8; 16]) -> bool {
        if self.is_open() {
            return true;
        }
        if frame[12..14] == TAGGED && !self.has_vlan(u16::from_be_bytes([frame[14], frame[15]])) {
            return false;
        }
        let [a, b, c, d, e, f, ..] = *frame;
        let to = MacAddr([a, b, c, d, e, f]);
        if to == MacAddr::BROADCAST {
            !self.has(Mode::NoBroadcast)
        } else if to.is_group() {
            !self.has(Mode::NoMulticast) && (self.has(Mode::AllMulticast) || self.multicast.has(to))
        } else {
            !self.has(Mode::NoUnicast)
                && (self.has(Mode::AllUnicast) || to == self.address || self.unicast.has(to))
        }
    }

    fn has(&self, mode: Mode) -> bool {
        self.modes & (1 << mode as u8) != 0
    }

    fn has_vlan(&self, tag: u16) -> bool {
        let vlan = tag % VLANS;
        self.vlans
            .as_ref()
            .is_none_or(|vlans| vlans[usize::from(vlan / 64)] & (1 << (vlan % 64)) != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
    const OTHER: MacAddr = MacAddr([2, 0, 0, 0, 0, 2]);
    const GROUP: MacAddr = MacAddr([1, 0, 0x5e, 0, 0, 1]);

    fn frame(to: MacAddr, vlan: Option<u16>) -> [u8; 16] {
        let mut frame = [0; 16];
        frame[..6].copy_from_slice(&to.0);
        if let Some(vlan) = vlan {
            frame[12..14].copy_from_slice(&TAGGED);
            frame[14..].copy_from_slice(&vlan.to_be_bytes());
        }
        frame
    }

    /// What passes of: the own address, another one, a group, all.
    fn passed(filter: &Filter) -> [bool; 4] {
        [OWN, OTHER, GROUP, MacAddr::BROADCAST].map(|to| filter.passes(&frame(to, None)))
    }

    #[test]
    fn modes_and_addresses() {
        let mut filter = Filter::open(OWN);
        assert_eq!(passed(&filter), [true; 4]);
        filter.set_mode(Mode::Promiscuous, false);
        assert_eq!(passed(&filter), [true, false, false, true]);
        for (mode, expected) in [
            (Mode::AllMulticast, [true, false, true, true]),
            (Mode::AllUnicast, [true, true, false, true]),
            (Mode::NoUnicast, [false, false, false, true]),
            (Mode::NoBroadcast, [true, false, false, false]),
        ] {
            filter.set_mode(mode, true);
            assert_eq!(passed(&filter), expected, "{mode:?}");
            filter.set_mode(mode, false);
        }
        let these = |address| Addresses::These(vec![address]);
        filter.set_addresses(these(OTHER), these(GROUP));
        assert_eq!(passed(&filter), [true; 4]);
        filter.set_mode(Mode::NoMulticast, true);
        assert_eq!(passed(&filter), [true, true, false, true]);
        filter.set_address(MacAddr([2, 0, 0, 0, 0, 3]));
        assert_eq!(passed(&filter), [false, true, false, true]);
    }

    #[test]
    fn too_many_addresses_are_all() {
        let mut many = Addresses::with_capacity(MOST_ADDRESSES + 1);
        many.add(OTHER);
        assert_eq!(many, Addresses::All);
        let mut filter = Filter::open(OWN);
        filter.set_mode(Mode::Promiscuous, false);
        filter.set_addresses(many, Addresses::with_capacity(0));
        assert_eq!(passed(&filter), [true, true, false, true]);
    }

    #[test]
    fn vlans_by_name() {
        let mut filter = Filter::open(OWN);
        filter.set_mode(Mode::Promiscuous, false);
        assert!(filter.passes(&frame(OWN, Some(7))));
        assert!(!filter.set_vlan(7, true), "nobody wants to name them");
        filter.name_vlans();
        assert!(!filter.passes(&frame(OWN, Some(7))));
        assert!(filter.passes(&frame(OWN, None)));
        assert!(filter.set_vlan(7, true) && filter.set_vlan(4095, true));
        // The priority in the tag does not matter.
        assert!(filter.passes(&frame(OWN, Some(0xe007))));
        assert!(filter.passes(&frame(OWN, Some(4095))));
        assert!(!filter.passes(&frame(OTHER, Some(7))));
        assert!(filter.set_vlan(7, false));
        assert!(!filter.passes(&frame(OWN, Some(7))));
        assert!(!filter.set_vlan(4096, true));
    }
}
