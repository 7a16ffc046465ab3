//! Processors that come and go while the guest runs: who is there, as the guest's ACPI reads it.
//!
//! | offset | bytes | |
//! |---|---|---|
//! | 0 to 28 | 4 each | processors that are there, one bit each, 32 to a double word |
//! | 32 to 60 | 4 each | processors that have come since this was last read |
//! | 64 to 92 | 4 each | processors that are asked to go since this was last read |
//! | 96 | 4 | written by the guest: the processor with this number is ejected |
//! | 100 | 4 | written by the guest: what became of a request to go, the status of `_OST` times 0x10000 and the processor's number |
//!
//! The interrupt that says that there is something new is that of the [event device](crate::hotplug).
//!
//! A processor goes when it was asked to and the guest ejects it: from then on it is not there, and [`Processors::take_ejected`] has
//! it for whoever runs it to stop. One that nobody asked stays, whatever the guest writes, and so does processor 0.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::{BusDevice, hotplug::Hotplug};

/// Offset of the first double word of processors that are there.
pub const PRESENT: u64 = 0;
/// Offset of the first double word of processors that have come.
pub const ARRIVED: u64 = 32;
/// Offset of the first double word of processors that are asked to go.
pub const LEAVING: u64 = 64;
/// Offset of the double word that ejects a processor.
pub const EJECT: u64 = 96;
/// Offset of the double word that takes what became of a request to go.
pub const ANSWER: u64 = 100;
/// Bytes of the registers.
pub const LENGTH: u64 = 104;

/// Most processors: numbers are below.
pub const MOST: u32 = 256;

/// Processors in a double word.
pub const PER_WORD: u32 = 32;

/// Status codes of `_OST` for a request to go that are no refusal: success, and that the guest is at it (ACPI 6.5, chapter 6.3.5).
const NO_REFUSAL: [u32; 2] = [0, 0x84];

/// A set of processors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Set([u32; (MOST / PER_WORD) as usize]);

impl Set {
    fn insert(&mut self, processor: u32) {
        if let Some(word) = self.0.get_mut((processor / PER_WORD) as usize) {
            *word |= 1 << (processor % PER_WORD);
        }
    }

    fn remove(&mut self, processor: u32) {
        if let Some(word) = self.0.get_mut((processor / PER_WORD) as usize) {
            *word &= !(1 << (processor % PER_WORD));
        }
    }

    fn contains(&self, processor: u32) -> bool {
        let word = self.0.get((processor / PER_WORD) as usize);
        word.is_some_and(|word| word >> (processor % PER_WORD) & 1 != 0)
    }

    fn iter(self) -> impl Iterator<Item = u32> {
        (0..MOST).filter(move |processor| self.contains(*processor))
    }
}

#[derive(Default)]
struct State {
    present: Set,
    arrived: Set,
    leaving: Set,
    /// Those that may go.
    asked: Set,
    /// Those that have gone, and that nobody has taken yet.
    ejected: Set,
    /// Those that the guest does not let go, likewise.
    refused: Set,
}

/// The registers.
pub struct Processors {
    events: Arc<Hotplug>,
    /// Written when there is something to be taken.
    news: EventFd,
    state: Mutex<State>,
}

impl Processors {
    /// Registers with processors 0 to `count` - 1 there, which the guest finds when it starts. Changes are told by `events`; `news` is
    /// written when the guest has answered.
    #[must_use]
    pub fn new(count: u32, events: Arc<Hotplug>, news: EventFd) -> Self {
        let mut state = State::default();
        (0..count.min(MOST)).for_each(|processor| state.present.insert(processor));
        Self {
            events,
            news,
            state: Mutex::new(state),
        }
    }

    /// Tells the guest that these processors have come.
    pub fn arrive(&self, processors: &[u32]) {
        let mut state = self.lock();
        for processor in processors {
            state.present.insert(*processor);
            state.arrived.insert(*processor);
            state.leaving.remove(*processor);
            state.asked.remove(*processor);
        }
        drop(state);
        self.tell(processors);
    }

    /// Asks the guest to let go of these processors, and to eject them then.
    pub fn ask_to_leave(&self, processors: &[u32]) {
        let mut state = self.lock();
        for processor in processors {
            if state.present.contains(*processor) {
                state.leaving.insert(*processor);
                state.asked.insert(*processor);
                state.arrived.remove(*processor);
            }
        }
        drop(state);
        self.tell(processors);
    }

