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
pub mod cuda;
mod error;
mod experts;
#[cfg(test)]
mod gpu_tests;
pub mod hot;
mod popularity;
#[cfg(test)]
mod reference;
mod scratch;
mod staging;
pub mod stream;
#[cfg(test)]
mod tests;
mod tiled;

use std::cell::RefCell;
use std::ops::Range;

pub use error::MoeError;
pub use experts::{ExpertBiases, ExpertStack, MoeWeights};
pub use scratch::MoeScratch;

use crate::activation::gated_at;
use crate::cpu::{self, IsaLevel};
use crate::disjoint::DisjointMut;
use crate::linear::tiles::{Part, TILE, TileWriter, TokenTiles, rows_per_job};
use crate::linear::{
    ActivationWriter, Activations, OutputPointer, Precision, SCALE_COLS, Span, WeightRows, kernels,
};
use crate::pool::ThreadPool;
use scratch::{Group, Plan};

/// Rows of gate, of up and of down that a task multiplies: a block of the activations.
const TASK_ROWS: usize = SCALE_COLS;
/// Most rows of gate and of up that a task multiplies in tiles.
const MAX_TILED_ROWS: usize = 128;
/// Tokens whose results a task holds at a time. More tokens of one expert expand its weights
/// again, which at 256 is a few hundredths of the work.
const TILE_TOKENS: usize = 256;
/// Bytes of down that one task reads for few tokens, over all experts: with 48 KiB, reading reached 82 GB/s, with
/// 96 KiB 90.
const ROW_TASK_BYTES: usize = 96 << 10;
/// Rows of down that a task has at least: fewer are too short a piece of each expert to be read fast.
const MIN_TASK_ROWS: usize = 8;
/// Tasks for each thread, so that a slow one does not hold the others for long.
const MIN_THREAD_TASKS: usize = 8;

/// Which experts work on which tokens.
#[derive(Debug, Clone, Copy)]
pub struct Routing<'a> {
    /// Expert numbers, `[tokens, top_k]`; with [`ELSEWHERE`] set, a choice adds nothing.
    pub ids: &'a [u32],
    /// Their weights, `[tokens, top_k]`.
    pub weights: &'a [f32],
    /// Experts per token.
    pub top_k: usize,
    /// Choices of experts before this one add nothing: they are computed elsewhere.
    pub first_expert: usize,
}

