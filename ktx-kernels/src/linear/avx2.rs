//! Kernels for AVX2 with FMA and F16C. A panel is two halves of eight rows, the eight lanes of a
//! register. Without VNNI a product of bytes takes `vpmaddubsw`, whose 16-bit sums of two would
//! overflow for codes above 127: such codes are made signed first, and their sign is moved to the
//! token's codes.

use std::arch::x86_64::*;

use super::activations::{self, QuantizedRow};
use super::dispatch::Span;
use super::float::Widen;
use super::isa::{CodePanel, Isa, STEP, Step, TokenCodes};
use super::scratch::Scratch;
use super::unpack::Unpack;
use super::{CHUNK_COLS, PANEL_ROWS, float_kernels, int8_kernels};

/// AVX2 with FMA and F16C.
pub(crate) struct Avx2;

/// Rows of half a panel.
const LANES: usize = 8;
/// Bytes of half a panel.
const HALF: usize = LANES * CHUNK_COLS;

#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn code_rows<U: Unpack>(span: &Span<'_>, out: *mut f32, stride: usize) {
    // SAFETY: by the caller's promise; the features are those of `Avx2`.
    unsafe { int8_kernels::code_rows::<Avx2, U>(span, out, stride) }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn code_panel<U: Unpack>(
    span: &Span<'_>,
    out: *mut f32,
    stride: usize,
    scratch: &mut Scratch,
) {
    // SAFETY: as above.
    unsafe { int8_kernels::code_panel::<Avx2, U>(span, out, stride, scratch) }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn float_rows<W: Widen>(span: &Span<'_>, out: *mut f32, stride: usize) {
    // SAFETY: as above.
    unsafe { float_kernels::float_rows::<Avx2, W>(span, out, stride) }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn float_panel<W: Widen>(
    span: &Span<'_>,
    out: *mut f32,
    stride: usize,
    scratch: &mut Scratch,
) {
    // SAFETY: as above.
    unsafe { float_kernels::float_panel::<Avx2, W>(span, out, stride, scratch) }
}

#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn quantize(values: &[f32], row: QuantizedRow<'_>) {
    activations::quantize_row(values, row);
}

/// A byte per bit, all ones where it is set.
#[inline(always)]
unsafe fn spread(bits: u32) -> __m256i {
    // SAFETY: register operations of AVX2, which the caller has enabled.
    unsafe {
        let byte_of_lane = _mm256_setr_epi64x(
            0,
            0x0101_0101_0101_0101,
            0x0202_0202_0202_0202,
            0x0303_0303_0303_0303,
        );
        let bit_of_lane = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64.cast_signed());
        let bytes = _mm256_set1_epi32(bits.cast_signed());
        let bytes = _mm256_shuffle_epi8(bytes, byte_of_lane);
        _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit_of_lane), bit_of_lane)
    }
}

/// Products of 32 weights' and token's codes, summed by fours. `weights` are unsigned, up to 127,
/// or, when `WIDE`, unsigned up to 255 and taken as `code - 128`.
#[inline(always)]
unsafe fn dot_32<const WIDE: bool>(weights: __m256i, x: __m256i) -> __m256i {
    // SAFETY: register operations of AVX2, which the caller has enabled.
    unsafe {
        let pairs = if WIDE {
            let signed = _mm256_xor_si256(weights, _mm256_set1_epi8(-128));
            // |-128| is 128 as an unsigned byte; 2 * 128 * 127 fits 16 bits.
            _mm256_maddubs_epi16(_mm256_abs_epi8(signed), _mm256_sign_epi8(x, signed))
        } else {
            _mm256_maddubs_epi16(weights, x)
        };
        _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
    }
}

