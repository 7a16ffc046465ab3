//! Reset and power-off: the ACPI registers of a hardware-reduced platform, and how the VMM learns of a request.

use std::sync::Arc;

use crate::BusDevice;

/// What the guest asks the machine to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerRequest {
    /// Start again from the beginning.
    Reset,
    /// Switch off.
    PowerOff,
}

/// The VMM's side of a reset or power-off request.
///
/// Called on the thread of the processor that asked, from within its exit, after which the processor should not run again; or on
/// the thread of a device that asks instead of the guest.
pub trait PowerSwitch: Send + Sync {
    /// Takes note of `request`.
    fn request(&self, request: PowerRequest);
}

/// Offset of the sleep control register: the guest writes [`SOFT_OFF_TYPE`] and the enable bit to switch off.
pub const SLEEP_CONTROL: u64 = 0;
/// Offset of the sleep status register; there is no sleep to wake from, so it reads zero.
pub const SLEEP_STATUS: u64 = 1;
/// Offset of the reset register.
pub const RESET: u64 = 2;
/// What the guest writes to [`RESET`] to reset the machine.
pub const RESET_VALUE: u8 = 1;
/// The sleep type of the soft-off state S5, as the DSDT's `\_S5` names it.
pub const SOFT_OFF_TYPE: u8 = 5;

/// Bit 5 of the sleep control register starts the transition to the type in bits 2 to 4.
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111;

/// The ACPI sleep control, sleep status and reset registers, one byte each. All read as zero.
pub struct AcpiPower {
    switch: Arc<dyn PowerSwitch>,
}

impl AcpiPower {
    /// Registers that pass requests on to `switch`.
    pub fn new(switch: Arc<dyn PowerSwitch>) -> Self {
        Self { switch }
    }
}

impl BusDevice for AcpiPower {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (register, &value) in (offset..).zip(data) {
            match register {
                SLEEP_CONTROL
                    if value & SLEEP_ENABLE != 0
                        && (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK == SOFT_OFF_TYPE =>
                {
                    self.switch.request(PowerRequest::PowerOff);
                }
                RESET if value == RESET_VALUE => self.switch.request(PowerRequest::Reset),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Remembers what was asked.
    #[derive(Default)]
    pub(crate) struct Recorder(Mutex<Vec<PowerRequest>>);

    impl PowerSwitch for Recorder {
        fn request(&self, request: PowerRequest) {
            self.0.lock().unwrap().push(request);
        }
    }

    impl Recorder {
        pub(crate) fn take(&self) -> Vec<PowerRequest> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    #[test]
    fn soft_off_needs_type_and_enable() {
        let switch = Arc::new(Recorder::default());
        let power = AcpiPower::new(switch.clone());
        for value in [0, SLEEP_ENABLE, SOFT_OFF_TYPE << 2, SLEEP_ENABLE | 3 << 2] {
            power.write(SLEEP_CONTROL, &[value]);
            assert_eq!(switch.take(), []);
        }
        power.write(SLEEP_CONTROL, &[SLEEP_ENABLE | SOFT_OFF_TYPE << 2]);
        assert_eq!(switch.take(), [PowerRequest::PowerOff]);
    }

    #[test]
    fn reset_needs_its_value() {
        let switch = Arc::new(Recorder::default());
        let power = AcpiPower::new(switch.clone());
        power.write(RESET, &[0]);
        power.write(RESET, &[0xff]);
        power.write(SLEEP_STATUS, &[RESET_VALUE]);
        assert_eq!(switch.take(), []);
        power.write(RESET, &[RESET_VALUE]);
        assert_eq!(switch.take(), [PowerRequest::Reset]);
    }

    #[test]
    fn wide_and_empty_accesses_are_bytes_side_by_side() {
        let switch = Arc::new(Recorder::default());
        let power = AcpiPower::new(switch.clone());
        power.write(SLEEP_CONTROL, &[]);
        power.write(SLEEP_CONTROL, &[0, 0, RESET_VALUE]);
        assert_eq!(switch.take(), [PowerRequest::Reset]);
        let mut data = [0xaa; 3];
        power.read(0, &mut data);
        assert_eq!(data, [0; 3]);
    }
}
