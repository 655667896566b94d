//! Tasks, pieces and the online softmax: everything of attention above the register blocks.

use std::num::NonZeroUsize;
use std::ops::Range;

use super::MlaQuery;
use super::source::{KvTile, Rows, Source};
use super::tile;
use crate::cpu::IsaLevel;
use crate::disjoint::DisjointMut;
use crate::kv::{KvSlice, PAGE_TOKENS, SequenceKv};
use crate::pool::ThreadPool;

/// Most query rows of a tile: 32 rows of 576 and their 512 wide sums take 140 KB, beside the
/// 147 KB of a widened page of MLA rows.
pub(super) const ROW_TILE: usize = 32;
/// Fewest rows of a tile that is made smaller to occupy all threads.
const MIN_ROW_TILE: usize = 4;
/// Positions with a softmax of their own: long enough that merging costs 1 %, short enough that a
/// context of 4,096 occupies 8 threads.
pub(super) const PIECE: usize = 512;
/// Up to so many rows read a page in place; more widen or pack it first. (Rows of F32 at a stride
/// of some KB collide in the first-level cache: packing them gains a fifth on prompts.)
const IN_PLACE_ROWS: usize = 4;
/// Tasks per thread below which pieces become tasks of their own.
const TASKS_PER_THREAD: usize = 2;
/// Results of pieces that are kept between two merges, per thread.
const SLOTS_PER_THREAD: usize = 4;
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

/// Unnormalised result of some rows over some positions.
struct Partial<'s> {
    /// Largest score per row.
    max: &'s mut [f32],
    /// Sum of the exponentials per row.
    sum: &'s mut [f32],
    /// Weighted sums of the values, `[rows, v_dim]`.
    acc: &'s mut [f32],
}

impl<'s> Partial<'s> {
    const fn floats(v_dim: usize) -> usize {
        ROW_TILE * (2 + v_dim)
    }

    fn carve(memory: &'s mut [f32], rows: usize, v_dim: usize) -> Self {
        let (max, rest) = memory.split_at_mut(ROW_TILE);
        let (sum, acc) = rest.split_at_mut(ROW_TILE);
        Partial {
            max: &mut max[..rows],
            sum: &mut sum[..rows],
            acc: &mut acc[..rows * v_dim],
        }
    }

    fn clear(&mut self) {
        self.max.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
        self.acc.fill(0.0);
    }

    /// Adds the result over the positions that follow.
    fn merge(&mut self, next: &Partial<'_>, v_dim: usize) {
        for r in 0..self.max.len() {
            if next.max[r] == f32::NEG_INFINITY && next.sum[r] == 0.0 {
                continue;
            }
            let max = self.max[r].max(next.max[r]);
            let (keep, add) = (rescale(self.max[r], max), rescale(next.max[r], max));
            self.max[r] = max;
            self.sum[r] = self.sum[r] * keep + next.sum[r] * add;
            let acc = &mut self.acc[r * v_dim..][..v_dim];
            for (a, n) in acc.iter_mut().zip(&next.acc[r * v_dim..]) {
                *a = *a * keep + n * add;
            }
        }
    }
}

/// Factor on what was summed relative to `old` when the maximum becomes `new`.
fn rescale(old: f32, new: f32) -> f32 {
    if old == new { 1.0 } else { (old - new).exp() }
}

/// Factor on a row's sums, taken relative to `max`, that makes them shares of the softmax with one
/// more logit.
fn with_sink(max: f32, sum: f32, sink: f32) -> f32 {
    let largest = max.max(sink);
    let keep = rescale(max, largest);
    keep / (sum * keep + rescale(sink, largest))
}

/// What a task works in.
struct Buffers<'s> {
    q: &'s mut [f32],
    k: &'s mut [f32],
    v: &'s mut [f32],
    scores: &'s mut [f32],
}

impl<'s> Buffers<'s> {
    const fn floats(k_dim: usize, v_dim: usize) -> usize {
        ROW_TILE * (k_dim + PAGE_TOKENS) + PAGE_TOKENS * (k_dim + v_dim)
    }

    fn carve(memory: &'s mut [f32], k_dim: usize, v_dim: usize) -> Self {
        let (q, rest) = memory.split_at_mut(ROW_TILE * k_dim);
        let (scores, rest) = rest.split_at_mut(ROW_TILE * PAGE_TOKENS);
        let (k, rest) = rest.split_at_mut(PAGE_TOKENS * k_dim);
        let v = &mut rest[..PAGE_TOKENS * v_dim];
        Buffers { q, k, v, scores }
    }
}

