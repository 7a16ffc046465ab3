//! Partition properties: what can be read, what can be set, and when.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use kvm_bindings::{CpuId, kvm_clock_data};

use crate::config::{Scheduler, config};
use crate::device::tsc_hz;
use crate::errno::HvStatus;
use crate::features::Features;
use crate::lps::{
    self,
    shares::{self, Shares},
};
use crate::partition::Partition;
use crate::trace;

/// `HV_PARTITION_PROPERTY_*` codes.
pub(crate) mod code {
    pub(crate) const PRIVILEGE_FLAGS: u32 = 0x0001_0000;
    pub(crate) const SYNTHETIC_PROC_FEATURES: u32 = 0x0001_0001;
    pub(crate) const SUSPEND: u32 = 0x0002_0000;
    pub(crate) const CPU_RESERVE: u32 = 0x0002_0001;
    pub(crate) const CPU_CAP: u32 = 0x0002_0002;
    pub(crate) const CPU_WEIGHT: u32 = 0x0002_0003;
    pub(crate) const CPU_GROUP_ID: u32 = 0x0002_0004;
    pub(crate) const INTEGRATED_SCHEDULER: u32 = 0x0002_0005;
    pub(crate) const TIME_FREEZE: u32 = 0x0003_0003;
    pub(crate) const REFERENCE_TIME: u32 = 0x0003_0005;
    pub(crate) const PROCESSORS_PER_SOCKET: u32 = 0x0005_0003;
    pub(crate) const GPA_PAGE_ACCESS_TRACKING: u32 = 0x0005_0005;
    pub(crate) const UNIMPLEMENTED_MSR_ACTION: u32 = 0x0005_0017;
    pub(crate) const PROCESSOR_VENDOR: u32 = 0x0006_0000;
    pub(crate) const PROCESSOR_XSAVE_FEATURES: u32 = 0x0006_0002;
    pub(crate) const PHYSICAL_ADDRESS_WIDTH: u32 = 0x0006_0006;
    pub(crate) const XSAVE_STATES: u32 = 0x0006_0007;
    pub(crate) const MAX_XSAVE_DATA_SIZE: u32 = 0x0006_0008;
    pub(crate) const PROCESSOR_CLOCK_FREQUENCY: u32 = 0x0006_0009;
    pub(crate) const PROCESSOR_FEATURES0: u32 = 0x0006_000a;
    pub(crate) const PROCESSOR_FEATURES1: u32 = 0x0006_000b;
    pub(crate) const PROCESSOR_VIRTUALIZATION_FEATURES: u32 = 0x0008_0000;
    pub(crate) const VMM_CAPABILITIES: u32 = 0x0009_0007;
    pub(crate) const ASSIGNABLE_SYNTHETIC_PROC_FEATURES: u32 = 0x0009_0009;
}

/// VMM capability bit: the integrated scheduler can be enabled.
const VMM_ENABLE_INTEGRATED_SCHEDULER: u64 = 1 << 6;

/// What a child may be given of `SYNTHETIC_PROC_FEATURES`: the bits that KVM's enlightenments can honour.
const ASSIGNABLE_SYNTHETIC_PROC_FEATURES: u64 = {
    // Presence, the Hv#1 interface, run time to VP index, reference TSC, frequencies, extended fast hypercalls,
    // direct timers, TLB flush and cluster IPI hypercalls.
    let access = 0x3ff | 1 << 11;
    access | 1 << 18 | 1 << 22 | 1 << 25 | 1 << 26
};

/// Nanoseconds in a unit of reference time.
const REFERENCE_TIME_NS: u64 = 100;

/// Properties of the processor, of the host or as one partition sees it.
#[derive(Debug, Clone)]
pub(crate) struct Processor {
    /// What it can do.
    pub(crate) features: Features,
    /// Width of a physical address.
    pub(crate) physical_bits: u8,
    /// Components of extended state (XCR0 bits) and the bytes they take in compacted form.
    xsave: (u64, u64),
    /// `HV_PROCESSOR_VENDOR_*`.
    vendor: u64,
}

