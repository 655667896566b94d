//! The inner loops of attention: query rows against one page of keys and values.
//!
//! Register blocks, in vectors of `f32` lanes:
//! - scores: 4 query rows x 4 keys with AVX-512 (16 accumulators of its 32 registers), 2 x 4 with
//!   AVX2 (8 of 16); one load feeds 2 to 4 multiply-adds, and the four sums of a row are reduced
//!   together;
//! - values: the same rows x 4 vectors of columns, all keys of the page in the inner loop.
//!
//! Every score and every output element has one accumulator that is filled in ascending order,
//! whatever the block it is computed in.

use super::source::Rows;
use crate::activation::exp_row_lanes;
use crate::cpu::IsaLevel;
use crate::kv::{KvSlice, PAGE_TOKENS};
use crate::lanes::{Lanes, ScaledBytes, Stored, lanes_entry};

/// Keys in a block of scores.
const KEY_BLOCK: usize = 4;
/// Vectors of value columns in a block.
const COLUMN_BLOCK: usize = 4;

/// Calls a kernel with the pointer to some cache elements.
macro_rules! with_stored {
    ($data:expr, |$x:ident| $call:expr) => {
        match $data {
            KvSlice::F16(x) => {
                let $x = x.as_ptr();
                $call
            }
            KvSlice::F32(x) => {
                let $x = x.as_ptr();
                $call
            }
            KvSlice::Q8_0 { quants, scales } => {
                let $x = ScaledBytes {
                    quants: quants.as_ptr(),
                    scales: scales.as_ptr(),
                };
                $call
            }
        }
    };
}
/// `scores[r * PAGE_TOKENS + j] = q_r . k_j` for the rows of `q` `[rows, dim]` and `keys` keys.
pub(super) fn scores(
    level: IsaLevel,
    q: &[f32],
    dim: usize,
    k: Rows<'_>,
    keys: usize,
    scores: &mut [f32],
) {
    let rows = q.len() / dim;
    check_rows(k, keys, dim);
    assert!(keys <= PAGE_TOKENS && scores.len() >= rows * PAGE_TOKENS);
    assert!(level.is_supported(), "this CPU lacks {level}");
    let (q, stride, scores) = (q.as_ptr(), k.stride, scores.as_mut_ptr());
    // SAFETY: the level is supported; `q` has `rows` rows, `k` has `keys` rows of `dim` at
    // `stride`, and `scores` a row of `PAGE_TOKENS` for each of `q` (all checked).
    unsafe {
        with_stored!(k.data, |k| scores_of(
            level, q, rows, dim, k, stride, keys, scores
        ));
    }
}

/// `acc_r = acc_r * correction_r + sum over j of weights[r * PAGE_TOKENS + j] * v_j` for the rows
/// of `acc` `[rows, dim]` and `keys` values.
pub(super) fn add_values(
    level: IsaLevel,
    weights: &[f32],
    correction: &[f32],
    v: Rows<'_>,
    keys: usize,
    acc: &mut [f32],
    dim: usize,
) {
    let rows = acc.len() / dim;
    check_rows(v, keys, dim);
    assert!(keys <= PAGE_TOKENS && weights.len() >= rows * PAGE_TOKENS);
    assert!(correction.len() >= rows);
    assert!(level.is_supported(), "this CPU lacks {level}");
    let (w, c, stride, acc) = (
        weights.as_ptr(),
        correction.as_ptr(),
        v.stride,
        acc.as_mut_ptr(),
    );
    // SAFETY: the level is supported; `acc` has `rows` rows of `dim`, `weights` and `correction`
    // as many, and `v` has `keys` rows of `dim` at `stride` (all checked).
    unsafe {
        with_stored!(v.data, |v| values_of(
            level, w, c, rows, v, stride, keys, acc, dim
        ));
    }
}

/// `row = exp(row - max)`, where `max` is the largest of the row and `at_least`; returns `max` and
/// the sum.
pub(super) fn exp_row(level: IsaLevel, row: &mut [f32], at_least: f32) -> (f32, f32) {
    assert!(level.is_supported(), "this CPU lacks {level}");
    // SAFETY: the level is supported.
    unsafe { exp_row_of(level, row, at_least) }
}

/// Widens `keys` rows of `dim` elements into `out` `[keys, dim]`.
pub(super) fn widen(level: IsaLevel, x: Rows<'_>, keys: usize, dim: usize, out: &mut [f32]) {
    check_rows(x, keys, dim);
    assert!(out.len() >= keys * dim);
    assert!(level.is_supported(), "this CPU lacks {level}");
    let (stride, out) = (x.stride, out.as_mut_ptr());
    // SAFETY: the level is supported; both matrices have `keys` rows of `dim` (checked).
    unsafe { with_stored!(x.data, |x| widen_of(level, x, stride, keys, dim, out)) }
}

