//! Rotary position embedding of strided heads, in place.
//!
//! Bound by memory: every element is read and written once, the cosines come from a
//! [`RopeTable`] row that stays in the first-level cache for all heads of a token. Tokens are
//! spread over the pool when there is enough to rotate. The loops are plain Rust compiled once
//! per instruction set; nothing is fused, so all instruction sets give the same bits.

#[cfg(test)]
mod cases;
pub mod cuda;
#[cfg(test)]
mod gpu_tests;
#[cfg(test)]
mod reference;
mod table;
#[cfg(test)]
mod tests;

pub use table::{RopeConfig, RopeError, RopeScaling, RopeTable, Yarn, yarn_mscale};

use crate::cpu::{self, IsaLevel};
use crate::disjoint::DisjointMut;
use crate::lanes::{Lanes, lanes_entry};
use crate::pool::ThreadPool;

/// Elements of a task. Below it a region costs more than it saves.
pub const PARALLEL_ELEMENTS: usize = 16 * 1024;

/// Which elements form the pairs that are rotated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeLayout {
    /// Adjacent elements `(0, 1), (2, 3), ...`: `llama` files (whose q and k rows are permuted
    /// for it) and DeepSeek.
    Interleaved,
    /// Element `i` with `i + dim / 2` (NEOX): Qwen and Hugging Face's Llama.
    Half,
}

/// Where the rotated elements lie: those of head `h` of token `t` start at
/// `t * token_stride + h * head_stride + offset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RopeHeads {
    /// Heads of each token.
    pub heads: usize,
    /// Elements from one head to the next.
    pub head_stride: usize,
    /// Elements from one token to the next.
    pub token_stride: usize,
    /// First rotated element of a head (DeepSeek: 128 of a head of `[nope 128 | rope 64]`).
    pub offset: usize,
}

impl RopeHeads {
    /// `[tokens, heads, head_dim]`, rotated from `offset` of each head on.
    pub fn contiguous(heads: usize, head_dim: usize, offset: usize) -> Self {
        RopeHeads {
            heads,
            head_stride: head_dim,
            token_stride: heads * head_dim,
            offset,
        }
    }

    /// Checks that `tokens` tokens neither overlap nor leave a buffer of `len` elements.
    fn check(&self, dim: usize, tokens: usize, len: usize) {
        if tokens == 0 || self.heads == 0 {
            return;
        }
        let end = self
            .head_stride
            .checked_mul(self.heads - 1)
            .and_then(|x| x.checked_add(self.offset)?.checked_add(dim))
            .expect("rope: the heads of a token exceed the address space");
        assert!(
            self.heads == 1 || self.head_stride >= dim,
            "rope: heads of {dim} rotated elements overlap at a stride of {}",
            self.head_stride
        );
        assert!(
            tokens == 1 || self.token_stride >= end - self.offset,
            "rope: tokens overlap at a stride of {}",
            self.token_stride
        );
        let end = self
            .token_stride
            .checked_mul(tokens - 1)
            .and_then(|x| x.checked_add(end));
        assert!(
            end.is_some_and(|end| end <= len),
            "rope: {tokens} tokens of {self:?} leave a buffer of {len} elements"
        );
    }
}

/// Rotates the heads of `positions.len()` tokens in `x`; token `t` is at `positions[t]`.
///
/// # Panics
/// If the heads overlap or leave `x`, or a position is not below the table's.
pub fn rope(
    pool: &ThreadPool,
    table: &RopeTable,
    layout: RopeLayout,
    heads: &RopeHeads,
    positions: &[u32],
    x: &mut [f32],
) {
    rope_at(cpu::level(), pool, table, layout, heads, positions, x);
}

pub(crate) fn rope_at(
    level: IsaLevel,
    pool: &ThreadPool,
    table: &RopeTable,
    layout: RopeLayout,
    heads: &RopeHeads,
    positions: &[u32],
    x: &mut [f32],
) {
    let dim = table.dim();
    heads.check(dim, positions.len(), x.len());
    assert!(level.is_supported(), "this CPU lacks {level}");
    if positions.is_empty() || heads.heads == 0 {
        return;
    }
    let tokens_per_task = (PARALLEL_ELEMENTS / (heads.heads * dim)).max(1);
    // From the first rotated element of a token to its last.
    let span = (heads.heads - 1) * heads.head_stride + dim;
    let x = DisjointMut::new(x);
    let task = |index: usize| {
        let start = index * tokens_per_task;
        let tokens = positions.iter().enumerate().skip(start);
        for (t, &position) in tokens.take(tokens_per_task) {
            let row = table.row(position as usize);
            // SAFETY: tokens do not overlap (checked), and each belongs to one task.
            let x = unsafe { x.part(t * heads.token_stride + heads.offset, span) };
            // SAFETY: the level is supported.
            unsafe { rotate(level, layout, heads.head_stride, row, x) };
        }
    };
    match positions.len().div_ceil(tokens_per_task) {
        1 => task(0),
        tasks => pool.run(tasks, &task),
    }
}

lanes_entry! {
    /// Rotates the heads of one token, at every `stride` of `x`, by `row` = `[cos | sin]`.
    ///
    /// # Safety
    /// The level is supported.
    unsafe fn rotate(layout: RopeLayout, stride: usize, row: &[f32], x: &mut [f32]) = rotate_lanes
}

/// Plain loops that the compiler vectorises for the instruction set of `L`.
#[inline(always)]
unsafe fn rotate_lanes<L: Lanes>(layout: RopeLayout, stride: usize, row: &[f32], x: &mut [f32]) {
    let dim = row.len();
    let (cos, sin) = row.split_at(dim / 2);
    for start in (0..x.len()).step_by(stride.max(dim)) {
        let head = &mut x[start..start + dim];
        match layout {
            RopeLayout::Interleaved => rotate_pairs(head, cos, sin),
            RopeLayout::Half => rotate_halves(head, cos, sin),
        }
    }
}

#[inline(always)]
fn rotate_pairs(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    for ((pair, c), s) in head.chunks_exact_mut(2).zip(cos).zip(sin) {
        let (a, b) = (pair[0], pair[1]);
        pair[0] = a * c - b * s;
        pair[1] = a * s + b * c;
    }
}

#[inline(always)]
fn rotate_halves(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = head.split_at_mut(cos.len());
    for (((a, b), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        (*a, *b) = (*a * c - *b * s, *a * s + *b * c);
    }
}
