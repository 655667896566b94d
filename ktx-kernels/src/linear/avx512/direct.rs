//! Products of few tokens with the most common block types, in registers from the file's bytes on. Through a
//! [`Step`](super::super::isa::Step) in the cache they take half as long again, and then the arithmetic of a core is
//! slower than its memory.

use std::arch::x86_64::*;

use super::super::isa::TokenCodes;
use super::super::unpack::six_bits;
use super::{SCALE_LANES_16, Sums, TWICE};

/// Which lane's scale each lane of a product takes: eight times one, eight times another.
const fn two_lanes(first: i32, second: i32) -> [i32; 16] {
    let mut lanes = [first; 16];
    let mut lane = 8;
    while lane < 16 {
        lanes[lane] = second;
        lane += 1;
    }
    lanes
}

/// Codes of Q4_K lie in pairs of sub-blocks: one in the lower nibbles of 32 bytes, one in the upper ones.
const PAIR_LANES: [[i32; 16]; 4] = [
    two_lanes(0, 2),
    two_lanes(1, 3),
    two_lanes(4, 6),
    two_lanes(5, 7),
];

#[inline(always)]
unsafe fn lanes(of: &[i32; 16]) -> __m512i {
    // SAFETY: 16 lanes are loaded; the caller has enabled AVX-512 F.
    unsafe { _mm512_loadu_si512(of.as_ptr().cast()) }
}

/// `sum + scale * (codes · x)`, with the scale that `scale_lanes` picks for each four columns.
#[inline(always)]
unsafe fn add_dot(
    codes: __m512i,
    x: __m512i,
    scales: __m512,
    scale_lanes: __m512i,
    sum: __m512,
) -> __m512 {
    // SAFETY: register operations of AVX-512 F and VNNI, which the caller has enabled.
    unsafe {
        let dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, x);
        let scale = _mm512_permutexvar_ps(scale_lanes, scales);
        _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, sum)
    }
}

/// Adds the products of one Q4_K block with each token to `sums`.
///
/// # Safety
/// The CPU has AVX-512 with VNNI, and tokens have 256 columns.
#[inline(always)]
pub(super) unsafe fn q4_k<const TOKENS: usize>(
    block: &[u8; 144],
    tokens: &[TokenCodes; TOKENS],
    sums: &mut [Sums; TOKENS],
) {
    let Some((head, _)) = block.split_first_chunk() else {
        unreachable!("a block has a head")
    };
    // SAFETY: by the caller's promise; loads are of the block's 128 bytes of codes, and of the tokens' 256 columns.
    unsafe {
        let [scales, minimums] = six_bits(head);
        let bytes = _mm_set_epi64x(minimums.cast_signed(), scales.cast_signed());
        let bytes = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
        let halves = u32::from_le_bytes([block[0], block[1], block[2], block[3]]);
        // Eight times `d`, then eight times `dmin`.
        let factors = _mm_set1_epi32(halves.cast_signed());
        let factors = _mm_cvtph_ps(factors);
        let factors =
            _mm512_permutexvar_ps(lanes(&two_lanes(0, 1)), _mm512_castps128_ps512(factors));
        let factors = _mm512_mul_ps(bytes, factors);

        let nibbles = _mm512_set1_epi8(15);
        let mut codes = [_mm512_setzero_si512(); 4];
        for half in 0..2 {
            let packed = _mm512_loadu_si512(block.as_ptr().add(16 + half * 64).cast());
            codes[2 * half] = _mm512_and_si512(packed, nibbles);
            codes[2 * half + 1] = _mm512_and_si512(_mm512_srli_epi16::<4>(packed), nibbles);
        }
        for token in 0..TOKENS {
            let x = tokens[token];
            let of_token = _mm512_castps256_ps512(_mm256_loadu_ps(x.scales));
            let of_token = _mm512_insertf32x8::<1>(of_token, _mm256_loadu_ps(x.sums));
            let scales = _mm512_mul_ps(factors, of_token);
            let Sums(mut even, mut odd) = sums[token];
            // The upper half is the minimums times what the token's columns add up to.
            odd = _mm512_mask_sub_ps(odd, 0xff00, odd, scales);
            for half in 0..2 {
                let first = _mm512_loadu_si512(x.codes.add(half * 128).cast());
                let second = _mm512_loadu_si512(x.codes.add(half * 128 + 64).cast());
                let low = _mm512_shuffle_i64x2::<0x44>(first, second);
                let high = _mm512_shuffle_i64x2::<0xee>(first, second);
                even = add_dot(
                    codes[2 * half],
                    low,
                    scales,
                    lanes(&PAIR_LANES[2 * half]),
                    even,
                );
                odd = add_dot(
                    codes[2 * half + 1],
                    high,
                    scales,
                    lanes(&PAIR_LANES[2 * half + 1]),
                    odd,
                );
            }
            sums[token] = Sums(even, odd);
        }
    }
}