fn check_rows(x: Rows<'_>, keys: usize, dim: usize) {
    assert!(
        keys > 0 && (keys - 1) * x.stride + dim <= x.data.len(),
        "attention: {keys} rows of {dim} at stride {} in {} elements",
        x.stride,
        x.data.len()
    );
}

lanes_entry! {
    /// # Safety
    /// As [`scores`], whose checks establish it.
    #[allow(clippy::too_many_arguments)]
    unsafe fn scores_of(
        q: *const f32, rows: usize, dim: usize, k: E, stride: usize, keys: usize,
        scores: *mut f32,
    ) = scores_lanes::<E>
}

lanes_entry! {
    /// # Safety
    /// As [`add_values`], whose checks establish it.
    #[allow(clippy::too_many_arguments)]
    unsafe fn values_of(
        weights: *const f32, correction: *const f32, rows: usize, v: E, stride: usize,
        keys: usize, acc: *mut f32, dim: usize,
    ) = values_lanes::<E>
}

lanes_entry! {
    /// # Safety
    /// The level is supported.
    unsafe fn exp_row_of(row: &mut [f32], at_least: f32) -> (f32, f32) = exp_row_lanes
}

lanes_entry! {
    /// # Safety
    /// As [`widen`], whose checks establish it.
    unsafe fn widen_of(x: E, stride: usize, keys: usize, dim: usize, out: *mut f32)
        = widen_lanes::<E>
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn scores_lanes<L: Lanes, E: Stored>(
    q: *const f32,
    rows: usize,
    dim: usize,
    k: E,
    stride: usize,
    keys: usize,
    scores: *mut f32,
) {
    for first in (0..keys).step_by(KEY_BLOCK) {
        let count = KEY_BLOCK.min(keys - first);
        // Keys beyond the last repeat it; their scores are not stored.
        // SAFETY: every index is below `keys`.
        let k: [E; KEY_BLOCK] =
            std::array::from_fn(|i| unsafe { k.skip((first + i.min(count - 1)) * stride) });
        let mut r = 0;
        // SAFETY: `r` stays below `rows`, and a block takes no more rows than are left.
        unsafe {
            if L::COUNT == 16 {
                while r + 4 <= rows {
                    let scores = scores.add(r * PAGE_TOKENS + first);
                    score_block::<L, E, 4>(q.add(r * dim), dim, k, count, scores);
                    r += 4;
                }
            }
            while r + 2 <= rows {
                let scores = scores.add(r * PAGE_TOKENS + first);
                score_block::<L, E, 2>(q.add(r * dim), dim, k, count, scores);
                r += 2;
            }
            if r < rows {
                let scores = scores.add(r * PAGE_TOKENS + first);
                score_block::<L, E, 1>(q.add(r * dim), dim, k, count, scores);
            }
        }
    }
}

/// Scores of `R` rows and [`KEY_BLOCK`] keys, of which `count` are stored.
#[inline(always)]
unsafe fn score_block<L: Lanes, E: Stored, const R: usize>(
    q: *const f32,
    dim: usize,
    k: [E; KEY_BLOCK],
    count: usize,
    scores: *mut f32,
) {
    let whole = dim - dim % L::COUNT;
    // SAFETY: `q` has `R` rows of `dim`, each key `dim` elements, `scores` `R` rows of
    // `PAGE_TOKENS` with `count` elements from its start on (the caller's contract).
    unsafe {
        let mut acc = [[L::splat(0.0); KEY_BLOCK]; R];
        for d in (0..whole).step_by(L::COUNT) {
            let mut q_vectors = [L::splat(0.0); R];
            for (r, vector) in q_vectors.iter_mut().enumerate() {
                *vector = L::load(q.add(r * dim + d));
            }
            for (j, k) in k.iter().enumerate() {
                let k: L = k.load(d);
                for r in 0..R {
                    acc[r][j] = q_vectors[r].mul_add(k, acc[r][j]);
                }
            }
        }
        if whole < dim {
            for (j, k) in k.iter().enumerate() {
                let k: L = k.load_partial(whole, dim - whole);
                for (r, acc) in acc.iter_mut().enumerate() {
                    let q = L::load_partial(q.add(r * dim + whole), dim - whole);
                    acc[j] = q.mul_add(k, acc[j]);
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            let sums = L::sum4(*acc);
            std::ptr::copy_nonoverlapping(sums.as_ptr(), scores.add(r * PAGE_TOKENS), count);
        }
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn values_lanes<L: Lanes, E: Stored>(
    weights: *const f32,
    correction: *const f32,
    rows: usize,
    v: E,
    stride: usize,
    keys: usize,
    acc: *mut f32,
    dim: usize,
) {
    let mut r = 0;
    while r < rows {
        let block = match rows - r {
            4.. if L::COUNT == 16 => 4,
            2.. => 2,
            _ => 1,
        };
        // SAFETY: the rows `r..r + block` exist.
        unsafe {
            let (w, c, acc) = (
                weights.add(r * PAGE_TOKENS),
                correction.add(r),
                acc.add(r * dim),
            );
            match block {
                4 => value_rows::<L, E, 4>(w, c, v, stride, keys, acc, dim),
                2 => value_rows::<L, E, 2>(w, c, v, stride, keys, acc, dim),
                _ => value_rows::<L, E, 1>(w, c, v, stride, keys, acc, dim),
            }
        }
        r += block;
    }
}

/// All columns of `R` rows.
#[inline(always)]
unsafe fn value_rows<L: Lanes, E: Stored, const R: usize>(
    weights: *const f32,
    correction: *const f32,
    v: E,
    stride: usize,
    keys: usize,
    acc: *mut f32,
    dim: usize,
) {
    let wide = COLUMN_BLOCK * L::COUNT;
    let mut d = 0;
    // SAFETY: blocks cover the columns `0..dim` once; the rest is the caller's contract.
    unsafe {
        while d + wide <= dim {
            value_block::<L, E, R, COLUMN_BLOCK>(
                weights,
                correction,
                v,
                stride,
                keys,
                acc.add(d),
                dim,
                d,
                L::COUNT,
            );
            d += wide;
        }
        while d < dim {
            let columns = L::COUNT.min(dim - d);
            value_block::<L, E, R, 1>(
                weights,
                correction,
                v,
                stride,
                keys,
                acc.add(d),
                dim,
                d,
                columns,
            );
            d += columns;
        }
    }
}

/// `C` vectors of columns of `R` rows, from column `first` on; the last vector has `columns` of them.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn value_block<L: Lanes, E: Stored, const R: usize, const C: usize>(
    weights: *const f32,
    correction: *const f32,
    v: E,
    stride: usize,
    keys: usize,
    acc: *mut f32,
    dim: usize,
    first: usize,
    columns: usize,
) {
    let whole = columns == L::COUNT;
    // SAFETY: `acc` has `R` rows at `dim`, `weights` `R` rows of `PAGE_TOKENS >= keys`, `v` `keys`
    // rows at `stride`, all with the columns of this block (the caller's contract).
    unsafe {
        let mut sums = [[L::splat(0.0); C]; R];
        for (r, row) in sums.iter_mut().enumerate() {
            let factor = L::splat(*correction.add(r));
            for (c, sum) in row.iter_mut().enumerate() {
                let p = acc.add(r * dim + c * L::COUNT);
                let old = if whole {
                    L::load(p)
                } else {
                    L::load_partial(p, columns)
                };
                *sum = old.mul(factor);
            }
        }
        for j in 0..keys {
            let mut v_vectors = [L::splat(0.0); C];
            for (c, vector) in v_vectors.iter_mut().enumerate() {
                let at = j * stride + first + c * L::COUNT;
                *vector = if whole {
                    v.load(at)
                } else {
                    v.load_partial(at, columns)
                };
            }
            for (r, row) in sums.iter_mut().enumerate() {
                let w = L::splat(*weights.add(r * PAGE_TOKENS + j));
                for (sum, v) in row.iter_mut().zip(v_vectors) {
                    *sum = w.mul_add(v, *sum);
                }
            }
        }
        for (r, row) in sums.iter().enumerate() {
            for (c, sum) in row.iter().enumerate() {
                let p = acc.add(r * dim + c * L::COUNT);
                if whole {
                    sum.store(p);
                } else {
                    sum.store_partial(p, columns);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn widen_lanes<L: Lanes, E: Stored>(
    x: E,
    stride: usize,
    keys: usize,
    dim: usize,
    out: *mut f32,
) {
    let whole = dim - dim % L::COUNT;
    for j in 0..keys {
        // SAFETY: both matrices have `keys` rows of `dim` elements (the caller's contract).
        unsafe {
            let (x, out) = (x.skip(j * stride), out.add(j * dim));
            for d in (0..whole).step_by(L::COUNT) {
                x.load::<L>(d).store(out.add(d));
            }
            if whole < dim {
                let rest: L = x.load_partial(whole, dim - whole);
                rest.store_partial(out.add(whole), dim - whole);
            }
        }
    }
}
