//! The processors of one machine: their VPs, the threads that run them, and those that come and go while the guest runs.
//!
//! ```text
//! created ─▶ resting ── start ─▶ running ── the guest ejects it ─▶ going ── its thread has ended ─▶ resting
//! ```
//!
//! Nothing takes a VP out of its partition again. One whose processor has gone rests, and is used again when the processor comes back.
//!
//! All of this is the control thread's. A processor's thread is waited for by another: the guest says when it goes, and could have it
//! wait for a console that nobody reads.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread::{self, JoinHandle},
};

use scheduler::{Tid, VpMeter};
use tracing::warn;
use vcpu::{Counters, Crash, End, ExitKind, Requests, Vp};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::{
    board::Board,
    boot,
    partition::Partition,
    scheduling::Placed,
    vm::{Totals, VmError},
};

/// The processors of a machine.
pub(crate) struct Processors {
    /// By VP index: those that have been created.
    slots: Vec<Slot>,
    /// How many there are to be: numbers from here on are asked to go.
    wanted: u32,
    surroundings: Surroundings,
    meters: Meters,
}

/// What each thread needs.
#[derive(Clone)]
struct Surroundings {
    memory: GuestMemoryMmap,
    board: Arc<Board>,
    finish: Arc<Finish>,
}

struct Slot {
    place: Place,
    /// Whether it has run already.
    used: bool,
    requests: Arc<Requests>,
    counters: Arc<Counters>,
    has_register_page: bool,
}

/// Where a VP is. A thread that has run one gives it back.
enum Place {
    Resting(Box<Vp>),
    Running(JoinHandle<Option<Box<Vp>>>),
    Going(mpsc::Receiver<Option<Box<Vp>>>),
    /// Its thread has panicked.
    Lost,
}

impl From<Option<Box<Vp>>> for Place {
    fn from(vp: Option<Box<Vp>>) -> Self {
        vp.map_or(Self::Lost, Self::Resting)
    }
}

/// Where a VP's thread waits for what it is to run.
struct Gate<T> {
    arrived: mpsc::Sender<(u32, Tid)>,
    /// Nothing comes when the machine is not to start after all.
    go: mpsc::Receiver<T>,
}

impl<T> Gate<T> {
    /// Announces the calling thread and waits.
    fn pass(self, index: u32) -> Option<T> {
        let Self { arrived, go } = self;
        let _ = arrived.send((index, Tid::current()));
        // Whoever counts those that arrive waits for as long as somebody may.
        drop(arrived);
        go.recv().ok()
    }
}

/// A thread that waits for its VP until all of those that start with it are where they are to be.
struct Waiting {
    index: u32,
    thread: JoinHandle<Option<Box<Vp>>>,
    go: mpsc::Sender<Box<Vp>>,
}

/// What VP threads leave behind when they end by themselves.
pub(crate) struct Finish {
    event: EventFd,
    crash: Mutex<Option<Box<Crash>>>,
}

impl Finish {
    pub(crate) fn new(event: EventFd) -> Self {
        Self {
            event,
            crash: Mutex::default(),
        }
    }

    /// Readable when a VP thread has ended by itself.
    pub(crate) fn event(&self) -> &EventFd {
        &self.event
    }

