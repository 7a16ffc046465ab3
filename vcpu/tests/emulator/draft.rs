//! From a [`Case`] to an instruction that runs without a fault and whose memory operand is where the case wants it.

use crate::case::Case;
use crate::encoding::{Imm, Kind, Template};
use crate::guest::{DF, RAX, RBX, RCX, RDI, RDX, RSI, RSP};
use crate::native::{DATA_LEN, Places};

/// GS base for cases with a segment prefix.
pub(crate) const GS_BASE: u64 = 0x1234_5000;

/// What runs.
#[derive(Clone, Debug)]
pub(crate) struct Built {
    /// The encoding in 64-bit code.
    pub(crate) bytes: Vec<u8>,
    /// The same instruction in 32-bit and in 16-bit code, where there is one.
    pub(crate) legacy: Option<[Vec<u8>; 2]>,
    pub(crate) gpr: [u64; 16],
    pub(crate) rflags: u64,
    pub(crate) vectors: [[u8; 32]; 16],
    pub(crate) data: Box<[u8; DATA_LEN]>,
    /// The memory operand is in the GS segment.
    pub(crate) gs: bool,
}

/// An instruction under construction.
pub(crate) struct Draft<'a> {
    case: &'a Case,
    template: &'a Template,
    places: Places,
    /// Operand size in bytes, for instructions that have several.
    size: usize,
    rex: u8,
    gs: bool,
    /// Where the memory operand is in the data pages.
    target: usize,
    gpr: [u64; 16],
    data: Box<[u8; DATA_LEN]>,
    /// What follows the opcode, up to the immediate.
    operand: Vec<u8>,
    /// The last four bytes of `operand` are a displacement from the next instruction.
    rip_relative: bool,
}

impl<'a> Draft<'a> {
    pub(crate) fn new(case: &'a Case, template: &'a Template, places: Places) -> Self {
        let wish = (0..3)
            .map(|step| (case.size + step) % 3)
            .find(|size| template.sizes >> size & 1 == 1);
        let size = 2 << wish.unwrap_or(1);
        let target = match template.kind {
            // 32768 bits in either direction stay inside.
            Kind::BitOffset => 0x1000 + case.target % 0x2000,
            Kind::Aligned => case.target & !31,
            Kind::ComparePair if size == 8 => case.target & !15,
            _ => case.target,
        };
        let rex = match case.rex {
            _ if template.is_vex() => 0,
            Some(bits) => 0x40 | bits & 7,
            None => 0,
        };
        Self {
            case,
            template,
            places,
            size,
            rex: if size == 8 { rex | 0x48 } else { rex },
            gs: case.gs && template.kind != Kind::Text,
            target,
            gpr: std::array::from_fn(|index| case.gpr[index]),
            data: content(case),
            operand: Vec::new(),
            rip_relative: false,
        }
    }

    /// Finishes the instruction and its state; `None` if the numbers of the case contradict each other.
    pub(crate) fn build(mut self) -> Option<Built> {
        self.locate();
        let located = self.gpr;
        self.suit()?;
        let uses = self.address_registers();
        if (0..16).any(|index| located[index] != self.gpr[index] && uses >> index & 1 == 1) {
            return None;
        }
        let address32 = self.case.address32;
        if self.rip_relative {
            let next =
                self.places.instruction + self.assemble(address32, self.size == 2).len() as u64;
            let displacement = self.address().wrapping_sub(next) as u32;
            let start = self.operand.len() - 4;
            self.operand[start..].copy_from_slice(&displacement.to_le_bytes());
        }
        let same = self.template.legacy && address32 && self.rex == 0 && !self.rip_relative;
        let legacy = same.then(|| {
            let dword = self.size == 4 && self.template.mandatory != Some(0x66);
            [
                self.assemble(false, self.size == 2),
                self.assemble(true, dword),
            ]
        });
        let mut rflags = 0x202 | self.case.flags & 0x8d5;
        if self.template.kind == Kind::Text {
            rflags |= self.case.flags & DF;
        }
        let byte = |index: usize, byte: usize| (index * 32 + byte) as u8 ^ self.case.fill as u8;
        Some(Built {
            bytes: self.assemble(address32, self.size == 2),
            legacy,
            gpr: self.gpr,
            rflags,
            vectors: std::array::from_fn(|index| std::array::from_fn(|at| byte(index, at))),
            data: self.data,
            gs: self.gs,
        })
    }

