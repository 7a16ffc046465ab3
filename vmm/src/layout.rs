//! Where everything lies in the guest: RAM, the hole below 4 GiB, the tables of the boot protocol and the legacy ports.
//!
//! ```text
//! 0x0000_0000  RAM: boot structures, then free (640 KiB)
//! 0x000a_0000  RAM, reserved in the memory map; ACPI tables from 0xe_0000
//! 0x0010_0000  RAM: kernel, initramfs
//! 0xc000_0000  hole: 32-bit PCI window, ECAM, IOAPIC, LAPIC        (3 GiB)
//! 0x1_0000_0000 RAM: what did not fit below the hole               (4 GiB)
//!   above that: memory that comes (and goes), and behind it memory that belongs to devices, each from a multiple of 2 GiB on
//! ```
//!
//! The addresses below 1 MiB are RAM that the memory map calls reserved, not a hole: kernels search this range for
//! firmware tables, and every byte read from a hole would be an exit.

use thiserror::Error;

/// First address of the hole below 4 GiB: RAM ends here at the latest (3 GiB).
pub const HOLE_START: u64 = 0xc000_0000;
/// First address above the hole: RAM goes on here (4 GiB).
pub const HOLE_END: u64 = 0x1_0000_0000;

/// Bytes in a guest page: RAM is handed out in whole pages.
pub const PAGE_SIZE: u64 = 4096;

/// First byte of the range below 1 MiB that the memory map keeps from the guest's allocator.
pub const RESERVED_LOW_START: u64 = 0xa_0000;
/// End of that range: extended memory, where kernels are loaded, starts here.
pub const HIGH_RAM_START: u64 = 0x10_0000;

/// Flat GDT of the boot processor.
pub const BOOT_GDT: u64 = 0x500;
/// Empty IDT of the boot processor.
pub const BOOT_IDT: u64 = 0x520;
/// `hvm_start_info` of the PVH boot protocol, followed by its module list.
pub const PVH_START_INFO: u64 = 0x6000;
/// First entry of the PVH module list (the initramfs).
pub const PVH_MODULES: u64 = 0x6040;
/// PVH memory map; a guest gets this one or the zero page, never both.
pub const PVH_MEMORY_MAP: u64 = 0x7000;
/// `boot_params` of the Linux boot protocol.
pub const ZERO_PAGE: u64 = 0x7000;
/// Initial stack pointer: the stack grows down towards the zero page's end.
pub const BOOT_STACK_POINTER: u64 = 0x8ff0;
/// First of the identity-mapping page tables of a 64-bit entry (PML4, then PDPT, then page directories).
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// Kernel command line, NUL-terminated.
pub const CMDLINE: u64 = 0x2_0000;
/// Room for the command line, NUL included, in bytes.
pub const CMDLINE_CAPACITY: usize = 0x1_0000;

/// ACPI tables: the RSDP first, where a scan of the BIOS area finds it too.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// Room for all ACPI tables, in bytes.
pub const ACPI_TABLES_CAPACITY: usize = (RESET_VECTOR - ACPI_TABLES) as usize;
/// F000:FFF0, where real-mode code that wants to reset the machine jumps to.
pub const RESET_VECTOR: u64 = 0xf_fff0;

/// First address of the window from which 32-bit PCI BARs are assigned.
pub const PCI_WINDOW_START: u64 = HOLE_START;
/// Length of that window in bytes (640 MiB).
pub const PCI_WINDOW_LENGTH: u64 = ECAM_START - PCI_WINDOW_START;
/// PCI Express configuration space (ECAM) of segment 0, bus 0.
pub const ECAM_START: u64 = 0xe800_0000;
/// Length of the ECAM window: one bus, 32 devices of 8 functions of 4 KiB.
pub const ECAM_LENGTH: u64 = 0x10_0000;
/// Registers of the IOAPIC.
pub const IOAPIC_START: u64 = 0xfec0_0000;
/// Length of the IOAPIC's register window in bytes.
pub const IOAPIC_LENGTH: u64 = 0x1000;
/// Registers of each processor's local APIC; the hypervisor's, not ours.
pub const LAPIC_START: u64 = 0xfee0_0000;

