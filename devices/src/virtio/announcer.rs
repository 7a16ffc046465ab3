//! The way from a device's handle, which lives as long as the machine, to a driver that comes and goes.

use std::sync::{Arc, Mutex, PoisonError};

use super::Notify;

/// Tells the driver of a changed configuration, when there is one.
#[derive(Default)]
pub(crate) struct Announcer(Mutex<Option<Arc<dyn Notify>>>);

impl Announcer {
    /// The driver is there, until it is exchanged for `None`.
    pub(crate) fn set(&self, notify: Option<Arc<dyn Notify>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = notify;
    }

    /// The configuration has changed. A driver that is not there yet reads it when it comes.
    pub(crate) fn announce(&self) {
        if let Some(notify) = &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            notify.config_changed();
        }
    }
}
