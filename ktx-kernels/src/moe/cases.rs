//! The layers that the tests walk.

use ktx_gguf::GgmlType::{
    self, BF16, F16, F32, IQ4_NL, IQ4_XS, MXFP4, Q4_0, Q4_K, Q5_0, Q6_K, Q8_0,
};

use crate::activation::GatedActivation;

/// One layer's shape, and how many tokens go through it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Case {
    /// Types of gate, up and down.
    pub(super) types: [GgmlType; 3],
    pub(super) experts: usize,
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
    pub(super) top_k: usize,
    pub(super) tokens: usize,
    pub(super) biases: bool,
    pub(super) activation: GatedActivation,
}

const CLAMPED: GatedActivation = GatedActivation::ClampedSwiGlu {
    alpha: 1.702,
    limit: 7.0,
};

/// Mixtures of types as files have them, intermediate sizes that end inside panels and blocks of
/// 256, and numbers of tokens that make groups of all sizes.
pub(super) fn all() -> Vec<Case> {
    let shapes: [([GgmlType; 3], usize, usize, usize, usize); 11] = [
        ([Q4_K, Q4_K, Q6_K], 8, 256, 512, 2),
        ([Q4_K, Q4_K, Q5_0], 6, 256, 352, 3),
        ([Q4_K, Q4_K, Q8_0], 4, 512, 96, 2),
        ([Q8_0, Q8_0, Q8_0], 5, 96, 32, 1),
        ([IQ4_XS, Q6_K, IQ4_NL], 4, 256, 160, 4),
        ([Q4_0, F16, Q4_0], 3, 128, 64, 2),
        ([F32, F32, F32], 4, 40, 24, 2),
        ([BF16, BF16, F16], 4, 72, 50, 2),
        ([Q4_0, Q4_0, F32], 1, 64, 33, 1),
        ([MXFP4, MXFP4, MXFP4], 6, 96, 160, 4),
        ([F32, F16, BF16], 5, 40, 50, 3),
    ];
    let mut cases = Vec::new();
    for (types, experts, hidden, intermediate, top_k) in shapes {
        for tokens in [1, 2, 5, 17, 70] {
            cases.push(Case {
                types,
                experts,
                hidden,
                intermediate,
                top_k,
                tokens,
                biases: types[0] == MXFP4 || types[0] == F32,
                activation: match types[0] {
                    MXFP4 | BF16 => CLAMPED,
                    _ => GatedActivation::SwiGlu,
                },
            });
        }
    }
    cases.push(Case {
        types: [Q4_K, Q4_K, Q4_0],
        experts: 2,
        hidden: 256,
        intermediate: 64,
        top_k: 2,
        tokens: 600,
        biases: true,
        activation: CLAMPED,
    });
    cases
}
