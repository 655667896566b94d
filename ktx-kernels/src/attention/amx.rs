//! Attention's two products on AMX, for prompts: 16 x 16 sums of products of BF16 pairs at a time.
//!
//! BF16 keeps 8 bits of a number and half precision has 11, so that every factor is split in two, `high + low`,
//! which keeps 16 (all of an F16 cache's). A product is `high high + high low + low high`, three tile operations
//! where rounded factors would take one; what is left out is 2^-16 of it. A page then costs a third of what its
//! multiply-adds cost in `f32` vectors at their peak.
//!
//! Queries and weights are the left operands, row by row as they are; keys are transposed into pairs of columns and
//! values interleaved into pairs of positions, once for all rows of a tile. Every row of a result goes through
//! the same operations whatever rows stand beside it.

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

use super::source::Rows;
use crate::cpu::IsaLevel;
use crate::kv::{KvSlice, PAGE_TOKENS};
use crate::linear::{Configured, transpose_16x16};

/// Rows, and columns of `f32`, of a tile.
const TILE: usize = 16;
/// BF16 columns of a tile of the left operand: a step of the sums.
const STEP: usize = 32;
/// BF16 numbers of a tile.
const TILE_NUMBERS: usize = TILE * STEP;
/// Rows of a result that are computed together; memory behind the last is read and written up to so many.
pub(super) const ROW_BLOCK: usize = 2 * TILE;

/// Whether heads of these widths are whole tiles.
pub(super) fn fits(k_dim: usize, v_dim: usize) -> bool {
    k_dim.is_multiple_of(STEP) && v_dim.is_multiple_of(2 * TILE)
}

/// Rows of `width` split in two: all high parts, then all low parts.
pub(super) struct Split<'s> {
    numbers: &'s mut [u16],
    width: usize,
}

impl<'s> Split<'s> {
    pub(super) fn new(memory: &'s mut [f32], width: usize) -> Self {
        assert!(width.is_multiple_of(STEP));
        let numbers = bytemuck::cast_slice_mut(memory);
        Split { numbers, width }
    }

    /// Splits the rows of `x` to the first rows; a block behind them is zeros.
    pub(super) fn set(&mut self, x: &[f32]) {
        let (high, low) = self.numbers.split_at_mut(self.numbers.len() / 2);
        let end = x.len() + ROW_BLOCK * self.width;
        assert!(end <= high.len() && x.len().is_multiple_of(STEP));
        assert!(IsaLevel::Amx.is_supported(), "this CPU lacks AMX");
        high[x.len()..end].fill(0);
        low[x.len()..end].fill(0);
        let (high, low) = (&mut high[..x.len()], &mut low[..x.len()]);
        // SAFETY: AMX comes with AVX-512 and BF16; the three slices have as many elements, whole steps.
        unsafe { split_rows(x, high, low) };
    }

    /// The high and the low parts from a row on.
    fn row(&self, row: usize) -> [*const u16; 2] {
        let (high, low) = self.numbers.split_at(self.numbers.len() / 2);
        let start = row * self.width;
        assert!(start + ROW_BLOCK * self.width <= high.len());
        [high[start..].as_ptr(), low[start..].as_ptr()]
    }
}

/// The right operand: pairs of tiles, high and low.
struct Tiles<'t>(&'t [u16]);

impl Tiles<'_> {
    fn tile(&self, index: usize) -> *const u16 {
        self.0[index * 2 * TILE_NUMBERS..][..2 * TILE_NUMBERS].as_ptr()
    }
}

/// `scores[r * PAGE_TOKENS + j] = q_r . k_j` of the `rows` of `q` and `keys` keys of single precision. `packed` holds
/// `[PAGE_TOKENS, k_dim]`; `scores` has room for [`ROW_BLOCK`] more rows.
pub(super) fn scores(
    q: &Split<'_>,
    rows: Range<usize>,
    k: Rows<'_>,
    keys: usize,
    packed: &mut [f32],
    scores: &mut [f32],
) {
    let dim = q.width;
    assert!(scores.len() >= rows.len().next_multiple_of(ROW_BLOCK) * PAGE_TOKENS);
    let numbers: &mut [u16] = bytemuck::cast_slice_mut(packed);
    pack_keys(k, keys, dim, numbers);
    let (tiles, steps) = (Tiles(numbers), dim / STEP);
    assert!(IsaLevel::Amx.is_supported(), "this CPU lacks AMX");
    // SAFETY: the CPU has AMX and the process its permission.
    let _configured = unsafe { Configured::new() };
    for first in (0..rows.len()).step_by(ROW_BLOCK) {
        let left = q.row(rows.start + first);
        for group in (0..keys.div_ceil(TILE)).step_by(2) {
            let out = scores[first * PAGE_TOKENS + group * TILE..].as_mut_ptr();
            let right = |step: usize| [group, group + 1].map(|g| tiles.tile(g * steps + step));
            // SAFETY: `ROW_BLOCK` rows of both operands and of the result are there (checked); a page has an even
            // number of groups.
            unsafe {
                zero_sums();
                for step in 0..steps {
                    multiply(left.map(|p| p.add(step * STEP)), 2 * dim, right(step));
                }
                store_sums(out, PAGE_TOKENS);
            }
        }
    }
}

