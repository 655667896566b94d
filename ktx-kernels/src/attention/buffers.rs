//! What the tasks of attention work in.

#[cfg(target_arch = "x86_64")]
use super::amx;
use crate::cpu::IsaLevel;
use crate::kv::PAGE_TOKENS;

/// Most query rows of a tile, and of a task with a piece alone: 32 rows of 576 and their 512 wide sums take
/// 140 KB, beside the 147 KB of a widened page of MLA rows.
pub(super) const ROW_TILE: usize = 32;
/// Most rows of a tile on AMX, where a page is packed for all of them: packing costs what multiplying it with 25 rows
/// does.
pub(super) const AMX_ROW_TILE: usize = 128;
/// Tasks per thread below which pieces become tasks of their own.
pub(super) const TASKS_PER_THREAD: usize = 2;
/// Results of pieces that are kept between two merges, per thread.
pub(super) const SLOTS_PER_THREAD: usize = 4;

/// Rows that buffers have room for, and those behind them that whole blocks on AMX touch.
#[derive(Clone, Copy)]
pub(super) struct Room {
    pub(super) rows: usize,
    pub(super) behind: usize,
}

impl Room {
    /// Of a worker's buffers, on any level that this CPU has.
    pub(super) fn of_worker() -> Self {
        match IsaLevel::Amx.is_supported() {
            true => Self::with_blocks(AMX_ROW_TILE),
            false => Self::of_slot(),
        }
    }

    /// Of the result of one tile over one piece.
    pub(super) fn of_slot() -> Self {
        match IsaLevel::Amx.is_supported() {
            true => Self::with_blocks(ROW_TILE),
            false => Self {
                rows: ROW_TILE,
                behind: 0,
            },
        }
    }

    #[cfg(target_arch = "x86_64")]
    const fn with_blocks(rows: usize) -> Self {
        let behind = amx::ROW_BLOCK;
        Self { rows, behind }
    }

    #[cfg(not(target_arch = "x86_64"))]
    const fn with_blocks(rows: usize) -> Self {
        Self { rows, behind: 0 }
    }

    pub(super) fn all(self) -> usize {
        self.rows + self.behind
    }
}

/// Unnormalised result of some rows over some positions.
pub(super) struct Partial<'s> {
    /// Largest score per row.
    pub(super) max: &'s mut [f32],
    /// Sum of the exponentials per row.
    pub(super) sum: &'s mut [f32],
    /// Weighted sums of the values, `[rows, v_dim]`, and behind them what whole blocks touch.
    pub(super) acc: &'s mut [f32],
}

impl<'s> Partial<'s> {
    pub(super) fn floats(room: Room, v_dim: usize) -> usize {
        2 * room.rows + room.all() * v_dim
    }

    pub(super) fn carve(room: Room, memory: &'s mut [f32], rows: usize, v_dim: usize) -> Self {
        let (max, rest) = memory.split_at_mut(room.rows);
        let (sum, acc) = rest.split_at_mut(room.rows);
        Partial {
            max: &mut max[..rows],
            sum: &mut sum[..rows],
            acc: &mut acc[..(rows + room.behind) * v_dim],
        }
    }

    pub(super) fn clear(&mut self) {
        self.max.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
        self.acc.fill(0.0);
    }

    /// Adds the result over the positions that follow.
    pub(super) fn merge(&mut self, next: &Partial<'_>, v_dim: usize) {
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
pub(super) fn rescale(old: f32, new: f32) -> f32 {
    if old == new { 1.0 } else { (old - new).exp() }
}

/// What a task works in.
pub(super) struct Buffers<'s> {
    pub(super) plain: Parts<'s>,
    /// The same split in two for AMX, where this CPU has it: query rows, keys, values, and weights.
    pub(super) split: Option<Parts<'s>>,
}

pub(super) struct Parts<'s> {
    pub(super) q: &'s mut [f32],
    pub(super) k: &'s mut [f32],
    pub(super) v: &'s mut [f32],
    pub(super) scores: &'s mut [f32],
}

impl<'s> Parts<'s> {
    pub(super) fn floats(k_dim: usize, v_dim: usize) -> usize {
        Room::of_worker().all() * (k_dim + PAGE_TOKENS) + PAGE_TOKENS * (k_dim + v_dim)
    }

    pub(super) fn carve(memory: &'s mut [f32], k_dim: usize, v_dim: usize) -> Self {
        let rows = Room::of_worker().all();
        let (q, rest) = memory.split_at_mut(rows * k_dim);
        let (scores, rest) = rest.split_at_mut(rows * PAGE_TOKENS);
        let (k, rest) = rest.split_at_mut(PAGE_TOKENS * k_dim);
        let v = &mut rest[..PAGE_TOKENS * v_dim];
        Parts { q, k, v, scores }
    }
}

impl<'s> Buffers<'s> {
    pub(super) fn floats(k_dim: usize, v_dim: usize) -> usize {
        let copies = 1 + usize::from(IsaLevel::Amx.is_supported());
        copies * Parts::floats(k_dim, v_dim)
    }

    pub(super) fn carve(memory: &'s mut [f32], k_dim: usize, v_dim: usize) -> Self {
        let (plain, rest) = memory.split_at_mut(Parts::floats(k_dim, v_dim));
        let amx = IsaLevel::Amx.is_supported();
        Buffers {
            plain: Parts::carve(plain, k_dim, v_dim),
            split: amx.then(|| Parts::carve(rest, k_dim, v_dim)),
        }
    }
}

/// Floats of one worker: its buffers and the results of a piece and of a tile.
pub(super) fn worker_floats(k_dim: usize, v_dim: usize) -> usize {
    Buffers::floats(k_dim, v_dim) + 2 * Partial::floats(Room::of_worker(), v_dim)
}

/// Floats that [`Flash::run`] needs on a pool of `threads`.
pub(super) fn scratch_floats(k_dim: usize, v_dim: usize, threads: usize) -> usize {
    let shared = SLOTS_PER_THREAD + TASKS_PER_THREAD;
    threads * (worker_floats(k_dim, v_dim) + shared * Partial::floats(Room::of_slot(), v_dim))
}
