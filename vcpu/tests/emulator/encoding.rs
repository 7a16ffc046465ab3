//! The encodings that are compared with the real CPU, as data.

use std::arch::is_x86_feature_detected;

/// What follows ModRM, SIB and displacement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Imm {
    None,
    Byte,
    /// Two bytes with 16-bit operands, otherwise four.
    Full,
}

/// What must hold for an instruction to run without fault and to be worth running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Nothing special.
    Plain,
    /// The divisor must suit rDX:rAX.
    Divide,
    /// The bit offset in a register must stay within the data pages.
    BitOffset,
    /// The memory operand often equals rAX.
    Compare,
    /// As `Compare`, with rDX:rAX, eight or sixteen bytes, aligned.
    ComparePair,
    /// Uses the stack.
    Stack,
    /// The memory operand holds the branch target.
    Branch,
    /// No ModRM but a direct address.
    Direct,
    /// No ModRM; rSI, rDI and perhaps rCX.
    Text,
    /// No ModRM; a table at rBX.
    Table,
    /// A vector move; with alignment.
    Aligned,
    /// 16-bit forms with counts above 16 have no defined result.
    DoubleShift,
}

/// One opcode with a memory operand.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Template {
    /// 0xf3, 0xf2 or 0x66 if the opcode needs it.
    pub(crate) mandatory: Option<u8>,
    /// Escape bytes and opcode; VEX opcodes start with 0xc5.
    pub(crate) opcode: &'static [u8],
    /// The opcode extension in ModRM.reg, or a register operand there.
    pub(crate) digit: Option<u8>,
    pub(crate) imm: Imm,
    /// Allowed operand sizes: bit 0 = 16, bit 1 = 32, bit 2 = 64. Byte operations allow one.
    pub(crate) sizes: u8,
    pub(crate) lock: bool,
    pub(crate) kind: Kind,
    /// Means the same in 16- and 32-bit code.
    pub(crate) legacy: bool,
}

const ALL: u8 = 7;
const NO_WORD: u8 = 6;
const DWORD: u8 = 2;

const fn rm(opcode: &'static [u8], sizes: u8) -> Template {
    let (mandatory, digit, imm, kind) = (None, None, Imm::None, Kind::Plain);
    Template {
        mandatory,
        opcode,
        digit,
        imm,
        sizes,
        lock: false,
        kind,
        legacy: true,
    }
}

impl Template {
    /// An AVX opcode, which carries its own prefix.
    pub(crate) fn is_vex(&self) -> bool {
        self.opcode[0] == 0xc5
    }

    const fn digit(self, digit: u8) -> Self {
        Self {
            digit: Some(digit),
            ..self
        }
    }

    const fn imm(self, imm: Imm) -> Self {
        Self { imm, ..self }
    }

    const fn lock(self) -> Self {
        Self { lock: true, ..self }
    }

    const fn kind(self, kind: Kind) -> Self {
        Self { kind, ..self }
    }

    const fn prefix(self, mandatory: u8) -> Self {
        Self {
            mandatory: Some(mandatory),
            ..self
        }
    }

    const fn only_long(self) -> Self {
        Self {
            legacy: false,
            ..self
        }
    }
}

/// Single bytes as slices that live forever.
fn opcode(byte: u8) -> &'static [u8] {
    static BYTES: [u8; 256] = {
        let mut bytes = [0; 256];
        let mut index = 0;
        while index < 256 {
            bytes[index] = index as u8;
            index += 1;
        }
        bytes
    };
    &BYTES[usize::from(byte)..][..1]
}

/// 0x0f and `byte`.
fn escaped(byte: u8) -> &'static [u8] {
    static BYTES: [[u8; 2]; 256] = {
        let mut bytes = [[0x0f, 0]; 256];
        let mut index = 0;
        while index < 256 {
            bytes[index][1] = index as u8;
            index += 1;
        }
        bytes
    };
    &BYTES[usize::from(byte)]
}

