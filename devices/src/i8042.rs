//! The keyboard controller, of which only the line to the processor's reset pin exists.
//!
//! The ACPI tables say that there is none, so guests do not probe it; kernels still pull its reset line when all else
//! failed.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};

use vm_superio::{I8042Device, Trigger};

use crate::BusDevice;
use crate::power::{PowerRequest, PowerSwitch};

/// The controller's command port; it belongs on port 0x64.
pub struct I8042 {
    device: Mutex<I8042Device<ResetLine>>,
}

/// Offset of port 0x64 from the controller's first port.
const COMMAND: u8 = 4;

struct ResetLine(Arc<dyn PowerSwitch>);

impl Trigger for ResetLine {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.request(PowerRequest::Reset);
        Ok(())
    }
}

impl I8042 {
    /// A controller that passes a reset on to `switch`.
    pub fn new(switch: Arc<dyn PowerSwitch>) -> Self {
        Self {
            device: Mutex::new(I8042Device::new(ResetLine(switch))),
        }
    }
}

impl BusDevice for I8042 {
    /// Status zero: both buffers empty, so that a guest which waits for that does not wait.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        let mut device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        data.fill_with(|| device.read(COMMAND));
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, Some(&command)) = (offset, data.first()) {
            let mut device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
            let Ok(()) = device.write(COMMAND, command);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::power::tests::Recorder;

    #[test]
    fn only_the_reset_command_resets() {
        let switch = Arc::new(Recorder::default());
        let controller = I8042::new(switch.clone());
        for command in 0..=0xfd {
            controller.write(0, &[command]);
        }
        controller.write(0, &[]);
        controller.write(1, &[0xfe]);
        assert_eq!(switch.take(), []);
        controller.write(0, &[0xfe]);
        controller.write(0, &[0xfe, 0xfe]);
        assert_eq!(switch.take(), [PowerRequest::Reset; 2]);
    }

    #[test]
    fn the_status_says_that_nothing_is_pending() {
        let controller = I8042::new(Arc::new(Recorder::default()));
        let mut data = [0xff; 4];
        controller.read(0, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