impl Processor {
    /// The processor that `cpuid` (what KVM supports) describes.
    pub(crate) fn of(cpuid: &CpuId) -> Self {
        let find = |leaf: u32| cpuid.as_slice().iter().find(|entry| entry.function == leaf);
        let vendor = match find(0).map(|entry| entry.ebx.to_le_bytes()) {
            Some(bytes) if &bytes == b"Genu" => 1,
            Some(bytes) if &bytes == b"Hygo" => 2,
            _ => 0,
        };
        let features = Features::of(cpuid.as_slice());
        Self {
            features,
            physical_bits: find(0x8000_0008).map_or(36, |entry| entry.eax as u8),
            xsave: xsave_area(cpuid, features),
            vendor,
        }
    }

    /// The same with features turned off.
    pub(crate) fn restricted(&self, cpuid: &CpuId, disabled: Features) -> Self {
        let features = self.features.without(disabled);
        Self {
            features,
            xsave: xsave_area(cpuid, features),
            ..self.clone()
        }
    }

    /// The value of a property the processor decides.
    pub(crate) fn property(&self, code: u32) -> Option<u64> {
        Some(match code {
            code::PROCESSOR_FEATURES0 => self.features.banks[0],
            code::PROCESSOR_FEATURES1 => self.features.banks[1],
            code::PROCESSOR_XSAVE_FEATURES => self.features.xsave,
            code::PHYSICAL_ADDRESS_WIDTH => self.physical_bits.into(),
            code::XSAVE_STATES => self.xsave.0,
            code::MAX_XSAVE_DATA_SIZE => self.xsave.1,
            code::PROCESSOR_VENDOR => self.vendor,
            code::PROCESSOR_CLOCK_FREQUENCY => tsc_hz(),
            code::PROCESSOR_VIRTUALIZATION_FEATURES => 0,
            _ => return None,
        })
    }
}

/// The components of extended state that `features` leave of what KVM supports, and the size of the compacted area.
fn xsave_area(cpuid: &CpuId, features: Features) -> (u64, u64) {
    const LEGACY_AND_HEADER: u64 = 512 + 64;
    let leaf = |index: u32| {
        cpuid
            .as_slice()
            .iter()
            .find(|entry| entry.function == 0xd && entry.index == index)
    };
    let supported = leaf(0).map_or(0b11, |entry| {
        u64::from(entry.eax) | u64::from(entry.edx) << 32
    });
    let states = supported & features.xsave_states() | 0b11;
    let size = (2..63)
        .filter(|component| states >> component & 1 != 0)
        .filter_map(leaf)
        .fold(LEGACY_AND_HEADER, |size, entry| {
            let start = if entry.ecx & 2 != 0 {
                size.next_multiple_of(64)
            } else {
                size
            };
            start + u64::from(entry.eax)
        });
    (states, size)
}

/// Partition time: running, or stopped at a moment.
#[derive(Debug, Clone, Copy)]
enum Clock {
    Running,
    /// Nanoseconds.
    Frozen(u64),
}

/// The properties of one partition.
pub(crate) struct Properties {
    /// The processor as the guest sees it.
    pub(crate) processor: Processor,
    stored: Mutex<BTreeMap<u32, u64>>,
    clock: Mutex<Clock>,
    initialized: AtomicBool,
}

impl Properties {
    /// The properties of a new partition.
    pub(crate) fn new(processor: Processor) -> Self {
        let defaults = [
            (code::PRIVILEGE_FLAGS, 0),
            (code::SYNTHETIC_PROC_FEATURES, 0),
            (code::SUSPEND, 0),
            (code::CPU_RESERVE, 0),
            (code::CPU_CAP, shares::WHOLE),
            (code::CPU_WEIGHT, shares::DEFAULT_WEIGHT),
            (code::CPU_GROUP_ID, 0),
            (code::PROCESSORS_PER_SOCKET, 0),
            (code::UNIMPLEMENTED_MSR_ACTION, 0),
        ];
        Self {
            processor,
            stored: Mutex::new(defaults.into()),
            clock: Mutex::new(Clock::Running),
            initialized: AtomicBool::new(false),
        }
    }

