//! Element-wise operations: SiLU and other gated activations, sigmoid, sums, and the softmax of rows.
//!
//! All are bound by memory on long slices (SiLU-multiply moves 12 bytes an element for some 25
//! operations), so a slice of more than [`PARALLEL_ELEMENTS`] is cut into chunks of that size for
//! the pool and a smaller one runs on the caller alone. The exponential is computed in vectors of
//! lanes by range reduction and a polynomial, with a relative error below 2e-7.
//!
//! NaN and infinities pass through as IEEE arithmetic has them.

#[cfg(test)]
mod cases;
pub mod cuda;
pub(crate) mod exp;
#[cfg(test)]
mod gpu_tests;
#[cfg(test)]
pub(crate) mod reference;
#[cfg(test)]
mod tests;

use crate::cpu::{self, IsaLevel};
use crate::disjoint::DisjointMut;
use crate::lanes::{Lanes, lanes_entry};
use crate::pool::ThreadPool;
use exp::exp;

/// Elements of a task. Below it a region costs more than it saves (about 2 µs of work).
pub const PARALLEL_ELEMENTS: usize = 16 * 1024;

/// `out = silu(gate) * up`, where `silu(x) = x / (1 + exp(-x))`.
///
/// # Panics
/// If the lengths differ.
pub fn silu_mul(pool: &ThreadPool, gate: &[f32], up: &[f32], out: &mut [f32]) {
    silu_mul_at(cpu::level(), pool, gate, up, out);
}

pub(crate) fn silu_mul_at(
    level: IsaLevel,
    pool: &ThreadPool,
    gate: &[f32],
    up: &[f32],
    out: &mut [f32],
) {
    assert_eq!(gate.len(), out.len(), "silu_mul: gate and out");
    assert_eq!(up.len(), out.len(), "silu_mul: up and out");
    in_chunks(pool, out, &|start, out| {
        let (gate, up) = (&gate[start..][..out.len()], &up[start..][..out.len()]);
        // SAFETY: `level` is supported by this CPU and the three slices have one length.
        unsafe { silu_mul_chunk(level, gate, up, out) }
    });
}

/// What joins the two halves of a gated feed-forward block.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum GatedActivation {
    /// `silu(gate) * up`.
    #[default]
    SwiGlu,
    /// `g * sigmoid(alpha * g) * (u + 1)` of `g = min(gate, limit)` and `u` = `up` clamped to
    /// `-limit..=limit`.
    ClampedSwiGlu {
        /// Factor in the sigmoid (1.702 makes `g * sigmoid(alpha * g)` close to GELU).
        alpha: f32,
        /// Bound of gate (from above) and up (from both sides).
        limit: f32,
    },
}

/// `out = activation(gate, up)`.
///
/// # Panics
/// If the lengths differ.
pub fn gated(
    pool: &ThreadPool,
    activation: GatedActivation,
    gate: &[f32],
    up: &[f32],
    out: &mut [f32],
) {
    gated_at(cpu::level(), pool, activation, gate, up, out);
}

pub(crate) fn gated_at(
    level: IsaLevel,
    pool: &ThreadPool,
    activation: GatedActivation,
    gate: &[f32],
    up: &[f32],
    out: &mut [f32],
) {
    let (alpha, limit) = match activation {
        GatedActivation::SwiGlu => return silu_mul_at(level, pool, gate, up, out),
        GatedActivation::ClampedSwiGlu { alpha, limit } => (alpha, limit),
    };
    assert_eq!(gate.len(), out.len(), "gated: gate and out");
    assert_eq!(up.len(), out.len(), "gated: up and out");
    in_chunks(pool, out, &|start, out| {
        let (gate, up) = (&gate[start..][..out.len()], &up[start..][..out.len()]);
        // SAFETY: `level` is supported by this CPU and the three slices have one length.
        unsafe { clamped_swiglu_chunk(level, gate, up, alpha, limit, out) }
    });
}

/// `x = silu(x) * up`, in place.
///
/// # Panics
/// If the lengths differ.
pub fn silu_mul_in_place(pool: &ThreadPool, x: &mut [f32], up: &[f32]) {
    assert_eq!(up.len(), x.len(), "silu_mul_in_place: up and x");
    let level = cpu::level();
    in_chunks(pool, x, &|start, x| {
        let up = &up[start..][..x.len()];
        // SAFETY: `level` is supported by this CPU and the slices have one length.
        unsafe { silu_mul_in_place_chunk(level, up, x) }
    });
}

