//! The CMOS RAM and its clock (MC146818), at ports 0x70 and 0x71.
//!
//! The clock shows the host's time in UTC, BCD and 24 hours; it raises no interrupts and cannot be set. The date
//! is latched when the guest reads the seconds or the update flag, which is how drivers begin, so a date is of
//! one piece however slowly it is read.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::BusDevice;

/// Offsets of the two ports.
const INDEX: u64 = 0;
const DATA: u64 = 1;
/// The eighth bit of the index port gates the NMI, which is not here.
const INDEX_MASK: u8 = 0x7f;
const SIZE: usize = 128;

/// Clock registers.
const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;

/// Status A: an update is in progress; the divider runs at 32.768 kHz.
const UPDATE_IN_PROGRESS: u8 = 1 << 7;
const DIVIDER_32_KHZ: u8 = 0b010 << 4;
/// The flag rises this long before the second changes.
const UPDATE_NOTICE: Duration = Duration::from_micros(244);
/// Status B: 24 hours, BCD, no interrupts. The guest can change only the bit that halts updates.
const HOURS_24: u8 = 1 << 1;
const HALT_UPDATES: u8 = 1 << 7;
/// Status D: the battery is fine.
const VALID: u8 = 1 << 7;

/// Memory sizes, low byte first.
const BASE_MEMORY_KIB: usize = 0x15;
const EXTENDED_MEMORY_KIB: [usize; 2] = [0x17, 0x30];
const ABOVE_16_MIB: usize = 0x34;
const ABOVE_4_GIB: usize = 0x5b;
const MIB: u64 = 1 << 20;

struct State {
    index: u8,
    ram: [u8; SIZE],
    date: Date,
}

/// The CMOS RAM and clock.
pub struct Cmos {
    state: Mutex<State>,
    now: fn() -> SystemTime,
}

impl Cmos {
    /// CMOS that shows the host's time and the guest's memory: `below_4g` bytes from address 0, `above_4g` from 4 GiB.
    pub fn new(below_4g: u64, above_4g: u64) -> Self {
        Self::with_clock(below_4g, above_4g, SystemTime::now)
    }

    fn with_clock(below_4g: u64, above_4g: u64, now: fn() -> SystemTime) -> Self {
        let mut ram = [0; SIZE];
        let mut put = |at: usize, bytes: usize, value: u64| {
            let value = value.min((1 << (8 * bytes)) - 1).to_le_bytes();
            ram[at..at + bytes].copy_from_slice(&value[..bytes]);
        };
        put(BASE_MEMORY_KIB, 2, 640);
        for at in EXTENDED_MEMORY_KIB {
            put(at, 2, below_4g.saturating_sub(MIB) >> 10);
        }
        put(ABOVE_16_MIB, 2, below_4g.saturating_sub(16 * MIB) >> 16);
        put(ABOVE_4_GIB, 3, above_4g >> 16);
        Self {
            state: Mutex::new(State {
                index: 0,
                ram,
                date: Date::at(now()),
            }),
            now,
        }
    }

    fn read_register(&self, state: &mut State) -> u8 {
        let halted = state.ram[usize::from(STATUS_B)] & HALT_UPDATES != 0;
        if matches!(state.index, SECONDS | STATUS_A) && !halted {
            state.date = Date::at((self.now)());
        }
        let date = &state.date;
        match state.index {
            SECONDS => bcd(date.second),
            MINUTES => bcd(date.minute),
            HOURS => bcd(date.hour),
            WEEKDAY => bcd(date.weekday),
            DAY => bcd(date.day),
            MONTH => bcd(date.month),
            YEAR => bcd((date.year % 100) as u8),
            CENTURY => bcd((date.year / 100 % 100) as u8),
            STATUS_A if date.changes_soon && !halted => DIVIDER_32_KHZ | UPDATE_IN_PROGRESS,
            STATUS_A => DIVIDER_32_KHZ,
            STATUS_B => HOURS_24 | state.ram[usize::from(STATUS_B)] & HALT_UPDATES,
            STATUS_C => 0,
            STATUS_D => VALID,
            index => state.ram[usize::from(index)],
        }
    }
}

impl BusDevice for Cmos {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for (port, byte) in (offset..).zip(data) {
            *byte = if port == DATA {
                self.read_register(&mut state)
            } else {
                0xff
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for (port, &value) in (offset..).zip(data) {
            match port {
                INDEX => state.index = value & INDEX_MASK,
                DATA => {
                    let index = usize::from(state.index);
                    state.ram[index] = value;
                }
                _ => {}
            }
        }
    }
}

/// What the clock shows.
#[derive(Debug, PartialEq, Eq)]
struct Date {
    second: u8,
    minute: u8,
    hour: u8,
    /// 1 is Sunday.
    weekday: u8,
    day: u8,
    month: u8,
    year: u64,
    /// The next second is nearer than [`UPDATE_NOTICE`].
    changes_soon: bool,
}

impl Date {
    /// The date in UTC; times before 1970 show as its first second.
    fn at(time: SystemTime) -> Self {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        let seconds = since.as_secs();
        let (days, of_day) = (seconds / 86_400, seconds % 86_400);
        let (year, month, day) = civil(days);
        Self {
            second: (of_day % 60) as u8,
            minute: (of_day / 60 % 60) as u8,
            hour: (of_day / 3600) as u8,
            // 1 January 1970 was a Thursday.
            weekday: ((days + 4) % 7 + 1) as u8,
            day,
            month,
            year,
            changes_soon: Duration::from_nanos(since.subsec_nanos().into()) + UPDATE_NOTICE
                >= Duration::from_secs(1),
        }
    }
}

/// Year, month and day of a day counted from 1 January 1970.
///
/// Counted in years that begin with March, so that the leap day is a year's last: then the first day of month `m` from
/// March is (153·m + 2) / 5, and 400 years are always 146 097 days.
fn civil(days: u64) -> (u64, u8, u8) {
    /// Days from 1 March of the year 0 to 1 January 1970.
    const EPOCH: u64 = 719_468;
    let days = days + EPOCH;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month as u8, day as u8)
}

