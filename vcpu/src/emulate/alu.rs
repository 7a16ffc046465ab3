//! Integer arithmetic and its flags, as pure functions.

use super::cpu::{AF, CF, Cpu, OF, PF, SF, STATUS_FLAGS, ZF};

/// Size of an integer operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Width(u32);

impl Width {
    /// The width of `bytes` bytes, if there are integers of that size.
    pub(super) fn new(bytes: usize) -> Option<Self> {
        matches!(bytes, 1 | 2 | 4 | 8).then_some(Self(bytes as u32))
    }

    pub(super) fn bytes(self) -> usize {
        self.0 as usize
    }

    pub(super) fn bits(self) -> u32 {
        self.0 * 8
    }

    /// All ones in this width.
    pub(super) fn mask(self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }

    /// The highest bit of `value`, as 0 or 1.
    pub(super) fn sign(self, value: u64) -> u64 {
        value >> (self.bits() - 1) & 1
    }

    /// `value` with its sign bit copied upwards.
    pub(super) fn sign_extend(self, value: u64) -> i64 {
        let unused = 64 - self.bits();
        (value << unused) as i64 >> unused
    }
}

/// The result of an operation: a value and those flags that it defines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Output {
    pub(super) value: u64,
    /// New values of the flags in `defined`.
    pub(super) flags: u64,
    /// The flags that change.
    pub(super) defined: u64,
}

impl Output {
    /// Puts the flags into `cpu`.
    pub(super) fn set_flags(&self, cpu: &mut Cpu) {
        cpu.rflags = cpu.rflags & !self.defined | self.flags & self.defined;
    }
}

/// `flag` if `bit` is 1.
pub(super) fn flag(bit: u64, flag: u64) -> u64 {
    if bit & 1 == 1 { flag } else { 0 }
}

/// Sign, zero and parity of a result.
pub(super) fn sign_zero_parity(width: Width, value: u64) -> u64 {
    let parity = u64::from((value as u8).count_ones()) ^ 1;
    flag(width.sign(value), SF) | flag(u64::from(value & width.mask() == 0), ZF) | flag(parity, PF)
}

/// `a + b + carry`.
pub(super) fn add(width: Width, a: u64, b: u64, carry: u64) -> Output {
    let value = a.wrapping_add(b).wrapping_add(carry) & width.mask();
    let carries = a & b | (a | b) & !value;
    let flags = flag(width.sign(carries), CF)
        | flag(carries >> 3, AF)
        | flag(width.sign((a ^ value) & (b ^ value)), OF)
        | sign_zero_parity(width, value);
    Output {
        value,
        flags,
        defined: STATUS_FLAGS,
    }
}

/// `a - b - borrow`.
pub(super) fn subtract(width: Width, a: u64, b: u64, borrow: u64) -> Output {
    let value = a.wrapping_sub(b).wrapping_sub(borrow) & width.mask();
    let borrows = !a & b | (!a | b) & value;
    let flags = flag(width.sign(borrows), CF)
        | flag(borrows >> 3, AF)
        | flag(width.sign((a ^ b) & (a ^ value)), OF)
        | sign_zero_parity(width, value);
    Output {
        value,
        flags,
        defined: STATUS_FLAGS,
    }
}

/// Flags of and, or, xor and test, whose result is `value`.
pub(super) fn logic(width: Width, value: u64) -> Output {
    let value = value & width.mask();
    Output {
        value,
        flags: sign_zero_parity(width, value),
        defined: STATUS_FLAGS,
    }
}

/// `a + 1`, leaving the carry flag alone.
pub(super) fn increment(width: Width, a: u64) -> Output {
    Output {
        defined: STATUS_FLAGS & !CF,
        ..add(width, a, 1, 0)
    }
}

/// `a - 1`, leaving the carry flag alone.
pub(super) fn decrement(width: Width, a: u64) -> Output {
    Output {
        defined: STATUS_FLAGS & !CF,
        ..subtract(width, a, 1, 0)
    }
}

/// `!a`, which changes no flag.
pub(super) fn not(width: Width, a: u64) -> Output {
    Output {
        value: !a & width.mask(),
        flags: 0,
        defined: 0,
    }
}

/// The full product of two unsigned integers: low half, high half, and carry and overflow if the high half is needed.
pub(super) fn multiply(width: Width, a: u64, b: u64) -> (Output, u64) {
    let product = u128::from(a) * u128::from(b);
    let high = (product >> width.bits()) as u64 & width.mask();
    let flags = if high == 0 { 0 } else { CF | OF };
    (
        Output {
            value: product as u64 & width.mask(),
            flags,
            defined: CF | OF,
        },
        high,
    )
}

/// The full product of two signed integers: low half, high half, and carry and overflow if the low half does not suffice.
pub(super) fn multiply_signed(width: Width, a: u64, b: u64) -> (Output, u64) {
    let product = i128::from(width.sign_extend(a)) * i128::from(width.sign_extend(b));
    let value = product as u64 & width.mask();
    let high = (product >> width.bits()) as u64 & width.mask();
    let flags = if i128::from(width.sign_extend(value)) == product {
        0
    } else {
        CF | OF
    };
    (
        Output {
            value,
            flags,
            defined: CF | OF,
        },
        high,
    )
}

/// Quotient and remainder of `high:low / divisor`, unsigned; `None` is a divide error.
pub(super) fn divide(width: Width, high: u64, low: u64, divisor: u64) -> Option<(u64, u64)> {
    let dividend = u128::from(high) << width.bits() | u128::from(low);
    let quotient = dividend.checked_div(u128::from(divisor))?;
    let remainder = dividend % u128::from(divisor);
    (quotient <= u128::from(width.mask())).then_some((quotient as u64, remainder as u64))
}

/// Quotient and remainder of `high:low / divisor`, signed; `None` is a divide error.
pub(super) fn divide_signed(width: Width, high: u64, low: u64, divisor: u64) -> Option<(u64, u64)> {
    let dividend = i128::from(width.sign_extend(high)) << width.bits() | i128::from(low);
    let divisor = i128::from(width.sign_extend(divisor));
    let quotient = dividend.checked_div(divisor)?;
    let remainder = dividend % divisor;
    let fits = i128::from(width.sign_extend(quotient as u64)) == quotient;
    fits.then_some((
        quotient as u64 & width.mask(),
        remainder as u64 & width.mask(),
    ))
}
