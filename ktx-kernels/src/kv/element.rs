//! How a cache stores its values: single or half precision, or blocks of 8-bit numbers.
//!
//! Rows of [`KvType::Q8_0`] are numerically those of GGUF's type: 32 values share a half-precision scale, and
//! each is a signed byte times it. In memory the bytes of some rows lie in one piece and their scales in another
//! behind it, `[rows, width]` and `[rows, width / 32]`, so that both are read in whole vectors.

use bytemuck::{cast_slice, cast_slice_mut};
use half::f16;
use half::slice::HalfFloatSliceExt;

/// Values that share a scale in [`KvType::Q8_0`].
pub const Q8_BLOCK: usize = 32;
/// Bytes of the values and the scale of a block.
const Q8_BLOCK_BYTES: usize = Q8_BLOCK + size_of::<f16>();
/// Largest of the signed bytes.
const Q8_LARGEST: f32 = 127.0;

/// Element type of the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum KvType {
    /// IEEE half precision: 2 bytes an element.
    F16,
    /// Single precision: 4 bytes an element, nothing is rounded.
    F32,
    /// Blocks of 32 signed bytes with a half-precision scale: 34 bytes for 32 elements.
    Q8_0,
}

impl KvType {
    /// The name of the type, as options give it and kernels carry it.
    pub const fn name(self) -> &'static str {
        match self {
            KvType::F16 => "f16",
            KvType::F32 => "f32",
            KvType::Q8_0 => "q8_0",
        }
    }

    /// Elements that are stored together: widths of rows and heads are multiples of it.
    pub fn block(self) -> usize {
        match self {
            KvType::F16 | KvType::F32 => 1,
            KvType::Q8_0 => Q8_BLOCK,
        }
    }

    /// Bytes of `elements`, whole blocks; `None` if that exceeds the address space.
    pub fn checked_bytes(self, elements: usize) -> Option<usize> {
        match self {
            KvType::F16 => elements.checked_mul(size_of::<f16>()),
            KvType::F32 => elements.checked_mul(size_of::<f32>()),
            KvType::Q8_0 => elements.div_ceil(Q8_BLOCK).checked_mul(Q8_BLOCK_BYTES),
        }
    }

    /// Bytes of `elements`, whole blocks; the largest number there is if they exceed the address space.
    pub fn bytes(self, elements: usize) -> usize {
        self.checked_bytes(elements).unwrap_or(usize::MAX)
    }
}

/// Cache elements in one of the stored types, borrowed.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum KvSlice<'a> {
    /// Half precision.
    F16(&'a [f16]),
    /// Single precision.
    F32(&'a [f32]),
    /// Signed bytes and the scales of each [`Q8_BLOCK`] of them.
    Q8_0 {
        /// The bytes.
        quants: &'a [i8],
        /// The scales.
        scales: &'a [f16],
    },
}

impl<'a> KvSlice<'a> {
    /// Rows of `width` as they lie in memory.
    pub(super) fn of_bytes(kv_type: KvType, bytes: &'a [u8], elements: usize) -> Self {
        match kv_type {
            KvType::F16 => KvSlice::F16(cast_slice(bytes)),
            KvType::F32 => KvSlice::F32(cast_slice(bytes)),
            KvType::Q8_0 => {
                let (quants, scales) = bytes.split_at(elements);
                KvSlice::Q8_0 {
                    quants: cast_slice(quants),
                    scales: cast_slice(scales),
                }
            }
        }
    }

    /// Elements in the slice.
    pub fn len(&self) -> usize {
        match self {
            KvSlice::F16(x) => x.len(),
            KvSlice::F32(x) => x.len(),
            KvSlice::Q8_0 { quants, .. } => quants.len(),
        }
    }

    /// Whether the slice is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements from `start` on, a multiple of [`KvType::block`].
    ///
    /// # Panics
    /// If `start` is beyond the end or inside a block.
    pub fn skip(self, start: usize) -> KvSlice<'a> {
        match self {
            KvSlice::F16(x) => KvSlice::F16(&x[start..]),
            KvSlice::F32(x) => KvSlice::F32(&x[start..]),
            KvSlice::Q8_0 { quants, scales } => KvSlice::Q8_0 {
                quants: &quants[start..],
                scales: &scales[blocks(start)..],
            },
        }
    }

    /// The first `count` elements, a multiple of [`KvType::block`].
    ///
    /// # Panics
    /// If there are fewer, or `count` is inside a block.
    pub fn take(self, count: usize) -> KvSlice<'a> {
        match self {
            KvSlice::F16(x) => KvSlice::F16(&x[..count]),
            KvSlice::F32(x) => KvSlice::F32(&x[..count]),
            KvSlice::Q8_0 { quants, scales } => KvSlice::Q8_0 {
                quants: &quants[..count],
                scales: &scales[..blocks(count)],
            },
        }
    }

    /// Converts to single precision.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn to_f32(self, out: &mut [f32]) {
        match self {
            KvSlice::F16(x) => x.convert_to_f32_slice(out),
            KvSlice::F32(x) => out.copy_from_slice(x),
            KvSlice::Q8_0 { quants, scales } => {
                assert_eq!(out.len(), quants.len(), "elements to convert");
                let blocks = quants.chunks_exact(Q8_BLOCK).zip(scales);
                for (out, (quants, scale)) in out.chunks_exact_mut(Q8_BLOCK).zip(blocks) {
                    let scale = scale.to_f32();
                    let values = quants.iter().map(|&q| f32::from(q) * scale);
                    out.iter_mut().zip(values).for_each(|(o, x)| *o = x);
                }
            }
        }
    }
}

