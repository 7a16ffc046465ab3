//! What the threads of a network device share.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use arc_swap::ArcSwap;

use super::{super::Notify, filter::Filter, mac::MacAddr};

/// State that more than one thread of a device looks at.
pub(super) struct Shared {
    /// What is let through to the guest.
    pub(super) filter: Arc<ArcSwap<Filter>>,
    address: Mutex<MacAddr>,
    connected: AtomicBool,
}

impl Shared {
    pub(super) fn new(address: MacAddr) -> Self {
        Self {
            filter: Arc::new(ArcSwap::from_pointee(Filter::open(address))),
            address: Mutex::new(address),
            connected: AtomicBool::new(true),
        }
    }

    /// The device's address.
    pub(super) fn address(&self) -> MacAddr {
        *self.address.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_address(&self, address: MacAddr) {
        *self.address.lock().unwrap_or_else(PoisonError::into_inner) = address;
    }

    /// Whether there is a link.
    pub(super) fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Acquire)
    }

    /// The link is gone, which the driver hears of.
    pub(super) fn disconnect(&self, notify: &dyn Notify) {
        if self.connected.swap(false, Ordering::AcqRel) {
            notify.config_changed();
        }
    }
}
