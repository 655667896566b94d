//! Shapes and batches that the tests walk.

use super::{AttentionShape, MlaShape};

fn shape(heads: usize, kv_heads: usize, k_head_dim: usize, v_head_dim: usize) -> AttentionShape {
    AttentionShape {
        heads,
        kv_heads,
        k_head_dim,
        v_head_dim,
        scale: (k_head_dim as f32).powf(-0.5),
        window: None,
    }
}

/// Windows below, at and above pages and pieces.
pub(super) const WINDOWS: &[usize] = &[1, 2, 5, 63, 64, 65, 128, 500, 512, 700, usize::MAX];

/// Head counts and widths: MHA, GQA and MQA, every tail of the lanes and of the column blocks.
pub(super) fn shapes() -> Vec<AttentionShape> {
    vec![
        shape(9, 3, 64, 64),
        shape(4, 4, 80, 80),
        shape(6, 2, 96, 96),
        shape(8, 1, 128, 128),
        shape(2, 2, 192, 128),
        shape(5, 1, 1, 1),
        shape(3, 3, 7, 5),
        shape(7, 1, 17, 33),
        shape(4, 2, 33, 127),
    ]
}

pub(super) fn mla_shapes() -> Vec<MlaShape> {
    let mla = |heads, kv_lora, rope| MlaShape {
        heads,
        kv_lora,
        rope,
        scale: 0.09,
    };
    vec![
        mla(16, 512, 64),
        mla(5, 64, 16),
        mla(1, 40, 8),
        mla(3, 33, 7),
        mla(2, 16, 0),
    ]
}

/// Batches of `(past, tokens)` per sequence.
pub(super) const BATCHES: &[&[(usize, usize)]] = &[
    &[(0, 1)],
    &[(0, 2)],
    &[(5, 1)],
    &[(62, 5)],
    &[(63, 1)],
    &[(64, 1)],
    &[(127, 3)],
    &[(200, 17)],
    &[(0, 33)],
    &[(31, 33)],
    &[(0, 3), (100, 1), (63, 2), (7, 0), (0, 9)],
];

/// Batches that reach over several pieces.
pub(super) const LONG_BATCHES: &[&[(usize, usize)]] = &[
    &[(511, 1)],
    &[(510, 5)],
    &[(1700, 1)],
    &[(2100, 2), (30, 1)],
    &[(1000, 40)],
];
