//! RMSNorm of rows: `y = x / sqrt(mean(x^2) + eps) * weight`.
//!
//! Bound by memory: a row is read twice (the second time from the first-level cache) and written
//! once. Squares are summed in `f32` lanes within blocks of 256 elements and the block sums in
//! `f64`, so that the mean square is good to a few ulp at any width. Rows are spread over the
//! pool in tasks of [`PARALLEL_ELEMENTS`] elements; fewer elements run on the caller.

#[cfg(test)]
mod cases;
pub mod cuda;
#[cfg(test)]
mod gpu_tests;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use crate::cpu::{self, IsaLevel};
use crate::disjoint::DisjointMut;
use crate::lanes::{Lanes, lanes_entry};
use crate::pool::ThreadPool;

/// Elements of a task. Below it a region costs more than it saves.
pub const PARALLEL_ELEMENTS: usize = 32 * 1024;

/// Squares summed in single precision before they join the double-precision sum.
const SUM_BLOCK: usize = 256;

/// Where the rows to normalise lie in a buffer: row `r` of token `t` starts at
/// `offset + t * token_stride + r * row_stride`.
///
/// One row per token, `[tokens, width]`, is [`NormRows::contiguous`]; the q and k norms of
/// Qwen3 have `heads` rows of `head_dim` per token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NormRows {
    /// Tokens in the buffer.
    pub tokens: usize,
    /// Elements from one token's first row to the next's.
    pub token_stride: usize,
    /// Rows of each token.
    pub rows: usize,
    /// Elements from one row of a token to its next.
    pub row_stride: usize,
    /// First element of the first row.
    pub offset: usize,
}

impl NormRows {
    /// `tokens` rows of `width`, one after the other.
    pub fn contiguous(tokens: usize, width: usize) -> Self {
        Self::heads(tokens, 1, width)
    }

    /// `[tokens, heads, head_dim]`, every head a row.
    pub fn heads(tokens: usize, heads: usize, head_dim: usize) -> Self {
        NormRows {
            tokens,
            token_stride: heads * head_dim,
            rows: heads,
            row_stride: head_dim,
            offset: 0,
        }
    }

    fn start(&self, row: usize) -> usize {
        self.offset + row / self.rows * self.token_stride + row % self.rows * self.row_stride
    }

    /// Checks that rows of `width` neither overlap nor leave a buffer of `len` elements.
    fn check(&self, width: usize, len: usize) {
        if self.tokens == 0 || self.rows == 0 {
            return;
        }
        assert!(
            self.rows == 1 || self.row_stride >= width,
            "rms_norm: rows of {width} elements overlap at a stride of {}",
            self.row_stride
        );
        let token = self
            .row_stride
            .checked_mul(self.rows - 1)
            .and_then(|last| last.checked_add(width));
        let token = token.expect("rms_norm: the rows of a token exceed the address space");
        assert!(
            self.tokens == 1 || self.token_stride >= token,
            "rms_norm: tokens of {token} elements overlap at a stride of {}",
            self.token_stride
        );
        let end = self
            .token_stride
            .checked_mul(self.tokens - 1)
            .and_then(|last| last.checked_add(self.offset)?.checked_add(token));
        assert!(
            end.is_some_and(|end| end <= len),
            "rms_norm: {self:?} of width {width} leave a buffer of {len} elements"
        );
    }
}

/// Normalises the rows of `x` `[tokens, weight.len()]` into `out` of the same shape.
///
/// # Panics
/// If `x` is not made of whole rows or `out` differs in length.
pub fn rms_norm(pool: &ThreadPool, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    rms_norm_at(cpu::level(), pool, x, weight, eps, out);
}

pub(crate) fn rms_norm_at(
    level: IsaLevel,
    pool: &ThreadPool,
    x: &[f32],
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    let width = weight.len();
    assert_eq!(x.len(), out.len(), "rms_norm: x and out");
    if x.is_empty() {
        return;
    }
    assert!(
        width > 0 && x.len().is_multiple_of(width),
        "rms_norm: {} elements are not rows of {width}",
        x.len()
    );
    assert!(level.is_supported(), "this CPU lacks {level}");
    let out = DisjointMut::new(out);
    for_rows(pool, x.len() / width, width, &|row| {
        let x = &x[row * width..][..width];
        // SAFETY: every row is one task's alone.
        let out = unsafe { out.part(row * width, width) };
        // SAFETY: the level is supported; the three slices have `width` elements.
        unsafe { norm_row(level, x.as_ptr(), weight, eps, out) };
    });
}