    /// Takes the request to go back. A guest that has heard of it may still eject the processor.
    pub fn keep(&self, processor: u32) {
        let mut state = self.lock();
        if state.leaving.contains(processor) {
            state.leaving.remove(processor);
            state.asked.remove(processor);
        }
    }

    fn tell(&self, processors: &[u32]) {
        if !processors.is_empty() {
            self.events.processors_changed();
        }
    }

    /// Readable when there is something for [`Self::take_ejected`] or [`Self::take_refused`].
    #[must_use]
    pub fn news(&self) -> &EventFd {
        &self.news
    }

    /// The processors that the guest has ejected since the last call.
    pub fn take_ejected(&self) -> Vec<u32> {
        std::mem::take(&mut self.lock().ejected).iter().collect()
    }

    /// The processors that were asked to go, and that the guest has said since the last call that it does not let go.
    pub fn take_refused(&self) -> Vec<u32> {
        std::mem::take(&mut self.lock().refused).iter().collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn eject(&self, processor: u32) {
        let mut state = self.lock();
        if processor == 0 || !state.asked.contains(processor) {
            return;
        }
        state.present.remove(processor);
        state.arrived.remove(processor);
        state.leaving.remove(processor);
        state.asked.remove(processor);
        state.ejected.insert(processor);
        drop(state);
        self.wake();
    }

    fn answer(&self, processor: u32, status: u32) {
        let mut state = self.lock();
        if NO_REFUSAL.contains(&status) || !state.asked.contains(processor) {
            return;
        }
        // One that has refused is not about to go any more.
        state.asked.remove(processor);
        state.refused.insert(processor);
        drop(state);
        self.wake();
    }

    fn wake(&self) {
        // An eventfd that is full wakes, too.
        let _ = self.news.write(1);
    }

    fn read_word(&self, offset: u64) -> u32 {
        let mut state = self.lock();
        let word = (offset % ARRIVED / 4) as usize;
        match offset {
            PRESENT..ARRIVED => state.present.0[word],
            ARRIVED..LEAVING => std::mem::take(&mut state.arrived.0[word]),
            LEAVING..EJECT => std::mem::take(&mut state.leaving.0[word]),
            _ => 0,
        }
    }
}

impl BusDevice for Processors {
    /// A register is read as a whole. Anything else reads as zero and takes nothing.
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Ok(bytes) = <&mut [u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            *bytes = self.read_word(offset).to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(bytes) = data.try_into() else { return };
        let value = u32::from_le_bytes(bytes);
        match offset {
            EJECT => self.eject(value),
            ANSWER => self.answer(value & 0xffff, value >> 16),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;
    use crate::hotplug::{EVENTS, Ejector, PROCESSOR_EVENT};

    struct Nothing;

    impl Ejector for Nothing {
        fn eject(&self, _device: u8) {}
    }

    struct Bench {
        processors: Processors,
        events: Arc<Hotplug>,
        interrupt: EventFd,
    }

    fn bench(count: u32) -> Bench {
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupt = event();
        let hotplug = Hotplug::new(interrupt.try_clone().unwrap(), Arc::new(Nothing));
        let events = Arc::new(hotplug);
        Bench {
            processors: Processors::new(count, Arc::clone(&events), event()),
            events,
            interrupt,
        }
    }

    impl Bench {
        fn word(&self, offset: u64) -> u32 {
            let mut data = [0xaa; 4];
            self.processors.read(offset, &mut data);
            u32::from_le_bytes(data)
        }

        fn write(&self, offset: u64, value: u32) {
            self.processors.write(offset, &value.to_le_bytes());
        }

        fn told(&self) -> bool {
            let mut data = [0];
            self.events.read(EVENTS, &mut data);
            self.interrupt.read().is_ok() && data[0] == PROCESSOR_EVENT
        }
    }

    #[test]
    fn who_comes_is_there_and_told_once() {
        let bench = bench(34);
        assert_eq!((bench.word(PRESENT), bench.word(PRESENT + 4)), (!0, 3));
        assert!(!bench.told(), "the guest finds those that are there");
        bench.processors.arrive(&[34, 255]);
        assert!(bench.told());
        assert_eq!(bench.word(PRESENT + 4), 7);
        assert_eq!((bench.word(ARRIVED), bench.word(ARRIVED + 4)), (0, 4));
        assert_eq!(bench.word(ARRIVED + 28), 1 << 31);
        assert_eq!((bench.word(ARRIVED + 4), bench.word(ARRIVED + 28)), (0, 0));
        assert_eq!(bench.word(PRESENT + 28), 1 << 31, "it stays");
    }

    #[test]
    fn who_was_asked_goes_when_the_guest_lets_it() {
        let bench = bench(4);
        bench.processors.ask_to_leave(&[2, 3, 9]);
        assert!(bench.told());
        assert_eq!(bench.word(LEAVING), 1 << 2 | 1 << 3, "there is no 9");
        assert_eq!(bench.word(LEAVING), 0);
        assert_eq!(bench.word(PRESENT), 0xf, "they are there still");
        bench.write(EJECT, 3);
        assert_eq!(bench.word(PRESENT), 7, "at once");
        assert_eq!(bench.processors.news().read().unwrap(), 1);
        assert_eq!(bench.processors.take_ejected(), [3]);
        assert!(bench.processors.take_ejected().is_empty());
        bench.processors.arrive(&[3, 4]);
        bench.processors.ask_to_leave(&[4]);
        assert_eq!(bench.word(ARRIVED), 1 << 3, "only what is still so");
        bench.processors.keep(4);
        bench.write(EJECT, 4);
        bench.write(EJECT, 3);
        assert_eq!(bench.word(PRESENT), 0x1f, "they have come anew");
    }

    #[test]
    fn nobody_goes_that_was_not_asked() {
        let bench = bench(4);
        for processor in [0, 1, 4, 255, 256, u32::MAX] {
            bench.write(EJECT, processor);
        }
        bench.processors.ask_to_leave(&[0]);
        bench.write(EJECT, 0);
        assert_eq!(bench.word(PRESENT), 0xf);
        assert!(bench.processors.take_ejected().is_empty());
    }

    #[test]
    fn a_request_can_be_taken_back_until_it_was_read() {
        let bench = bench(4);
        bench.processors.ask_to_leave(&[2, 3]);
        bench.processors.keep(3);
        assert_eq!(bench.word(LEAVING), 1 << 2);
        bench.processors.keep(2);
        bench.write(EJECT, 3);
        bench.write(EJECT, 2);
        assert_eq!(bench.processors.take_ejected(), [2], "it was on its way");
    }

    #[test]
    fn a_guest_can_say_no() {
        let bench = bench(4);
        bench.write(ANSWER, 1 << 16 | 3);
        assert!(bench.processors.take_refused().is_empty(), "nobody asked");
        bench.processors.ask_to_leave(&[2, 3]);
        // At it; done; busy; busy, and beyond the last.
        for answer in [0x84 << 16 | 3, 3, 0x82 << 16 | 3, 0x82 << 16 | 0xffff] {
            bench.write(ANSWER, answer);
        }
        assert_eq!(bench.processors.take_refused(), [3]);
        assert_eq!(bench.processors.news().read().unwrap(), 1);
        bench.write(EJECT, 3);
        assert!(bench.processors.take_ejected().is_empty());
        assert_eq!(bench.word(PRESENT), 0xf);
    }

    #[test]
    fn odd_accesses_take_and_do_nothing() {
        let bench = bench(4);
        bench.processors.arrive(&[4, 256, u32::MAX]);
        bench.processors.ask_to_leave(&[3]);
        for (offset, length) in [
            (32, 1),
            (32, 8),
            (33, 4),
            (64, 2),
            (96, 4),
            (104, 4),
            (32, 0),
        ] {
            let mut data = vec![0xaa; length];
            bench.processors.read(offset, &mut data);
            assert_eq!(data, vec![0; length]);
        }
        for (offset, length) in [(96, 1), (96, 8), (97, 4), (0, 4), (104, 4), (96, 0)] {
            let mut data = vec![0; length];
            data.iter_mut().take(1).for_each(|byte| *byte = 3);
            bench.processors.write(offset, &data);
        }
        assert!(bench.processors.take_ejected().is_empty());
        assert_eq!(bench.word(ARRIVED), 1 << 4);
        assert_eq!(bench.word(LEAVING), 1 << 3);
    }
}