/// `x = sigmoid(x) = 1 / (1 + exp(-x))`, in place.
pub fn sigmoid(pool: &ThreadPool, x: &mut [f32]) {
    sigmoid_at(cpu::level(), pool, x);
}

pub(crate) fn sigmoid_at(level: IsaLevel, pool: &ThreadPool, x: &mut [f32]) {
    in_chunks(pool, x, &|_, x| {
        // SAFETY: `level` is supported by this CPU.
        unsafe { sigmoid_chunk(level, x) }
    });
}

/// `y += x`.
///
/// # Panics
/// If the lengths differ.
pub fn add(pool: &ThreadPool, y: &mut [f32], x: &[f32]) {
    assert_eq!(x.len(), y.len(), "add: x and y");
    in_chunks(pool, y, &|start, y| {
        for (y, x) in y.iter_mut().zip(&x[start..]) {
            *y += x;
        }
    });
}

/// `y[t] += scale[t] * x[t]` for rows `[rows, width]` and one factor per row.
///
/// # Panics
/// If `x` and `y` differ in length or are not `scale.len()` rows of one width.
pub fn add_scaled_rows(pool: &ThreadPool, y: &mut [f32], x: &[f32], scale: &[f32]) {
    assert_eq!(x.len(), y.len(), "add_scaled_rows: x and y");
    if y.is_empty() {
        return;
    }
    assert!(
        !scale.is_empty() && y.len().is_multiple_of(scale.len()),
        "add_scaled_rows: {} elements are not {} rows",
        y.len(),
        scale.len()
    );
    let width = y.len() / scale.len();
    in_rows(pool, y, width, &|row, y| {
        let x = &x[row * width..][..width];
        for (y, x) in y.iter_mut().zip(x) {
            *y += scale[row] * x;
        }
    });
}

/// Softmax of every row of `x` `[rows, width]`, in place.
///
/// A row without any finite or positive-infinite element becomes NaN, as IEEE arithmetic has it.
///
/// # Panics
/// If `x` is not made of whole rows.
pub fn softmax_rows(pool: &ThreadPool, x: &mut [f32], width: usize) {
    softmax_rows_at(cpu::level(), pool, x, width);
}

pub(crate) fn softmax_rows_at(level: IsaLevel, pool: &ThreadPool, x: &mut [f32], width: usize) {
    if x.is_empty() {
        return;
    }
    assert!(
        width > 0 && x.len().is_multiple_of(width),
        "softmax_rows: {} elements are not rows of {width}",
        x.len()
    );
    in_rows(pool, x, width, &|_, row| softmax_row(level, row));
}

/// Softmax of one row at the given level.
pub(crate) fn softmax_row(level: IsaLevel, row: &mut [f32]) {
    assert!(level.is_supported(), "this CPU lacks {level}");
    // SAFETY: `level` is supported by this CPU.
    let (_, sum) = unsafe { exp_row(level, row, f32::NEG_INFINITY) };
    let inverse = 1.0 / sum;
    for x in row {
        *x *= inverse;
    }
}

/// Runs `task(start, chunk)` over chunks of `x`.
fn in_chunks(pool: &ThreadPool, x: &mut [f32], task: &(dyn Fn(usize, &mut [f32]) + Sync)) {
    in_parts(pool, x, PARALLEL_ELEMENTS, task);
}

/// Runs `task(row, values)` over the rows of `x`, several rows to a task if they are short.
fn in_rows(
    pool: &ThreadPool,
    x: &mut [f32],
    width: usize,
    task: &(dyn Fn(usize, &mut [f32]) + Sync),
) {
    let rows_per_task = (PARALLEL_ELEMENTS / width).max(1);
    in_parts(pool, x, rows_per_task * width, &|start, part| {
        for (i, row) in part.chunks_exact_mut(width).enumerate() {
            task(start / width + i, row);
        }
    });
}