/// Normalises rows of width `weight.len()` in place, wherever `rows` says they lie in `x`.
///
/// # Panics
/// If the rows overlap or leave `x`.
pub fn rms_norm_in_place(
    pool: &ThreadPool,
    x: &mut [f32],
    rows: &NormRows,
    weight: &[f32],
    eps: f32,
) {
    rms_norm_in_place_at(cpu::level(), pool, x, rows, weight, eps);
}

pub(crate) fn rms_norm_in_place_at(
    level: IsaLevel,
    pool: &ThreadPool,
    x: &mut [f32],
    rows: &NormRows,
    weight: &[f32],
    eps: f32,
) {
    let width = weight.len();
    rows.check(width, x.len());
    if width == 0 {
        return;
    }
    assert!(level.is_supported(), "this CPU lacks {level}");
    let x = DisjointMut::new(x);
    for_rows(pool, rows.tokens * rows.rows, width, &|row| {
        // SAFETY: rows do not overlap (checked), and every row is one task's alone.
        let row = unsafe { x.part(rows.start(row), width) };
        // SAFETY: the level is supported; the slices have `width` elements.
        unsafe { norm_row(level, row.as_ptr(), weight, eps, row) };
    });
}

fn for_rows(pool: &ThreadPool, rows: usize, width: usize, task: &(dyn Fn(usize) + Sync)) {
    if rows * width <= PARALLEL_ELEMENTS {
        return (0..rows).for_each(task);
    }
    let rows_per_task = (PARALLEL_ELEMENTS / width).max(1);
    pool.run(rows.div_ceil(rows_per_task), &|index| {
        let start = index * rows_per_task;
        (start..rows.min(start + rows_per_task)).for_each(task);
    });
}

lanes_entry! {
    /// One row. `x` may be `out` itself.
    ///
    /// # Safety
    /// The level is supported; `weight` and `out` have one length and `x` that many elements.
    unsafe fn norm_row(x: *const f32, weight: &[f32], eps: f32, out: &mut [f32]) = norm_row_lanes
}

#[inline(always)]
unsafe fn norm_row_lanes<L: Lanes>(x: *const f32, weight: &[f32], eps: f32, out: &mut [f32]) {
    let len = out.len();
    let whole = len - len % L::COUNT;
    let (weight, out) = (weight.as_ptr(), out.as_mut_ptr());
    // The input is reached through `out` where both are one row.
    let x = if x == out.cast_const() {
        out.cast_const()
    } else {
        x
    };
    // SAFETY: `x`, `weight` and `out` have `len` elements; every access is below it.
    unsafe {
        let mean = sum_of_squares::<L>(x, len) / len as f64;
        let factor = L::splat((1.0 / (mean + f64::from(eps)).sqrt()) as f32);
        for i in (0..whole).step_by(L::COUNT) {
            let y = L::load(x.add(i)).mul(factor).mul(L::load(weight.add(i)));
            y.store(out.add(i));
        }
        if whole < len {
            let rest = len - whole;
            let weight = L::load_partial(weight.add(whole), rest);
            let y = L::load_partial(x.add(whole), rest).mul(factor).mul(weight);
            y.store_partial(out.add(whole), rest);
        }
    }
}

#[inline(always)]
unsafe fn sum_of_squares<L: Lanes>(x: *const f32, len: usize) -> f64 {
    let mut total = 0.0f64;
    for start in (0..len).step_by(SUM_BLOCK) {
        let end = len.min(start + SUM_BLOCK);
        let whole = start + (end - start) / L::COUNT * L::COUNT;
        // SAFETY: the caller gives `len` readable elements; every access is below `end`.
        unsafe {
            let mut sum = L::splat(0.0);
            for i in (start..whole).step_by(L::COUNT) {
                let v = L::load(x.add(i));
                sum = v.mul_add(v, sum);
            }
            if whole < end {
                let v = L::load_partial(x.add(whole), end - whole);
                sum = v.mul_add(v, sum);
            }
            total += f64::from(sum.sum());
        }
    }
    total
}
