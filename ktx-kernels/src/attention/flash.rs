//! Tasks, pieces and the online softmax: everything of attention above the register blocks.

use std::num::NonZeroUsize;
use std::ops::Range;

use super::MlaQuery;
#[cfg(target_arch = "x86_64")]
use super::amx;
use super::buffers::{
    AMX_ROW_TILE, Buffers, Partial, Parts, ROW_TILE, Room, SLOTS_PER_THREAD, TASKS_PER_THREAD,
    rescale, scratch_floats, worker_floats,
};
use super::source::{KvTile, Rows, Source};
use super::tile;
use crate::cpu::IsaLevel;
use crate::disjoint::DisjointMut;
use crate::kv::{KvSlice, PAGE_TOKENS, SequenceKv};
use crate::linear::ProductOrder;
use crate::pool::ThreadPool;

/// Fewest rows of a tile that is made smaller to occupy all threads.
const MIN_ROW_TILE: usize = 4;
/// Positions with a softmax of their own: long enough that merging costs 1 %, short enough that a
/// context of 4,096 occupies 8 threads.
pub(super) const PIECE: usize = 512;
/// Up to so many rows read a page in place; more widen or pack it first. (Rows of F32 at a stride
/// of some KB collide in the first-level cache: packing them gains a fifth on prompts.)
const IN_PLACE_ROWS: usize = 4;
/// Multiply-adds below which the caller works alone: about 5 µs.
const SERIAL_WORK: usize = 100_000;

/// Query rows, each in two parts that lie in buffers of their own.
pub(super) struct Query<'a> {
    parts: [QueryPart<'a>; 2],
}

struct QueryPart<'a> {
    data: &'a [f32],
    offset: usize,
    /// Elements from one (token, head) to the next.
    stride: usize,
    width: usize,
}

impl<'a> Query<'a> {
    /// `[tokens, heads, dim]` in one buffer.
    pub(super) fn packed(data: &'a [f32], dim: usize) -> Self {
        let part = |data, width| QueryPart {
            data,
            offset: 0,
            stride: width,
            width,
        };
        Query {
            parts: [part(data, dim), part(&[], 0)],
        }
    }

    /// The compressed part and the rotated one.
    pub(super) fn mla(query: &MlaQuery<'a>, kv_lora: usize, rope: usize) -> Self {
        let latent = QueryPart {
            data: query.latent,
            offset: 0,
            stride: kv_lora,
            width: kv_lora,
        };
        let rope = QueryPart {
            data: query.rope,
            offset: query.rope_offset,
            stride: query.rope_stride,
            width: rope,
        };
        Query {
            parts: [latent, rope],
        }
    }

    /// Row `index` = token * heads + head, scaled, into `out`.
    fn copy_scaled(&self, index: usize, scale: f32, out: &mut [f32]) {
        let (first, second) = out.split_at_mut(self.parts[0].width);
        for (part, out) in self.parts.iter().zip([first, second]) {
            if part.width == 0 {
                continue;
            }
            let x = &part.data[part.offset + index * part.stride..][..part.width];
            out.iter_mut().zip(x).for_each(|(o, x)| *o = x * scale);
        }
    }
}

/// One call of attention. The entries have checked that everything fits.
pub(super) struct Flash<'a> {
    pub(super) level: IsaLevel,
    pub(super) order: ProductOrder,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) k_dim: usize,
    pub(super) v_dim: usize,
    pub(super) scale: f32,
    /// Latest positions that a query sees, its own included.
    pub(super) window: Option<NonZeroUsize>,
    /// A logit per head in the denominator of the softmax.
    pub(super) sinks: Option<&'a [f32]>,
    pub(super) query: Query<'a>,
    pub(super) source: Source<'a>,
    pub(super) sequences: &'a [SequenceKv<'a>],
}

/// Some query rows of one sequence and one KV head. Row `r` of the pair is token `r / group`,
/// query head `r % group` of the group that shares the KV head.
struct RowTile<'a> {
    sequence: &'a SequenceKv<'a>,
    /// The sequence's first token in the batch.
    batch_token: usize,
    kv_head: usize,
    group: usize,
    first: usize,
    rows: usize,
    window: Option<NonZeroUsize>,
    /// Whether its products are AMX's.
    on_amx: bool,
}

