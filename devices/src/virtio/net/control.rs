//! The control queue (virtio 1.3, section 5.1.6.5): what the driver asks of the device itself.

use std::{io, sync::Arc};

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MAC,
    VIRTIO_NET_CTRL_MAC_ADDR_SET, VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_VLAN,
    VIRTIO_NET_CTRL_VLAN_ADD, VIRTIO_NET_CTRL_VLAN_DEL, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA,
    VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_MQ,
};
use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};

use super::{
    super::{Buffers, Chain, DeviceError, Handler, Poll, VirtQueue},
    features,
    filter::{Addresses, Filter, Mode},
    mac::MacAddr,
    shared::Shared,
};

/// The answer to a command that was carried out.
const OK: u8 = 0;
/// The answer to one that was not.
const ERR: u8 = 1;
/// Where the data of a command begins: behind class and number.
const DATA: usize = 2;

const KICK: u64 = 0;
const FAULT: u64 = 1;

/// The pairs of queues, as far as the driver can change anything about them.
pub(super) trait Pairs: Send + Sync {
    /// How many pairs the driver has set up.
    fn count(&self) -> usize;

    /// Uses the first `count` pairs, of those there are.
    fn use_first(&self, count: usize) -> io::Result<()>;

    /// The driver takes frames with these offloads (`VIRTIO_NET_F_GUEST_*`).
    fn set_offloads(&self, features: u64) -> io::Result<()>;
}

/// A command that is not carried out.
struct Refused;

/// The thread of the control queue.
pub(super) struct Control {
    queue: Option<(VirtQueue, Chain)>,
    /// Written to when a back end in the kernel cannot go on.
    faults: Vec<EventFd>,
    /// What the driver has agreed to.
    agreed: u64,
    pairs: Arc<dyn Pairs>,
    shared: Arc<Shared>,
}

impl Control {
    pub(super) fn new(
        queue: Option<VirtQueue>,
        faults: Vec<EventFd>,
        agreed: u64,
        pairs: Arc<dyn Pairs>,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            queue: queue.map(|queue| {
                let chain = queue.chain();
                (queue, chain)
            }),
            faults,
            agreed,
            pairs,
            shared,
        }
    }

    fn carry_out(&self, command: &Buffers) -> Result<(), Refused> {
        let [class, number] = command.array_at(0).ok_or(Refused)?;
        match (u32::from(class), u32::from(number)) {
            (VIRTIO_NET_CTRL_RX, _) => self.set_mode(number, command),
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET) => self.set_addresses(command),
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET) => self.set_address(command),
            (VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD) => self.set_vlan(command, true),
            (VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_DEL) => self.set_vlan(command, false),
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => self.use_pairs(command),
            (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET) => {
                self.set_offloads(command)
            }
            _ => Err(Refused),
        }
    }

    fn set_mode(&self, number: u8, command: &Buffers) -> Result<(), Refused> {
        let mode = Mode::from_command(number).ok_or(Refused)?;
        self.need(match mode {
            Mode::Promiscuous | Mode::AllMulticast => VIRTIO_NET_F_CTRL_RX,
            Mode::AllUnicast | Mode::NoMulticast | Mode::NoUnicast | Mode::NoBroadcast => {
                VIRTIO_NET_F_CTRL_RX_EXTRA
            }
        })?;
        let [on] = command.array_at(DATA).ok_or(Refused)?;
        self.change_filter(|filter| filter.set_mode(mode, on != 0));
        Ok(())
    }

    fn set_addresses(&self, command: &Buffers) -> Result<(), Refused> {
        self.need(VIRTIO_NET_F_CTRL_RX)?;
        let (unicast, end) = addresses_at(command, DATA)?;
        let (multicast, _) = addresses_at(command, end)?;
        self.change_filter(|filter| filter.set_addresses(unicast, multicast));
        Ok(())
    }

    fn set_address(&self, command: &Buffers) -> Result<(), Refused> {
        self.need(VIRTIO_NET_F_CTRL_MAC_ADDR)?;
        let address = MacAddr(command.array_at(DATA).ok_or(Refused)?);
        self.shared.set_address(address);
        self.change_filter(|filter| filter.set_address(address));
        Ok(())
    }

    fn set_vlan(&self, command: &Buffers, on: bool) -> Result<(), Refused> {
        self.need(VIRTIO_NET_F_CTRL_VLAN)?;
        let vlan = u16::from_le_bytes(command.array_at(DATA).ok_or(Refused)?);
        let mut exists = false;
        self.change_filter(|filter| exists = filter.set_vlan(vlan, on));
        exists.then_some(()).ok_or(Refused)
    }

    fn use_pairs(&self, command: &Buffers) -> Result<(), Refused> {
        self.need(VIRTIO_NET_F_MQ)?;
        let count = u16::from_le_bytes(command.array_at(DATA).ok_or(Refused)?).into();
        if !(1..=self.pairs.count()).contains(&count) {
            return Err(Refused);
        }
        self.pairs.use_first(count).map_err(|error| {
            tracing::warn!("cannot use {count} pairs of queues: {error}");
            Refused
        })
    }

    fn set_offloads(&self, command: &Buffers) -> Result<(), Refused> {
        self.need(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)?;
        let offloads = u64::from_le_bytes(command.array_at(DATA).ok_or(Refused)?);
        if offloads & !(self.agreed & features::GUEST_OFFLOADS) != 0 {
            return Err(Refused);
        }
        self.pairs.set_offloads(offloads).map_err(|error| {
            tracing::warn!("cannot change the offloads: {error}");
            Refused
        })
    }

    fn need(&self, feature: u32) -> Result<(), Refused> {
        (self.agreed & (1 << feature) != 0)
            .then_some(())
            .ok_or(Refused)
    }

    fn change_filter(&self, change: impl FnOnce(&mut Filter)) {
        let mut filter = Filter::clone(&self.shared.filter.load());
        change(&mut filter);
        self.shared.filter.store(Arc::new(filter));
    }
}

