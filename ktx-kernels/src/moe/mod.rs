//! The routed experts of one Mixture-of-Experts layer, all in one call:
//! `y[t] = sum over k of weight[t, k] * down_k(silu(gate_k x[t]) * (up_k x[t]))`; projections may
//! have biases, and another gated activation may stand for SwiGLU.
//!
//! Two parallel regions, however many experts and tokens there are:
//! 1. tasks are (expert, 32 rows of gate and up): multiply the expert's tokens with both, apply
//!    the activation, and quantise the 32 results of each token at once, since they are one block of the
//!    activations that down reads;
//! 2. tasks are rows of the output: for the experts in ascending order, multiply their slots with
//!    these rows of down and add the weighted results. An output element belongs to one task and
//!    is added up in the order of expert numbers, so the number of threads changes no bit, and no
//!    buffer of results per slot is needed.
//!
//! For one token it is bound by reading the chosen experts' weights once; for many by
//! multiply-adds, as [`crate::linear`] describes. An expert's group of tokens decides which of
//! the two ways its products take.

#[cfg(test)]
mod cases;
mod error;
mod experts;
#[cfg(test)]
mod reference;
mod scratch;
#[cfg(test)]
mod tests;

use std::cell::RefCell;

pub use error::MoeError;
pub use experts::{ExpertBiases, ExpertStack, MoeWeights};
pub use scratch::MoeScratch;

use crate::activation::gated_at;
use crate::cpu::{self, IsaLevel};
use crate::disjoint::DisjointMut;
use crate::linear::{
    ActivationWriter, Activations, OutputPointer, Precision, SCALE_COLS, Span, WeightRows, kernels,
};
use crate::pool::ThreadPool;
use scratch::{Group, Plan};

/// Rows of gate, of up and of down that a task multiplies: a block of the activations.
const TASK_ROWS: usize = SCALE_COLS;
/// Tokens whose results a task holds at a time. More tokens of one expert expand its weights
/// again, which at 256 is a few hundredths of the work.
const TILE_TOKENS: usize = 256;
/// Bytes of down that one task reads for few tokens, over all experts.
const ROW_TASK_BYTES: usize = 48 << 10;

/// Which experts work on which tokens.
#[derive(Debug, Clone, Copy)]
pub struct Routing<'a> {
    /// Expert numbers, `[tokens, top_k]`.
    pub ids: &'a [u32],
    /// Their weights, `[tokens, top_k]`.
    pub weights: &'a [f32],
    /// Experts per token.
    pub top_k: usize,
}

/// Computes the routed experts for `x` `[tokens, hidden]` and writes (not adds) their weighted
/// sum to `out` `[tokens, hidden]`.
///
/// Allocates nothing once `scratch` has seen a call of this size.
///
/// # Errors
/// [`MoeError`] when lengths disagree or an expert does not exist; `out` is then unchanged.
pub fn forward(
    pool: &ThreadPool,
    experts: &MoeWeights<'_>,
    x: &[f32],
    routing: Routing<'_>,
    out: &mut [f32],
    scratch: &mut MoeScratch,
    precision: Precision,
) -> Result<(), MoeError> {
    forward_at(
        cpu::level(),
        pool,
        experts,
        x,
        routing,
        out,
        scratch,
        precision,
    )
}

