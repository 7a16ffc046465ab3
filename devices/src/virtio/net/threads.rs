//! Frames moved by threads of ours, one for each pair of queues.

use std::{io, sync::Arc};

use super::{
    super::{
        Counted, Counters, DeviceError, Worker,
        rate_limiter::{Limits, RateLimiter},
    },
    Datapath, Running, Settings, Start,
    backend::{Backend, Cable, Port},
    control::Pairs,
    counts::counters,
    features,
    pair::{Pair, Position, Switch},
    receive::Receiver,
    transmit::Transmitter,
};

/// A cable, and the threads that work on it.
pub(super) struct Threads {
    name: String,
    limits: Limits,
    backend: Arc<dyn Backend>,
    /// The ports that no thread works on.
    ports: Vec<Option<Box<dyn Port>>>,
    workers: Vec<Worker<Pair>>,
    counters: Arc<Counters<4>>,
}

impl Threads {
    pub(super) fn new(settings: &Settings, cable: Cable) -> Self {
        Self {
            name: settings.name.clone(),
            limits: settings.limits,
            backend: cable.backend,
            counters: Arc::new(counters(cable.ports.len())),
            ports: cable.ports.into_iter().map(Some).collect(),
            workers: Vec::new(),
        }
    }
}

impl Datapath for Threads {
    fn features(&self) -> u64 {
        self.backend.features() | features::FILTERS
    }

    fn pairs(&self) -> usize {
        self.ports.len()
    }

    fn start(&mut self, start: Start<'_>) -> Result<Running, DeviceError> {
        let limiter = || RateLimiter::new(&self.limits);
        let (receiving, sending) = (limiter(), limiter());
        let gate = |limiter: &RateLimiter| {
            limiter
                .gate()
                .map_err(DeviceError::host("cannot limit the rate"))
        };
        let switches: Vec<_> = self
            .ports
            .iter()
            .map(|_| Switch::new(Position::Off).map(Arc::new))
            .collect::<Result<_, _>>()
            .map_err(DeviceError::host("cannot start"))?;
        let pairs = Switches {
            usable: start.pairs.len(),
            backend: Arc::clone(&self.backend),
            switches: switches.clone(),
        };
        pairs
            .set_offloads(start.agreed & features::GUEST_OFFLOADS)
            .map_err(DeviceError::host("cannot set the offloads"))?;
        pairs
            .use_first(1)
            .map_err(DeviceError::host("cannot use the first pair of queues"))?;
        for (index, ((rx, tx), switch)) in start.pairs.into_iter().zip(switches).enumerate() {
            let receiver = Receiver::new(
                rx,
                start.chains,
                start.usual,
                gate(&receiving)?,
                Arc::clone(&start.shared.filter),
                self.counters.lane(index),
            );
            let transmitter = Transmitter::new(tx, gate(&sending)?, self.counters.lane(index));
            let port = self
                .ports
                .get_mut(index)
                .and_then(Option::take)
                .ok_or_else(|| DeviceError::Host {
                    what: "the way to the network was lost",
                    source: io::ErrorKind::NotConnected.into(),
                })?;
            let pair = Pair::new(
                receiver,
                transmitter,
                port,
                switch,
                Arc::clone(start.shared),
                Arc::clone(start.notify),
            );
            let name = format!("{}-q{index}", self.name);
            let worker = Worker::spawn(&name, pair, Arc::clone(start.notify))
                .map_err(DeviceError::host("cannot start a thread"))?;
            self.workers.push(worker);
        }
        Ok(Running {
            pairs: Arc::new(pairs),
            faults: Vec::new(),
        })
    }

    fn counters(&self) -> Option<Arc<dyn Counted>> {
        Some(Arc::clone(&self.counters) as Arc<dyn Counted>)
    }

    fn stop(&mut self) {
        for (port, worker) in self.ports.iter_mut().zip(self.workers.drain(..)) {
            *port = worker.stop().map(Pair::into_port);
        }
    }
}

/// The pairs' switches.
struct Switches {
    /// How many pairs the driver has set up.
    usable: usize,
    backend: Arc<dyn Backend>,
    switches: Vec<Arc<Switch>>,
}

impl Pairs for Switches {
    fn count(&self) -> usize {
        self.usable
    }

    fn use_first(&self, count: usize) -> io::Result<()> {
        for (index, switch) in self.switches.iter().enumerate() {
            // A port is attached for as long as its pair is on.
            if index < count {
                self.backend.attach(index)?;
                switch.turn(Position::On);
            } else {
                switch.turn(Position::Off);
                self.backend.detach(index)?;
            }
        }
        Ok(())
    }

    fn set_offloads(&self, features: u64) -> io::Result<()> {
        self.backend.set_offloads(features)
    }
}
