//! The routers of the model families, and small ones with odd numbers.

use super::{ExpertGroups, GateConfig, GroupScore, Scoring, WeightScaling};

/// A router and whether it has a bias.
pub(super) struct Case {
    pub(super) name: &'static str,
    pub(super) config: GateConfig,
    pub(super) has_bias: bool,
}

fn softmax(
    name: &'static str,
    experts: usize,
    top_k: usize,
    groups: Option<ExpertGroups>,
    scaling: WeightScaling,
) -> Case {
    Case {
        name,
        config: GateConfig {
            experts,
            top_k,
            scoring: Scoring::Softmax,
            groups,
            scaling,
        },
        has_bias: false,
    }
}

fn sigmoid(
    name: &'static str,
    experts: usize,
    top_k: usize,
    (n_group, topk_group): (usize, usize),
    masked_value: f32,
    scaling: WeightScaling,
) -> Case {
    Case {
        name,
        config: GateConfig {
            experts,
            top_k,
            scoring: Scoring::Sigmoid,
            groups: Some(ExpertGroups {
                n_group,
                topk_group,
                score: GroupScore::SumOfTop2,
                masked_value,
            }),
            scaling,
        },
        has_bias: true,
    }
}

pub(super) fn cases() -> Vec<Case> {
    use WeightScaling::{Normalise, NormaliseThenScale, Scale};
    let v2_groups = ExpertGroups {
        n_group: 8,
        topk_group: 3,
        score: GroupScore::Max,
        masked_value: 0.0,
    };
    vec![
        softmax("Mixtral", 8, 2, None, Normalise),
        softmax("Qwen2-MoE", 64, 8, None, Scale(1.0)),
        softmax("Qwen3-MoE", 128, 8, None, Normalise),
        softmax("DeepSeek-V2-Lite", 64, 6, None, Scale(1.0)),
        softmax("DeepSeek-V2", 160, 6, Some(v2_groups), Scale(16.0)),
        sigmoid(
            "DeepSeek-V3",
            256,
            8,
            (8, 4),
            f32::NEG_INFINITY,
            NormaliseThenScale(2.5),
        ),
        sigmoid(
            "DeepSeek-V3, masked 0",
            256,
            8,
            (8, 4),
            0.0,
            NormaliseThenScale(2.5),
        ),
        sigmoid(
            "Moonlight",
            64,
            6,
            (1, 1),
            f32::NEG_INFINITY,
            NormaliseThenScale(2.446),
        ),
        sigmoid("groups of one", 6, 2, (6, 3), f32::NEG_INFINITY, Scale(0.5)),
        softmax("all of five", 5, 5, None, Normalise),
        softmax("one of one", 1, 1, None, Scale(3.0)),
    ]
}
