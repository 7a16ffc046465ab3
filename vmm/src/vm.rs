//! One boot of a machine: partition, memory, devices and VP threads, from nothing to the end of its guest.

use std::{cell::RefCell, collections::BTreeMap, io, sync::Arc, thread, time::Duration};

use scheduler::Outcome;
use vcpu::{Counters, Crash, ExitKind, Vp};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{
    acpi::{self, AcpiConfig, AcpiError},
    board::{Board, BoardError, Events},
    boot::{self, BootError},
    config::{SerialMode, VmConfig},
    console::Console,
    hvc::Hvc,
    layout::{self, LayoutError},
    memory::{self, MemoryError, Piece},
    partition::{Device, Partition, PartitionError},
    processors::{Finish, Processors},
    scheduling::{Placed, Scheduling, SchedulingError},
};

/// How long the guest's last output may take to reach the host.
const LAST_OUTPUT: Duration = Duration::from_secs(1);

/// Why a machine cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The partition.
    #[error(transparent)]
    Partition(#[from] PartitionError),
    /// No layout for so much memory.
    #[error("memory: {0}")]
    Layout(#[from] LayoutError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Devices.
    #[error(transparent)]
    Board(#[from] BoardError),
    /// The ACPI tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// The guest's kernel and what goes with it.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The thread that loads the kernel.
    #[error("the thread that loads the kernel ended in a panic")]
    LoaderPanicked,
    /// A VP's first state.
    #[error("cannot prepare a VP")]
    PrepareVp(#[from] vcpu::VpError),
    /// A thread cannot be where it should be.
    #[error(transparent)]
    Scheduling(#[from] SchedulingError),
    /// A VP's thread was lost.
    #[error("the thread of a VP ended before the VP ran")]
    VpGone,
    /// The host has no more of something.
    #[error("cannot create {what}")]
    Host {
        /// What was to be created.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

/// A machine whose VPs run.
pub struct Vm {
    processors: RefCell<Processors>,
    finish: Arc<Finish>,
    board: Arc<Board>,
    partition: Arc<Partition>,
    /// Dropped last: the hypervisor reads and writes it as long as the partition lives.
    memory: GuestMemoryMmap,
}

/// A machine that is ready to run.
pub struct Prepared {
    vm: Vm,
    bound: Option<Outcome>,
}

impl Prepared {
    /// The partition.
    #[must_use]
    pub fn partition(&self) -> Arc<Partition> {
        Arc::clone(&self.vm.partition)
    }

    /// What came of having its memory come from the nodes that were planned.
    #[must_use]
    pub fn bound(&self) -> Option<Outcome> {
        self.bound.clone()
    }

    /// Starts the VPs, each on a thread of its own. `placed`, if there is any, places each thread before any of them runs, and
    /// meters them.
    ///
    /// # Errors
    /// The host has no more threads, or a thread cannot be placed. Those that have started end again.
    pub fn start(mut self, placed: Option<&Placed<'_>>) -> Result<Vm, VmError> {
        self.vm.processors.get_mut().start_all(placed)?;
        Ok(self.vm)
    }
}

impl Vm {
    /// Sets the machine up and loads its kernel. `capabilities` are this partition's VMM capabilities; `scheduling` says where its
    /// memory is to come from.
    ///
    /// # Errors
    /// The first thing that could not be had. Nothing stays behind.
    pub fn prepare(
        device: &Device,
        capabilities: Option<u64>,
        config: &VmConfig,
        console: &Console,
        hvc: &Hvc,
        events: Events,
        scheduling: Option<&Scheduling>,
    ) -> Result<Prepared, VmError> {
        // What can be wrong with the configuration comes first, and needs no partition.
        let layout = config.memory.layout(memory::address_bits())?;
        let memory = memory::map(&config.memory, &layout)?;
        // Pages come when they are touched, or when the driver pins them.
        let bound = scheduling.and_then(|scheduling| scheduling.bind(&memory));
        // Where none can come, the guest need not make room for them.
        let vcpus = match events {
            Events::On => config.cpus.max_vcpus,
            Events::Off => config.cpus.boot_vcpus,
        };
        let apic_ids: Vec<u32> = (0..vcpus).collect();
        let serial = config.serial.mode != SerialMode::Off;
        let tables = acpi::build(&AcpiConfig {
            apic_ids: &apic_ids,
            present: config.cpus.boot_vcpus as usize,
            serial,
            hotplug: events == Events::On,
            modules: config.memory.module_area(&layout).is_some(),
        })?;
        let machine = boot::Machine {
            memory_map: layout::memory_map(config.memory.size)?,
            rsdp: tables.address,
            low_ram_end: layout.ram[0].end(),
        };
        let load = || {
            let start = boot::load(&memory, &config.payload, &machine)?;
            memory.write_slice(&tables.bytes, GuestAddress(tables.address))?;
            Ok::<_, BootError>(start)
        };
        let create = || {
            let partition = Arc::new(device.create_partition(capabilities)?);
            for region in memory.iter().take(layout.ram.len()) {
                partition.map_memory(Piece::whole(region))?;
            }
            let sink = console.sink().map_err(|source| VmError::Host {
                what: "the console's output",
                source,
            })?;
            let board = Arc::new(Board::new(
                &partition, config, &memory, &layout, sink, hvc, events,
            )?);
            let vps: Vec<Vp> = (0..config.cpus.boot_vcpus)
                .map(|index| partition.create_vp(index))
                .collect::<Result<_, _>>()?;
            Ok::<_, VmError>((partition, board, vps))
        };
        // Both take their time, and neither needs the other.
        let (loaded, created) = thread::scope(|scope| {
            let loading = scope.spawn(load);
            let created = create();
            (loading.join(), created)
        });
        let start = loaded.map_err(|_| VmError::LoaderPanicked)??;
        let (partition, board, vps) = created?;
        vps[0].set_registers(&start.registers())?;
        for vp in &vps[1..] {
            vp.set_registers(&[boot::memory_types()])?;
        }

        let event = EventFd::new(EFD_NONBLOCK).map_err(|source| VmError::Host {
            what: "an eventfd",
            source,
        })?;
        let finish = Arc::new(Finish::new(event));
        let processors =
            Processors::new(vps, memory.clone(), Arc::clone(&board), Arc::clone(&finish));
        let vm = Self {
            processors: RefCell::new(processors),
            finish,
            board,
            partition,
            memory,
        };
        Ok(Prepared { vm, bound })
    }

    /// Makes it `vcpus` vCPUs. Those that come are there when this returns, and the guest is told; those that are to go are asked to,
    /// and go when the guest ejects them.
    ///
    /// # Errors
    /// There is no place for so many, or they cannot be had. Then all is as it was.
    pub fn resize(&self, vcpus: u32, placed: Option<&Placed<'_>>) -> Result<(), VmError> {
        self.processors
            .borrow_mut()
            .resize(vcpus, &self.partition, placed)
    }

    /// Does what the guest has made necessary by ejecting vCPUs.
    pub fn settle(&self, placed: Option<&Placed<'_>>) {
        self.processors.borrow_mut().settle(&self.partition, placed);
    }

    /// The machine's devices.
    #[must_use]
    pub fn board(&self) -> &Board {
        &self.board
    }

    /// The guest's memory.
    #[must_use]
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Readable when a VP thread has ended by itself.
    #[must_use]
    pub fn finished(&self) -> &EventFd {
        self.finish.event()
    }

    /// Why the guest could not go on, if that is how it ended.
    #[must_use]
    pub fn take_crash(&self) -> Option<Box<Crash>> {
        self.finish.take_crash()
    }

    /// Ends all VPs and waits for the guest's last output. Returns whether all VP threads ended without a panic.
    pub fn stop(&mut self) -> bool {
        // First of all, or a console that takes nothing could hold a VP up for ever.
        if let Some(serial) = self.board.serial() {
            serial.close();
        }
        let clean = self.processors.get_mut().stop();
        if let Some(serial) = self.board.serial() {
            serial.flush(LAST_OUTPUT);
        }
        clean
    }

    /// Adds what this machine has done to `totals`.
    pub fn add_to(&self, totals: &mut Totals) {
        self.processors.borrow().add_to(totals);
        for (name, count) in self.partition.ioctls.snapshot() {
            add(&mut totals.ioctls, name, count);
        }
        let (ports, mmio) = self.board.unclaimed();
        totals.unknown_ports += ports;
        totals.unknown_mmio += mmio;
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Everything counted, over all boots of a machine.
#[derive(Clone, Debug)]
pub struct Totals {
    /// Exits by kind; kinds that did not occur are left out.
    pub exits: BTreeMap<&'static str, u64>,
    /// Ioctls by name.
    pub ioctls: BTreeMap<&'static str, u64>,
    /// Instructions executed by the emulator.
    pub emulated_instructions: u64,
    /// Accesses to MSRs nobody implements.
    pub unknown_msrs: u64,
    /// Accesses to ports nobody claims.
    pub unknown_ports: u64,
    /// Accesses to memory nobody claims.
    pub unknown_mmio: u64,
    /// Whether every VP had a register page.
    pub register_page: bool,
}

impl Totals {
    /// Adds what one VP has done.
    pub(crate) fn add_vp(&mut self, counters: &Counters, has_register_page: bool) {
        for kind in ExitKind::ALL {
            add(&mut self.exits, kind.name(), counters.exits(kind).get());
        }
        let ioctls = [
            ("run_vp", &counters.run_vp),
            ("hvcall_get_vp_registers", &counters.get_vp_registers),
            ("hvcall_set_vp_registers", &counters.set_vp_registers),
        ];
        for (name, counter) in ioctls {
            add(&mut self.ioctls, name, counter.get());
        }
        self.emulated_instructions += counters.emulated.get();
        self.unknown_msrs += counters.unknown_msrs.get();
        self.register_page &= has_register_page;
    }
}

impl Default for Totals {
    fn default() -> Self {
        Self {
            exits: BTreeMap::new(),
            ioctls: BTreeMap::new(),
            emulated_instructions: 0,
            unknown_msrs: 0,
            unknown_ports: 0,
            unknown_mmio: 0,
            register_page: true,
        }
    }
}

fn add(map: &mut BTreeMap<&'static str, u64>, name: &'static str, count: u64) {
    if count > 0 {
        *map.entry(name).or_default() += count;
    }
}