/// Adds the products of one Q6_K block with each token to `sums`.
///
/// # Safety
/// As [`q4_k`].
#[inline(always)]
pub(super) unsafe fn q6_k<const TOKENS: usize>(
    block: &[u8; 210],
    tokens: &[TokenCodes; TOKENS],
    sums: &mut [Sums; TOKENS],
) {
    // SAFETY: by the caller's promise; loads are of the block's 192 bytes of codes and 16 of scales, and of the
    // tokens' 256 columns.
    unsafe {
        let at = block.as_ptr();
        let quantized = _mm512_cvtepi8_epi32(_mm_loadu_si128(at.add(192).cast()));
        let d = i16::from_le_bytes([block[208], block[209]]);
        let d = _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_set1_epi16(d)));
        let factors = _mm512_mul_ps(_mm512_cvtepi32_ps(quantized), d);
        let offsets = _mm512_mul_ps(factors, _mm512_set1_ps(-32.0));

        let (low, upper) = (_mm512_set1_epi8(0x0f), _mm512_set1_epi8(0x30));
        // The first and the second 32 columns of 64 have their upper bits at different places.
        let left = _mm512_inserti64x4::<1>(_mm512_set1_epi16(4), _mm256_set1_epi16(2));
        let right = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi16(2));
        let mut codes = [_mm512_setzero_si512(); 4];
        for half in 0..2 {
            let packed = _mm512_loadu_si512(at.add(half * 64).cast());
            let bits = _mm512_broadcast_i64x4(_mm256_loadu_si256(at.add(128 + half * 32).cast()));
            // `a & b | c`.
            codes[2 * half] = _mm512_ternarylogic_epi32::<0xea>(
                _mm512_sllv_epi16(bits, left),
                upper,
                _mm512_and_si512(packed, low),
            );
            codes[2 * half + 1] = _mm512_ternarylogic_epi32::<0xea>(
                _mm512_srlv_epi16(bits, right),
                upper,
                _mm512_and_si512(_mm512_srli_epi16::<4>(packed), low),
            );
        }
        for token in 0..TOKENS {
            let x = tokens[token];
            let token_scales = _mm512_castps256_ps512(_mm256_loadu_ps(x.scales));
            let token_scales = _mm512_permutexvar_ps(lanes(&TWICE), token_scales);
            let scales = _mm512_mul_ps(factors, token_scales);
            let Sums(mut even, mut odd) = sums[token];
            odd = _mm512_fmadd_ps(offsets, _mm512_loadu_ps(x.sums), odd);
            for half in 0..2 {
                let part = |part: usize| _mm512_loadu_si512(x.codes.add(part * 64).cast());
                let (a, b) = (2 * half, 2 * half + 1);
                even = add_dot(codes[a], part(a), scales, lanes(&SCALE_LANES_16[a]), even);
                odd = add_dot(codes[b], part(b), scales, lanes(&SCALE_LANES_16[b]), odd);
            }
            sums[token] = Sums(even, odd);
        }
    }
}