/// `acc_r += sum over j of weights_rj * v_j` for `rows` rows of `acc` `[rows, dim]`, which has room for
/// [`ROW_BLOCK`] more. `packed` holds `[PAGE_TOKENS, dim]`.
pub(super) fn add_values(
    weights: &Split<'_>,
    rows: usize,
    v: Rows<'_>,
    keys: usize,
    packed: &mut [f32],
    acc: &mut [f32],
    dim: usize,
) {
    assert!(acc.len() >= rows.next_multiple_of(ROW_BLOCK) * dim);
    let numbers: &mut [u16] = bytemuck::cast_slice_mut(packed);
    pack_values(v, keys, dim, numbers);
    let (tiles, columns) = (Tiles(numbers), dim / TILE);
    assert!(IsaLevel::Amx.is_supported(), "this CPU lacks AMX");
    // SAFETY: the CPU has AMX and the process its permission.
    let _configured = unsafe { Configured::new() };
    for column in (0..columns).step_by(2) {
        for first in (0..rows).step_by(ROW_BLOCK) {
            let left = weights.row(first);
            let sums = acc[first * dim + column * TILE..].as_mut_ptr();
            // SAFETY: as above, and `dim` is whole pairs of tiles.
            unsafe {
                load_sums(sums, dim);
                for step in 0..keys.div_ceil(STEP) {
                    let right = [column, column + 1].map(|c| tiles.tile(step * columns + c));
                    multiply(left.map(|p| p.add(step * STEP)), 2 * PAGE_TOKENS, right);
                }
                store_sums(sums, dim);
            }
        }
    }
}

fn single(x: Rows<'_>, keys: usize, dim: usize) -> (&[f32], usize) {
    let KvSlice::F32(data) = x.data else {
        unreachable!("rows for tiles are widened first")
    };
    assert!((keys - 1) * x.stride + dim <= data.len());
    (data, x.stride)
}

/// Tiles `[key / 16, column / 32]` of pairs of columns `[pair][key]`; keys beyond the last are zeros.
fn pack_keys(k: Rows<'_>, keys: usize, dim: usize, out: &mut [u16]) {
    let (data, stride) = single(k, keys, dim);
    let mut tiles = out.chunks_exact_mut(2 * TILE_NUMBERS);
    for group in 0..PAGE_TOKENS / TILE {
        let there = keys.saturating_sub(group * TILE).min(TILE);
        for column in (0..dim).step_by(STEP) {
            let Some(tile) = tiles.next() else { return };
            let rows = &data[(group * TILE * stride + column).min(data.len())..];
            // SAFETY: AMX comes with AVX-512 and BF16; `there` rows have `STEP` columns (checked by `single`).
            unsafe { pack_key_tile(rows, stride, there, tile) };
        }
    }
}

/// Tiles `[key / 32, column / 16]` of pairs of keys `[pair][column]`; keys beyond the last are zeros.
fn pack_values(v: Rows<'_>, keys: usize, dim: usize, out: &mut [u16]) {
    let (data, stride) = single(v, keys, dim);
    let mut tiles = out.chunks_exact_mut(2 * TILE_NUMBERS);
    for step in 0..PAGE_TOKENS / STEP {
        let there = keys.saturating_sub(step * STEP).min(STEP);
        for column in (0..dim).step_by(TILE) {
            let Some(tile) = tiles.next() else { return };
            let rows = &data[(step * STEP * stride + column).min(data.len())..];
            // SAFETY: as above, with `TILE` columns.
            unsafe { pack_value_tile(rows, stride, there, tile) };
        }
    }
}

/// The nearest BF16 numbers of 32 floats, in their order, and those of what is left.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn split(low: __m512, high: __m512) -> [__m512i; 2] {
    // SAFETY: both types are 512 bits.
    let round = |low, high| unsafe {
        std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
    };
    let rounded = round(low, high);
    let widen = |half| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)));
    let low_left = _mm512_sub_ps(low, widen(_mm512_castsi512_si256(rounded)));
    let high_left = _mm512_sub_ps(high, widen(_mm512_extracti64x4_epi64::<1>(rounded)));
    [rounded, round(low_left, high_left)]
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn split_rows(x: &[f32], high: &mut [u16], low: &mut [u16]) {
    let parts = high.chunks_exact_mut(STEP).zip(low.chunks_exact_mut(STEP));
    for (x, (high, low)) in x.chunks_exact(STEP).zip(parts) {
        // SAFETY: every chunk has `STEP` elements; the features are enabled here.
        unsafe {
            let x = x.as_ptr();
            let [rounded, left] = split(_mm512_loadu_ps(x), _mm512_loadu_ps(x.add(TILE)));
            _mm512_storeu_si512(high.as_mut_ptr().cast(), rounded);
            _mm512_storeu_si512(low.as_mut_ptr().cast(), left);
        }
    }
}