fn bcd(value: u8) -> u8 {
    ((value / 10) << 4) | (value % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(cmos: &Cmos, index: u8) -> u8 {
        cmos.write(INDEX, &[index]);
        let mut data = [0];
        cmos.read(DATA, &mut data);
        data[0]
    }

    fn moment() -> SystemTime {
        // 2024-02-29 23:59:58 UTC, a Thursday.
        UNIX_EPOCH + Duration::from_secs(1_709_251_198)
    }

    #[test]
    fn the_clock_shows_the_hosts_time() {
        let cmos = Cmos::with_clock(0, 0, moment);
        let shown: Vec<u8> = [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS]
            .iter()
            .map(|&register| read(&cmos, register))
            .collect();
        assert_eq!(shown, [0x20, 0x24, 0x02, 0x29, 0x05, 0x23, 0x59, 0x58]);
        assert_eq!(read(&cmos, STATUS_A), DIVIDER_32_KHZ);
        assert_eq!(read(&cmos, STATUS_B), HOURS_24);
        assert_eq!(read(&cmos, STATUS_C), 0);
        assert_eq!(read(&cmos, STATUS_D), VALID);
    }

    #[test]
    fn dates_follow_the_calendar() {
        for (seconds, date) in [
            (0, (1970, 1, 1)),
            (951_782_400, (2000, 2, 29)),
            (951_868_800, (2000, 3, 1)),
            (4_102_444_799, (2099, 12, 31)),
            (4_107_542_400, (2100, 3, 1)),
            (253_402_300_799, (9999, 12, 31)),
        ] {
            assert_eq!(civil(seconds / 86_400), date);
        }
    }

    #[test]
    fn the_update_flag_rises_before_the_second_changes() {
        let early = Date::at(moment() + Duration::from_micros(999_755));
        assert!(!early.changes_soon);
        let late = Date::at(moment() + Duration::from_micros(999_757));
        assert!(late.changes_soon);
    }

    #[test]
    fn memory_sizes_are_where_firmware_looks_for_them() {
        let cmos = Cmos::new(3 << 30, 3 << 30);
        let word = |at| u32::from(read(&cmos, at)) | u32::from(read(&cmos, at + 1)) << 8;
        assert_eq!(word(0x15), 640);
        assert_eq!(word(0x17), 0xffff);
        assert_eq!(word(0x30), 0xffff);
        assert_eq!(word(0x34), ((3 << 30) - (16 << 20)) >> 16);
        let above = word(0x5b) | u32::from(read(&cmos, 0x5d)) << 16;
        assert_eq!(u64::from(above), (3 << 30) >> 16);
        let small = Cmos::new(8 << 20, 0);
        small.write(INDEX, &[0x17]);
        assert_eq!(
            u16::from_le_bytes([read(&small, 0x17), read(&small, 0x18)]),
            7168
        );
        assert_eq!([read(&small, 0x34), read(&small, 0x35)], [0, 0]);
    }

    #[test]
    fn ram_keeps_what_is_written_and_the_clock_does_not() {
        let cmos = Cmos::with_clock(0, 0, moment);
        for index in 0..=0xff_u8 {
            cmos.write(INDEX, &[index]);
            cmos.write(DATA, &[0x5a]);
        }
        assert_eq!(read(&cmos, 0x0f), 0x5a);
        assert_eq!(read(&cmos, 0x7f), 0x5a);
        assert_eq!(
            read(&cmos, 0xff),
            0x5a,
            "the NMI gate is not part of the index"
        );
        assert_eq!(read(&cmos, SECONDS), 0x58);
        assert_eq!(read(&cmos, STATUS_D), VALID);
        cmos.write(INDEX, &[STATUS_B]);
        cmos.write(DATA, &[0xff]);
        assert_eq!(read(&cmos, STATUS_B), HALT_UPDATES | HOURS_24);
    }

    #[test]
    fn odd_widths_are_bytes_side_by_side() {
        let cmos = Cmos::with_clock(0, 0, moment);
        cmos.write(INDEX, &[]);
        cmos.write(INDEX, &[0x40, 0x77]);
        assert_eq!(read(&cmos, 0x40), 0x77);
        let mut data = [0; 9];
        cmos.read(INDEX, &mut data);
        assert_eq!(data[..3], [0xff, 0x77, 0xff]);
        cmos.write(7, &[1; 8]);
    }
}