/// Command and status port of the keyboard controller, of which only the reset line exists.
pub const I8042_COMMAND_PORT: u64 = 0x64;
/// Index and data port of the CMOS RAM and clock.
pub const CMOS_PORT: u64 = 0x70;
/// Ports of the CMOS device.
pub const CMOS_PORTS: u64 = 2;
/// Power-on self-test codes; Linux also writes here to wait a microsecond.
pub const POST_PORT: u64 = 0x80;
/// First serial port.
pub const COM1_PORT: u64 = 0x3f8;
/// Registers of a 16550.
pub const COM1_PORTS: u64 = 8;
/// IOAPIC pin (and GSI) of the first serial port.
pub const COM1_PIN: u32 = 4;
/// ACPI sleep control, sleep status and reset register, one byte each.
pub const ACPI_POWER_PORT: u64 = 0x600;
/// Ports of the ACPI power block.
pub const ACPI_POWER_PORTS: u64 = 3;
/// Registers of the events that the machine has for the guest.
pub const HOTPLUG_PORT: u64 = 0x610;
/// Ports of these.
pub const HOTPLUG_PORTS: u64 = devices::hotplug::LENGTH;
/// Registers of the processors that come and go.
pub const PROCESSORS_PORT: u64 = 0x680;
/// Ports of these.
pub const PROCESSORS_PORTS: u64 = devices::processors::LENGTH;
/// Registers of the memory modules that come.
pub const MODULES_PORT: u64 = 0x700;
/// Ports of these.
pub const MODULES_PORTS: u64 = devices::modules::LENGTH;
/// IOAPIC pin (and GSI) of the Generic Event Device.
pub const HOTPLUG_PIN: u32 = 5;
/// Address and data register of PCI configuration mechanism #1.
pub const PCI_CONFIG_PORT: u64 = 0xcf8;
/// Ports of that mechanism.
pub const PCI_CONFIG_PORTS: u64 = 8;

/// A memory size that no layout exists for.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum LayoutError {
    /// Less than the boot structures and a kernel need.
    #[error(
        "guest memory of {size} bytes is too small: at least {MIN_RAM} bytes (16 MiB) are needed"
    )]
    TooSmall {
        /// The size asked for, in bytes.
        size: u64,
    },
    /// Not a whole number of pages.
    #[error("guest memory of {size} bytes is not a multiple of the page size ({PAGE_SIZE} bytes)")]
    Unaligned {
        /// The size asked for, in bytes.
        size: u64,
    },
    /// Beyond what a guest physical address can reach.
    #[error(
        "guest memory of {size} bytes is too large: at most {MAX_RAM} bytes (1 TiB) are supported"
    )]
    TooLarge {
        /// The size asked for, in bytes.
        size: u64,
    },
    /// Beyond what this host's processors can address.
    #[error(
        "{size} bytes, with what can be added, do not fit the host's {bits}-bit physical addresses"
    )]
    TooWide {
        /// The size asked for, in bytes.
        size: u64,
        /// Width of a physical address on this host.
        bits: u32,
    },
}

/// What the areas above RAM begin on: the largest block in which Linux takes memory that is added to it.
const AREA_ALIGNMENT: u64 = 2 << 30;
/// The most address space that devices' memory gets: guests keep page tables free for not much more.
const MOST_DEVICE_MEMORY: u64 = 1 << 40;

/// Smallest guest memory, in bytes.
pub const MIN_RAM: u64 = 16 << 20;
/// Largest guest memory, in bytes: with the hole it stays within 41 physical address bits.
pub const MAX_RAM: u64 = 1 << 40;

/// A range of guest physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
}

impl Range {
    /// First address behind the range.
    pub const fn end(&self) -> u64 {
        self.start + self.length
    }
}

/// What the guest may do with a range of its memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Usage {
    /// Free for the guest's allocator (E820 type 1).
    Ram,
    /// Not to be touched as memory (E820 type 2).
    Reserved,
}

