//! Kernels for AVX-512 F, BW, VL, DQ with VNNI. A panel's 16 rows are the 16 lanes of a register:
//! per four columns, one `vpdpbusd` multiplies 64 codes with four of a token's, which are
//! broadcast from memory by the same instruction.

mod direct;

use std::arch::x86_64::*;

use super::activations::{self, QuantizedRow};
use super::dispatch::Span;
use super::float::Widen;
use super::isa::{CodePanel, Isa, STEP, Step, TokenCodes};
use super::scratch::Scratch;
use super::unpack::{HalfScaled, Unpack};
use super::{PANEL_ROWS, float_kernels, int8_kernels};

/// AVX-512 with VNNI.
pub(crate) struct Avx512;

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(crate) unsafe fn code_rows<U: Unpack>(span: &Span<'_>, out: *mut f32, stride: usize) {
    // SAFETY: by the caller's promise; the features are those of `Avx512`.
    unsafe { int8_kernels::code_rows::<Avx512, U>(span, out, stride) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(crate) unsafe fn code_panel<U: Unpack>(
    span: &Span<'_>,
    out: *mut f32,
    stride: usize,
    scratch: &mut Scratch,
) {
    // SAFETY: as above.
    unsafe { int8_kernels::code_panel::<Avx512, U>(span, out, stride, scratch) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(crate) unsafe fn float_rows<W: Widen>(span: &Span<'_>, out: *mut f32, stride: usize) {
    // SAFETY: as above.
    unsafe { float_kernels::float_rows::<Avx512, W>(span, out, stride) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(crate) unsafe fn float_panel<W: Widen>(
    span: &Span<'_>,
    out: *mut f32,
    stride: usize,
    scratch: &mut Scratch,
) {
    // SAFETY: as above.
    unsafe { float_kernels::float_panel::<Avx512, W>(span, out, stride, scratch) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
pub(crate) unsafe fn quantize(values: &[f32], row: QuantizedRow<'_>) {
    activations::quantize_row(values, row);
}

/// Which lane's scale each of the 16 lanes of a product of 64 columns takes, for the four such
/// products of a step.
const fn scale_lanes(sub: usize) -> [[i32; 16]; 4] {
    let mut lanes = [[0; 16]; 4];
    let mut part = 0;
    while part < 4 {
        let mut lane = 0;
        while lane < 16 {
            lanes[part][lane] = ((part * 64 + lane * 4) / sub) as i32;
            lane += 1;
        }
        part += 1;
    }
    lanes
}

const SCALE_LANES_16: [[i32; 16]; 4] = scale_lanes(16);
const SCALE_LANES_32: [[i32; 16]; 4] = scale_lanes(32);
/// Each of eight scales twice, for sub-blocks of 16 with activation scales per 32.
const TWICE: [i32; 16] = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7];

/// Four bytes as one number to broadcast.
#[inline(always)]
unsafe fn quad(codes: *const i8) -> __m512i {
    // SAFETY: the caller gives four codes.
    unsafe { _mm512_set1_epi32(codes.cast::<i32>().read_unaligned()) }
}

/// The `PART`th 64 columns of a step; `scales` are all that the step has, `lanes` says which
/// lane takes which.
#[inline(always)]
unsafe fn dot_64<const PART: usize>(
    step: &Step,
    token: TokenCodes,
    lanes: &[[i32; 16]; 4],
    scales: __m512,
    sum: __m512,
) -> __m512 {
    // SAFETY: the caller has enabled the features and gives a token of 256 columns.
    unsafe {
        // Unpackers store 32 codes at a time, and a load that spans two recent stores waits until
        // both have reached the cache: a third of the time of some types. Volatile, or the
        // compiler makes one load of the two.
        let codes: *const __m256i = step.codes.as_ptr().add(PART * 64).cast();
        let lower = _mm512_castsi256_si512(codes.read_volatile());
        let codes = _mm512_inserti64x4::<1>(lower, codes.add(1).read_volatile());
        let x = _mm512_loadu_si512(token.codes.add(PART * 64).cast());
        let dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, x);
        let lanes = _mm512_loadu_si512(lanes[PART].as_ptr().cast());
        let scale = _mm512_permutexvar_ps(lanes, scales);
        _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, sum)
    }
}

/// Transposes 16 x 16 elements of four bytes.
#[inline(always)]
pub(crate) unsafe fn transpose_16x16(rows: &mut [__m512i; 16]) {
    // SAFETY: register operations of AVX-512 F, which the caller has enabled.
    unsafe {
        let mut pairs = *rows;
        for index in 0..8 {
            let (a, b) = (rows[2 * index], rows[2 * index + 1]);
            pairs[2 * index] = _mm512_unpacklo_epi32(a, b);
            pairs[2 * index + 1] = _mm512_unpackhi_epi32(a, b);
        }
        let mut quads = pairs;
        for index in 0..4 {
            let at = 4 * index;
            let (a, b, c, d) = (pairs[at], pairs[at + 1], pairs[at + 2], pairs[at + 3]);
            quads[4 * index] = _mm512_unpacklo_epi64(a, c);
            quads[4 * index + 1] = _mm512_unpackhi_epi64(a, c);
            quads[4 * index + 2] = _mm512_unpacklo_epi64(b, d);
            quads[4 * index + 3] = _mm512_unpackhi_epi64(b, d);
        }
        // `quads[4 g + c]` holds, in its four 128-bit lanes, columns c, 4 + c, 8 + c, 12 + c of
        // rows 4 g to 4 g + 3.
        for col in 0..4 {
            let (a, b, c, d) = (quads[col], quads[col + 4], quads[col + 8], quads[col + 12]);
            let low_ab = _mm512_shuffle_i32x4::<0x88>(a, b);
            let high_ab = _mm512_shuffle_i32x4::<0xdd>(a, b);
            let low_cd = _mm512_shuffle_i32x4::<0x88>(c, d);
            let high_cd = _mm512_shuffle_i32x4::<0xdd>(c, d);
            rows[col] = _mm512_shuffle_i32x4::<0x88>(low_ab, low_cd);
            rows[col + 8] = _mm512_shuffle_i32x4::<0xdd>(low_ab, low_cd);
            rows[col + 4] = _mm512_shuffle_i32x4::<0x88>(high_ab, high_cd);
            rows[col + 12] = _mm512_shuffle_i32x4::<0xdd>(high_ab, high_cd);
        }
    }
}

/// Two accumulators: products of even and of odd 64 columns, to hide the latency.
#[derive(Clone, Copy)]
pub(crate) struct Sums(__m512, __m512);

// SAFETY (all methods): callers have enabled the features of `Avx512` and give pointers that are
// valid for the lengths that the trait states.
impl Isa for Avx512 {
    type Sum = Sums;

    const SIGNED_WIDE: bool = false;

    #[inline(always)]
    unsafe fn zero() -> Sums {
        // SAFETY: see the impl.
        unsafe { Sums(_mm512_setzero_ps(), _mm512_setzero_ps()) }
    }

    #[inline(always)]
    unsafe fn total(sum: Sums) -> f32 {
        // SAFETY: see the impl.
        unsafe { _mm512_reduce_add_ps(_mm512_add_ps(sum.0, sum.1)) }
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
            let added = _mm256_maskz_set1_epi8(bits, value.cast_signed());
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
            let centre = _mm256_set1_epi8(64);
            let positive = _mm256_add_epi8(centre, magnitudes);
            let signed = _mm256_mask_sub_epi8(positive, bits, centre, magnitudes);
            _mm256_storeu_si256(at, signed);
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
            let token_scales = _mm256_loadu_ps(token.scales);
            let Sums(mut even, mut odd) = sum;
            let scales = if SUB == 16 {
                let lanes = _mm512_loadu_si512(TWICE.as_ptr().cast());
                let token_scales =
                    _mm512_permutexvar_ps(lanes, _mm512_castps256_ps512(token_scales));
                let offsets = _mm512_load_ps(step.offsets.as_ptr());
                odd = _mm512_fmadd_ps(offsets, _mm512_loadu_ps(token.sums), odd);
                _mm512_mul_ps(_mm512_load_ps(step.scales.as_ptr()), token_scales)
            } else {
                let offsets = _mm256_load_ps(step.offsets.as_ptr());
                let product = _mm256_mul_ps(offsets, _mm256_loadu_ps(token.sums));
                odd = _mm512_add_ps(odd, _mm512_zextps256_ps512(product));
                let scales = _mm256_load_ps(step.scales.as_ptr());
                _mm512_castps256_ps512(_mm256_mul_ps(scales, token_scales))
            };
            let lanes = if SUB == 16 {
                &SCALE_LANES_16
            } else {
                &SCALE_LANES_32
            };
            even = dot_64::<0>(step, token, lanes, scales, even);
            odd = dot_64::<1>(step, token, lanes, scales, odd);
            even = dot_64::<2>(step, token, lanes, scales, even);
            odd = dot_64::<3>(step, token, lanes, scales, odd);
            Sums(even, odd)
        }
    }

    #[inline(always)]
    unsafe fn dot_q4_k<const TOKENS: usize>(
        block: &[u8; 144],
        tokens: &[TokenCodes; TOKENS],
        sums: &mut [Sums; TOKENS],
    ) -> bool {
        // SAFETY: see the impl.
        unsafe { direct::q4_k(block, tokens, sums) };
        true
    }

    #[inline(always)]
    unsafe fn dot_q6_k<const TOKENS: usize>(
        block: &[u8; 210],
        tokens: &[TokenCodes; TOKENS],
        sums: &mut [Sums; TOKENS],
    ) -> bool {
        // SAFETY: see the impl.
        unsafe { direct::q6_k(block, tokens, sums) };
        true
    }

    #[inline(always)]
    unsafe fn dot_half_scaled<U: HalfScaled, const TOKENS: usize>(
        columns: &[u8],
        tokens: &[TokenCodes; TOKENS],
        sums: &mut [Sums; TOKENS],
    ) -> bool {
        // SAFETY: see the impl.
        unsafe { direct::half_scaled::<U, TOKENS>(columns, tokens, sums) };
        true
    }

    #[inline(always)]
    unsafe fn interleave(rows: &[Step; PANEL_ROWS], col: usize, cols: usize, codes: *mut u8) {
        for part in (0..cols).step_by(64) {
            // SAFETY: see the impl. Up to 32 columns beyond `cols` are moved too: they are in
            // `rows`, and in the panel, whose columns are a multiple of 64.
            unsafe {
                let mut quads = [_mm512_setzero_si512(); PANEL_ROWS];
                for row in 0..PANEL_ROWS {
                    quads[row] = _mm512_load_si512(rows[row].codes.as_ptr().add(part).cast());
                }
                transpose_16x16(&mut quads);
                for (index, quad) in quads.into_iter().enumerate() {
                    let at = (col + part) * PANEL_ROWS + index * 64;
                    _mm512_storeu_si512(codes.add(at).cast(), quad);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn interleave_scales(rows: &[Step; PANEL_ROWS], scales: *mut f32, offsets: *mut f32) {
        // SAFETY: see the impl.
        unsafe {
            let mut scale_rows = [_mm512_setzero_si512(); PANEL_ROWS];
            let mut offset_rows = scale_rows;
            for row in 0..PANEL_ROWS {
                scale_rows[row] = _mm512_load_si512(rows[row].scales.as_ptr().cast());
                offset_rows[row] = _mm512_load_si512(rows[row].offsets.as_ptr().cast());
            }
            transpose_16x16(&mut scale_rows);
            transpose_16x16(&mut offset_rows);
            for index in 0..PANEL_ROWS {
                let at = index * PANEL_ROWS;
                _mm512_storeu_si512(scales.add(at).cast(), scale_rows[index]);
                _mm512_storeu_si512(offsets.add(at).cast(), offset_rows[index]);
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
        // SAFETY: see the impl.
        unsafe {
            let mut sums = [_mm512_setzero_ps(); TOKENS];
            if !first {
                for token in 0..TOKENS {
                    sums[token] = _mm512_loadu_ps(out[token]);
                }
            }
            let mut codes = panel.codes.as_ptr();
            for sub in 0..cols / SUB {
                let mut dots = [_mm512_setzero_si512(); TOKENS];
                for quads in 0..SUB / 4 {
                    let weights = _mm512_load_si512(codes.cast());
                    codes = codes.add(64);
                    for token in 0..TOKENS {
                        let x = quad(tokens[token].codes.add(sub * SUB + quads * 4));
                        dots[token] = _mm512_dpbusd_epi32(dots[token], weights, x);
                    }
                }
                let scales = _mm512_load_ps(panel.scales.as_ptr().add(sub * PANEL_ROWS));
                let offsets = _mm512_load_ps(panel.offsets.as_ptr().add(sub * PANEL_ROWS));
                for token in 0..TOKENS {
                    let x = tokens[token];
                    let x_scale = _mm512_set1_ps(*x.scales.add(sub * SUB / 32));
                    let x_sum = _mm512_set1_ps(*x.sums.add(sub));
                    let dot = _mm512_cvtepi32_ps(dots[token]);
                    let scale = _mm512_mul_ps(scales, x_scale);
                    sums[token] = _mm512_fmadd_ps(dot, scale, sums[token]);
                    sums[token] = _mm512_fmadd_ps(offsets, x_sum, sums[token]);
                }
            }
            for token in 0..TOKENS {
                _mm512_storeu_ps(out[token], sums[token]);
            }
        }
    }

    #[inline(always)]
    unsafe fn dot_floats(weights: &[f32; STEP], x: *const f32, sum: Sums) -> Sums {
        // SAFETY: see the impl.
        unsafe {
            let Sums(mut even, mut odd) = sum;
            for col in (0..STEP).step_by(32) {
                let (weights, x) = (weights.as_ptr().add(col), x.add(col));
                even = _mm512_fmadd_ps(_mm512_loadu_ps(weights), _mm512_loadu_ps(x), even);
                let (weights, x) = (weights.add(16), x.add(16));
                odd = _mm512_fmadd_ps(_mm512_loadu_ps(weights), _mm512_loadu_ps(x), odd);
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
        // SAFETY: see the impl.
        unsafe {
            let mut sums = [_mm512_setzero_ps(); TOKENS];
            for col in 0..cols {
                let weights = _mm512_loadu_ps(panel.add(col * PANEL_ROWS));
                for token in 0..TOKENS {
                    let x = _mm512_set1_ps(*tokens[token].add(col));
                    sums[token] = _mm512_fmadd_ps(weights, x, sums[token]);
                }
            }
            for token in 0..TOKENS {
                if !first {
                    sums[token] = _mm512_add_ps(sums[token], _mm512_loadu_ps(out[token]));
                }
                _mm512_storeu_ps(out[token], sums[token]);
            }
        }
    }

    #[inline(always)]
    unsafe fn transpose(rows: &[[f32; STEP]; PANEL_ROWS], cols: usize, panel: *mut f32) {
        for part in (0..cols).step_by(16) {
            // SAFETY: see the impl; `cols` is a multiple of 16.
            unsafe {
                let mut block = [_mm512_setzero_si512(); PANEL_ROWS];
                for row in 0..PANEL_ROWS {
                    block[row] = _mm512_loadu_si512(rows[row].as_ptr().add(part).cast());
                }
                transpose_16x16(&mut block);
                for (index, column) in block.into_iter().enumerate() {
                    let at = (part + index) * PANEL_ROWS;
                    _mm512_storeu_si512(panel.add(at).cast(), column);
                }
            }
        }
    }
}