/// # Safety
/// `there` rows at `stride` have `STEP` columns.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn pack_key_tile(rows: &[f32], stride: usize, there: usize, tile: &mut [u16]) {
    let mut parts = [[_mm512_setzero_si512(); TILE]; 2];
    let [high, low] = &mut parts;
    for (key, (high, low)) in high.iter_mut().zip(low).take(there).enumerate() {
        // SAFETY: the caller's promise; the features are enabled here.
        [*high, *low] = unsafe {
            let x = rows.as_ptr().add(key * stride);
            split(_mm512_loadu_ps(x), _mm512_loadu_ps(x.add(TILE)))
        };
    }
    let (high, low) = tile.split_at_mut(TILE_NUMBERS);
    for (part, out) in parts.iter_mut().zip([high, low]) {
        // SAFETY: as above; a tile is 16 registers.
        unsafe {
            transpose_16x16(part);
            for (pairs, out) in part.iter().zip(out.chunks_exact_mut(STEP)) {
                _mm512_storeu_si512(out.as_mut_ptr().cast(), *pairs);
            }
        }
    }
}

/// # Safety
/// `there` rows at `stride` have `TILE` columns.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn pack_value_tile(rows: &[f32], stride: usize, there: usize, tile: &mut [u16]) {
    /// From the columns of one key and then those of the next, to pairs.
    const PAIRS: [u16; STEP] = {
        let mut lanes = [0; STEP];
        let mut lane = 0;
        while lane < STEP {
            lanes[lane] = (lane / 2 + lane % 2 * TILE) as u16;
            lane += 1;
        }
        lanes
    };
    let (high, low) = tile.split_at_mut(TILE_NUMBERS);
    let outs = high.chunks_exact_mut(STEP).zip(low.chunks_exact_mut(STEP));
    for (pair, (high, low)) in outs.enumerate() {
        // SAFETY: the caller's promise; the features are enabled here.
        unsafe {
            let row = |key: usize| match key < there {
                true => _mm512_loadu_ps(rows.as_ptr().add(key * stride)),
                false => _mm512_setzero_ps(),
            };
            let lanes = _mm512_loadu_si512(PAIRS.as_ptr().cast());
            let parts = split(row(2 * pair), row(2 * pair + 1));
            for (part, out) in parts.into_iter().zip([high, low]) {
                let pairs = _mm512_permutexvar_epi16(lanes, part);
                _mm512_storeu_si512(out.as_mut_ptr().cast(), pairs);
            }
        }
    }
}

/// Sets the sums of 32 x 32 in `tmm0` to `tmm3` to zero.
///
/// # Safety
/// The tiles are configured.
#[inline(always)]
unsafe fn zero_sums() {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            options(nostack, nomem, preserves_flags),
        );
    }
}

/// # Safety
/// The tiles are configured; 32 rows of 32 floats at a distance of `width` are readable.
#[inline(always)]
unsafe fn load_sums(sums: *const f32, width: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "tileloadd tmm0, [{upper} + {stride}]",
            "tileloadd tmm1, [{upper} + {stride} + 64]",
            "tileloadd tmm2, [{lower} + {stride}]",
            "tileloadd tmm3, [{lower} + {stride} + 64]",
            upper = in(reg) sums,
            lower = in(reg) sums.add(TILE * width),
            stride = in(reg) 4 * width,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            options(nostack, readonly, preserves_flags),
        );
    }
}

/// # Safety
/// As [`load_sums`], writable.
#[inline(always)]
unsafe fn store_sums(sums: *mut f32, width: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "tilestored [{upper} + {stride}], tmm0",
            "tilestored [{upper} + {stride} + 64], tmm1",
            "tilestored [{lower} + {stride}], tmm2",
            "tilestored [{lower} + {stride} + 64], tmm3",
            upper = in(reg) sums,
            lower = in(reg) sums.add(TILE * width),
            stride = in(reg) 4 * width,
            options(nostack, preserves_flags),
        );
    }
}

/// Adds the products of 32 rows of the left operand, their high and low parts `stride` bytes from one row to the next, and two
/// tiles of the right one to the sums in `tmm0` to `tmm3`.
///
/// # Safety
/// The tiles are configured, and all of these are readable. No other code uses the registers between this and the next.
#[inline(always)]
unsafe fn multiply([high, low]: [*const u16; 2], stride: usize, right: [*const u16; 2]) {
    // SAFETY: the caller's promise; a low tile of the right operand lies behind its high one.
    unsafe {
        asm!(
            "tileloadd tmm4, [{high} + {stride}]",
            "tileloadd tmm6, [{first} + {tile}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{second} + {tile}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{high_lower} + {stride}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "tileloadd tmm6, [{first} + {tile} + 1024]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{second} + {tile} + 1024]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "tileloadd tmm4, [{low} + {stride}]",
            "tileloadd tmm6, [{first} + {tile}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{second} + {tile}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{low_lower} + {stride}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            high = in(reg) high,
            high_lower = in(reg) high.byte_add(TILE * stride),
            low = in(reg) low,
            low_lower = in(reg) low.byte_add(TILE * stride),
            first = in(reg) right[0],
            second = in(reg) right[1],
            stride = in(reg) stride,
            tile = in(reg) 64usize,
            options(nostack, readonly, preserves_flags),
        );
    }
}
