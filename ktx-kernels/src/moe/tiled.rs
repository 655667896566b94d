//! The tasks of experts that have many tokens, on a CPU with tiles: as [`super`] describes, with products whose sums
//! are `[row][token]`. Gate's and up's are activated as they lie, and become the columns of what down reads.

use std::ops::Range;

use super::scratch::Group;
use super::{Intermediate, Layer, expert};
use crate::activation::gated_at;
use crate::disjoint::DisjointMut;
use crate::linear::tiles::{
    self, GROUP_ROWS, MAX_JOB_TOKENS, Sums, TILE, TileJob, TokenTiles, with_tile_scratch,
};

/// Values of a tile of the intermediate activations: 32 columns, 16 tokens.
const BLOCK: usize = GROUP_ROWS * TILE;

impl Layer<'_> {
    /// As [`Layer::gate_up`], in tiles, of which the group's first is number `tile`.
    pub(super) fn gate_up_tiles(
        &self,
        x: &TokenTiles,
        group: Group,
        tile: usize,
        row: usize,
        rows: usize,
        out: &Intermediate,
    ) {
        let rows = rows.min(self.experts.intermediate_size() - row);
        let job = |stack, first: usize| TileJob {
            w: expert(stack, group),
            row,
            rows,
            x,
            x_rest: None,
            group: tile + first / TILE,
            tokens: MAX_JOB_TOKENS.min(group.len - first),
        };
        with_tile_scratch(|scratch| {
            for first in (0..group.len).step_by(MAX_JOB_TOKENS) {
                let gate = job(&self.experts.gate, first);
                let up = job(&self.experts.up, first);
                // SAFETY: the CPU supports the level, which has tiles.
                unsafe {
                    tiles::multiply(&gate, scratch, 0);
                    tiles::multiply(&up, scratch, 1);
                }
                let (gate_sums, up_sums) = (scratch.sums(0, &gate), scratch.sums(1, &up));
                for block in 0..rows.div_ceil(GROUP_ROWS) {
                    for tokens in 0..gate.token_tiles() {
                        let mut h = [0.0; BLOCK];
                        self.activate(group, row, block, tokens, [gate_sums, up_sums], &mut h);
                        let rows = GROUP_ROWS.min(rows - block * GROUP_ROWS);
                        let row = row + block * GROUP_ROWS;
                        self.keep_tile(group, first + tokens * TILE, row, rows, &h, out);
                    }
                }
            }
        });
    }

    /// The activated values `[row][token]` of 32 rows and 16 tokens.
    fn activate(
        &self,
        group: Group,
        row: usize,
        block: usize,
        tokens: usize,
        [gate, up]: [Sums<'_>; 2],
        h: &mut [f32; BLOCK],
    ) {
        let intermediate = self.experts.intermediate_size();
        for (half, h) in h.chunks_exact_mut(TILE * TILE).enumerate() {
            let (mut gate, mut up) = (
                *gate.tile(2 * block + half, tokens),
                *up.tile(2 * block + half, tokens),
            );
            if let Some(biases) = &self.experts.biases {
                let row = row + block * GROUP_ROWS + half * TILE;
                let rows = row.min(intermediate)..(row + TILE).min(intermediate);
                let first = group.expert * intermediate;
                let rows = first + rows.start..first + rows.end;
                add_to_columns(&mut gate, &biases.gate[rows.clone()]);
                add_to_columns(&mut up, &biases.up[rows]);
            }
            gated_at(
                self.level,
                self.pool,
                self.experts.activation,
                &gate,
                &up,
                h,
            );
        }
    }

    /// Leaves values `[row][token]`, for the group's tokens from `first` on, where down finds them.
    fn keep_tile(
        &self,
        group: Group,
        first: usize,
        row: usize,
        rows: usize,
        h: &[f32; BLOCK],
        out: &Intermediate,
    ) {
        if let (Some(tile), true) = (group.tile, self.down_tiled) {
            // SAFETY: the buffer has the group's tiles and `intermediate_size` columns, whole blocks of 32; no other
            // task has this expert's tiles and these columns. The CPU supports the level, which has tiles.
            return unsafe {
                out.tiles
                    .pack_sums(tile + first / TILE, row / GROUP_ROWS, h)
            };
        }
        let mut values = [0.0; GROUP_ROWS];
        for token in 0..TILE.min(group.len - first) {
            for (value, row) in values.iter_mut().zip(h.chunks_exact(TILE)) {
                *value = row[token];
            }
            let slot = group.first + first + token;
            // SAFETY: the buffer has a row per slot and `intermediate_size` columns; no other task has this expert's
            // slots and these 32 columns.
            unsafe { out.rows.write(self.level, slot, row, &values[..rows]) };
        }
    }

    /// Adds one expert's part of some rows of the output, in tiles, of which the group's first is number `tile`.
    pub(super) fn down_tiles(
        &self,
        h: &TokenTiles,
        group: Group,
        tile: usize,
        rows: Range<usize>,
        out: &DisjointMut<'_, f32>,
    ) {
        let w = expert(&self.experts.down, group);
        with_tile_scratch(|scratch| {
            for first in (0..group.len).step_by(MAX_JOB_TOKENS) {
                let job = TileJob {
                    w,
                    row: rows.start,
                    rows: rows.len(),
                    x: h,
                    x_rest: None,
                    group: tile + first / TILE,
                    tokens: MAX_JOB_TOKENS.min(group.len - first),
                };
                // SAFETY: the CPU supports the level, which has tiles.
                unsafe { tiles::multiply(&job, scratch, 0) };
                self.add_sums(group, group.first + first, &job, scratch.sums(0, &job), out);
            }
        });
    }

    /// Adds the sums of a job, for slots from `first` on, to the output.
    fn add_sums(
        &self,
        group: Group,
        first: usize,
        job: &TileJob<'_>,
        sums: Sums<'_>,
        out: &DisjointMut<'_, f32>,
    ) {
        let hidden = self.experts.hidden_size();
        for row in (0..job.rows).step_by(TILE) {
            let rows = TILE.min(job.rows - row);
            let out_row = job.row + row;
            let first_bias = group.expert * hidden + out_row;
            let bias = self.experts.biases;
            let bias = bias.map(|biases| &biases.down[first_bias..first_bias + rows]);
            for token in (0..job.tokens).step_by(TILE) {
                let slots = first + token..first + job.tokens.min(token + TILE);
                let (tokens, weights) =
                    (&self.plan.tokens[slots.clone()], &self.plan.weights[slots]);
                let mut outs = [std::ptr::null_mut(); TILE];
                for (place, token) in outs.iter_mut().zip(tokens) {
                    let at = *token as usize * hidden + out_row;
                    // SAFETY: tasks have rows of their own, and the part is not kept as a slice.
                    *place = unsafe { out.part(at, rows) }.as_mut_ptr();
                }
                let (tile, outs) = (sums.tile(row / TILE, token / TILE), &outs[..tokens.len()]);
                // SAFETY: each part has `rows` values, and the CPU supports the level, which has tiles.
                unsafe { tiles::add_weighted(tile, rows, bias, outs, weights) };
            }
        }
    }
}

/// Adds each row's bias to the tokens of a tile `[row][token]`.
fn add_to_columns(tile: &mut [f32; TILE * TILE], bias: &[f32]) {
    for (row, bias) in tile.chunks_exact_mut(TILE).zip(bias) {
        row.iter_mut().for_each(|x| *x += bias);
    }
}
