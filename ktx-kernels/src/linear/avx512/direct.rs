//! Products of few tokens with the most common block types, in registers from the file's bytes on. Through a
//! [`Step`](super::super::isa::Step) in the cache they take half as long again, and then the arithmetic of a core is
//! slower than its memory.

use std::arch::x86_64::*;

use super::super::isa::TokenCodes;
use super::super::unpack::{HalfScaled, Levels, six_bits};
use super::{Avx512, SCALE_LANES_16, SCALE_LANES_32, Sums, TWICE};

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

/// Blocks of 32 columns in a step.
const BLOCKS: usize = 8;

/// Adds the products of up to eight blocks with each token to `sums`. Few blocks cost as little as they are: rows of
/// experts often end with some.
///
/// # Safety
/// As [`q4_k`].
#[inline(always)]
pub(super) unsafe fn half_scaled<U: HalfScaled, const TOKENS: usize>(
    columns: &[u8],
    tokens: &[TokenCodes; TOKENS],
    sums: &mut [Sums; TOKENS],
) {
    let blocks = (columns.len() / U::BYTES).min(BLOCKS);
    // SAFETY: by the caller's promise.
    unsafe {
        // The loops of a whole step have a length that the compiler knows.
        match blocks {
            BLOCKS => some_half_scaled::<U, TOKENS>(columns, BLOCKS, tokens, sums),
            _ => some_half_scaled::<U, TOKENS>(columns, blocks, tokens, sums),
        }
    }
}

#[inline(always)]
unsafe fn some_half_scaled<U: HalfScaled, const TOKENS: usize>(
    columns: &[u8],
    blocks: usize,
    tokens: &[TokenCodes; TOKENS],
    sums: &mut [Sums; TOKENS],
) {
    // SAFETY: by the caller's promise; loads are of the tokens' 256 columns.
    unsafe {
        let d = halves_of::<U>(columns, blocks, 0);
        let offsets = match U::LEVELS {
            Levels::Symmetric(zero_point) => _mm256_mul_ps(d, _mm256_set1_ps(-zero_point)),
            Levels::Affine => halves_of::<U>(columns, blocks, 2),
        };
        let mut scales = [_mm512_setzero_ps(); TOKENS];
        for token in 0..TOKENS {
            let x = tokens[token];
            scales[token] = _mm512_zextps256_ps512(_mm256_mul_ps(d, _mm256_loadu_ps(x.scales)));
            let parts = _mm256_mul_ps(offsets, _mm256_loadu_ps(x.sums));
            let Sums(even, odd) = sums[token];
            sums[token] = Sums(even, _mm512_add_ps(odd, _mm512_zextps256_ps512(parts)));
        }
        for pair in 0..blocks.div_ceil(2) {
            let codes = codes_of::<U>(columns, 2 * pair);
            let codes = match 2 * pair + 1 < blocks {
                true => {
                    let second = codes_of::<U>(columns, 2 * pair + 1);
                    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(codes), second)
                }
                false => _mm512_zextsi256_si512(codes),
            };
            let lanes = lanes(&SCALE_LANES_32[pair]);
            for token in 0..TOKENS {
                let x = _mm512_loadu_si512(tokens[token].codes.add(pair * 64).cast());
                let Sums(even, odd) = &mut sums[token];
                let sum = if pair % 2 == 0 { even } else { odd };
                *sum = add_dot(codes, x, scales[token], lanes, *sum);
            }
        }
    }
}

/// The codes of block number `block`.
#[inline(always)]
unsafe fn codes_of<U: HalfScaled>(columns: &[u8], block: usize) -> __m256i {
    let mut codes = [0; 32];
    // SAFETY: by the promise of `half_scaled`'s caller; 32 codes are loaded.
    unsafe {
        U::quants::<Avx512>(&columns[block * U::BYTES..], &mut codes);
        _mm256_loadu_si256(codes.as_ptr().cast())
    }
}

/// The half-precision numbers at `at` of each block; zeros for those that are missing.
#[inline(always)]
unsafe fn halves_of<U: HalfScaled>(columns: &[u8], blocks: usize, at: usize) -> __m256 {
    let mut halves = [0i16; BLOCKS];
    for block in 0..blocks {
        let half = &columns[block * U::BYTES + at..];
        halves[block] = i16::from_le_bytes([half[0], half[1]]);
    }
    let [a, b, c, d, e, f, g, h] = halves;
    // SAFETY: register operations of AVX-512 and F16C, which the caller has enabled.
    unsafe { _mm256_cvtph_ps(_mm_setr_epi16(a, b, c, d, e, f, g, h)) }
}
