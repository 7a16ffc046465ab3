//! A guest ready to run a small program: one partition, some RAM, one VP in the mode wanted.

use crate::message::{Exit, MemoryAccess, PortIo};
use crate::payload;
use crate::raw::Sys;
use crate::reg::{self, segment, table, value64};
use crate::vm::{Device, Memory, Partition, READ_WRITE_EXECUTE, Vp};

/// Where the guests of these tests begin.
pub const CODE: u64 = 0x1000;
/// Where interrupt handlers are put.
pub const HANDLER: u64 = 0x2000;
/// Bytes of RAM at guest-physical 0: 512 KiB.
pub const RAM: usize = 0x8_0000;
/// A guest-physical address that no test maps (below 1 MiB, so that real-mode segments reach it).
pub const UNMAPPED: u64 = 0xD_0000;
/// Where read-only memory is mapped by tests that want it.
pub const ROM: u64 = 0xC_0000;

/// One partition with RAM at 0 and VP 0, ready to run a program.
#[derive(Debug)]
pub struct Guest {
    /// The VP: closed first.
    pub vp: Vp,
    /// Its partition.
    pub partition: Partition,
    /// Guest-physical 0 … [`RAM`].
    pub ram: Memory,
}

impl Guest {
    /// A VP in its reset state, with RAM and a program at [`CODE`].
    ///
    /// # Panics
    /// When the device refuses.
    #[must_use]
    pub fn reset(device: &Device, program: &[u8]) -> Guest {
        let (partition, ram) = (device.partition(), Memory::new(RAM));
        ram.write(CODE, program);
        partition
            .map(&ram, 0, READ_WRITE_EXECUTE)
            .expect("MSHV_SET_GUEST_MEMORY");
        let vp = partition.create_vp(0).expect("MSHV_CREATE_VP");
        Guest { vp, partition, ram }
    }

    /// Real mode at 0:[`CODE`], stack below 0x7000, data segments at 0, GS flat with a 4 GiB limit, interrupts off.
    #[must_use]
    pub fn real_mode(device: &Device, program: &[u8]) -> Guest {
        let guest = Guest::reset(device, program);
        let data = segment(0, 0, 0xFFFF, 0x93);
        guest.vp.set(&[
            (reg::CS, segment(0, 0, 0xFFFF, 0x9B)),
            (reg::DS, data),
            (reg::ES, data),
            (reg::SS, data),
            (reg::GS, segment(0, 0, 0xFFFF_FFFF, 0x8093)),
            (reg::IDTR, table(0, 0x3FF)),
        ]);
        guest
            .vp
            .set64(&[(reg::RIP, CODE), (reg::RSP, 0x7000), (reg::RFLAGS, 2)]);
        guest
    }

    /// 32-bit protected mode with 4 KiB pages: GVA 0x400000 is [`CODE`], 0x500000 a data page at 0x5000, 0x600000 is [`UNMAPPED`].
    #[must_use]
    pub fn protected_mode(device: &Device, program: &[u8]) -> Guest {
        let guest = Guest::reset(device, program);
        for (i, gpa) in [
            (0u64, CODE),
            (0x100, 0x5000),
            (0x200, UNMAPPED),
            (0x201, UNMAPPED + 0x1000),
        ] {
            guest
                .ram
                .write(0x1_1000 + i * 4, &(gpa as u32 | 3).to_le_bytes());
        }
        guest.ram.write(0x1_0004, &0x1_1003u32.to_le_bytes());
        let data = segment(0x10, 0, 0xFFFF_FFFF, 0xC093);
        guest.vp.set(&[
            (reg::CS, segment(0x8, 0, 0xFFFF_FFFF, 0xC09B)),
            (reg::DS, data),
            (reg::ES, data),
            (reg::SS, data),
            (reg::TR, segment(0x18, 0, 0x67, 0x8B)),
        ]);
        guest.vp.set64(&[
            (reg::CR3, 0x1_0000),
            (reg::CR0, 0x8001_0031),
            (reg::RIP, 0x40_0000),
            (reg::RSP, 0x50_0800),
            (reg::RFLAGS, 2),
        ]);
        guest
    }

