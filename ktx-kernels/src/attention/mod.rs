//! Causal attention of a batch of sequences over the KV cache, flash style.
//!
//! Three entries share one kernel: [`gqa`] over paged keys and values, [`mla`] over DeepSeek's
//! paged compressed rows in absorbed form (every head reads the same rows; the values are the
//! rows' first columns), and [`dense`] over plain `f32` keys and values, for MLA without
//! absorption.
//!
//! Generating a token is bound by reading the cache: 2 or 4 bytes for two multiply-adds per query
//! head that shares the row. A prompt is bound by arithmetic. The kernel therefore takes tiles of
//! up to 32 query rows (tokens x the heads that share a KV head) against one
//! page of keys at a time: few rows read an F16 page in place, widening as they go; more rows
//! widen it once into scratch that stays in the second-level cache. See `tile.rs` for the register blocks.
//! Prompts on AMX (`amx.rs`) have tiles of up to 128 rows, whose factors are split in two BF16 parts.
//!
//! The softmax is online, in `f32`. Positions are cut into pieces of 512, each with a
//! softmax of its own, which are merged in ascending order. Whether one task walks all pieces or
//! several tasks share them, a row goes through the same operations in the same order: the
//! result does not depend on the number of threads or on the other rows of the batch; nor on how a
//! prompt is cut into chunks, unless the pool's order of products is by tokens and AMX takes the long ones.
//!
//! A sliding window costs nothing where there is none, and where there is one, pages and pieces
//! that no row of a tile sees are not visited. A sink (a logit per head that takes its share of the
//! softmax and has no value) enters when a finished row is normalised.

#[cfg(target_arch = "x86_64")]
mod amx;
mod buffers;
#[cfg(test)]
mod cases;
pub mod cuda;
mod flash;
#[cfg(test)]
mod gpu_tests;
#[cfg(test)]
mod reference;
mod source;
#[cfg(test)]
mod tests;
mod tile;

use std::num::NonZeroUsize;

use crate::cpu::{self, IsaLevel};
use crate::kv::{LayerKv, PAGE_TOKENS, SequenceKv};
use crate::pool::ThreadPool;
use flash::{Flash, Query};
use source::Source;

/// Heads, widths and scale of an attention layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; each serves `heads / kv_heads` consecutive query heads.
    pub kv_heads: usize,
    /// Elements of a query or key head.
    pub k_head_dim: usize,
    /// Elements of a value head.
    pub v_head_dim: usize,
    /// Factor on the scores before the softmax.
    pub scale: f32,
    /// Latest positions that a query sees, its own included; `None` for all.
    pub window: Option<NonZeroUsize>,
}

impl AttentionShape {
    /// Scratch that [`gqa`] and [`dense`] need on a pool of `threads`, in floats, for any batch.
    pub fn scratch_floats(&self, threads: usize) -> usize {
        buffers::scratch_floats(self.k_head_dim, self.v_head_dim, threads)
    }

    fn check(&self) {
        assert!(
            self.heads > 0 && self.kv_heads > 0 && self.k_head_dim > 0 && self.v_head_dim > 0,
            "attention: nothing of {self:?} may be 0"
        );
        assert!(
            self.heads.is_multiple_of(self.kv_heads),
            "attention: {} query heads on {} KV heads",
            self.heads,
            self.kv_heads
        );
    }
}

/// Queries of grouped attention.
#[derive(Debug, Clone, Copy)]
pub struct GqaQuery<'a> {
    /// Query rows, `[tokens, heads * k_head_dim]`.
    pub rows: &'a [f32],
    /// A logit for each head, unscaled, that is a further term of the softmax' denominator
    /// ("Efficient Streaming Language Models with Attention Sinks", learned form), `[heads]`.
    pub sinks: Option<&'a [f32]>,
}

/// Heads, widths and scale of absorbed multi-head latent attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MlaShape {
    /// Query heads.
    pub heads: usize,
    /// Width of the compressed KV row, `c` (`kv_lora_rank`).
    pub kv_lora: usize,
    /// Width of the shared rotated key behind it (`qk_rope_head_dim`).
    pub rope: usize,
    /// Factor on the scores before the softmax (MLA's own, not from these widths).
    pub scale: f32,
}

