//! Layouts of the quantised blocks, as they lie in files.
//!
//! Every struct is made of bytes only (numbers of several bytes are wrapped in [`F16`], [`U16`], [`U32`],
//! [`F32`]), so it has alignment 1 and no padding: a tensor's bytes can be viewed as blocks wherever they start,
//! with [`cast`] or `bytemuck`.

use bytemuck::{Pod, Zeroable};

use crate::GgmlType;

/// Elements of a super-block of the K and IQ types.
pub const QK_K: usize = 256;

macro_rules! little_endian {
    ($($(#[$doc:meta])* $name:ident, $bytes:literal;)*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Pod, Zeroable)]
            #[repr(transparent)]
            pub struct $name(pub [u8; $bytes]);
        )*
    };
}

little_endian! {
    /// A half-precision float, little-endian, alignment 1.
    F16, 2;
    /// An unsigned 16-bit integer, little-endian, alignment 1.
    U16, 2;
    /// A signed 16-bit integer, little-endian, alignment 1.
    I16, 2;
    /// An unsigned 32-bit integer, little-endian, alignment 1.
    U32, 4;
    /// A single-precision float, little-endian, alignment 1.
    F32, 4;
}

impl F16 {
    /// The number in single precision.
    #[inline]
    pub fn to_f32(self) -> f32 {
        half::f16::from_le_bytes(self.0).to_f32()
    }

    /// The half-precision number nearest to `value`.
    #[inline]
    pub fn from_f32(value: f32) -> Self {
        Self(half::f16::from_f32(value).to_le_bytes())
    }

    /// The 16 bits.
    #[inline]
    pub const fn to_bits(self) -> u16 {
        u16::from_le_bytes(self.0)
    }
}

impl U16 {
    /// The number.
    #[inline]
    pub const fn get(self) -> u16 {
        u16::from_le_bytes(self.0)
    }
}

impl I16 {
    /// The number.
    #[inline]
    pub const fn get(self) -> i16 {
        i16::from_le_bytes(self.0)
    }
}

impl U32 {
    /// The number.
    #[inline]
    pub const fn get(self) -> u32 {
        u32::from_le_bytes(self.0)
    }
}

impl F32 {
    /// The number.
    #[inline]
    pub const fn get(self) -> f32 {
        f32::from_le_bytes(self.0)
    }
}

/// A quantised block of a row.
pub trait Block: Pod {
    /// The type whose block this is.
    const TYPE: GgmlType;

    /// Writes the block's elements, exactly as the Python package `gguf` computes them.
    ///
    /// # Panics
    /// When `out` does not have [`GgmlType::block_len`] elements.
    fn dequantize(&self, out: &mut [f32]);
}

/// Views a tensor's bytes as blocks; `None` when they are not a whole number of blocks.
pub fn cast<B: Block>(bytes: &[u8]) -> Option<&[B]> {
    bytemuck::try_cast_slice(bytes).ok()
}

/// Views blocks as bytes.
pub fn as_bytes<B: Block>(blocks: &[B]) -> &[u8] {
    bytemuck::cast_slice(blocks)
}

macro_rules! blocks {
    ($($(#[$doc:meta])* $name:ident: $ty:ident { $($(#[$field_doc:meta])* $field:ident: $field_ty:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Copy, Debug, Pod, Zeroable)]
            #[repr(C)]
            pub struct $name {
                $($(#[$field_doc])* pub $field: $field_ty,)*
            }

            const _: () = assert!(size_of::<$name>() == GgmlType::$ty.block_bytes() && align_of::<$name>() == 1);
        )*
    };
}

blocks! {
    /// Q4_0: `d * (q - 8)`.
    BlockQ4_0: Q4_0 {
        /// Scale.
        d: F16,
        /// Elements 0-15 in the low, 16-31 in the high four bits.
        qs: [u8; 16],
    }
    /// Q4_1: `d * q + m`.
    BlockQ4_1: Q4_1 {
        /// Scale.
        d: F16,
        /// Minimum.
        m: F16,
        /// Elements 0-15 in the low, 16-31 in the high four bits.
        qs: [u8; 16],
    }
    /// Q5_0: `d * (q - 16)`.
    BlockQ5_0: Q5_0 {
        /// Scale.
        d: F16,
        /// Bit `i` is the fifth bit of element `i`.
        qh: U32,
        /// Lower four bits: elements 0-15 in the low, 16-31 in the high half.
        qs: [u8; 16],
    }
    /// Q5_1: `d * q + m`.
    BlockQ5_1: Q5_1 {
        /// Scale.
        d: F16,
        /// Minimum.
        m: F16,
        /// Bit `i` is the fifth bit of element `i`.
        qh: U32,
        /// Lower four bits: elements 0-15 in the low, 16-31 in the high half.
        qs: [u8; 16],
    }
    /// Q8_0: `d * q`.
    BlockQ8_0: Q8_0 {
        /// Scale.
        d: F16,
        /// Elements.
        qs: [i8; 32],
    }
    /// Q8_1: `d * q`, with the sum of the elements.
    BlockQ8_1: Q8_1 {
        /// Scale.
        d: F16,
        /// `d` times the sum of `qs`.
        s: F16,
        /// Elements.
        qs: [i8; 32],
    }
    /// Q2_K: `d * scale * q - dmin * min` in 16 sub-blocks of 16.
    BlockQ2K: Q2_K {
        /// Per sub-block: scale in the low, minimum in the high four bits.
        scales: [u8; 16],
        /// Element `128 h + 32 s + i` is bits `2 s` and up of byte `32 h + i`.
        qs: [u8; 64],
        /// Scale of the scales.
        d: F16,
        /// Scale of the minimums.
        dmin: F16,
    }
    /// Q3_K: `d * (scale - 32) * (q - 4)` in 16 sub-blocks of 16.
    BlockQ3K: Q3_K {
        /// Bit `i / 32` of byte `i % 32` is the third bit of element `i`.
        hmask: [u8; 32],
        /// Lower two bits, placed as in [`BlockQ2K`].
        qs: [u8; 64],
        /// Sixteen scales of six bits; see [`BlockQ3K::unpack_scales`].
        scales: [u8; 12],
        /// Scale of the scales.
        d: F16,
    }
    /// Q4_K: `d * scale * q - dmin * min` in 8 sub-blocks of 32.
    BlockQ4K: Q4_K {
        /// Scale of the scales.
        d: F16,
        /// Scale of the minimums.
        dmin: F16,
        /// Eight scales and minimums of six bits; see [`unpack_scales_mins`].
        scales: [u8; 12],
        /// Sub-blocks `2 k` (low) and `2 k + 1` (high four bits) share bytes `32 k` and up.
        qs: [u8; 128],
    }
    /// Q5_K: `d * scale * q - dmin * min` in 8 sub-blocks of 32.
    BlockQ5K: Q5_K {
        /// Scale of the scales.
        d: F16,
        /// Scale of the minimums.
        dmin: F16,
        /// Eight scales and minimums of six bits; see [`unpack_scales_mins`].
        scales: [u8; 12],
        /// Bit `k` of byte `i` is the fifth bit of element `i` of sub-block `k`.
        qh: [u8; 32],
        /// Lower four bits, placed as in [`BlockQ4K`].
        qs: [u8; 128],
    }
    /// Q6_K: `d * scale * (q - 32)` in 16 sub-blocks of 16.
    BlockQ6K: Q6_K {
        /// Lower four bits: element `128 h + 64 s + i` in half `s` of byte `64 h + i`.
        ql: [u8; 128],
        /// Upper two bits, placed as in [`BlockQ2K`].
        qh: [u8; 64],
        /// Scales.
        scales: [i8; 16],
        /// Scale of the scales.
        d: F16,
    }
    /// Q8_K: `d * q`, with sums of 16.
    BlockQ8K: Q8_K {
        /// Scale.
        d: F32,
        /// Elements.
        qs: [i8; 256],
        /// Sums of 16 elements each.
        bsums: [I16; 16],
    }
    /// IQ2_XXS: eight groups of 32.
    BlockIQ2XXS: IQ2_XXS {
        /// Scale.
        d: F16,
        /// Per group two words of 32 bits: four indices into the code book; four sign patterns of 7 bits and the
        /// group's scale in the top four bits.
        qs: [[U32; 2]; 8],
    }
    /// IQ2_XS: 32 groups of 8.
    BlockIQ2XS: IQ2_XS {
        /// Scale.
        d: F16,
        /// Per group: index into the code book (9 bits), sign pattern (7 bits).
        qs: [U16; 32],
        /// Four bits for every two groups.
        scales: [u8; 8],
    }
    /// IQ2_S: 32 groups of 8.
    BlockIQ2S: IQ2_S {
        /// Scale.
        d: F16,
        /// Lower eight bits of the index into the code book.
        qs: [u8; 32],
        /// One sign bit per element.
        signs: [u8; 32],
        /// Upper two bits of the index.
        qh: [u8; 8],
        /// Four bits for every two groups.
        scales: [u8; 8],
    }
    /// IQ3_XXS: 64 groups of 4.
    BlockIQ3XXS: IQ3_XXS {
        /// Scale.
        d: F16,
        /// Index into the code book.
        qs: [u8; 64],
        /// Per 32 elements: four sign patterns of 7 bits and a scale in the top four bits.
        signs_scales: [U32; 8],
    }
    /// IQ3_S: 64 groups of 4.
    BlockIQ3S: IQ3_S {
        /// Scale.
        d: F16,
        /// Lower eight bits of the index into the code book.
        qs: [u8; 64],
        /// Ninth bit of the index.
        qh: [u8; 8],
        /// One sign bit per element.
        signs: [u8; 32],
        /// Four bits for every 32 elements.
        scales: [u8; 4],
    }
    /// IQ1_S: 32 groups of 8.
    BlockIQ1S: IQ1_S {
        /// Scale.
        d: F16,
        /// Lower eight bits of the index into the code book.
        qs: [u8; 32],
        /// Per 32 elements: upper three bits of four indices, scale of three bits, sign of the offset.
        qh: [U16; 8],
    }
    /// IQ1_M: 32 groups of 8.
    BlockIQ1M: IQ1_M {
        /// Lower eight bits of the index into the code book.
        qs: [u8; 32],
        /// Per group four bits: upper three bits of the index, sign of the offset.
        qh: [u8; 16],
        /// Three bits for every 16 elements, and four bits of the block's scale in the top of each word; see
        /// [`BlockIQ1M::scale`].
        scales: [U16; 4],
    }
    /// IQ4_NL: `d * IQ4NL_VALUES[q]`.
    BlockIQ4NL: IQ4_NL {
        /// Scale.
        d: F16,
        /// Elements 0-15 in the low, 16-31 in the high four bits.
        qs: [u8; 16],
    }
    /// IQ4_XS: `d * (scale - 32) * IQ4NL_VALUES[q]` in 8 sub-blocks of 32.
    BlockIQ4XS: IQ4_XS {
        /// Scale of the scales.
        d: F16,
        /// Upper two bits of the scales.
        scales_h: U16,
        /// Lower four bits of the scales.
        scales_l: [u8; 4],
        /// Per sub-block 16 bytes, laid out as in [`BlockIQ4NL`].
        qs: [u8; 128],
    }
    /// TQ1_0: `d * (q - 1)`, ternary.
    BlockTQ1_0: TQ1_0 {
        /// Five elements per byte: 32 bytes for elements 0-159, 16 bytes for 160-239.
        qs: [u8; 48],
        /// Four elements per byte, elements 240-255.
        qh: [u8; 4],
        /// Scale.
        d: F16,
    }
    /// TQ2_0: `d * (q - 1)`.
    BlockTQ2_0: TQ2_0 {
        /// Placed as in [`BlockQ2K`].
        qs: [u8; 64],
        /// Scale.
        d: F16,
    }
    /// MXFP4: `scale * MXFP4_VALUES[q]`.
    BlockMXFP4: MXFP4 {
        /// Exponent of the scale; see [`BlockMXFP4::scale`].
        e: u8,
        /// Elements 0-15 in the low, 16-31 in the high four bits.
        qs: [u8; 16],
    }
}

/// The eight scales and eight minimums of Q4_K and Q5_K, six bits each.
#[inline]
pub fn unpack_scales_mins(packed: &[u8; 12]) -> ([u8; 8], [u8; 8]) {
    let (mut scales, mut mins) = ([0; 8], [0; 8]);
    for index in 0..4 {
        let (low_scale, low_min, high) = (packed[index], packed[index + 4], packed[index + 8]);
        scales[index] = low_scale & 63;
        mins[index] = low_min & 63;
        scales[index + 4] = high & 15 | low_scale >> 2 & 48;
        mins[index + 4] = high >> 4 | low_min >> 2 & 48;
    }
    (scales, mins)
}

/// Inverse of [`unpack_scales_mins`]; scales and minimums are from 0 to 63.
pub fn pack_scales_mins(scales: &[u8; 8], mins: &[u8; 8]) -> [u8; 12] {
    let mut packed = [0; 12];
    for index in 0..4 {
        packed[index] = scales[index] & 63 | (scales[index + 4] & 48) << 2;
        packed[index + 4] = mins[index] & 63 | (mins[index + 4] & 48) << 2;
        packed[index + 8] = scales[index + 4] & 15 | mins[index + 4] << 4;
    }
    packed
}

impl BlockQ3K {
    /// The sixteen scales, with their offset of 32 taken off.
    #[inline]
    pub fn unpack_scales(&self) -> [i8; 16] {
        std::array::from_fn(|index| {
            let low = self.scales[index % 8] >> (4 * (index / 8)) & 15;
            let high = self.scales[8 + index % 4] >> (2 * (index / 4)) & 3;
            (low | high << 4) as i8 - 32
        })
    }
}

impl BlockIQ4XS {
    /// The eight scales, with their offset of 32 taken off.
    #[inline]
    pub fn unpack_scales(&self) -> [i8; 8] {
        std::array::from_fn(|index| {
            let low = self.scales_l[index / 2] >> (4 * (index % 2)) & 15;
            let high = (self.scales_h.get() >> (2 * index)) as u8 & 3;
            (low | high << 4) as i8 - 32
        })
    }
}

impl BlockIQ1M {
    /// The block's scale, collected from the four words of `scales`.
    #[inline]
    pub fn scale(&self) -> f32 {
        let [a, b, c, d] = self.scales.map(U16::get);
        let bits = a >> 12 | b >> 8 & 0x00f0 | c >> 4 & 0x0f00 | d & 0xf000;
        F16(bits.to_le_bytes()).to_f32()
    }
}

impl BlockMXFP4 {
    /// The scale that goes with the doubled levels of [`crate::tables::MXFP4_VALUES`]: `2^(e - 128)`.
    #[inline]
    pub fn scale(&self) -> f32 {
        // The two smallest scales are subnormal numbers.
        let bits = if self.e < 2 {
            0x0020_0000 << self.e
        } else {
            (u32::from(self.e) - 1) << 23
        };
        f32::from_bits(bits)
    }
}
