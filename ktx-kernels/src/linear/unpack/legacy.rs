//! Types with one scale for 32 elements, and the ternary types.

use super::super::isa::{Isa, Step, TokenCodes};
#[cfg(target_arch = "x86_64")]
use super::super::tiles::amx::{self, TileRow};
use super::code_book::IQ4_LEVELS;
use super::{Unpack, bytes, half_at, part_mut, u16_at, u32_at, unpack_blocks};

/// How codes become weights.
#[derive(Clone, Copy)]
pub(crate) enum Levels {
    /// `d * (code - zero_point)`; `d` is the block's first half-precision number.
    Symmetric(f32),
    /// `d * code + m`; `d` and `m` are the first two.
    Affine,
}

/// A type of 32 elements with half-precision scales.
pub(crate) trait HalfScaled: Unpack {
    /// How codes become weights.
    const LEVELS: Levels;

    /// The codes of a block.
    ///
    /// # Safety
    /// The CPU supports `K`.
    unsafe fn quants<K: Isa>(block: &[u8], codes: &mut [u8; 32]);
}

/// Implements [`HalfScaled`], and the rest with it; eight blocks' scales are converted at once.
macro_rules! half_scaled_type {
    ($(#[$doc:meta])* $name:ident, bytes $len:literal, codes $count:literal $(, expand $expand:path)?; $levels:expr,
     |$isa:ident, $block:ident, $codes:ident| $body:block) => {
        $(#[$doc])*
        #[allow(non_camel_case_types, reason = "the names of the format")]
        pub(crate) struct $name;

        impl HalfScaled for $name {
            const LEVELS: Levels = $levels;

            #[inline(always)]
            unsafe fn quants<$isa: Isa>(block: &[u8], $codes: &mut [u8; 32]) {
                let $block: &[u8; $len] = bytes(block, 0);
                $body
            }
        }

        impl Unpack for $name {
            const BLOCK: usize = 32;
            const BYTES: usize = $len;
            const SUB: usize = 32;
            const CODES: usize = $count;
            const WIDE: bool = $count > 128;

            #[inline(always)]
            unsafe fn unpack<K: Isa>(
                block: &[u8],
                codes: &mut [u8],
                scales: &mut [f32],
                offsets: &mut [f32],
            ) {
                // SAFETY: the CPU supports `K`, by the caller's promise.
                unsafe { Self::quants::<K>(block, part_mut(codes, 0)) };
                let d = half_at(block, 0);
                (scales[0], offsets[0]) = match Self::LEVELS {
                    Levels::Symmetric(zero_point) => symmetric(d, zero_point),
                    Levels::Affine => (d, half_at(block, 2)),
                };
            }

            #[inline(always)]
            unsafe fn unpack_step<K: Isa>(columns: &[u8], step: &mut Step) {
                let Some((columns, _)) = columns.split_first_chunk::<{ 8 * $len }>() else {
                    // SAFETY: as below.
                    return unsafe { unpack_blocks::<K, Self>(columns, step) };
                };
                let (scales, offsets) = (part_mut(&mut step.scales, 0), part_mut(&mut step.offsets, 0));
                // SAFETY: the CPU supports `K`, by the caller's promise.
                unsafe {
                    K::widen_halves(halves::<$len>(columns, 0), scales);
                    match Self::LEVELS {
                        Levels::Symmetric(zero_point) => {
                            for index in 0..8 {
                                offsets[index] = -zero_point * scales[index];
                            }
                        }
                        Levels::Affine => K::widen_halves(halves::<$len>(columns, 2), offsets),
                    }
                    for index in 0..8 {
                        let codes = part_mut(&mut step.codes, index * 32);
                        Self::quants::<K>(&columns[index * $len..], codes);
                    }
                }
            }

            #[inline(always)]
            unsafe fn dot_direct<K: Isa, const TOKENS: usize>(
                columns: &[u8],
                tokens: &[TokenCodes; TOKENS],
                sums: &mut [K::Sum; TOKENS],
            ) -> bool {
                // SAFETY: by the caller's promise.
                unsafe { K::dot_half_scaled::<Self, TOKENS>(columns, tokens, sums) }
            }

            $(#[cfg(target_arch = "x86_64")]
            #[inline(always)]
            unsafe fn expand(columns: &[u8], _: &mut Step, row: TileRow<'_>) {
                // SAFETY: by the caller's promise.
                unsafe { $expand(columns, row) }
            })?
        }
    };
}

half_scaled_type!(
    /// 4 bits.
    Q4_0, bytes 18, codes 16; Levels::Symmetric(8.0), |K, block, codes| {
        nibbles(bytes(block, 2), codes);
    }
);
half_scaled_type!(
    /// 4 bits and a minimum.
    Q4_1, bytes 20, codes 16; Levels::Affine, |K, block, codes| {
        nibbles(bytes(block, 4), codes);
    }
);
half_scaled_type!(
    /// 5 bits.
    Q5_0, bytes 22, codes 32; Levels::Symmetric(16.0), |K, block, codes| {
        nibbles(bytes(block, 6), codes);
        // SAFETY: the CPU supports `K`, by the caller's promise.
        unsafe { K::add_where(u32_at(block, 2), 16, codes) };
    }
);
half_scaled_type!(
    /// 5 bits and a minimum.
    Q5_1, bytes 24, codes 32; Levels::Affine, |K, block, codes| {
        nibbles(bytes(block, 8), codes);
        // SAFETY: the CPU supports `K`, by the caller's promise.
        unsafe { K::add_where(u32_at(block, 4), 16, codes) };
    }
);
half_scaled_type!(
    /// 8 bits, signed.
    Q8_0, bytes 34, codes 256, expand amx::expand_q8_0; Levels::Symmetric(128.0), |K, block, codes| {
        let quants = bytes::<32>(block, 2);
        for index in 0..32 {
            codes[index] = quants[index] ^ 0x80;
        }
    }
);
half_scaled_type!(
    /// 4 bits that name one of sixteen levels.
    IQ4_NL, bytes 18, codes 256; Levels::Symmetric(128.0), |K, block, codes| {
        nibbles(bytes(block, 2), codes);
        // SAFETY: the CPU supports `K`, by the caller's promise.
        unsafe { K::look_up(&IQ4_LEVELS, codes) };
    }
);

/// The half-precision numbers at `at` of eight blocks.
#[inline(always)]
fn halves<const BYTES: usize>(columns: &[u8], at: usize) -> [u16; 8] {
    let mut halves = [0; 8];
    for index in 0..8 {
        halves[index] = u16_at(columns, index * BYTES + at);
    }
    halves
}

/// Twice the values of 4-bit floats (E2M1), shifted by 12.
const E2M1: [u8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];

/// 4-bit floats times a power of two.
pub(crate) struct MXFP4;

impl Unpack for MXFP4 {
    const BLOCK: usize = 32;
    const BYTES: usize = 17;
    const SUB: usize = 32;
    const CODES: usize = 32;

    #[inline(always)]
    unsafe fn unpack<K: Isa>(
        block: &[u8],
        codes: &mut [u8],
        scales: &mut [f32],
        offsets: &mut [f32],
    ) {
        let codes = part_mut::<_, 32>(codes, 0);
        nibbles(bytes(block, 1), codes);
        // SAFETY: the CPU supports `K`, by the caller's promise.
        unsafe { K::look_up(&E2M1, codes) };
        // Half of 2^(e - 127): the levels are doubled. The two smallest are subnormal.
        let exponent = u32::from(block[0]);
        let half_scale = match exponent {
            0 | 1 => 0x0020_0000 << exponent,
            _ => (exponent - 1) << 23,
        };
        (scales[0], offsets[0]) = symmetric(f32::from_bits(half_scale), 12.0);
    }
}

/// Ternary, five digits to a byte.
#[allow(non_camel_case_types, reason = "the names of the format")]
pub(crate) struct TQ1_0;

impl Unpack for TQ1_0 {
    const BLOCK: usize = 256;
    const BYTES: usize = 54;
    const SUB: usize = 32;
    const CODES: usize = 16;

    #[inline(always)]
    unsafe fn unpack<K: Isa>(
        block: &[u8],
        codes: &mut [u8],
        scales: &mut [f32],
        offsets: &mut [f32],
    ) {
        let mut power = 1u8;
        for digit in 0..5 {
            digits::<32>(bytes(block, 0), power, part_mut(codes, digit * 32));
            digits::<16>(bytes(block, 32), power, part_mut(codes, 160 + digit * 16));
            if digit < 4 {
                digits::<4>(bytes(block, 48), power, part_mut(codes, 240 + digit * 4));
            }
            power = power.wrapping_mul(3);
        }
        let (scale, offset) = symmetric(half_at(block, 52), 1.0);
        *part_mut(scales, 0) = [scale; 8];
        *part_mut(offsets, 0) = [offset; 8];
    }
}

/// The ternary digit that `power` moves to the front of each byte.
#[inline(always)]
fn digits<const N: usize>(packed: &[u8; N], power: u8, codes: &mut [u8; N]) {
    for index in 0..N {
        let fraction = packed[index].wrapping_mul(power);
        codes[index] = ((u16::from(fraction) * 3) >> 8) as u8;
    }
}

/// Ternary, two bits each.
#[allow(non_camel_case_types, reason = "the names of the format")]
pub(crate) struct TQ2_0;

impl Unpack for TQ2_0 {
    const BLOCK: usize = 256;
    const BYTES: usize = 66;
    const SUB: usize = 32;
    const CODES: usize = 16;

    #[inline(always)]
    unsafe fn unpack<K: Isa>(
        block: &[u8],
        codes: &mut [u8],
        scales: &mut [f32],
        offsets: &mut [f32],
    ) {
        for half in 0..2 {
            let packed = bytes::<32>(block, half * 32);
            for quarter in 0..4 {
                let codes = part_mut::<_, 32>(codes, half * 128 + quarter * 32);
                for index in 0..32 {
                    codes[index] = (packed[index] >> (2 * quarter)) & 3;
                }
            }
        }
        let (scale, offset) = symmetric(half_at(block, 64), 1.0);
        *part_mut(scales, 0) = [scale; 8];
        *part_mut(offsets, 0) = [offset; 8];
    }
}

/// Scale and offset of codes that are `zero_point` too large.
#[inline(always)]
pub(super) fn symmetric(scale: f32, zero_point: f32) -> (f32, f32) {
    (scale, -zero_point * scale)
}

/// Lower nibbles are the first 16 elements, upper ones the next.
#[inline(always)]
pub(super) fn nibbles(packed: &[u8; 16], codes: &mut [u8; 32]) {
    for index in 0..16 {
        codes[index] = packed[index] & 15;
        codes[index + 16] = packed[index] >> 4;
    }
}