#[allow(
    clippy::too_many_arguments,
    reason = "`forward` with the level that tests choose"
)]
pub(crate) fn forward_at(
    level: IsaLevel,
    pool: &ThreadPool,
    experts: &MoeWeights<'_>,
    x: &[f32],
    routing: Routing<'_>,
    out: &mut [f32],
    scratch: &mut MoeScratch,
    precision: Precision,
) -> Result<(), MoeError> {
    let tokens = check_lengths(experts, x, &routing, out)?;
    let MoeScratch {
        x: quantized,
        h,
        plan,
    } = scratch;
    plan.make(&routing, experts.experts())?;
    let forms = experts
        .gate
        .forms(precision)
        .and(experts.up.forms(precision));
    quantized.fill(level, pool, x, [tokens, experts.hidden_size()], forms)?;
    h.resize(
        routing.ids.len(),
        experts.intermediate_size(),
        experts.down.forms(precision),
    );
    h.set_order(quantized.order());

    let layer = Layer {
        level,
        pool,
        experts,
        plan,
    };
    let blocks = experts.intermediate_size().div_ceil(TASK_ROWS);
    let writer = h.writer();
    pool.run(plan.groups.len() * blocks, &|task| {
        let (group, row) = (plan.groups[task / blocks], task % blocks * TASK_ROWS);
        layer.gate_up(quantized, group, row, &writer);
    });

    let rows = layer.down_rows();
    let out = DisjointMut::new(out);
    pool.run(experts.hidden_size().div_ceil(rows), &|task| {
        layer.down(h, task * rows, rows, tokens, &out);
    });
    Ok(())
}

fn check_lengths(
    experts: &MoeWeights<'_>,
    x: &[f32],
    routing: &Routing<'_>,
    out: &[f32],
) -> Result<usize, MoeError> {
    let hidden = experts.hidden_size();
    if !x.is_empty() && (hidden == 0 || !x.len().is_multiple_of(hidden)) {
        return Err(MoeError::InputLength {
            hidden,
            actual: x.len(),
        });
    }
    let tokens = x.len().checked_div(hidden).unwrap_or(0);
    let (ids, weights) = (routing.ids.len(), routing.weights.len());
    if tokens.checked_mul(routing.top_k) != Some(ids) || ids != weights {
        return Err(MoeError::RoutingLength {
            tokens,
            top_k: routing.top_k,
            ids,
            weights,
        });
    }
    if out.len() != x.len() {
        return Err(MoeError::OutputLength {
            expected: x.len(),
            actual: out.len(),
        });
    }
    Ok(tokens)
}

/// What the tasks of one call share.
struct Layer<'a> {
    level: IsaLevel,
    pool: &'a ThreadPool,
    experts: &'a MoeWeights<'a>,
    plan: &'a Plan,
}