/// mov and its relatives.
pub(crate) fn moves() -> Vec<Template> {
    let mut all = vec![
        rm(&[0x88], DWORD),
        rm(&[0x89], ALL),
        rm(&[0x8a], DWORD),
        rm(&[0x8b], ALL),
        rm(&[0xc6], DWORD).digit(0).imm(Imm::Byte),
        rm(&[0xc7], ALL).digit(0).imm(Imm::Full),
        rm(&[0x63], NO_WORD).only_long(),
        rm(&[0x0f, 0xb6], ALL),
        rm(&[0x0f, 0xb7], ALL),
        rm(&[0x0f, 0xbe], ALL),
        rm(&[0x0f, 0xbf], ALL),
        rm(&[0x0f, 0xc3], NO_WORD).only_long(),
        rm(&[0xd7], DWORD).kind(Kind::Table),
    ];
    for byte in 0xa0..=0xa3 {
        let sizes = if byte & 1 == 0 { DWORD } else { ALL };
        all.push(rm(opcode(byte), sizes).kind(Kind::Direct).only_long());
    }
    if is_x86_feature_detected!("movbe") {
        all.extend([rm(&[0x0f, 0x38, 0xf0], ALL), rm(&[0x0f, 0x38, 0xf1], ALL)]);
    }
    // Segment selectors: es, cs, ss, ds.
    all.extend((0..4).map(|digit| rm(&[0x8c], DWORD).digit(digit).only_long()));
    all
}

/// setcc and cmovcc.
pub(crate) fn conditions() -> Vec<Template> {
    let set = (0x90..=0x9f).map(|byte| rm(escaped(byte), DWORD).digit(0));
    let copy = (0x40..=0x4f).map(|byte| rm(escaped(byte), ALL));
    set.chain(copy).collect()
}

/// Sums, logic and comparisons.
pub(crate) fn arithmetic() -> Vec<Template> {
    let mut all = Vec::new();
    for group in 0..8 {
        let base = group * 8;
        let lock = |template: Template| {
            if group == 7 {
                template
            } else {
                template.lock()
            }
        };
        all.push(lock(rm(opcode(base), DWORD)));
        all.push(lock(rm(opcode(base + 1), ALL)));
        all.push(rm(opcode(base + 2), DWORD));
        all.push(rm(opcode(base + 3), ALL));
        all.push(lock(rm(&[0x80], DWORD).digit(group).imm(Imm::Byte)));
        all.push(lock(rm(&[0x81], ALL).digit(group).imm(Imm::Full)));
        all.push(lock(rm(&[0x83], ALL).digit(group).imm(Imm::Byte)));
    }
    all.extend([rm(&[0x84], DWORD), rm(&[0x85], ALL)]);
    all.push(rm(&[0xf6], DWORD).digit(0).imm(Imm::Byte));
    all.push(rm(&[0xf7], ALL).digit(0).imm(Imm::Full));
    for digit in 2..4 {
        all.extend([
            rm(&[0xf6], DWORD).digit(digit).lock(),
            rm(&[0xf7], ALL).digit(digit).lock(),
        ]);
    }
    for digit in 0..2 {
        all.extend([
            rm(&[0xfe], DWORD).digit(digit).lock(),
            rm(&[0xff], ALL).digit(digit).lock(),
        ]);
    }
    all
}

/// Products and quotients.
pub(crate) fn products() -> Vec<Template> {
    let mut all = vec![
        rm(&[0x69], ALL).imm(Imm::Full),
        rm(&[0x6b], ALL).imm(Imm::Byte),
        rm(&[0x0f, 0xaf], ALL),
    ];
    for digit in 4..8 {
        let kind = if digit < 6 { Kind::Plain } else { Kind::Divide };
        all.push(rm(&[0xf6], DWORD).digit(digit).kind(kind));
        all.push(rm(&[0xf7], ALL).digit(digit).kind(kind));
    }
    all
}

/// Shifts and rotates.
pub(crate) fn shifts() -> Vec<Template> {
    let mut all = Vec::new();
    for digit in 0..8 {
        all.push(rm(&[0xc0], DWORD).digit(digit).imm(Imm::Byte));
        all.push(rm(&[0xc1], ALL).digit(digit).imm(Imm::Byte));
        all.push(rm(&[0xd0], DWORD).digit(digit));
        all.push(rm(&[0xd1], ALL).digit(digit));
        all.push(rm(&[0xd2], DWORD).digit(digit));
        all.push(rm(&[0xd3], ALL).digit(digit));
    }
    for byte in [0xa4, 0xac] {
        all.push(
            rm(escaped(byte), ALL)
                .imm(Imm::Byte)
                .kind(Kind::DoubleShift),
        );
        all.push(rm(escaped(byte + 1), ALL).kind(Kind::DoubleShift));
    }
    all
}

