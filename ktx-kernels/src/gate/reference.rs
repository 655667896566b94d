//! The router in double precision, by sorting.

use super::{ExpertGroups, GateConfig, GroupScore, Scoring, WeightScaling};

/// Ids in descending order of the choice score, and their weights, of one token.
pub(super) fn route(
    config: &GateConfig,
    logits: &[f32],
    bias: Option<&[f32]>,
) -> (Vec<u32>, Vec<f64>) {
    let logits: Vec<f64> = logits.iter().map(|&x| x.into()).collect();
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = logits.iter().map(|x| (x - max).exp()).sum();
    let scores: Vec<f64> = logits
        .iter()
        .map(|x| match config.scoring {
            Scoring::Softmax => (x - max).exp() / total,
            Scoring::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        })
        .collect();
    let mut choice = scores.clone();
    if let Some(bias) = bias {
        for (c, &b) in choice.iter_mut().zip(bias) {
            *c += f64::from(b);
        }
    }
    if let Some(groups) = &config.groups {
        mask(groups, &mut choice);
    }
    let ids = descending(&choice)[..config.top_k].to_vec();
    let mut weights: Vec<f64> = ids.iter().map(|&i| scores[i]).collect();
    let sum: f64 = weights.iter().sum::<f64>() + 1e-20;
    for w in &mut weights {
        *w = match config.scaling {
            WeightScaling::Scale(f) => *w * f64::from(f),
            WeightScaling::Normalise => *w / sum,
            WeightScaling::NormaliseThenScale(f) => *w / sum * f64::from(f),
        };
    }
    (ids.iter().map(|&i| i as u32).collect(), weights)
}

fn mask(groups: &ExpertGroups, choice: &mut [f64]) {
    let size = choice.len() / groups.n_group;
    let scores: Vec<f64> = choice
        .chunks(size)
        .map(|group| {
            let order = descending(group);
            match groups.score {
                GroupScore::Max => group[order[0]],
                GroupScore::SumOfTop2 => order.iter().take(2).map(|&i| group[i]).sum(),
            }
        })
        .collect();
    for &group in &descending(&scores)[groups.topk_group..] {
        choice[group * size..][..size].fill(groups.masked_value.into());
    }
}

fn descending(x: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..x.len()).collect();
    order.sort_by(|&a, &b| x[b].total_cmp(&x[a]).then(a.cmp(&b)));
    order
}
