//! The PCI transport as a driver meets it: through configuration space and BAR alone.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex},
};

use devices::{
    BusDevice,
    ioapic::Msi,
    pci::{Ecam, PciBus, Range, Slot, Window, msix::Vectors},
    virtio::{
        pci::{BAR_LENGTH, Doorbells, Environment, VirtioPci},
        rng::Rng,
    },
};
use driver::{Interrupts, Raw, Ring};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const WINDOW: Range = Range {
    start: 0xc000_0000,
    length: 0x1000_0000,
};
const FIRST_ADDRESS: u32 = 0xc100_0000;
const SLOT: u64 = 3;

/// What the machine was asked for.
#[derive(Default)]
struct Machine {
    routes: Mutex<BTreeMap<u16, Msi>>,
    doorbells: Mutex<BTreeMap<u64, EventFd>>,
}

struct TestVectors(Arc<Machine>, Vec<EventFd>);

impl Vectors for TestVectors {
    fn set_route(&self, vector: u16, route: Option<Msi>) -> io::Result<()> {
        let mut routes = self.0.routes.lock().unwrap();
        match route {
            Some(msi) => routes.insert(vector, msi),
            None => routes.remove(&vector),
        };
        Ok(())
    }

    fn event(&self, vector: u16) -> &EventFd {
        &self.1[usize::from(vector)]
    }
}

struct TestDoorbells(Arc<Machine>);

impl Doorbells for TestDoorbells {
    fn connect(&self, address: u64, event: &EventFd) -> io::Result<()> {
        let event = event.try_clone()?;
        let before = self.0.doorbells.lock().unwrap().insert(address, event);
        assert!(before.is_none(), "{address:#x} has a doorbell already");
        Ok(())
    }

    fn disconnect(&self, address: u64, _event: &EventFd) {
        let before = self.0.doorbells.lock().unwrap().remove(&address);
        assert!(before.is_some(), "{address:#x} has no doorbell");
    }
}

/// A driver of the entropy device, in a machine of its own.
struct Driver {
    machine: Arc<Machine>,
    events: Vec<EventFd>,
    bus: Arc<PciBus>,
    ecam: Ecam,
    window: Window,
    memory: GuestMemoryMmap,
    bar: u64,
    /// Offset in the BAR by kind of capability.
    parts: BTreeMap<u8, u64>,
    msix: u64,
    af: u64,
    cfg: u64,
}

const COMMON: u8 = 1;
const NOTIFY: u8 = 2;
const ISR: u8 = 3;

