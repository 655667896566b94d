//! Where keys and values come from: one page of one KV head at a time.

use crate::kv::{KvSlice, LayerKv, PAGE_TOKENS, SequenceKv};

/// Keys and values of a layer.
pub(super) enum Source<'a> {
    /// Paged keys and values, `kv_heads` heads to a row.
    Paged { kv: &'a LayerKv },
    /// Paged compressed rows; the values are the first columns of the keys.
    Latent { kv: &'a LayerKv },
    /// Plain slices `[positions, kv_heads, dim]` of one sequence.
    Dense {
        k: &'a [f32],
        v: &'a [f32],
        kv_heads: usize,
    },
}

/// Rows of a tile in one matrix; row `j` starts at `j * stride`.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) data: KvSlice<'a>,
    pub(super) stride: usize,
}

/// Keys and values of up to [`PAGE_TOKENS`] consecutive positions.
pub(super) struct KvTile<'a> {
    pub(super) k: Rows<'a>,
    /// `None`: the values are the first columns of the keys.
    pub(super) v: Option<Rows<'a>>,
}

impl<'a> Source<'a> {
    /// The tile that begins at `position`, a multiple of [`PAGE_TOKENS`], for one KV head.
    pub(super) fn tile(
        &self,
        sequence: &SequenceKv<'_>,
        position: usize,
        kv_head: usize,
        k_dim: usize,
        v_dim: usize,
    ) -> KvTile<'a> {
        match *self {
            Source::Paged { kv } => {
                let page = sequence.pages[position / PAGE_TOKENS];
                KvTile {
                    k: Rows {
                        data: kv.k_page(page).skip(kv_head * k_dim),
                        stride: kv.k_width(),
                    },
                    v: Some(Rows {
                        data: kv.v_page(page).skip(kv_head * v_dim),
                        stride: kv.v_width(),
                    }),
                }
            }
            Source::Latent { kv } => KvTile {
                k: Rows {
                    data: kv.k_page(sequence.pages[position / PAGE_TOKENS]),
                    stride: kv.k_width(),
                },
                v: None,
            },
            Source::Dense { k, v, kv_heads } => {
                let rows = |data: &'a [f32], dim: usize| Rows {
                    data: KvSlice::F32(&data[(position * kv_heads + kv_head) * dim..]),
                    stride: kv_heads * dim,
                };
                KvTile {
                    k: rows(k, k_dim),
                    v: Some(rows(v, v_dim)),
                }
            }
        }
    }
}