fn blocks(elements: usize) -> usize {
    assert!(
        elements.is_multiple_of(Q8_BLOCK),
        "element {elements} of a Q8_0 cache is inside a block of {Q8_BLOCK}"
    );
    elements / Q8_BLOCK
}

/// Rounds a row into `rows`, the bytes of rows of its width, from element `start` on.
pub(super) fn write_row(
    kv_type: KvType,
    rows: &mut [u8],
    elements: usize,
    start: usize,
    x: &[f32],
) {
    let end = start + x.len();
    match kv_type {
        KvType::F16 => cast_slice_mut::<u8, f16>(rows)[start..end].convert_from_f32_slice(x),
        KvType::F32 => cast_slice_mut::<u8, f32>(rows)[start..end].copy_from_slice(x),
        KvType::Q8_0 => {
            let (quants, scales) = rows.split_at_mut(elements);
            let quants: &mut [i8] = &mut cast_slice_mut(quants)[start..end];
            let scales: &mut [f16] = &mut cast_slice_mut(scales)[blocks(start)..blocks(end)];
            let blocks = quants.chunks_exact_mut(Q8_BLOCK).zip(scales);
            for ((quants, scale), x) in blocks.zip(x.chunks_exact(Q8_BLOCK)) {
                *scale = quantise(x, quants);
            }
        }
    }
}

/// Rounds a block to bytes and returns their scale: the largest magnitude becomes 127, or what is nearest
/// with a scale that half precision can hold.
fn quantise(x: &[f32], quants: &mut [i8]) -> f16 {
    let largest = x.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let scale = f16::from_f32((largest / Q8_LARGEST).min(f16::MAX.to_f32()));
    let inverse = match scale == f16::ZERO {
        true => 0.0,
        false => scale.to_f32().recip(),
    };
    for (q, x) in quants.iter_mut().zip(x) {
        // A cast of what is too large gives the nearest byte; -128 is not used.
        *q = (x * inverse).round_ties_even().max(-Q8_LARGEST) as i8;
    }
    scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_rounded_by_at_most_half_a_step_of_its_scale() {
        for magnitude in [1e-3f32, 1.0, 37.5, 6e4, 1e6] {
            let x: Vec<f32> = (0..Q8_BLOCK)
                .map(|i| magnitude * ((i * 37 % 65) as f32 / 32.0 - 1.0))
                .collect();
            let mut quants = [0i8; Q8_BLOCK];
            let scale = quantise(&x, &mut quants).to_f32();
            for (x, q) in x.iter().zip(quants) {
                let error = (f32::from(q) * scale - x).abs();
                // The scale is rounded to 11 bits: the largest values may lie beyond 127 steps.
                let allowed = 0.5 * scale + magnitude * 2f32.powi(-11);
                assert!(error <= allowed, "{x} as {q} * {scale}");
            }
        }
    }

    #[test]
    fn zeros_and_what_has_no_number_make_finite_blocks() {
        let mut quants = [1i8; Q8_BLOCK];
        assert_eq!(quantise(&[0.0; Q8_BLOCK], &mut quants), f16::ZERO);
        assert_eq!(quants, [0; Q8_BLOCK]);
        let mut x = [1.0; Q8_BLOCK];
        x[3] = f32::INFINITY;
        x[4] = f32::NAN;
        assert!(quantise(&x, &mut quants).is_finite());
    }

    #[test]
    fn bytes_count_scales() {
        assert_eq!(KvType::Q8_0.bytes(576), 576 / 32 * 34);
        assert_eq!(KvType::F16.bytes(576), 1152);
        assert_eq!(KvType::F32.checked_bytes(usize::MAX), None);
        assert_eq!(KvType::Q8_0.checked_bytes(usize::MAX), None);
    }
}