/// The ranges of guest physical addresses behind which there is RAM, in ascending order: one below the hole and, when
/// `size` bytes do not fit there, one from 4 GiB.
///
/// # Errors
/// When `size` is not a whole number of pages, or out of the supported range.
pub fn ram_ranges(size: u64) -> Result<Vec<Range>, LayoutError> {
    if size < MIN_RAM {
        return Err(LayoutError::TooSmall { size });
    }
    if size > MAX_RAM {
        return Err(LayoutError::TooLarge { size });
    }
    if !size.is_multiple_of(PAGE_SIZE) {
        return Err(LayoutError::Unaligned { size });
    }
    let below = size.min(HOLE_START);
    let mut ranges = vec![Range {
        start: 0,
        length: below,
    }];
    if size > below {
        ranges.push(Range {
            start: HOLE_END,
            length: size - below,
        });
    }
    Ok(ranges)
}

/// Where a guest's memory lies, and what may be added to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryLayout {
    /// RAM, as [`ram_ranges`] has it.
    pub ram: Vec<Range>,
    /// Memory that comes and goes in blocks, if there is any. The guest's memory map does not tell of it.
    pub hotplug: Option<Range>,
    /// Where devices may show the guest memory of their own; its length may be 0.
    pub devices: Range,
}

impl MemoryLayout {
    /// The layout for `size` bytes of RAM and up to `hotplug` bytes more, on a host with physical addresses of `address_bits`
    /// bits.
    ///
    /// # Errors
    /// As [`ram_ranges`], and when the addresses do not suffice.
    pub fn new(size: u64, hotplug: u64, address_bits: u32) -> Result<Self, LayoutError> {
        let ram = ram_ranges(size)?;
        let limit = 1u64.checked_shl(address_bits).unwrap_or(u64::MAX);
        let too_wide = LayoutError::TooWide {
            size: size.saturating_add(hotplug),
            bits: address_bits,
        };
        let ram_end = ram.last().map_or(0, Range::end);
        if ram_end > limit {
            return Err(too_wide);
        }
        if hotplug > MAX_RAM {
            return Err(LayoutError::TooLarge { size: hotplug });
        }
        let hotplug = Range {
            start: ram_end.max(HOLE_END).next_multiple_of(AREA_ALIGNMENT),
            length: hotplug,
        };
        if hotplug.length > 0 && hotplug.end() > limit {
            return Err(too_wide);
        }
        let start = hotplug.end().next_multiple_of(AREA_ALIGNMENT);
        let devices = Range {
            start,
            length: limit.saturating_sub(start).min(MOST_DEVICE_MEMORY),
        };
        Ok(Self {
            ram,
            hotplug: (hotplug.length > 0).then_some(hotplug),
            devices,
        })
    }
}