impl Driver {
    fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let machine = Arc::new(Machine::default());
        let events: Vec<_> = (0..2)
            .map(|_| EventFd::new(EFD_NONBLOCK).unwrap())
            .collect();
        let clones = events.iter().map(|event| event.try_clone().unwrap());
        let environment = Environment {
            memory: memory.clone(),
            vectors: Box::new(TestVectors(Arc::clone(&machine), clones.collect())),
            doorbells: Arc::new(TestDoorbells(Arc::clone(&machine))),
            window: WINDOW,
            address: FIRST_ADDRESS,
        };
        let device = Box::new(Rng::open("/dev/urandom".as_ref()).unwrap());
        assert_eq!(VirtioPci::vectors(device.as_ref()), 2);
        let function = VirtioPci::new("rng", device, environment).unwrap();
        let bus = Arc::new(PciBus::default());
        bus.insert(Slot::device(SLOT as u8), Arc::new(function))
            .unwrap();
        let mut driver = Self {
            machine,
            events,
            ecam: Ecam::new(Arc::clone(&bus)),
            window: Window::new(Arc::clone(&bus), WINDOW.start),
            bus,
            memory,
            bar: FIRST_ADDRESS.into(),
            parts: BTreeMap::new(),
            msix: 0,
            af: 0,
            cfg: 0,
        };
        driver.find_capabilities();
        driver
    }

    fn config_read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut data = [0; N];
        self.ecam.read(SLOT << 15 | at, &mut data);
        data
    }

    fn config_write(&self, at: u64, data: &[u8]) {
        self.ecam.write(SLOT << 15 | at, data);
    }

    fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut data = [0; N];
        self.window.read(self.bar - WINDOW.start + at, &mut data);
        data
    }

    fn write(&self, at: u64, data: &[u8]) {
        self.window.write(self.bar - WINDOW.start + at, data);
    }

    fn find_capabilities(&mut self) {
        assert_eq!(
            self.config_read::<1>(6)[0] & 0x10,
            0x10,
            "there are capabilities"
        );
        let mut at = u64::from(self.config_read::<1>(0x34)[0]);
        let mut count = 0;
        while at != 0 {
            count += 1;
            assert!(count < 20 && at % 4 == 0);
            let [id, next, length, kind] = self.config_read::<4>(at);
            match id {
                0x09 if kind == 5 => self.cfg = at,
                0x09 => {
                    assert!(length >= 16);
                    assert_eq!(self.config_read::<1>(at + 4), [0], "BAR 0");
                    let offset = u32::from_le_bytes(self.config_read(at + 8));
                    let size = u32::from_le_bytes(self.config_read(at + 12));
                    assert!(offset + size <= BAR_LENGTH);
                    self.parts.insert(kind, offset.into());
                }
                0x11 => self.msix = at,
                0x13 => self.af = at,
                other => panic!("capability {other:#x}"),
            }
            at = next.into();
        }
        assert!([self.msix, self.af, self.cfg].iter().all(|at| *at != 0));
    }

    fn decode(&self, on: bool) {
        self.config_write(4, &[if on { 6 } else { 0 }, 0]);
    }

    fn common(&self, at: u64) -> u64 {
        self.parts[&COMMON] + at
    }

    fn status(&self) -> u8 {
        self.read::<1>(self.common(0x14))[0]
    }

    fn set_status(&self, status: u8) {
        self.write(self.common(0x14), &[status]);
    }

    fn features(&self) -> u64 {
        let half = |select: u32| {
            self.write(self.common(0), &select.to_le_bytes());
            u64::from(u32::from_le_bytes(self.read(self.common(4))))
        };
        half(0) | half(1) << 32
    }

    fn accept(&self, features: u64) {
        for (select, half) in [(0u32, features as u32), (1, (features >> 32) as u32)] {
            self.write(self.common(8), &select.to_le_bytes());
            self.write(self.common(0xc), &half.to_le_bytes());
        }
    }

    /// Sets the queue up at `base` and returns the driver's side of it.
    fn set_up_queue(&self, base: u64, vector: u16) -> Ring {
        self.write(self.common(0x16), &[0, 0]);
        self.write(self.common(0x18), &16u16.to_le_bytes());
        self.write(self.common(0x1a), &vector.to_le_bytes());
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupts = Arc::new(Interrupts::default());
        let ring = Ring::new(0, 16, base, &self.memory, kick, interrupts);
        for (at, address) in [0x20, 0x28, 0x30].into_iter().zip(ring.addresses()) {
            self.write(self.common(at), &(address as u32).to_le_bytes());
            self.write(self.common(at + 4), &((address >> 32) as u32).to_le_bytes());
        }
        self.write(self.common(0x1c), &[1, 0]);
        ring
    }

    /// Everything up to a device that works, with interrupts on vector 1.
    fn start(&self) -> Ring {
        self.decode(true);
        self.set_status(0);
        self.set_status(3);
        self.accept(1 << 32);
        self.set_status(11);
        assert_eq!(self.status(), 11, "the features are accepted");
        let ring = self.set_up_queue(0x1000, 1);
        self.set_control(0x8000);
        self.set_vector(1, 0xfee0_1000, 0x41, false);
        self.set_status(15);
        assert_eq!(self.status(), 15);
        ring
    }

    fn set_control(&self, control: u16) {
        self.config_write(self.msix + 2, &control.to_le_bytes());
    }

    fn set_vector(&self, vector: u64, address: u32, data: u32, masked: bool) {
        let at = 0x4000 + 16 * vector;
        self.write(at, &address.to_le_bytes());
        self.write(at + 4, &[0; 4]);
        self.write(at + 8, &data.to_le_bytes());
        self.write(at + 12, &u32::from(masked).to_le_bytes());
    }

    fn routes(&self) -> BTreeMap<u16, Msi> {
        self.machine.routes.lock().unwrap().clone()
    }

    /// Rings as the hypervisor does when there is an event at the address.
    fn ring_doorbell(&self) {
        let at = self.parts[&NOTIFY];
        match self.machine.doorbells.lock().unwrap().get(&(self.bar + at)) {
            Some(event) => event.write(1).unwrap(),
            None => self.write(at, &[0, 0]),
        }
    }

    /// Has the device fill a buffer.
    fn works(&self, ring: &mut Ring) {
        let head = ring.add(&[], &[(0x8000, 32)]);
        self.ring_doorbell();
        assert_eq!(ring.wait(), (head, 32));
    }

    /// Interrupts on `vector` since the last time; waits for one if `some`.
    fn interrupts(&self, vector: usize, some: bool) -> u64 {
        for _ in 0..1000 {
            match self.events[vector].read() {
                Ok(count) => return count,
                Err(_) if !some => return 0,
                Err(_) => std::thread::sleep(std::time::Duration::from_millis(1)),
            }
        }
        panic!("no interrupt");
    }
}