/// The positions that a query at `position` sees.
fn seen(position: usize, window: Option<NonZeroUsize>) -> Range<usize> {
    let end = position + 1;
    window.map_or(0, |window| end.saturating_sub(window.get()))..end
}

/// Numbers of the pieces that hold the positions.
fn pieces(positions: Range<usize>) -> Range<usize> {
    positions.start / PIECE..positions.end.div_ceil(PIECE)
}

impl RowTile<'_> {
    fn position(&self, row: usize) -> usize {
        self.sequence.past + (self.first + row) / self.group
    }

    /// The positions that a row sees.
    fn seen(&self, row: usize) -> Range<usize> {
        seen(self.position(row), self.window)
    }

    /// The positions that any row sees.
    fn visible(&self) -> Range<usize> {
        self.seen(0).start..self.position(self.rows - 1) + 1
    }

    fn pieces(&self) -> Range<usize> {
        pieces(self.visible())
    }

    /// The rows that see some of `keys` positions from `start` on.
    fn rows_at(&self, start: usize, keys: usize) -> Range<usize> {
        let row_at = |position: usize| {
            let token = position.saturating_sub(self.sequence.past);
            let row = token.saturating_mul(self.group);
            row.saturating_sub(self.first).min(self.rows)
        };
        let end = self.window.map_or(self.rows, |window| {
            row_at((start + keys - 1).saturating_add(window.get()))
        });
        row_at(start)..end
    }

    /// Index of a row among the `[tokens, heads]` of the batch.
    fn batch_row(&self, row: usize, heads: usize) -> usize {
        let (token, head) = (
            (self.first + row) / self.group,
            (self.first + row) % self.group,
        );
        (self.batch_token + token) * heads + self.kv_head * self.group + head
    }
}

/// Factor on a row's sums, taken relative to `max`, that makes them shares of the softmax with one
/// more logit.
fn with_sink(max: f32, sum: f32, sink: f32) -> f32 {
    let largest = max.max(sink);
    let keep = rescale(max, largest);
    keep / (sum * keep + rescale(sink, largest))
}

