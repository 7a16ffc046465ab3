//! The common configuration: features, status, and the queues while the driver sets them up (virtio 1.3, section 4.1.4.3).

use virtio_queue::{Queue, QueueT};

use super::notify::PciNotify;

const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_VECTOR: u64 = 0x10;
const NUM_QUEUES: u64 = 0x12;
const DEVICE_STATUS: u64 = 0x14;
const CONFIG_GENERATION: u64 = 0x15;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_NOTIFY_OFF: u64 = 0x1e;
const QUEUE_DESC: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;
/// Half of a register of 64 bits.
const HALF: u64 = 4;

/// `VIRTIO_F_VERSION_1`: everything else is too old for this transport.
const VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_EVENT_IDX`.
const EVENT_IDX: u64 = 1 << 29;

const FEATURES_OK: u8 = 8;
const DRIVER_OK: u8 = 4;

/// What a write asks of the device.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    Nothing,
    Reset,
    Activate,
}

/// The registers.
pub(super) struct Common {
    offered: u64,
    accepted: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    status: u8,
    queue_select: u16,
    sizes: Vec<u16>,
    queues: Vec<Queue>,
}

impl Common {
    /// For a device with these features, its rings' among them, and queues of these sizes.
    pub(super) fn new(features: u64, sizes: &[u16]) -> Self {
        Self {
            offered: features | VERSION_1,
            accepted: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            status: 0,
            queue_select: 0,
            sizes: sizes.to_vec(),
            queues: new_queues(sizes),
        }
    }

    pub(super) fn reset(&mut self) {
        *self = Self::new(self.offered, &self.sizes);
    }

    /// What both sides agreed on.
    pub(super) fn features(&self) -> u64 {
        self.accepted
    }

    /// The queues that the driver has enabled, once; they are the device's from then on.
    pub(super) fn take_queues(&mut self) -> Vec<Option<Queue>> {
        let event_idx = self.accepted & EVENT_IDX != 0;
        self.queues
            .iter_mut()
            .map(|queue| {
                let mut taken = Queue::new(queue.max_size()).ok()?;
                if !queue.ready() {
                    return None;
                }
                // The registers go on showing what the driver has written.
                let halves = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
                taken.set_size(queue.size());
                let (low, high) = halves(queue.desc_table());
                taken.set_desc_table_address(low, high);
                let (low, high) = halves(queue.avail_ring());
                taken.set_avail_ring_address(low, high);
                let (low, high) = halves(queue.used_ring());
                taken.set_used_ring_address(low, high);
                taken.set_event_idx(event_idx);
                taken.set_ready(true);
                Some(taken)
            })
            .collect()
    }

    fn queue(&self) -> Option<&Queue> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// Fills `data` from `offset`. Registers have one, two or four bytes; another access than to the whole of one, or to half
    /// of one of eight, reads as zero.
    pub(super) fn read(&self, offset: u64, data: &mut [u8], notify: &PciNotify) {
        let (value, width) = self.register(offset, notify);
        let bytes = value.to_le_bytes();
        data.fill(0);
        if data.len() <= width {
            data.copy_from_slice(&bytes[..data.len()]);
        }
    }

    /// The value at `offset`, and how many bytes of it can be read from there.
    fn register(&self, offset: u64, notify: &PciNotify) -> (u64, usize) {
        let half = |word: u64, select: u32| match select {
            0 => word & 0xffff_ffff,
            1 => word >> 32,
            _ => 0,
        };
        let queue = |read: fn(&Queue) -> u64| self.queue().map_or(0, read);
        match offset {
            DEVICE_FEATURE_SELECT => (self.device_feature_select.into(), 4),
            DEVICE_FEATURE => (half(self.offered, self.device_feature_select), 4),
            DRIVER_FEATURE_SELECT => (self.driver_feature_select.into(), 4),
            DRIVER_FEATURE => (half(self.accepted, self.driver_feature_select), 4),
            CONFIG_VECTOR => (notify.read_vector(None).into(), 2),
            NUM_QUEUES => (self.queues.len() as u64, 2),
            DEVICE_STATUS => ((self.status | notify.trouble()).into(), 1),
            CONFIG_GENERATION => (notify.generation().into(), 1),
            QUEUE_SELECT => (self.queue_select.into(), 2),
            QUEUE_SIZE => (queue(|queue| queue.size().into()), 2),
            QUEUE_VECTOR => (notify.read_vector(Some(self.queue_select)).into(), 2),
            QUEUE_ENABLE => (queue(|queue| queue.ready().into()), 2),
            QUEUE_NOTIFY_OFF => (self.queue().map_or(0, |_| self.queue_select.into()), 2),
            QUEUE_DESC => (queue(Queue::desc_table), 8),
            QUEUE_DRIVER => (queue(Queue::avail_ring), 8),
            QUEUE_DEVICE => (queue(Queue::used_ring), 8),
            offset if offset == QUEUE_DESC + HALF => (queue(Queue::desc_table) >> 32, 4),
            offset if offset == QUEUE_DRIVER + HALF => (queue(Queue::avail_ring) >> 32, 4),
            offset if offset == QUEUE_DEVICE + HALF => (queue(Queue::used_ring) >> 32, 4),
            _ => (0, 8),
        }
    }

    /// Takes a write at `offset`. What is not a whole register, or half of one of eight bytes, is ignored.
    pub(super) fn write(&mut self, offset: u64, data: &[u8], notify: &PciNotify) -> Step {
        match *data {
            [byte] => return self.write_byte(offset, byte),
            [a, b] => self.write_word(offset, u16::from_le_bytes([a, b]), notify),
            [a, b, c, d] => self.write_dword(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => {
                self.write_dword(offset, u32::from_le_bytes([a, b, c, d]));
                self.write_dword(offset + HALF, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
        Step::Nothing
    }

    fn write_byte(&mut self, offset: u64, value: u8) -> Step {
        if offset != DEVICE_STATUS {
            return Step::Nothing;
        }
        if value == 0 {
            return Step::Reset;
        }
        let before = self.status;
        self.status |= value;
        // Features that were not offered, or none at all: the driver sees that its bit is not there.
        let acceptable = self.accepted & !self.offered == 0 && self.accepted & VERSION_1 != 0;
        if before & FEATURES_OK == 0 && !acceptable {
            self.status &= !FEATURES_OK;
        }
        let ready = FEATURES_OK | DRIVER_OK;
        if before & DRIVER_OK == 0 && self.status & ready == ready {
            return Step::Activate;
        }
        // Without the features there is nothing that a driver could be ready for.
        if self.status & FEATURES_OK == 0 {
            self.status &= !DRIVER_OK;
        }
        Step::Nothing
    }

    fn write_word(&mut self, offset: u64, value: u16, notify: &PciNotify) {
        match offset {
            CONFIG_VECTOR => notify.write_vector(None, value),
            QUEUE_SELECT => self.queue_select = value,
            QUEUE_VECTOR => notify.write_vector(Some(self.queue_select), value),
            QUEUE_SIZE => self.set_up(|queue| queue.set_size(value)),
            QUEUE_ENABLE if value == 1 => self.set_up(|queue| queue.set_ready(true)),
            _ => {}
        }
    }

    fn write_dword(&mut self, offset: u64, value: u32) {
        let (low, high) = (Some(value), None);
        match offset {
            DEVICE_FEATURE_SELECT => self.device_feature_select = value,
            DRIVER_FEATURE_SELECT => self.driver_feature_select = value,
            DRIVER_FEATURE => self.accept(value),
            QUEUE_DESC => self.set_up(|queue| queue.set_desc_table_address(low, high)),
            QUEUE_DRIVER => self.set_up(|queue| queue.set_avail_ring_address(low, high)),
            QUEUE_DEVICE => self.set_up(|queue| queue.set_used_ring_address(low, high)),
            offset if offset == QUEUE_DESC + HALF => {
                self.set_up(|queue| queue.set_desc_table_address(None, Some(value)));
            }
            offset if offset == QUEUE_DRIVER + HALF => {
                self.set_up(|queue| queue.set_avail_ring_address(None, Some(value)));
            }
            offset if offset == QUEUE_DEVICE + HALF => {
                self.set_up(|queue| queue.set_used_ring_address(None, Some(value)));
            }
            _ => {}
        }
    }

    /// Once the driver has said that this is all, its features stay.
    fn accept(&mut self, value: u32) {
        if self.status & FEATURES_OK != 0 {
            return;
        }
        let value = u64::from(value);
        match self.driver_feature_select {
            0 => self.accepted = self.accepted & !0xffff_ffff | value,
            1 => self.accepted = self.accepted & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    /// Changes the selected queue, for as long as the driver has not enabled it.
    fn set_up(&mut self, change: impl FnOnce(&mut Queue)) {
        if self.status & DRIVER_OK != 0 {
            return;
        }
        let queue = self.queues.get_mut(usize::from(self.queue_select));
        if let Some(queue) = queue.filter(|queue| !queue.ready()) {
            change(queue);
        }
    }
}

fn new_queues(sizes: &[u16]) -> Vec<Queue> {
    sizes
        .iter()
        .map(|size| Queue::new(*size).expect("a queue size is a power of two"))
        .collect()
}