#[test]
fn the_device_is_found_and_works() {
    let driver = Driver::new();
    assert_eq!(driver.config_read(0), [0xf4, 0x1a, 0x44, 0x10]);
    let mut ring = driver.start();
    driver.works(&mut ring);
    assert_eq!(driver.interrupts(1, true), 1);
    let msi = Msi {
        address: 0xfee0_1000,
        data: 0x41,
    };
    assert_eq!(driver.routes(), BTreeMap::from([(1, msi)]));
    assert_eq!(driver.machine.doorbells.lock().unwrap().len(), 1);
    assert_eq!(driver.features(), 1 << 32 | 1 << 29 | 1 << 28);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let driver = Driver::new();
    driver.decode(true);
    for (features, accepted) in [(0, 0), (1 << 28, 0), (1 << 32 | 1 << 5, 0), (1 << 32, 8)] {
        driver.set_status(0);
        assert_eq!(driver.status(), 0);
        driver.set_status(3);
        driver.accept(features);
        driver.set_status(11);
        assert_eq!(driver.status(), 3 | accepted, "{features:#x}");
    }
    // And what was agreed on stays.
    driver.accept(0);
    driver.write(driver.common(8), &[1, 0, 0, 0]);
    assert_eq!(driver.read(driver.common(0xc)), [1, 0, 0, 0]);
}

#[test]
fn a_driver_that_is_ready_without_features_is_not_heard() {
    let driver = Driver::new();
    driver.decode(true);
    driver.set_up_queue(0x1000, 0);
    driver.set_status(7);
    assert_eq!(driver.status(), 3);
    assert!(driver.machine.doorbells.lock().unwrap().is_empty());
}

#[test]
fn a_queue_outside_memory_is_a_device_that_needs_a_reset() {
    let driver = Driver::new();
    driver.decode(true);
    driver.set_status(3);
    driver.accept(1 << 32);
    driver.set_status(11);
    driver.set_up_queue(0x1000, 0xffff);
    // Too late: an enabled queue stays as it is.
    driver.write(driver.common(0x20), &[0; 4]);
    assert_eq!(driver.read(driver.common(0x20)), [0, 0x10, 0, 0]);
    driver.set_status(0);
    driver.set_status(3);
    driver.accept(1 << 32);
    driver.set_status(11);
    driver.write(driver.common(0x34), &[1, 0, 0, 0]);
    driver.write(driver.common(0x1c), &[1, 0]);
    driver.set_status(15);
    assert_eq!(driver.status(), 15 | 64);
    driver.set_status(0);
    assert_eq!(driver.status(), 0);
    driver.works(&mut driver.start());
}

#[test]
fn a_chain_that_leads_nowhere_interrupts_with_a_status() {
    let driver = Driver::new();
    let mut ring = driver.start();
    driver.write(driver.common(0x10), &[0, 0]);
    driver.set_vector(0, 0xfee0_2000, 0x42, false);
    let generation = driver.read::<1>(driver.common(0x15));
    ring.write_descriptor(
        0,
        Raw {
            address: 0x8000,
            length: 1,
            flags: 1,
            next: 99,
        },
    );
    ring.publish(0);
    driver.ring_doorbell();
    assert_eq!(driver.interrupts(0, true), 1);
    assert_eq!(driver.status(), 15 | 64);
    assert_ne!(driver.read::<1>(driver.common(0x15)), generation);
    assert_eq!(driver.read(driver.parts[&ISR]), [2]);
    assert_eq!(driver.read(driver.parts[&ISR]), [0], "reading clears it");
}

#[test]
fn masked_interrupts_wait() {
    let driver = Driver::new();
    let mut ring = driver.start();
    type Change = fn(&Driver);
    let masks: [(Change, Change); 3] = [
        (
            |driver| driver.set_vector(1, 0xfee0_1000, 0x41, true),
            |driver| driver.set_vector(1, 0xfee0_3000, 0x51, false),
        ),
        (
            |driver| driver.set_control(0xc000),
            |driver| driver.set_control(0x8000),
        ),
        (
            |driver| driver.set_control(0),
            |driver| driver.set_control(0x8000),
        ),
    ];
    for (mask, unmask) in masks {
        mask(&driver);
        driver.works(&mut ring);
        // The answer can be seen before the device has come to interrupting.
        while driver.read::<1>(0x5000) == [0] {
            std::thread::yield_now();
        }
        assert_eq!(driver.read(0x5000), [2]);
        assert_eq!(driver.interrupts(1, false), 0);
        unmask(&driver);
        assert_eq!(driver.interrupts(1, true), 1);
        assert_eq!(driver.read(0x5000), [0]);
    }
    assert_eq!(driver.routes()[&1].data, 0x51);
}

