//! The control thread: starts the machine, waits for what happens to it, and says how it ended.
//!
//! It waits with `poll` on six things: signals, the guest's power switch, VP threads that end by themselves, the console's
//! input, what clients of the API ask for, and vCPUs that the guest lets go. Between them it writes the metrics, if a file for them was asked for.

use std::{
    io::{self, Write},
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use devices::{power::PowerRequest, serial::Serial};
use tracing::info;
use vcpu::Crash;

use crate::{
    api::{ApiError, ApiSocket, Desk, Queue, Refusal, Reply, Server, Wish},
    board::Events,
    config::{ConfigError, VmConfig},
    console::{Console, ConsoleError},
    hvc::{Hvc, HvcError},
    memory::address_bits,
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
    /// The API.
    #[error(transparent)]
    Api(#[from] ApiError),
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
    /// A client of the API wishes something of the whole machine.
    Asked(Wish, Reply),
}

/// Runs the machine `config` describes until it ends, through any number of resets. Call it on the main thread, before there
/// are others. What happens is noted in `report`. With `socket`, clients can ask things of the machine there, and it can be
/// shut down and started again.
///
/// # Errors
/// [`RunError`]: one line with its causes.
pub fn run(
    config: &VmConfig,
    socket: Option<&ApiSocket>,
    report: &mut Report,
) -> Result<Ended, RunError> {
    let mut config = config.clone();
    config.name_devices();
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
    info!("{detection}");
    for evidence in &detection.evidence {
        info!(
            "evidence: {}: {} ({})",
            evidence.source, evidence.value, evidence.meaning
        );
    }
    // Also for whoever is refused.
    report.scheduler = Some(detection.clone());
    let scheduling = Scheduling::begin(&config, &detection)?;
    let metrics = config.scheduling.metrics.clone();
    let mut metrics = metrics
        .as_deref()
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
    let (_server, requests) = socket.map(Server::start).transpose()?.unzip();
    let events = match socket {
        Some(_) => Events::On,
        // The guest finds its memory modules by the events' registers.
        None if config.memory.modules() > 0 => Events::On,
        None => Events::Off,
    };
    let mut announcement = Some(announcement);
    report.vcpus = config.cpus.boot_vcpus;
    report.plan = scheduling.as_ref().map(Scheduling::plan);
    report.mark("ready");

    let mut state = State::Created;
    // The client that is to be told when the machine has started.
    let mut starter: Option<Reply> = None;
    let ended = loop {
        state.advance(State::Booting)?;
        let prepared = Vm::prepare(
            &device,
            capabilities,
            &config,
            &console,
            &hvc,
            events,
            scheduling.as_ref(),
        );
        let vm = match (prepared, &mut starter) {
            (Ok(vm), _) => vm,
            (Err(error), None) => return Err(error.into()),
            (Err(error), starter) => {
                state.advance(State::Shutdown)?;
                if let Some(reply) = starter.take() {
                    reply.send(Err(Refusal::not_started(&error)));
                }
                let scheduling = scheduling.as_ref();
                *starter = idle(
                    &mut config,
                    scheduling,
                    &mut console,
                    &signals,
                    requests.as_ref(),
                )?;
                if starter.is_none() {
                    break Ended::Interrupted;
                }
                continue;
            }
        };
        let partition = vm.partition();
        let vcpus = config.cpus.boot_vcpus;
        let placed = match &scheduling {
            Some(scheduling) => {
                let before = report.metering.take();
                let placed = scheduling.place(&device, &partition, vcpus, before, vm.bound());
                Some(placed.inspect_err(|error| report.effects = error.effects())?)
            }
            None => None,
        };
        let plan = placed.as_ref().map(Placed::to_string).unwrap_or_default();
        for line in plan.lines() {
            info!("{line}");
        }
        if let Some(announcement) = announcement.take() {
            // Whoever read standard error may be gone, and the machine runs all the same.
            let _ = write!(io::stderr(), "{announcement}{plan}");
        }
        let mut vm = vm.start(placed.as_ref())?;
        state.advance(State::Running)?;
        report.mark("running");
        if let Some(reply) = starter.take() {
            reply.done();
        }
        let mut desk = Desk {
            config: &mut config,
            vm: Some(&vm),
            placed: placed.as_ref(),
            scheduling: scheduling.as_ref(),
            state,
            address_bits: address_bits(),
        };
        let event = wait(
            &mut desk,
            &vm,
            &mut console,
            &signals,
            requests.as_ref(),
            metrics.as_mut().zip(placed.as_ref()),
        )?;
        desk.forget_ejected();
        report.vcpus = config.cpus.boot_vcpus;
        signals_after(&event, &signals);
        // Once while the threads are there to be read, and once more for what the end itself amounts to.
        let _ = placed.as_ref().map(Placed::sample);
        let clean = vm.stop();
        report.metering = placed.as_ref().map(Placed::sample);
        report.effects = placed.as_ref().map(Placed::effects);
        report.plan = placed.as_ref().map(Placed::plan);
        drop(placed);
        report.add_boot(&vm);
        drop(vm);
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
            Event::Asked(wish, reply) => {
                state.advance(State::Shutdown)?;
                starter = match wish {
                    Wish::Reboot | Wish::Boot => Some(reply),
                    Wish::ShutDown => {
                        reply.done();
                        idle(
                            &mut config,
                            scheduling.as_ref(),
                            &mut console,
                            &signals,
                            requests.as_ref(),
                        )?
                    }
                    Wish::Leave => {
                        reply.done();
                        None
                    }
                };
                if starter.is_none() {
                    break Ended::Interrupted;
                }
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
    desk: &mut Desk<'_>,
    vm: &Vm,
    console: &mut Console,
    signals: &Signals,
    requests: Option<&Queue>,
    mut metrics: Option<(&mut MetricsFile, &Placed<'_>)>,
) -> Result<Event, RunError> {
    let mut input = Input::default();
    loop {
        if let Some((file, placed)) = &mut metrics {
            file.tick(|| placed.sample());
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
            requests.map_or_else(ignored, readable),
            match vm.board().processors() {
                Some(processors) => readable(processors.news()),
                None => ignored(),
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
        if ready[6] != 0 {
            vm.settle(desk.placed);
        }
        if ready[5] != 0
            && let Some((wish, reply)) = serve(desk, requests)
        {
            return Ok(Event::Asked(wish, reply));
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

/// How many requests are answered before signals and the guest are looked at again.
const REQUESTS: usize = 16;

/// Answers what is asked, up to a wish that changes the state of the machine.
fn serve(desk: &mut Desk<'_>, requests: Option<&Queue>) -> Option<(Wish, Reply)> {
    let requests = requests?;
    (0..REQUESTS).find_map(|_| desk.serve(requests.next()?))
}

/// Waits, without a machine, for somebody to start it again, who is returned, or to end it all.
fn idle(
    config: &mut VmConfig,
    scheduling: Option<&Scheduling>,
    console: &mut Console,
    signals: &Signals,
    requests: Option<&Queue>,
) -> Result<Option<Reply>, RunError> {
    let mut desk = Desk {
        config,
        vm: None,
        placed: None,
        scheduling,
        state: State::Shutdown,
        address_bits: address_bits(),
    };
    let mut listen = true;
    loop {
        if let Some((wish, reply)) = serve(&mut desk, requests) {
            if wish == Wish::Boot {
                return Ok(Some(reply));
            }
            reply.done();
            return Ok(None);
        }
        let mut polls = [
            readable(signals),
            requests.map_or_else(ignored, readable),
            match console.input() {
                Some(source) if listen => readable(&source),
                _ => ignored(),
            },
        ];
        poll(&mut polls, None)?;
        if polls[0].revents != 0 && signals.read().is_some() {
            signals.make_next_fatal();
            return Ok(None);
        }
        // Nobody is there to get what is typed, but for whoever wants to leave.
        if polls[2].revents & libc::POLLIN != 0 {
            if console.read().leave {
                return Ok(None);
            }
        } else if polls[2].revents != 0 {
            listen = false;
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

fn poll(polls: &mut [libc::pollfd], timeout: Option<Duration>) -> Result<(), RunError> {
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
