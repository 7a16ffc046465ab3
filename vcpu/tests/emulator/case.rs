//! One generated case: an encoding and the state it runs in.
//!
//! A [`Case`] is plain random numbers, so that it shrinks well; [`crate::draft`] bends them into an instruction.

use proptest::collection::vec;
use proptest::prelude::*;

#[derive(Clone, Debug)]
pub(crate) struct Case {
    /// Index of the encoding.
    pub(crate) template: usize,
    /// Wish for the operand size.
    pub(crate) size: u8,
    /// REX bits, if there is a REX prefix.
    pub(crate) rex: Option<u8>,
    pub(crate) modrm: u8,
    pub(crate) sib: u8,
    pub(crate) displacement: i32,
    pub(crate) immediate: [u8; 4],
    pub(crate) gpr: Vec<u64>,
    pub(crate) flags: u64,
    /// Where the memory operand is in the data pages.
    pub(crate) target: usize,
    /// Where the other string is.
    pub(crate) other_target: usize,
    /// With an address-size prefix.
    pub(crate) address32: bool,
    pub(crate) lock: bool,
    pub(crate) gs: bool,
    /// Let comparisons find equal values.
    pub(crate) matches: bool,
    pub(crate) fill: u64,
    /// Fill the data pages with one value.
    pub(crate) constant_fill: bool,
}

/// Registers and immediates: edges as often as anything else.
fn value() -> impl Strategy<Value = u64> {
    let edges = vec![
        0,
        1,
        2,
        0x7f,
        0x80,
        0xff,
        0x7fff,
        0x8000,
        0xffff,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        1 << 63,
    ];
    prop_oneof![
        any::<u64>(),
        0..64u64,
        prop::sample::select(edges),
        Just(u64::MAX),
        Just(u64::MAX >> 1)
    ]
}

/// A place in the data pages, often near a page border, never near the ends.
fn target() -> impl Strategy<Value = usize> {
    prop_oneof![0x800..0x3800usize, 0x1ff0..0x2010usize, 0xff8..0x1001usize]
}

/// Cases for a list of `templates` encodings.
pub(crate) fn cases(templates: usize) -> impl Strategy<Value = Case> {
    let encoding = (
        0..templates,
        0..3u8,
        any::<Option<u8>>(),
        any::<u8>(),
        any::<u8>(),
        any::<i32>(),
    );
    let place = (
        target(),
        target(),
        any::<bool>(),
        any::<bool>(),
        prop::bool::weighted(0.2),
    );
    let content = (
        prop::bool::weighted(0.5),
        any::<u64>(),
        prop::bool::weighted(0.3),
    );
    (
        encoding,
        value(),
        vec(value(), 16),
        any::<u64>(),
        place,
        content,
    )
        .prop_map(|(encoding, immediate, gpr, flags, place, content)| {
            let (template, size, rex, modrm, sib, displacement) = encoding;
            let (target, other_target, address32, lock, gs) = place;
            let (matches, fill, constant_fill) = content;
            let immediate = (immediate as u32).to_le_bytes();
            Case {
                template,
                size,
                rex,
                modrm,
                sib,
                displacement,
                immediate,
                gpr,
                flags,
                target,
                other_target,
                address32,
                lock,
                gs,
                matches,
                fill,
                constant_fill,
            }
        })
}
