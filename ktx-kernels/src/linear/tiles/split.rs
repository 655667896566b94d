//! Tiles for weights that are floats: numbers are split into sums of two BF16 ones, `x = first + rest`, which keeps 16
//! bits of them: all of F16 and BF16 weights, and of activations and F32 weights so many that the normalised mean
//! squared error is some 1e-11, which is near that of sums in `f32`. A product is
//! `w.first * x.first + w.first * x.rest + w.rest * x.first`; what is left out is smaller than what the split loses.
//!
//! Bound by: the tile unit, with three operations (two for BF16 weights, which have no rest) where types with codes
//! need one. Expanding a group of rows takes a tenth of multiplying it with 512 tokens, and is not interleaved.

use std::arch::x86_64::*;

use super::super::float::{Columns, Widen};
use super::super::isa::STEP;
use super::amx::{
    Configured, TileRow, load_sums, multiply_block, multiply_half_block, pack_pair, prefetch,
    store_sums,
};
use super::{CHUNK_TILES, GROUP_ROWS, Panel, SumTile, TILE, TILE_COLS, Tile, TileJob, TilePair};

/// Multiplies a job of weights that are floats, whose activations have rests.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c")]
pub(super) unsafe fn multiply<W: Widen>(
    job: &TileJob<'_>,
    [first, rest]: &mut [Panel; 2],
    sums: &mut [SumTile],
) {
    let Some(x_rest) = job.x_rest else {
        unreachable!("activations for floats have rests")
    };
    let pairs = job.token_tiles().div_ceil(2);
    let chunks = job.w.cols.div_ceil(STEP);
    // SAFETY: the CPU has AMX, by the caller's promise.
    let _configured = unsafe { Configured::new() };
    for group in 0..job.rows.div_ceil(GROUP_ROWS) {
        for chunk in 0..chunks {
            // SAFETY: the features are enabled here.
            unsafe { expand::<W>(job, group, chunk, [first, rest]) };
            let blocks = (job.x.blocks - chunk * CHUNK_TILES).min(CHUNK_TILES);
            for pair in 0..pairs {
                let sums = sums[(group * pairs + pair) * 4..].as_mut_ptr();
                let weights: [&Panel; 2] = [first, rest];
                // SAFETY: as above; four tiles of sums are there, and `blocks` tiles of each operand.
                unsafe {
                    load_sums(sums, chunk == 0);
                    let x = job.pair(job.x, chunk, pair);
                    multiply_blocks(weights[0], blocks, x);
                    multiply_blocks(weights[0], blocks, job.pair(x_rest, chunk, pair));
                    if W::HAS_REST {
                        multiply_blocks(weights[1], blocks, x);
                    }
                    store_sums(sums);
                }
            }
        }
    }
}

/// Adds the products of a panel's columns and a pair of token tiles to the sums in the tiles.
#[inline(always)]
unsafe fn multiply_blocks(weights: &Panel, blocks: usize, x: TilePair) {
    for block in 0..blocks {
        // SAFETY: the tiles are valid and configured, by the caller's promise.
        unsafe {
            match x {
                (first, Some(second)) => multiply_block(weights, block, [first, second]),
                (first, None) => multiply_half_block(weights, block, first),
            }
        }
    }
}

/// Expands a group's rows of a chunk of columns. Rows beyond the job's keep what they have: their sums are not read.
#[inline(always)]
unsafe fn expand<W: Widen>(
    job: &TileJob<'_>,
    group: usize,
    chunk: usize,
    [first, rest]: [&mut Panel; 2],
) {
    let mut values = [0.0; STEP];
    for row in 0..GROUP_ROWS.min(job.rows - group * GROUP_ROWS) {
        let job_row = group * GROUP_ROWS + row;
        let bytes = job.columns(job_row, chunk * STEP);
        let columns = Columns {
            w: &job.w,
            row: job.row + job_row,
            first: chunk * STEP,
            bytes,
        };
        W::widen(&columns, &mut values);
        let len = bytes.len() / job.w.ty.block_bytes() * job.w.ty.block_len();
        for col in 0..STEP {
            if col >= len {
                values[col] = 0.0;
            }
        }
        // SAFETY: the caller has enabled the features; a block is 32 of the values.
        unsafe {
            match (chunk + 1) * STEP < job.w.cols {
                true => prefetch(job, job_row, chunk + 1),
                false => prefetch(job, job_row + GROUP_ROWS, 0),
            }
            let mut first = TileRow::new(first, row);
            let mut rest = TileRow::new(rest, row);
            for block in 0..CHUNK_TILES {
                let at = values.as_ptr().add(block * TILE_COLS);
                let (low, high) = (_mm512_loadu_ps(at), _mm512_loadu_ps(at.add(16)));
                first.set(block, pack_pair(low, high));
                if W::HAS_REST {
                    rest.set(block, pack_pair(rest_of(low), rest_of(high)));
                }
            }
        }
    }
}

/// What is left of numbers that are rounded to BF16; nothing of those that are infinite or become so.
#[inline(always)]
unsafe fn rest_of(values: __m512) -> __m512 {
    /// Magnitudes from here on round to infinity.
    const LARGEST: f32 = f32::from_bits(0x7f7f_8000);
    // SAFETY: register operations of AVX-512 F and BF16, which the caller has enabled.
    unsafe {
        let rounded: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(values));
        let rounded = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(rounded));
        let magnitude = _mm512_abs_ps(values);
        let finite = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(magnitude, _mm512_set1_ps(LARGEST));
        _mm512_maskz_sub_ps(finite, values, _mm512_castsi512_ps(rounded))
    }
}

/// As [`super::amx::pack`], the rests of the values.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) unsafe fn pack_rests(rows: &[&[f32]], col: usize, tile: *mut Tile) {
    let mut rests = [[0.0f32; TILE_COLS]; TILE];
    let mut views: [&[f32]; TILE] = [&[]; TILE];
    for (rest, row) in rests.iter_mut().zip(rows) {
        let columns = &row[col.min(row.len())..];
        let len = columns.len().min(TILE_COLS);
        rest[..len].copy_from_slice(&columns[..len]);
        for half in [0, 16] {
            // SAFETY: the features are enabled here; half of the columns are 16.
            unsafe {
                let at = rest.as_mut_ptr().add(half);
                _mm512_storeu_ps(at, rest_of(_mm512_loadu_ps(at)));
            }
        }
    }
    for (view, rest) in views.iter_mut().zip(&rests).take(rows.len()) {
        *view = rest;
    }
    // SAFETY: by the caller's promise.
    unsafe { super::amx::pack(&views[..rows.len()], 0, tile) };
}
