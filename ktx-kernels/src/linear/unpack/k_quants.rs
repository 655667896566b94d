//! Types with 256 elements to a block and quantised scales of sub-blocks.

#[cfg(target_arch = "x86_64")]
use super::super::isa::Step;
use super::super::isa::{Isa, TokenCodes};
#[cfg(target_arch = "x86_64")]
use super::super::tiles::amx::{self, TileRow};
use super::{Unpack, bytes, half_at, part_mut, u32_at};

macro_rules! k_type {
    ($(#[$doc:meta])* $name:ident, bytes $len:literal, sub $sub:literal, codes $codes:literal $(, dot $dot:ident)? $(, expand $expand:path)?) => {
        $(#[$doc])*
        #[allow(non_camel_case_types, reason = "the names of the format")]
        pub(crate) struct $name;

        impl Unpack for $name {
            const BLOCK: usize = 256;
            const BYTES: usize = $len;
            const SUB: usize = $sub;
            const CODES: usize = $codes;
            const WIDE: bool = $codes > 128;

            #[inline(always)]
            unsafe fn unpack<K: Isa>(
                block: &[u8],
                codes: &mut [u8],
                scales: &mut [f32],
                offsets: &mut [f32],
            ) {
                Self::quants(bytes(block, 0), part_mut(codes, 0));
                Self::scales(bytes(block, 0), part_mut(scales, 0), part_mut(offsets, 0));
            }

            $(#[inline(always)]
            unsafe fn dot_direct<K: Isa, const TOKENS: usize>(
                columns: &[u8],
                tokens: &[TokenCodes; TOKENS],
                sums: &mut [K::Sum; TOKENS],
            ) -> bool {
                // SAFETY: by the caller's promise.
                unsafe { K::$dot(bytes(columns, 0), tokens, sums) }
            })?

            $(#[cfg(target_arch = "x86_64")]
            #[inline(always)]
            unsafe fn expand(columns: &[u8], _: &mut Step, row: TileRow<'_>) {
                // SAFETY: by the caller's promise.
                unsafe { $expand(columns, row) }
            })?
        }
    };
}

k_type!(
    /// 2 bits; `d * scale * q - dmin * min`.
    Q2_K, bytes 84, sub 16, codes 4
);
k_type!(
    /// 3 bits; `d * scale * (q - 4)`.
    Q3_K, bytes 110, sub 16, codes 8
);
k_type!(
    /// 4 bits; `d * scale * q - dmin * min`.
    Q4_K, bytes 144, sub 32, codes 16, dot dot_q4_k, expand amx::expand_q4_k
);
k_type!(
    /// 5 bits; `d * scale * q - dmin * min`.
    Q5_K, bytes 176, sub 32, codes 32
);
k_type!(
    /// 6 bits; `d * scale * (q - 32)`.
    Q6_K, bytes 210, sub 16, codes 64, dot dot_q6_k
);
k_type!(
    /// 8 bits, signed; `d * q`.
    Q8_K, bytes 292, sub 32, codes 256
);

impl Q2_K {
    #[inline(always)]
    fn quants(block: &[u8; 84], codes: &mut [u8; 256]) {
        for half in 0..2 {
            let packed = bytes::<32>(block, 16 + half * 32);
            for quarter in 0..4 {
                let codes = part_mut::<_, 32>(codes, half * 128 + quarter * 32);
                for index in 0..32 {
                    codes[index] = (packed[index] >> (2 * quarter)) & 3;
                }
            }
        }
    }

    #[inline(always)]
    fn scales(block: &[u8; 84], scales: &mut [f32; 16], offsets: &mut [f32; 16]) {
        let (d, dmin) = (half_at(block, 80), half_at(block, 82));
        for index in 0..16 {
            scales[index] = d * f32::from(block[index] & 15);
            offsets[index] = -dmin * f32::from(block[index] >> 4);
        }
    }
}

impl Q3_K {
    #[inline(always)]
    fn quants(block: &[u8; 110], codes: &mut [u8; 256]) {
        let high = bytes::<32>(block, 0);
        for half in 0..2 {
            let packed = bytes::<32>(block, 32 + half * 32);
            for quarter in 0..4 {
                let codes = part_mut::<_, 32>(codes, half * 128 + quarter * 32);
                for index in 0..32 {
                    let third = (high[index] >> (half * 4 + quarter)) & 1;
                    codes[index] = (packed[index] >> (2 * quarter)) & 3 | third << 2;
                }
            }
        }
    }

    #[inline(always)]
    fn scales(block: &[u8; 110], scales: &mut [f32; 16], offsets: &mut [f32; 16]) {
        let low = u64::from_le_bytes(*bytes(block, 96));
        let high = u64::from(u32_at(block, 104));
        let high = high | high << 30;
        let packed = [
            low & LOW_NIBBLES | (high & LOW_PAIRS) << 4,
            (low >> 4) & LOW_NIBBLES | ((high >> 4) & LOW_PAIRS) << 4,
        ];
        let packed = (u128::from(packed[0]) | u128::from(packed[1]) << 64).to_le_bytes();
        let d = half_at(block, 108);
        for index in 0..16 {
            scales[index] = d * (f32::from(packed[index]) - 32.0);
            offsets[index] = -4.0 * scales[index];
        }
    }
}

impl Q4_K {
    #[inline(always)]
    fn quants(block: &[u8; 144], codes: &mut [u8; 256]) {
        for pair in 0..4 {
            let packed = bytes::<32>(block, 16 + pair * 32);
            let codes = part_mut::<_, 64>(codes, pair * 64);
            for index in 0..32 {
                codes[index] = packed[index] & 15;
                codes[index + 32] = packed[index] >> 4;
            }
        }
    }

    #[inline(always)]
    fn scales(block: &[u8; 144], scales: &mut [f32; 8], offsets: &mut [f32; 8]) {
        six_bit_scales(bytes(block, 0), scales, offsets);
    }
}

impl Q5_K {
    #[inline(always)]
    fn quants(block: &[u8; 176], codes: &mut [u8; 256]) {
        let high = bytes::<32>(block, 16);
        for pair in 0..4 {
            let packed = bytes::<32>(block, 48 + pair * 32);
            let codes = part_mut::<_, 64>(codes, pair * 64);
            for index in 0..32 {
                let fifth = high[index] >> (2 * pair);
                codes[index] = packed[index] & 15 | (fifth & 1) << 4;
                codes[index + 32] = packed[index] >> 4 | (fifth & 2) << 3;
            }
        }
    }

    #[inline(always)]
    fn scales(block: &[u8; 176], scales: &mut [f32; 8], offsets: &mut [f32; 8]) {
        six_bit_scales(bytes(block, 0), scales, offsets);
    }
}

/// The head of Q4_K and Q5_K blocks: `d`, `dmin`, then eight 6-bit scales and eight 6-bit
/// minimums in 12 bytes.
#[inline(always)]
fn six_bit_scales(head: &[u8; 16], scales: &mut [f32; 8], offsets: &mut [f32; 8]) {
    let (d, dmin) = (half_at(head, 0), half_at(head, 2));
    let [packed_scales, packed_minimums] = six_bits(head).map(u64::to_le_bytes);
    for index in 0..8 {
        scales[index] = d * f32::from(packed_scales[index]);
        offsets[index] = -dmin * f32::from(packed_minimums[index]);
    }
}

/// The scales and the minimums of such a head, as bytes.
#[inline(always)]
pub(crate) fn six_bits(head: &[u8; 16]) -> [u64; 2] {
    let low = u64::from_le_bytes(*bytes(head, 4));
    let high = u64::from(u32_at(head, 12));
    // Lower halves are scales, upper halves minimums; the first four of each, then the others.
    let first = low & SIX_BITS;
    let others = (high | high << 28) & LOW_NIBBLES | ((low >> 6) & LOW_PAIRS) << 4;
    [
        first & LOWER_HALF | others << 32,
        first >> 32 | others & !LOWER_HALF,
    ]
}

/// The lower nibble of each byte.
const LOW_NIBBLES: u64 = 0x0f0f_0f0f_0f0f_0f0f;
/// The lower two bits of each byte.
const LOW_PAIRS: u64 = 0x0303_0303_0303_0303;
/// The lower six bits of each byte.
const SIX_BITS: u64 = 0x3f3f_3f3f_3f3f_3f3f;
const LOWER_HALF: u64 = 0xffff_ffff;

impl Q6_K {
    #[inline(always)]
    fn quants(block: &[u8; 210], codes: &mut [u8; 256]) {
        for half in 0..2 {
            let low = bytes::<64>(block, half * 64);
            let high = bytes::<32>(block, 128 + half * 32);
            let codes = part_mut::<_, 128>(codes, half * 128);
            for index in 0..32 {
                codes[index] = low[index] & 15 | (high[index] & 3) << 4;
                codes[index + 32] = low[index + 32] & 15 | (high[index] >> 2 & 3) << 4;
                codes[index + 64] = low[index] >> 4 | (high[index] >> 4 & 3) << 4;
                codes[index + 96] = low[index + 32] >> 4 | (high[index] >> 6) << 4;
            }
        }
    }

    #[inline(always)]
    fn scales(block: &[u8; 210], scales: &mut [f32; 16], offsets: &mut [f32; 16]) {
        let d = half_at(block, 208);
        let quantized = bytes::<16>(block, 192);
        for index in 0..16 {
            scales[index] = d * f32::from(quantized[index].cast_signed());
            offsets[index] = -32.0 * scales[index];
        }
    }
}

impl Q8_K {
    #[inline(always)]
    fn quants(block: &[u8; 292], codes: &mut [u8; 256]) {
        let quants = bytes::<256>(block, 4);
        for index in 0..256 {
            codes[index] = quants[index] ^ 0x80;
        }
    }

    #[inline(always)]
    fn scales(block: &[u8; 292], scales: &mut [f32; 8], offsets: &mut [f32; 8]) {
        let d = f32::from_bits(u32_at(block, 0));
        *scales = [d; 8];
        *offsets = [-128.0 * d; 8];
    }
}