/// The memory map a guest is told (E820 or PVH), in ascending order, for RAM of `size` bytes.
///
/// The ECAM window is listed as reserved: Linux uses it only when the map or ACPI says so.
///
/// # Errors
/// As [`ram_ranges`].
pub fn memory_map(size: u64) -> Result<Vec<(Range, Usage)>, LayoutError> {
    let ranges = ram_ranges(size)?;
    let span = |start, end| Range {
        start,
        length: end - start,
    };
    let mut map = vec![
        (span(0, RESERVED_LOW_START), Usage::Ram),
        (span(RESERVED_LOW_START, HIGH_RAM_START), Usage::Reserved),
        (span(HIGH_RAM_START, ranges[0].end()), Usage::Ram),
        (
            Range {
                start: ECAM_START,
                length: ECAM_LENGTH,
            },
            Usage::Reserved,
        ),
    ];
    map.extend(ranges[1..].iter().map(|range| (*range, Usage::Ram)));
    Ok(map)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    #[test]
    fn ram_up_to_the_hole_is_one_range() {
        for size in [MIN_RAM, 128 * MIB, 3 * GIB - PAGE_SIZE, 3 * GIB] {
            assert_eq!(
                ram_ranges(size).unwrap(),
                [Range {
                    start: 0,
                    length: size
                }]
            );
        }
    }

    #[test]
    fn ram_beyond_the_hole_goes_on_at_four_gib() {
        for size in [3 * GIB + PAGE_SIZE, 3 * GIB + 512 * MIB, 6 * GIB, MAX_RAM] {
            let ranges = ram_ranges(size).unwrap();
            assert_eq!(
                ranges,
                [
                    Range {
                        start: 0,
                        length: 3 * GIB
                    },
                    Range {
                        start: 4 * GIB,
                        length: size - 3 * GIB
                    }
                ]
            );
        }
    }

    #[test]
    fn sizes_without_a_layout_are_refused() {
        assert_eq!(ram_ranges(0), Err(LayoutError::TooSmall { size: 0 }));
        assert_eq!(
            ram_ranges(MIN_RAM - 1),
            Err(LayoutError::TooSmall { size: MIN_RAM - 1 })
        );
        assert_eq!(
            ram_ranges(128 * MIB + 1),
            Err(LayoutError::Unaligned {
                size: 128 * MIB + 1
            })
        );
        assert_eq!(
            ram_ranges(MAX_RAM + PAGE_SIZE),
            Err(LayoutError::TooLarge {
                size: MAX_RAM + PAGE_SIZE
            })
        );
        assert_eq!(
            ram_ranges(u64::MAX),
            Err(LayoutError::TooLarge { size: u64::MAX })
        );
    }

    #[test]
    fn the_memory_map_is_sorted_and_without_overlap() {
        for size in [MIN_RAM, 128 * MIB, 3 * GIB, 3 * GIB + 512 * MIB, 6 * GIB] {
            let map = memory_map(size).unwrap();
            for pair in map.windows(2) {
                assert!(pair[0].0.end() <= pair[1].0.start, "{map:x?}");
            }
            let hidden = HIGH_RAM_START - RESERVED_LOW_START;
            let usable: u64 = map
                .iter()
                .filter(|entry| entry.1 == Usage::Ram)
                .map(|entry| entry.0.length)
                .sum();
            assert_eq!(usable, size - hidden);
        }
    }

    #[test]
    fn what_is_added_lies_above_ram_and_within_the_hosts_addresses() {
        let layout = MemoryLayout::new(512 * MIB, 3 * GIB, 40).unwrap();
        assert_eq!(layout.ram, ram_ranges(512 * MIB).unwrap());
        let range = |start, length| Range { start, length };
        assert_eq!(layout.hotplug, Some(range(4 * GIB, 3 * GIB)));
        assert_eq!(layout.devices, range(8 * GIB, 1016 * GIB));
        let layout = MemoryLayout::new(6 * GIB, 0, 46).unwrap();
        assert_eq!(layout.hotplug, None);
        assert_eq!(layout.devices, range(8 * GIB, 1024 * GIB));
        // A narrow host: RAM fits, and nothing is left for devices.
        let layout = MemoryLayout::new(14 * GIB, 0, 34).unwrap();
        assert_eq!(layout.devices.length, 0);
        for (size, hotplug, bits) in [
            (16 * GIB, 0, 34),
            (512 * MIB, 16 * GIB, 34),
            (512 * MIB, MAX_RAM, 40),
        ] {
            assert!(matches!(
                MemoryLayout::new(size, hotplug, bits),
                Err(LayoutError::TooWide { .. })
            ));
        }
        for hotplug in [MAX_RAM + 1, u64::MAX] {
            assert!(MemoryLayout::new(512 * MIB, hotplug, 64).is_err());
        }
    }

    #[test]
    fn windows_in_the_hole_do_not_overlap() {
        let windows = [
            (PCI_WINDOW_START, PCI_WINDOW_LENGTH),
            (ECAM_START, ECAM_LENGTH),
            (IOAPIC_START, IOAPIC_LENGTH),
            (LAPIC_START, PAGE_SIZE),
            (HOLE_END, 0),
        ];
        for pair in windows.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0);
        }
    }
}