fn in_parts(
    pool: &ThreadPool,
    x: &mut [f32],
    part: usize,
    task: &(dyn Fn(usize, &mut [f32]) + Sync),
) {
    if x.len() <= part {
        return task(0, x);
    }
    let len = x.len();
    let shared = DisjointMut::new(x);
    pool.run(len.div_ceil(part), &|index| {
        let start = index * part;
        // SAFETY: parts of different task indices do not overlap.
        task(start, unsafe { shared.part(start, part.min(len - start)) });
    });
}

lanes_entry! {
    /// # Safety
    /// The level is supported; the slices have one length.
    unsafe fn silu_mul_chunk(gate: &[f32], up: &[f32], out: &mut [f32]) = silu_mul_lanes
}

lanes_entry! {
    /// # Safety
    /// The level is supported; the slices have one length.
    unsafe fn clamped_swiglu_chunk(gate: &[f32], up: &[f32], alpha: f32, limit: f32, out: &mut [f32])
        = clamped_swiglu_lanes
}

lanes_entry! {
    /// # Safety
    /// The level is supported; the slices have one length.
    unsafe fn silu_mul_in_place_chunk(up: &[f32], x: &mut [f32]) = silu_mul_in_place_lanes
}

lanes_entry! {
    /// # Safety
    /// The level is supported.
    unsafe fn sigmoid_chunk(x: &mut [f32]) = sigmoid_lanes
}

lanes_entry! {
    /// As [`exp_row_lanes`].
    ///
    /// # Safety
    /// The level is supported.
    unsafe fn exp_row(x: &mut [f32], at_least: f32) -> (f32, f32) = exp_row_lanes
}

/// `x / (1 + exp(-x)) * up` of one vector.
#[inline(always)]
unsafe fn silu_mul_vector<L: Lanes>(x: L, up: L) -> L {
    // SAFETY: the caller has the instruction set.
    unsafe {
        let one = L::splat(1.0);
        let denominator = one.add(exp(L::splat(0.0).sub(x)));
        x.div(denominator).mul(up)
    }
}

#[inline(always)]
unsafe fn silu_mul_lanes<L: Lanes>(gate: &[f32], up: &[f32], out: &mut [f32]) {
    let len = out.len();
    let whole = len - len % L::COUNT;
    let (gate, up, out) = (gate.as_ptr(), up.as_ptr(), out.as_mut_ptr());
    // SAFETY: all three slices have `len` elements; every access is below it.
    unsafe {
        for i in (0..whole).step_by(L::COUNT) {
            silu_mul_vector(L::load(gate.add(i)), L::load(up.add(i))).store(out.add(i));
        }
        if whole < len {
            let rest = len - whole;
            let gate = L::load_partial(gate.add(whole), rest);
            let up = L::load_partial(up.add(whole), rest);
            silu_mul_vector(gate, up).store_partial(out.add(whole), rest);
        }
    }
}

/// [`GatedActivation::ClampedSwiGlu`] of one vector. NaN passes: it is the second operand of every
/// minimum and maximum.
#[inline(always)]
unsafe fn clamped_swiglu_vector<L: Lanes>(gate: L, up: L, alpha: L, limit: L) -> L {
    // SAFETY: the caller has the instruction set.
    unsafe {
        let one = L::splat(1.0);
        let g = limit.min(gate);
        let u = limit.min(L::splat(0.0).sub(limit).max(up));
        let denominator = one.add(exp(L::splat(0.0).sub(alpha.mul(g))));
        g.div(denominator).mul(u.add(one))
    }
}

#[inline(always)]
unsafe fn clamped_swiglu_lanes<L: Lanes>(
    gate: &[f32],
    up: &[f32],
    alpha: f32,
    limit: f32,
    out: &mut [f32],
) {
    let len = out.len();
    let whole = len - len % L::COUNT;
    let (gate, up, out) = (gate.as_ptr(), up.as_ptr(), out.as_mut_ptr());
    // SAFETY: all three slices have `len` elements; every access is below it.
    unsafe {
        let (alpha, limit) = (L::splat(alpha), L::splat(limit));
        for i in (0..whole).step_by(L::COUNT) {
            let (gate, up) = (L::load(gate.add(i)), L::load(up.add(i)));
            clamped_swiglu_vector(gate, up, alpha, limit).store(out.add(i));
        }
        if whole < len {
            let rest = len - whole;
            let gate = L::load_partial(gate.add(whole), rest);
            let up = L::load_partial(up.add(whole), rest);
            let result = clamped_swiglu_vector(gate, up, alpha, limit);
            result.store_partial(out.add(whole), rest);
        }
    }
}