/// Single bits and scans.
pub(crate) fn bits() -> Vec<Template> {
    let mut all = vec![rm(&[0x0f, 0xa3], ALL).kind(Kind::BitOffset)];
    all.extend([0xab, 0xb3, 0xbb].map(|byte| rm(escaped(byte), ALL).kind(Kind::BitOffset).lock()));
    all.push(rm(&[0x0f, 0xba], ALL).digit(4).imm(Imm::Byte));
    all.extend((5..8).map(|digit| rm(&[0x0f, 0xba], ALL).digit(digit).imm(Imm::Byte).lock()));
    all.extend([rm(&[0x0f, 0xbc], ALL), rm(&[0x0f, 0xbd], ALL)]);
    // Without the feature, the prefix is ignored and the instruction is another one.
    let counts = [
        (0xb8, is_x86_feature_detected!("popcnt")),
        (0xbc, is_x86_feature_detected!("bmi1")),
        (0xbd, is_x86_feature_detected!("lzcnt")),
    ];
    let available = counts.into_iter().filter(|&(_, available)| available);
    all.extend(available.map(|(byte, _)| rm(escaped(byte), ALL).prefix(0xf3)));
    all
}

/// Exchanges.
pub(crate) fn exchanges() -> Vec<Template> {
    vec![
        rm(&[0x86], DWORD).lock(),
        rm(&[0x87], ALL).lock(),
        rm(&[0x0f, 0xc0], DWORD).lock(),
        rm(&[0x0f, 0xc1], ALL).lock(),
        rm(&[0x0f, 0xb0], DWORD).lock().kind(Kind::Compare),
        rm(&[0x0f, 0xb1], ALL).lock().kind(Kind::Compare),
        rm(&[0x0f, 0xc7], NO_WORD)
            .digit(1)
            .lock()
            .kind(Kind::ComparePair),
    ]
}

/// push, pop, call and jmp.
pub(crate) fn stack() -> Vec<Template> {
    vec![
        rm(&[0xff], 3).digit(6).kind(Kind::Stack).only_long(),
        rm(&[0x8f], 3).digit(0).kind(Kind::Stack).only_long(),
        rm(&[0xff], DWORD).digit(2).kind(Kind::Branch).only_long(),
        rm(&[0xff], DWORD).digit(4).kind(Kind::Branch).only_long(),
    ]
}

/// String instructions.
pub(crate) fn strings() -> Vec<Template> {
    let mut all = Vec::new();
    for byte in [0xa4, 0xa6, 0xaa, 0xac, 0xae] {
        for prefix in [None, Some(0xf3), Some(0xf2)] {
            for (byte, sizes) in [(byte, DWORD), (byte + 1, ALL)] {
                all.push(Template {
                    mandatory: prefix,
                    ..rm(opcode(byte), sizes).kind(Kind::Text)
                });
            }
        }
    }
    all
}