#[test]
fn a_bar_moves_with_its_doorbells() {
    let mut driver = Driver::new();
    let mut ring = driver.start();
    let old = driver.bar;
    // Sizing, as every system does it, while the device decodes.
    driver.config_write(0x10, &[0xff; 4]);
    assert_eq!(
        u32::from_le_bytes(driver.config_read(0x10)),
        !(BAR_LENGTH - 1)
    );
    assert!(driver.machine.doorbells.lock().unwrap().is_empty());
    driver.config_write(0x10, &0xc800_0000u32.to_le_bytes());
    assert_eq!(driver.read::<4>(0), [0xff; 4], "nothing is where it was");
    driver.bar = 0xc800_0000;
    let at = driver.bar + driver.parts[&NOTIFY];
    let machine = Arc::clone(&driver.machine);
    let doorbells = || -> Vec<u64> {
        let doorbells = machine.doorbells.lock().unwrap();
        doorbells.keys().copied().collect()
    };
    assert_eq!(doorbells(), [at]);
    driver.works(&mut ring);
    driver.decode(false);
    assert_eq!(driver.read::<4>(driver.common(0)), [0xff; 4]);
    assert!(doorbells().is_empty());
    driver.decode(true);
    driver.works(&mut ring);
    // Outside the window nothing decodes, and guest memory gets no doorbells.
    driver.config_write(0x10, &0u32.to_le_bytes());
    assert!(doorbells().is_empty());
    driver.config_write(0x10, &(old as u32).to_le_bytes());
    driver.bar = old;
    driver.works(&mut ring);
}

#[test]
fn a_function_reset_ends_everything() {
    let driver = Driver::new();
    let mut ring = driver.start();
    driver.works(&mut ring);
    assert_eq!(
        driver.config_read::<1>(driver.af + 3),
        [3],
        "reset is offered"
    );
    driver.config_write(driver.af + 4, &[1]);
    assert!(driver.machine.doorbells.lock().unwrap().is_empty());
    assert_eq!(driver.routes(), BTreeMap::new());
    assert_eq!(driver.config_read(4), [0, 0]);
    assert_eq!(driver.config_read(0x10), [0; 4]);
    assert_eq!(driver.config_read::<2>(driver.msix + 2), [1, 0]);
    ring.add(&[], &[(0x8000, 32)]);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(ring.used(), None);
    driver.config_write(0x10, &FIRST_ADDRESS.to_le_bytes());
    driver.works(&mut driver.start());
}

#[test]
fn the_bar_is_reached_through_configuration_space() {
    let driver = Driver::new();
    // Without decoding memory at all.
    let access = |at: u64, length: u32| {
        driver.config_write(driver.cfg + 4, &[0]);
        driver.config_write(driver.cfg + 8, &(at as u32).to_le_bytes());
        driver.config_write(driver.cfg + 12, &length.to_le_bytes());
    };
    access(driver.common(0x14), 1);
    driver.config_write(driver.cfg + 16, &[3]);
    assert_eq!(driver.config_read(driver.cfg + 16), [3]);
    access(driver.common(0x12), 2);
    assert_eq!(driver.config_read(driver.cfg + 16), [1, 0], "one queue");
    // Where that leads nowhere, nothing happens.
    for (at, length) in [(0x7fff, 4), (u32::MAX.into(), 4), (0, 3), (0, 0), (0, 8)] {
        access(at, length);
        driver.config_write(driver.cfg + 16, &[0xff; 4]);
        assert_eq!(driver.config_read(driver.cfg + 16), [0; 4]);
    }
}

#[test]
fn odd_accesses_do_no_harm() {
    let driver = Driver::new();
    let mut ring = driver.start();
    for offset in (0..u64::from(BAR_LENGTH)).step_by(7) {
        for width in [0, 1, 2, 3, 4, 5, 8, 16] {
            driver
                .window
                .read(driver.bar - WINDOW.start + offset, &mut vec![0; width]);
        }
    }
    for width in [0, 3, 5, 16, 64] {
        for offset in (0..0x2000).chain(0x5000..0x8000) {
            driver
                .window
                .write(driver.bar - WINDOW.start + offset, &vec![0xff; width]);
        }
    }
    driver.works(&mut ring);
}

#[test]
fn a_function_that_is_taken_out_leaves_nothing() {
    let driver = Driver::new();
    let _ring = driver.start();
    assert!(driver.bus.remove(Slot::device(SLOT as u8)).is_some());
    assert!(driver.machine.doorbells.lock().unwrap().is_empty());
    assert_eq!(driver.routes(), BTreeMap::new());
    assert_eq!(driver.config_read(0), [0xff; 4]);
    assert_eq!(driver.read(0), [0xff; 4]);
}
