//! Weights on their way to `f32`, for products with activations that are not quantised.

use ktx_gguf::dequantize_row;

use super::WeightRows;
use super::isa::STEP;

/// Up to 256 columns of one row.
#[derive(Clone, Copy)]
pub(crate) struct Columns<'a> {
    pub(crate) w: &'a WeightRows<'a>,
    /// The row of `w`.
    pub(crate) row: usize,
    /// The first column, a multiple of 256.
    pub(crate) first: usize,
    /// The columns' blocks.
    pub(crate) bytes: &'a [u8],
}

/// A type whose rows can be widened to `f32`, up to 256 columns at a time.
pub(crate) trait Widen {
    /// Whether values have more bits than BF16.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        allow(dead_code, reason = "no tiles there")
    )]
    const HAS_REST: bool = true;

    /// Widens `columns` into the first values of `out`.
    fn widen(columns: &Columns<'_>, out: &mut [f32; STEP]);
}

/// IEEE single precision.
pub(crate) struct F32;
/// IEEE half precision.
pub(crate) struct F16;
/// Upper half of a single-precision number.
pub(crate) struct Bf16;
/// 8-bit floats with a scale for each block of 128 x 128.
pub(crate) struct Fp8;
/// Signed bytes.
pub(crate) struct SignedBytes;
/// Any block type, through the reference dequantiser.
pub(crate) struct Dequantized;

impl Widen for F32 {
    #[inline(always)]
    fn widen(columns: &Columns<'_>, out: &mut [f32; STEP]) {
        for (value, bytes) in out.iter_mut().zip(columns.bytes.as_chunks().0) {
            *value = f32::from_le_bytes(*bytes);
        }
    }
}

impl Widen for F16 {
    #[inline(always)]
    fn widen(columns: &Columns<'_>, out: &mut [f32; STEP]) {
        for (value, bytes) in out.iter_mut().zip(columns.bytes.as_chunks().0) {
            *value = half_to_f32(u16::from_le_bytes(*bytes));
        }
    }
}

impl Widen for Bf16 {
    const HAS_REST: bool = false;

    #[inline(always)]
    fn widen(columns: &Columns<'_>, out: &mut [f32; STEP]) {
        for (value, bytes) in out.iter_mut().zip(columns.bytes.as_chunks().0) {
            *value = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
        }
    }
}

impl Widen for Fp8 {
    #[inline(always)]
    fn widen(columns: &Columns<'_>, out: &mut [f32; STEP]) {
        debug_assert!(columns.w.scales.is_some(), "8-bit floats have scales");
        if let Some(scales) = columns.w.scales {
            scales.dequantize(columns.row, columns.first, columns.bytes, out);
        }
    }
}

impl Widen for SignedBytes {
    const HAS_REST: bool = false;

    #[inline(always)]
    fn widen(columns: &Columns<'_>, out: &mut [f32; STEP]) {
        for (value, byte) in out.iter_mut().zip(columns.bytes) {
            *value = f32::from(byte.cast_signed());
        }
    }
}

impl Widen for Dequantized {
    #[inline(always)]
    fn widen(columns: &Columns<'_>, out: &mut [f32; STEP]) {
        let (ty, bytes) = (columns.w.ty, columns.bytes);
        let len = bytes.len() / ty.block_bytes() * ty.block_len();
        let widened = dequantize_row(ty, bytes, &mut out[..len]);
        debug_assert!(widened.is_ok(), "whole blocks of {ty} can be dequantised");
    }
}

/// Widens a half-precision number, without branches so that loops over it become vector code.
///
/// No operation takes or gives a subnormal `f32`, on which CPUs stop for some 150 cycles. Subnormal halves are
/// common: the scales of most Q6_K blocks are.
#[inline(always)]
pub(crate) fn half_to_f32(half: u16) -> f32 {
    let half = u32::from(half);
    let magnitude = half & 0x7fff;
    // The exponent's bias is 15 in a half, 127 in an f32; a subnormal half counts units of 2^-24.
    let normal = (magnitude << 13) + (112 << 23);
    let subnormal = (magnitude as i32 as f32 * (1.0 / 16_777_216.0)).to_bits();
    let special = (magnitude << 13) | 0x7f80_0000;
    let value = match magnitude {
        0..0x0400 => subnormal,
        0x0400..0x7c00 => normal,
        _ => special,
    };
    f32::from_bits(value | (half & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use super::half_to_f32;

    #[test]
    fn every_half_is_widened_to_its_value() {
        for half in 0..=u16::MAX {
            let (exponent, mantissa) = (i32::from(half >> 10 & 31), f64::from(half & 1023));
            let magnitude = match exponent {
                0 => mantissa * 2f64.powi(-24),
                31 if mantissa == 0.0 => f64::INFINITY,
                31 => f64::NAN,
                _ => (1024.0 + mantissa) * 2f64.powi(exponent - 25),
            };
            let expected = if half >> 15 == 1 {
                -magnitude
            } else {
                magnitude
            };
            let found = f64::from(half_to_f32(half));
            assert!(
                found == expected || found.is_nan() && expected.is_nan(),
                "{half:#06x}: {found} and {expected}"
            );
            assert_eq!(found.is_sign_negative(), half >> 15 == 1, "{half:#06x}");
        }
    }
}