/// Vector moves.
pub(crate) fn vectors(avx: bool) -> Vec<Template> {
    let mut all = vec![
        // movups, movupd, movss, movsd
        rm(&[0x0f, 0x10], DWORD),
        rm(&[0x0f, 0x11], DWORD),
        rm(&[0x0f, 0x10], DWORD).prefix(0x66),
        rm(&[0x0f, 0x11], DWORD).prefix(0x66),
        rm(&[0x0f, 0x10], DWORD).prefix(0xf3),
        rm(&[0x0f, 0x11], DWORD).prefix(0xf3),
        rm(&[0x0f, 0x10], DWORD).prefix(0xf2),
        rm(&[0x0f, 0x11], DWORD).prefix(0xf2),
        // movlps, movlpd, movhps, movhpd
        rm(&[0x0f, 0x12], DWORD),
        rm(&[0x0f, 0x13], DWORD),
        rm(&[0x0f, 0x12], DWORD).prefix(0x66),
        rm(&[0x0f, 0x13], DWORD).prefix(0x66),
        rm(&[0x0f, 0x16], DWORD),
        rm(&[0x0f, 0x17], DWORD),
        rm(&[0x0f, 0x16], DWORD).prefix(0x66),
        rm(&[0x0f, 0x17], DWORD).prefix(0x66),
        // movaps, movapd, movntps, movntpd
        rm(&[0x0f, 0x28], DWORD).kind(Kind::Aligned),
        rm(&[0x0f, 0x29], DWORD).kind(Kind::Aligned),
        rm(&[0x0f, 0x28], DWORD).prefix(0x66).kind(Kind::Aligned),
        rm(&[0x0f, 0x29], DWORD).prefix(0x66).kind(Kind::Aligned),
        rm(&[0x0f, 0x2b], DWORD).kind(Kind::Aligned),
        rm(&[0x0f, 0x2b], DWORD).prefix(0x66).kind(Kind::Aligned),
        // movd and movq, movdqa, movdqu, movntdq
        rm(&[0x0f, 0x6e], NO_WORD).prefix(0x66),
        rm(&[0x0f, 0x7e], NO_WORD).prefix(0x66),
        rm(&[0x0f, 0x7e], DWORD).prefix(0xf3),
        rm(&[0x0f, 0xd6], DWORD).prefix(0x66),
        rm(&[0x0f, 0x6f], DWORD).prefix(0x66).kind(Kind::Aligned),
        rm(&[0x0f, 0x7f], DWORD).prefix(0x66).kind(Kind::Aligned),
        rm(&[0x0f, 0x6f], DWORD).prefix(0xf3),
        rm(&[0x0f, 0x7f], DWORD).prefix(0xf3),
        rm(&[0x0f, 0xe7], DWORD).prefix(0x66).kind(Kind::Aligned),
    ];
    if is_x86_feature_detected!("sse3") {
        all.push(rm(&[0x0f, 0xf0], DWORD).prefix(0xf2));
    }
    if is_x86_feature_detected!("sse4.1") {
        all.push(
            rm(&[0x0f, 0x38, 0x2a], DWORD)
                .prefix(0x66)
                .kind(Kind::Aligned),
        );
    }
    if avx {
        let vex = |bytes| rm(bytes, DWORD).only_long();
        all.extend([
            // vmovups, vmovupd, vmovdqu, vlddqu in both sizes
            vex(&[0xc5, 0xf8, 0x10]),
            vex(&[0xc5, 0xf8, 0x11]),
            vex(&[0xc5, 0xfc, 0x10]),
            vex(&[0xc5, 0xfc, 0x11]),
            vex(&[0xc5, 0xfd, 0x10]),
            vex(&[0xc5, 0xfd, 0x11]),
            vex(&[0xc5, 0xfa, 0x6f]),
            vex(&[0xc5, 0xfa, 0x7f]),
            vex(&[0xc5, 0xfe, 0x6f]),
            vex(&[0xc5, 0xfe, 0x7f]),
            vex(&[0xc5, 0xff, 0xf0]),
            // vmovss, vmovsd, vmovd, vmovq
            vex(&[0xc5, 0xfa, 0x10]),
            vex(&[0xc5, 0xfa, 0x11]),
            vex(&[0xc5, 0xfb, 0x10]),
            vex(&[0xc5, 0xfb, 0x11]),
            vex(&[0xc5, 0xf9, 0x6e]),
            vex(&[0xc5, 0xf9, 0x7e]),
            vex(&[0xc5, 0xfa, 0x7e]),
            vex(&[0xc5, 0xf9, 0xd6]),
            // vmovlps, vmovhpd, merging with xmm3
            vex(&[0xc5, 0xe0, 0x12]),
            vex(&[0xc5, 0xf8, 0x13]),
            vex(&[0xc5, 0xe1, 0x16]),
            vex(&[0xc5, 0xf9, 0x17]),
            // vmovaps, vmovdqa, vmovntdq in both sizes
            vex(&[0xc5, 0xf8, 0x28]).kind(Kind::Aligned),
            vex(&[0xc5, 0xfc, 0x29]).kind(Kind::Aligned),
            vex(&[0xc5, 0xf9, 0x6f]).kind(Kind::Aligned),
            vex(&[0xc5, 0xfd, 0x6f]).kind(Kind::Aligned),
            vex(&[0xc5, 0xfd, 0x7f]).kind(Kind::Aligned),
            vex(&[0xc5, 0xf9, 0xe7]).kind(Kind::Aligned),
            vex(&[0xc5, 0xfd, 0xe7]).kind(Kind::Aligned),
        ]);
    }
    all
}
