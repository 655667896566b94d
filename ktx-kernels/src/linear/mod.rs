//! Product of weights in GGUF blocks `[rows, cols]` with activations `[tokens, cols]`, giving
//! `[tokens, rows]` in `f32`.
//!
//! Weights are read where they lie in the file; nothing is repacked at load. Activations are
//! quantised once ([`Activations::prepare`]) and shared by every product that reads them.
//!
//! Two shapes of work, chosen by the number of tokens:
//! - **few tokens** (generation): bound by reading the weights once from memory. Each thread
//!   takes runs of rows, expands 256 columns at a time in registers or L1, and multiplies them
//!   with all tokens.
//! - **many tokens** (prefill): bound by arithmetic. Each thread takes panels of
//!   16 rows, expands them once per 1,024 columns into L1/L2 scratch with
//!   the rows interleaved, so that vector lanes are output rows and no horizontal sum is needed,
//!   and streams all tokens over it in register tiles.
//!
//! 8-bit floats (E4M3) with a scale for each block of 128 x 128 ([`WeightRows::fp8`]) are widened to `f32` on the way,
//! as F16 and BF16 weights are, and their activations are never quantised.
//!
//! A CPU with AMX multiplies many tokens in tiles of BF16 instead of panels (`tiles`).
//!
//! Both work on one uniform form, `weight = scale * code + offset` with unsigned byte codes and
//! one scale and offset per 16 or 32 columns (`unpack`): a block type needs an unpacker, an
//! instruction set needs the kernels of `isa::Isa`, and every pair works.
//!
//! Each output element is computed by one thread in a fixed order: the number of threads never
//! changes a bit of the result.

#![allow(
    clippy::needless_range_loop,
    reason = "the loops of kernels index several arrays of one length"
)]

mod activations;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod cases;
pub mod cuda;
mod dispatch;
mod error;
mod float;
mod float_kernels;
#[cfg(test)]
mod fp8_tests;
#[cfg(test)]
mod gpu_tests;
mod int8_kernels;
mod isa;
mod portable;
pub mod reference;
mod scratch;
#[cfg(test)]
pub(crate) mod tests;
pub(crate) mod tiles;
mod unpack;
mod weights;

pub use activations::{Activations, Precision};
pub use error::LinearError;
pub use weights::WeightRows;

pub(crate) use activations::{ActivationWriter, Forms, SCALE_COLS};
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::transpose_16x16;
pub(crate) use dispatch::{Kernels, Operand, Span, kernels};
pub(crate) use scratch::{OutputPointer, TAIL_TOKENS, with_scratch};
#[cfg(target_arch = "x86_64")]
pub(crate) use tiles::amx::Configured;

use crate::cpu::{self, IsaLevel};
use crate::pool::ThreadPool;
use tiles::TileJob;

/// Rows of weights that a prefill panel holds.
pub(crate) const PANEL_ROWS: usize = 16;
/// Columns that are expanded at a time in prefill: 16 rows of them are 16 KiB of codes, which
/// leaves room in a 32 KiB L1 for the tokens that stream past.
pub(crate) const CHUNK_COLS: usize = 1024;
/// Up to this many tokens are multiplied row by row, more in panels. Measured on AVX-512 with
/// one thread (GFLOP/s of Q4_0, Q4_K, Q6_K): 4 tokens by rows 90, 88, 101; 5 tokens in panels 112,
/// 105, 81.
pub(crate) const MAX_ROW_TOKENS: usize = 4;
/// Which of a product's two ways is taken. They add in different orders, so that the last bits of their
/// results differ.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ProductOrder {
    /// Row by row for few tokens, in panels for many: the fastest.
    #[default]
    ByTokens,
    /// Row by row always: what a token gets does not depend on how many others there are.
    Rows,
    /// In panels (or tiles) always: as [`Self::Rows`], and faster where tokens are many.
    Panels,
}

impl ProductOrder {
    /// Whether this many tokens are multiplied row by row.
    pub(crate) fn is_row_by_row(self, tokens: usize) -> bool {
        match self {
            Self::ByTokens => tokens <= MAX_ROW_TOKENS,
            Self::Rows => true,
            Self::Panels => false,
        }
    }
}

