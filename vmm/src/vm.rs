//! One boot of a machine: partition, memory, devices and VP threads, from nothing to the end of its guest.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread::{self, JoinHandle},
    time::Duration,
};

use scheduler::{Outcome, Tid, VpMeter};
use vcpu::{Counters, Crash, End, ExitKind, Requests, Vp};
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
    #[error("cannot prepare the first VP")]
    FirstVp(#[from] vcpu::VpError),
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
    vps: Vec<VpThread>,
    finish: Arc<Finish>,
    board: Arc<Board>,
    partition: Arc<Partition>,
    /// Dropped last: the hypervisor reads and writes it as long as the partition lives.
    memory: GuestMemoryMmap,
}

/// A machine that is ready to run.
pub struct Prepared {
    vm: Vm,
    vps: Vec<Vp>,
    bound: Option<Outcome>,
}

/// Where a VP's thread waits until all of them are in their places.
struct Gate {
    arrived: mpsc::Sender<(u32, Tid)>,
    /// Nothing comes when the machine is not to start after all.
    go: mpsc::Receiver<()>,
}

impl Gate {
    /// Announces the calling thread and waits. May the VP run?
    fn pass(self, vp: u32) -> bool {
        let Self { arrived, go } = self;
        let _ = arrived.send((vp, Tid::current()));
        // Whoever counts those that arrive waits for as long as somebody may.
        drop(arrived);
        go.recv().is_ok()
    }
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

    /// Starts the VPs, each on a thread of its own. `scheduling`, if there is any, places each thread before any of them runs, and
    /// meters them.
    ///
    /// # Errors
    /// The host has no more threads, or a thread cannot be placed. Those that have started end again.
    pub fn start(self, placed: Option<&mut Placed<'_>>) -> Result<Vm, VmError> {
        let Self { mut vm, vps, .. } = self;
        let Some(placed) = placed else {
            for vp in vps {
                vm.spawn(vp, None, None)?;
            }
            return Ok(vm);
        };
        let meters: Vec<_> = (0..).map_while(|vp| placed.meter().vp(vp)).collect();
        vm.board.watch_interrupts(move |vp| {
            if let Some(meter) = meters.get(vp as usize) {
                meter.interrupted();
            }
        });
        let (arrived, arrivals) = mpsc::channel();
        let mut waiting = Vec::with_capacity(vps.len());
        for vp in vps {
            let meter = placed.meter().vp(vp.index());
            let (go, gate) = mpsc::channel();
            let gate = Gate {
                arrived: arrived.clone(),
                go: gate,
            };
            vm.spawn(vp, Some(gate), meter)?;
            waiting.push(go);
        }
        drop(arrived);
        let mut here = 0;
        for (index, thread) in &arrivals {
            placed.adopt(index, thread)?;
            here += 1;
        }
        if here < waiting.len() {
            return Err(VmError::VpGone);
        }
        placed.look_after()?;
        for go in waiting {
            // A thread that is not there any more has been told of.
            let _ = go.send(());
        }
        Ok(vm)
    }
}

/// Passes on to the meter what a VP does.
struct Metered(Arc<VpMeter>);

impl vcpu::Watch for Metered {
    fn entering(&self) {
        self.0.entering();
    }

    fn exited(&self, kind: ExitKind) {
        self.0.exited(kind as usize);
    }

    fn told_by(&self, partition: u64) {
        self.0.belongs_to(partition);
    }
}

/// Passes on to the meter when a VP is kicked.
struct TimedKicks(Arc<VpMeter>);

impl vcpu::KickWatch for TimedKicks {
    fn kicked(&self) {
        self.0.kicked();
    }

    fn noticed(&self) {
        self.0.noticed();
    }
}

struct VpThread {
    thread: Option<JoinHandle<()>>,
    requests: Arc<Requests>,
    counters: Arc<Counters>,
    has_register_page: bool,
}

/// What VP threads leave behind when they end by themselves.
struct Finish {
    event: EventFd,
    crash: Mutex<Option<Box<Crash>>>,
}

/// Wakes the control thread when a VP thread ends, also by a panic.
struct Farewell(Arc<Finish>);