#[inline(always)]
unsafe fn silu_mul_in_place_lanes<L: Lanes>(up: &[f32], x: &mut [f32]) {
    let len = x.len();
    let whole = len - len % L::COUNT;
    let (up, x) = (up.as_ptr(), x.as_mut_ptr());
    // SAFETY: both slices have `len` elements; every access is below it.
    unsafe {
        for i in (0..whole).step_by(L::COUNT) {
            silu_mul_vector(L::load(x.add(i)), L::load(up.add(i))).store(x.add(i));
        }
        if whole < len {
            let rest = len - whole;
            let gate = L::load_partial(x.add(whole), rest);
            let up = L::load_partial(up.add(whole), rest);
            silu_mul_vector(gate, up).store_partial(x.add(whole), rest);
        }
    }
}

#[inline(always)]
unsafe fn sigmoid_lanes<L: Lanes>(x: &mut [f32]) {
    let len = x.len();
    let whole = len - len % L::COUNT;
    let x = x.as_mut_ptr();
    // SAFETY: the slice has `len` elements; every access is below it.
    unsafe {
        for i in (0..whole).step_by(L::COUNT) {
            sigmoid_vector(L::load(x.add(i))).store(x.add(i));
        }
        if whole < len {
            let rest = len - whole;
            sigmoid_vector(L::load_partial(x.add(whole), rest)).store_partial(x.add(whole), rest);
        }
    }
}

#[inline(always)]
unsafe fn sigmoid_vector<L: Lanes>(x: L) -> L {
    // SAFETY: the caller has the instruction set.
    unsafe {
        let one = L::splat(1.0);
        one.div(one.add(exp(L::splat(0.0).sub(x))))
    }
}

/// `x = exp(x - max)` in place, where `max` is the largest element or `at_least` if that is larger;
/// returns `max` and the sum. Used for every softmax, attention's included.
///
/// # Safety
/// The CPU has the instruction set of `L`.
#[inline(always)]
pub(crate) unsafe fn exp_row_lanes<L: Lanes>(x: &mut [f32], at_least: f32) -> (f32, f32) {
    // SAFETY: as the caller's.
    unsafe {
        let max = max_lanes::<L>(x, at_least);
        (max, exp_sum_lanes::<L>(x, max))
    }
}

/// The largest of `at_least` and the elements, NaN ignored.
#[inline(always)]
unsafe fn max_lanes<L: Lanes>(x: &[f32], at_least: f32) -> f32 {
    let mut chunks = x.chunks_exact(L::COUNT);
    // SAFETY: every chunk has `COUNT` elements. A NaN lane of the first operand of `max` is
    // passed over, so no lane of `max` becomes NaN.
    let max = unsafe {
        let mut max = L::splat(at_least);
        for chunk in &mut chunks {
            max = L::load(chunk.as_ptr()).max(max);
        }
        max.max_lane()
    };
    chunks.remainder().iter().copied().fold(max, f32::max)
}

/// `x = exp(x - max)` in place; returns the sum.
#[inline(always)]
unsafe fn exp_sum_lanes<L: Lanes>(x: &mut [f32], max: f32) -> f32 {
    let len = x.len();
    let whole = len - len % L::COUNT;
    let x = x.as_mut_ptr();
    // SAFETY: the slice has `len` elements; every access is below it.
    unsafe {
        let max = L::splat(max);
        let mut sum = L::splat(0.0);
        for i in (0..whole).step_by(L::COUNT) {
            let e = exp(L::load(x.add(i)).sub(max));
            e.store(x.add(i));
            sum = sum.add(e);
        }
        if whole < len {
            let rest = len - whole;
            let e = exp(L::load_partial(x.add(whole), rest).sub(max));
            e.store_partial(x.add(whole), rest);
            // Read back, so that the lanes beyond the row count as zero.
            sum = sum.add(L::load_partial(x.add(whole), rest));
        }
        sum.sum()
    }
}
