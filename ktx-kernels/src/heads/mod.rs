//! One small matrix product per attention head, all heads in one parallel region: what folds latent
//! attention's key and value matrices into the query and out of the result.
//!
//! A single token multiplies `heads` matrices of some 64 KiB with one short row each, so a region
//! per head would cost more than the arithmetic. A task is one head and up to [`TILE_TOKENS`]
//! tokens: its rows are gathered, quantised and multiplied where they lie in the worker's cache.
//! Bound by reading the matrices once; with more tokens than a tile they are read once a tile.

pub mod cuda;

use std::cell::RefCell;

use crate::disjoint::DisjointMut;
use crate::linear::{Activations, LinearError, Precision, WeightRows, matmul};
use crate::pool::ThreadPool;

/// Tokens of a task. More share one expansion of a head's matrix, fewer balance better.
pub const TILE_TOKENS: usize = 64;

/// The part of each token's row that belongs to the heads: head `h` begins at `offset + h * stride`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadRows {
    /// Values of a token's row.
    pub width: usize,
    /// Values from one head to the next.
    pub stride: usize,
    /// Values before the first head's part.
    pub offset: usize,
}

impl HeadRows {
    /// `[tokens, heads, dim]`.
    pub fn packed(heads: usize, dim: usize) -> Self {
        Self {
            width: heads * dim,
            stride: dim,
            offset: 0,
        }
    }

    fn start(&self, token: usize, head: usize) -> usize {
        token * self.width + self.offset + head * self.stride
    }
}

#[derive(Default)]
struct Scratch {
    rows: Vec<f32>,
    products: Vec<f32>,
    activations: Activations,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// For each head `h` and token `t`: `out[t, h] = W_h x[t, h]`, where `weights(h)` is `[out, in]`.
///
/// `x` holds `tokens` rows as `x_rows` says, and `out` is packed `[tokens, heads, out]`.
///
/// # Errors
/// [`LinearError`] if a matrix is none, or its type cannot be multiplied.
///
/// # Panics
/// If a slice does not fit the shapes, or the heads' matrices differ in shape.
pub fn matmul_heads<'w>(
    pool: &ThreadPool,
    heads: usize,
    weights: &(dyn Fn(usize) -> Result<WeightRows<'w>, LinearError> + Sync),
    x: &[f32],
    x_rows: HeadRows,
    out: &mut [f32],
    precision: Precision,
) -> Result<(), LinearError> {
    let first_head = weights(0)?;
    let (rows, cols) = (first_head.rows(), first_head.cols());
    let tokens = x.len() / x_rows.width;
    assert_eq!(x.len(), tokens * x_rows.width, "matmul_heads: x");
    assert_eq!(out.len(), tokens * heads * rows, "matmul_heads: out");
    assert!(
        tokens == 0 || x_rows.start(0, heads - 1) + cols <= x_rows.width,
        "matmul_heads: {heads} heads of {cols} values leave {x_rows:?}"
    );
    let out = DisjointMut::new(out);
    let tiles = tokens.div_ceil(TILE_TOKENS);
    let failed = std::sync::OnceLock::new();
    pool.run(tiles * heads, &|task| {
        let (tile, head) = (task / heads, task % heads);
        let first = tile * TILE_TOKENS;
        let count = TILE_TOKENS.min(tokens - first);
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.rows.clear();
            for token in first..first + count {
                let start = x_rows.start(token, head);
                scratch.rows.extend_from_slice(&x[start..start + cols]);
            }
            scratch.products.resize(count * rows, 0.0);
            let Scratch {
                rows: x,
                products,
                activations,
            } = scratch;
            let result = weights(head).and_then(|w| {
                assert_eq!(
                    (w.rows(), w.cols()),
                    (rows, cols),
                    "matmul_heads: all heads have one shape"
                );
                activations.prepare_for(pool, x, count, cols, precision, &[w.ty()])?;
                matmul(pool, w, activations, products, rows)
            });
            if let Err(error) = result {
                failed.get_or_init(|| error);
                return;
            }
            for (i, product) in products.chunks_exact(rows).enumerate() {
                // SAFETY: each (token, head) belongs to one task.
                let place = unsafe { out.part(((first + i) * heads + head) * rows, rows) };
                place.copy_from_slice(product);
            }
        });
    });
    failed.into_inner().map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use ktx_gguf::{GgmlType, dequantize_row, random_blocks};

    use super::*;

    #[test]
    fn every_head_is_multiplied_with_its_own_matrix() {
        let (heads, rows, cols, tokens) = (3, 40, 32, 70);
        let x_rows = HeadRows {
            width: heads * 50 + 4,
            stride: 50,
            offset: 4,
        };
        let x: Vec<f32> = (0..tokens * x_rows.width)
            .map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0)
            .collect();
        for ty in [GgmlType::Q8_0, GgmlType::F32] {
            let blocks = rows * cols / ty.block_len();
            let bytes: Vec<Vec<u8>> = (0..heads)
                .map(|h| random_blocks(ty, blocks, h as u64))
                .collect();
            let weights = |h: usize| WeightRows::new(ty, rows, cols, &bytes[h]);
            let mut expected = vec![0.0f64; tokens * heads * rows];
            for h in 0..heads {
                let mut w = vec![0.0; rows * cols];
                dequantize_row(ty, &bytes[h], &mut w).unwrap();
                for t in 0..tokens {
                    for r in 0..rows {
                        let at = x_rows.start(t, h);
                        let terms = w[r * cols..].iter().zip(&x[at..at + cols]);
                        expected[(t * heads + h) * rows + r] =
                            terms.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    }
                }
            }
            for threads in [1, 2, 5] {
                let pool = ThreadPool::new(NonZeroUsize::new(threads).unwrap());
                let mut out = vec![0.0; expected.len()];
                matmul_heads(&pool, heads, &weights, &x, x_rows, &mut out, Precision::F32).unwrap();
                let error: f64 = out
                    .iter()
                    .zip(&expected)
                    .map(|(a, b)| (f64::from(*a) - b).powi(2))
                    .sum();
                let norm: f64 = expected.iter().map(|b| b * b).sum();
                assert!(error / norm < 1e-11, "{ty:?}: {}", error / norm);
            }
        }
    }
}