impl Drop for Farewell {
    fn drop(&mut self) {
        // It cannot overflow: one write for each of at most 255 VPs.
        let _ = self.0.event.write(1);
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
        let apic_ids: Vec<u32> = (0..config.cpus.boot_vcpus).collect();
        let serial = config.serial.mode != SerialMode::Off;
        let tables = acpi::build(&AcpiConfig {
            apic_ids: &apic_ids,
            serial,
            hotplug: events == Events::On,
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
        let finish = Arc::new(Finish {
            event,
            crash: Mutex::default(),
        });
        let vm = Self {
            vps: Vec::with_capacity(vps.len()),
            finish,
            board,
            partition,
            memory,
        };
        Ok(Prepared { vm, vps, bound })
    }

    fn spawn(
        &mut self,
        mut vp: Vp,
        gate: Option<Gate>,
        meter: Option<Arc<VpMeter>>,
    ) -> Result<(), VmError> {
        let (requests, counters) = (vp.requests(), vp.counters());
        let has_register_page = vp.has_register_page();
        let (memory, board) = (self.memory.clone(), Arc::clone(&self.board));
        let farewell = Farewell(Arc::clone(&self.finish));
        if let Some(meter) = &meter {
            requests.watch(Box::new(TimedKicks(Arc::clone(meter))));
        }
        let thread = thread::Builder::new()
            .name(format!("vcpu{}", vp.index()))
            .spawn(move || {
                if gate.is_some_and(|gate| !gate.pass(vp.index())) {
                    return;
                }
                let watch = meter.map(|meter| {
                    meter.attach();
                    Metered(meter)
                });
                let watch = watch.as_ref().map(|watch| watch as &dyn vcpu::Watch);
                if let End::Crashed(crash) = vp.run(&memory, board.as_ref(), watch) {
                    let mut first = farewell
                        .0
                        .crash
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner);
                    first.get_or_insert(crash);
                }
            })
            .map_err(|source| VmError::Host {
                what: "a VP thread",
                source,
            })?;
        self.vps.push(VpThread {
            thread: Some(thread),
            requests,
            counters,
            has_register_page,
        });
        Ok(())
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
        &self.finish.event
    }

    /// Why the guest could not go on, if that is how it ended.
    #[must_use]
    pub fn take_crash(&self) -> Option<Box<Crash>> {
        self.finish
            .crash
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    /// Ends all VPs and waits for the guest's last output. Returns whether all VP threads ended without a panic.
    pub fn stop(&mut self) -> bool {
        // First of all, or a console that takes nothing could hold a VP up for ever.
        if let Some(serial) = self.board.serial() {
            serial.close();
        }
        for vp in &self.vps {
            vp.requests.stop();
        }
        let mut clean = true;
        for vp in &mut self.vps {
            clean &= vp.thread.take().is_none_or(|thread| thread.join().is_ok());
        }
        if let Some(serial) = self.board.serial() {
            serial.flush(LAST_OUTPUT);
        }
        clean
    }

    /// Adds what this machine has done to `totals`.
    pub fn add_to(&self, totals: &mut Totals) {
        for vp in &self.vps {
            let counters = &vp.counters;
            for kind in ExitKind::ALL {
                add(&mut totals.exits, kind.name(), counters.exits(kind).get());
            }
            add(&mut totals.ioctls, "run_vp", counters.run_vp.get());
            add(
                &mut totals.ioctls,
                "hvcall_get_vp_registers",
                counters.get_vp_registers.get(),
            );
            add(
                &mut totals.ioctls,
                "hvcall_set_vp_registers",
                counters.set_vp_registers.get(),
            );
            totals.emulated_instructions += counters.emulated.get();
            totals.unknown_msrs += counters.unknown_msrs.get();
            totals.register_page &= vp.has_register_page;
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vp_thread_that_never_arrives_is_not_waited_for() {
        let (arrived, arrivals) = mpsc::channel();
        let (_go, gate) = mpsc::channel();
        let waits = Gate {
            arrived: arrived.clone(),
            go: gate,
        };
        // Ends when `_go` does.
        thread::spawn(move || waits.pass(0));
        let (_go, gate) = mpsc::channel::<()>();
        let lost = Gate { arrived, go: gate };
        thread::spawn(move || drop(lost));
        assert_eq!(arrivals.iter().count(), 1, "and there is no third");
    }
}