impl Handler for Control {
    fn start(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        let kick = self.queue.iter().map(|(queue, _)| (queue.kick(), KICK));
        let faults = self.faults.iter().map(|fault| (fault, FAULT));
        for (event, token) in kick.chain(faults) {
            poll.add_bell(event, token)
                .map_err(DeviceError::host("cannot wait for the driver"))?;
        }
        Ok(())
    }

    fn ready(&mut self, token: u64, _events: EventSet, _poll: &Poll) -> Result<(), DeviceError> {
        if token == FAULT {
            return Err(DeviceError::Malformed("a queue that the kernel refuses"));
        }
        let Some((mut queue, mut chain)) = self.queue.take() else {
            return Ok(());
        };
        // One command at a time: a driver waits for the answer before it asks for more.
        let found = queue.pop(&mut chain)?;
        if found {
            let answer = match self.carry_out(&chain.readable) {
                Ok(()) => OK,
                Err(Refused) => ERR,
            };
            if chain.writable.write_at(0, &[answer]) == 0 {
                return Err(DeviceError::Malformed(
                    "a command without room for the answer",
                ));
            }
            queue.push(chain.head(), 1)?;
            queue.signal()?;
        }
        if queue.enable_kicks()? {
            queue.come_back();
        }
        self.queue = Some((queue, chain));
        Ok(())
    }
}

/// A table of addresses in `command` at `offset`, and where it ends.
fn addresses_at(command: &Buffers, offset: usize) -> Result<(Addresses, usize), Refused> {
    const ADDRESS: usize = 6;
    let count = u32::from_le_bytes(command.array_at(offset).ok_or(Refused)?) as usize;
    let first = offset + 4;
    let end = count
        .checked_mul(ADDRESS)
        .and_then(|length| length.checked_add(first))
        .filter(|end| *end <= command.len())
        .ok_or(Refused)?;
    let mut addresses = Addresses::with_capacity(count);
    if matches!(addresses, Addresses::These(_)) {
        for at in (first..end).step_by(ADDRESS) {
            addresses.add(MacAddr(command.array_at(at).ok_or(Refused)?));
        }
    }
    Ok((addresses, end))
}
