//! Configuration space from the driver's side, through both ways.

use std::sync::Mutex;

use super::*;
use crate::BusDevice;

/// Answers reads with the low byte of each register and remembers writes.
#[derive(Default)]
struct Echo(Mutex<Vec<(u16, Vec<u8>)>>);

impl PciFunction for Echo {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        for (index, byte) in (0u16..).zip(data) {
            *byte = (offset + index) as u8;
        }
    }
    fn config_write(&self, offset: u16, data: &[u8]) {
        self.0.lock().unwrap().push((offset, data.to_vec()));
    }
}

const ECHO: Slot = Slot {
    device: 31,
    function: 7,
};

fn bus() -> (Arc<Echo>, Arc<PciBus>) {
    let echo = Arc::new(Echo::default());
    let bus = PciBus::default();
    let root = Slot {
        device: 0,
        function: 0,
    };
    bus.insert(root, Arc::new(HostBridge)).unwrap();
    bus.insert(ECHO, echo.clone()).unwrap();
    (echo, Arc::new(bus))
}

fn ecam_offset(device: u64, function: u64, register: u64) -> u64 {
    device << 15 | function << 12 | register
}

#[test]
fn the_host_bridge_is_found_both_ways() {
    let (_, bus) = bus();
    let ecam = Ecam::new(bus.clone());
    let mut id = [0; 4];
    ecam.read(0, &mut id);
    assert_eq!(u32::from_le_bytes(id), 0x0008_1b36);

    let ports = ConfigPorts::new(bus);
    ports.write(0, &0x8000_0008u32.to_le_bytes());
    let mut address = [0; 4];
    ports.read(0, &mut address);
    assert_eq!(u32::from_le_bytes(address), 0x8000_0008);
    let mut class = [0; 2];
    ports.read(6, &mut class);
    assert_eq!(u16::from_le_bytes(class), CLASS_HOST);
}

const CLASS_HOST: u16 = 0x0600;

#[test]
fn absent_functions_read_all_ones() {
    let (_, bus) = bus();
    let ecam = Ecam::new(bus.clone());
    let ports = ConfigPorts::new(bus);
    for (device, function) in [(0, 1), (1, 0), (31, 6)] {
        let mut data = [0; 4];
        ecam.read(ecam_offset(device, function, 0), &mut data);
        assert_eq!(data, [0xff; 4]);
        ecam.write(ecam_offset(device, function, 4), &data);
        let address = 0x8000_0000 | (device as u32) << 11 | (function as u32) << 8;
        ports.write(0, &address.to_le_bytes());
        let mut data = [0; 2];
        ports.read(4, &mut data);
        assert_eq!(data, [0xff; 2]);
        ports.write(4, &data);
    }
}

#[test]
fn other_buses_and_a_closed_port_read_all_ones() {
    let (echo, bus) = bus();
    let ports = ConfigPorts::new(bus);
    for address in [0x0000_ff00u32, 0x8001_ff00, 0x80ff_ff00] {
        ports.write(0, &address.to_le_bytes());
        let mut data = [0; 4];
        ports.read(4, &mut data);
        assert_eq!(data, [0xff; 4]);
        ports.write(4, &data);
    }
    assert_eq!(*echo.0.lock().unwrap(), []);
}

#[test]
fn registers_are_reached_in_any_width() {
    let (echo, bus) = bus();
    let ports = ConfigPorts::new(bus.clone());
    ports.write(0, &0x8000_ff43u32.to_le_bytes());
    for (offset, expected) in [
        (4, &[0x40u8, 0x41, 0x42, 0x43][..]),
        (5, &[0x41]),
        (6, &[0x42, 0x43]),
    ] {
        let mut data = vec![0; expected.len()];
        ports.read(offset, &mut data);
        assert_eq!(data, expected);
        ports.write(offset, expected);
    }
    let ecam = Ecam::new(bus);
    ecam.write(ecam_offset(31, 7, 0xffe), &[1, 2]);
    let writes = echo.0.lock().unwrap();
    assert_eq!(
        *writes,
        [
            (0x40, vec![0x40, 0x41, 0x42, 0x43]),
            (0x41, vec![0x41]),
            (0x42, vec![0x42, 0x43]),
            (0xffe, vec![1, 2]),
        ]
    );
}

#[test]
fn narrow_accesses_do_not_touch_the_address() {
    let (_, bus) = bus();
    let ports = ConfigPorts::new(bus);
    ports.write(0, &0x8000_ff00u32.to_le_bytes());
    ports.write(3, &[0x01]);
    ports.write(0, &[0x00, 0x00]);
    ports.write(0, &[0; 8]);
    let mut data = [0; 4];
    ports.read(0, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0x8000_ff00);
    for (offset, width) in [(0, 1), (0, 2), (1, 4), (3, 8), (0, 0)] {
        let mut data = vec![0; width];
        ports.read(offset, &mut data);
        assert_eq!(data, vec![0xff; width]);
    }
}

#[test]
fn an_access_ends_with_its_function() {
    let (echo, bus) = bus();
    let ecam = Ecam::new(bus);
    let mut data = [0; 8];
    ecam.read(ecam_offset(31, 7, 0xffe), &mut data);
    assert_eq!(data, [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    ecam.write(ecam_offset(31, 7, 0xfff), &[1, 2, 3, 4]);
    assert_eq!(*echo.0.lock().unwrap(), [(0xfff, vec![1])]);
    for width in 0..=16 {
        for offset in [0, 1, 0xffd, 0xfff, 0x1000, Ecam::LENGTH - 1, u64::MAX] {
            ecam.read(offset, &mut vec![0; width]);
            ecam.write(offset, &vec![0; width]);
        }
    }
}

#[test]
fn the_host_bridge_cannot_be_changed() {
    let (_, bus) = bus();
    let ecam = Ecam::new(bus);
    let mut before = [0; 256];
    ecam.read(0, &mut before);
    ecam.write(0, &[0xff; 256]);
    let mut after = [0; 256];
    ecam.read(0, &mut after);
    assert_eq!(before, after);
    assert_eq!(before[0x10..], [0; 0xf0]);
    let mut extended = [0; 8];
    ecam.read(0xfc, &mut extended);
    assert_eq!(extended, [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
}

#[test]
fn slots_are_given_once() {
    let (_, _) = bus();
    let bus = PciBus::default();
    let slot = Slot {
        device: 1,
        function: 0,
    };
    bus.insert(slot, Arc::new(HostBridge)).unwrap();
    let error = bus.insert(slot, Arc::new(HostBridge)).unwrap_err();
    assert_eq!(error.to_string(), "PCI slot 01.0 is taken");
    for slot in [
        Slot {
            device: 32,
            function: 0,
        },
        Slot {
            device: 0,
            function: 8,
        },
        Slot {
            device: 255,
            function: 255,
        },
    ] {
        let error = bus.insert(slot, Arc::new(HostBridge)).unwrap_err();
        assert_eq!(error, PciError::NoSuchSlot(slot));
    }
}