/// Weight bytes that one task of generation reads: some 2 to 4 µs of memory time, so that the
/// slowest thread keeps the others waiting no longer than that.
const ROW_TASK_BYTES: usize = 48 << 10;

/// Multiplies `w` `[rows, cols]` with `x` `[tokens, cols]`; element `(t, r)` of the product goes
/// to `out[t * out_stride + r]`, the rest of `out` is left alone.
///
/// The arithmetic follows the precision that `x` was prepared with: [`Precision::Int8`] for
/// block types (F32, F16 and BF16 weights keep `f32` activations), [`Precision::F32`] for all.
///
/// # Errors
/// [`LinearError`] when the shapes disagree, `out` is too short, or `x` was prepared (with
/// [`Activations::prepare_for`]) for other types.
pub fn matmul(
    pool: &ThreadPool,
    w: WeightRows<'_>,
    x: &Activations,
    out: &mut [f32],
    out_stride: usize,
) -> Result<(), LinearError> {
    matmul_at(cpu::level(), pool, w, x, out, out_stride)
}

/// [`matmul`] of several weights with the same activations in one parallel region: query, key
/// and value, or gate and up. The product with `ws[i]` goes to `outs[i]`, `[tokens, rows]`.
///
/// # Errors
/// As [`matmul`], and when `ws` and `outs` differ in length.
pub fn matmul_many(
    pool: &ThreadPool,
    ws: &[WeightRows<'_>],
    x: &Activations,
    outs: &mut [&mut [f32]],
) -> Result<(), LinearError> {
    matmul_many_at(cpu::level(), pool, ws, x, outs)
}

pub(crate) fn matmul_at(
    level: IsaLevel,
    pool: &ThreadPool,
    w: WeightRows<'_>,
    x: &Activations,
    out: &mut [f32],
    out_stride: usize,
) -> Result<(), LinearError> {
    let product = Product::new(level, pool, w, x, out, out_stride)?;
    pool.run_ahead(product.tasks, &|task, next| {
        let next = next.map(|next| product.first_bytes(next));
        product.run(x, task, next.unwrap_or_default());
    });
    Ok(())
}

pub(crate) fn matmul_many_at(
    level: IsaLevel,
    pool: &ThreadPool,
    ws: &[WeightRows<'_>],
    x: &Activations,
    outs: &mut [&mut [f32]],
) -> Result<(), LinearError> {
    if ws.len() != outs.len() {
        return Err(LinearError::OutputCount {
            weights: ws.len(),
            outputs: outs.len(),
        });
    }
    let mut outs = outs.iter_mut();
    for group in ws.chunks(MANY) {
        let mut products = [const { None }; MANY];
        for ((product, w), out) in products.iter_mut().zip(group).zip(&mut outs) {
            *product = Some(Product::new(level, pool, *w, x, out, w.rows)?);
        }
        let tasks = products.iter().flatten().map(|product| product.tasks).sum();
        let find = |mut task: usize| {
            for product in products.iter().flatten() {
                if task < product.tasks {
                    return Some((product, task));
                }
                task -= product.tasks;
            }
            None
        };
        pool.run_ahead(tasks, &|task, next| {
            let next = next.and_then(find);
            let next = next.map(|(product, task)| product.first_bytes(task));
            if let Some((product, task)) = find(task) {
                product.run(x, task, next.unwrap_or_default());
            }
        });
    }
    Ok(())
}

/// Weights that share one parallel region; more are done in several.
const MANY: usize = 8;

/// One checked product, cut into tasks.
struct Product<'a> {
    w: WeightRows<'a>,
    method: Method,
    out: OutputPointer,
    out_stride: usize,
    rows_per_task: usize,
    tasks: usize,
}

/// How the tasks of a product work.
enum Method {
    Kernels(Kernels),
    /// With this many tasks for the same tokens.
    Tiles {
        row_tasks: usize,
    },
}

impl<'a> Product<'a> {
    fn new(
        level: IsaLevel,
        pool: &ThreadPool,
        w: WeightRows<'a>,
        x: &Activations,
        out: &mut [f32],
        out_stride: usize,
    ) -> Result<Self, LinearError> {
        check_shapes(&w, x, out.len(), out_stride)?;
        let operand = x.operand(w.ty)?;
        let rows_per_task = match operand {
            Operand::Tiles | Operand::SplitTiles => tiles::rows_per_job(w.rows, pool.threads()),
            _ if x.order().is_row_by_row(x.tokens()) => rows_per_task(&w, pool.threads()),
            _ => PANEL_ROWS,
        };
        let row_tasks = w.rows.div_ceil(rows_per_task);
        let (method, tasks) = match operand {
            Operand::Tiles | Operand::SplitTiles => (
                Method::Tiles { row_tasks },
                row_tasks * x.tokens().div_ceil(tiles::MAX_JOB_TOKENS),
            ),
            _ => (
                Method::Kernels(kernels(level, w.ty, operand)),
                row_tasks * x.tokens().min(1),
            ),
        };
        Ok(Self {
            w,
            method,
            out: OutputPointer::new(out),
            out_stride,
            rows_per_task,
            tasks,
        })
    }

    /// The weights that a task reads, of products that are computed row by row.
    fn first_bytes(&self, task: usize) -> &'a [u8] {
        match &self.method {
            Method::Kernels(_) => self.w.bytes_from(task * self.rows_per_task),
            Method::Tiles { .. } => &[],
        }
    }

    /// Runs a task; this thread reads `next` then.
    fn run(&self, x: &Activations, task: usize, next: &[u8]) {
        match &self.method {
            Method::Kernels(kernels) => self.run_kernels(kernels, x, task, next),
            Method::Tiles { row_tasks } => self.run_tiles(x, task % row_tasks, task / row_tasks),
        }
    }

    fn run_kernels(&self, kernels: &Kernels, x: &Activations, task: usize, next: &[u8]) {
        let row = task * self.rows_per_task;
        let span = Span {
            w: self.w,
            row,
            rows: self.rows_per_task.min(self.w.rows - row),
            x,
            tokens: x.all_tokens(),
            next,
        };
        // SAFETY: `check_shapes` proved that every token's `rows` results fit `out`; tasks have
        // rows of their own, so no element is written twice.
        let out = unsafe { self.out.add(row) };
        // SAFETY: as above for the span's rows; `kernels` came from `kernels` for this CPU.
        unsafe { kernels.multiply(&span, out, self.out_stride) };
    }

    fn run_tiles(&self, x: &Activations, row_task: usize, token_task: usize) {
        let row = row_task * self.rows_per_task;
        let token = token_task * tiles::MAX_JOB_TOKENS;
        let job = TileJob {
            w: self.w,
            row,
            rows: self.rows_per_task.min(self.w.rows - row),
            x: x.tiles(),
            x_rest: x.rests(),
            group: token / tiles::TILE,
            tokens: tiles::MAX_JOB_TOKENS.min(x.tokens() - token),
        };
        // SAFETY: `check_shapes` proved that the results fit `out`; tasks have rows or tokens of their own. The
        // activations are in tiles, so the CPU has them.
        unsafe {
            let out = self.out.add(token * self.out_stride + row);
            tiles::with_tile_scratch(|scratch| {
                tiles::multiply(&job, scratch, 0);
                tiles::store(&job, scratch.sums(0, &job), out, self.out_stride);
            });
        }
    }
}

fn rows_per_task(w: &WeightRows<'_>, threads: usize) -> usize {
    let by_bytes = ROW_TASK_BYTES / w.row_bytes().max(1);
    let by_threads = w.rows.div_ceil(threads * 4);
    by_bytes.min(by_threads).max(1)
}

fn check_shapes(
    w: &WeightRows<'_>,
    x: &Activations,
    out_len: usize,
    out_stride: usize,
) -> Result<(), LinearError> {
    if w.cols != x.cols() {
        return Err(LinearError::Columns {
            weight: w.cols,
            activations: x.cols(),
        });
    }
    if out_stride < w.rows {
        return Err(LinearError::Stride {
            rows: w.rows,
            stride: out_stride,
        });
    }
    let needed = match x.tokens() {
        0 => Some(0),
        tokens => (tokens - 1)
            .checked_mul(out_stride)
            .and_then(|last| last.checked_add(w.rows)),
    };
    match needed {
        Some(needed) if needed <= out_len => Ok(()),
        _ => Err(LinearError::OutputLength {
            tokens: x.tokens(),
            rows: w.rows,
            stride: out_stride,
            actual: out_len,
        }),
    }
}
