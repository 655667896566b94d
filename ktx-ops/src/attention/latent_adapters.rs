//! Adapters on `kv_b_proj`, which latent attention never multiplies with as a whole.
//!
//! With `W' = W + s B A`, A `[rank, kv_lora_rank]` and B `[heads * (nope + v), rank]`, each use of a
//! head's part of `W` gets the same part of `s B A` beside it: queries folded into the compressed space
//! go through B's key rows and then A, attended rows through A and then B's value rows, and compressed
//! rows that are expanded through A once for all heads and then B's rows of each head.

use std::sync::Arc;

use ktx_kernels::heads::{HeadRows, matmul_heads};
use ktx_kernels::linear::{LinearError, Precision, WeightRows};
use ktx_kernels::workspace::{Act, Workspace};

use super::latent_weights::rows_of;
use crate::build::OpError;
use crate::linear::kernel_error;
use crate::lora::{ActiveAdapter, AdapterId, Attachment, LowRank, add_to, product, product_of};
use crate::module::Forward;
use crate::spec::MlaSpec;

/// One adapter's part, and both matrices turned as the absorbed form needs them.
struct Part {
    id: AdapterId,
    part: Arc<LowRank>,
    /// B's key rows, transposed: `[heads, rank, nope]`.
    keys: Vec<f32>,
    /// A transposed: `[kv_lora_rank, rank]`.
    a: Vec<f32>,
}

/// The adapters' parts of one attention's `kv_b_proj`.
#[derive(Default)]
pub(super) struct LatentAdapters {
    parts: Vec<Part>,
}

/// An adapter's part that applies to some rows, and compressed rows that have gone through its A.
pub(super) struct Reduced<'a> {
    part: &'a Part,
    low: Act,
}

impl LatentAdapters {
    /// Takes the part of the module at `path`, if the adapter has one.
    pub(super) fn attach(&mut self, path: &str, spec: &MlaSpec, attachment: &mut Attachment<'_>) {
        let Some(part) = attachment.take(path) else {
            return;
        };
        self.parts.push(Part {
            id: attachment.id(),
            keys: transposed_keys(&part.b().to_f32(), part.rank(), spec),
            a: transposed(&part.a().to_f32(), part.rank(), spec.kv_lora_rank),
            part,
        });
    }

    /// Lets go of one adapter's part.
    pub(super) fn detach(&mut self, id: AdapterId) {
        self.parts.retain(|p| p.id != id);
    }

    /// Bytes that were made of the adapters' own.
    pub(super) fn made(&self) -> u64 {
        let bytes = |p: &Part| size_of_val(p.keys.as_slice()) + size_of_val(p.a.as_slice());
        self.parts.iter().map(bytes).sum::<usize>() as u64
    }

    /// Values of f32 that the absorbed form takes of the workspace for this many rows.
    pub(super) fn absorbed_scratch(&self, spec: &MlaSpec, rows: usize) -> usize {
        let heads = spec.num_attention_heads;
        let widest = spec.kv_lora_rank.max(spec.v_head_dim);
        let of = |p: &Part| {
            Workspace::values_for(rows, heads * p.part.rank())
                + Workspace::values_for(rows, heads * widest)
        };
        self.parts.iter().map(of).max().unwrap_or(0)
    }

    /// Values of f32 that the other form takes for this many cached rows.
    pub(super) fn expanded_scratch(&self, spec: &MlaSpec, length: usize) -> usize {
        let low = self.parts.iter();
        let low: usize = low
            .map(|p| Workspace::values_for(length, p.part.rank()))
            .sum();
        match self.parts.is_empty() {
            true => 0,
            false => {
                low + Workspace::values_for(length, spec.qk_nope_head_dim.max(spec.v_head_dim))
            }
        }
    }

    /// Adds to folded queries `latent` `[rows, heads, kv_lora_rank]` what `q` `[rows, heads, nope + rope]`
    /// gets of the adapters.
    pub(super) fn fold(
        &self,
        cx: &mut Forward<'_>,
        path: &str,
        spec: &MlaSpec,
        q: Act,
        latent: Act,
    ) -> Result<(), OpError> {
        let (heads, nope, lora) = (
            spec.num_attention_heads,
            spec.qk_nope_head_dim,
            spec.kv_lora_rank,
        );
        self.each_span(cx, path, q.rows(), |cx, first, rows, part, factor| {
            let (q, latent) = (q.row_range(first, rows), latent.row_range(first, rows));
            let rank = part.part.rank();
            cx.scoped(|cx| {
                let low = cx.alloc(q.device(), rows, heads * rank)?;
                let delta = cx.alloc(q.device(), rows, heads * lora)?;
                let q_rows = HeadRows {
                    width: q.cols(),
                    stride: spec.q_head_dim(),
                    offset: 0,
                };
                let keys = |head: usize| {
                    let size = rank * nope;
                    f32_rows(&part.keys[head * size..(head + 1) * size], rank, nope)
                };
                by_heads(cx, path, heads, &keys, q, q_rows, low)?;
                part.part.scale_rows(cx, low, factor);
                let a = f32_rows(&part.a, lora, rank).map_err(|e| kernel_error(path, e))?;
                let flat = |act: Act, width: usize| act.reshape(rows * heads, width);
                product_of(cx, path, a, flat(low, rank), flat(delta, lora))?;
                add_to(cx, delta, latent);
                Ok(())
            })
        })
    }

