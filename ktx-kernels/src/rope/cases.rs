//! Frequencies of the model families, and shapes that the tests walk.

use super::{RopeConfig, RopeHeads, RopeScaling, Yarn};

pub(super) fn configs() -> Vec<(&'static str, RopeConfig)> {
    let scaled = |dim, base, scaling| RopeConfig {
        scaling,
        ..RopeConfig::plain(dim, base)
    };
    let deepseek = |m| Yarn {
        mscale: m,
        mscale_all_dim: m,
        ..Yarn::new(40.0)
    };
    let all_fast = Yarn {
        original_context: 1 << 20,
        ..Yarn::new(2.0)
    };
    let between = Yarn {
        truncate: false,
        ..Yarn::new(32.0)
    };
    vec![
        (
            "YaRN between dimensions",
            scaled(64, 150_000.0, RopeScaling::Yarn(between)),
        ),
        ("Llama", RopeConfig::plain(128, 10_000.0)),
        ("SmolLM2", RopeConfig::plain(64, 100_000.0)),
        ("Qwen", RopeConfig::plain(128, 1e6)),
        ("InternLM", RopeConfig::plain(128, 5e7)),
        ("one pair", RopeConfig::plain(2, 10_000.0)),
        ("odd pairs", RopeConfig::plain(10, 500.0)),
        (
            "linear",
            scaled(96, 10_000.0, RopeScaling::Linear { factor: 8.0 }),
        ),
        (
            "DeepSeek-V2",
            scaled(64, 10_000.0, RopeScaling::Yarn(deepseek(0.707))),
        ),
        (
            "DeepSeek-V3",
            scaled(64, 10_000.0, RopeScaling::Yarn(deepseek(1.0))),
        ),
        (
            "YaRN defaults",
            scaled(80, 10_000.0, RopeScaling::Yarn(Yarn::new(4.0))),
        ),
        (
            "YaRN, long original",
            scaled(64, 10_000.0, RopeScaling::Yarn(all_fast)),
        ),
        (
            "Llama 3",
            RopeConfig {
                freq_divisors: (0..64).map(|i| 1.0 + i as f32 / 9.0).collect(),
                ..RopeConfig::plain(128, 500_000.0)
            },
        ),
    ]
}

/// Heads for a rotated dimension, packed, strided and with an offset, and their buffer's slack.
pub(super) fn heads(dim: usize) -> Vec<RopeHeads> {
    vec![
        RopeHeads::contiguous(1, dim, 0),
        RopeHeads::contiguous(7, dim, 0),
        RopeHeads::contiguous(3, dim + 128, 128),
        RopeHeads {
            heads: 2,
            head_stride: dim + 3,
            token_stride: 2 * dim + 17,
            offset: 5,
        },
    ]
}

/// Positions per token: out of order, repeated, far.
pub(super) const POSITIONS: &[&[u32]] = &[
    &[0],
    &[5],
    &[0, 1, 2, 3, 4, 5, 6],
    &[255, 256, 257, 3, 3, 131_071, 100_000],
];