/// Floats of one worker: its buffers and the results of a piece and of a tile.
const fn worker_floats(k_dim: usize, v_dim: usize) -> usize {
    Buffers::floats(k_dim, v_dim) + 2 * Partial::floats(v_dim)
}

/// Floats that [`Flash::run`] needs on a pool of `threads`.
pub(super) const fn scratch_floats(k_dim: usize, v_dim: usize, threads: usize) -> usize {
    let shared = SLOTS_PER_THREAD + TASKS_PER_THREAD;
    threads * (worker_floats(k_dim, v_dim) + shared * Partial::floats(v_dim))
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
        let row_tile = self.row_tile(TASKS_PER_THREAD * threads, pieces);
        let tiles = self.tiles(row_tile);
        if threads > 1 && pieces > 1 && tiles < TASKS_PER_THREAD * threads {
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

    /// The largest tile with which tiles and pieces make `tasks` tasks.
    fn row_tile(&self, tasks: usize, pieces: usize) -> usize {
        let mut row_tile = ROW_TILE;
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
        let (total, rest) = memory.split_at_mut(Partial::floats(self.v_dim));
        let (partial, buffers) = rest.split_at_mut(Partial::floats(self.v_dim));
        let mut total = Partial::carve(total, tile.rows, self.v_dim);
        let mut partial = Partial::carve(partial, tile.rows, self.v_dim);
        let mut buffers = Buffers::carve(buffers, self.k_dim, self.v_dim);
        self.pack_query(&tile, buffers.q);
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
        let slot_floats = Partial::floats(self.v_dim);
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
                let mut slot = Partial::carve(slot, tile.rows, self.v_dim);
                self.pack_query(&tile, buffers.q);
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
                    let slot = Partial::carve(slot, tile.rows, self.v_dim);
                    Partial::carve(total, tile.rows, self.v_dim).merge(&slot, self.v_dim);
                }
                if start + count >= pieces {
                    self.store(&tile, &Partial::carve(total, tile.rows, self.v_dim), out);
                }
            });
        }
    }

    fn pack_query(&self, tile: &RowTile<'_>, q: &mut [f32]) {
        for (r, row) in q.chunks_exact_mut(self.k_dim).take(tile.rows).enumerate() {
            let index = tile.batch_row(r, self.heads);
            self.query.copy_scaled(index, self.scale, row);
        }
    }

    fn store(&self, tile: &RowTile<'_>, total: &Partial<'_>, out: &DisjointMut<'_, f32>) {
        for (r, acc) in total.acc.chunks_exact(self.v_dim).enumerate() {
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
        let (k, v) = self.operands(kv, keys, rows.len(), buffers.k, buffers.v);
        let q = &buffers.q[rows.start * k_dim..rows.end * k_dim];
        let scores = &mut buffers.scores[..rows.len() * PAGE_TOKENS];
        tile::scores(self.level, q, k_dim, k, keys, scores);
        let mut correction = [0.0; ROW_TILE];
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
        let acc = &mut result.acc[rows.start * v_dim..rows.end * v_dim];
        tile::add_values(self.level, scores, &correction, v, keys, acc, v_dim);
    }

    /// The matrices to multiply with: in place, or packed in single precision where enough rows
    /// share them.
    fn operands<'t>(
        &self,
        tile: KvTile<'t>,
        keys: usize,
        rows: usize,
        k_buffer: &'t mut [f32],
        v_buffer: &'t mut [f32],
    ) -> (Rows<'t>, Rows<'t>) {
        let k = self.operand(tile.k, keys, self.k_dim, rows, k_buffer);
        let v = match tile.v {
            Some(v) => self.operand(v, keys, self.v_dim, rows, v_buffer),
            None => k,
        };
        (k, v)
    }

    fn operand<'t>(
        &self,
        x: Rows<'t>,
        keys: usize,
        dim: usize,
        rows: usize,
        buffer: &'t mut [f32],
    ) -> Rows<'t> {
        let packed = matches!(x.data, KvSlice::F32(_)) && x.stride == dim;
        if packed || rows <= IN_PLACE_ROWS {
            return x;
        }
        tile::widen(self.level, x, keys, dim, buffer);
        Rows {
            data: KvSlice::F32(buffer),
            stride: dim,
        }
    }
}