    /// Adds to heads' results `out` `[rows, heads, v]` what `attended` `[rows, heads, kv_lora_rank]`
    /// gets of the adapters.
    pub(super) fn unfold(
        &self,
        cx: &mut Forward<'_>,
        path: &str,
        spec: &MlaSpec,
        attended: Act,
        out: Act,
    ) -> Result<(), OpError> {
        let (heads, v, lora) = (spec.num_attention_heads, spec.v_head_dim, spec.kv_lora_rank);
        self.each_span(cx, path, out.rows(), |cx, first, rows, part, factor| {
            let (attended, out) = (attended.row_range(first, rows), out.row_range(first, rows));
            let rank = part.part.rank();
            cx.scoped(|cx| {
                let low = cx.alloc(out.device(), rows, heads * rank)?;
                let delta = cx.alloc(out.device(), rows, heads * v)?;
                let flat = |act: Act, width: usize| act.reshape(rows * heads, width);
                product(
                    cx,
                    path,
                    part.part.a(),
                    flat(attended, lora),
                    flat(low, rank),
                )?;
                part.part.scale_rows(cx, low, factor);
                let values = |head: usize| part.rows(spec, head, spec.qk_nope_head_dim, v);
                by_heads(
                    cx,
                    path,
                    heads,
                    &values,
                    low,
                    HeadRows::packed(heads, rank),
                    delta,
                )?;
                add_to(cx, delta, out);
                Ok(())
            })
        })
    }

    /// Compressed rows `c` `[length, kv_lora_rank]` of a sequence through A of each of its adapters;
    /// taken of the workspace.
    pub(super) fn reduce<'a>(
        &'a self,
        cx: &mut Forward<'_>,
        path: &str,
        adapters: &[ActiveAdapter],
        c: Act,
    ) -> Result<Vec<Reduced<'a>>, OpError> {
        let mut all = Vec::new();
        for active in adapters {
            if let Some(part) = self.of(active.id) {
                let low = part.part.reduce(cx, path, c, active.scale)?;
                all.push(Reduced { part, low });
            }
        }
        Ok(all)
    }

    fn of(&self, id: AdapterId) -> Option<&Part> {
        self.parts.iter().find(|p| p.id == id)
    }

    fn each_span(
        &self,
        cx: &mut Forward<'_>,
        path: &str,
        rows: usize,
        mut body: impl FnMut(&mut Forward<'_>, usize, usize, &Part, f32) -> Result<(), OpError>,
    ) -> Result<(), OpError> {
        if self.parts.is_empty() || cx.adapters.is_empty() {
            return Ok(());
        }
        cx.adapters.require_rows(path, rows)?;
        let adapters = std::mem::take(&mut cx.adapters);
        let result = adapters.spans().iter().try_for_each(|span| {
            span.adapters
                .iter()
                .try_for_each(|active| match self.of(active.id) {
                    Some(part) => body(cx, span.first_row, span.rows, part, active.scale),
                    None => Ok(()),
                })
        });
        cx.adapters = adapters;
        result
    }
}

impl Part {
    /// `rows` of B of one head, from row `first` of it.
    fn rows(
        &self,
        spec: &MlaSpec,
        head: usize,
        first: usize,
        rows: usize,
    ) -> Result<WeightRows<'_>, LinearError> {
        let per_head = spec.qk_nope_head_dim + spec.v_head_dim;
        rows_of(self.part.b(), head * per_head + first, rows)
    }
}

impl Reduced<'_> {
    /// Adds to one head's keys `[length, nope]` and values `[length, v]`.
    pub(super) fn expand(
        &self,
        cx: &mut Forward<'_>,
        path: &str,
        spec: &MlaSpec,
        head: usize,
        k_nope: Act,
        v: Act,
    ) -> Result<(), OpError> {
        let nope = spec.qk_nope_head_dim;
        for (out, first) in [(k_nope, 0), (v, nope)] {
            let weights = self
                .part
                .rows(spec, head, first, out.cols())
                .map_err(|e| kernel_error(path, e))?;
            cx.scoped(|cx| {
                let delta = cx.alloc(out.device(), out.rows(), out.cols())?;
                product_of(cx, path, weights, self.low, delta)?;
                add_to(cx, delta, out);
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// `out[t, h] = W_h x[t, h]` with f32 activations.
fn by_heads<'w>(
    cx: &mut Forward<'_>,
    path: &str,
    heads: usize,
    weights: &(dyn Fn(usize) -> Result<WeightRows<'w>, LinearError> + Sync),
    x: Act,
    x_rows: HeadRows,
    out: Act,
) -> Result<(), OpError> {
    let ([x], [out]) = cx.workspace.views([x], [out]);
    matmul_heads(cx.pool, heads, weights, x, x_rows, out, Precision::F32)
        .map_err(|e| kernel_error(path, e))
}

fn f32_rows(values: &[f32], rows: usize, cols: usize) -> Result<WeightRows<'_>, LinearError> {
    WeightRows::new(
        ktx_gguf::GgmlType::F32,
        rows,
        cols,
        bytemuck::cast_slice(values),
    )
}

/// `[rows, cols]` to `[cols, rows]`.
fn transposed(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let turned = (0..cols).flat_map(|c| (0..rows).map(move |r| r * cols + c));
    turned.map(|i| values[i]).collect()
}

/// B's key rows of each head, `[nope, rank]`, as `[rank, nope]`.
fn transposed_keys(b: &[f32], rank: usize, spec: &MlaSpec) -> Vec<f32> {
    let (nope, v) = (spec.qk_nope_head_dim, spec.v_head_dim);
    b.chunks_exact((nope + v) * rank)
        .flat_map(|head| transposed(&head[..nope * rank], nope, rank))
        .collect()
}