/// Set in the choice of an expert that adds nothing here, since it is computed elsewhere.
pub const ELSEWHERE: u32 = 1 << 31;

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
    scratch
        .plan
        .make(&routing, experts.experts(), pool.product_order())?;
    let MoeScratch {
        x: x_rows,
        h: h_rows,
        x_tiles,
        h_tiles,
        plan,
    } = scratch;
    let layer = Layer {
        level,
        pool,
        experts,
        plan,
        gate_up_tiled: experts.gate.takes_tiles(level, precision)
            && experts.up.takes_tiles(level, precision),
        down_tiled: experts.down.takes_tiles(level, precision),
    };
    layer.take_tokens(x, precision, x_rows, x_tiles);
    layer.make_room(routing.ids.len(), precision, h_rows, h_tiles);
    h_rows.set_order(x_rows.order());

    let rows = layer.gate_up_rows();
    let blocks = experts.intermediate_size().div_ceil(rows);
    let h = Intermediate {
        rows: h_rows.writer(),
        tiles: h_tiles.writer(),
    };
    let place = |task: usize| (plan.groups[task / blocks], task % blocks * rows);
    pool.run_ahead(plan.groups.len() * blocks, &|task, next| {
        let (group, row) = place(task);
        let next = next
            .map(place)
            .map(|(group, row)| expert(&experts.gate, group).bytes_from(row));
        match group.tile {
            Some(tile) if layer.gate_up_tiled => {
                layer.gate_up_tiles(x_tiles, group, tile, row, rows, &h);
            }
            _ => layer.gate_up(x_rows, group, row, rows, &h, next.unwrap_or_default()),
        }
    });

    let rows = layer.down_rows();
    let out = DisjointMut::new(out);
    pool.run_ahead(experts.hidden_size().div_ceil(rows), &|task, next| {
        let next = plan.groups.first().zip(next);
        let next = next.map(|(group, next)| expert(&experts.down, *group).bytes_from(next * rows));
        let rows = task * rows..experts.hidden_size().min((task + 1) * rows);
        let next = next.unwrap_or_default();
        layer.down(h_rows, h_tiles, rows, tokens, &out, next);
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
    /// Whether groups of many tokens are multiplied in tiles with gate and up, and with down.
    gate_up_tiled: bool,
    down_tiled: bool,
}

/// Where gate and up leave what down reads.
struct Intermediate {
    rows: ActivationWriter,
    tiles: TileWriter,
}

impl Layer<'_> {
    /// Takes the tokens in the forms that gate and up read.
    fn take_tokens(
        &self,
        x: &[f32],
        precision: Precision,
        rows: &mut Activations,
        tiles: &mut TokenTiles,
    ) {
        let hidden = self.experts.hidden_size();
        let tokens = x.len().checked_div(hidden).unwrap_or(0);
        let (gate, up) = (&self.experts.gate, &self.experts.up);
        let mut forms = gate.forms(precision).and(up.forms(precision));
        forms.codes &= !(self.gate_up_tiled && self.plan.is_tiled());
        rows.fill_rows(self.level, self.pool, x, [tokens, hidden], forms);
        if self.gate_up_tiled && !self.plan.is_row_by_row() {
            tiles.resize(self.plan.tiles.len(), hidden);
            let tokens_of = |tile: usize| {
                let (slot, len) = self.plan.tiles[tile];
                &self.plan.tokens[slot..slot + len]
            };
            // SAFETY: the CPU supports the level, which has tiles.
            unsafe { tiles.fill(self.pool, x, hidden, Part::First, tokens_of) };
        }
    }

    /// Makes room for what gate and up give to down.
    fn make_room(
        &self,
        slots: usize,
        precision: Precision,
        rows: &mut Activations,
        tiles: &mut TokenTiles,
    ) {
        let intermediate = self.experts.intermediate_size();
        let mut forms = self.experts.down.forms(precision);
        forms.codes &= !(self.down_tiled && self.plan.is_tiled());
        rows.resize(slots, intermediate, forms);
        if self.down_tiled {
            tiles.resize(self.plan.tiles.len(), intermediate);
        }
    }

    /// Rows `row..row + rows` of gate and up for one expert's tokens, activated, in the form that down reads; this
    /// thread reads `next` then.
    fn gate_up(
        &self,
        x: &Activations,
        group: Group,
        row: usize,
        rows: usize,
        out: &Intermediate,
        next: &[u8],
    ) {
        let end = self.experts.intermediate_size().min(row + rows);
        for row in (row..end).step_by(TASK_ROWS) {
            let next = match row + TASK_ROWS < end {
                true => expert(&self.experts.gate, group).bytes_from(row + TASK_ROWS),
                false => next,
            };
            self.gate_up_block(x, group, row, TASK_ROWS.min(end - row), out, next);
        }
    }

    fn gate_up_block(
        &self,
        x: &Activations,
        group: Group,
        row: usize,
        rows: usize,
        out: &Intermediate,
        next: &[u8],
    ) {
        let (gate, up) = (&self.experts.gate, &self.experts.up);
        let (gate, up) = (expert(gate, group), expert(up, group));
        let first = group.expert * gate.rows() + row;
        let tokens = &self.plan.tokens[group.first..][..group.len];
        with_tiles(|[gate_tile, up_tile, h_tile]| {
            for (part, tokens) in tokens.chunks(TILE_TOKENS).enumerate() {
                let span = |w, next| Span {
                    w,
                    row,
                    rows,
                    x,
                    tokens,
                    next,
                };
                let len = tokens.len() * rows;
                self.multiply(&span(gate, up.bytes_from(row)), gate_tile, rows);
                self.multiply(&span(up, next), up_tile, rows);
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
                self.keep(group, part * TILE_TOKENS, row, rows, h, out);
            }
        });
    }

    /// Leaves `h` `[tokens, rows]`, for the group's tokens from `first` on, where down finds it.
    fn keep(
        &self,
        group: Group,
        first: usize,
        row: usize,
        rows: usize,
        h: &[f32],
        out: &Intermediate,
    ) {
        if let (Some(tile), true) = (group.tile, self.down_tiled) {
            for (index, values) in h.chunks(rows * TILE).enumerate() {
                let mut tokens: [&[f32]; TILE] = [&[]; TILE];
                let len = values.len() / rows;
                for (token, values) in tokens.iter_mut().zip(values.chunks_exact(rows)) {
                    *token = values;
                }
                let tile = tile + first / TILE + index;
                // SAFETY: the buffer has the group's tiles and `intermediate_size` columns; no other task has this
                // expert's tiles and these 32 columns. The CPU supports the level, which has tiles.
                unsafe {
                    out.tiles.pack(tile, row / TASK_ROWS, &tokens[..len], 0);
                }
            }
            return;
        }
        for (index, values) in h.chunks_exact(rows).enumerate() {
            let slot = group.first + first + index;
            // SAFETY: the buffer has a row per slot and `intermediate_size` columns; no
            // other task has this expert's slots and these 32 columns.
            unsafe { out.rows.write(self.level, slot, row, values) };
        }
    }

    /// Some rows of the output for all tokens; this thread reads `next` then.
    fn down(
        &self,
        h: &Activations,
        h_tiles: &TokenTiles,
        Range { start: row, end }: Range<usize>,
        tokens: usize,
        out: &DisjointMut<'_, f32>,
        next: &[u8],
    ) {
        let hidden = self.experts.hidden_size();
        for token in 0..tokens {
            // SAFETY: tasks have rows of their own, and the part is not kept.
            unsafe { out.part(token * hidden + row, end - row) }.fill(0.0);
        }
        for (index, group) in self.plan.groups.iter().enumerate() {
            match group.tile {
                Some(tile) if self.down_tiled => {
                    self.down_tiles(h_tiles, *group, tile, row..end, out);
                }
                _ => {
                    let next = match self.plan.groups.get(index + 1) {
                        Some(next) => expert(&self.experts.down, *next).bytes_from(row),
                        None => next,
                    };
                    for row in (row..end).step_by(TASK_ROWS) {
                        let rows = TASK_ROWS.min(end - row);
                        let next = match row + rows < end {
                            true => expert(&self.experts.down, *group).bytes_from(row + rows),
                            false => next,
                        };
                        self.down_block(h, *group, row, rows, out, next);
                    }
                }
            }
        }
    }

    /// Adds one expert's part of some rows of the output.
    fn down_block(
        &self,
        h: &Activations,
        group: Group,
        row: usize,
        rows: usize,
        out: &DisjointMut<'_, f32>,
        next: &[u8],
    ) {
        let hidden = self.experts.hidden_size();
        // SAFETY: tasks have rows of their own, and a part is not kept beyond its statement.
        let part = |token: usize| unsafe { out.part(token * hidden + row, rows) };
        let first_bias = group.expert * hidden + row;
        let bias = self.experts.biases;
        let bias = bias.map(|biases| &biases.down[first_bias..first_bias + rows]);
        let w = expert(&self.experts.down, group);
        with_tiles(|[tile, ..]| {
            for first in (group.first..group.first + group.len).step_by(TILE_TOKENS) {
                let slots = first..(group.first + group.len).min(first + TILE_TOKENS);
                let tokens = &h.all_tokens()[slots.clone()];
                let span = Span {
                    w,
                    row,
                    rows,
                    x: h,
                    tokens,
                    next,
                };
                self.multiply(&span, tile, rows);
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
        });
    }

    /// Rows of gate and of up per task.
    fn gate_up_rows(&self) -> usize {
        if !self.gate_up_tiled || self.plan.is_row_by_row() {
            return TASK_ROWS;
        }
        let rows = self.experts.intermediate_size() * self.plan.groups.len();
        (rows / (self.pool.threads() * 8))
            .next_multiple_of(TASK_ROWS)
            .clamp(TASK_ROWS, MAX_TILED_ROWS)
    }

    /// Rows of down per task: whole panels for many tokens, by bytes for few.
    fn down_rows(&self) -> usize {
        if !self.plan.is_row_by_row() {
            return match self.down_tiled {
                true => rows_per_job(self.experts.hidden_size(), self.pool.threads()),
                false => TASK_ROWS,
            };
        }
        let bytes = |group: &Group| {
            self.experts
                .down
                .expert(group.expert)
                .map_or(0, |w: WeightRows<'_>| w.row_bytes())
        };
        let row_bytes: usize = self.plan.groups.iter().map(bytes).sum();
        let by_bytes = ROW_TASK_BYTES / row_bytes.max(1);
        let by_threads = self.experts.hidden_size() / (self.pool.threads() * MIN_THREAD_TASKS);
        by_bytes.min(by_threads).clamp(MIN_TASK_ROWS, TASK_ROWS)
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

/// The group's expert of a projection.
fn expert<'a>(stack: &ExpertStack<'a>, group: Group) -> WeightRows<'a> {
    let Some(w) = stack.expert(group.expert) else {
        unreachable!("the plan holds experts that exist")
    };
    w
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
