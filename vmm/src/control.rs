//! The control thread: starts the machine, waits for what happens to it, and says how it ended.
//!
//! It waits with `poll` on four things: signals, the guest's power switch, VP threads that end by themselves, and the
//! console's input. Between them it writes the metrics, if a file for them was asked for.

use std::{
    io::{self, Write},
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use devices::{power::PowerRequest, serial::Serial};
use scheduler::Meter;
use vcpu::Crash;

use crate::{
    config::{ConfigError, VmConfig},
    console::{Console, ConsoleError},
    hvc::{Hvc, HvcError},
    metrics::MetricsFile,
    partition::{Device, PartitionError},
    report::Report,
    scheduling::{Placed, Scheduling, SchedulingError},
    signals::Signals,
    state::{State, TransitionError},
    vm::{Vm, VmError},
};

/// How a run ended, when it was not by an error of the VMM.
#[derive(Debug)]
pub enum Ended {
    /// The guest switched the machine off.
    PoweredOff,
    /// A signal or the user at the terminal ended it.
    Interrupted,
    /// The guest could not go on.
    Crashed(Box<Crash>),
}

/// Why a machine could not be run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The configuration asks for the impossible.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// There is no hypervisor to run on, or it refuses.
    #[error(transparent)]
    Partition(#[from] PartitionError),
    /// The host's end of the serial port.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// The host's end of the virtio console.
    #[error(transparent)]
    Hvc(#[from] HvcError),
    /// The machine.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// Where and when its vCPUs are to run.
    #[error(transparent)]
    Scheduling(#[from] SchedulingError),
    /// A state that does not follow from the one before.
    #[error(transparent)]
    State(#[from] TransitionError),
    /// A VP thread panicked.
    #[error("a VP thread ended in a panic")]
    VpPanicked,
    /// The host refuses something.
    #[error("cannot {what}")]
    Host {
        /// What was to be done.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

/// Why the control thread stopped waiting.
enum Event {
    Power(PowerRequest),
    Crashed(Box<Crash>),
    VpPanicked,
    Interrupted,
}

/// Runs the machine `config` describes until it ends, through any number of resets. Call it on the main thread, before there
/// are others. What happens is noted in `report`.
///
/// # Errors
/// [`RunError`]: one line with its causes.
pub fn run(config: &VmConfig, report: &mut Report) -> Result<Ended, RunError> {
    config.validate(address_bits())?;
    let signals = Signals::take().map_err(|source| RunError::Host {
        what: "take signals",
        source,
    })?;
    vcpu::install_kick_handler().map_err(|source| RunError::Host {
        what: "take the kick signal",
        source,
    })?;
    let device = Device::open()?;
    let detection = device.detect_scheduler(config.scheduling.policy.is_some());
    let capabilities = detection.capabilities;
    // What there is to say, once nothing can be wrong any more.
    let mut announcement = format!("{detection}\n");
    let scheduling = Scheduling::begin(config, &detection)?;
    report.scheduler = Some(detection);
    let metrics = config.scheduling.metrics.as_deref();
    let mut metrics = metrics
        .map(MetricsFile::create)
        .transpose()
        .map_err(|source| RunError::Host {
            what: "write the file of --metrics",
            source,
        })?;
    let mut console = Console::open(&config.serial)?;
    if let Some(path) = console.pty() {
        announcement += &format!("serial: {}\n", path.display());
    }
    let hvc = Hvc::open(&config.console)?;
    if let Some(path) = hvc.pty() {
        announcement += &format!("console: {}\n", path.display());
    }
    let mut announcement = Some(announcement);
    report.plan = scheduling
        .as_ref()
        .map(|scheduling| scheduling.plan().clone());
    report.mark("ready");

    let mut state = State::Created;
    let ended = loop {
        state.advance(State::Booting)?;
        let vm = Vm::prepare(&device, capabilities, config, &console, &hvc)?;
        let partition = vm.partition();
        let mut placed = match &scheduling {
            Some(scheduling) => Some(scheduling.place(&partition, report.metering.take())?),
            None => None,
        };
        if let Some(announcement) = announcement.take() {
            let plan = placed.as_ref().map(Placed::to_string);
            // Whoever read standard error may be gone, and the machine runs all the same.
            let _ = write!(io::stderr(), "{announcement}{}", plan.unwrap_or_default());
        }
        let mut vm = vm.start(placed.as_mut())?;
        state.advance(State::Running)?;
        report.mark("running");
        let meter = placed.as_ref().map(Placed::meter);
        let event = wait(&vm, &mut console, &signals, metrics.as_mut().zip(meter))?;
        signals_after(&event, &signals);
        report.metering = placed.as_ref().map(|placed| placed.meter().sample());
        let clean = vm.stop();
        report.effects = placed.as_ref().map(Placed::effects);
        drop(placed);
        report.add_boot(&vm);
        match event {
            _ if !clean => return Err(RunError::VpPanicked),
            Event::VpPanicked => return Err(RunError::VpPanicked),
            Event::Power(PowerRequest::Reset) => state.advance(State::Shutdown)?,
            Event::Power(PowerRequest::PowerOff) => break Ended::PoweredOff,
            Event::Interrupted => break Ended::Interrupted,
            Event::Crashed(crash) => {
                state.advance(State::Crashed)?;
                break Ended::Crashed(crash);
            }
        }
    };
    if state == State::Running {
        state.advance(State::Shutdown)?;
    }
    report.add_ioctls(&device.ioctls.snapshot());
    report.mark("ended");
    Ok(ended)
}

/// Once the run is to end by a signal, the next one does not wait.
fn signals_after(event: &Event, signals: &Signals) {
    if matches!(event, Event::Interrupted) {
        signals.make_next_fatal();
    }
}

/// Input on its way to the guest.
#[derive(Default)]
struct Input {
    /// What the serial port has had no room for.
    waiting: Vec<u8>,
    /// A console nobody is at is looked at again then.
    retry_at: Option<Instant>,
}

const RETRY: Duration = Duration::from_millis(100);

fn wait(
    vm: &Vm,
    console: &mut Console,
    signals: &Signals,
    mut metrics: Option<(&mut MetricsFile, &Meter)>,
) -> Result<Event, RunError> {
    let mut input = Input::default();
    loop {
        if let Some((file, meter)) = &mut metrics {
            file.tick(|| meter.sample());
        }
        let serial = vm.board().serial();
        let listen = serial.is_some() && input.waiting.is_empty() && input.retry_at.is_none();
        let mut polls = [
            readable(signals),
            readable(vm.board().power().event()),
            readable(vm.finished()),
            match console.input() {
                Some(source) if listen => readable(&source),
                _ => ignored(),
            },
            match serial {
                Some(serial) if !input.waiting.is_empty() => readable(serial.input_room()),
                _ => ignored(),
            },
        ];
        let write_at = metrics.as_ref().map(|(file, _)| file.due());
        let timeout = input
            .retry_at
            .into_iter()
            .chain(write_at)
            .min()
            .map(|at| at.saturating_duration_since(Instant::now()));
        poll(&mut polls, timeout)?;
        if input.retry_at.is_some_and(|at| at <= Instant::now()) {
            input.retry_at = None;
        }
        let ready = polls.map(|poll| poll.revents);
        if ready[0] != 0 && signals.read().is_some() {
            return Ok(Event::Interrupted);
        }
        if let Some(request) = vm.board().power().request() {
            return Ok(Event::Power(request));
        }
        if ready[2] != 0 {
            return Ok(vm.take_crash().map_or(Event::VpPanicked, Event::Crashed));
        }
        let Some(serial) = serial else { continue };
        if ready[4] != 0 {
            // Only to make it wait for the next time there is room.
            let _ = serial.input_room().read();
            input.give(serial);
        }
        if ready[3] & libc::POLLIN != 0 {
            let typed = console.read();
            input.waiting.extend(typed.bytes);
            input.give(serial);
            if typed.leave {
                return Ok(Event::Interrupted);
            }
        } else if ready[3] != 0 {
            // Hung up. A pseudo-terminal may get somebody again, anything else ends when it is read.
            if console.pty().is_some() {
                input.retry_at = Some(Instant::now() + RETRY);
            } else {
                console.read();
            }
        }
    }
}

impl Input {
    fn give(&mut self, serial: &Serial) {
        if !self.waiting.is_empty() {
            let taken = serial.input(&self.waiting);
            self.waiting.drain(..taken);
        }
    }
}

fn readable(source: &impl AsRawFd) -> libc::pollfd {
    libc::pollfd {
        fd: source.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    }
}

fn ignored() -> libc::pollfd {
    libc::pollfd {
        fd: -1,
        events: 0,
        revents: 0,
    }
}

fn poll(polls: &mut [libc::pollfd; 5], timeout: Option<Duration>) -> Result<(), RunError> {
    // Rounded up, or the last millisecond would be spent busy.
    let timeout = timeout.map_or(-1, |timeout| {
        i32::try_from(timeout.as_millis() + 1).unwrap_or(i32::MAX)
    });
    // SAFETY: a valid array and its length.
    let result = unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, timeout) };
    if result < 0 {
        let source = io::Error::last_os_error();
        if source.kind() != io::ErrorKind::Interrupted {
            return Err(RunError::Host {
                what: "wait for events",
                source,
            });
        }
        for poll in polls {
            poll.revents = 0;
        }
    }
    Ok(())
}

/// Width of a physical address on this host, in bits.
fn address_bits() -> u32 {
    const SIZES: u32 = 0x8000_0008;
    let known = std::arch::x86_64::__cpuid(0x8000_0000).eax >= SIZES;
    if known {
        std::arch::x86_64::__cpuid(SIZES).eax & 0xff
    } else {
        36
    }
}