    /// Why the guest could not go on.
    pub(crate) fn take_crash(&self) -> Option<Box<Crash>> {
        self.lock().take()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Box<Crash>>> {
        lock(&self.crash)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Wakes the control thread when a VP thread ends that nobody has asked to, also by a panic.
struct Farewell {
    finish: Arc<Finish>,
    asked: bool,
}

impl Drop for Farewell {
    fn drop(&mut self) {
        if !self.asked {
            // It cannot overflow: one write for each of at most 255 VPs.
            let _ = self.finish.event.write(1);
        }
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

/// The meters of the VPs that run, by index.
type Meters = Arc<Mutex<BTreeMap<u32, Arc<VpMeter>>>>;

impl Processors {
    /// Processors with these VPs, which rest.
    pub(crate) fn new(
        vps: Vec<Vp>,
        memory: GuestMemoryMmap,
        board: Arc<Board>,
        finish: Arc<Finish>,
    ) -> Self {
        let mut processors = Self {
            slots: Vec::with_capacity(vps.len()),
            wanted: vps.len() as u32,
            surroundings: Surroundings {
                memory,
                board,
                finish,
            },
            meters: Meters::default(),
        };
        vps.into_iter().for_each(|vp| processors.add(vp));
        processors
    }

    fn add(&mut self, vp: Vp) {
        self.slots.push(Slot {
            used: false,
            requests: vp.requests(),
            counters: vp.counters(),
            has_register_page: vp.has_register_page(),
            place: Place::Resting(Box::new(vp)),
        });
    }

    /// Starts those that rest and that there are to be.
    ///
    /// # Errors
    /// The host has no more threads, or a thread cannot be placed.
    pub(crate) fn start_all(&mut self, placed: Option<&Placed<'_>>) -> Result<(), VmError> {
        if placed.is_some() {
            let meters = Arc::clone(&self.meters);
            self.surroundings.board.watch_interrupts(move |vp| {
                if let Some(meter) = lock(&meters).get(&vp) {
                    meter.interrupted();
                }
            });
        }
        self.start(&self.resting(), placed)
    }

    /// Those that rest, of which there are to be.
    fn resting(&self) -> Vec<u32> {
        (0u32..)
            .zip(&self.slots)
            .filter(|(index, slot)| *index < self.wanted && matches!(slot.place, Place::Resting(_)))
            .map(|(index, _)| index)
            .collect()
    }

    /// Runs these VPs, each on a thread of its own. `placed`, if there is any, places each thread before any of them runs, and meters
    /// them. On an error all of them rest again.
    fn start(&mut self, indices: &[u32], placed: Option<&Placed<'_>>) -> Result<(), VmError> {
        let (arrived, arrivals) = mpsc::channel();
        let mut waiting = Vec::with_capacity(indices.len());
        let place = || {
            for index in indices {
                waiting.push(self.spawn(*index, arrived.clone(), placed)?);
            }
            drop(arrived);
            let Some(placed) = placed else { return Ok(()) };
            let mut here = 0;
            for (index, thread) in &arrivals {
                placed.adopt(index, thread)?;
                here += 1;
            }
            if here < indices.len() {
                return Err(VmError::VpGone);
            }
            Ok(placed.look_after()?)
        };
        if let Err(error) = place() {
            for Waiting { index, thread, go } in waiting {
                // With nothing to run it ends.
                drop(go);
                let _ = thread.join();
                if let Some(placed) = placed {
                    placed.dismiss(index);
                }
            }
            return Err(error);
        }
        for Waiting { index, thread, go } in waiting {
            let slot = &mut self.slots[index as usize];
            let Place::Resting(mut vp) = std::mem::replace(&mut slot.place, Place::Lost) else {
                continue;
            };
            slot.requests = vp.renew();
            slot.used = true;
            if let Some(meter) = placed.and_then(|placed| placed.meter().vp(index)) {
                slot.requests
                    .watch(Box::new(TimedKicks(Arc::clone(&meter))));
                lock(&self.meters).insert(index, meter);
            }
            slot.place = match go.send(vp) {
                Ok(()) => Place::Running(thread),
                Err(mpsc::SendError(vp)) => Place::Resting(vp),
            };
        }
        Ok(())
    }

    fn spawn(
        &self,
        index: u32,
        arrived: mpsc::Sender<(u32, Tid)>,
        placed: Option<&Placed<'_>>,
    ) -> Result<Waiting, VmError> {
        let surroundings = self.surroundings.clone();
        let meter = placed.and_then(|placed| placed.meter().vp(index));
        let (go, come) = mpsc::channel();
        let gate = Gate { arrived, go: come };
        let thread = thread::Builder::new()
            .name(format!("vcpu{index}"))
            .spawn(move || Some(run(gate.pass(index)?, surroundings, meter)))
            .map_err(|source| VmError::Host {
                what: "a VP thread",
                source,
            })?;
        Ok(Waiting { index, thread, go })
    }

    /// Makes it `vcpus` processors. Those that come are there when this returns, but for one that is still going, which comes as soon
    /// as it has gone; those that are to go are asked to.
    ///
    /// # Errors
    /// There is no place for so many, or they cannot be had. Then all is as it was.
    pub(crate) fn resize(
        &mut self,
        vcpus: u32,
        partition: &Partition,
        placed: Option<&Placed<'_>>,
    ) -> Result<(), VmError> {
        self.settle(partition, placed);
        let before = (self.wanted, placed.map_or(0, Placed::vcpus));
        if let Some(placed) = placed {
            let needed = vcpus.max(self.top());
            if needed > before.1 {
                placed.resize(needed)?;
            } else if vcpus < before.1 {
                placed.check(vcpus)?;
            }
        }
        self.wanted = vcpus;
        if let Err(error) = self.bring(partition, placed) {
            self.wanted = before.0;
            self.fit_plan(placed);
            return Err(error);
        }
        let board = Arc::clone(&self.surroundings.board);
        if let Some(registers) = board.processors() {
            (0..vcpus).for_each(|index| registers.keep(index));
            let leaving: Vec<u32> = (vcpus..self.top())
                .filter(|index| matches!(self.slots[*index as usize].place, Place::Running(_)))
                .collect();
            registers.ask_to_leave(&leaving);
        }
        if placed.is_some_and(|placed| self.needed() < placed.vcpus()) {
            self.fit_plan(placed);
        }
        Ok(())
    }

    /// Starts the processors that there are to be and that are not there, and tells the guest.
    fn bring(&mut self, partition: &Partition, placed: Option<&Placed<'_>>) -> Result<(), VmError> {
        for index in self.slots.len() as u32..self.wanted {
            let vp = partition.create_vp(index)?;
            vp.set_registers(&[boot::memory_types()])?;
            self.add(vp);
        }
        let coming = self.resting();
        if coming.is_empty() {
            return Ok(());
        }
        for index in &coming {
            if self.slots[*index as usize].used
                && let Err(error) = partition.reset_vp(*index)
            {
                warn!("vCPU {index} comes as it went: the hypervisor does not reset it: {error}");
            }
        }
        self.start(&coming, placed)?;
        if let Some(registers) = self.surroundings.board.processors() {
            registers.arrive(&coming);
        }
        Ok(())
    }

    /// Does what the guest's answers make necessary.
    pub(crate) fn settle(&mut self, partition: &Partition, placed: Option<&Placed<'_>>) {
        let board = Arc::clone(&self.surroundings.board);
        let Some(registers) = board.processors() else {
            return;
        };
        // Only to make it wait for the next time.
        let _ = registers.news().read();
        for index in registers.take_refused() {
            warn!("the guest does not let go of vCPU {index}: it stays");
        }
        for index in registers.take_ejected() {
            self.retire(index);
        }
        let mut gone = false;
        for (index, slot) in (0..).zip(&mut self.slots) {
            if let Place::Going(thread) = &slot.place
                && let Ok(vp) = thread.try_recv()
            {
                slot.place = vp.into();
                gone = true;
                if let Some(placed) = placed {
                    placed.dismiss(index);
                }
            }
        }
        if !gone {
            return;
        }
        // Somebody may have asked for it again meanwhile.
        if let Err(error) = self.bring(partition, placed) {
            warn!("a vCPU does not come back: {error}");
        }
        self.fit_plan(placed);
    }

    /// Has the thread of a processor end that the guest has ejected.
    fn retire(&mut self, index: u32) {
        let board = Arc::clone(&self.surroundings.board);
        let Some(slot) = self.slots.get_mut(index as usize) else {
            return;
        };
        let thread = match std::mem::replace(&mut slot.place, Place::Lost) {
            Place::Running(thread) => thread,
            other => {
                slot.place = other;
                return;
            }
        };
        let requests = Arc::clone(&slot.requests);
        let (hand_over, taken) = mpsc::channel::<JoinHandle<Option<Box<Vp>>>>();
        let (done, going) = mpsc::channel();
        let waits = thread::Builder::new().name("unplug".into()).spawn(move || {
            if let Ok(thread) = taken.recv() {
                requests.stop();
                let _ = done.send(thread.join().ok().flatten());
                if let Some(registers) = board.processors() {
                    let _ = registers.news().write(1);
                }
            }
        });
        let thread = match waits {
            Ok(_) => hand_over.send(thread).err().map(|error| error.0),
            Err(_) => Some(thread),
        };
        slot.place = match thread {
            None => Place::Going(going),
            // Nobody else can wait for it.
            Some(thread) => {
                slot.requests.stop();
                thread.join().ok().flatten().into()
            }
        };
    }

    /// The plan covers those that are there and those that are to be, and no more.
    fn fit_plan(&self, placed: Option<&Placed<'_>>) {
        let Some(placed) = placed else { return };
        if self.needed() < placed.vcpus()
            && let Err(error) = placed.resize(self.needed())
        {
            warn!("the plan stays one for {} vCPUs: {error}", placed.vcpus());
        }
        if let Err(error) = placed.look_after() {
            warn!("nobody looks after where vCPUs are any more: {error}");
        }
    }

    /// How many a plan has to cover.
    fn needed(&self) -> u32 {
        self.wanted.max(self.top())
    }

    /// One more than the highest number of a processor that is there.
    fn top(&self) -> u32 {
        let there = |slot: &Slot| matches!(slot.place, Place::Running(_) | Place::Going(_));
        let last = self.slots.iter().rposition(there);
        last.map_or(0, |last| last as u32 + 1)
    }

    /// Ends all threads. Returns whether they ended without a panic.
    pub(crate) fn stop(&mut self) -> bool {
        for slot in &self.slots {
            slot.requests.stop();
        }
        let mut clean = true;
        for slot in &mut self.slots {
            slot.place = match std::mem::replace(&mut slot.place, Place::Lost) {
                Place::Running(thread) => thread.join().ok().flatten().into(),
                Place::Going(thread) => thread.recv().ok().flatten().into(),
                other => other,
            };
            clean &= !matches!(slot.place, Place::Lost);
        }
        clean
    }

    /// Adds what all VPs have done to `totals`.
    pub(crate) fn add_to(&self, totals: &mut Totals) {
        for slot in &self.slots {
            totals.add_vp(&slot.counters, slot.has_register_page);
        }
    }
}

/// A VP's thread.
fn run(mut vp: Box<Vp>, surroundings: Surroundings, meter: Option<Arc<VpMeter>>) -> Box<Vp> {
    let Surroundings {
        memory,
        board,
        finish,
    } = surroundings;
    let mut farewell = Farewell {
        finish,
        asked: false,
    };
    let watch = meter.map(|meter| {
        meter.attach();
        Metered(meter)
    });
    let watcher = watch.as_ref().map(|watch| watch as &dyn vcpu::Watch);
    match vp.run(&memory, board.as_ref(), watcher) {
        End::Stopped => farewell.asked = true,
        End::Crashed(crash) => {
            farewell.finish.lock().get_or_insert(crash);
        }
    }
    if let Some(watch) = watch {
        watch.0.detach();
    }
    vp
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vp_thread_that_never_arrives_is_not_waited_for() {
        let (arrived, arrivals) = mpsc::channel();
        let (_go, gate) = mpsc::channel::<()>();
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