    /// Whether `MSHV_INITIALIZE_PARTITION` has been done.
    pub(crate) fn is_initialized(&self) -> bool {
        self.initialized.load(Ordering::Acquire)
    }

    /// `MSHV_INITIALIZE_PARTITION`.
    pub(crate) fn initialize(&self) {
        self.initialized.store(true, Ordering::Release);
    }

    /// The value of a property that is stored or decided by the processor.
    ///
    /// # Errors
    /// `UNKNOWN_PROPERTY`.
    pub(crate) fn get(&self, code: u32) -> Result<u64, HvStatus> {
        if let Some(value) = self.processor.property(code) {
            return Ok(value);
        }
        let stored = self.stored.lock().unwrap_or_else(PoisonError::into_inner);
        stored.get(&code).copied().ok_or(HvStatus::UNKNOWN_PROPERTY)
    }

    /// What the hypervisor's scheduler grants each VP.
    pub(crate) fn shares(&self) -> Shares {
        let stored = self.stored.lock().unwrap_or_else(PoisonError::into_inner);
        let value = |code, default| stored.get(&code).copied().unwrap_or(default);
        Shares {
            weight: value(code::CPU_WEIGHT, shares::DEFAULT_WEIGHT),
            cap: value(code::CPU_CAP, shares::WHOLE),
            reserve: value(code::CPU_RESERVE, 0),
        }
    }

    fn store(&self, code: u32, value: u64) {
        self.stored
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(code, value);
    }
}

impl Partition {
    /// `HVCALL_GET_PARTITION_PROPERTY`.
    ///
    /// # Errors
    /// `UNKNOWN_PROPERTY`, which the trace names.
    pub(crate) fn property(&self, code: u32) -> Result<u64, HvStatus> {
        match code {
            code::TIME_FREEZE => {
                let clock = self
                    .properties
                    .clock
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                Ok(matches!(*clock, Clock::Frozen(_)).into())
            }
            code::REFERENCE_TIME => {
                let clock = self
                    .properties
                    .clock
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                let ns = match *clock {
                    Clock::Frozen(ns) => ns,
                    Clock::Running => {
                        self.vm
                            .get_clock()
                            .map_err(|_| HvStatus::INVALID_PARTITION_STATE)?
                            .clock
                    }
                };
                Ok(ns / REFERENCE_TIME_NS)
            }
            code::GPA_PAGE_ACCESS_TRACKING => Ok(self.memory.is_tracking().into()),
            other => self
                .properties
                .get(other)
                .inspect_err(|_| missing("GET", other)),
        }
    }

    /// `HVCALL_SET_PARTITION_PROPERTY`.
    ///
    /// # Errors
    /// `UNKNOWN_PROPERTY`, `INVALID_PARTITION_STATE` for an early property after initialization,
    /// `PROPERTY_VALUE_OUT_OF_RANGE`, `ACCESS_DENIED` for one that cannot be set.
    pub(crate) fn set_property(&self, code: u32, value: u64) -> Result<(), HvStatus> {
        let properties = &self.properties;
        let within = |ok: bool| {
            if ok {
                Ok(())
            } else {
                Err(HvStatus::PROPERTY_VALUE_OUT_OF_RANGE)
            }
        };
        match code {
            code::PRIVILEGE_FLAGS | code::SYNTHETIC_PROC_FEATURES | code::PROCESSORS_PER_SOCKET => {
                if properties.is_initialized() {
                    return Err(HvStatus::INVALID_PARTITION_STATE);
                }
            }
            code::CPU_RESERVE => within(value <= properties.get(code::CPU_CAP)?)?,
            code::CPU_CAP => {
                let reserve = properties.get(code::CPU_RESERVE)?;
                within((reserve.max(1)..=shares::WHOLE).contains(&value))?;
            }
            code::CPU_WEIGHT => within((1..=shares::MAX_WEIGHT).contains(&value))?,
            code::CPU_GROUP_ID => within(value == 0)?,
            code::UNIMPLEMENTED_MSR_ACTION => within(value <= 1)?,
            code::TIME_FREEZE => {
                within(value <= 1)?;
                return self.freeze(value == 1);
            }
            code::REFERENCE_TIME => return self.set_reference_time(value),
            code::GPA_PAGE_ACCESS_TRACKING => {
                // Bit 0: enabled; bit 1: large pages, a hint.
                within(value <= 3)?;
                return self.memory.set_tracking(value & 1 != 0);
            }
            other if properties.processor.property(other).is_some() => {
                return Err(HvStatus::ACCESS_DENIED);
            }
            other => {
                missing("SET", other);
                return Err(HvStatus::UNKNOWN_PROPERTY);
            }
        }
        properties.store(code, value);
        if matches!(code, code::CPU_RESERVE | code::CPU_CAP | code::CPU_WEIGHT) {
            lps::reconsider();
        }
        Ok(())
    }

