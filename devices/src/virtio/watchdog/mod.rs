//! The watchdog: a guest that has begun to ask for its life and stops doing so is reset.
//!
//! The device has number 35 and one queue. Each buffer the driver makes available is a sign of life; the device writes a 1
//! into it. The first one starts the clock, and when the next is later than [`TIMEOUT`], the machine is reset.
//!
//! Virtio 1.3 reserves the number and says nothing more. What is here is cloud-hypervisor's device, and its driver is one for
//! Linux that its authors keep: Linux itself has none, so a kernel of a distribution does not use this device.

use std::{os::fd::AsRawFd, sync::Arc, time::Duration};

use tracing::warn;
use vmm_sys_util::{epoll::EventSet, timerfd::TimerFd};

use super::{
    Activation, Chain, DeviceError, DeviceKind, Handler, Poll, VirtQueue, VirtioDevice, Worker,
};
use crate::power::{PowerRequest, PowerSwitch};

const QUEUE_SIZE: u16 = 8;
const KICK: u64 = 0;
const EXPIRED: u64 = 1;
/// How many signs of life are answered before other events get their turn.
const TURN: u32 = 64;

/// How long a guest may give no sign of life. Its driver gives one every 15 seconds.
pub const TIMEOUT: Duration = Duration::from_secs(20);

/// A watchdog.
pub struct Watchdog {
    timeout: Duration,
    switch: Arc<dyn PowerSwitch>,
    worker: Option<Worker<Guard>>,
}

impl Watchdog {
    /// A watchdog that resets the machine through `switch` when the guest has given no sign of life for `timeout`.
    #[must_use]
    pub fn new(timeout: Duration, switch: Arc<dyn PowerSwitch>) -> Self {
        Self {
            timeout,
            switch,
            worker: None,
        }
    }
}

impl VirtioDevice for Watchdog {
    fn kind(&self) -> DeviceKind {
        DeviceKind {
            id: 35,
            pci_class: 0xff00,
        }
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, mut driver: Activation) -> Result<(), DeviceError> {
        let queue = driver.queue(0)?;
        let guard = Guard {
            chain: queue.chain(),
            queue,
            timer: TimerFd::new()
                .map_err(|error| DeviceError::host("cannot make a timer")(error.into()))?,
            timeout: self.timeout,
            switch: Arc::clone(&self.switch),
        };
        let worker = Worker::spawn("watchdog", guard, driver.notify)
            .map_err(DeviceError::host("cannot start a thread"))?;
        self.worker = Some(worker);
        Ok(())
    }

    /// A driver that resets the device is alive: the clock stands until its next sign.
    fn reset(&mut self) {
        self.worker = None;
    }
}

/// The device's thread.
struct Guard {
    queue: VirtQueue,
    chain: Chain,
    timer: TimerFd,
    timeout: Duration,
    switch: Arc<dyn PowerSwitch>,
}

impl Guard {
    fn answer(&mut self) -> Result<(), DeviceError> {
        for _ in 0..TURN {
            if !self.queue.pop(&mut self.chain)? {
                self.queue.signal()?;
                if self.queue.enable_kicks()? {
                    continue;
                }
                return Ok(());
            }
            if self.chain.writable.write_at(0, &[1]) == 0 {
                return Err(DeviceError::Malformed("a sign of life without a buffer"));
            }
            self.queue.push(self.chain.head(), 1)?;
            self.timer
                .reset(self.timeout, None)
                .map_err(|error| DeviceError::host("cannot set a timer")(error.into()))?;
        }
        self.queue.come_back();
        self.queue.signal()
    }

    fn expire(&mut self) -> Result<(), DeviceError> {
        // A sign of life may have come at the last moment, and then the timer runs again.
        if self.timer.is_armed().unwrap_or(false) {
            return Ok(());
        }
        // The event stays until the timer is set anew.
        self.timer
            .clear()
            .map_err(|error| DeviceError::host("cannot set a timer")(error.into()))?;
        warn!(
            "no sign of life from the guest for {} seconds: the watchdog resets it",
            self.timeout.as_secs()
        );
        self.switch.request(PowerRequest::Reset);
        Ok(())
    }
}

impl Handler for Guard {
    fn start(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        poll.add_bell(self.queue.kick(), KICK)
            .and_then(|()| poll.add(self.timer.as_raw_fd(), EXPIRED, EventSet::IN))
            .map_err(DeviceError::host("cannot wait for the driver"))
    }

    fn ready(&mut self, token: u64, _events: EventSet, _poll: &Poll) -> Result<(), DeviceError> {
        if token == EXPIRED {
            return self.expire();
        }
        self.answer()
    }
}