impl Flash<'_> {
    /// Computes all rows into `out` `[tokens, heads, v_dim]`.
    pub(super) fn run(&self, pool: &ThreadPool, out: &mut [f32], scratch: &mut [f32]) {
        let threads = pool.threads();
        let needed = scratch_floats(self.k_dim, self.v_dim, threads);
        assert!(
            scratch.len() >= needed,
            "attention: {} floats of scratch, {needed} needed",
            scratch.len()
        );
        let work = |s: &SequenceKv<'_>| {
            s.tokens * self.visible(s).len() * self.heads * (self.k_dim + self.v_dim)
        };
        let (out, scratch) = (DisjointMut::new(out), DisjointMut::new(scratch));
        if self.sequences.iter().map(work).sum::<usize>() < SERIAL_WORK {
            for index in 0..self.tiles(ROW_TILE) {
                self.whole_tile(ROW_TILE, index, 0, &out, &scratch);
            }
            return;
        }
        let sequences = self.sequences.iter().filter(|s| s.tokens > 0);
        let pieces = sequences.map(|s| pieces(self.visible(s)).len());
        let pieces = pieces.max().unwrap_or(0);
        let tasks = TASKS_PER_THREAD * threads;
        let row_tile = self.row_tile(tasks, pieces);
        let tiles = self.tiles(row_tile);
        if threads > 1 && pieces > 1 && tiles < tasks {
            self.run_split(pool, row_tile, pieces, &out, &scratch);
        } else {
            pool.run_with_worker(tiles, &|index, worker| {
                self.whole_tile(row_tile, index, worker, &out, &scratch);
            });
        }
    }

    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// The positions that any token of a sequence sees.
    fn visible(&self, sequence: &SequenceKv<'_>) -> Range<usize> {
        seen(sequence.past, self.window).start..sequence.len()
    }

    /// Whether a sequence's products are AMX's: where products with weights are not row by row either, so that
    /// what a token gets depends on its phase alone where it must.
    fn on_amx(&self, sequence: &SequenceKv<'_>) -> bool {
        #[cfg(target_arch = "x86_64")]
        let whole = amx::fits(self.k_dim, self.v_dim);
        #[cfg(not(target_arch = "x86_64"))]
        let whole = false;
        whole && self.level == IsaLevel::Amx && !self.order.is_row_by_row(sequence.tokens)
    }

    /// The largest tile with which tiles, or tiles and pieces where these are few, make `tasks` tasks.
    fn row_tile(&self, tasks: usize, pieces: usize) -> usize {
        let mut row_tile = match self.sequences.iter().any(|s| self.on_amx(s)) {
            true => AMX_ROW_TILE,
            false => ROW_TILE,
        };
        while row_tile > ROW_TILE && self.tiles(row_tile) < tasks {
            row_tile /= 2;
        }
        while row_tile > MIN_ROW_TILE && self.tiles(row_tile) * pieces < tasks {
            row_tile /= 2;
        }
        row_tile
    }

    fn tiles_of(&self, sequence: &SequenceKv<'_>, row_tile: usize) -> usize {
        (sequence.tokens * self.group()).div_ceil(row_tile)
    }

    fn tiles(&self, row_tile: usize) -> usize {
        let tiles = |s: &SequenceKv<'_>| self.kv_heads * self.tiles_of(s, row_tile);
        self.sequences.iter().map(tiles).sum()
    }

    /// Tile `index`; those with the longest context of a sequence come first.
    fn tile(&self, row_tile: usize, mut index: usize) -> RowTile<'_> {
        let mut batch_token = 0;
        for sequence in self.sequences {
            let tiles = self.tiles_of(sequence, row_tile);
            if index < tiles * self.kv_heads {
                let first = (tiles - 1 - index / self.kv_heads) * row_tile;
                return RowTile {
                    sequence,
                    batch_token,
                    kv_head: index % self.kv_heads,
                    group: self.group(),
                    first,
                    rows: row_tile.min(sequence.tokens * self.group() - first),
                    window: self.window,
                    on_amx: self.on_amx(sequence),
                };
            }
            index -= tiles * self.kv_heads;
            batch_token += sequence.tokens;
        }
        unreachable!("tile index below the number of tiles")
    }

    /// All pieces of a tile, by one worker.
    fn whole_tile(
        &self,
        row_tile: usize,
        index: usize,
        worker: usize,
        out: &DisjointMut<'_, f32>,
        scratch: &DisjointMut<'_, f32>,
    ) {
        let tile = self.tile(row_tile, index);
        let floats = worker_floats(self.k_dim, self.v_dim);
        // SAFETY: no two tasks run at once with one worker number.
        let memory = unsafe { scratch.part(worker * floats, floats) };
        let (room, v_dim) = (Room::of_worker(), self.v_dim);
        let (total, rest) = memory.split_at_mut(Partial::floats(room, v_dim));
        let (partial, buffers) = rest.split_at_mut(Partial::floats(room, v_dim));
        let mut total = Partial::carve(room, total, tile.rows, v_dim);
        let mut partial = Partial::carve(room, partial, tile.rows, v_dim);
        let mut buffers = Buffers::carve(buffers, self.k_dim, v_dim);
        self.pack_query(&tile, &mut buffers);
        let pieces = tile.pieces();
        self.piece(&tile, pieces.start, &mut buffers, &mut total);
        for piece in pieces.skip(1) {
            self.piece(&tile, piece, &mut buffers, &mut partial);
            total.merge(&partial, self.v_dim);
        }
        self.store(&tile, &total, out);
    }

    /// Few tiles and a long context: waves of (tile, piece) tasks into slots, each followed by a
    /// merge of every tile's slots in ascending order. `pieces` are the most that a tile has.
    fn run_split(
        &self,
        pool: &ThreadPool,
        row_tile: usize,
        pieces: usize,
        out: &DisjointMut<'_, f32>,
        scratch: &DisjointMut<'_, f32>,
    ) {
        let (tiles, threads) = (self.tiles(row_tile), pool.threads());
        let worker_floats = worker_floats(self.k_dim, self.v_dim);
        let room = Room::of_slot();
        let slot_floats = Partial::floats(room, self.v_dim);
        let totals = threads * worker_floats;
        let slots = totals + TASKS_PER_THREAD * threads * slot_floats;
        let wave = SLOTS_PER_THREAD * threads / tiles;
        for start in (0..pieces).step_by(wave) {
            let count = wave.min(pieces - start);
            pool.run_with_worker(tiles * count, &|task, worker| {
                let tile = self.tile(row_tile, task % tiles);
                let Some(piece) = tile.pieces().nth(start + task / tiles) else {
                    return;
                };
                // SAFETY: no two tasks run at once with one worker number.
                let memory = unsafe { scratch.part(worker * worker_floats, worker_floats) };
                let mut buffers = Buffers::carve(memory, self.k_dim, self.v_dim);
                // SAFETY: every task has a slot of its own.
                let slot = unsafe { scratch.part(slots + task * slot_floats, slot_floats) };
                let mut slot = Partial::carve(room, slot, tile.rows, self.v_dim);
                self.pack_query(&tile, &mut buffers);
                self.piece(&tile, piece, &mut buffers, &mut slot);
            });
            pool.run(tiles, &|index| {
                let tile = self.tile(row_tile, index);
                // SAFETY: every tile has a total of its own.
                let total = unsafe { scratch.part(totals + index * slot_floats, slot_floats) };
                for i in 0..count.min(tile.pieces().len().saturating_sub(start)) {
                    let slot = slots + (i * tiles + index) * slot_floats;
                    // SAFETY: the slots of a tile are read by its merge alone.
                    let slot = unsafe { scratch.part(slot, slot_floats) };
                    if start + i == 0 {
                        total.copy_from_slice(slot);
                        continue;
                    }
                    let slot = Partial::carve(room, slot, tile.rows, self.v_dim);
                    Partial::carve(room, total, tile.rows, self.v_dim).merge(&slot, self.v_dim);
                }
                if start + count >= pieces {
                    let total = Partial::carve(room, total, tile.rows, self.v_dim);
                    self.store(&tile, &total, out);
                }
            });
        }
    }

    fn pack_query(&self, tile: &RowTile<'_>, buffers: &mut Buffers<'_>) {
        let q = &mut buffers.plain.q[..tile.rows * self.k_dim];
        for (r, row) in q.chunks_exact_mut(self.k_dim).enumerate() {
            let index = tile.batch_row(r, self.heads);
            self.query.copy_scaled(index, self.scale, row);
        }
        #[cfg(target_arch = "x86_64")]
        if let (true, Some(split)) = (tile.on_amx, &mut buffers.split) {
            amx::Split::new(split.q, self.k_dim).set(q);
        }
    }

    fn store(&self, tile: &RowTile<'_>, total: &Partial<'_>, out: &DisjointMut<'_, f32>) {
        let rows = total.acc.chunks_exact(self.v_dim).take(tile.rows);
        for (r, acc) in rows.enumerate() {
            let row = tile.batch_row(r, self.heads);
            // SAFETY: every output row belongs to one tile.
            let out = unsafe { out.part(row * self.v_dim, self.v_dim) };
            let inverse = match self.sinks {
                None => 1.0 / total.sum[r],
                Some(sinks) => with_sink(total.max[r], total.sum[r], sinks[row % self.heads]),
            };
            out.iter_mut().zip(acc).for_each(|(o, a)| *o = a * inverse);
        }
    }

    /// Attention of a tile over the positions of one piece.
    fn piece(
        &self,
        tile: &RowTile<'_>,
        piece: usize,
        buffers: &mut Buffers<'_>,
        result: &mut Partial<'_>,
    ) {
        result.clear();
        let visible = tile.visible();
        let first = visible.start / PAGE_TOKENS * PAGE_TOKENS;
        let end = visible.end.min((piece + 1) * PIECE);
        for start in (first.max(piece * PIECE)..end).step_by(PAGE_TOKENS) {
            let keys = PAGE_TOKENS.min(end - start);
            self.page(tile, start, keys, buffers, result);
        }
    }

    /// One page of a piece: scores, softmax, values.
    fn page(
        &self,
        tile: &RowTile<'_>,
        start: usize,
        keys: usize,
        buffers: &mut Buffers<'_>,
        result: &mut Partial<'_>,
    ) {
        let (k_dim, v_dim) = (self.k_dim, self.v_dim);
        let rows = tile.rows_at(start, keys);
        let kv = self
            .source
            .tile(tile.sequence, start, tile.kv_head, k_dim, v_dim);
        let Parts {
            q,
            k: k_buffer,
            v: v_buffer,
            scores,
        } = &mut buffers.plain;
        let (k, v) = self.operands(kv, keys, rows.len(), tile.on_amx, k_buffer, v_buffer);
        match &mut buffers.split {
            #[cfg(target_arch = "x86_64")]
            Some(split) if tile.on_amx => {
                let q = amx::Split::new(split.q, k_dim);
                amx::scores(&q, rows.clone(), k, keys, split.k, scores);
            }
            _ => {
                let q = &q[rows.start * k_dim..rows.end * k_dim];
                tile::scores(self.level, q, k_dim, k, keys, scores);
            }
        }
        let scores = &mut scores[..rows.len() * PAGE_TOKENS];
        let mut correction = [0.0; AMX_ROW_TILE];
        for (i, (r, row)) in rows.clone().zip(scores.chunks_mut(PAGE_TOKENS)).enumerate() {
            let seen = tile.seen(r);
            let (row, later) = row[..keys].split_at_mut(keys.min(seen.end - start));
            let (earlier, seen) = row.split_at_mut(seen.start.saturating_sub(start));
            let (max, sum) = tile::exp_row(self.level, seen, result.max[r]);
            let factor = rescale(result.max[r], max);
            result.max[r] = max;
            result.sum[r] = result.sum[r] * factor + sum;
            earlier.fill(0.0);
            later.fill(0.0);
            correction[i] = factor;
        }
        let acc = &mut result.acc[rows.start * v_dim..];
        match &mut buffers.split {
            #[cfg(target_arch = "x86_64")]
            Some(split) if tile.on_amx => {
                for (acc, factor) in acc.chunks_exact_mut(v_dim).zip(&correction[..rows.len()]) {
                    if *factor != 1.0 {
                        acc.iter_mut().for_each(|x| *x *= factor);
                    }
                }
                let mut weights = amx::Split::new(split.scores, PAGE_TOKENS);
                weights.set(scores);
                amx::add_values(&weights, rows.len(), v, keys, split.v, acc, v_dim);
            }
            _ => {
                let acc = &mut acc[..rows.len() * v_dim];
                tile::add_values(self.level, scores, &correction, v, keys, acc, v_dim);
            }
        }
    }

    /// The matrices to multiply with: in place, or packed in single precision where enough rows
    /// share them.
    fn operands<'t>(
        &self,
        tile: KvTile<'t>,
        keys: usize,
        rows: usize,
        on_amx: bool,
        k_buffer: &'t mut [f32],
        v_buffer: &'t mut [f32],
    ) -> (Rows<'t>, Rows<'t>) {
        let in_place = |x: Rows<'_>, dim: usize| match (on_amx, x.data) {
            (true, KvSlice::F32(_)) => true,
            (true, _) => false,
            (false, KvSlice::F32(_)) => x.stride == dim || rows <= IN_PLACE_ROWS,
            (false, _) => rows <= IN_PLACE_ROWS,
        };
        let k = self.operand(
            tile.k,
            keys,
            self.k_dim,
            in_place(tile.k, self.k_dim),
            k_buffer,
        );
        let v = match tile.v {
            Some(v) => self.operand(v, keys, self.v_dim, in_place(v, self.v_dim), v_buffer),
            None => k,
        };
        (k, v)
    }

    fn operand<'t>(
        &self,
        x: Rows<'t>,
        keys: usize,
        dim: usize,
        in_place: bool,
        buffer: &'t mut [f32],
    ) -> Rows<'t> {
        if in_place {
            return x;
        }
        tile::widen(self.level, x, keys, dim, buffer);
        Rows {
            data: KvSlice::F32(buffer),
            stride: dim,
        }
    }
}
