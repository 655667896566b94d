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
#[inline(always)]
pub(crate) fn half_to_f32(half: u16) -> f32 {
    let half = u32::from(half);
    let magnitude = (half & 0x7fff) << 13;
    // Moves the exponent's bias from 15 to 127; exact, subnormal numbers included.
    let finite = (f32::from_bits(magnitude) * f32::from_bits(0x7780_0000)).to_bits();
    let special = magnitude | 0x7f80_0000;
    let value = if magnitude >= 0x0f80_0000 {
        special
    } else {
        finite
    };
    f32::from_bits(value | (half & 0x8000) << 16)
}
