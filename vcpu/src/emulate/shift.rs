//! Shifts and rotates with their flags, as pure functions.
//!
//! Flags that the architecture leaves undefined (overflow for counts other than 1, and so on) get the value that the
//! formula for count 1 gives.

use super::alu::{Output, Width, flag, sign_zero_parity};
use super::cpu::{CF, OF, STATUS_FLAGS};

/// The shift and rotate operations that take one operand and a count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shift {
    /// Left, zeros come in.
    Left,
    /// Right, zeros come in.
    Right,
    /// Right, copies of the sign come in.
    Arithmetic,
    /// Rotate left.
    RotateLeft,
    /// Rotate right.
    RotateRight,
    /// Rotate left through the carry flag.
    CarryLeft,
    /// Rotate right through the carry flag.
    CarryRight,
}

/// The count the processor uses: five bits of it, six for 64-bit operands.
pub(super) fn effective_count(width: Width, count: u64) -> u32 {
    (count & if width.bits() == 64 { 0x3f } else { 0x1f }) as u32
}

/// Applies `shift` to `a`; `carry` is the carry flag before, as 0 or 1.
pub(super) fn shift(shift: Shift, width: Width, a: u64, count: u64, carry: u64) -> Output {
    let count = effective_count(width, count);
    if count == 0 {
        return Output {
            value: a,
            flags: 0,
            defined: 0,
        };
    }
    let bits = width.bits();
    let wide = u128::from(a);
    let (value, carry_out) = match shift {
        Shift::Left => {
            let shifted = wide << count;
            (shifted as u64, (shifted >> bits) as u64)
        }
        Shift::Right => ((wide >> count) as u64, (wide >> (count - 1)) as u64),
        Shift::Arithmetic => {
            let signed = i128::from(width.sign_extend(a));
            ((signed >> count) as u64, (signed >> (count - 1)) as u64)
        }
        Shift::RotateLeft => {
            let value = rotate_left(wide, bits, count) as u64;
            (value, value)
        }
        Shift::RotateRight => {
            let value = rotate_left(wide, bits, bits - count % bits) as u64;
            (value, width.sign(value))
        }
        Shift::CarryLeft => {
            let through = rotate_left(u128::from(carry) << bits | wide, bits + 1, count);
            (through as u64, (through >> bits) as u64)
        }
        Shift::CarryRight => {
            let size = bits + 1;
            let through = rotate_left(u128::from(carry) << bits | wide, size, size - count % size);
            (through as u64, (through >> bits) as u64)
        }
    };
    let value = value & width.mask();
    let next = value >> (bits - 2);
    let overflow = match shift {
        Shift::Left | Shift::RotateLeft | Shift::CarryLeft => width.sign(value) ^ carry_out,
        Shift::Right => width.sign(a),
        Shift::Arithmetic => 0,
        Shift::RotateRight | Shift::CarryRight => width.sign(value) ^ next,
    };
    let flags = flag(carry_out, CF) | flag(overflow, OF);
    match shift {
        Shift::Left | Shift::Right | Shift::Arithmetic => Output {
            value,
            flags: flags | sign_zero_parity(width, value),
            defined: STATUS_FLAGS,
        },
        _ => Output {
            value,
            flags,
            defined: CF | OF,
        },
    }
}

/// The low `size` bits of `value` rotated left by `count`.
fn rotate_left(value: u128, size: u32, count: u32) -> u128 {
    let count = count % size;
    let mask = (1u128 << size) - 1;
    (value << count | value >> (size - count)) & mask
}

/// Shifts `a` left by `count`, the high bits of `b` coming in.
pub(super) fn double_left(width: Width, a: u64, b: u64, count: u64) -> Output {
    let count = effective_count(width, count);
    let bits = width.bits();
    let wide = u128::from(a) << bits | u128::from(b);
    let carry = (wide >> (2 * bits - count).min(127)) as u64;
    double(width, a, count, (wide << count >> bits) as u64, carry)
}

/// Shifts `a` right by `count`, the low bits of `b` coming in.
pub(super) fn double_right(width: Width, a: u64, b: u64, count: u64) -> Output {
    let count = effective_count(width, count);
    let wide = u128::from(b) << width.bits() | u128::from(a);
    let carry = (wide >> count.saturating_sub(1)) as u64;
    double(width, a, count, (wide >> count) as u64, carry)
}

/// The output of a double shift from `a` to `value`. Counts above 16 for 16-bit operands have no defined result.
fn double(width: Width, a: u64, count: u32, value: u64, carry: u64) -> Output {
    if count == 0 {
        return Output {
            value: a,
            flags: 0,
            defined: 0,
        };
    }
    let value = value & width.mask();
    let flags = flag(carry, CF) | flag(width.sign(a ^ value), OF) | sign_zero_parity(width, value);
    Output {
        value,
        flags,
        defined: STATUS_FLAGS,
    }
}