impl Layer<'_> {
    /// Rows `row..row + TASK_ROWS` of gate and up for one expert's tokens, activated, quantised.
    fn gate_up(&self, x: &Activations, group: Group, row: usize, writer: &ActivationWriter) {
        let (gate, up) = (&self.experts.gate, &self.experts.up);
        let (Some(gate), Some(up)) = (gate.expert(group.expert), up.expert(group.expert)) else {
            unreachable!("the plan holds experts that exist")
        };
        let rows = TASK_ROWS.min(gate.rows() - row);
        let first = group.expert * gate.rows() + row;
        let tokens = &self.plan.tokens[group.first..][..group.len];
        with_tiles(|[gate_tile, up_tile, h_tile]| {
            for (part, tokens) in tokens.chunks(TILE_TOKENS).enumerate() {
                let span = |w| Span {
                    w,
                    row,
                    rows,
                    x,
                    tokens,
                };
                let len = tokens.len() * rows;
                span(up).prefetch();
                self.multiply(&span(gate), gate_tile, rows);
                self.multiply(&span(up), up_tile, rows);
                // A tile is short enough for the activation to stay on this thread.
                let (gate, up, h) = (
                    &mut gate_tile[..len],
                    &mut up_tile[..len],
                    &mut h_tile[..len],
                );
                if let Some(biases) = &self.experts.biases {
                    add_to_rows(gate, &biases.gate[first..first + rows]);
                    add_to_rows(up, &biases.up[first..first + rows]);
                }
                gated_at(self.level, self.pool, self.experts.activation, gate, up, h);
                for (index, values) in h.chunks_exact(rows).enumerate() {
                    let slot = group.first + part * TILE_TOKENS + index;
                    // SAFETY: the buffer has a row per slot and `intermediate_size` columns; no
                    // other task has this expert's slots and these 32 columns.
                    unsafe { writer.write(self.level, slot, row, values) };
                }
            }
        });
    }

    /// Rows `row..row + rows` of the output for all tokens.
    fn down(
        &self,
        h: &Activations,
        row: usize,
        rows: usize,
        tokens: usize,
        out: &DisjointMut<'_, f32>,
    ) {
        let hidden = self.experts.hidden_size();
        let rows = rows.min(hidden - row);
        // SAFETY: tasks have rows of their own, and a part is not kept beyond its statement.
        let part = |token: usize| unsafe { out.part(token * hidden + row, rows) };
        for token in 0..tokens {
            part(token).fill(0.0);
        }
        with_tiles(|[tile, ..]| {
            for (index, group) in self.plan.groups.iter().enumerate() {
                let next = self.plan.groups.get(index + 1);
                if let Some(w) = next.and_then(|next| self.experts.down.expert(next.expert)) {
                    let tokens = &[];
                    Span {
                        w,
                        row,
                        rows,
                        x: h,
                        tokens,
                    }
                    .prefetch();
                }
                let first_bias = group.expert * hidden + row;
                let bias = self.experts.biases;
                let bias = bias.map(|biases| &biases.down[first_bias..first_bias + rows]);
                let Some(w) = self.experts.down.expert(group.expert) else {
                    unreachable!("the plan holds experts that exist")
                };
                for first in (group.first..group.first + group.len).step_by(TILE_TOKENS) {
                    let slots = first..(group.first + group.len).min(first + TILE_TOKENS);
                    let tokens = &h.all_tokens()[slots.clone()];
                    self.multiply(
                        &Span {
                            w,
                            row,
                            rows,
                            x: h,
                            tokens,
                        },
                        tile,
                        rows,
                    );
                    if let Some(bias) = bias {
                        add_to_rows(&mut tile[..tokens.len() * rows], bias);
                    }
                    for (slot, values) in slots.zip(tile.chunks_exact(rows)) {
                        let weight = self.plan.weights[slot];
                        let sums = part(self.plan.tokens[slot] as usize);
                        for (sum, value) in sums.iter_mut().zip(values) {
                            *sum += weight * value;
                        }
                    }
                }
            }
        });
    }

    /// Rows of down per task: whole panels for many tokens, by bytes for few.
    fn down_rows(&self) -> usize {
        if !self.plan.is_row_by_row(self.pool.product_order()) {
            return TASK_ROWS;
        }
        let bytes = |group: &Group| {
            self.experts
                .down
                .expert(group.expert)
                .map_or(0, |w: WeightRows<'_>| w.row_bytes())
        };
        let row_bytes: usize = self.plan.groups.iter().map(bytes).sum();
        (ROW_TASK_BYTES / row_bytes.max(1)).clamp(1, TASK_ROWS)
    }

    /// Multiplies a span into a tile `[tokens, rows]`.
    fn multiply(&self, span: &Span<'_>, tile: &mut Tile, stride: usize) {
        let Ok(operand) = span.x.operand(span.w.ty()) else {
            unreachable!("the activations were prepared for the types of the weights")
        };
        let kernels = kernels(self.level, span.w.ty(), operand);
        let tile = OutputPointer::new(tile);
        // SAFETY: a tile holds `TILE_TOKENS` tokens of `TASK_ROWS` rows, which no span exceeds;
        // the CPU supports the level.
        unsafe { kernels.multiply(span, tile.add(0), stride) };
    }
}

/// Adds `bias` to every row of a tile `[tokens, bias.len()]`.
fn add_to_rows(tile: &mut [f32], bias: &[f32]) {
    for row in tile.chunks_exact_mut(bias.len()) {
        row.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
    }
}

type Tile = [f32; TILE_TOKENS * TASK_ROWS];

/// Calls `f` with this thread's three tiles, 96 KiB that are allocated once.
fn with_tiles(f: impl FnOnce(&mut [Tile; 3])) {
    thread_local! {
        static TILES: RefCell<Box<[Tile; 3]>> =
            RefCell::new(Box::new([[0.0; TILE_TOKENS * TASK_ROWS]; 3]));
    }
    TILES.with_borrow_mut(|tiles| f(tiles));
}
