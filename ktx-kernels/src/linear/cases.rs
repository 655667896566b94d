//! The shapes that the tests and the benchmark walk.

use ktx_gguf::GgmlType;

use super::weights::is_weight_type;

/// One product: weights `[rows, cols]` of type `ty` with `tokens` tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Case {
    /// Type of the weights.
    pub ty: GgmlType,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// Tokens.
    pub tokens: usize,
}

/// All types that weights may have.
pub fn types() -> impl Iterator<Item = GgmlType> {
    GgmlType::ALL
        .iter()
        .copied()
        .filter(|ty| is_weight_type(*ty))
}

/// For every type: rows below, at and beyond a panel, columns that end inside every kind of
/// chunk, and 1 to 33 tokens, so that every tile and every tail occurs.
pub fn correctness() -> Vec<Case> {
    let mut cases = Vec::new();
    for ty in types() {
        let block = ty.block_len();
        let mut add = |rows, cols, tokens| {
            cases.push(Case {
                ty,
                rows,
                cols,
                tokens,
            })
        };
        for tokens in 1..=33 {
            add(19, cols_near(384, block), tokens);
        }
        for rows in [1, 2, 15, 16, 17, 33] {
            for tokens in [1, 3, 5, 9] {
                add(rows, cols_near(96, block), tokens);
            }
        }
        for cols in [32, 33, 250, 288, 512, 1023, 1024, 1056, 2304] {
            for tokens in [1, 2, 4, 7, 16] {
                add(18, cols_near(cols, block), tokens);
            }
        }
        add(7, cols_near(256, block), 300);
    }
    cases
}

/// Rows, columns and tokens for weights with scales of 128 x 128 blocks: below, at and beyond a block in both
/// directions, and tokens for both shapes of work.
pub fn block_scaled() -> Vec<[usize; 3]> {
    let mut cases = Vec::new();
    for rows in [1, 127, 128, 129, 260] {
        for cols in [1, 31, 127, 128, 129, 255, 256, 257, 384, 700] {
            cases.extend([1, 2, 3, 4, 5, 9, 16].map(|tokens| [rows, cols, tokens]));
        }
    }
    cases
}

/// Square products of one size: generation (1 token) and prefill (512 tokens).
pub fn speed(size: usize, tokens: usize) -> Vec<Case> {
    types()
        .map(|ty| Case {
            ty,
            rows: size,
            cols: size,
            tokens,
        })
        .collect()
}

fn cols_near(cols: usize, block: usize) -> usize {
    cols.next_multiple_of(block)
}