impl MlaShape {
    /// Scratch that [`mla`] needs on a pool of `threads`, in floats, for any batch.
    pub fn scratch_floats(&self, threads: usize) -> usize {
        buffers::scratch_floats(self.kv_lora + self.rope, self.kv_lora, threads)
    }
}

/// Queries of absorbed MLA.
#[derive(Debug, Clone, Copy)]
pub struct MlaQuery<'a> {
    /// Queries multiplied into the compressed space, `[tokens, heads, kv_lora]`.
    pub latent: &'a [f32],
    /// Buffer with the rotated parts.
    pub rope: &'a [f32],
    /// Elements from one head's rotated part to the next's, and `heads` times it to the next
    /// token's: `rope` if packed, 192 inside `[nope 128 | rope 64]`.
    pub rope_stride: usize,
    /// First element of the rotated part in `rope` (128 inside `[nope 128 | rope 64]`).
    pub rope_offset: usize,
}

/// Attention of query rows over paged keys and values.
///
/// `out` is `[tokens, heads * v_head_dim]`, the sequences' tokens one after the other. Keys and values of the new positions must be in the cache, whose
/// rows are `kv_heads` heads wide. `scratch` holds [`AttentionShape::scratch_floats`].
///
/// # Panics
/// If a slice, the cache's widths or a sequence's pages do not fit the shape.
pub fn gqa(
    pool: &ThreadPool,
    shape: &AttentionShape,
    kv: &LayerKv,
    sequences: &[SequenceKv<'_>],
    query: &GqaQuery<'_>,
    out: &mut [f32],
    scratch: &mut [f32],
) {
    gqa_at(
        cpu::level(),
        pool,
        shape,
        kv,
        sequences,
        query,
        out,
        scratch,
    );
}

#[allow(clippy::too_many_arguments)]
pub(crate) fn gqa_at(
    level: IsaLevel,
    pool: &ThreadPool,
    shape: &AttentionShape,
    kv: &LayerKv,
    sequences: &[SequenceKv<'_>],
    query: &GqaQuery<'_>,
    out: &mut [f32],
    scratch: &mut [f32],
) {
    shape.check();
    assert_eq!(
        kv.k_width(),
        shape.kv_heads * shape.k_head_dim,
        "gqa: key row of the cache"
    );
    assert_eq!(
        kv.v_width(),
        shape.kv_heads * shape.v_head_dim,
        "gqa: value row of the cache"
    );
    let tokens = check_sequences(sequences);
    assert_eq!(
        query.rows.len(),
        tokens * shape.heads * shape.k_head_dim,
        "gqa: query rows"
    );
    if let Some(sinks) = query.sinks {
        assert_eq!(sinks.len(), shape.heads, "gqa: sinks");
    }
    assert_eq!(
        out.len(),
        tokens * shape.heads * shape.v_head_dim,
        "gqa: out"
    );
    let flash = Flash {
        level,
        order: pool.product_order(),
        heads: shape.heads,
        kv_heads: shape.kv_heads,
        k_dim: shape.k_head_dim,
        v_dim: shape.v_head_dim,
        scale: shape.scale,
        query: Query::packed(query.rows, shape.k_head_dim),
        window: shape.window,
        sinks: query.sinks,
        source: Source::Paged { kv },
        sequences,
    };
    flash.run(pool, out, scratch);
}

/// Absorbed MLA: attention of `heads` queries per token over the compressed rows.
///
/// Score of a position: `(latent . c + rope . k_pe) * scale`, where its cached key row is
/// `[c kv_lora | k_pe rope]`; `out` `[tokens, heads, kv_lora]` is the weighted sum of the `c`.
/// The cache has `k_width = kv_lora + rope` and `v_width = 0`, and holds the new positions.
/// `scratch` holds [`MlaShape::scratch_floats`].
///
/// # Panics
/// If a slice, the cache's widths or a sequence's pages do not fit the shape.
pub fn mla(
    pool: &ThreadPool,
    shape: &MlaShape,
    kv: &LayerKv,
    sequences: &[SequenceKv<'_>],
    query: &MlaQuery<'_>,
    out: &mut [f32],
    scratch: &mut [f32],
) {
    mla_at(
        cpu::level(),
        pool,
        shape,
        kv,
        sequences,
        query,
        out,
        scratch,
    );
}

#[allow(clippy::too_many_arguments)]
pub(crate) fn mla_at(
    level: IsaLevel,
    pool: &ThreadPool,
    shape: &MlaShape,
    kv: &LayerKv,
    sequences: &[SequenceKv<'_>],
    query: &MlaQuery<'_>,
    out: &mut [f32],
    scratch: &mut [f32],
) {
    let &MlaShape {
        heads,
        kv_lora,
        rope,
        scale,
    } = shape;
    assert!(
        heads > 0 && kv_lora > 0,
        "mla: neither heads nor kv_lora of {shape:?} may be 0"
    );
    assert_eq!(kv.k_width(), kv_lora + rope, "mla: key row of the cache");
    assert_eq!(kv.v_width(), 0, "mla: value row of the cache");
    let tokens = check_sequences(sequences);
    assert_eq!(query.latent.len(), tokens * heads * kv_lora, "mla: latent");
    assert_eq!(out.len(), tokens * heads * kv_lora, "mla: out");
    let rope_end = (tokens * heads).checked_sub(1).map_or(0, |last| {
        query.rope_offset + last * query.rope_stride + rope
    });
    assert!(
        query.rope.len() >= rope_end,
        "mla: {} elements of rope, {rope_end} needed",
        query.rope.len()
    );
    let flash = Flash {
        level,
        order: pool.product_order(),
        heads,
        kv_heads: 1,
        k_dim: kv_lora + rope,
        v_dim: kv_lora,
        scale,
        query: Query::mla(query, kv_lora, rope),
        window: None,
        sinks: None,
        source: Source::Latent { kv },
        sequences,
    };
    flash.run(pool, out, scratch);
}

/// Attention of one sequence over plain keys `[past + tokens, kv_heads, k_head_dim]` and values
/// `[past + tokens, kv_heads, v_head_dim]`.
///
/// `q` is `[tokens, heads, k_head_dim]` at positions `past..past + tokens`, `out`
/// `[tokens, heads, v_head_dim]`. `scratch` holds [`AttentionShape::scratch_floats`].
///
/// # Panics
/// If a slice does not fit the shape.
#[allow(clippy::too_many_arguments)]
pub fn dense(
    pool: &ThreadPool,
    shape: &AttentionShape,
    past: usize,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    out: &mut [f32],
    scratch: &mut [f32],
) {
    dense_at(cpu::level(), pool, shape, past, q, k, v, out, scratch);
}

#[allow(clippy::too_many_arguments)]
pub(crate) fn dense_at(
    level: IsaLevel,
    pool: &ThreadPool,
    shape: &AttentionShape,
    past: usize,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    out: &mut [f32],
    scratch: &mut [f32],
) {
    shape.check();
    let tokens = q.len() / (shape.heads * shape.k_head_dim);
    let len = past + tokens;
    assert_eq!(q.len(), tokens * shape.heads * shape.k_head_dim, "dense: q");
    assert_eq!(k.len(), len * shape.kv_heads * shape.k_head_dim, "dense: k");
    assert_eq!(v.len(), len * shape.kv_heads * shape.v_head_dim, "dense: v");
    assert_eq!(
        out.len(),
        tokens * shape.heads * shape.v_head_dim,
        "dense: out"
    );
    let flash = Flash {
        level,
        order: pool.product_order(),
        heads: shape.heads,
        kv_heads: shape.kv_heads,
        k_dim: shape.k_head_dim,
        v_dim: shape.v_head_dim,
        scale: shape.scale,
        query: Query::packed(q, shape.k_head_dim),
        window: shape.window,
        sinks: None,
        source: Source::Dense {
            k,
            v,
            kv_heads: shape.kv_heads,
        },
        sequences: &[SequenceKv {
            pages: &[],
            past,
            tokens,
        }],
    };
    flash.run(pool, out, scratch);
}

/// The tokens of all sequences, after checking that their pages cover them.
fn check_sequences(sequences: &[SequenceKv<'_>]) -> usize {
    for (i, sequence) in sequences.iter().enumerate() {
        assert!(
            sequence.pages.len() >= sequence.len().div_ceil(PAGE_TOKENS),
            "attention: sequence {i} has {} pages for {} positions",
            sequence.pages.len(),
            sequence.len()
        );
    }
    sequences.iter().map(|sequence| sequence.tokens).sum()
}