    fn set_clock(&self, ns: u64) -> Result<(), HvStatus> {
        let data = kvm_clock_data {
            clock: ns,
            ..Default::default()
        };
        self.vm
            .set_clock(&data)
            .map_err(|_| HvStatus::INVALID_PARTITION_STATE)
    }

    fn freeze(&self, freeze: bool) -> Result<(), HvStatus> {
        let mut clock = self
            .properties
            .clock
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match (*clock, freeze) {
            (Clock::Running, true) => {
                let now = self
                    .vm
                    .get_clock()
                    .map_err(|_| HvStatus::INVALID_PARTITION_STATE)?;
                *clock = Clock::Frozen(now.clock);
            }
            (Clock::Frozen(ns), false) => {
                self.set_clock(ns)?;
                *clock = Clock::Running;
            }
            _ => {}
        }
        Ok(())
    }

    fn set_reference_time(&self, value: u64) -> Result<(), HvStatus> {
        let ns = value
            .checked_mul(REFERENCE_TIME_NS)
            .ok_or(HvStatus::PROPERTY_VALUE_OUT_OF_RANGE)?;
        let mut clock = self
            .properties
            .clock
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match &mut *clock {
            Clock::Frozen(at) => *at = ns,
            Clock::Running => self.set_clock(ns)?,
        }
        Ok(())
    }
}

/// `HVCALL_GET_PARTITION_PROPERTY_EX` on the host itself: what is declared about schedulers. The payload follows.
///
/// # Errors
/// `UNKNOWN_PROPERTY`, which the trace names.
pub(crate) fn host_property_ex(code: u32) -> Result<Vec<u8>, HvStatus> {
    let scheduler = config().declared;
    match (code, scheduler) {
        (code::VMM_CAPABILITIES, _) => {
            let bank = if scheduler == Scheduler::Root {
                0
            } else {
                VMM_ENABLE_INTEGRATED_SCHEDULER
            };
            Ok(banked(bank))
        }
        (code::ASSIGNABLE_SYNTHETIC_PROC_FEATURES, _) => {
            Ok(banked(ASSIGNABLE_SYNTHETIC_PROC_FEATURES))
        }
        (code::INTEGRATED_SCHEDULER, Scheduler::Integrated) => Ok(1u64.to_le_bytes().into()),
        (code::INTEGRATED_SCHEDULER, Scheduler::Core) => Ok(0u64.to_le_bytes().into()),
        _ => {
            missing("GET", code);
            Err(HvStatus::UNKNOWN_PROPERTY)
        }
    }
}

/// The shape of a banked property: how many banks (u16), three reserved words, then the banks.
fn banked(bank: u64) -> Vec<u8> {
    let mut payload = vec![1, 0, 0, 0, 0, 0, 0, 0];
    payload.extend(bank.to_le_bytes());
    payload
}

/// Names a property nobody implements.
pub(crate) fn missing(what: &str, code: u32) {
    trace::unimplemented(&format!("HVCALL_{what}_PARTITION_PROPERTY {code:#010x}"));
}