    /// 64-bit mode with 4 KiB pages: GVA 0x400000 is [`CODE`], 0x500000 a data page at 0x5000, 0x600000 and the page after are
    /// [`UNMAPPED`], 0x603000 is the data page read-only.
    #[must_use]
    pub fn long_mode(device: &Device, program: &[u8]) -> Guest {
        let guest = Guest::reset(device, program);
        let entry =
            |table: u64, i: u64, value: u64| guest.ram.write(table + i * 8, &value.to_le_bytes());
        entry(0x1_0000, 0, 0x1_1003);
        entry(0x1_1000, 0, 0x1_2003);
        entry(0x1_2000, 2, 0x1_3003);
        entry(0x1_2000, 3, 0x1_4003);
        entry(0x1_3000, 0, CODE | 3);
        entry(0x1_3000, 0x100, 0x5003);
        entry(0x1_4000, 0, UNMAPPED | 3);
        entry(0x1_4000, 1, (UNMAPPED + 0x1000) | 3);
        entry(0x1_4000, 3, 0x5001);
        let data = segment(0x10, 0, 0xFFFF_FFFF, 0xC093);
        guest.vp.set(&[
            (reg::EFER, value64(0x500)),
            (reg::CR4, value64(0x20)),
            (reg::CR3, value64(0x1_0000)),
            (reg::CR0, value64(0x8001_0031)),
            (reg::CS, segment(0x8, 0, 0xFFFF_FFFF, 0xA09B)),
            (reg::DS, data),
            (reg::ES, data),
            (reg::SS, data),
            (reg::TR, segment(0x18, 0, 0x67, 0x8B)),
        ]);
        guest.vp.set64(&[
            (reg::RIP, 0x40_0000),
            (reg::RSP, 0x50_0800),
            (reg::RFLAGS, 2),
        ]);
        guest
    }

    /// Makes a real-mode interrupt vector point to `code`, put at [`HANDLER`] + vector × 32.
    ///
    /// # Panics
    /// When the code is longer than 32 bytes.
    pub fn handler(&self, vector: u8, code: &[u8]) {
        assert!(code.len() <= 32);
        let place = HANDLER + u64::from(vector) * 32;
        self.ram.write(place, code);
        self.ram
            .write(u64::from(vector) * 4, &(place as u32).to_le_bytes());
    }

    /// Runs to the next message.
    ///
    /// # Errors
    /// Of `MSHV_RUN_VP`.
    pub fn try_run(&self) -> Sys<Exit> {
        self.vp.run()
    }

    /// Runs to the next message.
    ///
    /// # Panics
    /// When `MSHV_RUN_VP` fails.
    #[must_use]
    pub fn run(&self) -> Exit {
        self.vp.run().expect("MSHV_RUN_VP")
    }

    /// Runs to a port access.
    ///
    /// # Panics
    /// When anything else comes.
    #[must_use]
    pub fn run_to_port(&self) -> PortIo {
        match self.run() {
            Exit::Port(port) => port,
            other => panic!("expected a port access, got {other:x?}"),
        }
    }

    /// Runs to a memory intercept.
    ///
    /// # Panics
    /// When anything else comes.
    #[must_use]
    pub fn run_to_memory(&self) -> MemoryAccess {
        match self.run() {
            Exit::Memory(access) => access,
            other => panic!("expected a memory intercept, got {other:x?}"),
        }
    }

    /// Runs to a one-byte `out` to `port` and lets the guest past it.
    ///
    /// # Panics
    /// When anything else comes.
    pub fn expect_mark(&self, port: u16) {
        let exit = self.run_to_port();
        assert_eq!(
            (exit.port, exit.size, exit.header.access),
            (port, 1, 1),
            "expected the mark {port:#x}, got {exit:x?}"
        );
        self.resume_at(exit.header.rip + 2);
    }

    /// Runs to the end of the program.
    pub fn expect_done(&self) {
        self.expect_mark(payload::DONE_PORT);
    }

    /// Moves RIP.
    pub fn resume_at(&self, rip: u64) {
        self.vp.set64(&[(reg::RIP, rip)]);
    }
}