/// Transposes 8 x 8 elements of four bytes.
#[inline(always)]
unsafe fn transpose_8x8(rows: &mut [__m256i; 8]) {
    // SAFETY: register operations of AVX2, which the caller has enabled.
    unsafe {
        let mut quads = *rows;
        for half in 0..2 {
            let at = 4 * half;
            let (a, b, c, d) = (rows[at], rows[at + 1], rows[at + 2], rows[at + 3]);
            let (ab, ab_high) = (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
            let (cd, cd_high) = (_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
            quads[at] = _mm256_unpacklo_epi64(ab, cd);
            quads[at + 1] = _mm256_unpackhi_epi64(ab, cd);
            quads[at + 2] = _mm256_unpacklo_epi64(ab_high, cd_high);
            quads[at + 3] = _mm256_unpackhi_epi64(ab_high, cd_high);
        }
        for col in 0..4 {
            let (upper, lower) = (quads[col], quads[col + 4]);
            rows[col] = _mm256_permute2x128_si256::<0x20>(upper, lower);
            rows[col + 4] = _mm256_permute2x128_si256::<0x31>(upper, lower);
        }
    }
}

/// Eight rows (half a panel, `half` 0 or 1) times some tokens.
#[inline(always)]
unsafe fn half_tile_codes<const TOKENS: usize, const SUB: usize, const WIDE: bool>(
    panel: &CodePanel,
    half: usize,
    cols: usize,
    tokens: &[TokenCodes],
    out: &[*mut f32],
    first: bool,
) {
    // SAFETY: the caller has enabled AVX2 and gives `TOKENS` tokens of `cols` columns.
    unsafe {
        let mut sums = [_mm256_setzero_ps(); TOKENS];
        if !first {
            for token in 0..TOKENS {
                sums[token] = _mm256_loadu_ps(out[token].add(half * LANES));
            }
        }
        let mut codes = panel.codes.as_ptr().add(half * HALF);
        for sub in 0..cols / SUB {
            let mut dots = [_mm256_setzero_si256(); TOKENS];
            for quads in 0..SUB / 4 {
                let weights = _mm256_load_si256(codes.cast());
                codes = codes.add(32);
                for token in 0..TOKENS {
                    let x = tokens[token].codes.add(sub * SUB + quads * 4).cast::<i32>();
                    let x = _mm256_set1_epi32(x.read_unaligned());
                    dots[token] = _mm256_add_epi32(dots[token], dot_32::<WIDE>(weights, x));
                }
            }
            let at = sub * PANEL_ROWS + half * LANES;
            let scales = _mm256_load_ps(panel.scales.as_ptr().add(at));
            let offsets = _mm256_load_ps(panel.offsets.as_ptr().add(at));
            for token in 0..TOKENS {
                let x = tokens[token];
                let x_scale = _mm256_set1_ps(*x.scales.add(sub * SUB / 32));
                let x_sum = _mm256_set1_ps(*x.sums.add(sub));
                let scale = _mm256_mul_ps(scales, x_scale);
                let dot = _mm256_cvtepi32_ps(dots[token]);
                sums[token] = _mm256_fmadd_ps(dot, scale, sums[token]);
                sums[token] = _mm256_fmadd_ps(offsets, x_sum, sums[token]);
            }
        }
        for token in 0..TOKENS {
            _mm256_storeu_ps(out[token].add(half * LANES), sums[token]);
        }
    }
}

/// Eight rows of an `f32` panel times some tokens.
#[inline(always)]
unsafe fn half_tile_floats<const TOKENS: usize>(
    panel: *const f32,
    half: usize,
    cols: usize,
    tokens: &[*const f32],
    out: &[*mut f32],
    first: bool,
) {
    // SAFETY: the caller has enabled AVX2 and gives `TOKENS` tokens of `cols` columns.
    unsafe {
        let mut sums = [_mm256_setzero_ps(); TOKENS];
        for col in 0..cols {
            let weights = _mm256_loadu_ps(panel.add(col * PANEL_ROWS + half * LANES));
            for token in 0..TOKENS {
                let x = _mm256_set1_ps(*tokens[token].add(col));
                sums[token] = _mm256_fmadd_ps(weights, x, sums[token]);
            }
        }
        for token in 0..TOKENS {
            let out = out[token].add(half * LANES);
            if !first {
                sums[token] = _mm256_add_ps(sums[token], _mm256_loadu_ps(out));
            }
            _mm256_storeu_ps(out, sums[token]);
        }
    }
}

/// Tokens of a register tile: four sums, four integer sums, weights, and what `dot_32` needs.
const TILE: usize = 4;

/// Two accumulators: products of even and of odd sub-blocks, to hide the latency.
#[derive(Clone, Copy)]
pub(crate) struct Sums(__m256, __m256);

// SAFETY (all methods): callers have enabled the features of `Avx2` and give pointers that are
// valid for the lengths that the trait states.
impl Isa for Avx2 {
    type Sum = Sums;

    const SIGNED_WIDE: bool = true;

    #[inline(always)]
    unsafe fn zero() -> Sums {
        // SAFETY: see the impl.
        unsafe { Sums(_mm256_setzero_ps(), _mm256_setzero_ps()) }
    }

    #[inline(always)]
    unsafe fn total(sum: Sums) -> f32 {
        // SAFETY: see the impl.
        unsafe {
            let sum = _mm256_add_ps(sum.0, sum.1);
            let sum = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
            let sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
            _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)))
        }
    }

    #[inline(always)]
    unsafe fn look_up(table: &[u8; 16], codes: &mut [u8]) {
        // SAFETY: see the impl; each chunk has 32 bytes.
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            for chunk in codes.as_chunks_mut::<32>().0 {
                let indices = _mm256_loadu_si256(chunk.as_ptr().cast());
                let values = _mm256_shuffle_epi8(table, indices);
                _mm256_storeu_si256(chunk.as_mut_ptr().cast(), values);
            }
        }
    }

    #[inline(always)]
    unsafe fn widen_halves(halves: [u16; 8], out: &mut [f32; 8]) {
        // SAFETY: see the impl.
        unsafe {
            let halves = _mm_set_epi16(
                halves[7].cast_signed(),
                halves[6].cast_signed(),
                halves[5].cast_signed(),
                halves[4].cast_signed(),
                halves[3].cast_signed(),
                halves[2].cast_signed(),
                halves[1].cast_signed(),
                halves[0].cast_signed(),
            );
            _mm256_storeu_ps(out.as_mut_ptr(), _mm256_cvtph_ps(halves));
        }
    }

    #[inline(always)]
    unsafe fn add_where(bits: u32, value: u8, codes: &mut [u8; 32]) {
        // SAFETY: see the impl.
        unsafe {
            let at = codes.as_mut_ptr().cast();
            let added = _mm256_and_si256(spread(bits), _mm256_set1_epi8(value.cast_signed()));
            _mm256_storeu_si256(at, _mm256_add_epi8(_mm256_loadu_si256(at), added));
        }
    }

    #[inline(always)]
    unsafe fn centre_signed(magnitudes: [u64; 4], bits: u32, codes: &mut [u8; 32]) {
        // SAFETY: see the impl.
        unsafe {
            let at = codes.as_mut_ptr().cast();
            let magnitudes = _mm256_set_epi64x(
                magnitudes[3].cast_signed(),
                magnitudes[2].cast_signed(),
                magnitudes[1].cast_signed(),
                magnitudes[0].cast_signed(),
            );
            let negative = spread(bits);
            let flipped = _mm256_xor_si256(magnitudes, negative);
            let signed = _mm256_sub_epi8(flipped, negative);
            _mm256_storeu_si256(at, _mm256_add_epi8(signed, _mm256_set1_epi8(64)));
        }
    }

    #[inline(always)]
    unsafe fn dot_codes<const SUB: usize, const WIDE: bool>(
        step: &Step,
        token: TokenCodes,
        sum: Sums,
    ) -> Sums {
        // SAFETY: see the impl.
        unsafe {
            let Sums(mut even, mut odd) = sum;
            for index in (0..STEP / SUB).step_by(8) {
                let offsets = _mm256_load_ps(step.offsets.as_ptr().add(index));
                odd = _mm256_fmadd_ps(offsets, _mm256_loadu_ps(token.sums.add(index)), odd);
            }
            for index in 0..8 {
                let codes = _mm256_load_si256(step.codes.as_ptr().add(index * 32).cast());
                let x = _mm256_loadu_si256(token.codes.add(index * 32).cast());
                let dot = _mm256_cvtepi32_ps(dot_32::<WIDE>(codes, x));
                let x_scale = _mm256_set1_ps(*token.scales.add(index));
                let scale = if SUB == 16 {
                    let lower = _mm_set1_ps(step.scales[2 * index]);
                    let upper = _mm_set1_ps(step.scales[2 * index + 1]);
                    _mm256_mul_ps(_mm256_set_m128(upper, lower), x_scale)
                } else {
                    _mm256_mul_ps(_mm256_set1_ps(step.scales[index]), x_scale)
                };
                if index % 2 == 0 {
                    even = _mm256_fmadd_ps(dot, scale, even);
                } else {
                    odd = _mm256_fmadd_ps(dot, scale, odd);
                }
            }
            Sums(even, odd)
        }
    }

    #[inline(always)]
    unsafe fn interleave(rows: &[Step; PANEL_ROWS], col: usize, cols: usize, codes: *mut u8) {
        for half in 0..2 {
            for part in (0..cols).step_by(32) {
                // SAFETY: see the impl.
                unsafe {
                    let mut quads = [_mm256_setzero_si256(); LANES];
                    for row in 0..LANES {
                        let codes = rows[half * LANES + row].codes.as_ptr();
                        quads[row] = _mm256_load_si256(codes.add(part).cast());
                    }
                    transpose_8x8(&mut quads);
                    for (index, quad) in quads.into_iter().enumerate() {
                        let at = half * HALF + (col + part) * LANES + index * 32;
                        _mm256_storeu_si256(codes.add(at).cast(), quad);
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn interleave_scales(rows: &[Step; PANEL_ROWS], scales: *mut f32, offsets: *mut f32) {
        for (half, part) in [(0, 0), (0, LANES), (1, 0), (1, LANES)] {
            // SAFETY: see the impl.
            unsafe {
                let mut scale_rows = [_mm256_setzero_si256(); LANES];
                let mut offset_rows = scale_rows;
                for row in 0..LANES {
                    let step = &rows[half * LANES + row];
                    scale_rows[row] = _mm256_load_si256(step.scales.as_ptr().add(part).cast());
                    offset_rows[row] = _mm256_load_si256(step.offsets.as_ptr().add(part).cast());
                }
                transpose_8x8(&mut scale_rows);
                transpose_8x8(&mut offset_rows);
                for index in 0..LANES {
                    let at = (part + index) * PANEL_ROWS + half * LANES;
                    _mm256_storeu_si256(scales.add(at).cast(), scale_rows[index]);
                    _mm256_storeu_si256(offsets.add(at).cast(), offset_rows[index]);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn tile_codes<const TOKENS: usize, const SUB: usize, const WIDE: bool>(
        panel: &CodePanel,
        cols: usize,
        tokens: &[TokenCodes; TOKENS],
        out: &[*mut f32; TOKENS],
        first: bool,
    ) {
        for half in 0..2 {
            for (tokens, out) in tokens.chunks(TILE).zip(out.chunks(TILE)) {
                // SAFETY: see the impl; tiles have 1, 2, 4 or 8 tokens.
                unsafe {
                    match tokens.len() {
                        1 => half_tile_codes::<1, SUB, WIDE>(panel, half, cols, tokens, out, first),
                        2 => half_tile_codes::<2, SUB, WIDE>(panel, half, cols, tokens, out, first),
                        _ => half_tile_codes::<TILE, SUB, WIDE>(
                            panel, half, cols, tokens, out, first,
                        ),
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn dot_floats(weights: &[f32; STEP], x: *const f32, sum: Sums) -> Sums {
        // SAFETY: see the impl.
        unsafe {
            let Sums(mut even, mut odd) = sum;
            for col in (0..STEP).step_by(16) {
                let (weights, x) = (weights.as_ptr().add(col), x.add(col));
                even = _mm256_fmadd_ps(_mm256_loadu_ps(weights), _mm256_loadu_ps(x), even);
                let (weights, x) = (weights.add(8), x.add(8));
                odd = _mm256_fmadd_ps(_mm256_loadu_ps(weights), _mm256_loadu_ps(x), odd);
            }
            Sums(even, odd)
        }
    }

    #[inline(always)]
    unsafe fn tile_floats<const TOKENS: usize>(
        panel: *const f32,
        cols: usize,
        tokens: &[*const f32; TOKENS],
        out: &[*mut f32; TOKENS],
        first: bool,
    ) {
        for half in 0..2 {
            // SAFETY: see the impl.
            unsafe { half_tile_floats::<TOKENS>(panel, half, cols, tokens, out, first) }
        }
    }

    #[inline(always)]
    unsafe fn transpose(rows: &[[f32; STEP]; PANEL_ROWS], cols: usize, panel: *mut f32) {
        for half in 0..2 {
            for part in (0..cols).step_by(8) {
                // SAFETY: see the impl; `cols` is a multiple of 16.
                unsafe {
                    let mut columns = [_mm256_setzero_si256(); LANES];
                    for row in 0..LANES {
                        let values = rows[half * LANES + row].as_ptr();
                        columns[row] = _mm256_loadu_si256(values.add(part).cast());
                    }
                    transpose_8x8(&mut columns);
                    for (index, column) in columns.into_iter().enumerate() {
                        let at = (part + index) * PANEL_ROWS + half * LANES;
                        _mm256_storeu_si256(panel.add(at).cast(), column);
                    }
                }
            }
        }
    }
}