    /// The encoding, with or without an address-size and an operand-size prefix.
    fn assemble(&self, address_prefix: bool, operand_prefix: bool) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(address_prefix.then_some(0x67));
        bytes.extend(operand_prefix.then_some(0x66));
        bytes.extend((self.template.lock && self.case.lock).then_some(0xf0));
        bytes.extend(self.gs.then_some(0x65));
        bytes.extend(self.template.mandatory);
        bytes.extend((self.rex != 0).then_some(self.rex));
        bytes.extend_from_slice(self.template.opcode);
        bytes.extend_from_slice(&self.operand);
        bytes.extend_from_slice(self.immediate());
        bytes
    }

    fn immediate(&self) -> &[u8] {
        let len = match self.template.imm {
            Imm::None => 0,
            Imm::Byte => 1,
            Imm::Full => self.size.min(4),
        };
        &self.case.immediate[..len]
    }

    /// The offset of the memory operand in its segment.
    fn address(&self) -> u64 {
        let base = if self.gs { GS_BASE } else { 0 };
        (self.places.data + self.target as u64).wrapping_sub(base)
    }

    /// Sets those bits of a register that an address uses; the others stay random.
    fn set_address(&mut self, register: usize, address: u64) {
        let mask = if self.case.address32 {
            0xffff_ffff
        } else {
            u64::MAX
        };
        self.gpr[register] = self.gpr[register] & !mask | address & mask;
    }

    /// Makes the memory operand of the encoding lead to its address.
    fn locate(&mut self) {
        let address = self.address();
        match self.template.kind {
            Kind::Direct => {
                let len = if self.case.address32 { 4 } else { 8 };
                self.operand
                    .extend_from_slice(&address.to_le_bytes()[..len]);
            }
            Kind::Table => self.set_address(RBX, address.wrapping_sub(self.gpr[RAX] & 0xff)),
            Kind::Text => {
                self.set_address(RSI, address);
                self.set_address(RDI, self.places.data + self.case.other_target as u64);
                if self.template.mandatory.is_some() {
                    self.set_address(RCX, self.gpr[RCX] % 40);
                }
            }
            _ => self.modrm(address),
        }
    }

    /// Chooses ModRM, SIB and displacement, and sets the base register.
    fn modrm(&mut self, address: u64) {
        let case = self.case;
        let mode = (case.modrm >> 6) % 3;
        let reg = self.template.digit.unwrap_or(case.modrm >> 3 & 7) << 3;
        let rm = case.modrm & 7;
        if mode == 0 && rm == 5 {
            self.operand = vec![reg | rm, 0, 0, 0, 0];
            self.rip_relative = true;
            return;
        }
        let (base, index) = self.base_and_index();
        let scale = if index.is_some() {
            1u64 << (case.sib >> 6)
        } else {
            0
        };
        let scaled = |gpr: &[u64; 16]| index.map_or(0, |index| gpr[index].wrapping_mul(scale));
        let (mode, displacement) = match base {
            None => {
                if let Some(index) = index {
                    self.set_address(index, self.gpr[index] & 0xfff);
                }
                (
                    0,
                    address.wrapping_sub(scaled(&self.gpr)).to_le_bytes()[..4].to_vec(),
                )
            }
            Some(base) if index == Some(base) => {
                // base * (1 + scale) + displacement, with a displacement of one byte.
                self.set_address(base, address / (1 + scale));
                (1, vec![(address % (1 + scale)) as u8])
            }
            Some(base) => {
                let (displacement, bytes) = match mode {
                    0 => (0, vec![]),
                    1 => (
                        i64::from(case.displacement as i8),
                        vec![case.displacement as u8],
                    ),
                    _ => (
                        i64::from(case.displacement),
                        case.displacement.to_le_bytes().to_vec(),
                    ),
                };
                let rest = address.wrapping_sub(scaled(&self.gpr));
                self.set_address(base, rest.wrapping_sub(displacement as u64));
                (mode, bytes)
            }
        };
        self.operand = vec![mode << 6 | reg | rm];
        self.operand.extend((rm == 4).then_some(case.sib));
        self.operand.extend(displacement);
    }

    /// The registers that ModRM and SIB of the case name.
    fn base_and_index(&self) -> (Option<usize>, Option<usize>) {
        let extend = |bit: u8| usize::from(self.rex >> bit & 1) << 3;
        let rm = self.case.modrm & 7;
        if rm != 4 {
            return (Some(usize::from(rm) | extend(0)), None);
        }
        let sib = self.case.sib;
        let base = usize::from(sib & 7) | extend(0);
        let index = usize::from(sib >> 3 & 7) | extend(1);
        let has_base = sib & 7 != 5 || self.case.modrm >> 6 != 0 && self.case.modrm >> 6 != 3;
        (has_base.then_some(base), (index != RSP).then_some(index))
    }

    /// The registers that the memory operand uses, one bit each.
    fn address_registers(&self) -> u16 {
        if matches!(self.template.kind, Kind::Text | Kind::Table | Kind::Direct)
            || self.rip_relative
        {
            return 0;
        }
        let (base, index) = self.base_and_index();
        base.map_or(0, |base| 1 << base) | index.map_or(0, |index| 1 << index)
    }

    /// Sets what this kind of instruction needs in registers and memory beyond the address.
    fn suit(&mut self) -> Option<()> {
        let target = self.target;
        match self.template.kind {
            Kind::Divide => return self.suit_division(),
            Kind::BitOffset => {
                let reg =
                    usize::from(self.case.modrm >> 3 & 7) | usize::from(self.rex >> 2 & 1) << 3;
                let offset = self.gpr[reg] as i16 as u64;
                let unused = if self.size == 8 { 0 } else { u64::MAX << 32 };
                self.gpr[reg] = self.gpr[reg] & unused | offset & !unused;
            }
            Kind::Compare if self.case.matches => {
                self.data[target..target + 8].copy_from_slice(&self.gpr[RAX].to_le_bytes());
            }
            Kind::ComparePair if self.case.matches => {
                for (at, register) in [(target, RAX), (target + self.size, RDX)] {
                    let value = self.gpr[register].to_le_bytes();
                    self.data[at..at + self.size].copy_from_slice(&value[..self.size]);
                }
            }
            Kind::Stack | Kind::Branch => {
                let data = self.places.data;
                if !(data + 0x100..data + 0x3f00).contains(&self.gpr[RSP]) {
                    self.gpr[RSP] = data + 0x400;
                }
                if self.template.kind == Kind::Branch {
                    self.data[target..target + 8]
                        .copy_from_slice(&self.places.landing.to_le_bytes());
                }
            }
            Kind::Text if self.case.matches => {
                self.gpr[RAX] =
                    u64::from_le_bytes(std::array::from_fn(|at| self.data[0x1000 + at]));
            }
            Kind::DoubleShift if self.size == 2 => {
                let count = self
                    .immediate()
                    .first()
                    .map_or(self.gpr[RCX], |count| u64::from(*count));
                return (count & 0x1f <= 16).then_some(());
            }
            _ => {}
        }
        Some(())
    }

    /// Makes the quotient fit.
    fn suit_division(&mut self) -> Option<()> {
        self.data[self.target] |= 3;
        let bytes = if self.template.opcode == [0xf6] {
            1
        } else {
            self.size
        };
        let operand = &self.data[self.target..self.target + bytes];
        let divisor = operand
            .iter()
            .rev()
            .fold(0u64, |all, byte| all << 8 | u64::from(*byte));
        let unused = 64 - 8 * bytes as u32;
        let signed = self.template.digit == Some(7);
        // A divisor of -1 would overflow for the least dividend.
        if signed && divisor == u64::MAX >> unused {
            return None;
        }
        let low = self.gpr[RAX];
        let high = match (bytes, signed) {
            (_, true) => ((low << unused) as i64 >> 63) as u64,
            (1, false) => (low >> 8 & 0xff) % divisor,
            (_, false) => self.gpr[RDX] % divisor,
        };
        if bytes == 1 {
            self.gpr[RAX] = low & !0xff00 | (high & 0xff) << 8;
        } else {
            self.gpr[RDX] = high;
        }
        Some(())
    }
}

/// What the data pages hold before.
fn content(case: &Case) -> Box<[u8; DATA_LEN]> {
    let mut content = Box::new([0; DATA_LEN]);
    let mut state = case.fill | 1;
    for chunk in content.chunks_exact_mut(8) {
        if !case.constant_fill {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
        }
        chunk.copy_from_slice(&state.to_le_bytes());
    }
    content
}
